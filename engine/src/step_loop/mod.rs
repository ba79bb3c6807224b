//! The one engine thread: it owns the scheduler, the runner and every request in flight.
//!
//! ```text
//!   ┌─> commands ──nothing in flight: wait, without polling──┐
//!   │      v                                                 │
//!   │   cancelled requests leave                             │
//!   │   schedule ─> batch ─> forward ─> commit ─> sample ─> accept ─> tell ─> ended requests leave
//!   └────────────────────────────────────────────────────────┘
//! ```
//!
//! A token is accepted and told. Accepting is what the next step depends on: the token joins its sequence, and a sequence
//! whose answer ends with it leaves. Telling is the rest: text, stop texts, events, metrics. On a runner that computes while
//! the host goes on, the tokens of a step are told once the next step is submitted:
//!
//! ```text
//!   runner   [ step 1           ]          [ step 2           ]          [ step 3
//!   host     forward 1 |  wait    accept 1 | forward 2 | tell 1 | wait    accept 2 | forward 3 | tell 2 ...
//! ```
//!
//! A stop text that is found then ends its answer at once; the row of that sequence in the step under way is thrown away, and
//! the sequence leaves with its blocks when the step is done.
//!
//! Where the runner can carry tokens from one step to the next by itself, a step of decode rows alone is submitted before the
//! tokens of the step before it are read, so that the device never waits for the host:
//!
//! ```text
//!   runner   [ step 1           ][ step 2           ][ step 3           ][ ...
//!   host     forward 1 | forward 2 | wait 1 | accept 1 | tell 1 | forward 3 | wait 2 | accept 2 | tell 2 | forward 4 ...
//! ```
//!
//! It is planned as if no answer ended with a token that is not known yet: the row of one that does is thrown away too. Whatever
//! needs more than that (a prompt, a request let in, a missing block, a row that looks at the tokens so far) is planned when
//! nothing is under way, as it would be without.
//!
//! Nobody else touches these fields. The thread ends after `Shutdown`, or when every handle is gone and nothing is in
//! flight, or with a panic or a fatal error of the runner: then all requests fail and the engine is dead for good, because
//! what is in the pool can no longer be trusted.

mod rows;

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cupola_kernels::Drawn;
use cupola_models::Batch;

use self::rows::{Chooser, Failed, Outcome, UnderWay};
use crate::answer::Answer;
use crate::handle::{Command, Shared, Submission};
use crate::request::{FinishReason, Usage};
use crate::runner::ModelRunner;
use crate::sampler::{Choice, Scratch, random};
use crate::scheduler::{Limits, Scheduler, Step};
use crate::sequence::{Sequence, Sharing};

/// Everything the engine thread owns.
pub(crate) struct StepLoop {
    runner: Box<dyn ModelRunner>,
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    eos: Vec<u32>,
    prefix_caching: bool,
    scheduler: Scheduler,
    /// Requests in flight; a sequence knows its place.
    answers: Vec<Option<Answer>>,
    arrivals: u64,
    /// Start of the seeds drawn for requests without one.
    entropy: u64,
    /// Tokens may be carried from one step to the next.
    carries: bool,
    /// The step that was submitted before the tokens of the one before it were read.
    under_way: Option<UnderWay>,
    batch: Batch,
    scratch: Scratch,
    results: Vec<Mutex<Result<Outcome, &'static str>>>,
    /// Tokens that the runner drew by itself.
    drawn: Vec<Drawn>,
    /// Tokens that were accepted and not told yet.
    untold: Vec<Untold>,
}

/// A token that its reader has yet to learn of.
struct Untold {
    /// Place of its request, which stays there until this is told or the request is cancelled.
    slot: usize,
    choice: Choice,
    at: Instant,
    usage: Usage,
}

/// What [`StepLoop::new`] takes.
pub(crate) struct LoopSetup {
    pub(crate) runner: Box<dyn ModelRunner>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) commands: Receiver<Command>,
    pub(crate) eos: Vec<u32>,
    pub(crate) prefix_caching: bool,
    /// Let a runner that can do so carry tokens from one step to the next.
    pub(crate) carry_tokens: bool,
    pub(crate) limits: Limits,
    pub(crate) num_blocks: usize,
}

impl StepLoop {
    pub(crate) fn new(setup: LoopSetup) -> Self {
        let LoopSetup { runner, shared, commands, eos, prefix_caching, carry_tokens, limits, num_blocks } = setup;
        let carries = carry_tokens && runner.carries();
        shared.metrics.kv_blocks_total.set(num_blocks);
        Self {
            runner,
            shared,
            commands,
            eos,
            prefix_caching,
            scheduler: Scheduler::new(limits, num_blocks),
            answers: Vec::new(),
            arrivals: 0,
            entropy: RandomState::new().hash_one("seeds of requests without one"),
            carries,
            under_way: None,
            batch: Batch::default(),
            scratch: Scratch::default(),
            results: Vec::new(),
            untold: Vec::new(),
            drawn: Vec::new(),
        }
    }

    /// The body of the engine thread.
    pub(crate) fn run(mut self) {
        let end = catch_unwind(AssertUnwindSafe(|| self.serve()));
        // Dead first: whoever submits from here on is told so.
        self.shared.die();
        let message = match end {
            Ok(Ok(())) => "the engine is shutting down",
            Ok(Err(fault)) => {
                tracing::error!(in_flight = self.answers.iter().flatten().count(), error = fault, "the device failed");
                "the engine stopped after a fault of its device"
            }
            Err(_) => {
                tracing::error!(in_flight = self.answers.iter().flatten().count(), "the engine stopped after a panic");
                "the engine stopped after a fault"
            }
        };
        self.fail_all(message);
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Submit(submission) = command {
                self.shared.metrics.failed.add(1);
                submission.events.push(crate::Event::Failed { message: message.to_string() });
            }
        }
    }

    /// Until the engine is to end, or with what ended it.
    fn serve(&mut self) -> Result<(), String> {
        let end = self.serve_steps();
        let end = end.and(self.drain());
        // What was computed before the end is the readers'.
        self.tell();
        self.drop_ended();
        end
    }

    fn serve_steps(&mut self) -> Result<(), String> {
        loop {
            if !self.take_commands() {
                return Ok(());
            }
            self.drop_cancelled();
            if !self.scheduler.is_empty() {
                self.shared.beat();
                self.step()?;
            }
            if self.scheduler.is_empty() {
                // There is no next step to wait for, and whose step is under way has left.
                self.drain()?;
                self.tell();
                self.drop_ended();
            }
            self.show_state();
        }
    }

    /// Handles what came in; waits for it when nothing is in flight. False when the engine is to end.
    fn take_commands(&mut self) -> bool {
        if self.scheduler.is_empty() {
            self.shared.rest();
            match self.commands.recv() {
                Ok(command) => {
                    if !self.handle(command) {
                        return false;
                    }
                }
                Err(_) => return false,
            }
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => {
                    if !self.handle(command) {
                        return false;
                    }
                }
                // Without handles, what is in flight is still finished for its readers.
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return true,
            }
        }
    }

    fn handle(&mut self, command: Command) -> bool {
        match command {
            Command::Submit(submission) => self.enqueue(*submission),
            Command::ResetPrefixCache => self.scheduler.forget_prefixes(),
            // Whoever asked may be gone by now.
            Command::Check(reply) => drop(reply.send(self.scheduler.check())),
            Command::Shutdown => return false,
        }
        true
    }

    fn enqueue(&mut self, mut submission: Submission) {
        let request = &mut submission.request;
        let share = self.prefix_caching && request.use_prefix_cache;
        // A prompt whose rows are all wanted must be computed; what it computes can serve others.
        let sharing =
            Sharing { read: share && request.prompt_logprobs.is_none(), write: share, salt: request.cache_salt };
        let prompt_len = request.prompt.len();
        let known = request.prompt.clone();
        let answers = request.stop.max_tokens != Some(0);
        let scored = request.prompt_logprobs.map(|_| 0);
        self.arrivals += 1;
        let drawn_seed = random::mix(self.entropy.wrapping_add(self.arrivals));
        let answer = Answer::new(submission, &self.eos, self.shared.max_model_len - prompt_len, drawn_seed);
        let longest = prompt_len + answer.at_most();
        let slot = self.answers.iter().position(Option::is_none).unwrap_or(self.answers.len());
        if slot == self.answers.len() {
            self.answers.push(None);
        }
        self.answers[slot] = Some(answer);
        self.scheduler.add(Sequence {
            slot,
            arrival: self.arrivals,
            known,
            unknown: 0,
            prompt_len,
            longest,
            submitted: 0,
            blocks: Vec::new(),
            chain: Vec::new(),
            sharing,
            answers,
            scored,
            cached: None,
            preemptions: 0,
        });
    }

    /// Requests whose reader is gone leave, and their blocks are free before the next step.
    fn drop_cancelled(&mut self) {
        let metrics = &self.shared.metrics;
        for answer in self.answers.iter_mut().flatten().filter(|answer| answer.events.is_closed()) {
            let counter = if answer.has_started() { &metrics.cancelled_running } else { &metrics.cancelled_waiting };
            counter.add(1);
            answer.ended = true;
        }
        self.drop_ended();
    }

    fn drop_ended(&mut self) {
        let answers = &self.answers;
        if !answers.iter().flatten().any(|answer| answer.ended) {
            return;
        }
        self.scheduler.remove_if(|sequence| answers[sequence.slot].as_ref().is_none_or(|answer| answer.ended));
        for place in &mut self.answers {
            place.take_if(|answer| answer.ended);
        }
        while self.answers.last().is_some_and(Option::is_none) {
            self.answers.pop();
        }
    }

    fn fail_all(&mut self, message: &str) {
        let metrics = &self.shared.metrics;
        self.answers.iter_mut().flatten().for_each(|answer| answer.fail(message, metrics));
        self.under_way = None;
        self.scheduler.end_all();
        self.drop_ended();
        self.show_state();
    }

    fn show_state(&self) {
        let metrics = &self.shared.metrics;
        let report = self.scheduler.report();
        metrics.running.set(self.scheduler.running().len());
        metrics.waiting.set(self.scheduler.waiting().len());
        metrics.kv_blocks_leased.set(report.leased);
        metrics.kv_blocks_cached.set(report.cached);
    }

    /// One step; an error only when there can be no further one.
    fn step(&mut self) -> Result<(), String> {
        let began = Instant::now();
        let (current, computing) = match self.under_way.take() {
            // It has been computed since it was submitted, whatever the host did.
            Some(current) => (current, began),
            None => {
                let step = self.scheduler.schedule();
                self.shared.metrics.preemptions.add(step.preempted);
                if step.spans.is_empty() {
                    self.tell();
                    self.refuse_oldest();
                    return Ok(());
                }
                self.start_new(&step, began);
                let computing = Instant::now();
                match self.submit(step, None) {
                    Ok(current) => (current, computing),
                    Err(failed) => {
                        // The tokens of the step before are good.
                        self.tell();
                        return self.fail(&failed);
                    }
                }
            }
        };
        let _span = tracing::trace_span!(
            "step",
            sequences = current.step.spans.len(),
            waiting = self.scheduler.waiting().len(),
            preempted = current.step.preempted
        )
        .entered();
        // While this step is computed, if the runner works so; else there is nothing left to tell.
        self.tell();
        let next = self.go_ahead(&current);
        let computed = self.choose(&current);
        let computed_in = computing.elapsed();
        if let Err(error) = computed {
            if let Some(Ok(next)) = &next {
                self.let_go(next);
            }
            return self.fail(&Failed { step: current.step, error });
        }
        self.scheduler.commit(&current.step);
        self.settle(&current);
        if !self.runner.is_asynchronous() {
            self.tell();
        }
        self.drop_ended();
        self.note_step(&current.step, began.elapsed(), computed_in);
        match next {
            Some(Ok(next)) => self.under_way = Some(next),
            Some(Err(failed)) => {
                // Those of this step are good.
                self.tell();
                return self.fail(&failed);
            }
            None => {}
        }
        Ok(())
    }

    /// Submits the step after this one, whose tokens nobody knows yet, where the runner can take them from there and no row needs
    /// anything of the host in between.
    fn go_ahead(&mut self, current: &UnderWay) -> Option<Result<UnderWay, Failed>> {
        if !self.carries || current.chooser == Chooser::Host {
            return None;
        }
        // A stop text may just have ended some.
        self.drop_ended();
        let answers = &self.answers;
        let draws = self.runner.draws();
        let free = |sequence: &Sequence| {
            let answer = answers[sequence.slot].as_ref().expect("a running sequence has a request");
            let index = sequence.scheduled_len() - sequence.prompt_len;
            if draws { !answer.sampler.looks_at_tokens() } else { answer.sampler.is_plain(index) }
        };
        let step = self.scheduler.go_ahead(free)?;
        self.shared.metrics.steps_ahead.add(1);
        Some(self.submit(step, Some(current)))
    }

    /// Waits for a step under way that nobody has a use for any more.
    fn drain(&mut self) -> Result<(), String> {
        match self.under_way.take().map(|step| self.let_go(&step)) {
            Some(Some(fault)) => Err(fault),
            _ => Ok(()),
        }
    }

    /// Waits for a step, whose results are thrown away; gives the fault that ends the engine, where there is one.
    fn let_go(&mut self, step: &UnderWay) -> Option<String> {
        let waited = self.runner.chosen(step.turn).map(drop);
        self.scheduler.end(&step.step);
        waited.err().filter(|error| error.fatal).map(|error| error.message)
    }

    /// Nothing runs and the oldest request does not fit the pool, which a sound setup rules out.
    fn refuse_oldest(&mut self) {
        if let Some(sequence) = self.scheduler.waiting().front()
            && let Some(answer) = &mut self.answers[sequence.slot]
        {
            let total = self.scheduler.report().total;
            let message = format!("{} tokens do not fit the key/value cache of {total} blocks", sequence.known.len());
            answer.fail(&message, &self.shared.metrics);
            self.drop_ended();
        }
    }

    /// Requests that run for the first time give up their places in the queue.
    fn start_new(&mut self, step: &Step, now: Instant) {
        let metrics = &self.shared.metrics;
        for span in &step.spans {
            let sequence = self.scheduler.get(span.arrival).expect("it was just planned");
            let answer = self.answers[sequence.slot].as_mut().expect("a running sequence has a request");
            if !answer.has_started() {
                answer.start(now, metrics);
                metrics.prompt_tokens.add(sequence.prompt_len);
                if sequence.sharing.read {
                    metrics.prefix_queries.add(sequence.prompt_len);
                    metrics.prefix_hits.add(sequence.cached.unwrap_or(0));
                }
            }
        }
    }

    /// Gives the chosen tokens to their sequences; those whose answers they end leave.
    fn settle(&mut self, UnderWay { step, outputs, .. }: &UnderWay) {
        let now = Instant::now();
        let metrics = &self.shared.metrics;
        let mut leave = Vec::new();
        for (output, result) in outputs.iter().zip(self.results.drain(..)) {
            // The sequence may have left since; its place may be another one's by now.
            let Some(sequence) = self.scheduler.get_mut(output.arrival) else { continue };
            let answer = self.answers[sequence.slot].as_mut().expect("a running sequence has a request");
            match result.into_inner().unwrap_or_else(PoisonError::into_inner) {
                Err(message) if !answer.ended => answer.fail(message, metrics),
                Ok(Outcome::Score(logprobs)) => {
                    let scored = sequence.scored.as_mut().expect("only a scored prompt has scores");
                    *scored += 1;
                    if let Some((_, all)) = &mut answer.prompt_logprobs {
                        all.push(Some(logprobs));
                    }
                }
                Ok(Outcome::Choice(choice)) if !answer.ended => {
                    sequence.learn(choice.token);
                    if answer.accept(choice.token, sequence.generated()) {
                        leave.push(sequence.slot);
                    }
                    self.untold.push(Untold { slot: sequence.slot, choice, at: now, usage: sequence.usage() });
                }
                _ => {}
            }
        }
        for span in &step.spans {
            let Some(sequence) = self.scheduler.get(span.arrival) else { continue };
            let answer = self.answers[sequence.slot].as_mut().expect("a running sequence has a request");
            if !sequence.answers && sequence.remaining() == 0 && !answer.ended {
                answer.send_prompt(sequence.prompt_len);
                answer.finish((FinishReason::Length, None), sequence.usage(), now, metrics);
            }
        }
        if !leave.is_empty() {
            self.scheduler.remove_if(|sequence| leave.contains(&sequence.slot));
        }
    }

    /// Tells the readers of the tokens accepted since the last time.
    fn tell(&mut self) {
        for Untold { slot, choice, at, usage } in self.untold.drain(..) {
            // A request that was cancelled meanwhile has left.
            if let Some(answer) = self.answers.get_mut(slot).and_then(Option::as_mut) {
                answer.tell((choice, at), usage, self.shared.text.as_ref(), &self.shared.metrics);
            }
        }
    }

    /// A step failed, and none is under way: its requests cannot go on, the others can, unless the runner cannot.
    fn fail(&mut self, Failed { step, error }: &Failed) -> Result<(), String> {
        let message = &error.message;
        tracing::error!(sequences = step.spans.len(), error = message, "a forward pass failed");
        self.scheduler.end_all();
        for span in &step.spans {
            let Some(sequence) = self.scheduler.get(span.arrival) else { continue };
            let answer = self.answers[sequence.slot].as_mut().expect("a running sequence has a request");
            // A stop text may have ended it while it was computed.
            if !answer.ended {
                answer.fail(&format!("the model could not compute this request: {message}"), &self.shared.metrics);
            }
        }
        self.drop_ended();
        if error.fatal { Err(message.clone()) } else { Ok(()) }
    }

    fn note_step(&self, step: &Step, took: Duration, computed_in: Duration) {
        /// Prompts shorter than this say little about the rate of long ones.
        const RATE_FROM_ROWS: usize = 32;
        /// Share of a new measurement in the smoothed rate.
        const NEW: f64 = 0.2;
        let metrics = &self.shared.metrics;
        let rows: usize = step.spans.iter().map(|span| span.len).sum();
        metrics.steps.add(1);
        metrics.computed_tokens.add(rows);
        metrics.iteration_tokens.observe(rows as f64);
        metrics.step_time.observe_duration(took);
        metrics.step_overhead.observe_duration(took.saturating_sub(computed_in));
        if rows >= step.spans.len() + RATE_FROM_ROWS {
            let (rate, old) = (rows as f64 / took.as_secs_f64().max(1e-9), metrics.prefill_rate.get());
            metrics.prefill_rate.set(if old > 0.0 { old + NEW * (rate - old) } else { rate });
        }
    }
}
