//! A runner without a model: it keeps tokens where a model keeps keys and values, and reads its context back through
//! the block tables. Its logits are a hash of that context, so any mistake in the tables changes the answer.
//!
//! ```text
//!   memory   [block][position in block] -> token     written by every row, read by every output row
//!   logits   hash(all tokens of the context, v) for every token v
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use cupola_engine::{ModelRunner, RunError, TokenText};
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
    /// A batch was submitted to an asynchronous runner, and nobody has waited for it yet.
    pub(crate) computing: AtomicBool,
}

pub(crate) struct FakeRunner {
    memory: Vec<u32>,
    logits: Vec<f32>,
    argmax: Vec<u32>,
    step_time: Duration,
    work: Arc<Work>,
}

const EMPTY: u32 = u32::MAX;

impl FakeRunner {
    pub(crate) fn new(num_blocks: usize, step_time: Duration, work: Arc<Work>) -> Self {
        let memory = vec![EMPTY; num_blocks * BLOCK_SIZE];
        Self { memory, logits: Vec::new(), argmax: Vec::new(), step_time, work }
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

/// The same runner on a thread: `forward` returns before anything is computed, and only results are waited for.
pub(crate) struct AsyncRunner {
    idle: Option<FakeRunner>,
    busy: Option<JoinHandle<(FakeRunner, Result<(), RunError>)>>,
    work: Arc<Work>,
}

impl AsyncRunner {
    pub(crate) fn new(runner: FakeRunner) -> Self {
        let work = Arc::clone(&runner.work);
        Self { idle: Some(runner), busy: None, work }
    }

    /// The runner once it is done, and what became of its last batch.
    fn wait(&mut self) -> Result<&mut FakeRunner, RunError> {
        if let Some(busy) = self.busy.take() {
            let (runner, computed) = busy.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            self.work.computing.store(false, Relaxed);
            self.idle = Some(runner);
            computed?;
        }
        Ok(self.idle.as_mut().expect("a runner that is not busy is idle"))
    }
}

impl ModelRunner for AsyncRunner {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn forward(&mut self, batch: &Batch) -> Result<(), RunError> {
        self.wait()?;
        // What the host can tell is told at once; a lost device, by whoever waits.
        if batch.tokens.contains(&ERROR) {
            return Err("an error was asked for".to_owned().into());
        }
        let (mut runner, batch) = (self.idle.take().expect("it was waited for"), batch.clone());
        self.work.computing.store(true, Relaxed);
        self.busy = Some(std::thread::spawn(move || {
            let computed = runner.forward(&batch);
            (runner, computed)
        }));
        Ok(())
    }

    fn argmax(&mut self) -> Result<&[u32], RunError> {
        self.wait()?.argmax()
    }

    fn for_each_logits(&mut self, f: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<(), RunError> {
        self.wait()?.for_each_logits(f)
    }
}

impl ModelRunner for FakeRunner {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn forward(&mut self, batch: &Batch) -> Result<(), RunError> {
        self.work.rows.fetch_add(batch.tokens.len(), Relaxed);
        self.work.batches.fetch_add(1, Relaxed);
        self.work.widest.fetch_max(batch.spans.len(), Relaxed);
        std::thread::sleep(self.step_time);
        assert!(!batch.tokens.contains(&PANIC), "a panic was asked for");
        if batch.tokens.contains(&ERROR) {
            return Err("an error was asked for".to_owned().into());
        }
        if batch.tokens.contains(&FATAL) {
            return Err(RunError { message: "the device is lost".into(), fatal: true });
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
                self.memory[place(table, span.pos0 as usize + i)] = batch.tokens[span.row0 as usize + i];
            }
        }
        self.logits.clear();
        self.argmax.clear();
        let mut outputs = batch.outputs.iter().copied().peekable();
        for (span, table) in batch.spans.iter().zip(&tables) {
            while let Some(row) = outputs.next_if(|row| *row < span.row0 + span.rows) {
                let position = (span.pos0 + row - span.row0) as usize;
                let context: Vec<u32> = (0..=position).map(|p| self.memory[place(table, p)]).collect();
                if context.contains(&EMPTY) {
                    return Err(format!("position {position} reads a place that was never written").into());
                }
                let logits = logits_after(&context);
                self.argmax.push(argmax(&logits));
                if !batch.greedy {
                    self.logits.extend(logits);
                }
            }
        }
        Ok(())
    }

    fn argmax(&mut self) -> Result<&[u32], RunError> {
        Ok(&self.argmax)
    }

    fn for_each_logits(&mut self, f: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<(), RunError> {
        std::thread::scope(|scope| {
            let mut rows: Vec<_> = self.logits.chunks_mut(VOCAB).enumerate().collect();
            let second = rows.split_off(rows.len() / 2);
            scope.spawn(move || second.into_iter().for_each(|(i, row)| f(i, row)));
            rows.into_iter().for_each(|(i, row)| f(i, row));
        });
        Ok(())
    }
}
