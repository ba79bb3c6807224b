//! The engine as a whole, over a small runner whose answers change when a single block table is wrong.

mod endings;
mod equivalence;
mod fake;
mod faults;
mod logprobs;
mod overlap;
mod prefix;
mod support;

/// The runner returns when everything is computed; `tests/asynchronous` runs the same tests over one that does not.
const ASYNCHRONOUS: bool = false;
