// What the chat page does by itself: safety, themes, narrow screens, keys, errors. Bad answers are made up at the network boundary.

import assert from "node:assert/strict";

export const pageTests = [
  { name: "is served under a strict policy", run: strictPolicy },
  { name: "follows the system's theme and lets the reader override it", run: themes, colorScheme: "light" },
  { name: "has readable contrast in the light theme", run: contrast, colorScheme: "light" },
  { name: "has readable contrast in the dark theme", run: contrast, colorScheme: "dark" },
  { name: "fits a screen 360 pixels wide", run: narrow, viewport: { width: 360, height: 640 } },
  { name: "names every control, in a sensible order", run: named },
  { name: "renders Markdown, the same however it arrives", run: markdown },
  { name: "never turns an answer into markup", run: hostile },
  { name: "decodes events cut anywhere", run: eventSplits },
  { name: "asks for a key and goes on with the question", run: keyAsked, failedLoads: true },
  { name: "shows a refusal and tries again", run: refused, failedLoads: true },
  { name: "keeps the text before an error in mid-stream", run: brokenStream },
  { name: "offers plain text where there is no chat template", run: noTemplate, failedLoads: true },
  { name: "says when the server cannot be reached", run: unreachable, failedLoads: true },
  { name: "leaves failed questions out of the conversation", run: failedLeftOut, failedLoads: true },
  { name: "refuses a max tokens that is no number of tokens", run: badLimit },
];

const CHAT = "/v1/chat/completions";

const sse = (...data) => ({
  status: 200,
  contentType: "text/event-stream",
  body: data.map((d) => `data: ${typeof d === "string" ? d : JSON.stringify(d)}\n\n`).join(""),
});
const piece = (content, finish_reason = null) => ({ choices: [{ index: 0, delta: { content }, finish_reason }], usage: null });
const usage = (completion_tokens) => ({ choices: [], usage: { prompt_tokens: 9, completion_tokens, total_tokens: 9 + completion_tokens } });
const answering = (text) => sse(piece(text), piece("", "stop"), usage(5), "[DONE]");
const refusal = (status, message, code, headers = {}) => ({
  status,
  headers: { "content-type": "application/json", ...headers },
  body: JSON.stringify({ error: { message, type: "invalid_request_error", param: null, code } }),
});

async function strictPolicy(tab) {
  await tab.ready();
  const policy = tab.response.headers()["content-security-policy"] ?? "";
  assert.match(policy, /default-src 'none'/);
  assert.doesNotMatch(policy, /unsafe-|\*|https?:/);
  assert.equal(tab.response.headers()["x-content-type-options"], "nosniff");
  assert.equal(await tab.page.title(), "Cupola");
}

const background = (tab) => tab.page.evaluate(() => getComputedStyle(document.body).backgroundColor);

async function themes(tab) {
  await tab.ready();
  const light = await background(tab);
  await tab.page.emulateMedia({ colorScheme: "dark" });
  const dark = await background(tab);
  assert.notEqual(light, dark, "the system's theme counts");

  await tab.page.locator("#theme").press("Enter");
  assert.equal(await background(tab), light, "the reader's choice is stronger");
  await tab.page.reload();
  assert.equal(await background(tab), light, "and stays");
  await tab.page.locator("#theme").press("Enter");
  assert.equal(await background(tab), dark);
  await tab.page.emulateMedia({ colorScheme: "light" });
  assert.equal(await background(tab), light, "choosing what the system has follows it again");
}

// WCAG 2.2, 1.4.3: text of normal size needs 4.5 to 1.
async function contrast(tab) {
  await tab.intercept(CHAT, () => answering("Text with `code` and **bold**.\n\n```rust\nfn main() {}\n```"));
  await tab.ready();
  await tab.ask("What?");
  await tab.intercept(CHAT, () => refusal(400, "No.", "refused"));
  await tab.ask("And?");
  tab.complaints = []; // the refusal, which this test made for its colours
  const poor = await tab.page.evaluate(() => {
    // color-mix() and light-dark() come back in several notations; a canvas makes bytes of all of them.
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const bytes = (colour) => {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
      return canvas.getImageData(0, 0, 1, 1).data;
    };
    const luminance = (rgb) => {
      const [r, g, b] = [...rgb].slice(0, 3).map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (node) => {
      for (let at = node; at; at = at.parentElement) {
        const colour = bytes(getComputedStyle(at).backgroundColor);
        if (colour[3] > 200) return colour;
      }
      throw new Error("no background");
    };
    const found = [];
    for (const node of document.querySelectorAll("header *, main *, footer *")) {
      const text = [...node.childNodes].some((child) => child.nodeType === Node.TEXT_NODE && child.data.trim());
      if (!text || node.disabled || !node.checkVisibility({ visibilityProperty: true })) continue;
      const [a, b] = [luminance(bytes(getComputedStyle(node).color)), luminance(behind(node))].sort((x, y) => y - x);
      const ratio = (a + 0.05) / (b + 0.05);
      if (ratio < 4.5) found.push(`${node.tagName}.${node.className} ${ratio.toFixed(2)}`);
    }
    return found;
  });
  assert.deepEqual(poor, []);
}

async function narrow(tab) {
  await tab.intercept(CHAT, () => answering("A list:\n\n1. `an_identifier_longer_than_the_screen_is_wide_without_any_break`\n\n```\n" + "x".repeat(300) + "\n```"));
  await tab.ready();
  await tab.ask("W".repeat(80));
  const { width, outside } = await tab.page.evaluate(() => ({
    width: document.documentElement.scrollWidth,
    outside: [...document.querySelectorAll("button, select, textarea")]
      .filter((node) => node.checkVisibility())
      .map((node) => [node.id || node.textContent, node.getBoundingClientRect()])
      .filter(([, box]) => box.left < 0 || box.right > innerWidth || box.width < 24 || box.height < 24)
      .map(([name]) => name),
  }));
  assert.equal(width, 360, "nothing scrolls sideways");
  assert.deepEqual(outside, [], "every control is inside the screen and at least 24 pixels large");
  await tab.page.locator("#open-settings").click();
  assert.ok((await tab.page.locator("#settings").boundingBox()).width <= 360);
}

async function named(tab) {
  await tab.ready();
  const nameless = await tab.page.evaluate(() =>
    [...document.querySelectorAll("button, select, textarea, input")]
      .filter((node) => !(node.getAttribute("aria-label") || node.labels?.length || node.textContent.trim()))
      .map((node) => node.outerHTML),
  );
  assert.deepEqual(nameless, []);
  await tab.page.locator(".skip").focus();
  const order = [];
  while (order.at(-1) !== "prompt" && order.length < 20) {
    await tab.page.keyboard.press("Tab");
    order.push(await tab.focused());
  }
  assert.deepEqual(order.slice(0, 4), ["model", "new-chat", "open-settings", "theme"]);
  assert.equal(order.at(-1), "prompt");
  await tab.walkTo("skip", "Shift+Tab");
  await tab.page.keyboard.press("Enter");
  await tab.page.waitForFunction(() => document.activeElement.id === "prompt");
}

// The HTML that the page's own renderer makes of `text`: given whole, or growing by one character at a time.
const rendered = (tab, text, growing = false) =>
  tab.page.evaluate(
    async ([source, grow]) => {
      const { MarkdownView } = await import("/ui/markdown.js");
      const box = document.createElement("div");
      const view = new MarkdownView(box);
      for (let end = grow ? 1 : source.length; end <= source.length; end += 1) view.show(source.slice(0, end));
      for (const button of box.querySelectorAll("button")) button.remove();
      for (const node of box.querySelectorAll("*")) for (const { name } of [...node.attributes]) if (name !== "start") node.removeAttribute(name);
      return box.innerHTML;
    },
    [text, growing],
  );

async function markdown(tab) {
  await tab.ready();
  const code = (language, text) => `<div><div><span>${language}</span></div><pre><code>${text}</code></pre></div>`;
  const cases = [
    ["Plain.\nSame paragraph.\n\nNext.", "<p>Plain.\nSame paragraph.</p><p>Next.</p>"],
    ["**bold**, *soft*, ***both***, `a * b`, ``x ` y``", "<p><strong>bold</strong>, <em>soft</em>, <strong><em>both</em></strong>, <code>a * b</code>, <code>x ` y</code></p>"],
    ["2 * 3 * 4, 2*3*4, snake__case__name, **open, `open", "<p>2 * 3 * 4, 2*3*4, snake__case__name, **open, `open</p>"],
    ["# One\n## Two\ntext\n---", "<h3>One</h3><h4>Two</h4><p>text</p><hr>"],
    ["- a\n- **b**\n  more\n\nafter", "<ul><li>a</li><li><strong>b</strong>\nmore</li></ul><p>after</p>"],
    ["3. a\n   - x\n   - y\n4. b", '<ol start="3"><li>a<ul><li>x</li><li>y</li></ul></li><li>b</li></ol>'],
    ["1. a\n\n   ```sh\n   ls\n   ```\n2. b", `<ol><li>a${code("sh", "ls")}</li><li>b</li></ol>`],
    ["```python\nif a < b:\n    pass\n```\nafter", `${code("python", "if a &lt; b:\n    pass")}<p>after</p>`],
    ["text\n```\nnot closed\n# no heading", `<p>text</p>${code("code", "not closed\n# no heading")}`],
    ["- ".repeat(60) + "deep", null],
    ["*".repeat(5000), null],
  ];
  for (const [source, html] of cases) {
    const whole = await rendered(tab, source);
    if (html !== null) assert.equal(whole, html, JSON.stringify(source));
    if (source.length < 500) assert.equal(await rendered(tab, source, true), whole, `growing: ${JSON.stringify(source)}`);
  }
}

async function hostile(tab) {
  const text = [
    '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>',
    "[link](javascript:window.pwned=1) ![image](http://example.invalid/x.png)",
    "```<img onerror=window.pwned=1>\n</code></pre><script>window.pwned=1</script>\n```",
    "**<iframe srcdoc='<script>parent.pwned=1</script>'>**",
  ].join("\n\n");
  await tab.intercept(CHAT, () => answering(text));
  await tab.ready();
  const shown = await tab.ask('<img src=x onerror="window.pwned=1">');
  assert.ok(shown.includes("<script>window.pwned=1</script>"), "shown as the text it is");
  assert.equal(await tab.page.locator("#log :is(img, script, iframe, a)").count(), 0);
  assert.equal(await tab.page.evaluate(() => window.pwned), undefined);
}

async function eventSplits(tab) {
  await tab.ready();
  const wrong = await tab.page.evaluate(async () => {
    const { eventData } = await import("/ui/api.js");
    const text = ': ping\r\n\r\ndata: {"a":"é🙂"}\n\nevent: x\r\ndata: one\r\ndata:two\r\n\r\nid: 3\rdata: cr\r\r\n\ndata: [DONE]\n\ndata: lost';
    const expected = JSON.stringify(['{"a":"é🙂"}', "one\ntwo", "cr", "[DONE]"]);
    const bytes = new TextEncoder().encode(text);
    const decode = async (parts) => {
      const stream = new ReadableStream({
        start(controller) {
          parts.forEach((part) => controller.enqueue(part));
          controller.close();
        },
      });
      const seen = [];
      for await (const data of eventData(stream)) seen.push(data);
      return JSON.stringify(seen);
    };
    const found = [];
    for (let at = 0; at <= bytes.length; at += 1) {
      const seen = await decode([bytes.slice(0, at), bytes.slice(at)]);
      if (seen !== expected) found.push(`${at}: ${seen}`);
    }
    const each = await decode([...bytes].map((byte) => Uint8Array.of(byte)));
    if (each !== expected) found.push(`each: ${each}`);
    return found;
  });
  assert.deepEqual(wrong, []);
}

async function keyAsked(tab) {
  let locked = false;
  const guard = (request) =>
    locked && request.headers().authorization !== "Bearer right" ? refusal(401, "Missing or wrong API key.", "invalid_api_key") : null;
  await tab.intercept("/v1/models", guard);
  await tab.intercept(CHAT, (request) => guard(request) ?? answering("Here you are."));
  await tab.ready();
  assert.ok(await tab.page.locator("#key-form").isHidden());
  locked = true;
  await tab.ask("Hello");
  await tab.page.waitForFunction(() => document.activeElement.id === "key");
  await tab.page.keyboard.type("wrong");
  await tab.page.keyboard.press("Enter");
  await tab.page.getByText("did not accept that key").waitFor();
  await tab.page.keyboard.type("right");
  await tab.page.keyboard.press("Enter");
  await tab.page.locator("#key-form").waitFor({ state: "hidden" });
  await tab.page.getByText("Here you are.").first().waitFor();
  await tab.idle();
  assert.equal(await tab.page.locator(".turn").count(), 1, "the question went on by itself");
  assert.equal(await tab.focused(), "prompt");

  const kept = await tab.page.evaluate(() => [JSON.stringify(sessionStorage), JSON.stringify(localStorage)]);
  assert.ok(kept[0].includes("right") && !kept[1].includes("right"), "kept for this tab only");
  await tab.page.reload();
  await tab.page.waitForFunction(() => document.querySelector("#model").value !== "");
  assert.ok(await tab.page.locator("#key-form").isHidden(), "a reload in the same tab keeps the key");
  await tab.page.locator("#open-settings").press("Enter");
  await tab.page.getByRole("button", { name: "Forget the API key" }).press("Enter");
  assert.equal(await tab.page.evaluate(() => JSON.stringify(sessionStorage)), "{}");
}

async function refused(tab) {
  let busy = true;
  await tab.intercept(CHAT, () => (busy ? refusal(429, "64 requests are waiting.", "queue_full", { "retry-after": "2" }) : answering("Now it works.")));
  await tab.ready();
  await tab.ask("Hello");
  const alert = tab.page.getByRole("alert").filter({ hasText: "64 requests are waiting." });
  assert.match(await alert.innerText(), /HTTP 429 · queue_full · try again in 2 s/);
  busy = false;
  await alert.getByRole("button", { name: "Try again" }).press("Enter");
  await tab.page.getByText("Now it works.").first().waitFor();
  await tab.idle();
  assert.ok(await alert.isHidden());
}

async function brokenStream(tab) {
  const broken = [
    [sse(piece("Half an "), { error: { message: "The engine failed.", type: "server_error", param: null, code: "internal" } }, "[DONE]"), "The engine failed."],
    [sse(piece("Half an ")), "closed the connection before the answer was complete"],
    [sse(piece("Half an "), "{not json"), "cannot be understood"],
  ];
  await tab.ready();
  for (const [reply, message] of broken) {
    await tab.intercept(CHAT, () => reply);
    assert.equal((await tab.ask("Hello")).trim(), "Half an");
    const shown = await tab.page.locator(".turn:last-child [role=alert]").innerText();
    assert.ok(shown.includes(message), shown);
  }
}

async function noTemplate(tab) {
  await tab.intercept(CHAT, () => refusal(400, "This model has no chat template; pass one with --chat-template.", "no_chat_template"));
  await tab.intercept("/v1/completions", () => sse({ choices: [{ index: 0, text: " Paris.", finish_reason: "stop" }], usage: null }, usage(2), "[DONE]"));
  await tab.ready();
  await tab.ask("The capital of France is");
  assert.match(await tab.page.locator(".failure").innerText(), /This model has no chat template/);
  await tab.page.getByRole("button", { name: "Continue as plain text" }).press("Enter");
  await tab.idle();
  assert.equal((await tab.answer()).trim(), "Paris.");
  assert.equal(tab.posts[1].path, "/v1/completions");
  assert.equal(tab.posts[1].body.prompt, "The capital of France is");
}

async function unreachable(tab) {
  let down = true;
  await tab.page.route("**/v1/models", (route) => (down ? route.abort("connectionrefused") : route.continue()));
  await tab.load();
  await tab.page.getByText("The server cannot be reached.").waitFor();
  down = false;
  await tab.page.locator("#notice-retry").press("Enter");
  await tab.page.waitForFunction(() => document.querySelector("#model").value !== "");
  assert.ok(await tab.page.locator("#notice").isHidden());
  await tab.page.route(`**${CHAT}`, (route) => route.abort("connectionrefused"));
  await tab.ask("Hello");
  await tab.page.locator(".failure").getByText("The server cannot be reached.").waitFor();
}

async function failedLeftOut(tab) {
  let fail = false;
  await tab.intercept(CHAT, () => (fail ? refusal(500, "No.", null) : answering("Yes.")));
  await tab.ready();
  await tab.ask("one");
  fail = true;
  await tab.ask("two");
  fail = false;
  await tab.ask("three");
  assert.deepEqual(tab.posts.at(-1).body.messages.map(({ content }) => content), ["one", "Yes.", "three"]);
}

async function badLimit(tab) {
  await tab.intercept(CHAT, () => answering("Yes."));
  await tab.ready();
  await tab.page.locator("#open-settings").click();
  await tab.page.locator("#max-tokens").fill("0");
  assert.equal(await tab.page.locator("#max-tokens").getAttribute("aria-invalid"), "true");
  await tab.page.keyboard.press("Escape");
  await tab.ask("Hello");
  assert.equal("max_tokens" in tab.posts[0].body, false);
}
