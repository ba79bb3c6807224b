//! One request outside the scheduler: how its tokens are chosen, become text, and when the answer ends.
//!
//! ```text
//!   queued ──started: permit given up──> prefill ──first token──> decode ──ending──> Finished
//!      └────────────────┴─────────────────────┴── failed, cancelled ──> Failed, or nobody to tell
//! ```
//!
//! A preempted request goes through prefill again and keeps everything here: tokens sent before are not sent again.

use std::time::{Duration, Instant};

use crate::admission::Permit;
use crate::detokenizer::{Detokenizer, TokenText};
use crate::handle::{InFlight, Submission};
use crate::mailbox::Sender;
use crate::metrics::EngineMetrics;
use crate::request::{Event, FinishReason, StopMatch, Timing, TokenLogprobs, Usage};
use crate::sampler::{Choice, Sampler};
use crate::stop::StopMatcher;

/// State of a request between submission and its last event.
pub(crate) struct Answer {
    pub(crate) sampler: Sampler,
    pub(crate) events: Sender,
    /// Set when the answer is complete or failed: the sequence leaves before the next step.
    pub(crate) ended: bool,
    /// Log-probabilities of the prompt, as they come in; the number is how many likely tokens each lists.
    pub(crate) prompt_logprobs: Option<(u8, Vec<Option<TokenLogprobs>>)>,
    permit: Option<Permit>,
    /// Held for its drop.
    _in_flight: InFlight,
    ends: Ends,
    detokenizer: Detokenizer,
    stop: StopMatcher,
    clock: Clock,
}

/// What ends an answer, other than a stop text.
struct Ends {
    eos: Vec<u32>,
    stop_tokens: Vec<u32>,
    min_tokens: usize,
    /// As asked for, for the metrics.
    max_tokens: Option<usize>,
    /// Tokens after which the answer is complete, from `max_tokens` and the context.
    at_most: usize,
}

/// When things happened.
struct Clock {
    submitted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

/// Why and how an answer ends.
type Ending = (FinishReason, Option<StopMatch>);

impl Answer {
    /// `eos` are the model's end-of-sequence tokens; `room` is the most tokens the context leaves for the answer.
    pub(crate) fn new(submission: Submission, eos: &[u32], room: usize, drawn_seed: u64) -> Self {
        let Submission { request, permit, events, submitted, in_flight } = submission;
        let stop = request.stop;
        let eos = if stop.ignore_eos { Vec::new() } else { eos.to_vec() };
        let mut sampler = Sampler::new(request.sampling, &request.prompt, request.logprobs, drawn_seed);
        if stop.min_tokens > 0 {
            sampler.exclude([eos.as_slice(), stop.token_ids.as_slice()].concat(), stop.min_tokens);
        }
        Self {
            sampler,
            events,
            ended: false,
            prompt_logprobs: request.prompt_logprobs.map(|top| (top, vec![None])),
            permit: Some(permit),
            _in_flight: in_flight,
            ends: Ends {
                eos,
                stop_tokens: stop.token_ids,
                min_tokens: stop.min_tokens,
                max_tokens: stop.max_tokens,
                at_most: stop.max_tokens.map_or(room, |max| max.min(room)),
            },
            detokenizer: Detokenizer::default(),
            stop: StopMatcher::new(stop.strings, stop.include_stop),
            clock: Clock { submitted, started: None, first_token: None, last_token: None },
        }
    }

    /// Tokens after which the answer is complete, whatever they are.
    pub(crate) fn at_most(&self) -> usize {
        self.ends.at_most
    }

    pub(crate) fn has_started(&self) -> bool {
        self.clock.started.is_some()
    }

    /// The request is part of a step for the first time.
    pub(crate) fn start(&mut self, now: Instant, metrics: &EngineMetrics) {
        self.clock.started = Some(now);
        self.permit = None;
        metrics.queue.observe_duration(now - self.clock.submitted);
    }

    /// Sends the log-probabilities of the prompt once they are complete.
    pub(crate) fn send_prompt(&mut self, prompt_len: usize) {
        if let Some((_, logprobs)) = self.prompt_logprobs.take_if(|(_, logprobs)| logprobs.len() >= prompt_len) {
            self.events.push(Event::Prompt { logprobs });
        }
    }

    /// The next token of the answer, the `generated`-th: what later ones depend on. True when there will be no later one,
    /// whatever the text says.
    pub(crate) fn accept(&mut self, token: u32, generated: usize) -> bool {
        self.sampler.accept(token);
        generated >= self.ends.at_most || self.ending_token(token, generated).is_some()
    }

    /// Tells the reader of a token that was accepted `at` some time, when `usage` was so. Ends the answer when it is
    /// complete.
    pub(crate) fn tell(
        &mut self,
        (choice, at): (Choice, Instant),
        usage: Usage,
        text: &dyn TokenText,
        metrics: &EngineMetrics,
    ) {
        let (token, generated) = (choice.token, usage.completion_tokens);
        self.send_prompt(usage.prompt_tokens);
        self.note_token(at, metrics);
        let mut shown = String::new();
        let mut ending = self.ending_token(token, generated);
        if ending.is_none() {
            ending = self.show(token, generated, text, &mut shown);
        }
        if ending.is_none() && generated >= self.ends.at_most {
            ending = Some((FinishReason::Length, None));
        }
        let logprobs = choice.logprobs.into_iter().collect();
        self.events.push(Event::Tokens { tokens: vec![token], text: shown, logprobs });
        if let Some(ending) = ending {
            self.finish(ending, usage, at, metrics);
        }
    }

    fn ending_token(&self, token: u32, generated: usize) -> Option<Ending> {
        if generated <= self.ends.min_tokens && generated < self.ends.at_most {
            return None;
        }
        if self.ends.eos.contains(&token) {
            Some((FinishReason::Stop, None))
        } else if self.ends.stop_tokens.contains(&token) {
            Some((FinishReason::Stop, Some(StopMatch::Token(token))))
        } else {
            None
        }
    }

    /// Appends the text that became final with a token, and tells whether a stop text is complete.
    fn show(&mut self, token: u32, generated: usize, text: &dyn TokenText, shown: &mut String) -> Option<Ending> {
        if text.is_special(token) {
            return None;
        }
        if generated <= self.ends.min_tokens {
            self.detokenizer.push(text.token_bytes(token), shown);
            return None;
        }
        let mut more = String::new();
        self.detokenizer.push(text.token_bytes(token), &mut more);
        let stop = self.stop.push(&more, shown)?;
        Some((FinishReason::Stop, Some(StopMatch::Text(stop.to_string()))))
    }

    /// Sends the last event.
    pub(crate) fn finish(&mut self, (reason, stop): Ending, usage: Usage, now: Instant, metrics: &EngineMetrics) {
        let mut text = String::new();
        // After a stop text nothing more is shown, not even an incomplete character.
        if !matches!(stop, Some(StopMatch::Text(_))) {
            let mut tail = String::new();
            self.detokenizer.finish(&mut tail);
            if self.stop.push(&tail, &mut text).is_none() {
                self.stop.finish(&mut text);
            }
        }
        let timing = self.clock.timing(now);
        self.note_end(reason, usage, timing, now, metrics);
        self.events.push(Event::Finished { text, reason, stop, usage, timing });
        self.ended = true;
    }

    /// Ends the request with a sentence for the client.
    pub(crate) fn fail(&mut self, message: &str, metrics: &EngineMetrics) {
        metrics.failed.add(1);
        self.events.push(Event::Failed { message: message.to_string() });
        self.ended = true;
    }

    fn note_token(&mut self, now: Instant, metrics: &EngineMetrics) {
        metrics.generation_tokens.add(1);
        match self.clock.last_token {
            Some(last) => metrics.inter_token_latency.observe_duration(now - last),
            None => {
                self.clock.first_token = Some(now);
                metrics.time_to_first_token.observe_duration(now - self.clock.submitted);
                metrics.prefill.observe_duration(self.clock.timing(now).prefill);
            }
        }
        self.clock.last_token = Some(now);
    }

    fn note_end(&self, reason: FinishReason, usage: Usage, timing: Timing, now: Instant, metrics: &EngineMetrics) {
        match reason {
            FinishReason::Stop => metrics.finished_stop.add(1),
            FinishReason::Length => metrics.finished_length.add(1),
            FinishReason::Cancelled => metrics.cancelled_running.add(1),
        }
        metrics.e2e.observe_duration(now - self.clock.submitted);
        metrics.request_prompt_tokens.observe(usage.prompt_tokens as f64);
        metrics.request_generation_tokens.observe(usage.completion_tokens as f64);
        if let Some(max) = self.ends.max_tokens {
            metrics.request_max_tokens.observe(max as f64);
        }
        metrics.decode.observe_duration(timing.decode);
        if usage.completion_tokens > 1 {
            metrics.time_per_output_token.observe(timing.decode.as_secs_f64() / (usage.completion_tokens - 1) as f64);
        }
    }
}

impl Clock {
    fn timing(&self, now: Instant) -> Timing {
        let started = self.started.unwrap_or(now);
        let first = self.first_token.unwrap_or(now);
        Timing {
            queue: started - self.submitted,
            prefill: first - started,
            decode: self.last_token.map_or(Duration::ZERO, |last| last - first),
        }
    }
}
