//! What a backend on a device holds beside weights, arenas and the pool's blocks, in bytes: for plans made before it exists.
//!
//! Each number comes from the module that allocates the memory; a test of the engine holds the sum against a backend that
//! has done its largest steps.

use super::large::large_bytes;
use super::pass::most_pass_bytes;
use super::pool::piece_bytes;
use super::sampling::Sampler;
use super::weights::TILE_ROWS;
use crate::KvLayout;

/// Bytes of the best value of each of `panels` panels, and of its feature.
pub(super) fn argmax_bytes(rows: usize, panels: usize) -> usize {
    (4 * rows * panels).next_power_of_two()
}

/// The steps that a backend has to have room for.
#[derive(Clone, Copy, Debug)]
pub struct Steps {
    /// The pool of keys and values.
    pub kv: KvLayout,
    /// Query heads for each key/value head.
    pub group: usize,
    /// Most rows of a step, in tokens.
    pub rows: usize,
    /// Most sequences of a step.
    pub sequences: usize,
    /// Kinds of layers that see different positions.
    pub cuts: usize,
    /// Most blocks of a sequence.
    pub blocks: usize,
    /// Rows of logits at a time.
    pub logit_rows: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
}

impl Steps {
    /// Bytes that depend on the size of steps: tables of batches, pieces of attention, what tokens are chosen with, and what
    /// products of many rows take through cuBLASLt.
    pub fn bytes(&self) -> usize {
        // A head of several parts has at most one panel more for each of them.
        const PARTS: usize = 4;
        let panels = self.vocab.div_ceil(TILE_ROWS) + PARTS;
        // Results of two passes.
        let chosen = 2 * argmax_bytes(self.logit_rows, panels) + 2 * 4 * self.rows;
        let tables =
            most_pass_bytes((self.rows, self.sequences), self.sequences * self.blocks, (self.group, self.cuts));
        let pieces: usize = piece_bytes(self.kv).iter().sum();
        tables + pieces + chosen + Sampler::bytes(self.logit_rows, self.vocab) + large_bytes(self.rows)
    }
}
