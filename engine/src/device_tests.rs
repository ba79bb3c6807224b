//! The engine on a CUDA device (a GPU, or the emulated driver): tokens drawn there are those of the host's sampler, and the
//! memory plan holds what a backend really takes.

use std::sync::Mutex;

use cupola_kernels::cuda::testing;
use cupola_kernels::kv::{BLOCK_SIZE, blocks_for};
use cupola_kernels::{BlockId, Draw, DrawRows, KvType, WeightType};
use cupola_models::testing::{Scratch as Folder, VOCAB, tiny_gguf};
use cupola_models::{Batch, Decoder, DecoderLimits, Model};

use crate::device::Device;
use crate::plan::{DEVICE_RESERVE_BYTES, plan};
use crate::request::{Event, Request, SamplingParams};
use crate::sampler::{Sampler, Scratch, random};
use crate::{Engine, EngineConfig, EngineHandle, RequestStream};

fn device() -> Device {
    Device::Cuda(testing::device().expect("tests need a GPU, or g++ for the emulated driver"))
}

fn random_below(seed: u64, bound: usize) -> usize {
    (random::uniform(seed, 1) * bound as f64) as usize
}

/// Parameters of every kind, by number.
fn params(i: u64) -> SamplingParams {
    SamplingParams {
        temperature: [0.0, 0.6, 1.0, 1.5][random_below(i * 7 + 1, 4)],
        top_k: [0, 0, 5, 50][random_below(i * 7 + 2, 4)],
        top_p: [1.0, 0.95, 0.6][random_below(i * 7 + 3, 3)],
        min_p: [0.0, 0.0, 0.1][random_below(i * 7 + 4, 3)],
        repetition_penalty: [1.0, 1.2][random_below(i * 7 + 5, 2)],
        presence_penalty: [0.0, 0.5][random_below(i * 7 + 6, 2)],
        frequency_penalty: [0.0, 0.25][random_below(i * 7 + 7, 2)],
        // One of them twice, not in order.
        logit_bias: if i.is_multiple_of(3) { vec![(9, 1.5), (4, -2.0), (9, 0.5)] } else { Vec::new() },
        seed: Some(i),
    }
}

#[test]
fn a_device_draws_what_the_sampler_chooses() {
    const ROWS: usize = 32;
    for vocab in [40, 1000, 5003] {
        let mut backend = device().backend().unwrap();
        let logits = backend.alloc_buffer(ROWS, vocab).unwrap();
        let sampler = backend.alloc_sampler(ROWS, vocab).unwrap().unwrap();
        let samplers: Vec<_> = (0..ROWS as u64)
            .map(|i| {
                let mut sampler = Sampler::new(params(i + vocab as u64), &[1, 2, 3, 2, 30], None, 0);
                (0..10).for_each(|n| sampler.accept(random_below(i * 31 + n, vocab) as u32));
                sampler.exclude(vec![5, 6], 2);
                sampler
            })
            .collect();
        // The same logits for both, of which few are close to each other.
        let value = |row: usize, token: usize| {
            let u = random::uniform(row as u64 * 1_000_003 + vocab as u64, token as u64);
            (-(u + 1e-9).ln() * 2.0) as f32
        };
        let (mut equal, mut all) = (0, 0);
        for index in 0..4 {
            let fill =
                |row: usize, x: &mut [f32]| x.iter_mut().enumerate().for_each(|(i, x)| *x = value(row + index, i));
            backend.for_each_row(logits, ROWS, &fill).unwrap();
            let expected = Mutex::new(vec![0; ROWS]);
            let scratch = Scratch::default();
            let choose = |row: usize, x: &mut [f32]| {
                let choice = samplers[row].choose(index, &mut x.to_vec(), &scratch).unwrap();
                expected.lock().unwrap()[row] = choice.token;
            };
            backend.for_each_row(logits, ROWS, &choose).unwrap();
            let draws: Vec<(u32, Draw<'_>)> =
                (0..).zip(&samplers).map(|(row, sampler)| (row, sampler.draw(index).unwrap())).collect();
            let mut drawn = Vec::new();
            backend.draw(DrawRows { sampler, logits, softcap: None, draws: &draws }, &mut drawn).unwrap();
            let expected = expected.into_inner().unwrap();
            equal += drawn.iter().zip(&expected).filter(|(drawn, expected)| **drawn == Ok(**expected)).count();
            all += ROWS;
        }
        // A point within rounding of two tokens is rare: at most one of these draws.
        assert!(equal + 1 >= all, "{vocab}: {equal} of {all} draws are equal");
    }
}

/// Tokens of an answer.
fn tokens(mut stream: RequestStream) -> Vec<u32> {
    let mut all = Vec::new();
    while let Some(event) = stream.blocking_next() {
        match event {
            Event::Tokens { tokens, .. } => all.extend(tokens),
            Event::Failed { message } => panic!("{message}"),
            _ => {}
        }
    }
    all
}

fn start(model: &Model, device: &Device, async_scheduling: bool) -> EngineHandle {
    let config = EngineConfig { async_scheduling, ..EngineConfig::default() };
    let config = EngineConfig { max_num_seqs: 40, max_num_batched_tokens: 64, ..config };
    let config = EngineConfig { kv_cache_bytes: Some(4 << 20), max_model_len: Some(64), ..config };
    Engine::load(model, config, device).unwrap()
}

/// Requests of every kind, with some answers' log-probabilities.
fn requests(logprobs: impl Fn(u64) -> bool) -> Vec<Request> {
    (0..36)
        .map(|i| {
            let prompt = (0..5 + i % 7).map(|n| ((n * 37 + i * 11) % VOCAB as u64) as u32).collect();
            let mut request = Request::greedy(prompt, 4);
            request.sampling = params(i);
            request.stop.ignore_eos = true;
            request.stop.min_tokens = if i % 5 == 0 { 3 } else { 0 };
            request.logprobs = logprobs(i).then_some(1);
            request
        })
        .collect()
}

#[test]
fn answers_drawn_on_a_device_are_those_of_the_host() {
    let folder = Folder::new("device-draws");
    let model = Model::open(&tiny_gguf(folder.path(), WeightType::F32, 1)).unwrap();
    let answers = |device: &Device, logprobs: &dyn Fn(u64) -> bool| -> Vec<Vec<u32>> {
        let engine = start(&model, device, true);
        let streams: Vec<_> =
            requests(logprobs).into_iter().map(|request| engine.submit_now(request).unwrap()).collect();
        streams.into_iter().map(tokens).collect()
    };
    // Log-probabilities take a row to the host, whose sampler then chooses from the very same logits.
    let drawn = answers(&device(), &|_| false);
    assert!(drawn.iter().all(|answer| answer.len() == 4));
    assert_eq!(drawn, answers(&device(), &|_| true));
    assert_eq!(drawn, answers(&device(), &|i| i % 3 == 1), "a batch of both");
    // The CPU's logits are not rounded in the same places, so a few answers take another turn at some token.
    let cpu = answers(&Device::default(), &|_| false);
    let same = drawn.iter().zip(&cpu).filter(|(a, b)| a == b).count();
    assert!(same * 4 >= drawn.len() * 3, "{same} of {} answers are the CPU's", drawn.len());
}

#[test]
fn answers_drawn_ahead_are_those_of_steps_that_wait() {
    let folder = Folder::new("device-draws-ahead");
    let model = Model::open(&tiny_gguf(folder.path(), WeightType::F32, 1)).unwrap();
    // More rows than are drawn at a time, none of which looks at the tokens before; some are greedy.
    let request = |i: u64| {
        let prompt = (0..5 + i % 7).map(|n| ((n * 37 + i * 11) % VOCAB as u64) as u32).collect();
        let mut request = Request::greedy(prompt, 8 + (i % 5) as usize);
        let off = SamplingParams::default();
        let (repetition_penalty, presence_penalty) = (off.repetition_penalty, off.presence_penalty);
        let frequency_penalty = off.frequency_penalty;
        request.sampling = SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, ..params(i) };
        request.stop.min_tokens = if i.is_multiple_of(5) { 3 } else { 0 };
        request.stop.token_ids = (0..3).map(|n| random_below(i * 5 + n, VOCAB) as u32).collect();
        request
    };
    let answers = |async_scheduling: bool| -> Vec<Vec<u32>> {
        let engine = start(&model, &device(), async_scheduling);
        let streams: Vec<_> = (0..36).map(|i| engine.submit_now(request(i)).unwrap()).collect();
        let answers = streams.into_iter().map(tokens).collect();
        assert_eq!(engine.blocking_check_integrity().unwrap().leased, 0);
        assert_eq!(engine.metrics().steps_ahead.get() >= 6, async_scheduling);
        answers
    };
    let ahead = answers(true);
    assert!(ahead.iter().any(|answer| answer.len() < 8), "some ended early: {ahead:?}");
    assert_eq!(ahead, answers(false));
}

#[test]
fn a_plan_holds_what_the_largest_steps_take() {
    let folder = Folder::new("device-plan");
    // Of so many rows that the products go to a library, too.
    for (ty, kv_cache_type, rows) in [
        (WeightType::Q4_0, KvType::F16, 300),
        (WeightType::Bf16, KvType::Fp8, 300),
        (WeightType::Q4_0, KvType::F16, 530),
    ] {
        let model = Model::open(&tiny_gguf(folder.path(), ty, 1)).unwrap();
        let sequences = 40;
        let config = EngineConfig {
            max_num_seqs: sequences,
            max_num_batched_tokens: rows,
            max_model_len: Some(1024),
            kv_cache_bytes: Some(16 << 20),
            kv_cache_type,
            ..EngineConfig::default()
        };
        let device = device();
        let plan = plan(&model, &config, &device).unwrap();
        let limits = DecoderLimits {
            max_batch_tokens: rows,
            max_seqs: sequences,
            kv_blocks: plan.kv_blocks,
            kv_type: config.kv_cache_type,
            max_model_len: plan.max_model_len,
        };
        let mut decoder = Decoder::load(&model, device.backend().unwrap(), limits, &mut |_, _| ()).unwrap();
        decoder.record_passes(&mut |_, _| ()).unwrap();

        // Prefill of one sequence, then rows of many long ones that share all blocks but their last; with and without greed.
        let shared: Vec<_> = (0..blocks_for(1024) as u32).map(BlockId).collect();
        let long = |i: usize| {
            let mut blocks = shared.clone();
            blocks[31] = BlockId(40 + i as u32);
            blocks
        };
        let mut batches = Vec::new();
        let mut prefill = Batch::default();
        prefill.push(&vec![3; rows], 0, &shared);
        prefill.outputs = (0..rows as u32).collect();
        batches.push(prefill);
        for (count, each) in [(sequences, 1), (sequences, 7), (1, 5)] {
            let mut batch = Batch::default();
            for i in 0..count {
                batch.push(&vec![i as u32; each], 31 * BLOCK_SIZE, &long(i));
                batch.outputs.push((batch.tokens.len() - 1) as u32);
            }
            batches.push(batch);
        }
        let draw = Draw { temperature: 1.0, top_k: 9, top_p: 0.9, uniform: 0.4, ..Draw::GREEDY };
        for mut batch in batches {
            decoder.forward(&batch).unwrap();
            let draws: Vec<_> = (0..batch.outputs.len()).map(|i| (i % 4 != 1).then_some(draw)).collect();
            let mut drawn = Vec::new();
            decoder.draw(&draws, &mut drawn, &|_, _| ()).unwrap();
            assert!(drawn.iter().all(Result::is_ok), "{drawn:?}");
            batch.greedy = true;
            decoder.forward(&batch).unwrap();
        }
        let (taken, planned) = (decoder.allocated_bytes(), plan.total_bytes - DEVICE_RESERVE_BYTES);
        assert!(taken <= planned, "{taken} bytes are allocated, {planned} were planned: {plan}");
        // The plan is no waste either, but for activations, which it counts as f32, and tables, which rarely are so long.
        assert!(planned - taken < 4 << 20, "{taken} bytes are allocated, {planned} were planned: {plan}");
    }
}
