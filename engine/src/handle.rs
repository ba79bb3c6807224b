//! The outside of a running engine: submit requests, watch it, stop it.
//!
//! ```text
//!   EngineHandle (clones) ──commands, bounded──> engine thread ──mailbox, one a request──> RequestStream
//!                         <──── Shared: counters, metrics, pulse ────
//! ```
//!
//! Shutdown order: `drain` refuses new requests and lets the others finish; `shutdown` ends those too and joins the
//! thread. When the last handle is dropped the thread finishes what runs and ends on its own.

use std::pin::pin;
use std::sync::atomic::{
    AtomicBool, AtomicU64, AtomicUsize,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};

use crate::admission::{Permit, WaitingRoom};
use crate::blocks::KvReport;
use crate::detokenizer::TokenText;
use crate::mailbox::{RequestStream, Sender, mailbox};
use crate::metrics::EngineMetrics;
use crate::plan::MemoryPlan;
use crate::request::Request;
use crate::validate::validate;
use crate::{EngineConfig, SubmitError};

/// What a handle asks of the engine thread.
pub(crate) enum Command {
    Submit(Box<Submission>),
    ResetPrefixCache,
    Check(oneshot::Sender<Result<KvReport, String>>),
    Shutdown,
}

/// A request on its way to the engine thread.
pub(crate) struct Submission {
    pub(crate) request: Request,
    pub(crate) permit: Permit,
    pub(crate) events: Sender,
    pub(crate) submitted: Instant,
    pub(crate) in_flight: InFlight,
}

/// Counts one request as in flight until dropped.
pub(crate) struct InFlight(Arc<Shared>);

impl InFlight {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.in_flight.fetch_add(1, AcqRel);
        Self(Arc::clone(shared))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.0.in_flight.fetch_sub(1, AcqRel) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

/// State that both sides see.
pub(crate) struct Shared {
    pub(crate) metrics: EngineMetrics,
    pub(crate) room: Arc<WaitingRoom>,
    pub(crate) plan: MemoryPlan,
    pub(crate) text: Arc<dyn TokenText>,
    pub(crate) vocab: usize,
    pub(crate) max_model_len: usize,
    pub(crate) event_capacity: usize,
    /// Cleared by `drain`: no new requests.
    accepting: AtomicBool,
    /// Cleared when the thread ends, for whatever reason.
    alive: AtomicBool,
    in_flight: AtomicUsize,
    idle: Notify,
    born: Instant,
    /// Nanoseconds after `born` when the step in progress began; 0 while the engine waits for work.
    step_began: AtomicU64,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Shared {
    pub(crate) fn new(setup: SharedSetup, config: &EngineConfig) -> Self {
        Self {
            metrics: EngineMetrics::new(),
            room: Arc::new(WaitingRoom::new(config.max_queued_requests, config.max_queued_tokens)),
            plan: setup.plan,
            text: setup.text,
            vocab: setup.vocab,
            max_model_len: setup.max_model_len,
            event_capacity: config.event_capacity,
            accepting: AtomicBool::new(true),
            alive: AtomicBool::new(true),
            in_flight: AtomicUsize::new(0),
            idle: Notify::new(),
            born: Instant::now(),
            step_began: AtomicU64::new(0),
            thread: Mutex::new(None),
        }
    }

    /// Called by the engine thread when a step begins.
    pub(crate) fn beat(&self) {
        let nanos = u64::try_from(self.born.elapsed().as_nanos()).expect("an engine lives less than 584 years");
        self.step_began.store(nanos.max(1), Relaxed);
    }

    /// Called by the engine thread before it waits for work.
    pub(crate) fn rest(&self) {
        self.step_began.store(0, Relaxed);
    }

    /// Called when the engine thread ends.
    pub(crate) fn die(&self) {
        self.alive.store(false, Release);
        self.rest();
        self.idle.notify_waiters();
    }
}

/// What [`Shared::new`] takes from the engine's setup.
pub(crate) struct SharedSetup {
    pub(crate) plan: MemoryPlan,
    pub(crate) text: Arc<dyn TokenText>,
    pub(crate) vocab: usize,
    pub(crate) max_model_len: usize,
}

/// A running engine. Clones name the same one.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
    commands: SyncSender<Command>,
}

impl EngineHandle {
    pub(crate) fn new(shared: Arc<Shared>, commands: SyncSender<Command>, thread: JoinHandle<()>) -> Self {
        *shared.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Self { shared, commands }
    }

    /// Takes a place in the queue, before anything is done for a request. `prompt_bytes` is the length of the text to
    /// be tokenised (or about four times a number of tokens).
    ///
    /// # Errors
    /// [`SubmitError::QueueFull`], [`SubmitError::ShuttingDown`], [`SubmitError::Dead`].
    pub fn reserve(&self, prompt_bytes: usize) -> Result<Permit, SubmitError> {
        self.check_open()?;
        let permit = self.shared.room.enter(prompt_bytes, self.shared.metrics.prefill_rate.get());
        if permit.is_err() {
            self.shared.metrics.rejected_queue_full.add(1);
        }
        permit
    }

    /// Hands a request to the engine.
    ///
    /// # Errors
    /// Every [`SubmitError`] but a full queue; the permit is given up then.
    pub fn submit(&self, request: Request, mut permit: Permit) -> Result<RequestStream, SubmitError> {
        self.check_open()?;
        if let Err(error) = validate(&request, self.shared.vocab, self.shared.max_model_len) {
            if matches!(error, SubmitError::PromptTooLong { .. }) {
                self.shared.metrics.rejected_too_long.add(1);
            }
            return Err(error);
        }
        permit.settle(request.prompt.len());
        let (events, stream) = mailbox(self.shared.event_capacity);
        let in_flight = InFlight::new(&self.shared);
        let submission = Submission { request, permit, events, submitted: Instant::now(), in_flight };
        match self.commands.try_send(Command::Submit(Box::new(submission))) {
            Ok(()) => Ok(stream),
            Err(TrySendError::Disconnected(_)) => Err(SubmitError::Dead),
            Err(TrySendError::Full(_)) => {
                let (queued, _) = self.shared.room.backlog();
                let retry_after = Duration::from_secs(1);
                Err(SubmitError::QueueFull { queued, limit: queued, unit: "requests", retry_after })
            }
        }
    }

    /// [`reserve`](Self::reserve) and [`submit`](Self::submit) in one.
    ///
    /// # Errors
    /// Every [`SubmitError`].
    pub fn submit_now(&self, request: Request) -> Result<RequestStream, SubmitError> {
        let permit = self.reserve(request.prompt.len().saturating_mul(4))?;
        self.submit(request, permit)
    }

    fn check_open(&self) -> Result<(), SubmitError> {
        if !self.is_alive() {
            Err(SubmitError::Dead)
        } else if !self.shared.accepting.load(Acquire) {
            Err(SubmitError::ShuttingDown)
        } else {
            Ok(())
        }
    }

    /// Counters, gauges and histograms.
    pub fn metrics(&self) -> &EngineMetrics {
        &self.shared.metrics
    }

    /// Longest prompt plus answer, in tokens.
    pub fn max_model_len(&self) -> usize {
        self.shared.max_model_len
    }

    /// Size of the vocabulary: token ids are below it.
    pub fn vocab_size(&self) -> usize {
        self.shared.vocab
    }

    /// What the tokens stand for.
    pub fn text(&self) -> &Arc<dyn TokenText> {
        &self.shared.text
    }

    /// Memory as planned at start.
    pub fn plan(&self) -> &MemoryPlan {
        &self.shared.plan
    }

    /// Requests and prompt tokens that wait in the queue, permits included.
    pub fn backlog(&self) -> (usize, usize) {
        self.shared.room.backlog()
    }

    /// Requests submitted and not yet ended.
    pub fn in_flight(&self) -> usize {
        self.shared.in_flight.load(Acquire)
    }

    /// How long the step in progress has been running; zero while the engine waits for work. A large value means that
    /// the engine hangs.
    pub fn heartbeat_age(&self) -> Duration {
        match self.shared.step_began.load(Relaxed) {
            0 => Duration::ZERO,
            began => self.shared.born.elapsed().saturating_sub(Duration::from_nanos(began)),
        }
    }

    /// False once the engine thread has ended.
    pub fn is_alive(&self) -> bool {
        self.shared.alive.load(Acquire)
    }

    /// False once [`drain`](Self::drain) or [`shutdown`](Self::shutdown) was called.
    pub fn is_accepting(&self) -> bool {
        self.shared.accepting.load(Acquire)
    }

    /// Forgets every cached prefix that no running request uses, before the next step.
    ///
    /// # Errors
    /// [`SubmitError::Dead`].
    pub fn reset_prefix_cache(&self) -> Result<(), SubmitError> {
        self.commands.send(Command::ResetPrefixCache).map_err(|_| SubmitError::Dead)
    }

    /// Checks that every block is free, cached or leased, and that all tables agree.
    ///
    /// # Errors
    /// A sentence about the first inconsistency, or that the engine has stopped.
    pub async fn check_integrity(&self) -> Result<KvReport, String> {
        self.ask_check()?.await.unwrap_or_else(|_| Err(SubmitError::Dead.to_string()))
    }

    /// [`check_integrity`](Self::check_integrity) for a thread outside any async runtime.
    ///
    /// # Errors
    /// The same.
    pub fn blocking_check_integrity(&self) -> Result<KvReport, String> {
        self.ask_check()?.blocking_recv().unwrap_or_else(|_| Err(SubmitError::Dead.to_string()))
    }

    fn ask_check(&self) -> Result<oneshot::Receiver<Result<KvReport, String>>, String> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Check(reply)).map_err(|_| SubmitError::Dead.to_string())?;
        Ok(answer)
    }

    /// Refuses new requests from now on; those in flight go on.
    pub fn drain(&self) {
        self.shared.accepting.store(false, Release);
    }

    /// Waits until nothing is in flight, or the engine has ended.
    pub async fn drained(&self) {
        loop {
            let mut idle = pin!(self.shared.idle.notified());
            // Registered before the check, so that an end in between is not missed.
            idle.as_mut().enable();
            if self.in_flight() == 0 || !self.is_alive() {
                return;
            }
            idle.await;
        }
    }

    /// Ends the engine: requests in flight fail with a message, and the thread is joined. Blocks for at most one step.
    pub fn shutdown(&self) {
        self.drain();
        // An engine that has ended already needs no command.
        if self.commands.send(Command::Shutdown).is_err() {
            tracing::debug!("the engine thread had ended before shutdown");
        }
        let thread = self.shared.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::warn!("the engine thread ended with a panic");
        }
    }
}
