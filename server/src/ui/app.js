// The chat page: holds the conversation, sends it, and connects the controls.
//
//   composer --ask--> Turn --generate--> api.js ==SSE==> append ... finish | fail
//                      ^                                              |
//                      +---------- regenerate, try again -------------+
//
// One generation runs at a time; `running` is its AbortController, and null while the page is idle.

import { ApiError, generate, listModels } from "./api.js";
import { byId, clearAnnouncements } from "./dom.js";
import { apiKey, limitTokens, sampling, setUpSettings, setUpTheme, systemPrompt } from "./settings.js";
import { Meter, Turn } from "./turn.js";

const log = byId("log");
const prompt = byId("prompt");
const modelChoice = byId("model");

let models = [];
let turns = [];
let running = null;
let heldByKey = null; // the turn to run once a key is given

// Asking

async function ask(question) {
  if (running || question.trim() === "") return false;
  if (!modelChoice.value) await loadModels();
  if (running || !modelChoice.value) return false; // waiting for the models gave time to ask twice
  const turn = new Turn(question, { onAgain: () => run(turn) });
  turns.push(turn);
  log.append(turn.node);
  byId("welcome").hidden = true;
  run(turn);
  return true;
}

async function run(turn, request = chatRequest) {
  if (running) return;
  const own = new AbortController();
  const meter = new Meter();
  setRunning(own);
  clearAnnouncements();
  turn.begin(modelChoice.value);
  scrollToEnd();
  try {
    let finish = "stop";
    const { path, body } = request(turn);
    const settings = { model: modelChoice.value, ...sampling() };
    for await (const chunk of generate(path, { ...body, ...settings }, apiKey.get(), own.signal)) {
      if (chunk.usage) meter.usage = chunk.usage;
      if (chunk.finish) finish = chunk.finish;
      if (chunk.text) {
        meter.text();
        turn.append(chunk.text, meter);
      }
    }
    turn.finish(finish, meter);
  } catch (cause) {
    if (cause.name === "AbortError") {
      turn.finish("stopped", meter);
    } else {
      turn.fail(describe(cause, turn));
      if (cause.status === 401) askForKey(turn);
      if (!(cause instanceof ApiError)) console.error(cause);
    }
  } finally {
    if (running === own) setRunning(null);
  }
}

// A turn without an answer is left out: many templates refuse two questions in a row.
function chatRequest(turn) {
  const earlier = turns.slice(0, turns.indexOf(turn)).filter((t) => t.answer !== "");
  const messages = earlier.flatMap((t) => [
    { role: "user", content: t.question },
    { role: "assistant", content: t.answer },
  ]);
  messages.push({ role: "user", content: turn.question });
  const system = systemPrompt();
  if (system) messages.unshift({ role: "system", content: system });
  return { path: "/v1/chat/completions", body: { messages } };
}

// For a model that has no chat template: it continues the text of this question alone.
function plainRequest(turn) {
  return { path: "/v1/completions", body: { prompt: turn.question } };
}

function describe(cause, turn) {
  if (!(cause instanceof ApiError)) return { message: "Something went wrong in this page.", detail: String(cause) };
  const detail = [
    cause.status && `HTTP ${cause.status}`,
    cause.code,
    cause.retryAfter && `try again in ${cause.retryAfter} s`,
  ];
  const lacksTemplate = cause.status === 400 && /chat[ _-]template/i.test(`${cause.code} ${cause.message}`);
  return {
    message: cause.message,
    detail: detail.filter(Boolean).join(" · "),
    fallback: lacksTemplate && { label: "Continue as plain text", run: () => run(turn, plainRequest) },
  };
}

function stop() {
  running?.abort();
}

function setRunning(controller) {
  running = controller;
  const [shown, gone] = controller ? [byId("stop"), byId("send")] : [byId("send"), byId("stop")];
  const hadFocus = document.activeElement === gone;
  shown.hidden = false;
  gone.hidden = true;
  if (hadFocus) (shown.disabled ? prompt : shown).focus();
}

function newChat() {
  stop();
  setRunning(null);
  turns = [];
  heldByKey = null;
  log.replaceChildren();
  clearAnnouncements();
  byId("welcome").hidden = false;
  prompt.focus();
}

// Models and the key

async function loadModels() {
  byId("notice").hidden = true;
  try {
    models = await listModels(apiKey.get());
    byId("key-form").hidden = true;
  } catch (cause) {
    models = [];
    if (cause.status === 401) askForKey(heldByKey);
    else showNotice(cause.message);
  }
  const before = modelChoice.value;
  modelChoice.replaceChildren(...models.map(({ id }) => new Option(id, id, false, id === before)));
  if (models.length === 0) modelChoice.append(new Option("No model", ""));
  modelChoice.disabled = models.length === 0;
  showModel();
}

function showModel() {
  const model = models.find(({ id }) => id === modelChoice.value);
  const context = model?.max_model_len;
  limitTokens(context);
  byId("welcome-model").textContent = model
    ? [model.id, context && `${context.toLocaleString("en")}-token context`, `served at ${location.host}`].filter(Boolean).join(" · ")
    : `No model yet from ${location.host}`;
}

function showNotice(message) {
  byId("notice-text").textContent = message;
  byId("notice").hidden = false;
}

function askForKey(turn) {
  heldByKey = turn;
  byId("key-help").textContent = apiKey.get()
    ? "The server did not accept that key. Try another."
    : "This server asks for a key. It is kept in this tab only.";
  byId("key-form").hidden = false;
  byId("key").focus();
}

async function useKey(event) {
  event.preventDefault();
  apiKey.set(byId("key").value.trim());
  byId("key").value = "";
  const turn = heldByKey;
  await loadModels();
  if (!byId("key-form").hidden) return; // refused again
  heldByKey = null;
  prompt.focus();
  if (turn) run(turn);
}

// The composer and the scroll position

function updateSend() {
  byId("send").disabled = prompt.value.trim() === "";
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

async function submit(event) {
  event?.preventDefault();
  const question = prompt.value;
  if (await ask(question)) {
    prompt.value = "";
    updateSend();
  }
}

const page = document.scrollingElement;
const atEnd = () => page.scrollHeight - page.scrollTop - page.clientHeight < 48;
let following = true;
let lastTop = 0;

function scrollToEnd() {
  following = true;
  page.scrollTop = page.scrollHeight;
}

// Follows the growing answer until the reader scrolls up, and again once they are back at the end.
function followAnswer() {
  addEventListener("scroll", () => {
    // Not at the end is not enough: this event may come after more text did.
    following = atEnd() || (following && page.scrollTop >= lastTop);
    lastTop = page.scrollTop;
    byId("to-latest").hidden = following;
  }, { passive: true });
  new ResizeObserver(() => {
    if (following) page.scrollTop = page.scrollHeight;
  }).observe(log);
  byId("to-latest").addEventListener("click", () => {
    scrollToEnd();
    prompt.focus({ preventScroll: true });
  });
}

function setUp() {
  setUpTheme();
  setUpSettings();
  byId("composer").addEventListener("submit", submit);
  prompt.addEventListener("input", updateSend);
  prompt.addEventListener("keydown", (event) => {
    // Enter also ends the composition of an input method; that one is not ours.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !byId("settings").open) stop();
  });
  byId("stop").addEventListener("click", stop);
  byId("new-chat").addEventListener("click", newChat);
  byId("notice-retry").addEventListener("click", loadModels);
  byId("key-form").addEventListener("submit", useKey);
  modelChoice.addEventListener("change", showModel);
  byId("examples").addEventListener("click", async (event) => {
    const button = event.target.closest("button");
    if (button && (await ask(button.textContent))) prompt.focus({ preventScroll: true });
  });
  followAnswer();
  updateSend();
  // A touch keyboard should not cover the page before anything was touched.
  if (matchMedia("(pointer: fine)").matches) prompt.focus();
  loadModels();
}

setUp();
