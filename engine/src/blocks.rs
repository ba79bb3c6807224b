//! Blocks of the key/value pool, and who holds them.
//!
//! ```text
//!                  allocate                        release, no key
//!        ┌──────────────────────────> leased ──────────────────────────┐
//!        │                            refs > 0                         v
//!   [ front: free, no content | cached, longest unused ... last used :back ]   one list, refs = 0
//!                               │                            ^
//!                               └─ evicted from the front    └─ release with a key; `hold` revives
//! ```
//!
//! A block has a key while the prefix index points to it. A sequence's blocks are released last first, so a beginning
//! always outlives what continues it.

use std::sync::Arc;

use cupola_kernels::BlockId;

use crate::prefix::{Key, NodeId, Parent, PrefixIndex};

const NONE: u32 = u32::MAX;

/// Blocks of the key/value pool by state; the last three add up to the total.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvReport {
    /// All blocks.
    pub total: usize,
    /// Blocks without content.
    pub free: usize,
    /// Blocks that no request uses and the prefix cache remembers.
    pub cached: usize,
    /// Blocks that running requests use.
    pub leased: usize,
}

#[derive(Debug)]
struct Block {
    /// Sequences that use it.
    refs: u32,
    /// Its key, while the prefix index points to this block.
    key: Option<Arc<Key>>,
    /// Neighbours in the list of unused blocks; meaningful while `refs` is 0.
    before: u32,
    after: u32,
}

/// What the prefix cache has for the next block of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Keys and values are there.
    Ready(NodeId, BlockId),
    /// A running sequence is computing them.
    Announced,
    /// Nobody has them.
    Missing,
}

/// All blocks of a pool.
#[derive(Debug)]
pub(crate) struct Blocks {
    blocks: Vec<Block>,
    front: u32,
    back: u32,
    unused: usize,
    cached: usize,
    prefix: PrefixIndex,
}

impl Blocks {
    pub(crate) fn new(total: usize) -> Self {
        let total = u32::try_from(total).ok().filter(|total| *total < NONE).expect("block indices are below 2^32 - 1");
        let mut pool = Self {
            blocks: Vec::with_capacity(total as usize),
            front: NONE,
            back: NONE,
            unused: 0,
            cached: 0,
            prefix: PrefixIndex::default(),
        };
        for block in 0..total {
            pool.blocks.push(Block { refs: 0, key: None, before: NONE, after: NONE });
            pool.link_back(block);
        }
        pool
    }

    /// Blocks that can be allocated: free and cached ones.
    pub(crate) fn available(&self) -> usize {
        self.unused
    }

    pub(crate) fn report(&self) -> KvReport {
        let total = self.blocks.len();
        KvReport { total, free: self.unused - self.cached, cached: self.cached, leased: total - self.unused }
    }

    /// Takes a block without content, at the cost of the cached one that was unused the longest.
    pub(crate) fn allocate(&mut self) -> Option<BlockId> {
        let block = (self.front != NONE).then_some(self.front)?;
        self.unlink(block);
        let slot = &mut self.blocks[block as usize];
        slot.refs = 1;
        if let Some(key) = slot.key.take() {
            self.cached -= 1;
            self.prefix.remove(&key);
        }
        Some(BlockId(block))
    }

    /// True when no sequence uses a block, so that holding it takes one from [`available`](Self::available).
    pub(crate) fn is_unused(&self, block: BlockId) -> bool {
        self.blocks[block.0 as usize].refs == 0
    }

    /// One more sequence uses a block found in the prefix cache.
    pub(crate) fn hold(&mut self, block: BlockId) {
        if self.is_unused(block) {
            self.unlink(block.0);
            self.cached -= 1;
        }
        self.blocks[block.0 as usize].refs += 1;
    }

    /// A sequence gives its blocks back.
    pub(crate) fn release(&mut self, blocks: &[BlockId]) {
        for &BlockId(block) in blocks.iter().rev() {
            let slot = &mut self.blocks[block as usize];
            slot.refs = slot.refs.checked_sub(1).expect("a block is released as often as it is held");
            if slot.refs > 0 {
                continue;
            }
            // A block announced and never written: whoever waits for it computes it.
            let key = slot.key.take().filter(|key| match self.prefix.get(key) {
                Some(entry) if entry.ready => true,
                _ => {
                    self.prefix.remove(key);
                    false
                }
            });
            if key.is_some() {
                self.blocks[block as usize].key = key;
                self.cached += 1;
                self.link_back(block);
            } else {
                self.link_front(block);
            }
        }
    }

    /// Looks for the block that holds `tokens` after `parent`.
    pub(crate) fn find(&self, parent: Parent, tokens: &[u32]) -> Found {
        match self.prefix.get(&PrefixIndex::key(parent, tokens)) {
            None => Found::Missing,
            Some(entry) if entry.ready => Found::Ready(entry.node, entry.block),
            Some(_) => Found::Announced,
        }
    }

    /// Tells that a running sequence computes `tokens` after `parent` into `block`.
    pub(crate) fn announce(&mut self, parent: Parent, tokens: &[u32], block: BlockId) -> NodeId {
        let (entry, key) = self.prefix.announce(PrefixIndex::key(parent, tokens), block);
        if key.is_some() {
            self.blocks[block.0 as usize].key = key;
        }
        entry.node
    }

    /// Tells that `block` now holds `tokens` after `parent`, announced before as `node`. Of two blocks with the same
    /// content the first stays in the index.
    pub(crate) fn publish(&mut self, parent: Parent, tokens: &[u32], block: BlockId, node: NodeId) {
        let slot = &mut self.blocks[block.0 as usize];
        match &slot.key {
            Some(key) => self.prefix.ready(key),
            None => slot.key = self.prefix.restore(PrefixIndex::key(parent, tokens), block, node),
        }
    }

    /// Forgets the content of every unused block.
    pub(crate) fn forget(&mut self) {
        for slot in self.blocks.iter_mut().filter(|slot| slot.refs == 0) {
            if let Some(key) = slot.key.take() {
                self.prefix.remove(&key);
            }
        }
        self.cached = 0;
    }

    fn link_back(&mut self, block: u32) {
        let before = std::mem::replace(&mut self.back, block);
        self.link(block, before, NONE);
    }

    fn link_front(&mut self, block: u32) {
        let after = std::mem::replace(&mut self.front, block);
        self.link(block, NONE, after);
    }

    fn link(&mut self, block: u32, before: u32, after: u32) {
        let slot = &mut self.blocks[block as usize];
        (slot.before, slot.after) = (before, after);
        self.join(before, block);
        self.join(block, after);
        self.unused += 1;
    }

    fn unlink(&mut self, block: u32) {
        let slot = &self.blocks[block as usize];
        let (before, after) = (slot.before, slot.after);
        self.join(before, after);
        self.unused -= 1;
    }

    /// Makes `after` follow `before`; `NONE` stands for the end of the list on that side.
    fn join(&mut self, before: u32, after: u32) {
        match before {
            NONE => self.front = after,
            block => self.blocks[block as usize].after = after,
        }
        match after {
            NONE => self.back = before,
            block => self.blocks[block as usize].before = before,
        }
    }

    /// Checks every table against every other one; `leases` are the block tables of all running sequences.
    ///
    /// # Errors
    /// A sentence about the first inconsistency.
    pub(crate) fn check<'a>(&self, leases: impl Iterator<Item = &'a [BlockId]>) -> Result<KvReport, String> {
        let mut refs = vec![0; self.blocks.len()];
        for block in leases.flatten() {
            refs[block.0 as usize] += 1;
        }
        for (block, (slot, refs)) in self.blocks.iter().zip(&refs).enumerate() {
            if slot.refs != *refs {
                return Err(format!("block {block} counts {} users, and {refs} sequences list it", slot.refs));
            }
            let indexed = slot.key.as_ref().map(|key| (key, self.prefix.get(key)));
            match indexed {
                Some((_, Some(entry))) if entry.block.0 as usize != block => {
                    return Err(format!("block {block} has a key that leads to block {}", entry.block.0));
                }
                Some((_, None)) => return Err(format!("block {block} has a key that the index does not know")),
                Some((_, Some(entry))) if !entry.ready && slot.refs != 1 => {
                    return Err(format!("block {block} is not written and has {} users", slot.refs));
                }
                _ => {}
            }
        }
        for (key, entry) in self.prefix.iter() {
            let slot = &self.blocks[entry.block.0 as usize];
            if !slot.key.as_ref().is_some_and(|own| Arc::ptr_eq(own, key)) {
                return Err(format!("the index leads to block {}, which has another key", entry.block.0));
            }
        }
        self.check_list()?;
        let report = self.report();
        let leased = refs.iter().filter(|refs| **refs > 0).count();
        match report {
            KvReport { total, free, cached, leased: counted }
                if free + cached + leased == total && counted == leased =>
            {
                Ok(report)
            }
            _ => Err(format!("{report:?} does not add up, {leased} blocks are leased")),
        }
    }

    fn check_list(&self) -> Result<(), String> {
        let (mut block, mut before, mut length, mut cached) = (self.front, NONE, 0, 0);
        while block != NONE {
            let slot = &self.blocks[block as usize];
            if slot.before != before || slot.refs != 0 || length > self.blocks.len() {
                return Err(format!("the list of unused blocks is broken at block {block}"));
            }
            length += 1;
            cached += usize::from(slot.key.is_some());
            (before, block) = (block, slot.after);
        }
        if (self.back, self.unused, self.cached) != (before, length, cached) {
            return Err(format!("{} unused blocks are counted and {length} are in the list", self.unused));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cupola_kernels::kv::BLOCK_SIZE;

    fn content(of: u32) -> [u32; BLOCK_SIZE] {
        [of; BLOCK_SIZE]
    }

    fn cache(pool: &mut Blocks, parent: Parent, of: u32) -> (NodeId, BlockId) {
        let block = pool.allocate().expect("a block is free");
        let node = pool.announce(parent, &content(of), block);
        pool.publish(parent, &content(of), block, node);
        (node, block)
    }

    #[test]
    fn a_cached_block_is_found_by_salt_beginning_and_tokens() {
        let mut pool = Blocks::new(4);
        let (node, block) = cache(&mut pool, Parent::Root(1), 5);
        assert_eq!(pool.find(Parent::Root(1), &content(5)), Found::Ready(node, block));
        assert_eq!(pool.find(Parent::Root(2), &content(5)), Found::Missing);
        assert_eq!(pool.find(Parent::Root(1), &content(6)), Found::Missing);
        assert_eq!(pool.find(Parent::Node(node), &content(5)), Found::Missing);
        pool.check([&[block][..]].into_iter()).expect("whole");
    }

    #[test]
    fn the_longest_unused_goes_first_and_the_tail_before_the_beginning() {
        let mut pool = Blocks::new(3);
        let (root, a) = cache(&mut pool, Parent::Root(0), 1);
        let (_, b) = cache(&mut pool, Parent::Node(root), 2);
        pool.release(&[a, b]);
        assert_eq!(pool.report(), KvReport { total: 3, free: 1, cached: 2, leased: 0 });
        let taken: Vec<_> = (0..2).map(|_| pool.allocate().expect("available")).collect();
        assert_eq!(taken, [BlockId(2), b], "the free block, then the continuation");
        assert_eq!(pool.find(Parent::Root(0), &content(1)), Found::Ready(root, a));
        pool.hold(a);
        assert_eq!(pool.allocate(), None);
        pool.check([&taken[..], &[a][..]].into_iter()).expect("whole");
    }

    #[test]
    fn an_announced_block_is_withdrawn_with_its_owner() {
        let mut pool = Blocks::new(2);
        let block = pool.allocate().expect("free");
        pool.announce(Parent::Root(0), &content(1), block);
        assert_eq!(pool.find(Parent::Root(0), &content(1)), Found::Announced);
        pool.release(&[block]);
        assert_eq!(pool.find(Parent::Root(0), &content(1)), Found::Missing);
        assert_eq!(pool.report().free, 2);
        pool.check(std::iter::empty()).expect("whole");
    }

    #[test]
    fn a_second_copy_stays_out_and_steps_in_when_the_first_was_never_written() {
        let mut pool = Blocks::new(3);
        let (first, second) = (pool.allocate().expect("free"), pool.allocate().expect("free"));
        let node = pool.announce(Parent::Root(0), &content(1), first);
        assert_eq!(pool.announce(Parent::Root(0), &content(1), second), node);
        pool.release(&[first]);
        pool.publish(Parent::Root(0), &content(1), second, node);
        assert_eq!(pool.find(Parent::Root(0), &content(1)), Found::Ready(node, second));
        pool.check([&[second][..]].into_iter()).expect("whole");
    }

    #[test]
    fn forgetting_leaves_leased_blocks_alone() {
        let mut pool = Blocks::new(3);
        let (_, a) = cache(&mut pool, Parent::Root(0), 1);
        let (node, b) = cache(&mut pool, Parent::Root(0), 2);
        pool.release(&[a]);
        pool.forget();
        assert_eq!(pool.find(Parent::Root(0), &content(1)), Found::Missing);
        assert_eq!(pool.find(Parent::Root(0), &content(2)), Found::Ready(node, b));
        assert_eq!(pool.check([&[b][..]].into_iter()).expect("whole").cached, 0);
    }

    #[test]
    fn the_checker_sees_a_lost_lease() {
        let mut pool = Blocks::new(3);
        pool.allocate().expect("free");
        let error = pool.check(std::iter::empty()).expect_err("nobody lists the block");
        assert!(error.contains("block 0 counts 1 users"), "{error}");
    }
}
