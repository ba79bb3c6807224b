//! One request as the scheduler sees it: tokens, how many of them have rows, and the blocks they are in.
//!
//! ```text
//!   known     [ prompt ............................ | generated ..... ]
//!   scheduled [ known, and those that steps under way will choose ..........| ? ]
//!   submitted [ in the pool, or in a step under way .. )  remaining: the next rows
//!   blocks    [ 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 ]       cover at least what is submitted
//!   chain     [ a | b | c | d | e ]                   prefix nodes of the first whole blocks, all of known tokens
//! ```
//!
//! What is planned counts scheduled tokens: a sequence that decodes has exactly one remaining, whether it is known or not. What
//! others see counts known ones: usage, the prefix cache, the end of an answer. Between steps the two are the same.
//!
//! A preempted sequence has no blocks and computes everything again, generated tokens included; they were sent already and
//! are not sent twice.

use cupola_kernels::BlockId;
use cupola_kernels::kv::BLOCK_SIZE;

use crate::prefix::{NodeId, Parent};
use crate::request::Usage;

/// A request's tokens and blocks.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// Where the step loop keeps the rest of the request.
    pub(crate) slot: usize,
    /// Order of arrival; lower is older.
    pub(crate) arrival: u64,
    /// Prompt and generated tokens, as far as they are known.
    pub(crate) known: Vec<u32>,
    /// Tokens behind them that steps under way will choose: at most one a step.
    pub(crate) unknown: usize,
    /// Length of the prompt.
    pub(crate) prompt_len: usize,
    /// Length with which the answer ends, whatever its tokens are.
    pub(crate) longest: usize,
    /// Tokens whose keys and values are in the pool, or will be when the steps under way are computed.
    pub(crate) submitted: usize,
    pub(crate) blocks: Vec<BlockId>,
    pub(crate) chain: Vec<NodeId>,
    pub(crate) sharing: Sharing,
    /// False for a request that wants no answer, only its prompt computed.
    pub(crate) answers: bool,
    /// For prompt log-probabilities: rows of the prompt whose logits were given already.
    pub(crate) scored: Option<usize>,
    /// Prompt tokens found in the prefix cache when the sequence first ran.
    pub(crate) cached: Option<usize>,
    pub(crate) preemptions: usize,
}

/// What a sequence has to do with the prefix cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sharing {
    /// Takes blocks from it.
    pub(crate) read: bool,
    /// Leaves blocks in it.
    pub(crate) write: bool,
    /// Shares only within this salt.
    pub(crate) salt: u64,
}

impl Sequence {
    /// Tokens that are known, and those that steps under way will choose.
    pub(crate) fn scheduled_len(&self) -> usize {
        self.known.len() + self.unknown
    }

    /// Scheduled tokens without a row; 1 while decoding.
    pub(crate) fn remaining(&self) -> usize {
        self.scheduled_len() - self.submitted
    }

    /// True when the answer ends with what is scheduled, so that no row for its last token is of use.
    pub(crate) fn is_complete(&self) -> bool {
        self.unknown > 0 && self.scheduled_len() >= self.longest
    }

    /// Known tokens of the answer.
    pub(crate) fn generated(&self) -> usize {
        self.known.len() - self.prompt_len
    }

    /// The first unknown token has become known.
    pub(crate) fn learn(&mut self, token: u32) {
        self.unknown = self.unknown.checked_sub(1).expect("a step under way has chosen it");
        self.known.push(token);
    }

    /// What its request has used so far: known tokens.
    pub(crate) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_len,
            cached_tokens: self.cached.unwrap_or(0),
            completion_tokens: self.generated(),
            preemptions: self.preemptions,
        }
    }

    /// Tokens of the `i`-th block, which must be whole and known.
    pub(crate) fn block_tokens(&self, i: usize) -> &[u32] {
        &self.known[i * BLOCK_SIZE..(i + 1) * BLOCK_SIZE]
    }

    /// The beginning before block `i`, where `chain` is the nodes of the blocks before it.
    pub(crate) fn parent(&self, chain: &[NodeId]) -> Parent {
        chain.last().map_or(Parent::Root(self.sharing.salt), |node| Parent::Node(*node))
    }

    /// First row of `start..start + len` whose logits are wanted, and all after it up to the end; `None` for none.
    ///
    /// ```text
    ///   rows      start ................................. start + len
    ///   answer                                            x   the last token scheduled
    ///   scores        scored .................. prompt_len - 1
    /// ```
    pub(crate) fn first_output(&self, start: usize, len: usize) -> Option<usize> {
        let end = start + len;
        let scores = self.scored.filter(|scored| *scored + 1 < self.prompt_len && *scored < end);
        let answer = self.chooses(end).then_some(end - 1);
        scores.map(|scored| scored.max(start)).or(answer)
    }

    /// True when a step whose rows end before `end` chooses the next token of the answer.
    pub(crate) fn chooses(&self, end: usize) -> bool {
        self.answers && end == self.scheduled_len()
    }
}

#[cfg(test)]
impl Sequence {
    pub(crate) fn for_test(arrival: u64, tokens: Vec<u32>) -> Self {
        Self {
            slot: usize::try_from(arrival).expect("small"),
            arrival,
            prompt_len: tokens.len(),
            known: tokens,
            unknown: 0,
            longest: usize::MAX,
            submitted: 0,
            blocks: Vec::new(),
            chain: Vec::new(),
            sharing: Sharing { read: true, write: true, salt: 0 },
            answers: true,
            scored: None,
            cached: None,
            preemptions: 0,
        }
    }
}
