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
//! One step is `schedule`, then the forward pass, then `commit`; between commit and the next schedule tokens become known and
//! sequences leave.
//!
//! While a step is under way, `go_ahead` may plan one more, of decode rows alone, as if no answer ended with tokens that are not
//! known yet:
//!
//! ```text
//!   schedule 1 | go_ahead 2 |  commit 1, tokens of 1 | go_ahead 3 |  commit 2, tokens of 2 ...
//! ```
//!
//! A sequence may leave at any time. Its blocks are free once every step that was planned before is done, since its rows in these
//! steps still write there; what such a row chooses is nobody's, and `get` no longer finds its sequence.
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
    /// Which sequence: its arrival.
    pub(crate) arrival: u64,
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
    /// Counts steps.
    pub(crate) number: u64,
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
    /// Number of the last step that was planned, and of the last that is done: computed, or given up.
    planned: u64,
    done: u64,
    /// Blocks of sequences that left, each with the last step planned before.
    left: Vec<(u64, Vec<BlockId>)>,
}

impl Scheduler {
    /// # Panics
    /// If the limits contradict each other.
    pub(crate) fn new(limits: Limits, num_blocks: usize) -> Self {
        assert!((1..=limits.max_rows).contains(&limits.max_seqs), "every running sequence has a row: {limits:?}");
        let (waiting, running) = (VecDeque::new(), Vec::new());
        Self { limits, blocks: Blocks::new(num_blocks), waiting, running, planned: 0, done: 0, left: Vec::new() }
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

    /// A running sequence by its arrival; `None` when it has left.
    pub(crate) fn get(&self, arrival: u64) -> Option<&Sequence> {
        self.place(arrival).map(|index| &self.running[index])
    }

    /// As [`Scheduler::get`].
    pub(crate) fn get_mut(&mut self, arrival: u64) -> Option<&mut Sequence> {
        self.place(arrival).map(|index| &mut self.running[index])
    }

    fn place(&self, arrival: u64) -> Option<usize> {
        self.running.binary_search_by_key(&arrival, |sequence| sequence.arrival).ok()
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

    /// Takes every sequence out for which `leaves` is true, and frees its blocks when no step under way writes to them.
    pub(crate) fn remove_if(&mut self, mut leaves: impl FnMut(&Sequence) -> bool) {
        let (planned, left) = (self.planned, &mut self.left);
        self.running.retain_mut(|sequence| {
            let leaves = leaves(sequence);
            if leaves {
                left.push((planned, std::mem::take(&mut sequence.blocks)));
            }
            !leaves
        });
        self.waiting.retain(|sequence| !leaves(sequence));
        self.free_left();
    }

    /// Frees the blocks of sequences that left before the steps under way were planned.
    fn free_left(&mut self) {
        let (done, pool) = (self.done, &mut self.blocks);
        self.left.retain(|(step, blocks)| {
            if *step <= done {
                pool.release(blocks);
            }
            *step > done
        });
    }

    /// Plans the next step and allocates its blocks, with no step under way. Empty only when there is nothing to run.
    pub(crate) fn schedule(&mut self) -> Step {
        assert_eq!(self.planned, self.done, "what is under way may change what can be planned");
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
        self.numbered(step)
    }

    /// Plans the step after the one under way, before the tokens that it chooses are known: a row for every sequence whose answer
    /// goes on after that. `None`, with nothing changed, where such a step is not all that there is to do: with a prompt in
    /// progress, a sequence that could be let in, a missing block, or one that is not `free` of what is not known.
    pub(crate) fn go_ahead(&mut self, free: impl Fn(&Sequence) -> bool) -> Option<Step> {
        let ready = |sequence: &&Sequence| sequence.unknown == 1 && sequence.remaining() == 1 && free(sequence);
        let going_on = || self.running.iter().filter(|sequence| !sequence.is_complete());
        let missing = |sequence: &Sequence| blocks_for(sequence.submitted + 1).saturating_sub(sequence.blocks.len());
        if going_on().next().is_none()
            || !going_on().all(|sequence| ready(&sequence))
            || going_on().map(missing).sum::<usize>() > self.blocks.available()
            || self.newcomer(&mut 0, self.promised()).is_some()
        {
            return None;
        }
        let (mut step, mut rows) = (Step::default(), self.limits.max_rows);
        for index in 0..self.running.len() {
            if !self.running[index].is_complete() {
                assert!(self.grow(index, 1), "the blocks were counted");
                self.take(index, 1, &mut step, &mut rows);
            }
        }
        Some(self.numbered(step))
    }

    fn numbered(&mut self, mut step: Step) -> Step {
        self.planned += u64::from(!step.spans.is_empty());
        step.number = self.planned;
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
            let room = (sequence.blocks.len() + self.blocks.available()) * BLOCK_SIZE - sequence.submitted;
            let len = remaining.min(*rows).min(room);
            if len > 0 {
                assert!(self.grow(index, len), "the blocks were counted");
                self.take(index, len, step, rows);
            }
        }
    }

    /// Lets waiting sequences in, by arrival, while the whole prompt of each has blocks.
    fn admit(&mut self, step: &mut Step, rows: &mut usize) {
        let mut promised = self.promised();
        let mut next = 0;
        while *rows > 0 {
            let Some(hit) = self.newcomer(&mut next, promised) else { break };
            let mut sequence = self.waiting.remove(next).expect("the index is in range");
            hit.blocks.iter().for_each(|block| self.blocks.hold(*block));
            sequence.submitted = hit.blocks.len() * BLOCK_SIZE;
            sequence.cached.get_or_insert(sequence.submitted);
            (sequence.blocks, sequence.chain) = (hit.blocks, hit.nodes);
            let len = sequence.remaining().min(*rows);
            let index = self.running.partition_point(|other| other.arrival < sequence.arrival);
            self.running.insert(index, sequence);
            assert!(self.grow(index, len), "the blocks were counted");
            self.take(index, len, step, rows);
            let sequence = &self.running[index];
            promised += blocks_for(sequence.known.len()) - sequence.blocks.len();
        }
    }

    /// Blocks that running prompts have yet to allocate: they are not for newcomers.
    fn promised(&self) -> usize {
        let missing = |sequence: &Sequence| blocks_for(sequence.known.len()).saturating_sub(sequence.blocks.len());
        self.running.iter().map(missing).sum()
    }

    /// Moves `next` to the first waiting sequence from there on that does not wait for another one's blocks. Where it may be let
    /// in, gives what the prefix cache has of it.
    fn newcomer(&self, next: &mut usize, promised: usize) -> Option<Hit> {
        while *next < self.waiting.len() && self.running.len() < self.limits.max_seqs {
            let sequence = &self.waiting[*next];
            let hit = self.look_up(sequence);
            if hit.announced {
                *next += 1;
                continue;
            }
            let missing = blocks_for(sequence.known.len()) - hit.blocks.len();
            let revived = hit.blocks.iter().filter(|block| self.blocks.is_unused(**block)).count();
            return (missing + revived + promised <= self.blocks.available()).then_some(hit);
        }
        None
    }

    /// The longest beginning that the prefix cache has. The last token is always computed: its logits are wanted.
    fn look_up(&self, sequence: &Sequence) -> Hit {
        let mut hit = Hit { nodes: Vec::new(), blocks: Vec::new(), announced: false };
        if !sequence.sharing.read {
            return hit;
        }
        for i in 0..(sequence.known.len() - 1) / BLOCK_SIZE {
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
        let missing = blocks_for(sequence.submitted + len).saturating_sub(sequence.blocks.len());
        if missing > self.blocks.available() {
            return false;
        }
        let blocks = &mut self.blocks;
        sequence.blocks.extend((0..missing).map(|_| blocks.allocate().expect("the blocks were counted")));
        true
    }

    /// Puts the next `len` rows of a running sequence into the step, and announces the whole blocks of known tokens they touch.
    fn take(&mut self, index: usize, len: usize, step: &mut Step, rows: &mut usize) {
        let sequence = &mut self.running[index];
        let (start, end) = (sequence.submitted, sequence.submitted + len);
        announce(&mut self.blocks, sequence, end);
        let first_output = sequence.first_output(start, len);
        sequence.unknown += usize::from(sequence.chooses(end));
        sequence.submitted = end;
        *rows -= len;
        step.spans.push(Span { arrival: sequence.arrival, start, len, first_output });
    }

    fn preempt_youngest(&mut self, step: &mut Step) {
        let mut sequence = self.running.pop().expect("only a running sequence lacks a block");
        self.blocks.release(&sequence.blocks);
        sequence.blocks.clear();
        sequence.chain.clear();
        sequence.submitted = 0;
        sequence.preemptions += 1;
        step.preempted += 1;
        let place = self.waiting.partition_point(|other| other.arrival < sequence.arrival);
        self.waiting.insert(place, sequence);
    }

    /// The step has been computed, and all tokens of its rows are known: they are in the pool, and blocks that became whole can be
    /// shared.
    pub(crate) fn commit(&mut self, step: &Step) {
        for span in &step.spans {
            let Some(index) = self.place(span.arrival) else { continue };
            let (sequence, end) = (&mut self.running[index], span.start + span.len);
            if !sequence.sharing.write {
                continue;
            }
            // Those whose last token was not known when the step was planned.
            announce(&mut self.blocks, sequence, end);
            for i in span.start / BLOCK_SIZE..end / BLOCK_SIZE {
                let parent = sequence.parent(&sequence.chain[..i]);
                let (tokens, block) = (sequence.block_tokens(i), sequence.blocks[i]);
                self.blocks.publish(parent, tokens, block, sequence.chain[i]);
            }
        }
        self.end(step);
    }

    /// The step is given up: nothing that it was to compute can be used, and its sequences leave.
    pub(crate) fn end(&mut self, step: &Step) {
        self.done = step.number;
        self.free_left();
    }

    /// Nothing is under way any more, whatever was planned.
    pub(crate) fn end_all(&mut self) {
        self.done = self.planned;
        self.free_left();
    }

    /// Checks the block tables and the queues.
    ///
    /// # Errors
    /// A sentence about the first inconsistency.
    pub(crate) fn check(&self) -> Result<KvReport, String> {
        for sequence in &self.running {
            let (blocks, submitted, scheduled) = (sequence.blocks.len(), sequence.submitted, sequence.scheduled_len());
            if blocks < blocks_for(submitted) || submitted > scheduled || sequence.answers && submitted == scheduled {
                let slot = sequence.slot;
                return Err(format!("request {slot} has {blocks} blocks for {submitted} of {scheduled} tokens"));
            }
            let under_way = self.planned - self.done;
            if sequence.unknown as u64 > under_way {
                let (slot, unknown) = (sequence.slot, sequence.unknown);
                return Err(format!("request {slot} lacks {unknown} tokens with {under_way} steps under way"));
            }
        }
        if let Some((step, _)) = self.left.iter().find(|(step, _)| *step <= self.done) {
            return Err(format!("blocks are held for step {step}, and step {} is done", self.done));
        }
        if let Some(sequence) = self.waiting.iter().find(|sequence| !sequence.blocks.is_empty()) {
            return Err(format!("request {} waits and holds {} blocks", sequence.slot, sequence.blocks.len()));
        }
        let by_arrival = self.running.is_sorted_by_key(|sequence| sequence.arrival)
            && self.waiting.iter().is_sorted_by_key(|sequence| sequence.arrival);
        if !by_arrival {
            return Err("the queues are not in order of arrival".into());
        }
        let left = self.left.iter().map(|(_, blocks)| blocks.as_slice());
        self.blocks.check(self.running.iter().map(|sequence| sequence.blocks.as_slice()).chain(left))
    }
}

/// Announces the whole blocks of known tokens that the rows of a sequence up to `end` touch, where it shares them.
fn announce(pool: &mut Blocks, sequence: &mut Sequence, end: usize) {
    if !sequence.sharing.write {
        return;
    }
    let touched = blocks_for(end).min(sequence.known.len() / BLOCK_SIZE);
    for i in sequence.chain.len()..touched {
        let parent = sequence.parent(&sequence.chain);
        let node = pool.announce(parent, sequence.block_tokens(i), sequence.blocks[i]);
        sequence.chain.push(node);
    }
}

#[cfg(test)]
mod tests;
