//! The engine (being written).
pub mod request;
