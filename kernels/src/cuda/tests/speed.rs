//! How fast the kernels are, in the units of what bounds them: not run by default, since only a GPU's answer means something.
//!
//! `cargo test -p cupola-kernels --release --lib -- --ignored --nocapture cuda::tests::speed`
//!
//! Shapes are those of Llama 3.2 1B. Products go round through copies of a matrix that together are larger than any L2 cache, as
//! the matrices of a model are. On the emulated driver the shapes are tiny, to see that the measurement itself works.

use std::time::Instant;

use super::{CudaBackend, backend};
use crate::cpu::tests::noise;
use crate::kv::{BLOCK_SIZE, BlockId, KvLayout, KvType, SeqSpan};
use crate::{
    ActId, Attention, Backend, Draw, DrawRows, Epilogue, HeadShape, LinearId, PartOrder, RopePairs, RopeStore, Rows,
    WeightPart, WeightType,
};

/// Divisor of sizes, and how often an op is repeated for a measurement.
fn scale(backend: &CudaBackend) -> (usize, usize) {
    if backend.describe().to_lowercase().contains("emulated") { (64, 1) } else { (1, 40) }
}

/// Seconds that one call of `work` takes, all submitted work done.
fn seconds(backend: &mut CudaBackend, repeats: usize, mut work: impl FnMut(&mut CudaBackend, usize)) -> f64 {
    work(backend, 0);
    backend.synchronize();
    let start = Instant::now();
    (0..repeats).for_each(|i| work(backend, i));
    backend.synchronize();
    start.elapsed().as_secs_f64() / repeats as f64
}

/// Copies of a matrix of plain noise, of at least `bytes` together, and the bytes of one.
fn matrices(
    backend: &mut CudaBackend,
    ty: WeightType,
    (rows, cols): (usize, usize),
    bytes: usize,
) -> (Vec<LinearId>, usize) {
    let len = ty.row_bytes(cols).unwrap() * rows;
    // Bytes of small numbers in every type: the upper bits of 16-bit floats are those of numbers below 1.
    let data: Vec<u8> = (0..len).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8 & 0x3b).collect();
    let size = crate::cuda::weight_bytes(ty, rows, cols);
    let part = WeightPart { ty, rows, cols, data: &data };
    let copies = bytes.div_ceil(size).clamp(1, 64);
    ((0..copies).map(|_| backend.load_linear(&[part], PartOrder::Concat, None).unwrap()).collect(), size)
}

fn activations(backend: &mut CudaBackend, rows: usize, cols: usize, consumer: LinearId) -> ActId {
    let x = backend.alloc_buffer(rows, cols).unwrap();
    super::set(backend, x, rows, |row, col| noise(row * 31 + col));
    let weight = backend.load_vector(&vec![1.0; cols]).unwrap();
    let act = backend.alloc_act(rows, cols).unwrap();
    backend.rms_norm(x, Rows::First(rows), (weight, 1e-5), consumer, act).unwrap();
    act
}

#[test]
#[ignore = "measures a GPU"]
fn products() {
    let (divisor, repeats) = scale(&backend());
    println!("matrix products: {}", backend().describe_products().unwrap());
    println!("{:<10} {:>14} {:>6} {:>10} {:>10} {:>10}", "weights", "shape", "rows", "us", "GB/s", "TFLOP/s");
    for ty in [WeightType::Bf16, WeightType::Q4_0, WeightType::Q8_0, WeightType::Q6K] {
        for (out, cols) in [(3072, 2048), (2048, 2048), (16_384, 2048), (2048, 8192), (128_256, 2048)] {
            let (out, cols) = ((out / divisor).max(16), (cols / divisor).max(256));
            let mut backend = backend();
            let (weights, bytes) = matrices(&mut backend, ty, (out, cols), (512 << 20) / (divisor * divisor));
            for rows in [1, 8, 32, 64, 128, 512, 2048] {
                let rows: usize = if divisor > 1 && rows > 128 { 128 } else { rows };
                let act = activations(&mut backend, rows, cols, weights[0]);
                let result = backend.alloc_buffer(rows, out).unwrap();
                let time = seconds(&mut backend, repeats, |backend, i| {
                    backend.linear(act, rows, weights[i % weights.len()], Epilogue::Store, result).unwrap();
                });
                let flops = 2.0 * (rows * out * cols) as f64;
                let shape = format!("{out}x{cols}");
                println!(
                    "{:<10} {shape:>14} {rows:>6} {:>10.1} {:>10.0} {:>10.1}",
                    ty.name(),
                    time * 1e6,
                    bytes as f64 / time / 1e9,
                    flops / time / 1e12
                );
            }
        }
    }
}

#[test]
#[ignore = "measures a GPU"]
fn attention() {
    let (divisor, repeats) = scale(&backend());
    println!(
        "{:<14} {:>4} {:>9} {:>9} {:>6} {:>10} {:>10} {:>10}",
        "heads", "kv", "sequences", "context", "rows", "us", "GB/s", "TFLOP/s"
    );
    let steps =
        [(1, 512, 1), (1, 8192, 1), (32, 512, 1), (32, 2048, 1), (64, 2048, 1), (1, 2048, 2048), (4, 2048, 512)];
    for (heads, kv_heads, head_dim) in [(32, 8, 64), (32, 8, 128)] {
        for ((sequences, context, rows), ty) in
            steps.into_iter().flat_map(|step| [KvType::F16, KvType::Fp8].map(|ty| (step, ty)))
        {
            let (context, rows): (usize, usize) = ((context / divisor).max(40), (rows / divisor).max(1));
            let mut backend = backend();
            let shape = HeadShape { heads, kv_heads, head_dim };
            let blocks = context.div_ceil(BLOCK_SIZE);
            let layout = KvLayout { layers: 1, kv_heads, head_dim, ty };
            let kv = backend.alloc_kv(layout, blocks * sequences).unwrap();
            let rope = backend.load_rope(&[], 1.0, context).unwrap();
            let all = backend.alloc_buffer(context, shape.qkv_cols()).unwrap();
            super::set(&mut backend, all, context, |row, col| noise(row * 977 + col));
            let block_table: Vec<_> = (0..(blocks * sequences) as u32).map(BlockId).collect();
            let span = |sequence: usize, row0: usize, rows: usize| {
                let [row0, rows, pos0, table0, table_len] =
                    [row0, rows, context - rows, sequence * blocks, blocks].map(|n| n as u32);
                SeqSpan { row0, rows, pos0, table0, table_len }
            };
            for sequence in 0..sequences {
                let (pairs, query_scale, qk_norm) = (RopePairs::Halves, 1.0, None);
                let whole = [span(sequence, 0, context)];
                let (spans, block_table, qkv) = (&whole[..], &block_table[..], all);
                let store =
                    RopeStore { qkv, shape, rope, pairs, query_scale, qk_norm, kv, layer: 0, spans, block_table };
                backend.rope_store(store).unwrap();
            }
            let qkv = backend.alloc_buffer(rows * sequences, shape.qkv_cols()).unwrap();
            super::set(&mut backend, qkv, rows * sequences, |row, col| noise(row * 977 + col) * 0.1);
            let out = backend.alloc_act(rows * sequences, heads * head_dim).unwrap();
            let (consumer, _) = matrices(&mut backend, WeightType::Bf16, (16, heads * head_dim), 1);
            let spans: Vec<_> = (0..sequences).map(|sequence| span(sequence, sequence * rows, rows)).collect();
            let op = Attention {
                qkv,
                shape,
                softcap: None,
                window: None,
                kv,
                layer: 0,
                spans: &spans,
                block_table: &block_table,
                out,
                consumer: consumer[0],
            };
            let time = seconds(&mut backend, repeats, |backend, _| backend.attention(op).unwrap());
            let bytes = (layout.token_bytes() * context * sequences) as f64;
            // Both products of each row with half of its own rows and all before.
            let seen = (context - rows) as f64 + (rows + 1) as f64 / 2.0;
            let flops = 4.0 * (sequences * rows * heads * head_dim) as f64 * seen;
            println!(
                "{:<14} {:>4} {sequences:>9} {context:>9} {rows:>6} {:>10.1} {:>10.0} {:>10.1}",
                format!("{heads}/{kv_heads}x{head_dim}"),
                if ty == KvType::Fp8 { "fp8" } else { "bf16" },
                time * 1e6,
                bytes / time / 1e9,
                flops / time / 1e12
            );
        }
    }
}

#[test]
#[ignore = "measures a GPU"]
fn sampling() {
    let (divisor, repeats) = scale(&backend());
    let vocab = 128_256 / divisor;
    let seen: Vec<_> = (0..1000.min(vocab as u32)).map(|token| (token, token % 3)).collect();
    let plain = Draw { temperature: 0.8, uniform: 0.5, ..Draw::GREEDY };
    let kinds = [
        ("temperature", plain),
        ("top_p 0.95", Draw { top_p: 0.95, ..plain }),
        ("top_k 50", Draw { top_k: 50, ..plain }),
        ("top_k 50, top_p 0.9, min_p", Draw { top_k: 50, top_p: 0.9, min_p: 0.05, ..plain }),
        ("greedy, 1000 penalties", Draw { seen: &seen, presence_penalty: 0.5, ..Draw::GREEDY }),
    ];
    println!("{:<28} {:>10} {:>6} {:>10}", "sampling", "vocabulary", "rows", "us");
    for rows in [1, 32, 64] {
        let mut backend = backend();
        let logits = backend.alloc_buffer(rows, vocab).unwrap();
        let sampler = backend.alloc_sampler(rows, vocab).unwrap().unwrap();
        // As a model's: a few hundred tokens have nearly all of the probability.
        let logit = |row: usize, col: usize| -(noise(row * 131_071 + col).abs() + 1e-6).ln() * 2.0;
        let mut print = |name: &str, work: &mut dyn FnMut(&mut CudaBackend)| {
            super::set(&mut backend, logits, rows, logit);
            let time = seconds(&mut backend, repeats, |backend, _| work(backend));
            println!("{name:<28} {vocab:>10} {rows:>6} {:>10.1}", time * 1e6);
        };
        for (name, draw) in kinds {
            let draws: Vec<_> = (0..rows as u32).map(|row| (row, draw)).collect();
            let mut out = Vec::new();
            let op = DrawRows { sampler, logits, softcap: None, draws: &draws };
            print(name, &mut |backend| backend.draw(op, &mut out).unwrap());
        }
        print("all logits to the host", &mut |backend| {
            backend.take_rows(logits, Rows::First(rows), &|_, _| ()).unwrap();
        });
    }
}
