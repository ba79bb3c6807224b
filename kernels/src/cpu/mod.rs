//! The CPU backend.

mod isa;
mod simd;
