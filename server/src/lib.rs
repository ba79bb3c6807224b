//! The `cupola` command as a library: command line, benchmarks and HTTP API.
//!
//! ```text
//!   argv --> cli --+-- serve ----> app (HTTP) --submit--> engine
//!                  +-- run ------> engine, in process
//!                  +-- pull, models, plan --> models::hub, engine::plan
//!                  +-- bench ----> bench::serve (HTTP client), bench::kernel (decoder, no server)
//! ```

mod api;
pub mod app;
pub mod auth;
pub mod bench;
pub mod cli;
pub mod config;
pub mod error;
mod generation;
mod host;
mod json;
pub mod lifecycle;
pub mod listen;
pub mod local;
pub mod meter;
mod observe;
mod request_id;
mod sse;
#[cfg(test)]
mod tests;
mod ui;
