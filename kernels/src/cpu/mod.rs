//! The CPU backend.

mod act;
mod attention;
mod isa;
mod norm;
mod pool;
mod rope;
mod simd;
mod spans;
mod threads;

pub use isa::{ISA_VARIABLE, Isa};
pub use threads::default_threads;
