// One question and its answer on the page, and the figures measured while the answer arrived.
//
//   waiting --first text--> writing --end--> done
//      |                       |
//      +------ failure --------+----------> failed   (text that had arrived stays)

import { announce, copyFrom, el, icon } from "./dom.js";
import { MarkdownView } from "./markdown.js";

// The clock of one generation, started when the request leaves the page. Times are milliseconds.
export class Meter {
  #start = performance.now();
  #first = null;
  #last = null;
  #pieces = 0;
  usage = null;

  text() {
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.#pieces += 1;
  }

  // Until the first text: network, queue and prefill together.
  get ttft() {
    return this.#first === null ? null : this.#first - this.#start;
  }

  get total() {
    return performance.now() - this.#start;
  }

  // Only the server knows how many tokens it made. An answer cut short carries no usage: its pieces are counted instead.
  get tokens() {
    return this.usage?.completion_tokens ?? this.#pieces;
  }

  get exact() {
    return this.usage !== null;
  }

  // Tokens per second after the first, which TTFT accounts for.
  get rate() {
    const seconds = (this.#last - this.#first) / 1000;
    return this.tokens > 1 && seconds > 0 ? (this.tokens - 1) / seconds : null;
  }
}

export class Turn {
  question;
  answer = "";
  #parts = {};
  #markdown;
  #spoken = 0;
  #frame = 0;

  // `onAgain` asks for the answer once more.
  constructor(question, { onAgain }) {
    this.question = question;
    const { article, ...parts } = build(question);
    this.node = article;
    this.#parts = parts;
    this.#markdown = new MarkdownView(parts.body);
    parts.copy.addEventListener("click", () => copyFrom(parts.copy, this.answer));
    parts.again.addEventListener("click", onAgain);
    parts.retry.addEventListener("click", onAgain);
  }

  begin(model) {
    this.answer = "";
    this.#spoken = 0;
    const { answer, who, body, stats, actions, failure } = this.#parts;
    this.#markdown.show("");
    who.textContent = model;
    body.append(el("span", { class: "dots", role: "img", "aria-label": "Waiting for the first token" }, el("i"), el("i"), el("i")));
    stats.replaceChildren();
    actions.hidden = failure.hidden = true;
    answer.classList.add("writing");
    answer.setAttribute("aria-busy", "true");
  }

  append(text, meter) {
    if (this.answer === "") this.#parts.stats.replaceChildren(...ttftOf(meter));
    this.answer += text;
    // Tokens may come faster than frames: draw once per frame.
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw();
    });
  }

  // `how` is "stop", "length" (cut by max tokens) or "stopped" (by the reader).
  finish(how, meter) {
    this.#settle();
    const notes = { length: "reached max tokens", stopped: this.answer ? "stopped" : "stopped before the first token" };
    this.#parts.stats.replaceChildren(...figures(meter), ...(notes[how] ? [el("span", { textContent: notes[how] })] : []));
    this.#parts.copy.hidden = this.answer === "";
    this.#parts.actions.hidden = false;
    const rate = meter.rate ? `, ${meter.rate.toFixed(0)} tokens per second` : "";
    announce(notes[how] ?? `Answer complete${rate}`);
  }

  // `fallback`, where there is one, is `{ label, run }`: another way to get an answer.
  fail({ message, detail, fallback }) {
    this.#settle();
    const { failure, what, more, buttons, retry } = this.#parts;
    what.textContent = message;
    more.textContent = detail ?? "";
    more.hidden = !detail;
    buttons.replaceChildren(retry);
    if (fallback) {
      const button = el("button", { type: "button", class: "plain", textContent: fallback.label });
      button.addEventListener("click", fallback.run);
      buttons.append(button);
    }
    failure.hidden = false;
  }

  #settle() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    this.#draw();
    this.#speak(this.#markdown.texts().length);
    this.#parts.answer.classList.remove("writing");
    this.#parts.answer.removeAttribute("aria-busy");
  }

  #draw() {
    this.#parts.body.querySelector(":scope > .dots")?.remove();
    this.#markdown.show(this.answer);
    this.#speak(this.#markdown.texts().length - 1); // the last block may still grow
  }

  #speak(until) {
    const texts = this.#markdown.texts();
    for (; this.#spoken < until; this.#spoken += 1) announce(texts[this.#spoken]);
  }
}

function build(question) {
  const who = el("span");
  const body = el("div", { class: "body" });
  const stats = el("div", { class: "stats" });
  const copy = el("button", { type: "button", class: "quiet", "aria-label": "Copy the answer" }, icon("copy"), "Copy");
  const again = el("button", { type: "button", class: "quiet only-last" }, icon("retry"), "Regenerate");
  const actions = el("div", { class: "actions", hidden: true }, copy, again);
  const what = el("p", { class: "what" });
  const more = el("p", { class: "muted" });
  const retry = el("button", { type: "button", class: "plain", textContent: "Try again" });
  const buttons = el("div", { class: "buttons only-last" }, retry);
  const failure = el("div", { class: "card danger failure", role: "alert", hidden: true }, what, more, buttons);
  const name = el("div", { class: "who" }, icon("dome"), who);
  const answer = el("div", { class: "answer" }, name, body, failure, el("div", { class: "under" }, actions, stats));
  const asked = el("div", { class: "question", dir: "auto" }, el("span", { class: "visually-hidden", textContent: "You: " }), question);
  name.querySelector("svg").classList.add("mark");
  return { article: el("article", { class: "turn" }, asked, answer), answer, who, body, stats, actions, copy, again, failure, what, more, buttons, retry };
}

function figure(name, label, value, title) {
  return el("span", { "data-stat": name, title }, ...(label ? [`${label} `] : []), el("b", { textContent: value }));
}

function ttftOf(meter) {
  return [figure("ttft", "TTFT", duration(meter.ttft), "Time to first token: from sending the request to the first text, as this page saw it")];
}

function figures(meter) {
  if (meter.ttft === null) return [];
  const about = meter.exact ? "" : "≈ ";
  const count = meter.exact ? "as the server counted them" : "counted by pieces received: an answer cut short carries no usage";
  const shown = ttftOf(meter);
  if (meter.rate) {
    shown.push(figure("rate", "", `${about}${meter.rate.toFixed(meter.rate < 100 ? 1 : 0)} tok/s`, "Tokens after the first, over the time since the first"));
  }
  shown.push(figure("tokens", "", `${about}${meter.tokens} ${meter.tokens === 1 ? "token" : "tokens"}`, `Tokens of the answer, ${count}`));
  if (meter.exact) {
    const cached = meter.usage.prompt_tokens_details?.cached_tokens ?? 0;
    const note = cached ? `${meter.usage.prompt_tokens} (${cached} cached)` : `${meter.usage.prompt_tokens}`;
    shown.push(figure("prompt", "prompt", note, "Tokens of the prompt; cached ones were not computed again"));
  }
  shown.push(figure("total", "total", duration(meter.total), "From sending the request to the end of the answer"));
  return shown;
}

function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`;
}
