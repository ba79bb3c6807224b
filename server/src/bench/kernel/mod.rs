//! Speed of the decoder alone, without server, scheduler or sampling, as `llama-bench` measures it.
//!
//! ```text
//!   ppP            P prompt tokens of one sequence, in chunks           tokens / second
//!   tgN            N tokens one after the other                         tokens / second
//!   tgN bB         the same for B sequences together, one step each     tokens / second of all B
//!   ... @ dD       after D tokens that are already in the cache         (not timed)
//!
//!   one test:  fill to depth -> warm up -> r x (run, timed)
//! ```
//!
//! Prompt tokens are random; generated ones are the decoder's own most likely tokens, fed back.

pub mod table;

use std::time::{Duration, Instant};

use cupola_kernels::kv::{BLOCK_SIZE, blocks_for};
use cupola_kernels::{Backend, BlockId, KvType};
use cupola_models::decoder::{Decoder, DecoderLimits};
use cupola_models::{Batch, Model};

use super::random::Random;
use super::stats::{Sorted, mean, sample_std};

/// Steps before the timed runs of a generation test.
const WARMUP_STEPS: usize = 8;

/// What to measure: every combination of the lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Prompt lengths, in tokens; 0 measures none.
    pub prompts: Vec<usize>,
    /// Generation lengths, in tokens; 0 measures none.
    pub generations: Vec<usize>,
    /// Tokens in the cache before a test.
    pub depths: Vec<usize>,
    /// Sequences that generate together.
    pub batches: Vec<usize>,
    /// Timed runs of a test.
    pub repetitions: usize,
    /// Most prompt tokens of one forward pass.
    pub chunk: usize,
    /// What keys and values are stored as.
    pub kv_type: KvType,
    /// Submit every op of a step by itself, on a device that could record steps.
    pub eager: bool,
}

/// One test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Test {
    /// Prompt tokens; 0 for a generation test.
    pub prompt: usize,
    /// Generated tokens; 0 for a prompt test.
    pub generation: usize,
    /// Tokens in the cache before it.
    pub depth: usize,
    /// Sequences together.
    pub sequences: usize,
}

impl Test {
    /// Tokens that one run computes, over all sequences.
    pub fn tokens(&self) -> usize {
        self.prompt + self.generation * self.sequences
    }

    /// Positions of one sequence.
    fn positions(&self) -> usize {
        self.depth + self.prompt + self.generation
    }

    fn blocks_per_sequence(&self) -> usize {
        blocks_for(self.positions())
    }

    /// `pp512`, `tg128 b16`, `tg128 @ d1024`.
    pub fn name(&self) -> String {
        let mut name = match self.prompt {
            0 => format!("tg{}", self.generation),
            prompt => format!("pp{prompt}"),
        };
        if self.sequences > 1 {
            name.push_str(&format!(" b{}", self.sequences));
        }
        if self.depth > 0 {
            name.push_str(&format!(" @ d{}", self.depth));
        }
        name
    }
}

/// What a test measured.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The test.
    pub test: Test,
    /// Worker threads.
    pub threads: usize,
    /// The device, in words.
    pub backend: String,
    /// Most prompt tokens of one forward pass.
    pub chunk: usize,
    /// Time of each run.
    pub samples: Vec<Duration>,
    /// Bytes that a step of a generation test reads, on average.
    pub step_bytes: Option<u64>,
    /// Bytes that the device moves in a second, measured before the tests: read on the CPU, copied on others.
    pub bandwidth: Option<f64>,
}

impl Measured {
    /// Tokens a second, one value a run.
    pub fn rates(&self) -> Vec<f64> {
        self.samples.iter().map(|time| self.test.tokens() as f64 / time.as_secs_f64()).collect()
    }

    /// Bytes read per second in the median run of a generation test, as a share of [`Measured::bandwidth`].
    pub fn bandwidth_share(&self) -> Option<f64> {
        let steps = self.summary().2 / self.test.sequences as f64;
        Some(self.step_bytes? as f64 * steps / self.bandwidth?)
    }

    /// Mean, sample standard deviation and median of [`Measured::rates`].
    pub fn summary(&self) -> (f64, f64, f64) {
        let rates = self.rates();
        (mean(&rates), sample_std(&rates), Sorted::new(&rates).median())
    }
}

impl Options {
    /// Every test, prompt tests first.
    pub fn tests(&self) -> Vec<Test> {
        let mut tests = Vec::new();
        for &depth in &self.depths {
            for &prompt in self.prompts.iter().filter(|prompt| **prompt > 0) {
                tests.push(Test { prompt, generation: 0, depth, sequences: 1 });
            }
        }
        for &depth in &self.depths {
            for &sequences in &self.batches {
                for &generation in self.generations.iter().filter(|generation| **generation > 0) {
                    tests.push(Test { prompt: 0, generation, depth, sequences });
                }
            }
        }
        tests
    }

    /// Sizes of a decoder that can run every test.
    fn limits(&self, tests: &[Test]) -> DecoderLimits {
        let most = |of: fn(&Test) -> usize| tests.iter().map(of).max().unwrap_or(1);
        DecoderLimits {
            max_batch_tokens: self.chunk.max(most(|test| test.sequences)),
            max_seqs: most(|test| test.sequences),
            kv_blocks: most(|test| test.sequences * test.blocks_per_sequence()),
            kv_type: self.kv_type,
            max_model_len: most(Test::positions),
        }
    }
}

/// Runs every test on `backend`, which has `threads` workers. `watch` is called before each test.
///
/// # Errors
/// A model that the backend cannot load.
pub fn run(
    model: &Model,
    options: &Options,
    (mut backend, threads): (Box<dyn Backend>, usize),
    watch: &mut dyn FnMut(&Test),
) -> cupola_models::Result<Vec<Measured>> {
    let tests = options.tests();
    // Before the model takes the memory; where there is too little, the tests can still be measured.
    let bandwidth = backend.bandwidth().ok();
    let mut decoder = Decoder::load(model, backend, options.limits(&tests), &mut |_, _| {})?;
    if !options.eager {
        decoder.record_passes(&mut |_, _| {})?;
    }
    let vocab = decoder.spec().vocab;
    let mut runner =
        Runner { decoder, batch: Batch::default(), random: Random::new(0, 0), vocab, chunk: options.chunk };
    let mut measured = Vec::with_capacity(tests.len());
    for test in tests {
        watch(&test);
        let samples = runner.measure(&test, options.repetitions)?;
        let mut backend = runner.decoder.describe_backend();
        if let Some(products) = runner.decoder.describe_products() {
            backend.push_str(&format!(", {products}"));
        }
        if options.kv_type != KvType::default() {
            backend.push_str(&format!(", {} kv", options.kv_type.name()));
        }
        if options.eager && runner.decoder.is_asynchronous() {
            backend.push_str(", eager");
        }
        let step_bytes = runner.step_bytes(&test);
        measured.push(Measured { test, threads, backend, chunk: options.chunk, samples, step_bytes, bandwidth });
    }
    Ok(measured)
}

struct Runner {
    decoder: Decoder,
    batch: Batch,
    random: Random,
    vocab: usize,
    chunk: usize,
}

impl Runner {
    fn measure(&mut self, test: &Test, repetitions: usize) -> cupola_models::Result<Vec<Duration>> {
        let blocks = test.blocks_per_sequence();
        let tables: Vec<Vec<BlockId>> = (0..test.sequences)
            .map(|sequence| {
                let first = sequence * blocks;
                (first..first + blocks).map(|block| BlockId(u32::try_from(block).expect("few blocks"))).collect()
            })
            .collect();
        for table in &tables {
            let tokens = self.random_tokens(test.depth);
            self.prefill(&tokens, 0, table)?;
        }
        let mut samples = Vec::with_capacity(repetitions);
        if test.prompt > 0 {
            let tokens = self.random_tokens(test.prompt);
            self.prefill(&tokens, test.depth, &tables[0])?;
            for _ in 0..repetitions {
                let began = Instant::now();
                self.prefill(&tokens, test.depth, &tables[0])?;
                samples.push(began.elapsed());
            }
        } else {
            self.generate(test.generation.min(WARMUP_STEPS), test.depth, &tables)?;
            for _ in 0..repetitions {
                let began = Instant::now();
                self.generate(test.generation, test.depth, &tables)?;
                samples.push(began.elapsed());
            }
        }
        Ok(samples)
    }

    /// Bytes that a step of a generation test reads, on average.
    fn step_bytes(&self, test: &Test) -> Option<u64> {
        let lengths = test.depth + 1..test.depth + test.generation + 1;
        let steps = u64::try_from(lengths.len()).ok().filter(|steps| *steps > 0)?;
        Some(lengths.map(|length| self.decoder.step_bytes(test.sequences, length)).sum::<u64>() / steps)
    }

    fn random_tokens(&mut self, count: usize) -> Vec<u32> {
        (0..count).map(|_| u32::try_from(self.random.below(self.vocab)).expect("token ids are below 2^32")).collect()
    }

    /// Computes `tokens` from position `start` on, and the most likely token after them.
    fn prefill(&mut self, tokens: &[u32], start: usize, table: &[BlockId]) -> cupola_models::Result<()> {
        let mut position = start;
        for chunk in tokens.chunks(self.chunk) {
            self.batch.clear();
            self.batch.greedy = true;
            let end = position + chunk.len();
            let row0 = self.batch.push(chunk, position, &table[..blocks_for(end)]);
            if end == start + tokens.len() {
                self.batch.outputs.push(row0 + u32::try_from(chunk.len()).expect("a short chunk") - 1);
            }
            self.decoder.forward(&self.batch)?;
            position = end;
        }
        // Until the last chunk is computed.
        self.decoder.argmax()?;
        Ok(())
    }

    /// Generates `steps` tokens for each sequence, from position `start` on.
    fn generate(&mut self, steps: usize, start: usize, tables: &[Vec<BlockId>]) -> cupola_models::Result<()> {
        let mut tokens = self.random_tokens(tables.len());
        for position in start..start + steps {
            self.batch.clear();
            self.batch.greedy = true;
            for (token, table) in tokens.iter().zip(tables) {
                let row = self.batch.push(&[*token], position, &table[..position / BLOCK_SIZE + 1]);
                self.batch.outputs.push(row);
            }
            self.decoder.forward(&self.batch)?;
            tokens.copy_from_slice(self.decoder.argmax()?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options {
            prompts: vec![512, 0],
            generations: vec![128],
            depths: vec![0, 100],
            batches: vec![1, 16],
            repetitions: 3,
            chunk: 64,
            kv_type: KvType::F16,
            eager: false,
        }
    }

    #[test]
    fn tests_are_named_as_llama_bench_names_them() {
        let names: Vec<String> = options().tests().iter().map(Test::name).collect();
        let expected = ["pp512", "pp512 @ d100", "tg128", "tg128 b16", "tg128 @ d100", "tg128 b16 @ d100"];
        assert_eq!(names, expected);
        assert_eq!(options().tests()[3].tokens(), 128 * 16);
    }

    #[test]
    fn limits_hold_the_largest_test() {
        let options = options();
        let limits = options.limits(&options.tests());
        assert_eq!(limits.max_model_len, 612);
        assert_eq!(limits.max_batch_tokens, 64);
        assert_eq!(limits.kv_blocks, 16 * blocks_for(228));
    }
}
