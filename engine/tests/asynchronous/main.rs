//! The tests of `tests/engine` over a runner that returns before anything is computed, as one on a GPU does.

#[path = "../engine/endings.rs"]
mod endings;
#[path = "../engine/equivalence.rs"]
mod equivalence;
#[path = "../engine/fake.rs"]
mod fake;
#[path = "../engine/faults.rs"]
mod faults;
#[path = "../engine/logprobs.rs"]
mod logprobs;
#[path = "../engine/overlap.rs"]
mod overlap;
#[path = "../engine/prefix.rs"]
mod prefix;
#[path = "../engine/support.rs"]
mod support;

/// See [`fake::AsyncRunner`].
const ASYNCHRONOUS: bool = true;
