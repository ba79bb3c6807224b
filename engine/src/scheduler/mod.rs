//! Which rows the next step computes: a pure function of queues and free blocks, without clock, channel or I/O.
//!
//! ```text
//!   waiting (by arrival)                            running (by arrival)
//!   [ f | e | d ] ──admitted: a slot, and blocks──> [ a | b | c ]
//!        ^            for the whole prompt                  │
//!        └──────── preempted: blocks given back, youngest <─┘  only when a block is missing
//!
//!   step   [ decode rows of a, b | prefill chunk of c | first chunk of d ]   up to `max_rows`
//! ```
//!
//! One step is `schedule`, then the forward pass, then `commit`; between commit and the next schedule tokens are
//! appended and sequences leave. Indices of a [`Step`] hold from `schedule` until the first sequence leaves.
//!
//! A waiting sequence whose next block another one is computing stays where it is, and those behind it may pass: in the
//! step after, the block is there, or its owner is gone and the sequence computes it itself.

use std::collections::VecDeque;

use cupola_kernels::BlockId;
use cupola_kernels::kv::{BLOCK_SIZE, blocks_for};

use crate::blocks::{Blocks, Found, KvReport};
use crate::prefix::NodeId;
use crate::sequence::Sequence;

/// Bounds of one step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Sequences that run at once; at most `max_rows`.
    pub(crate) max_seqs: usize,
    /// Rows of a step.
    pub(crate) max_rows: usize,
}

/// Consecutive rows of one running sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// Index in `running`.
    pub(crate) seq: usize,
    /// Position of the first row.
    pub(crate) start: usize,
    /// Number of rows.
    pub(crate) len: usize,
    /// Position of the first row whose logits are wanted; all after it are wanted too.
    pub(crate) first_output: Option<usize>,
}

/// The rows of one step.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) spans: Vec<Span>,
    /// Sequences that lost their blocks while this step was planned.
    pub(crate) preempted: usize,
}

/// Blocks of a sequence's beginning that the prefix cache has.
struct Hit {
    nodes: Vec<NodeId>,
    blocks: Vec<BlockId>,
    /// The block after them is being computed by another sequence.
    announced: bool,
}

/// All sequences and all blocks.
pub(crate) struct Scheduler {
    limits: Limits,
    blocks: Blocks,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
}

impl Scheduler {
    /// # Panics
    /// If the limits contradict each other.
    pub(crate) fn new(limits: Limits, num_blocks: usize) -> Self {
        assert!((1..=limits.max_rows).contains(&limits.max_seqs), "every running sequence has a row: {limits:?}");
        Self { limits, blocks: Blocks::new(num_blocks), waiting: VecDeque::new(), running: Vec::new() }
    }

    /// Appends a sequence to the queue. Its tokens, answer included, must fit the pool.
    pub(crate) fn add(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    pub(crate) fn running(&self) -> &[Sequence] {
        &self.running
    }

    pub(crate) fn running_mut(&mut self, index: usize) -> &mut Sequence {
        &mut self.running[index]
    }

    pub(crate) fn waiting(&self) -> &VecDeque<Sequence> {
        &self.waiting
    }

    pub(crate) fn report(&self) -> KvReport {
        self.blocks.report()
    }

    /// Forgets cached prefixes that nobody uses.
    pub(crate) fn forget_prefixes(&mut self) {
        self.blocks.forget();
    }

    /// Takes every sequence out for which `leaves` is true, and frees its blocks.
    pub(crate) fn remove_if(&mut self, mut leaves: impl FnMut(&Sequence) -> bool) {
        let blocks = &mut self.blocks;
        self.running.retain(|sequence| {
            let leaves = leaves(sequence);
            if leaves {
                blocks.release(&sequence.blocks);
            }
            !leaves
        });
        self.waiting.retain(|sequence| !leaves(sequence));
    }

    /// Plans the next step and allocates its blocks. Empty only when there is nothing to run.
    pub(crate) fn schedule(&mut self) -> Step {
        let mut step = Step::default();
        loop {
            let mut rows = self.limits.max_rows;
            self.decode(&mut step, &mut rows);
            self.prefill(&mut step, &mut rows);
            if step.preempted == 0 {
                self.admit(&mut step, &mut rows);
            }
            if !step.spans.is_empty() || self.running.is_empty() {
                break;
            }
            // Prompts in progress hold all blocks and each lacks one: the youngest makes room for the others.
            self.preempt_youngest(&mut step);
        }
        if step.spans.is_empty() && step.preempted > 0 {
            // Everyone was preempted, so every block is free again: the oldest runs alone.
            let mut rows = self.limits.max_rows;
            self.admit(&mut step, &mut rows);
        }
        step
    }

    /// One row for every sequence that decodes, oldest first. The youngest lose their blocks when one is missing.
    fn decode(&mut self, step: &mut Step, rows: &mut usize) {
        let mut index = 0;
        while index < self.running.len() {
            if self.running[index].remaining() == 1 {
                while !self.grow(index, 1) {
                    self.preempt_youngest(step);
                    if index == self.running.len() {
                        return;
                    }
                }
                self.take(index, 1, step, rows);
            }
            index += 1;
        }
    }

    /// Chunks of prompts in progress, oldest first, as far as rows and blocks go.
    fn prefill(&mut self, step: &mut Step, rows: &mut usize) {
        for index in 0..self.running.len() {
            let remaining = self.running[index].remaining();
            if remaining == 1 || *rows == 0 {
                continue;
            }
            let sequence = &self.running[index];
            let room = (sequence.blocks.len() + self.blocks.available()) * BLOCK_SIZE - sequence.computed;
            let len = remaining.min(*rows).min(room);
            if len > 0 {
                assert!(self.grow(index, len), "the blocks were counted");
                self.take(index, len, step, rows);
            }
        }
    }

    /// Lets waiting sequences in, by arrival, while the whole prompt of each has blocks.
    fn admit(&mut self, step: &mut Step, rows: &mut usize) {
        // Blocks that running prompts have yet to allocate are not for newcomers.
        let mut promised: usize = self
            .running
            .iter()
            .map(|sequence| blocks_for(sequence.tokens.len()).saturating_sub(sequence.blocks.len()))
            .sum();
        let mut next = 0;
        while next < self.waiting.len() && self.running.len() < self.limits.max_seqs && *rows > 0 {
            let hit = self.look_up(&self.waiting[next]);
            if hit.announced {
                next += 1;
                continue;
            }
            let sequence = &self.waiting[next];
            let missing = blocks_for(sequence.tokens.len()) - hit.blocks.len();
            let revived = hit.blocks.iter().filter(|block| self.blocks.is_unused(**block)).count();
            if missing + revived + promised > self.blocks.available() {
                break;
            }
            let mut sequence = self.waiting.remove(next).expect("the index is in range");
            hit.blocks.iter().for_each(|block| self.blocks.hold(*block));
            sequence.computed = hit.blocks.len() * BLOCK_SIZE;
            sequence.cached.get_or_insert(sequence.computed);
            (sequence.blocks, sequence.chain) = (hit.blocks, hit.nodes);
            let len = sequence.remaining().min(*rows);
            let index = self.running.partition_point(|other| other.arrival < sequence.arrival);
            step.spans.iter_mut().filter(|span| span.seq >= index).for_each(|span| span.seq += 1);
            self.running.insert(index, sequence);
            assert!(self.grow(index, len), "the blocks were counted");
            self.take(index, len, step, rows);
            let sequence = &self.running[index];
            promised += blocks_for(sequence.tokens.len()) - sequence.blocks.len();
        }
    }

    /// The longest beginning that the prefix cache has. The last token is always computed: its logits are wanted.
    fn look_up(&self, sequence: &Sequence) -> Hit {
        let mut hit = Hit { nodes: Vec::new(), blocks: Vec::new(), announced: false };
        if !sequence.sharing.read {
            return hit;
        }
        for i in 0..(sequence.tokens.len() - 1) / BLOCK_SIZE {
            match self.blocks.find(sequence.parent(&hit.nodes), sequence.block_tokens(i)) {
                Found::Ready(node, block) => {
                    hit.nodes.push(node);
                    hit.blocks.push(block);
                }
                Found::Announced => {
                    hit.announced = true;
                    break;
                }
                Found::Missing => break,
            }
        }
        hit
    }

    /// Allocates blocks for the next `len` rows of a running sequence; false, with nothing changed, when they are
    /// missing.
    fn grow(&mut self, index: usize, len: usize) -> bool {
        let sequence = &mut self.running[index];
        let missing = blocks_for(sequence.computed + len).saturating_sub(sequence.blocks.len());
        if missing > self.blocks.available() {
            return false;
        }
        let blocks = &mut self.blocks;
        sequence.blocks.extend((0..missing).map(|_| blocks.allocate().expect("the blocks were counted")));
        true
    }

    /// Puts the next `len` rows of a running sequence into the step, and announces the whole blocks they touch.
    fn take(&mut self, index: usize, len: usize, step: &mut Step, rows: &mut usize) {
        let sequence = &mut self.running[index];
        let (start, end) = (sequence.computed, sequence.computed + len);
        if sequence.sharing.write {
            let touched = blocks_for(end).min(sequence.tokens.len() / BLOCK_SIZE);
            for i in sequence.chain.len()..touched {
                let parent = sequence.parent(&sequence.chain);
                let node = self.blocks.announce(parent, sequence.block_tokens(i), sequence.blocks[i]);
                sequence.chain.push(node);
            }
        }
        let first_output = sequence.first_output(start, len);
        *rows -= len;
        step.spans.push(Span { seq: index, start, len, first_output });
    }

    fn preempt_youngest(&mut self, step: &mut Step) {
        let mut sequence = self.running.pop().expect("only a running sequence lacks a block");
        self.blocks.release(&sequence.blocks);
        sequence.blocks.clear();
        sequence.chain.clear();
        sequence.computed = 0;
        sequence.preemptions += 1;
        step.preempted += 1;
        let place = self.waiting.partition_point(|other| other.arrival < sequence.arrival);
        self.waiting.insert(place, sequence);
    }

    /// The step has been computed: its rows are in the pool, and blocks that became whole can be shared.
    pub(crate) fn commit(&mut self, step: &Step) {
        for span in &step.spans {
            let sequence = &mut self.running[span.seq];
            let before = sequence.computed;
            sequence.computed += span.len;
            if !sequence.sharing.write {
                continue;
            }
            for i in before / BLOCK_SIZE..sequence.computed / BLOCK_SIZE {
                let parent = sequence.parent(&sequence.chain[..i]);
                let (tokens, block) = (sequence.block_tokens(i), sequence.blocks[i]);
                self.blocks.publish(parent, tokens, block, sequence.chain[i]);
            }
        }
    }

    /// Checks the block tables and the queues.
    ///
    /// # Errors
    /// A sentence about the first inconsistency.
    pub(crate) fn check(&self) -> Result<KvReport, String> {
        for sequence in &self.running {
            let (blocks, computed) = (sequence.blocks.len(), sequence.computed);
            if blocks < blocks_for(computed) || sequence.remaining() == 0 {
                return Err(format!(
                    "request {} has {blocks} blocks for {computed} of {} tokens",
                    sequence.slot,
                    sequence.tokens.len()
                ));
            }
        }
        if let Some(sequence) = self.waiting.iter().find(|sequence| !sequence.blocks.is_empty()) {
            return Err(format!("request {} waits and holds {} blocks", sequence.slot, sequence.blocks.len()));
        }
        let by_arrival = self.running.is_sorted_by_key(|sequence| sequence.arrival)
            && self.waiting.iter().is_sorted_by_key(|sequence| sequence.arrival);
        if !by_arrival {
            return Err("the queues are not in order of arrival".into());
        }
        self.blocks.check(self.running.iter().map(|sequence| sequence.blocks.as_slice()))
    }
}

#[cfg(test)]
mod tests;
