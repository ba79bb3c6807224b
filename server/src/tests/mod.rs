//! The HTTP API over a real engine whose model is a stand-in: fast, deterministic, and able to misbehave on command.

mod bad_input;
mod chat;
mod completions;
mod description;
mod faults;
mod guards;
mod operations;
mod support;
