//! Benchmarks: load over HTTP against any OpenAI-like server, the decoder alone without one, and either in turn with a peer.
//!
//! ```text
//!   serve    prompts --arrivals--> client ==HTTP==> server         kernel    Batch --> Decoder::forward, timed
//!               |                    | SSE chunks, time-stamped                 |
//!               |                    v                                          v
//!               +--------------> Outcome, one a request --> report           samples --> table
//!                                        |                                     |
//!                                        +------> compare: rounds, record <----+
//! ```

pub mod compare;
pub mod kernel;
pub mod perplexity;
pub mod random;
pub mod serve;
pub mod sse;
pub mod stats;
