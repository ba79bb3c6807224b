// The Markdown that models write, as DOM nodes: code, lists, headings, bold, italics, paragraphs.
// What it does not know (HTML, links, images) stays visible text. Nothing is ever parsed as HTML.

import { copyFrom, el, icon } from "./dom.js";

const FENCE = /^\s{0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^\s{0,3}(#{1,6})\s+(.*\S)/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(?=\S)/;
// Deeper nesting is shown as text: the depth of recursion is not the model's to choose.
const MAX_DEPTH = 6;

// Splits `text` into blocks, each with the lines it came from, so that a growing text can be compared block by block.
export function parse(text, depth = 0) {
  const lines = text.split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const read = blockReader(lines[at], depth);
    const { next, ...block } = read(lines, at, depth);
    blocks.push({ ...block, source: lines.slice(at, next).join("\n") });
    at = next;
  }
  return blocks;
}

function blockReader(line, depth) {
  if (FENCE.test(line)) return readCode;
  if (HEADING.test(line)) return readHeading;
  if (RULE.test(line)) return readRule;
  if (ITEM.test(line) && depth < MAX_DEPTH) return readList;
  return readParagraph;
}

function readCode(lines, at) {
  const [, marks, language] = FENCE.exec(lines[at]);
  const indent = indentOf(lines[at]);
  const closes = (line) => line.trim().startsWith(marks) && line.trim().replaceAll(marks[0], "") === "";
  let end = at + 1;
  while (end < lines.length && !closes(lines[end])) end += 1;
  const body = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, indentOf(line))));
  return { kind: "code", language: language.trim().split(/\s/)[0], text: body.join("\n"), next: end + 1 };
}

function readHeading(lines, at) {
  const [, marks, text] = HEADING.exec(lines[at]);
  return { kind: "heading", level: marks.length, text, next: at + 1 };
}

function readRule(lines, at) {
  return { kind: "rule", next: at + 1 };
}

function readParagraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() !== "" && blockReader(lines[end], depth) === readParagraph) end += 1;
  return { kind: "paragraph", text: lines.slice(at, end).join("\n").trim(), next: end };
}

// A list runs over its items, what is indented below them, and blank lines between:
//
//   1. first            <- marker indent 0
//      more of it       <- deeper than the marker: belongs to the item
//
//      - nested         <- likewise, and parsed again by itself
//   2. second           <- same kind of marker: the next item
//   plain text          <- after a blank line: ends the list
function readList(lines, at, depth) {
  const ordered = isOrdered(lines[at]);
  const base = indentOf(lines[at]);
  const items = [];
  let end = at;
  for (let i = at; i < lines.length; i += 1) {
    const line = lines[i];
    if (line.trim() === "") continue;
    const indent = indentOf(line);
    const isItem = ITEM.test(line) && indent <= base + 1;
    if (isItem && isOrdered(line) === ordered) {
      items.push([line.replace(ITEM, "")]);
    } else {
      const lazy = i === end && blockReader(line, depth) === readParagraph;
      if (isItem || (indent < base + 2 && !lazy)) break;
      items.at(-1).push(...Array(i - end).fill(""), line.slice(Math.min(indent, base + (ordered ? 3 : 2))));
    }
    end = i + 1;
  }
  const start = ordered ? parseInt(lines[at].trim(), 10) : 1;
  return { kind: "list", ordered, start, items: items.map((item) => parse(item.join("\n"), depth + 1)), next: end };
}

const indentOf = (line) => line.length - line.trimStart().length;
const isOrdered = (line) => /^\s*\d/.test(line);

function render(block) {
  switch (block.kind) {
    case "code":
      return renderCode(block);
    case "heading":
      // The page's own headings are h1 and h2.
      return el(`h${Math.min(6, block.level + 2)}`, {}, ...inline(block.text));
    case "rule":
      return el("hr");
    case "list": {
      const list = el(block.ordered ? "ol" : "ul", {}, ...block.items.map((item) => el("li", {}, ...renderItem(item))));
      if (block.ordered && block.start !== 1) list.start = block.start;
      return list;
    }
    default:
      return el("p", { dir: "auto" }, ...inline(block.text));
  }
}

// An item that begins with a paragraph shows it without the paragraph's margins.
function renderItem(blocks) {
  return blocks.flatMap((block, i) => (i === 0 && block.kind === "paragraph" ? inline(block.text) : [render(block)]));
}

function renderCode({ language, text }) {
  const copy = el("button", { type: "button", class: "quiet", "aria-label": "Copy code" }, icon("copy"), "Copy");
  copy.addEventListener("click", () => copyFrom(copy, text));
  const code = el("code", { textContent: text });
  return el(
    "div",
    { class: "code", dir: "ltr" },
    el("div", { class: "code-head" }, el("span", { textContent: language || "code" }), copy),
    // Focusable, so that a long line can be scrolled into view by keyboard.
    el("pre", { tabIndex: 0, role: "region", "aria-label": language ? `${language} code` : "Code" }, code),
  );
}

// Inline marks. A mark whose partner is missing is text, and is looked for only once, so the work stays linear.
function inline(text, marks = ["`", "**", "__", "*"]) {
  const nodes = [];
  const hopeless = new Set();
  let plain = 0;
  let at = 0;
  const take = (node, start, end) => {
    if (start > plain) nodes.push(text.slice(plain, start));
    nodes.push(node);
    plain = at = end;
  };
  while (at < text.length) {
    const mark = marks.find((m) => text.startsWith(m, at));
    if (!mark) {
      at += 1;
      continue;
    }
    const open = mark === "`" ? /^`+/.exec(text.slice(at, at + 8))[0] : mark;
    const from = at + open.length;
    const end = hopeless.has(open) ? -1 : closing(text, open, from);
    if (end < 0) {
      if (end === -1) hopeless.add(open);
      at = from;
    } else if (mark === "`") {
      take(el("code", { textContent: unpadded(text.slice(from, end)) }), at, end + open.length);
    } else {
      const inner = inline(text.slice(from, end), marks.filter((m) => m === "`" || m[0] !== mark[0] || m.length < mark.length));
      take(el(mark.length === 2 ? "strong" : "em", {}, ...inner), at, end + open.length);
    }
  }
  if (plain < text.length) nodes.push(text.slice(plain));
  return nodes;
}

// "`` `x` ``" has a space on both sides so that the code may begin and end with a backtick.
const unpadded = (code) => (/^ .*\S/.test(code) && code.endsWith(" ") ? code.slice(1, -1) : code);

// Where the partner of `open` stands: -1 when there is none, -2 when this one cannot open (as the * in `a * b`).
function closing(text, open, from) {
  if (open[0] === "`") {
    for (let end = text.indexOf(open, from); end >= 0; end = text.indexOf(open, end + 1)) {
      if (text[end + open.length] !== "`" && text[end - 1] !== "`") return end;
    }
    return -1;
  }
  if (!/\S/.test(text[from] ?? " ") || (open === "*" && text[from] === "*")) return -2;
  if (/\w/.test(text[from - open.length - 1] ?? " ") && open !== "**") return -2; // 2*3*4 and snake__case
  for (let end = text.indexOf(open, from + 1); end >= 0; end = text.indexOf(open, end + 1)) {
    if (!/\S/.test(text[end - 1])) continue;
    while (text[end + open.length] === open[0]) end += 1; // ***both***: the longer run closes the inner mark first
    return end;
  }
  return -1;
}

// Shows a growing text in `container`. Blocks that did not change keep their nodes: a selection in them survives.
export class MarkdownView {
  #container;
  #blocks = [];

  constructor(container) {
    this.#container = container;
  }

  show(text) {
    const blocks = parse(text.replaceAll("\r\n", "\n"));
    let same = 0;
    while (same < blocks.length && blocks[same].source === this.#blocks[same]?.source) same += 1;
    while (this.#container.children.length > same) this.#container.lastChild.remove();
    this.#container.append(...blocks.slice(same).map(render));
    this.#blocks = blocks;
  }

  // The blocks as plain text, for a screen reader.
  texts() {
    return this.#blocks.map((block, i) => (block.kind === "code" ? block.text : this.#container.children[i].textContent));
  }
}
