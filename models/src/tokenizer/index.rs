//! Tokens by their bytes.

use std::hash::{BuildHasher, RandomState};

use super::{MAX_VOCAB, TokenTable};

/// No token.
pub(super) const NONE: u32 = u32::MAX;

/// Token ids by the bytes of the token: open addressing over a table that others own.
pub(super) struct Index {
    /// 24 bits of id below 8 bits of the hash, which spare most looks into the table; or [`NONE`]. A power of two of
    /// them, at least half empty.
    slots: Vec<u32>,
    /// Keyed at random: the vocabulary comes with a file that is not trusted.
    hasher: RandomState,
}

const ID_BITS: u32 = MAX_VOCAB.ilog2();

impl Index {
    pub(super) fn with_room(tokens: usize) -> Self {
        Self { slots: vec![NONE; (2 * tokens).next_power_of_two().max(2)], hasher: RandomState::new() }
    }

    /// Where a token with these bytes is or would be, and the upper bits of its slot.
    fn slot(&self, table: &TokenTable, bytes: &[u8]) -> (usize, u32) {
        let mask = self.slots.len() - 1;
        let hash = self.hasher.hash_one(bytes);
        let tag = (hash >> 32) as u32 >> ID_BITS << ID_BITS;
        let mut at = hash as usize & mask;
        loop {
            let slot = self.slots[at];
            // The tag alone may look like an empty slot's; no id has all bits set.
            if slot == NONE || (slot ^ tag) >> ID_BITS == 0 && table.get(slot ^ tag) == bytes {
                return (at, tag);
            }
            at = (at + 1) & mask;
        }
    }

    /// Of tokens with equal bytes the first is kept; false for the others.
    pub(super) fn insert(&mut self, table: &TokenTable, id: u32) -> bool {
        let (at, tag) = self.slot(table, table.get(id));
        let free = self.slots[at] == NONE;
        if free {
            self.slots[at] = tag | id;
        }
        free
    }

    pub(super) fn find(&self, table: &TokenTable, bytes: &[u8]) -> Option<u32> {
        let (at, tag) = self.slot(table, bytes);
        let slot = self.slots[at];
        (slot != NONE).then_some(slot ^ tag)
    }
}
