//! The worker pool: runs the chunks of one job on all threads, with bounded spinning.
//!
//! ```text
//!   caller (worker 0)                 shared                           workers 1..n
//!   write job, chunks, done = 0
//!   publish ─────> of each span: ticket = epoch | chunks left <─ spin, yield, park until the epoch changes
//!   claim chunks by CAS on a ticket                             claim chunks by CAS on a ticket
//!   run them, done += 1 each                                    run them, done += 1 each
//!   wait until done == chunks: spin, yield, park                whoever makes done == chunks wakes the caller
//! ```
//!
//! A job is over when its *chunks* are done, not when every worker has looked at it: a worker that the system has put to
//! sleep delays nobody unless it holds a chunk.
//!
//! **Spans.** The chunks of a job are divided into a few spans of consecutive ones, each with a ticket of its own, and every
//! worker starts with the same span in every job; only when that is claimed it takes chunks of others. So a worker reads
//! one stretch of a matrix, which the memory gives faster than stretches that change hands, and knows what it will read
//! next: that it fetches while it waits ([`Lookahead`]). [`Pool::run`] puts all chunks into the first span.
//!
//! **Who touches what.** `job`, `chunks`, `done`, `panic` and the ends of spans are written by the caller between jobs only.
//! Workers read `job`, `chunks` and `end`, and then must win a compare-and-swap on the span's ticket before they use them.
//!
//! **Why that is sound.** A ticket holds the epoch and how many of the span's chunks are unclaimed, so a swap from a count
//! above zero succeeds only while a chunk of that very epoch is unclaimed. (A count of claimed chunks would not do: whether it
//! is the last one would depend on `end`, which the caller writes before the ticket.) The caller starts the next job only
//! after it has seen `done == chunks`, and the claimed chunk is counted there only after it ran. So between a won swap and
//! the matching `done += 1`, the job stays in place, with the borrows that its closure holds, and the fields read before
//! the swap are its own. Fields read before a *lost* swap may belong to any epoch; they are atomics and are thrown away.
//! (An epoch has 40 bits: it does not come round while a thread sleeps.)
//!
//! **Sleeping.** A worker sets its `asleep` flag, looks at the ticket once more, and parks; the caller publishes the
//! ticket and then looks at the flags. Both sides are sequentially consistent, so one of them sees the other. The caller
//! waits for the end of a job by the same protocol with `caller_asleep` and `done`. Spurious wake-ups are harmless: every
//! wait is a loop on its condition.
//!
//! **Shutdown.** `drop` sets `stop`, publishes an epoch without chunks, wakes everyone, and joins. It cannot run during a
//! job, because [`Pool::run`] borrows the pool mutably.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use super::lookahead::Lookahead;

/// A job: called with the index of a chunk and the index of the worker that runs it.
type Job<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// Low bits of the ticket: the chunks left to claim. The rest is the epoch.
const LEFT_BITS: u32 = 24;
const LEFT_MASK: u64 = (1 << LEFT_BITS) - 1;

/// Most spans that the chunks of a job are divided into.
const SPANS: usize = 8;

/// How long a waiting thread spins: about the time between two jobs of one decoder layer.
const SPIN: Duration = Duration::from_micros(20);
/// How often it then gives its CPU to whoever wants it, before it parks.
const YIELDS: u32 = 100;

/// Keeps a field that several threads write on cache lines of its own.
#[repr(align(128))]
struct Line<T>(T);

/// Consecutive chunks that some of the workers claim first.
#[derive(Default)]
struct Span {
    /// Epoch and how many of its chunks are unclaimed: the last ones before `end`.
    ticket: AtomicU64,
    end: AtomicU32,
}

struct Shared {
    spans: Box<[Line<Span>]>,
    /// What the workers of each span will read soon.
    lookaheads: Box<[Line<Lookahead>]>,
    threads: usize,
    done: Line<AtomicU32>,
    job: AtomicPtr<()>,
    chunks: AtomicU32,
    stop: AtomicBool,
    caller_asleep: AtomicBool,
    /// Whom to unpark at the end of the job; set by the caller before it says that it sleeps.
    caller: Mutex<Option<Thread>>,
    asleep: Box<[Line<AtomicBool>]>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Threads that run jobs together with the thread that owns the pool.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    epoch: u64,
}

impl Pool {
    /// Starts `threads - 1` threads.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub(crate) fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            spans: (0..threads.clamp(1, SPANS)).map(|_| Line(Span::default())).collect(),
            lookaheads: (0..threads.clamp(1, SPANS)).map(|_| Line(Lookahead::default())).collect(),
            threads,
            done: Line(AtomicU32::new(0)),
            job: AtomicPtr::new(std::ptr::null_mut()),
            chunks: AtomicU32::new(0),
            stop: AtomicBool::new(false),
            caller_asleep: AtomicBool::new(false),
            caller: Mutex::new(None),
            asleep: (1..threads).map(|_| Line(AtomicBool::new(false))).collect(),
            panic: Mutex::new(None),
        });
        let mut pool = Self { shared, workers: Vec::new(), epoch: 0 };
        for worker in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let builder = std::thread::Builder::new().name(format!("kernel-{worker}"));
            pool.workers.push(builder.spawn(move || shared.work(worker))?);
        }
        Ok(pool)
    }

    /// Threads, the caller included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// What the workers of each span will read soon, given the first chunk of [`Pool::run_apart`] that they will run of
    /// `chunks`: they fetch it while they have nothing to do.
    pub(crate) fn expect<'a>(&self, chunks: usize, mut bytes: impl FnMut(usize) -> [&'a [u8]; 2]) {
        for (span, lookahead) in self.shared.lookaheads.iter().enumerate() {
            lookahead.0.set(bytes(self.span_start(chunks, span)));
        }
    }

    /// The first of `chunks` chunks that lies in a span.
    fn span_start(&self, chunks: usize, span: usize) -> usize {
        chunks * span / self.shared.spans.len()
    }

    /// Runs `job(chunk, worker)` for every chunk in `0..chunks`; `worker < threads()` is the same for no two chunks that
    /// run at one time. Chunks start in ascending order.
    ///
    /// # Panics
    /// With the payload of a chunk that panicked, after the others are done.
    pub(crate) fn run(&mut self, chunks: usize, job: Job<'_>) {
        self.publish(chunks, &|_, _| chunks, job);
    }

    /// As [`Pool::run`], but each worker starts with consecutive chunks of its own, the same ones in every job of as many
    /// chunks, and takes those of others when its own are claimed.
    pub(crate) fn run_apart(&mut self, chunks: usize, job: Job<'_>) {
        self.publish(chunks, &|pool, span| pool.span_start(chunks, span + 1), job);
    }

    /// Runs a job whose span `i` ends before chunk `end(self, i)`.
    fn publish(&mut self, chunks: usize, end: &dyn Fn(&Pool, usize) -> usize, job: Job<'_>) {
        if self.workers.is_empty() || chunks <= 1 {
            (0..chunks).for_each(|chunk| job(chunk, 0));
            return;
        }
        assert!(chunks as u64 <= LEFT_MASK, "{chunks} chunks in one job");
        self.epoch += 1;
        let shared = &*self.shared;
        shared.job.store((&raw const job).cast_mut().cast(), Relaxed);
        shared.chunks.store(chunks as u32, Relaxed);
        shared.done.0.store(0, Relaxed);
        let mut start = 0;
        for (i, span) in shared.spans.iter().enumerate() {
            let end = end(self, i);
            span.0.end.store(end as u32, Relaxed);
            span.0.ticket.store(self.epoch << LEFT_BITS | (end - start) as u64, SeqCst);
            start = end;
        }
        self.wake(chunks - 1);
        shared.claim(self.epoch, 0);
        shared.wait_done(chunks as u32);
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// Wakes at most `count` sleeping workers.
    fn wake(&self, count: usize) {
        fence(SeqCst);
        let mut left = count;
        for (flag, worker) in self.shared.asleep.iter().zip(&self.workers) {
            if left == 0 {
                break;
            }
            if flag.0.load(SeqCst) && flag.0.swap(false, SeqCst) {
                worker.thread().unpark();
            }
            left -= 1;
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for span in &self.shared.spans {
            span.0.ticket.store((self.epoch + 1) << LEFT_BITS, SeqCst);
        }
        self.wake(usize::MAX);
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its chunks, so it does not end by one.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// The life of a worker.
    fn work(&self, worker: usize) {
        let mut seen = 0;
        let own = self.span(worker);
        let (ticket, lookahead) = (&self.spans[own].0.ticket, &self.lookaheads[own].0);
        loop {
            wait(
                lookahead,
                || ticket.load(SeqCst) >> LEFT_BITS != seen,
                || self.asleep[worker - 1].0.store(true, SeqCst),
                || self.asleep[worker - 1].0.store(false, SeqCst),
            );
            seen = ticket.load(SeqCst) >> LEFT_BITS;
            // After the ticket: it may be a later one than `wait` saw, and the last one comes with `stop`.
            if self.stop.load(SeqCst) {
                return;
            }
            self.claim(seen, worker);
        }
    }

    /// The span that a worker starts with.
    fn span(&self, worker: usize) -> usize {
        worker * self.spans.len() / self.threads
    }

    /// Claims and runs chunks of `epoch` until none is left.
    fn claim(&self, epoch: u64, worker: usize) {
        let own = self.span(worker);
        let (before, from) = self.spans.split_at(own);
        for span in from.iter().chain(before) {
            self.claim_of(&span.0, epoch, worker);
        }
    }

    /// Claims and runs chunks of a span until none is left.
    fn claim_of(&self, span: &Span, epoch: u64, worker: usize) {
        let mut ticket = span.ticket.load(Acquire);
        loop {
            let job = self.job.load(Relaxed).cast_const().cast::<Job<'_>>();
            let (chunks, end) = (self.chunks.load(Relaxed), span.end.load(Relaxed));
            let left = ticket & LEFT_MASK;
            if ticket >> LEFT_BITS != epoch || left == 0 {
                return;
            }
            if let Err(now) = span.ticket.compare_exchange_weak(ticket, ticket - 1, SeqCst, Acquire) {
                ticket = now;
                continue;
            }
            let chunk = end as usize - left as usize;
            // SAFETY: the swap was won, so `job` is that of `epoch`, and the caller keeps it alive until `done` counts
            // the chunk claimed here (see the module documentation).
            let job = unsafe { *job };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| job(chunk, worker))) {
                self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
            }
            if self.done.0.fetch_add(1, SeqCst) + 1 == chunks && self.caller_asleep.swap(false, SeqCst) {
                let caller = self.caller.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(caller) = caller {
                    caller.unpark();
                }
            }
            ticket = span.ticket.load(Acquire);
        }
    }

    /// Returns when all chunks have run; everything that they wrote is visible then.
    fn wait_done(&self, chunks: u32) {
        wait(
            &self.lookaheads[0].0,
            || self.done.0.load(SeqCst) == chunks,
            || {
                *self.caller.lock().unwrap_or_else(PoisonError::into_inner) = Some(std::thread::current());
                self.caller_asleep.store(true, SeqCst);
            },
            || self.caller_asleep.store(false, SeqCst),
        );
    }
}

/// Waits for a condition: spins and fetches what will be read soon, then yields, then parks until another thread unparks
/// this one. `announce` tells that thread that it must, `withdraw` that it need not any more.
fn wait(lookahead: &Lookahead, ready: impl Fn() -> bool, announce: impl Fn(), withdraw: impl Fn()) {
    let start = Instant::now();
    while start.elapsed() < SPIN {
        for _ in 0..16 {
            if ready() {
                return;
            }
            if !lookahead.fetch() {
                std::hint::spin_loop();
            }
        }
    }
    for _ in 0..YIELDS {
        if ready() {
            return;
        }
        std::thread::yield_now();
    }
    loop {
        announce();
        fence(SeqCst);
        if ready() {
            withdraw();
            return;
        }
        std::thread::park();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    fn run_all(pool: &mut Pool, chunks: usize) {
        let hits: Vec<AtomicUsize> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
        let threads = pool.threads();
        pool.run(chunks, &|chunk, worker| {
            assert!(worker < threads);
            hits[chunk].fetch_add(1, Relaxed);
        });
        assert!(hits.iter().all(|h| h.load(Relaxed) == 1), "{chunks} chunks");
    }

    #[test]
    fn every_chunk_runs_once_in_every_job() {
        for threads in [1, 2, 3, 8] {
            let mut pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            for job in 0..3000 {
                run_all(&mut pool, job % 23);
            }
        }
    }

    #[test]
    fn apart_every_chunk_runs_once_and_a_busy_worker_leaves_its_own_to_others() {
        for threads in [1, 2, 3, 11] {
            let mut pool = Pool::new(threads).unwrap();
            for chunks in (0..40).chain([1000]) {
                let hits: Vec<AtomicUsize> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
                pool.run_apart(chunks, &|chunk, worker| {
                    hits[chunk].fetch_add(1, Relaxed);
                    if chunk == 0 && worker == 0 {
                        std::thread::sleep(Duration::from_micros(200));
                    }
                });
                assert!(hits.iter().all(|h| h.load(Relaxed) == 1), "{chunks} chunks, {threads} threads");
            }
        }
    }

    #[test]
    fn apart_each_worker_starts_where_it_started_before() {
        let mut pool = Pool::new(2).unwrap();
        let together = std::sync::Barrier::new(2);
        for _ in 0..50 {
            let first = [AtomicUsize::new(usize::MAX), AtomicUsize::new(usize::MAX)];
            pool.run_apart(8, &|chunk, worker| {
                if first[worker].compare_exchange(usize::MAX, chunk, Relaxed, Relaxed).is_ok() {
                    together.wait();
                }
            });
            assert_eq!(first.map(AtomicUsize::into_inner), [0, 4]);
        }
        let mut starts = Vec::new();
        pool.expect(9, |first| {
            starts.push(first);
            [&[], &[]]
        });
        assert_eq!(starts, [0, 4]);
    }

    #[test]
    fn what_chunks_wrote_is_seen_by_the_caller() {
        let mut pool = Pool::new(4).unwrap();
        let mut data = vec![0u64; 64];
        for round in 1..2000u64 {
            let parts = crate::memory::SharedMut::new(&mut data);
            pool.run(16, &|chunk, _| {
                // SAFETY: each chunk takes its own four values.
                let part = unsafe { parts.part(chunk * 4, 4) };
                part.iter_mut().for_each(|x| *x += 1);
            });
            assert!(data.iter().all(|&x| x == round));
        }
    }

    #[test]
    fn sleeping_workers_are_woken() {
        let mut pool = Pool::new(3).unwrap();
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(3));
            run_all(&mut pool, 9);
        }
    }

    #[test]
    fn a_long_chunk_lets_the_caller_sleep_and_wakes_it() {
        let mut pool = Pool::new(2).unwrap();
        for _ in 0..5 {
            let caller = std::thread::current().id();
            pool.run(2, &|_, _| {
                // The caller's own chunk is short, so it waits for the other one.
                let long = std::thread::current().id() != caller;
                std::thread::sleep(Duration::from_millis(if long { 20 } else { 1 }));
            });
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let mut pool = Pool::new(4).unwrap();
        for _ in 0..10 {
            let ran = AtomicUsize::new(0);
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(8, &|chunk, _| {
                    ran.fetch_add(1, Relaxed);
                    assert!(chunk != 5, "chunk five");
                });
            }));
            let payload = result.unwrap_err();
            assert_eq!(payload.downcast_ref::<&str>(), Some(&"chunk five"));
            assert_eq!(ran.load(Relaxed), 8);
            run_all(&mut pool, 8);
        }
    }

    #[test]
    fn pools_end_while_workers_spin_or_sleep() {
        for pause in [0, 1, 5] {
            for _ in 0..20 {
                let mut pool = Pool::new(4).unwrap();
                run_all(&mut pool, 4);
                std::thread::sleep(Duration::from_millis(pause));
            }
        }
    }

    #[test]
    fn a_pool_may_move_to_another_thread() {
        let mut pool = Pool::new(2).unwrap();
        run_all(&mut pool, 4);
        std::thread::spawn(move || run_all(&mut pool, 4)).join().unwrap();
    }
}
