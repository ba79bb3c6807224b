//! Engines over the fake runner, and what a test wants to know of an answer.

use std::sync::Arc;
use std::time::Duration;

use cupola_engine::{
    Engine, EngineConfig, EngineHandle, EngineSetup, Event, FinishReason, MemoryPlan, ModelRunner, Request,
    RequestStream, StopMatch, TokenLogprobs, TokenText, Usage,
};
use cupola_kernels::kv::BLOCK_SIZE;

use crate::fake::{AsyncRunner, EOS, FakeRunner, Letters, Work, argmax, logits_after};

/// An engine and what its runner does.
pub(crate) struct Rig {
    pub(crate) engine: EngineHandle,
    pub(crate) work: Arc<Work>,
}

/// How to build one.
#[derive(Clone)]
pub(crate) struct Plan {
    pub(crate) blocks: usize,
    pub(crate) max_model_len: usize,
    pub(crate) step_time: Duration,
    pub(crate) config: EngineConfig,
}

impl Default for Plan {
    fn default() -> Self {
        Self { blocks: 256, max_model_len: 512, step_time: Duration::ZERO, config: EngineConfig::default() }
    }
}

impl Plan {
    pub(crate) fn start(self) -> Rig {
        self.start_with(Arc::new(Letters::new()), Arc::new(Work::default()))
    }

    /// With another meaning of tokens, and with what the runner does to be seen from there.
    pub(crate) fn start_with(self, text: Arc<dyn TokenText>, work: Arc<Work>) -> Rig {
        let runner = FakeRunner::new(self.blocks, self.step_time, Arc::clone(&work));
        let kv_tokens = self.blocks * BLOCK_SIZE;
        let plan = MemoryPlan {
            device: "fake".into(),
            weights_bytes: 0,
            kv_bytes: 0,
            kv_tokens,
            kv_blocks: self.blocks,
            arena_bytes: 0,
            total_bytes: 0,
            max_model_len: self.max_model_len.min(kv_tokens),
            available_bytes: None,
        };
        let setup = EngineSetup { text, eos: vec![EOS], plan };
        let runner: Box<dyn ModelRunner> =
            if crate::ASYNCHRONOUS { Box::new(AsyncRunner::new(runner)) } else { Box::new(runner) };
        let engine = Engine::start(runner, setup, self.config).expect("a sound setup");
        Rig { engine, work }
    }
}

/// All of an answer.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Answer {
    pub(crate) tokens: Vec<u32>,
    pub(crate) text: String,
    pub(crate) logprobs: Vec<TokenLogprobs>,
    pub(crate) prompt: Option<Vec<Option<TokenLogprobs>>>,
    pub(crate) end: Option<(FinishReason, Option<StopMatch>)>,
    pub(crate) usage: Usage,
    pub(crate) failed: Option<String>,
}

impl Answer {
    pub(crate) fn take(&mut self, event: Event) {
        assert!(self.end.is_none() && self.failed.is_none(), "{event:?} came after the last event");
        match event {
            Event::Prompt { logprobs } => {
                assert!(self.tokens.is_empty() && self.prompt.is_none());
                self.prompt = Some(logprobs);
            }
            Event::Tokens { tokens, text, logprobs } => {
                self.tokens.extend(tokens);
                self.text += &text;
                self.logprobs.extend(logprobs);
            }
            Event::Finished { text, reason, stop, usage, .. } => {
                self.text += &text;
                self.usage = usage;
                self.end = Some((reason, stop));
            }
            Event::Failed { message } => self.failed = Some(message),
        }
    }
}

/// Reads to the end.
pub(crate) fn collect(mut stream: RequestStream) -> Answer {
    let mut answer = Answer::default();
    while let Some(event) = stream.blocking_next() {
        answer.take(event);
    }
    assert!(answer.end.is_some() || answer.failed.is_some(), "a request always gets an answer");
    answer
}

impl Rig {
    pub(crate) fn ask(&self, request: Request) -> Answer {
        collect(self.engine.submit_now(request).expect("accepted"))
    }

    /// Waits until nothing is in flight, then checks that every table is whole and no block is leased.
    pub(crate) fn settle(&self) {
        while self.engine.in_flight() > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let report = self.engine.blocking_check_integrity().expect("whole");
        assert_eq!(report.leased, 0, "{report:?}");
        assert_eq!(report.free + report.cached, report.total, "{report:?}");
    }

    pub(crate) fn rows(&self) -> usize {
        self.work.rows.load(std::sync::atomic::Ordering::Relaxed)
    }
}

/// The greedy answer by definition, without an engine.
pub(crate) fn greedy_answer(prompt: &[u32], max_tokens: usize, ignore_eos: bool) -> Vec<u32> {
    let mut context = prompt.to_vec();
    for _ in 0..max_tokens {
        let token = argmax(&logits_after(&context));
        context.push(token);
        if token == EOS && !ignore_eos {
            break;
        }
    }
    context.split_off(prompt.len())
}

/// Deterministic numbers below a bound.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        usize::try_from(crate::fake::mix(self.0) % bound as u64).expect("below a usize")
    }

    /// Tokens of one of a few families with common beginnings.
    pub(crate) fn prompt(&mut self, longest: usize) -> Vec<u32> {
        let family = self.below(3);
        let shared = self.below(longest);
        let own = 1 + self.below(20);
        let letter = |x: usize| u32::try_from(x % 26).expect("a letter");
        let mut prompt: Vec<u32> = (0..shared).map(|i| letter(i * (family + 3) + family)).collect();
        prompt.extend((0..own).map(|_| letter(self.below(26))));
        prompt
    }
}
