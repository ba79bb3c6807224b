//! The CPU backend.

mod isa;
mod simd;
mod threads;

pub use isa::{ISA_VARIABLE, Isa};
pub use threads::default_threads;
