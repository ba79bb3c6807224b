// Small helpers to build the page from nodes: no string is ever parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

// Makes an element. `props` are DOM properties; `class`, `data-*` and `aria-*` are attributes.
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "class" || name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

// One of the symbols drawn at the top of index.html.
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

export function setIcon(button, name) {
  button.querySelector("use").setAttribute("href", `#icon-${name}`);
}

// Puts `text` on the clipboard and shows a tick on `button` for a moment.
export async function copyFrom(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copyBySelection(text);
  }
  setIcon(button, "check");
  announce("Copied");
  setTimeout(() => setIcon(button, "copy"), 1500);
}

// The clipboard API exists only on https and localhost; a server on the local network is neither.
function copyBySelection(text) {
  const box = el("textarea", { class: "visually-hidden", value: text });
  const focused = document.activeElement;
  document.body.append(box);
  box.select();
  document.execCommand("copy");
  box.remove();
  focused?.focus();
}

// Speaks `text` through the page's live region.
export function announce(text) {
  byId("announcer").append(el("p", { textContent: text }));
}

export function clearAnnouncements() {
  byId("announcer").replaceChildren();
}
