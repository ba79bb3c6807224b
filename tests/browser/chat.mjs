// Drives the chat page of a running server in headless Chromium, by keyboard wherever a reader would use one.
//
//   node chat.mjs --url http://127.0.0.1:8000 [--locked-url URL --key KEY] [--screenshot chat.png] [--expect Paris]
//
// --locked-url is a second server that asks for --key; without it the 401 answers are made up at the network boundary.
// --screenshot writes the page in the light theme, and beside it the dark one (chat-dark.png).
// --only runs the tests whose name contains the given text.
// --expect is what the answer to the first question must contain.
// Chromium is $CUPOLA_CHROMIUM or /usr/bin/chromium. The last line is `N passed, N failed`; the exit code is 1 on failure.

import assert from "node:assert/strict";
import { parseArgs } from "node:util";
import { chromium } from "playwright-core";
import { pageTests } from "./page.mjs";
import { serverTests } from "./server.mjs";

const { values: options } = parseArgs({
  options: {
    url: { type: "string", default: process.env.CUPOLA_URL ?? "http://127.0.0.1:8000" },
    "locked-url": { type: "string" },
    key: { type: "string" },
    screenshot: { type: "string" },
    expect: { type: "string", default: "Paris" },
    only: { type: "string", default: "" },
  },
});

const PATIENCE = 60_000; // milliseconds: a debug build on a busy machine is slow

// One browser tab on the chat page, which remembers everything that must not happen.
class Tab {
  static async open(browser, { url = options.url, settings = {}, path = "/", ...context }) {
    const tab = new Tab();
    tab.url = url;
    tab.context = await browser.newContext({ viewport: { width: 1200, height: 800 }, ...context });
    tab.page = await tab.context.newPage();
    tab.page.setDefaultTimeout(PATIENCE);
    tab.complaints = [];
    tab.posts = [];
    tab.page.on("console", (message) => {
      if (["error", "warning"].includes(message.type())) tab.complaints.push(`console: ${message.text()}`);
    });
    tab.page.on("pageerror", (error) => tab.complaints.push(`uncaught: ${error.message}`));
    tab.page.on("request", (request) => {
      const target = new URL(request.url());
      if (target.protocol !== "data:" && target.origin !== new URL(url).origin) {
        tab.complaints.push(`left the origin: ${request.url()}`);
      }
      if (request.method() === "POST") tab.posts.push({ path: target.pathname, headers: request.headers(), body: request.postDataJSON() });
    });
    const kept = JSON.stringify({ temperature: "0", maxTokens: "64", ...settings });
    await tab.page.addInitScript((value) => localStorage.getItem("cupola.settings") ?? localStorage.setItem("cupola.settings", value), kept);
    tab.response = null;
    tab.path = path;
    return tab;
  }

  async load() {
    this.response = await this.page.goto(new URL(this.path, this.url).href);
    return this;
  }

  async ready() {
    await this.load();
    await this.page.waitForFunction(() => document.querySelector("#model").value !== "");
    return this;
  }

  async type(question) {
    await this.page.locator("#prompt").focus();
    await this.page.keyboard.type(question);
    await this.page.keyboard.press("Enter");
  }

  async idle() {
    await this.page.locator(".answer").last().waitFor();
    await this.page.waitForFunction(() => document.querySelector("#stop").hidden && !document.querySelector(".writing"));
  }

  async ask(question) {
    await this.type(question);
    await this.idle();
    return this.answer();
  }

  answer() {
    return this.page.locator(".answer .body").last().innerText();
  }

  stat(name) {
    return this.page.locator(`.turn:last-child [data-stat="${name}"]`);
  }

  focused() {
    return this.page.evaluate(() => document.activeElement.id || document.activeElement.className || document.activeElement.tagName);
  }

  // Presses `key` until the element with `id` has the focus.
  async walkTo(id, key = "Tab") {
    const seen = [];
    for (let i = 0; i < 40; i += 1) {
      if ((await this.focused()) === id) return;
      await this.page.keyboard.press(key);
      seen.push(await this.focused());
    }
    assert.fail(`${key} never reached #${id}; it went through ${seen.join(", ")}`);
  }

  // Answers requests to `path` with what `reply(request)` returns; where that is null they go on to the server.
  intercept(path, reply) {
    return this.page.route(`**${path}`, (route) => {
      const made = reply(route.request());
      return made ? route.fulfill(made) : route.continue();
    });
  }
}

const browser = await chromium.launch({
  executablePath: process.env.CUPOLA_CHROMIUM ?? "/usr/bin/chromium",
  headless: true,
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
});

let passed = 0;
let failed = 0;
for (const { name, run, failedLoads = false, ...setup } of [...pageTests, ...serverTests(options)]) {
  if (!name.includes(options.only)) continue;
  const began = performance.now();
  const tab = await Tab.open(browser, setup);
  try {
    await run(tab, options);
    // Chromium itself reports every refused request on the console; only tests that provoke one may have it.
    const complaints = tab.complaints.filter((text) => !(failedLoads && text.includes("Failed to load resource")));
    assert.deepEqual(complaints, [], "the page complained");
    passed += 1;
    console.log(`ok      ${name} (${((performance.now() - began) / 1000).toFixed(1)} s)`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  ${name}\n${String(error.stack ?? error).replace(/^/gm, "        ")}`);
  } finally {
    await tab.context.close();
  }
}
await browser.close();
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed === 0 && passed > 0 ? 0 : 1;
