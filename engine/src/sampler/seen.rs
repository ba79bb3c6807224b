//! Tokens that a request has seen, and the penalties on them.

use std::collections::HashMap;

use crate::request::SamplingParams;

/// How often each token occurs in the answer; tokens of the prompt alone are there with 0.
#[derive(Debug, Default)]
pub(super) struct Seen {
    in_answer: HashMap<u32, u32>,
}

impl Seen {
    /// The tokens of a prompt, for a request that has penalties; `None` without.
    pub(super) fn new(params: &SamplingParams, prompt: &[u32]) -> Option<Self> {
        let repetition = params.repetition_penalty != 1.0;
        let answer = params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
        // Only the repetition penalty looks at the prompt.
        let prompt = if repetition { prompt } else { &[] };
        (repetition || answer).then(|| Self { in_answer: prompt.iter().map(|token| (*token, 0)).collect() })
    }

    pub(super) fn add(&mut self, token: u32) {
        *self.in_answer.entry(token).or_default() += 1;
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
