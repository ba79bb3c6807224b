//! What a backend on a device holds beside weights, arenas and the pool's blocks, in bytes: for plans made before it exists.
//!
//! Each number comes from the module that allocates the memory; a test of the engine holds the sum against a backend that
//! has done its largest steps.

use super::batch::most_table_bytes;
use super::pool::piece_bytes;
use super::sampling::Sampler;
use super::weights::TILE_ROWS;
use crate::KvLayout;

/// Bytes of the row numbers and token ids of an op of up to `rows` rows.
pub(super) fn index_bytes(rows: usize) -> usize {
    (4 * rows).max(1 << 12).next_power_of_two()
}

/// Bytes of the best value and feature of each of `panels` panels, and of the best of each row.
pub(super) fn argmax_bytes(rows: usize, panels: usize) -> [usize; 3] {
    let each = (4 * rows * panels).next_power_of_two();
    [each, each, (4 * rows).next_power_of_two()]
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
    /// Most blocks of a sequence.
    pub blocks: usize,
    /// Rows of logits at a time.
    pub logit_rows: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
}

impl Steps {
    /// Bytes that depend on the size of steps: tables of batches, pieces of attention, and what tokens are chosen with.
    pub fn bytes(&self) -> usize {
        // A head of several parts has at most one panel more for each of them.
        const PARTS: usize = 4;
        let panels = self.vocab.div_ceil(TILE_ROWS) + PARTS;
        let argmax: usize = argmax_bytes(self.logit_rows, panels).iter().sum();
        let tables = most_table_bytes((self.rows, self.sequences), self.sequences * self.blocks, self.group);
        let pieces: usize = piece_bytes(self.kv).iter().sum();
        tables + pieces + index_bytes(self.rows) + argmax + Sampler::bytes(self.logit_rows, self.vocab)
    }
}
