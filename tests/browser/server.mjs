// What the chat page does with answers of the real server: streaming, stopping, several turns, keyboard, screenshots.

import assert from "node:assert/strict";

export function serverTests(options) {
  const tests = [
    { name: "answers, typed and settled by keyboard alone", run: byKeyboard, settings: { temperature: "1" } },
    { name: "keeps the conversation and regenerates the last answer", run: severalTurns },
    { name: "stops an answer with Escape and with the button", run: stops, settings: { maxTokens: "2000" } },
    { name: "copies an answer", run: copies, permissions: ["clipboard-read", "clipboard-write"] },
    { name: "starts a new chat, also in the middle of an answer", run: startsAnew, settings: { maxTokens: "2000" } },
    { name: "tells screen readers the answer", run: announces },
    { name: "follows a long answer until the reader scrolls up", run: follows, settings: { maxTokens: "2000" }, viewport: { width: 600, height: 400 } },
    { name: "sends the system prompt", run: sendsSystemPrompt, settings: { system: "You are brief." } },
    { name: "says when max tokens cut the answer", run: reachesTheLimit, settings: { maxTokens: "3" } },
  ];
  if (options["locked-url"]) {
    tests.push({ name: "asks for a key on a server that wants one", run: realKey, url: options["locked-url"], failedLoads: true });
  }
  if (options.screenshot) {
    const look = { run: takeScreenshot, settings: { maxTokens: "200" }, viewport: { width: 1200, height: 780 } };
    tests.push({ ...look, name: "light screenshot", colorScheme: "light" });
    tests.push({ ...look, name: "dark screenshot", colorScheme: "dark" });
  }
  return tests;
}

const FRANCE = "What is the capital of France? Answer in one word.";

async function byKeyboard(tab, { expect }) {
  await tab.ready();
  assert.equal(await tab.focused(), "prompt", "the message box has the focus from the start");

  await tab.walkTo("open-settings", "Shift+Tab");
  await tab.page.keyboard.press("Enter");
  await tab.walkTo("temperature");
  await tab.page.keyboard.press("Home");
  assert.equal(await tab.page.locator("#temperature-value").innerText(), "0.0");
  await tab.walkTo("max-tokens");
  await tab.page.keyboard.press("Control+A");
  await tab.page.keyboard.type("48");
  await tab.page.keyboard.press("Escape");
  assert.equal(await tab.focused(), "open-settings", "closing the settings gives the focus back");
  await tab.walkTo("prompt");

  await tab.page.keyboard.type(FRANCE);
  await tab.page.keyboard.press("Shift+Enter");
  assert.equal(await tab.page.locator("#prompt").inputValue(), `${FRANCE}\n`, "Shift+Enter is a new line");
  await tab.page.keyboard.press("Backspace");
  await tab.page.keyboard.press("Enter");
  await tab.idle();
  const answer = await tab.answer();
  assert.ok(answer.includes(expect), `the answer is ${JSON.stringify(answer)}`);

  const { path, body } = tab.posts[0];
  assert.equal(path, "/v1/chat/completions");
  assert.deepEqual(body.messages, [{ role: "user", content: FRANCE }]);
  assert.equal(body.temperature, 0);
  assert.equal(body.max_tokens, 48);
  assert.deepEqual(body.stream_options, { include_usage: true });

  assert.match(await tab.stat("ttft").innerText(), /^TTFT \d+(\.\d+)? m?s$/);
  assert.match(await tab.stat("rate").innerText(), /^[1-9]\d*(\.\d)? tok\/s$/, "exact, as the server counted the tokens");
  assert.match(await tab.stat("tokens").innerText(), /^\d+ tokens?$/);
  assert.match(await tab.stat("prompt").innerText(), /^prompt [1-9]\d*/);
  assert.equal(await tab.focused(), "prompt", "the next question can be typed at once");
}

async function severalTurns(tab) {
  await tab.ready();
  const first = await tab.ask(FRANCE);
  await tab.ask("And of Italy?");
  const { messages } = tab.posts[1].body;
  assert.deepEqual(messages.map(({ role }) => role), ["user", "assistant", "user"]);
  assert.equal(messages[1].content.trim().split(/\s+/)[0], first.trim().split(/\s+/)[0]);

  assert.equal(await tab.page.getByRole("button", { name: "Regenerate" }).count(), 1, "only the last answer");
  const before = await tab.answer();
  await tab.page.getByRole("button", { name: "Regenerate" }).press("Enter");
  await tab.idle();
  assert.equal(await tab.page.locator(".turn").count(), 2);
  assert.deepEqual(tab.posts[2].body.messages, messages, "asked again with the same conversation");
  assert.equal(await tab.answer(), before, "temperature 0 repeats itself");
}

async function stops(tab, { expect }) {
  await tab.ready();
  const begin = async () => {
    await tab.type("Write a very long story about a lighthouse keeper, with many chapters.");
    await tab.page.waitForFunction(() => document.querySelector(".turn:last-child .body").innerText.length > 20);
  };
  const stopped = async () => {
    await tab.idle();
    const text = await tab.answer();
    assert.match(await tab.page.locator(".turn:last-child .stats").innerText(), /stopped/);
    assert.match(await tab.stat("tokens").innerText(), /^≈ \d+ tokens?$/, "no usage comes for an answer cut short");
    await tab.page.waitForTimeout(300);
    assert.equal(await tab.answer(), text, "nothing more arrives");
  };

  await begin();
  await tab.page.keyboard.press("Escape");
  await stopped();
  await begin();
  await tab.walkTo("stop");
  await tab.page.keyboard.press("Enter");
  await stopped();

  await tab.page.locator("#new-chat").click();
  assert.ok((await tab.ask(FRANCE)).includes(expect), "the server goes on as before");
}

async function copies(tab) {
  await tab.ready();
  const shown = await tab.ask(FRANCE);
  await tab.page.getByRole("button", { name: "Copy the answer" }).press("Enter");
  await tab.page.locator(`.actions use[href="#icon-check"]`).waitFor();
  const copied = await tab.page.evaluate(() => navigator.clipboard.readText());
  assert.ok(copied.includes(shown.trim().split("\n")[0].slice(0, 20)), `copied ${JSON.stringify(copied)}`);
}

async function startsAnew(tab) {
  await tab.ready();
  await tab.type("Write a very long story about a river.");
  await tab.page.locator(".stats [data-stat=ttft]").waitFor();
  await tab.page.locator("#new-chat").press("Enter");
  assert.equal(await tab.page.locator(".turn").count(), 0);
  assert.ok(await tab.page.locator("#welcome").isVisible());
  assert.equal(await tab.focused(), "prompt");
  await tab.ask(FRANCE);
  assert.equal(tab.posts.at(-1).body.messages.length, 1, "nothing of the old conversation is sent");
  assert.equal(await tab.page.locator(".turn").count(), 1);
}

async function announces(tab) {
  await tab.ready();
  const answer = await tab.ask(FRANCE);
  const spoken = await tab.page.locator("#announcer[aria-live=polite]").innerText();
  assert.ok(spoken.includes(answer.trim().split("\n")[0]), `announced ${JSON.stringify(spoken)}`);
  assert.match(spoken, /Answer complete|max tokens/);
}

async function follows(tab) {
  await tab.ready();
  const left = () => tab.page.evaluate(() => document.documentElement.scrollHeight - scrollY - innerHeight);
  await tab.type("Write a very long story about a mountain, with many chapters.");
  await tab.page.waitForFunction(() => document.documentElement.scrollHeight > innerHeight + 300);
  assert.ok((await left()) < 100, "the newest text is in sight");
  await tab.page.mouse.move(300, 200);
  await tab.page.mouse.wheel(0, -250);
  await tab.page.locator("#to-latest").waitFor();
  const height = await tab.page.evaluate(() => document.documentElement.scrollHeight);
  await tab.page.waitForFunction((before) => document.documentElement.scrollHeight > before + 100, height);
  assert.ok((await left()) >= 200, "the page stays where the reader went");
  await tab.page.locator("#stop").click();
  await tab.idle();
  await tab.page.locator("#to-latest").press("Enter");
  assert.ok((await left()) < 2);
  await tab.page.locator("#to-latest").waitFor({ state: "hidden" });
}

async function sendsSystemPrompt(tab) {
  await tab.ready();
  await tab.ask("Hello");
  assert.deepEqual(tab.posts[0].body.messages[0], { role: "system", content: "You are brief." });
}

async function reachesTheLimit(tab) {
  await tab.ready();
  await tab.ask("Count from one to one hundred.");
  assert.match(await tab.page.locator(".stats").innerText(), /reached max tokens/);
  assert.equal(await tab.stat("tokens").innerText(), "3 tokens");
}

async function realKey(tab, { key, expect }) {
  await tab.load();
  await tab.page.locator("#key").waitFor();
  await tab.page.keyboard.type("not the key");
  await tab.page.keyboard.press("Enter");
  await tab.page.getByText("did not accept that key").waitFor();
  await tab.page.keyboard.type(key);
  await tab.page.keyboard.press("Enter");
  await tab.page.locator("#key-form").waitFor({ state: "hidden" });
  assert.ok((await tab.ask(FRANCE)).includes(expect));
}

async function takeScreenshot(tab, { screenshot }) {
  await tab.ready();
  await tab.ask(FRANCE);
  await tab.ask("Write a Python function that tells whether a number is prime.");
  const dark = await tab.page.evaluate(() => matchMedia("(prefers-color-scheme: dark)").matches);
  // The end of a conversation, as it looks when the next question is due; the cursor's blinking is not part of it.
  await tab.page.screenshot({ path: dark ? screenshot.replace(/\.png$/, "-dark.png") : screenshot, caret: "hide", animations: "disabled" });
}
