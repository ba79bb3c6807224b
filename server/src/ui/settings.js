// What the reader chose: theme, system prompt and sampling in this browser, the API key in this tab only.

import { byId, copyFrom, setIcon } from "./dom.js";

const DEFAULTS = { system: "", temperature: "0.3", maxTokens: "512" };
const KEPT_AS = "cupola.settings";
const KEY_KEPT_AS = "cupola.key";
const THEME_KEPT_AS = "cupola.theme";

export const apiKey = {
  get: () => sessionStorage.getItem(KEY_KEPT_AS),
  set: (key) => sessionStorage.setItem(KEY_KEPT_AS, key),
  forget: () => sessionStorage.removeItem(KEY_KEPT_AS),
};

// The sampling settings as request fields. A field left out means the server's own default.
export function sampling() {
  const limit = byId("max-tokens");
  return {
    temperature: byId("temperature").valueAsNumber,
    ...(limit.value !== "" && limit.checkValidity() && { max_tokens: limit.valueAsNumber }),
  };
}

export function systemPrompt() {
  return byId("system").value.trim();
}

// `tokens` is the model's context length: no answer can be longer.
export function limitTokens(tokens) {
  byId("max-tokens").max = tokens ?? "";
  showValues();
}

export function setUpSettings() {
  const dialog = byId("settings");
  fill(read());
  byId("open-settings").addEventListener("click", () => {
    byId("forget-key").hidden = !apiKey.get();
    dialog.showModal();
  });
  byId("close-settings").addEventListener("click", () => dialog.close());
  // A click on the backdrop arrives at the dialog itself; its contents cover the rest of it.
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  byId("settings-form").addEventListener("submit", (event) => {
    event.preventDefault();
    dialog.close();
  });
  byId("settings-form").addEventListener("input", () => {
    showValues();
    const limit = byId("max-tokens");
    const kept = { system: byId("system").value, temperature: byId("temperature").value, maxTokens: limit.value };
    if (!limit.validity.badInput) localStorage.setItem(KEPT_AS, JSON.stringify(kept));
  });
  byId("reset-settings").addEventListener("click", () => {
    localStorage.removeItem(KEPT_AS);
    fill(DEFAULTS);
  });
  byId("forget-key").addEventListener("click", () => {
    apiKey.forget();
    byId("forget-key").hidden = true;
    byId("close-settings").focus();
  });
  byId("endpoint").textContent = `${location.origin}/v1`;
  byId("copy-endpoint").addEventListener("click", () => copyFrom(byId("copy-endpoint"), `${location.origin}/v1`));
}

function read() {
  try {
    return { ...DEFAULTS, ...JSON.parse(localStorage.getItem(KEPT_AS)) };
  } catch {
    return DEFAULTS; // written by another version of the page
  }
}

function fill({ system, temperature, maxTokens }) {
  byId("system").value = system;
  byId("temperature").value = temperature;
  byId("max-tokens").value = maxTokens;
  showValues();
}

function showValues() {
  byId("temperature-value").textContent = Number(byId("temperature").value).toFixed(1);
  const limit = byId("max-tokens");
  const valid = limit.checkValidity();
  limit.setAttribute("aria-invalid", String(!valid));
  byId("max-tokens-help").textContent = valid
    ? "Longest answer. Empty: up to the model’s context."
    : `A whole number from 1${limit.max ? ` to ${Number(limit.max).toLocaleString("en")}` : ""}. No limit is sent now.`;
}

// The theme follows the system until the reader chooses the other one, and again when the choice agrees with the system.
export function setUpTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const systemTheme = () => (system.matches ? "dark" : "light");
  const chosen = () => localStorage.getItem(THEME_KEPT_AS);
  const other = () => ((chosen() ?? systemTheme()) === "dark" ? "light" : "dark");
  const button = byId("theme");
  const show = () => {
    if (chosen()) document.documentElement.dataset.theme = chosen();
    else delete document.documentElement.dataset.theme;
    setIcon(button, other() === "dark" ? "moon" : "sun");
    button.title = `Switch to the ${other()} theme`;
    button.setAttribute("aria-label", button.title);
  };
  show();
  system.addEventListener("change", show);
  button.addEventListener("click", () => {
    const theme = other();
    if (theme === systemTheme()) localStorage.removeItem(THEME_KEPT_AS);
    else localStorage.setItem(THEME_KEPT_AS, theme);
    show();
  });
}
