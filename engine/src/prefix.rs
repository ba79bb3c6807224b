//! The prefix cache's index: which block holds the keys and values of which tokens, after which beginning.
//!
//! ```text
//!   root(salt) ── [32 tokens] ──> node 7 ── [32 tokens] ──> node 9 ── ...
//!                                   └───── [32 other tokens] ──> node 12
//! ```
//!
//! A node stands for one exact beginning: its number is never used twice, and an entry is found only by its parent's
//! number and all of its tokens, so that no hash collision can hand out a wrong block. An entry is *announced* when a
//! running sequence starts to compute its block, and *ready* once the block is written.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::sync::Arc;

use cupola_kernels::BlockId;
use cupola_kernels::kv::BLOCK_SIZE;

/// The beginning that a block continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Parent {
    /// Nothing yet; beginnings are shared within one salt only.
    Root(u64),
    /// The blocks up to and including a node's.
    Node(NodeId),
}

/// One exact beginning of whole blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct NodeId(u64);

/// How an entry is found: by content.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    parent: Parent,
    tokens: [u32; BLOCK_SIZE],
}

/// What the index knows of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) node: NodeId,
    pub(crate) block: BlockId,
    pub(crate) ready: bool,
}

/// Entries by content.
#[derive(Debug, Default)]
pub(crate) struct PrefixIndex {
    entries: HashMap<Arc<Key>, Entry>,
    nodes: u64,
}

impl PrefixIndex {
    /// # Panics
    /// If `tokens` is not one whole block.
    pub(crate) fn key(parent: Parent, tokens: &[u32]) -> Key {
        Key { parent, tokens: tokens.try_into().expect("a key is made of a whole block") }
    }

    pub(crate) fn get(&self, key: &Key) -> Option<Entry> {
        self.entries.get(key).copied()
    }

    /// Announces `block` for `key` unless there is an entry already. Gives the entry, and the key when it is new.
    pub(crate) fn announce(&mut self, key: Key, block: BlockId) -> (Entry, Option<Arc<Key>>) {
        let key = Arc::new(key);
        match self.entries.entry(Arc::clone(&key)) {
            Slot::Occupied(found) => (*found.get(), None),
            Slot::Vacant(place) => {
                self.nodes += 1;
                (*place.insert(Entry { node: NodeId(self.nodes), block, ready: false }), Some(key))
            }
        }
    }

    /// Enters a written block under the node that its content was given before, unless there is an entry already.
    pub(crate) fn restore(&mut self, key: Key, block: BlockId, node: NodeId) -> Option<Arc<Key>> {
        let key = Arc::new(key);
        match self.entries.entry(Arc::clone(&key)) {
            Slot::Occupied(_) => None,
            Slot::Vacant(place) => {
                place.insert(Entry { node, block, ready: true });
                Some(key)
            }
        }
    }

    /// Marks an announced block as written.
    pub(crate) fn ready(&mut self, key: &Key) {
        self.entries.get_mut(key).expect("a block's key stays in the index").ready = true;
    }

    /// Removes an entry and tells whether it was ready.
    pub(crate) fn remove(&mut self, key: &Key) -> bool {
        self.entries.remove(key).expect("a block's key stays in the index").ready
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Arc<Key>, &Entry)> {
        self.entries.iter()
    }
}
