//! Chooses the next token of one request from its row of logits.
//!
//! ```text
//!   logits ──> logit_bias ──> penalties ──> excluded tokens ──> temperature, top_k, top_p, min_p ──> token
//!      └─────────────────────────── log-probabilities, untouched by all of that
//! ```
//!
//! A row's result depends on the row, the request and the index of the token alone, so rows are sampled in parallel and
//! in any order. [`Sampler::choose`] changes nothing in the request; [`Sampler::accept`] does, between steps.
//! A device that draws tokens by itself is told by [`Sampler::draw`] what `choose` would do, down to the random number.

mod logprobs;
mod math;
pub(crate) mod random;
mod seen;
mod select;

use std::sync::{Mutex, PoisonError};

use cupola_kernels::Draw;

use self::seen::Seen;
use crate::request::{SamplingParams, TokenLogprobs};

/// Below this temperature the most likely token is taken: dividing by it would only overflow.
const GREEDY_BELOW: f32 = 1e-5;

/// The sampling side of one request.
#[derive(Debug)]
pub(crate) struct Sampler {
    params: SamplingParams,
    seed: u64,
    seen: Option<Seen>,
    /// Tokens excluded from the first `excluded_until` tokens of the answer.
    excluded: Vec<u32>,
    excluded_until: usize,
    logprobs: Option<u8>,
}

/// A chosen token.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Choice {
    pub(crate) token: u32,
    pub(crate) logprobs: Option<TokenLogprobs>,
}

/// Memory that rows borrow while they are sampled; as many sets as rows are sampled at once.
#[derive(Debug, Default)]
pub(crate) struct Scratch(Mutex<Vec<Set>>);

#[derive(Debug, Default)]
struct Set {
    raw: Vec<f32>,
    select: select::Buffers,
}

impl Scratch {
    fn lend<T>(&self, work: impl FnOnce(&mut Set) -> T) -> T {
        let mut set = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        let result = work(&mut set);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(set);
        result
    }
}

impl Sampler {
    /// `drawn_seed` serves where the request has none.
    pub(crate) fn new(mut params: SamplingParams, prompt: &[u32], logprobs: Option<u8>, drawn_seed: u64) -> Self {
        let seed = params.seed.unwrap_or(drawn_seed);
        add_up(&mut params.logit_bias);
        let seen = Seen::new(&params, prompt);
        Self { params, seed, seen, excluded: Vec::new(), excluded_until: 0, logprobs }
    }

    /// Excludes tokens from the beginning of the answer.
    pub(crate) fn exclude(&mut self, tokens: Vec<u32>, until: usize) {
        (self.excluded, self.excluded_until) = (tokens, until);
    }

    /// True when the `index`-th token of the answer is simply the most likely one and nothing else is asked.
    pub(crate) fn is_plain(&self, index: usize) -> bool {
        self.is_greedy() && self.logprobs.is_none() && !self.changes_logits(index)
    }

    /// True when choosing a token takes the one before it, or more than a token is wanted; what depends on the index of a token
    /// alone does not count.
    pub(crate) fn looks_at_tokens(&self) -> bool {
        self.seen.is_some() || self.logprobs.is_some()
    }

    fn is_greedy(&self) -> bool {
        self.params.temperature < GREEDY_BELOW
    }

    fn changes_logits(&self, index: usize) -> bool {
        self.seen.is_some() || !self.params.logit_bias.is_empty() || self.excludes(index)
    }

    fn excludes(&self, index: usize) -> bool {
        index < self.excluded_until && !self.excluded.is_empty()
    }

    /// Chooses the `index`-th token of the answer. The logits may be overwritten.
    ///
    /// # Errors
    /// One sentence about logits that nothing can be chosen from.
    pub(crate) fn choose(&self, index: usize, logits: &mut [f32], scratch: &Scratch) -> Result<Choice, &'static str> {
        scratch.lend(|Set { raw, select }| {
            if self.logprobs.is_some() {
                raw.clear();
                raw.extend_from_slice(logits);
            }
            self.adjust(index, logits);
            let token = if self.is_greedy() {
                math::argmax(logits)?
            } else {
                select::draw(logits, &self.params, random::uniform(self.seed, index as u64), select)?
            };
            let describe = |top: u8| logprobs::describe(raw, token, usize::from(top));
            Ok(Choice { token, logprobs: self.logprobs.map(describe).transpose()? })
        })
    }

    /// The same choice as a device makes it where the logits are; `None` when it takes more than a token to answer.
    pub(crate) fn draw(&self, index: usize) -> Option<Draw<'_>> {
        let params = &self.params;
        self.logprobs.is_none().then(|| Draw {
            temperature: if self.is_greedy() { 0.0 } else { params.temperature },
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            uniform: random::uniform(self.seed, index as u64),
            bias: &params.logit_bias,
            seen: self.seen.as_ref().map_or(&[], Seen::tokens),
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            excluded: if self.excludes(index) { &self.excluded } else { &[] },
            allowed: None,
        })
    }

    fn adjust(&self, index: usize, logits: &mut [f32]) {
        for (token, bias) in &self.params.logit_bias {
            logits[*token as usize] += bias;
        }
        if let Some(seen) = &self.seen {
            seen.penalise(&self.params, logits);
        }
        if self.excludes(index) {
            self.excluded.iter().for_each(|token| logits[*token as usize] = f32::NEG_INFINITY);
        }
    }

    /// The token became part of the answer.
    pub(crate) fn accept(&mut self, token: u32) {
        if let Some(seen) = &mut self.seen {
            seen.add(token);
        }
    }
}

/// Puts tokens in ascending order and makes one bias of several.
fn add_up(biases: &mut Vec<(u32, f32)>) {
    biases.sort_by_key(|(token, _)| *token);
    biases.dedup_by(|next, kept| {
        let same = next.0 == kept.0;
        if same {
            kept.1 += next.1;
        }
        same
    });
}

/// Log-probabilities of a prompt token, from the row before it.
///
/// # Errors
/// One sentence about logits without probabilities.
pub(crate) fn score(logits: &[f32], token: u32, top: u8) -> Result<TokenLogprobs, &'static str> {
    logprobs::describe(logits, token, usize::from(top))
}

#[cfg(test)]
mod tests;
