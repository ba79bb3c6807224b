//! Parts of OpenAI's response bodies that chat and completions share.

use cupola_engine::request::{StopMatch, Timing, Usage};
use serde::Serialize;
use serde_json::Value;

use crate::generation::{Answer, End};

/// Names the build that answered, as OpenAI's field of the same name does.
pub(crate) const FINGERPRINT: &str = concat!("cupola-", env!("CARGO_PKG_VERSION"));

/// Token counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct UsageBody {
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) total_tokens: usize,
    pub(crate) prompt_tokens_details: PromptDetails,
}

/// Where prompt tokens came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct PromptDetails {
    pub(crate) cached_tokens: usize,
}

impl UsageBody {
    pub(crate) fn new(prompt: usize, completion: usize, cached: usize) -> Self {
        Self {
            prompt_tokens: prompt,
            completion_tokens: completion,
            total_tokens: prompt + completion,
            prompt_tokens_details: PromptDetails { cached_tokens: cached },
        }
    }

    /// Counts one more finished choice of a request with `choices` for each prompt. A prompt counts once; so do its
    /// cached tokens, for its further choices always find it in the cache.
    pub(crate) fn add(&mut self, choice: usize, choices: usize, usage: &Usage) {
        if choice.is_multiple_of(choices) {
            self.prompt_tokens += usage.prompt_tokens;
            self.prompt_tokens_details.cached_tokens += usage.cached_tokens;
        }
        self.completion_tokens += usage.completion_tokens;
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }

    /// The counts of complete answers.
    pub(crate) fn of(answers: &[Answer], choices: usize) -> Self {
        let mut sum = Self::default();
        for (choice, answer) in answers.iter().enumerate() {
            if let Some(end) = &answer.end {
                sum.add(choice, choices, &end.usage);
            }
        }
        sum
    }
}

/// Durations of one answer, on request; field names follow llama-server's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct TimingsBody {
    cache_n: usize,
    prompt_n: usize,
    prompt_ms: f64,
    prompt_per_second: f64,
    predicted_n: usize,
    predicted_ms: f64,
    predicted_per_second: f64,
    queue_ms: f64,
    time_to_first_token_ms: f64,
}

impl TimingsBody {
    pub(crate) fn new(usage: &Usage, timing: &Timing) -> Self {
        let ms = |duration: std::time::Duration| duration.as_secs_f64() * 1e3;
        // The first token comes out of the prefill, so decoding made the others.
        let rate = |n: usize, ms: f64| if ms > 0.0 { n as f64 * 1e3 / ms } else { 0.0 };
        let computed = usage.prompt_tokens.saturating_sub(usage.cached_tokens);
        let decoded = usage.completion_tokens.saturating_sub(1);
        Self {
            cache_n: usage.cached_tokens,
            prompt_n: computed,
            prompt_ms: ms(timing.prefill),
            prompt_per_second: rate(computed, ms(timing.prefill)),
            predicted_n: usage.completion_tokens,
            predicted_ms: ms(timing.decode),
            predicted_per_second: rate(decoded, ms(timing.decode)),
            queue_ms: ms(timing.queue),
            time_to_first_token_ms: ms(timing.queue + timing.prefill),
        }
    }

    pub(crate) fn of(end: &End) -> Self {
        Self::new(&end.usage, &end.timing)
    }

    /// The same as a `Server-Timing` header (<https://www.w3.org/TR/server-timing/>).
    pub(crate) fn header(&self) -> String {
        format!(
            "queue;dur={:.3}, prefill;dur={:.3}, decode;dur={:.3}",
            self.queue_ms, self.prompt_ms, self.predicted_ms
        )
    }
}

/// vLLM's `stop_reason`: the stop text or token that ended an answer, else null.
pub(crate) fn stop_reason(stop: Option<&StopMatch>) -> Value {
    match stop {
        None => Value::Null,
        Some(StopMatch::Text(text)) => text.as_str().into(),
        Some(StopMatch::Token(token)) => (*token).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_counts_once_whatever_its_choices() {
        let usage = |cached, completion| Usage {
            prompt_tokens: 10,
            cached_tokens: cached,
            completion_tokens: completion,
            preemptions: 0,
        };
        let mut sum = UsageBody::default();
        for (choice, one) in [usage(0, 3), usage(9, 4), usage(5, 1), usage(9, 1)].iter().enumerate() {
            sum.add(choice, 2, one);
        }
        assert_eq!(sum, UsageBody::new(20, 9, 5));
        assert_eq!(sum.total_tokens, 29);
    }

    #[test]
    fn no_time_gives_no_infinite_rate() {
        let timings = TimingsBody::new(&Usage::default(), &Timing::default());
        assert_eq!(timings.prompt_per_second, 0.0);
        assert!(serde_json::to_string(&timings).expect("finite numbers").contains("predicted_n"));
    }
}
