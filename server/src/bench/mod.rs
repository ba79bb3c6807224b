//! Benchmarks: load over HTTP against any OpenAI-like server, and the decoder alone without one.
//!
//! ```text
//!   serve    prompts --arrivals--> client ==HTTP==> server         kernel    Batch --> Decoder::forward, timed
//!               |                    | SSE chunks, time-stamped                 |
//!               |                    v                                          v
//!               +--------------> Outcome, one a request --> report           samples --> table
//! ```

pub mod kernel;
pub mod random;
pub mod serve;
pub mod sse;
pub mod stats;
