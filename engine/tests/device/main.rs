//! A tiny random Llama on a CUDA device, through the decoder and through the whole engine, against the CPU. The device is a
//! GPU where there is one, else the emulated driver.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::sync::{Mutex, OnceLock};

use cupola_engine::{Device, Engine, EngineConfig, EngineHandle, Event, Request, TokenLogprobs, Usage};
use cupola_kernels::cpu::CpuConfig;
use cupola_kernels::kv::blocks_for;
use cupola_kernels::{BlockId, KvType, WeightType, cuda};
use cupola_models::testing::{Scratch, VOCAB, tiny_gguf};
use cupola_models::{Batch, Decoder, DecoderLimits, Model};

/// Most sequences of a step: not one of the sizes that steps are padded to by themselves.
const SEQUENCES: usize = 12;
const POSITIONS: usize = 640;

fn device() -> Device {
    Device::Cuda(cuda::testing::device().expect("tests need a GPU, or g++ for the emulated driver"))
}

fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| {
        let folder = Scratch::new("device");
        // Float weights, so that the CPU does not round activations to 8 bits.
        Model::open(&tiny_gguf(folder.path(), WeightType::Bf16, 7)).expect("a sound file")
    })
}

fn random(seed: usize, below: usize) -> u32 {
    let mixed = (seed as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    u32::try_from((mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 33).expect("31 bits") % below as u32
}

fn prompt(seed: usize, len: usize) -> Vec<u32> {
    (0..len).map(|i| random(seed * 1009 + i, VOCAB)).collect()
}

fn decoder() -> Decoder {
    decoder_of(KvType::F16)
}

fn decoder_of(kv_type: KvType) -> Decoder {
    let limits = DecoderLimits {
        max_batch_tokens: POSITIONS,
        max_seqs: SEQUENCES,
        kv_blocks: SEQUENCES * blocks_for(POSITIONS),
        kv_type,
        max_model_len: POSITIONS,
    };
    let backend = device().backend().expect("a device");
    Decoder::load(model(), backend, limits, &mut |_, _| ()).expect("the model loads")
}

/// Blocks of a sequence that has `length` positions.
fn blocks(sequence: usize, length: usize) -> Vec<BlockId> {
    let first = sequence * blocks_for(POSITIONS);
    (first..first + blocks_for(length)).map(|block| BlockId(u32::try_from(block).expect("few"))).collect()
}

/// The bits of the logits of all `rows` outputs of the last batch.
fn logits(decoder: &mut Decoder, rows: usize) -> Vec<Vec<u32>> {
    let logits = Mutex::new(vec![Vec::new(); rows]);
    decoder
        .for_each_logits(&|row, values| {
            logits.lock().expect("no panic")[row] = values.iter().map(|x| x.to_bits()).collect();
        })
        .expect("logits");
    logits.into_inner().expect("no panic")
}

/// A step of the first `lengths.len()` sequences, which have these lengths; gives the bits of all logits, and the argmax.
fn step(decoder: &mut Decoder, lengths: &[usize], seed: usize, greedy: bool) -> (Vec<Vec<u32>>, Vec<u32>) {
    let sequences: Vec<_> = lengths.iter().copied().enumerate().collect();
    step_of(decoder, &sequences, seed, greedy)
}

/// The same of any sequences, as (number, length).
fn step_of(
    decoder: &mut Decoder,
    sequences: &[(usize, usize)],
    seed: usize,
    greedy: bool,
) -> (Vec<Vec<u32>>, Vec<u32>) {
    let mut batch = Batch { greedy, ..Batch::default() };
    for &(sequence, length) in sequences {
        let row = batch.push(&[random(seed * 31 + sequence, VOCAB)], length, &blocks(sequence, length + 1));
        batch.outputs.push(row);
    }
    decoder.forward(&batch).expect("a sound batch");
    let logits = logits(decoder, sequences.len());
    let chosen = if greedy { decoder.argmax().expect("tokens").to_vec() } else { Vec::new() };
    (logits, chosen)
}

fn fill(decoder: &mut Decoder, lengths: &[usize]) {
    for (sequence, &length) in lengths.iter().enumerate() {
        let mut batch = Batch { greedy: true, ..Batch::default() };
        batch.push(&prompt(sequence, length), 0, &blocks(sequence, length));
        decoder.forward(&batch).expect("a sound batch");
    }
}

/// What is recorded is replayed with the same bits as when it runs by itself: at padded sizes, with sequences of one piece
/// of attention and of several, and while both kinds of step change about.
#[test]
fn a_recorded_step_gives_the_bits_of_one_that_is_not() {
    let (mut plain, mut recorded) = (decoder(), decoder());
    let before = recorded.allocated_bytes();
    let made = recorded.record_passes(&mut |_, _| ()).expect("recordings");
    assert_eq!(made.failed, None);
    assert!(made.graphs >= 5, "{made:?}");
    let mut lengths = [3, 500, 31, 32, 255, 256, 1, 300, 90, 64, 620, 7];
    for decoder in [&mut plain, &mut recorded] {
        fill(decoder, &lengths);
    }
    for (round, count) in [1, 3, 7, 12, 9, 2, 12, 1].into_iter().enumerate() {
        for greedy in [true, false] {
            let seed = 2 * round + usize::from(greedy);
            let expected = step(&mut plain, &lengths[..count], seed, greedy);
            assert_eq!(step(&mut recorded, &lengths[..count], seed, greedy), expected, "{count} in round {round}");
            assert!(expected.0.iter().flatten().all(|&bits| f32::from_bits(bits).is_finite()));
            lengths[..count].iter_mut().for_each(|length| *length += 1);
        }
    }
    assert_eq!(recorded.recorded().graphs, made.graphs, "all were made at the start");
    assert_eq!(recorded.allocated_bytes(), before, "a step allocates nothing");
    assert_eq!(plain.recorded().graphs, 0);
}

/// With keys and values of 8 bits: a row has the same bits alone and among others, recorded or not, and whether the beginning
/// of its prompt is computed or found; and all lie near those of 16 bits.
#[test]
fn bytes_keep_the_promises_of_16_bits() {
    let mut decoder = decoder_of(KvType::Fp8);
    let lengths = [3, 500, 31, 32, 255, 256, 620];
    fill(&mut decoder, &lengths);
    let (together, chosen) = step(&mut decoder, &lengths, 1, true);
    for (sequence, &length) in lengths.iter().enumerate() {
        let (alone, token) = step_of(&mut decoder, &[(sequence, length)], 1, true);
        assert_eq!((&alone[0], token[0]), (&together[sequence], chosen[sequence]), "sequence {sequence}");
    }
    assert_eq!(decoder.record_passes(&mut |_, _| ()).expect("recordings").failed, None);
    assert_eq!(step(&mut decoder, &lengths, 1, true), (together.clone(), chosen), "recorded");

    // The same 60 tokens in two sequences: whole in one, in the other behind a block that the first has computed.
    let tokens = prompt(77, 60);
    let mut batch = Batch::default();
    batch.push(&tokens, 0, &blocks(8, 60));
    batch.outputs.push(59);
    decoder.forward(&batch).expect("a sound batch");
    let cold = logits(&mut decoder, 1);
    let mut batch = Batch::default();
    batch.push(&tokens[32..], 32, &[blocks(8, 60)[0], blocks(9, 60)[1]]);
    batch.outputs.push(27);
    decoder.forward(&batch).expect("a sound batch");
    assert_eq!(logits(&mut decoder, 1), cold, "a warm beginning changes nothing");

    let mut wide = self::decoder();
    fill(&mut wide, &lengths);
    let (expected, _) = step(&mut wide, &lengths, 1, true);
    let values = |rows: &[Vec<u32>]| rows.iter().flatten().map(|&bits| f32::from_bits(bits)).collect::<Vec<_>>();
    let (got, expected) = (values(&together), values(&expected));
    let size = (expected.iter().map(|x| x * x).sum::<f32>() / expected.len() as f32).sqrt();
    let off = got.iter().zip(&expected).map(|(a, b)| (a - b) * (a - b)).sum::<f32>() / expected.len() as f32;
    eprintln!("logits of fp8 are off by {:.4} of their size", off.sqrt() / size);
    assert!(got != expected && off.sqrt() < 0.05 * size, "off by {} of {size}", off.sqrt());
}

/// More greedy rows than logits exist at a time.
#[test]
fn the_tokens_of_many_sequences_come_in_several_rounds() {
    let limits =
        DecoderLimits { max_batch_tokens: 80, max_seqs: 80, kv_blocks: 80, kv_type: KvType::F16, max_model_len: 32 };
    for device in [Device::Cpu(CpuConfig::default()), device()] {
        let backend = device.backend().expect("a device");
        let mut decoder = Decoder::load(model(), backend, limits, &mut |_, _| ()).expect("the model loads");
        let mut batch = Batch { greedy: true, ..Batch::default() };
        for sequence in 0..70u32 {
            let row = batch.push(&[sequence % 5], 0, &[BlockId(sequence)]);
            batch.outputs.push(row);
        }
        decoder.forward(&batch).expect("a sound batch");
        let tokens = decoder.argmax().expect("tokens").to_vec();
        assert_eq!(tokens.len(), 70, "{device}");
        assert!(tokens.iter().enumerate().all(|(i, &token)| token == tokens[i % 5]), "{device}: {tokens:?}");
        assert!(tokens[..5].iter().any(|&token| token != tokens[0]), "{device}: {tokens:?}");
    }
}

/// An engine that records its steps or not, and that submits them ahead or not.
fn engine(device: &Device, (enforce_eager, async_scheduling): (bool, bool), kv_cache_type: KvType) -> EngineHandle {
    let config = EngineConfig {
        async_scheduling,
        max_num_seqs: SEQUENCES,
        max_num_batched_tokens: 128,
        max_model_len: Some(POSITIONS),
        kv_cache_bytes: Some(32 << 20),
        enforce_eager,
        kv_cache_type,
        ..EngineConfig::default()
    };
    Engine::load(model(), config, device).expect("an engine")
}

#[derive(Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    usage: Usage,
}

/// Answers to all prompts, asked together.
fn answers(engine: &EngineHandle, prompts: &[Vec<u32>], logprobs: Option<u8>) -> Vec<Answer> {
    let streams = prompts.iter().enumerate().map(|(i, prompt)| {
        let mut request = Request::greedy(prompt.clone(), 6 + i % 5 * 4);
        request.stop.ignore_eos = true;
        request.logprobs = logprobs;
        engine.submit_now(request).expect("accepted")
    });
    let streams: Vec<_> = streams.collect();
    let read = streams.into_iter().map(|mut stream| {
        let mut answer = Answer::default();
        while let Some(event) = stream.blocking_next() {
            match event {
                Event::Tokens { tokens, logprobs, .. } => {
                    answer.tokens.extend(tokens);
                    answer.logprobs.extend(logprobs);
                }
                Event::Finished { usage, .. } => answer.usage = usage,
                other => panic!("{other:?}"),
            }
        }
        answer
    });
    let answers = read.collect();
    assert_eq!(engine.blocking_check_integrity().expect("whole").leased, 0);
    answers
}

/// Tokens that agree, after checking that where an answer first differs the CPU found both tokens about as likely.
fn agree(got: &[Answer], cpu: &[Answer]) -> usize {
    /// Logits of this model are about 1 in size, and bf16 activations move them by a hundredth.
    const NEARLY_TIED: f32 = 0.08;
    let mut same = 0;
    for (i, (got, cpu)) in got.iter().zip(cpu).enumerate() {
        assert_eq!(got.tokens.len(), cpu.tokens.len());
        assert_eq!(got.usage.completion_tokens, got.tokens.len());
        let differs = got.tokens.iter().zip(&cpu.tokens).position(|(a, b)| a != b);
        same += differs.unwrap_or(got.tokens.len());
        if let Some(at) = differs {
            let top = &cpu.logprobs[at].top;
            let of = |token: u32| top.iter().find(|likely| likely.0 == token).map(|likely| likely.1);
            let (best, other) = (of(cpu.tokens[at]), of(got.tokens[at]));
            let tied = matches!((best, other), (Some(best), Some(other)) if best - other < NEARLY_TIED);
            assert!(tied, "answer {i}, token {at}: {} instead of {}, among {top:?}", got.tokens[at], cpu.tokens[at]);
        }
    }
    same
}

/// Prompts of several lengths, some with a common beginning; then the same conversations, longer.
#[test]
fn the_engine_gives_the_tokens_of_the_cpu_with_and_without_recordings_and_steps_ahead() {
    let mut first: Vec<_> =
        [5, 40, 130, 33, 64, 300].iter().enumerate().map(|(i, &len)| prompt(100 + i, len)).collect();
    first.extend((0..4).map(|i| [prompt(1, 96), prompt(200 + i, 10)].concat()));
    let second: Vec<_> = first.iter().map(|prompt| [prompt.as_slice(), &[5, 6, 7]].concat()).collect();
    let cpu = engine(&Device::Cpu(CpuConfig::default()), (false, true), KvType::F16);
    let expected = [&first, &second].map(|prompts| answers(&cpu, prompts, Some(5)));
    let mut tokens: Vec<Vec<Vec<u32>>> = Vec::new();
    for (enforce_eager, async_scheduling) in [(false, true), (true, true), (false, false)] {
        let engine = engine(&device(), (enforce_eager, async_scheduling), KvType::F16);
        let mut answered = Vec::new();
        for (round, (prompts, expected)) in [&first, &second].into_iter().zip(&expected).enumerate() {
            let got = answers(&engine, prompts, None);
            let (same, all) = (agree(&got, expected), got.iter().map(|answer| answer.tokens.len()).sum::<usize>());
            assert!(same * 4 >= all * 3, "only {same} of {all} tokens can be compared");
            let reused = got.iter().filter(|answer| answer.usage.cached_tokens > 0).count();
            assert!(reused >= [3, 9][round], "{reused} prompts found their beginning in round {round}");
            answered.extend(got.into_iter().map(|answer| answer.tokens));
        }
        let (steps, ahead) = (engine.metrics().steps.get(), engine.metrics().steps_ahead.get());
        assert_eq!(ahead * 2 > steps, async_scheduling, "{ahead} of {steps} steps were submitted ahead");
        engine.shutdown();
        tokens.push(answered);
    }
    assert_eq!(tokens[0], tokens[2], "whenever the host reads the tokens, they are the same");
}

/// A conversation goes on from keys and values of 8 bits that were computed before, as if they were computed again.
#[test]
fn the_engine_reuses_beginnings_of_8_bits() {
    let prompts: Vec<_> = [40, 130, 300].iter().enumerate().map(|(i, &len)| prompt(100 + i, len)).collect();
    let warm = engine(&device(), (false, true), KvType::Fp8);
    let cold = engine(&device(), (true, true), KvType::Fp8);
    answers(&warm, &prompts, None);
    let longer: Vec<_> = prompts.iter().map(|prompt| [prompt.as_slice(), &prompt[..35]].concat()).collect();
    let (got, expected) = (answers(&warm, &longer, Some(5)), answers(&cold, &longer, Some(5)));
    assert!(got.iter().all(|answer| answer.usage.cached_tokens >= 32), "{:?}", got[0].usage);
    assert!(expected.iter().all(|answer| answer.usage.cached_tokens == 0), "{:?}", expected[0].usage);
    let (same, all) = (agree(&got, &expected), got.iter().map(|answer| answer.tokens.len()).sum::<usize>());
    assert!(same * 4 >= all * 3, "only {same} of {all} tokens can be compared");
    [warm, cold].iter().for_each(EngineHandle::shutdown);
}
