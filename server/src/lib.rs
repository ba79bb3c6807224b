//! The `cupola` command as a library: command line, benchmarks and HTTP API.
//!
//! ```text
//!   argv --> cli --+-- serve ----> app (HTTP) --submit--> engine
//!                  +-- run ------> engine, in process
//!                  +-- pull, models, plan --> models::hub, engine::plan
//!                  +-- bench ----> bench::serve (HTTP client), bench::kernel (decoder, no server)
//! ```

pub mod bench;
pub mod cli;
