//! What a caller asks of the engine, and the events it gets back.

use std::time::Duration;

/// A request: one prompt, one answer. For `n` answers submit `n` requests; the prefix cache computes the prompt once.
#[derive(Clone, Debug)]
pub struct Request {
    /// Prompt tokens, at least one.
    pub prompt: Vec<u32>,
    /// How the next token is chosen.
    pub sampling: SamplingParams,
    /// When to stop.
    pub stop: StopParams,
    /// Log-probabilities to report for generated tokens: the chosen token and this many most likely ones.
    pub logprobs: Option<u8>,
    /// The same for prompt tokens (all but the first).
    pub prompt_logprobs: Option<u8>,
    /// Requests share cached prefixes only within one salt.
    pub cache_salt: u64,
    /// False: neither reads the prefix cache nor leaves blocks in it.
    pub use_prefix_cache: bool,
}

impl Request {
    /// A greedy request for at most `max_tokens` tokens.
    pub fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self {
            prompt,
            sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
            stop: StopParams { max_tokens: Some(max_tokens), ..StopParams::default() },
            logprobs: None,
            prompt_logprobs: None,
            cache_salt: 0,
            use_prefix_cache: true,
        }
    }
}

/// How the next token is chosen from the logits. Applied in this order: `logit_bias`, penalties, temperature, `top_k`,
/// `top_p`, `min_p`.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// Keep this many most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the most likely tokens that together reach this probability; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens of at least this share of the most likely one's probability; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or answer; 1 is off
    /// (Keskar et al., CTRL, <https://arxiv.org/abs/1909.05858>).
    pub repetition_penalty: f32,
    /// Subtracted from logits of tokens seen in the answer.
    pub presence_penalty: f32,
    /// Subtracted once for every time a token occurs in the answer.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of this request's random numbers; drawn by the engine when absent.
    pub seed: Option<u64>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

/// When an answer ends.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StopParams {
    /// Most tokens to generate; absent: up to the context length.
    pub max_tokens: Option<usize>,
    /// End-of-sequence and stop tokens are not chosen before this many tokens.
    pub min_tokens: usize,
    /// Texts that end the answer; not part of it unless `include_stop` is set.
    pub strings: Vec<String>,
    /// Tokens that end the answer, beside the model's own.
    pub token_ids: Vec<u32>,
    /// Keep the stop text in the answer.
    pub include_stop: bool,
    /// Do not stop at the model's end-of-sequence tokens.
    pub ignore_eos: bool,
}

/// One thing that happened to a request, in order. `Finished` or `Failed` is the last.
#[derive(Clone, Debug)]
pub enum Event {
    /// The prompt has been computed (reported only when `prompt_logprobs` was asked for).
    Prompt {
        /// One entry a prompt token; the first is `None`.
        logprobs: Vec<Option<TokenLogprobs>>,
    },
    /// Tokens were generated. `text` may be empty while a character or a possible stop text is incomplete.
    Tokens {
        /// The tokens, usually one.
        tokens: Vec<u32>,
        /// Text that became final with them.
        text: String,
        /// One entry a token when asked for, else empty.
        logprobs: Vec<TokenLogprobs>,
    },
    /// The answer is complete.
    Finished {
        /// Text held back until now.
        text: String,
        /// Why it ended.
        reason: FinishReason,
        /// The stop text or token that ended it.
        stop: Option<StopMatch>,
        /// Counts.
        usage: Usage,
        /// Durations.
        timing: Timing,
    },
    /// The engine could not go on with this request.
    Failed {
        /// One sentence for the client.
        message: String,
    },
}

/// Log-probabilities of one position.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token at this position.
    pub token: u32,
    /// Its natural-log probability under the model, before temperature and filters.
    pub logprob: f32,
    /// Its rank, 1 for the most likely.
    pub rank: u32,
    /// The most likely tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// End of sequence, a stop token or a stop text.
    Stop,
    /// `max_tokens` or the context length was reached.
    Length,
    /// The caller went away.
    Cancelled,
}

/// What ended an answer early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopMatch {
    /// A stop text.
    Text(String),
    /// A stop token other than the model's end of sequence.
    Token(u32),
}

/// Token counts of a finished request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Prompt tokens.
    pub prompt_tokens: usize,
    /// Prompt tokens that came from the prefix cache.
    pub cached_tokens: usize,
    /// Generated tokens, the one that ended the answer included.
    pub completion_tokens: usize,
    /// Times the request was preempted and recomputed.
    pub preemptions: usize,
}

/// Durations of a finished request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timing {
    /// From submission to the first step that ran it.
    pub queue: Duration,
    /// From the first step to the first token.
    pub prefill: Duration,
    /// From the first to the last token.
    pub decode: Duration,
}
