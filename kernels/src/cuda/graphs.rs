//! Passes that were recorded as graphs of launches, by what they have in common.
//!
//! ```text
//!   a pass begins ──> key ──┬── never seen     its ops run, which loads their kernels
//!                           ├── seen once      they are recorded, then launched as one
//!                           └── recorded       launched as one
//! ```
//!
//! A recording is of use as long as the memory that it names is: arenas, weights and pools stay, and what holds the rows of a
//! pass says when it moves. When one recording fails, the ops run as they are from then on.

use std::collections::BTreeMap;

use super::driver::Graph;
use super::pass::PassKey;
use crate::Recorded;

/// Recordings.
#[derive(Default)]
pub(super) struct Graphs {
    /// Passes are to be recorded.
    wanted: bool,
    known: BTreeMap<PassKey, Option<Graph>>,
    /// Of the addresses in the recordings.
    generation: u64,
    failed: Option<String>,
}

/// What to do with a pass.
pub(super) enum Next<'a> {
    Run,
    Record,
    Launch(&'a Graph),
}

impl Graphs {
    /// Lets passes be recorded or not; returns whether they will be.
    pub(super) fn want(&mut self, wanted: bool) -> bool {
        self.wanted = wanted && self.failed.is_none();
        if !self.wanted {
            self.known.clear();
        }
        self.wanted
    }

    /// What to do with a pass of this key, whose addresses are of this generation.
    pub(super) fn next(&mut self, key: Option<PassKey>, generation: u64) -> Next<'_> {
        let Some(key) = key.filter(|_| self.wanted) else { return Next::Run };
        if self.generation != generation {
            self.known.clear();
            self.generation = generation;
        }
        // The first time is noted here.
        if let std::collections::btree_map::Entry::Vacant(place) = self.known.entry(key) {
            place.insert(None);
            return Next::Run;
        }
        self.known[&key].as_ref().map_or(Next::Record, Next::Launch)
    }

    pub(super) fn keep(&mut self, key: PassKey, graph: Graph) {
        self.known.insert(key, Some(graph));
    }

    /// Recording failed: there will be no more.
    pub(super) fn give_up(&mut self, why: String) {
        self.failed = Some(why);
        self.want(false);
    }

    pub(super) fn recorded(&self) -> Recorded {
        Recorded { graphs: self.known.values().flatten().count(), failed: self.failed.clone() }
    }
}
