// The server's HTTP API as the page needs it: JSON, server-sent events, and every failure as one kind of error.

// What went wrong, in words for the reader. `status` is 0 when no answer came at all.
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

// Sends a request, and gives back the response only if the server accepted it.
async function send(path, key, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (cause) {
    if (cause.name === "AbortError") throw cause;
    throw new ApiError("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;

  const text = await response.text().catch(() => "");
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // Something between us and the server may answer in its own format: the status alone has to do.
  }
  throw new ApiError(error.message ?? `The server answered ${response.status} ${response.statusText}`.trim(), {
    status: response.status,
    code: error.code ?? null,
    retryAfter: response.headers.get("retry-after"),
  });
}

// The models served: `[{ id, max_model_len, ... }]`.
export async function listModels(key) {
  const response = await send("/v1/models", key);
  return (await response.json()).data;
}

// Streams one generation. Yields `{ text, finish, usage }`, each absent where a chunk does not carry it.
export async function* generate(path, body, key, signal) {
  const response = await send(path, key, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let complete = false;
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") {
        complete = true;
        break;
      }
      const chunk = parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, { status: response.status, code: chunk.error.code });
      const choice = chunk.choices?.[0];
      yield { text: choice?.delta?.content ?? choice?.text ?? "", finish: choice?.finish_reason, usage: chunk.usage };
    }
  } catch (cause) {
    if (cause.name === "AbortError" || cause instanceof ApiError) throw cause;
    throw new ApiError("The connection to the server was lost.");
  }
  if (!complete) throw new ApiError("The server closed the connection before the answer was complete.");
}

function parse(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError("The server sent an answer that cannot be understood.");
  }
}

// Decodes server-sent events (HTML Standard, section 9.2.6) into the data of each, however the bytes were cut.
export async function* eventData(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return; // an event without its closing blank line is dropped, as the standard says
      buffer += value;
      // A trailing CR waits: the LF that belongs to it may come with the next piece.
      const lines = buffer.split(/\r\n|\n|\r(?!$)/);
      buffer = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // leaving early must end the request; that it already ended is no news
  }
}
