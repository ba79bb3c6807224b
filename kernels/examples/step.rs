//! Times each op of a decoder step with the shapes of SmolLM2-135M and weights of no meaning.
//!
//! `cargo run --release -p cupola-kernels --example step [THREADS]`
//!
//! Prints, for a prompt of 512 tokens and for batches of 1, 4 and 16 sequences with 128 tokens of context, the tokens per
//! second of the median step, and the time that a step would spend in each op if every call took as long as the fastest
//! tenth of them: what the kernels can do, also on a machine that does other things beside.

use std::collections::BTreeMap;
use std::time::Instant;

use cupola_kernels::cpu::{CpuBackend, CpuConfig, default_threads};
use cupola_kernels::kv::blocks_for;
use cupola_kernels::{
    Attention, Backend, BlockId, Epilogue, GateFn, HeadShape, KvLayout, KvType, LinearId, PartOrder, Result, RopePairs,
    RopeStore, Rows, SeqSpan, WeightPart, WeightType,
};

const LAYERS: usize = 30;
const HIDDEN: usize = 576;
const FFN: usize = 1536;
const VOCAB: usize = 49152;
const SHAPE: HeadShape = HeadShape { heads: 9, kv_heads: 3, head_dim: 64 };
const STEPS: usize = 12;

struct Layer {
    qkv: LinearId,
    o: LinearId,
    gate_up: LinearId,
    down: LinearId,
}

/// Seconds of each call, by op.
#[derive(Default)]
struct Times(BTreeMap<&'static str, Vec<f64>>);

impl Times {
    fn measure(&mut self, op: &'static str, run: impl FnOnce() -> Result<()>) -> Result<()> {
        let start = Instant::now();
        run()?;
        self.0.entry(op).or_default().push(start.elapsed().as_secs_f64());
        Ok(())
    }
}

fn main() -> Result<()> {
    let threads = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or_else(default_threads);
    let mut backend = CpuBackend::new(CpuConfig { threads: Some(threads), isa: None })?;
    println!("{}", backend.describe());
    for (rows, batch, context) in [(512, 1, 0), (1, 1, 128), (4, 4, 128), (16, 16, 128)] {
        step(&mut backend, rows, batch, context)?;
    }
    Ok(())
}

fn matrix(
    backend: &mut CpuBackend,
    ty: WeightType,
    parts: &[usize],
    cols: usize,
    order: PartOrder,
) -> Result<LinearId> {
    let row = ty.row_bytes(cols).expect("whole blocks");
    let data: Vec<u8> = (0..row * parts.iter().max().expect("parts")).map(|i| (i * 131 % 61) as u8).collect();
    let parts: Vec<_> = parts.iter().map(|&rows| WeightPart { ty, rows, cols, data: &data[..rows * row] }).collect();
    backend.load_linear(&parts, order, None)
}

fn step(backend: &mut CpuBackend, rows: usize, batch: usize, context: usize) -> Result<()> {
    let ty = WeightType::Q4_1;
    let layers = (0..LAYERS)
        .map(|_| {
            let kv = SHAPE.kv_heads * SHAPE.head_dim;
            Ok(Layer {
                qkv: matrix(backend, ty, &[HIDDEN, kv, kv], HIDDEN, PartOrder::Concat)?,
                o: matrix(backend, ty, &[HIDDEN], HIDDEN, PartOrder::Concat)?,
                gate_up: matrix(backend, ty, &[FFN, FFN], HIDDEN, PartOrder::GateUp)?,
                down: matrix(backend, ty, &[HIDDEN], FFN, PartOrder::Concat)?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let head = matrix(backend, WeightType::Q8_0, &[VOCAB], HIDDEN, PartOrder::Concat)?;
    let norm = (backend.load_vector(&[1.0; HIDDEN])?, 1e-5);
    let frequencies: Vec<f64> = (0..32).map(|i| 10_000f64.powf(-f64::from(i) / 32.0)).collect();
    let rope = backend.load_rope(&frequencies, 1.0, 2048)?;
    let x = backend.alloc_buffer(rows, HIDDEN)?;
    let qkv = backend.alloc_buffer(rows, SHAPE.qkv_cols())?;
    let logits = backend.alloc_buffer(batch, VOCAB)?;
    let act = backend.alloc_act(rows, HIDDEN)?;
    let hidden = backend.alloc_act(rows, FFN)?;
    let each = rows / batch;
    let blocks = blocks_for(context + each);
    let kv =
        backend.alloc_kv(KvLayout { layers: LAYERS, kv_heads: 3, head_dim: 64, ty: KvType::F16 }, blocks * batch)?;
    let spans: Vec<_> = (0..batch)
        .map(|i| SeqSpan {
            row0: (i * each) as u32,
            rows: each as u32,
            pos0: context as u32,
            table0: (i * blocks) as u32,
            table_len: blocks as u32,
        })
        .collect();
    let block_table: Vec<_> = (0..blocks * batch).map(|i| BlockId(i as u32)).collect();
    let (spans, block_table) = (&spans[..], &block_table[..]);
    let tokens: Vec<u32> = (0..rows).map(|i| (i * 97 % VOCAB) as u32).collect();
    let last: Vec<u32> = spans.iter().map(|span| span.row0 + span.rows - 1).collect();

    let mut steps = Vec::new();
    let mut t = Times::default();
    for _ in 0..STEPS {
        let start = Instant::now();
        t.measure("embed", || backend.embed(head, &tokens, 1.0, x))?;
        for (layer, w) in layers.iter().enumerate() {
            t.measure("norm", || backend.rms_norm(x, Rows::First(rows), norm, w.qkv, act))?;
            t.measure("qkv", || backend.linear(act, rows, w.qkv, Epilogue::Store, qkv))?;
            let store = RopeStore {
                qkv,
                shape: SHAPE,
                rope,
                pairs: RopePairs::Interleaved,
                query_scale: 0.125,
                qk_norm: None,
                kv,
                layer,
                spans,
                block_table,
            };
            t.measure("rope", || backend.rope_store(store))?;
            let attention = Attention {
                qkv,
                shape: SHAPE,
                softcap: None,
                window: None,
                kv,
                layer,
                spans,
                block_table,
                out: act,
                consumer: w.o,
            };
            t.measure("attention", || backend.attention(attention))?;
            t.measure("o", || backend.linear(act, rows, w.o, Epilogue::Add, x))?;
            t.measure("norm", || backend.rms_norm(x, Rows::First(rows), norm, w.gate_up, act))?;
            t.measure("gate_up", || backend.gate_up(act, rows, w.gate_up, GateFn::Silu, w.down, hidden))?;
            t.measure("down", || backend.linear(hidden, rows, w.down, Epilogue::Add, x))?;
        }
        t.measure("norm", || backend.rms_norm(x, Rows::Picked(&last), norm, head, act))?;
        t.measure("head", || backend.linear(act, batch, head, Epilogue::Store, logits))?;
        steps.push(start.elapsed().as_secs_f64());
    }
    steps.sort_by(f64::total_cmp);
    let ops: Vec<_> =
        t.0.into_iter()
            .map(|(op, mut calls)| {
                calls.sort_by(f64::total_cmp);
                (op, calls[calls.len() / 10] * calls.len() as f64 / STEPS as f64)
            })
            .collect();
    let total: f64 = ops.iter().map(|(_, seconds)| seconds).sum();
    println!(
        "\n{rows} rows of {batch} sequences after {context} tokens: median step {:.0} tok/s, fastest ops {:.0} tok/s",
        rows as f64 / steps[STEPS / 2],
        rows as f64 / total
    );
    for (op, seconds) in ops {
        println!("  {op:<10} {:>8.3} ms {:>5.1} %", seconds * 1e3, seconds / total * 100.0);
    }
    Ok(())
}
