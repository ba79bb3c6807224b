//! End-to-end tests: one binary, so that the real model is loaded by few processes.
//!
//! ```text
//!   support/  finds the default model and the built binary, starts servers, speaks HTTP
//!   golden/   weight types against candle, logits against a plain forward pass and candle-transformers
//!   engine/   batched = alone, warm = cold prefix, chunked = whole prefill, on the real model
//!   gemma/    Gemma 3 from its file to its answers
//!   api/      the HTTP contract
//!   faults/   clients that go away, full queues, damaged files
//!   clients/  the OpenAI Python SDK
//!   browser/  the chat page in Chromium
//! ```

mod api;
mod browser;
mod clients;
mod engine;
mod faults;
mod gemma;
mod golden;
mod support;
