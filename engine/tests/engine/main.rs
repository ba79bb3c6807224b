//! The engine as a whole, over a small runner whose answers change when a single block table is wrong.

mod endings;
mod equivalence;
mod fake;
mod faults;
mod logprobs;
mod prefix;
mod support;
