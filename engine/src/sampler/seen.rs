//! Tokens that a request has seen, and the penalties on them.

use std::collections::HashMap;

use crate::request::SamplingParams;

/// How often each token occurs in the answer; tokens of the prompt alone are there with 0.
#[derive(Debug, Default)]
pub(super) struct Seen {
    in_answer: Vec<(u32, u32)>,
    /// Where a token is among them.
    places: HashMap<u32, usize>,
}

impl Seen {
    /// The tokens of a prompt, for a request that has penalties; `None` without.
    pub(super) fn new(params: &SamplingParams, prompt: &[u32]) -> Option<Self> {
        let repetition = params.repetition_penalty != 1.0;
        let answer = params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
        // Only the repetition penalty looks at the prompt.
        let prompt = if repetition { prompt } else { &[] };
        (repetition || answer).then(|| {
            let mut seen = Self::default();
            for token in prompt {
                seen.count(*token);
            }
            seen
        })
    }

    pub(super) fn add(&mut self, token: u32) {
        *self.count(token) += 1;
    }

    fn count(&mut self, token: u32) -> &mut u32 {
        let place = *self.places.entry(token).or_insert(self.in_answer.len());
        if place == self.in_answer.len() {
            self.in_answer.push((token, 0));
        }
        &mut self.in_answer[place].1
    }

    /// Tokens, each once, and how often they are in the answer.
    pub(super) fn tokens(&self) -> &[(u32, u32)] {
        &self.in_answer
    }

    pub(super) fn penalise(&self, params: &SamplingParams, logits: &mut [f32]) {
        for (token, count) in &self.in_answer {
            let logit = &mut logits[*token as usize];
            *logit = if *logit > 0.0 { *logit / params.repetition_penalty } else { *logit * params.repetition_penalty };
            if *count > 0 {
                *logit -= params.presence_penalty + *count as f32 * params.frequency_penalty;
            }
        }
    }
}
