//! The engine: continuous batching over a paged key/value cache, as a library.
//!
//! ```text
//!   EngineHandle::submit ──Command──> ┌─ step_loop: one thread ──────────────────────────────┐
//!                                     │  1 commands, cancellations                           │
//!                                     │  2 scheduler  queues + free blocks -> Step  (pure)   │
//!                                     │       sequence, blocks, prefix                       │
//!                                     │  3 runner     Batch -> forward                       │
//!                                     │  4 sampler    logits -> token, row by row in parallel│
//!                                     │  5 answer     token -> text, stop conditions         │
//!   RequestStream::next <──Event───── └──────────────────────────────────────────────────────┘
//! ```
//!
//! The thread waits without polling when there is nothing to run. A request's tokens do not depend on the requests that
//! run beside it, on the prefix cache, on how its prompt was cut into chunks, or on preemption.

mod admission;
mod answer;
mod blocks;
pub mod config;
mod detokenizer;
pub mod device;
// The emulated CUDA driver is for x86-64 Linux.
#[cfg(test)]
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod device_tests;
pub mod error;
mod handle;
mod mailbox;
mod memory;
pub mod metrics;
pub mod plan;
mod prefix;
pub mod request;
pub mod runner;
mod sampler;
mod scheduler;
mod sequence;
mod start;
mod step_loop;
mod stop;
mod validate;

pub use admission::Permit;
pub use blocks::KvReport;
pub use config::EngineConfig;
pub use detokenizer::TokenText;
pub use device::{Device, DeviceChoice};
pub use error::{Error, SubmitError};
pub use handle::EngineHandle;
pub use mailbox::RequestStream;
pub use memory::available_memory;
pub use metrics::EngineMetrics;
pub use plan::{MemoryPlan, plan};
pub use request::{Event, FinishReason, Request, SamplingParams, StopMatch, StopParams, Timing, TokenLogprobs, Usage};
pub use runner::{ModelRunner, RunError};
pub use start::{Engine, EngineSetup};
