//! A runner without a model: it keeps tokens where a model keeps keys and values, and reads its context back through
//! the block tables. Its logits are a hash of that context, so any mistake in the tables changes the answer.
//!
//! ```text
//!   memory   [block][position in block] -> token     written by every row, read by every output row
//!   logits   hash(all tokens of the context, v) for every token v
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use cupola_engine::{ModelRunner, RunError, TokenText};
use cupola_kernels::Turn;
use cupola_kernels::kv::BLOCK_SIZE;
use cupola_models::Batch;

/// Size of the vocabulary. Tokens 0 to 25 are the letters a to z; others see below.
pub(crate) const VOCAB: usize = 64;
/// Ends an answer.
pub(crate) const EOS: u32 = 26;
/// A space.
pub(crate) const SPACE: u32 = 27;
/// The two halves of `é`.
pub(crate) const E_ACUTE: [u32; 2] = [28, 29];
/// A context with this token gives logits that are not numbers.
pub(crate) const NOT_A_NUMBER: u32 = 60;
/// A batch with this token fails.
pub(crate) const ERROR: u32 = 61;
/// A batch with this token finds that the device is lost.
pub(crate) const FATAL: u32 = 59;
/// A batch with this token panics.
pub(crate) const PANIC: u32 = 62;
/// Tokens from here on never come out, so that faults happen only when asked for.
const UNLIKELY_FROM: usize = 59;

/// What the tokens stand for.
pub(crate) struct Letters {
    bytes: Vec<Vec<u8>>,
}

impl Letters {
    pub(crate) fn new() -> Self {
        let bytes = (0..VOCAB).map(|id| match id {
            0..26 => vec![b'a' + u8::try_from(id).expect("a letter")],
            26 => b"</s>".to_vec(),
            27 => b" ".to_vec(),
            28 => "é".as_bytes()[..1].to_vec(),
            29 => "é".as_bytes()[1..].to_vec(),
            _ => format!("<{id}>").into_bytes(),
        });
        Self { bytes: bytes.collect() }
    }
}

impl TokenText for Letters {
    fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], Vec::as_slice)
    }

    fn is_special(&self, id: u32) -> bool {
        id == EOS
    }
}

/// Tokens of a text of lower-case letters and spaces.
pub(crate) fn encode(text: &str) -> Vec<u32> {
    text.bytes().map(|b| if b == b' ' { SPACE } else { u32::from(b - b'a') }).collect()
}

/// What the runner did, seen from outside.
#[derive(Default)]
pub(crate) struct Work {
    pub(crate) rows: AtomicUsize,
    pub(crate) batches: AtomicUsize,
    pub(crate) widest: AtomicUsize,
    /// Batches that were submitted to an asynchronous runner, and that nobody has waited for yet.
    pub(crate) computing: AtomicUsize,
    /// The most of these at a time.
    pub(crate) deepest: AtomicUsize,
    /// The batch of this number, from 1 on, fails while it is computed; 0 for none.
    pub(crate) error_at: AtomicUsize,
    /// From the batch of this number on, the device is lost; 0 for never.
    pub(crate) lost_at: AtomicUsize,
}

pub(crate) struct FakeRunner {
    memory: Vec<u32>,
    logits: Vec<f32>,
    /// What batches of each turn have chosen.
    argmax: [Vec<u32>; 2],
    turn: Turn,
    step_time: Duration,
    work: Arc<Work>,
}

const EMPTY: u32 = u32::MAX;

impl FakeRunner {
    pub(crate) fn new(num_blocks: usize, step_time: Duration, work: Arc<Work>) -> Self {
        let memory = vec![EMPTY; num_blocks * BLOCK_SIZE];
        let (logits, argmax, turn) = (Vec::new(), [Vec::new(), Vec::new()], Turn::default());
        Self { memory, logits, argmax, turn, step_time, work }
    }
}

/// Logits after a context.
pub(crate) fn logits_after(context: &[u32]) -> Vec<f32> {
    if context.contains(&NOT_A_NUMBER) {
        return vec![f32::NAN; VOCAB];
    }
    let seed = context.iter().fold(0x243f_6a88_85a3_08d3, |hash, token| mix(hash ^ u64::from(*token)));
    let logit = |token: usize| match token {
        UNLIKELY_FROM.. => -20.0,
        _ => (mix(seed.wrapping_add(token as u64)) >> 40) as f32 / (1u64 << 24) as f32 * 6.0,
    };
    (0..VOCAB).map(logit).collect()
}

pub(crate) fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    u32::try_from(logits.iter().position(|l| *l == best).unwrap_or(0)).expect("small")
}

pub(crate) fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 31)).wrapping_mul(0x7fb5_d329_728e_a185);
    let x = (x ^ (x >> 27)).wrapping_mul(0x81da_def4_bc2d_d44d);
    x ^ (x >> 33)
}

/// The same runner on a thread: `forward` returns before anything is computed, and only results are waited for. Batches are
/// computed in the order in which they were submitted, each with the tokens that the one before has chosen.
pub(crate) struct AsyncRunner {
    batches: Sender<Batch>,
    done: Receiver<Done>,
    thread: Option<JoinHandle<()>>,
    /// Number of batches submitted and waited for, and the number of the last one of each turn.
    submitted: usize,
    waited: usize,
    last: [usize; 2],
    turn: Turn,
    logits: Vec<f32>,
    argmax: [Vec<u32>; 2],
    work: Arc<Work>,
}

/// What became of a batch: its turn, logits and tokens.
type Done = Result<(Turn, Vec<f32>, Vec<u32>), RunError>;

impl AsyncRunner {
    pub(crate) fn new(mut runner: FakeRunner) -> Self {
        let work = Arc::clone(&runner.work);
        let (batches, inbox) = channel::<Batch>();
        let (results, done) = channel();
        let compute = move || {
            for batch in inbox {
                let computed = runner.forward(&batch);
                let tokens = runner.argmax[batch.turn.index()].clone();
                // Nobody listens when the engine ends.
                drop(results.send(computed.map(|()| (batch.turn, runner.logits.clone(), tokens))));
            }
        };
        Self {
            batches,
            done,
            thread: Some(std::thread::spawn(compute)),
            submitted: 0,
            waited: 0,
            last: [0; 2],
            turn: Turn::default(),
            logits: Vec::new(),
            argmax: [Vec::new(), Vec::new()],
            work,
        }
    }

    /// Waits for the last batch of a turn.
    fn wait(&mut self, turn: Turn) -> Result<(), RunError> {
        while self.waited < self.last[turn.index()] {
            let Ok(done) = self.done.recv() else {
                let ended = self.thread.take().expect("it ends once").join();
                std::panic::resume_unwind(ended.expect_err("it ends with its runner, or in a panic"));
            };
            self.waited += 1;
            self.work.computing.fetch_sub(1, Relaxed);
            let (turn, logits, tokens) = done?;
            self.logits = logits;
            self.argmax[turn.index()] = tokens;
        }
        Ok(())
    }
}

impl ModelRunner for AsyncRunner {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn carries(&self) -> bool {
        true
    }

    fn forward(&mut self, batch: &Batch) -> Result<(), RunError> {
        // What the host can tell is told at once; a lost device, by whoever waits.
        if batch.tokens.contains(&ERROR) {
            return Err("an error was asked for".to_owned().into());
        }
        self.submitted += 1;
        self.turn = batch.turn;
        self.last[batch.turn.index()] = self.submitted;
        let under_way = self.work.computing.fetch_add(1, Relaxed) + 1;
        self.work.deepest.fetch_max(under_way, Relaxed);
        // A thread that has panicked is found by whoever waits.
        drop(self.batches.send(batch.clone()));
        Ok(())
    }

    fn chosen(&mut self, turn: Turn) -> Result<&[u32], RunError> {
        self.wait(turn)?;
        Ok(&self.argmax[turn.index()])
    }

    fn for_each_logits(&mut self, f: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<(), RunError> {
        self.wait(self.turn)?;
        for_each_row(&mut self.logits, f);
        Ok(())
    }
}

impl ModelRunner for FakeRunner {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn forward(&mut self, batch: &Batch) -> Result<(), RunError> {
        self.work.rows.fetch_add(batch.tokens.len(), Relaxed);
        let number = self.work.batches.fetch_add(1, Relaxed) + 1;
        self.work.widest.fetch_max(batch.spans.len(), Relaxed);
        std::thread::sleep(self.step_time);
        assert!(!batch.tokens.contains(&PANIC), "a panic was asked for");
        if batch.tokens.contains(&ERROR) || number == self.work.error_at.load(Relaxed) {
            return Err("an error was asked for".to_owned().into());
        }
        let lost_at = self.work.lost_at.load(Relaxed);
        if batch.tokens.contains(&FATAL) || (1..=number).contains(&lost_at) {
            return Err(RunError { message: "the device is lost".into(), fatal: true });
        }
        let mut tokens = batch.tokens.clone();
        for (token, &result) in tokens.iter_mut().zip(&batch.carried) {
            // A batch that failed has chosen nothing.
            *token = self.argmax[batch.turn.other().index()].get(result as usize).copied().unwrap_or(0);
        }
        let place = |table: &[cupola_kernels::BlockId], position: usize| {
            table[position / BLOCK_SIZE].0 as usize * BLOCK_SIZE + position % BLOCK_SIZE
        };
        let tables: Vec<_> = batch
            .spans
            .iter()
            .map(|span| &batch.block_table[span.table0 as usize..(span.table0 + span.table_len) as usize])
            .collect();
        for (span, table) in batch.spans.iter().zip(&tables) {
            for i in 0..span.rows as usize {
                self.memory[place(table, span.pos0 as usize + i)] = tokens[span.row0 as usize + i];
            }
        }
        self.logits.clear();
        self.turn = batch.turn;
        let chosen = &mut self.argmax[batch.turn.index()];
        chosen.clear();
        let mut outputs = batch.outputs.iter().copied().peekable();
        for (span, table) in batch.spans.iter().zip(&tables) {
            while let Some(row) = outputs.next_if(|row| *row < span.row0 + span.rows) {
                let position = (span.pos0 + row - span.row0) as usize;
                let context: Vec<u32> = (0..=position).map(|p| self.memory[place(table, p)]).collect();
                if context.contains(&EMPTY) {
                    return Err(format!("position {position} reads a place that was never written").into());
                }
                let logits = logits_after(&context);
                chosen.push(argmax(&logits));
                if !batch.greedy {
                    self.logits.extend(logits);
                }
            }
        }
        Ok(())
    }

    fn chosen(&mut self, _turn: Turn) -> Result<&[u32], RunError> {
        Ok(&self.argmax[self.turn.index()])
    }

    fn for_each_logits(&mut self, f: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<(), RunError> {
        for_each_row(&mut self.logits, f);
        Ok(())
    }
}

/// On two threads.
fn for_each_row(logits: &mut [f32], f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
    std::thread::scope(|scope| {
        let mut rows: Vec<_> = logits.chunks_mut(VOCAB).enumerate().collect();
        let second = rows.split_off(rows.len() / 2);
        scope.spawn(move || second.into_iter().for_each(|(i, row)| f(i, row)));
        rows.into_iter().for_each(|(i, row)| f(i, row));
    });
}
