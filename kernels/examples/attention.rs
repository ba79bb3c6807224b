//! Measures attention and the write of keys and values, with the shape of SmolLM2-135M: 30 layers, 9 heads, 3 key/value
//! heads of 64 dimensions.
//!
//! `cargo run --release -p cupola-kernels --example attention [THREADS]`
//!
//! Every layer has keys and values of its own, as in a model: together they exceed the caches once sequences are long.
//! Printed are the fastest tenth and the median of all calls, times the number of layers.

use std::time::{Duration, Instant};

use cupola_kernels::cpu::{CpuBackend, CpuConfig, default_threads};
use cupola_kernels::kv::blocks_for;
use cupola_kernels::{
    ActId, Attention, Backend, BlockId, BufferId, HeadShape, KvId, KvLayout, KvType, LinearId, PartOrder, Result,
    RopeId, RopePairs, RopeStore, SeqSpan, WeightPart, WeightType,
};

const LAYERS: usize = 30;
const SHAPE: HeadShape = HeadShape { heads: 9, kv_heads: 3, head_dim: 64 };

/// One step: its name, and for each sequence the first position and the rows.
const STEPS: [(&str, &[(usize, usize)]); 6] = [
    ("prefill 512", &[(0, 512)]),
    ("prefill 512 after 1536", &[(1536, 512)]),
    ("decode at 128", &[(127, 1)]),
    ("decode at 2048", &[(2047, 1)]),
    ("decode 16 at 512", &[(511, 1); 16]),
    ("decode 32 at 512", &[(511, 1); 32]),
];

fn main() -> Result<()> {
    let threads = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or_else(default_threads);
    println!("{:<24} {:>10} {:>10} {:>9} {:>7} {:>10}", "", "ms", "median", "GFLOP/s", "GB/s", "rope ms");
    for (name, sequences) in STEPS {
        let mut step = Step::new(CpuConfig { threads: Some(threads), isa: None }, sequences)?;
        let rope = measure(|layer| step.rope_store(layer))?;
        let times = measure(|layer| step.attention(layer))?;
        let seen: usize = sequences.iter().map(|&(pos0, rows)| (0..rows).map(|i| pos0 + i + 1).sum::<usize>()).sum();
        let positions: usize = sequences.iter().map(|&(pos0, rows)| pos0 + rows).sum();
        // A product and a sum for each dimension of a key, and of a value.
        let flop = (seen * SHAPE.heads * SHAPE.head_dim * 4 * LAYERS) as f64;
        let bytes = (positions * SHAPE.kv_heads * SHAPE.head_dim * 4 * LAYERS) as f64;
        println!(
            "{name:<24} {:>10.3} {:>10.3} {:>9.1} {:>7.1} {:>10.3}",
            times.fast * 1e3,
            times.median * 1e3,
            flop / times.fast / 1e9,
            bytes / times.fast / 1e9,
            rope.fast * 1e3
        );
    }
    Ok(())
}

/// Seconds for all layers.
struct Times {
    fast: f64,
    median: f64,
}

/// Calls `op` for all layers in turn for a while.
fn measure(mut op: impl FnMut(usize) -> Result<()>) -> Result<Times> {
    let mut times = Vec::new();
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(800) || times.len() < 3 * LAYERS {
        for layer in 0..LAYERS {
            let start = Instant::now();
            op(layer)?;
            times.push(start.elapsed().as_secs_f64());
        }
    }
    times.sort_by(f64::total_cmp);
    let all = LAYERS as f64;
    Ok(Times { fast: times[times.len() / 10] * all, median: times[times.len() / 2] * all })
}

/// A backend with one batch.
struct Step {
    backend: CpuBackend,
    qkv: BufferId,
    rope: RopeId,
    kv: KvId,
    out: ActId,
    consumer: LinearId,
    spans: Vec<SeqSpan>,
    table: Vec<BlockId>,
}

impl Step {
    fn new(config: CpuConfig, sequences: &[(usize, usize)]) -> Result<Self> {
        let mut backend = CpuBackend::new(config)?;
        let (mut spans, mut rows, mut blocks) = (Vec::new(), 0, 0);
        for &(pos0, count) in sequences {
            let table_len = blocks_for(pos0 + count);
            let [row0, count32, pos0, table0, table_len32] = [rows, count, pos0, blocks, table_len].map(|n| n as u32);
            spans.push(SeqSpan { row0, rows: count32, pos0, table0, table_len: table_len32 });
            (rows, blocks) = (rows + count, blocks + table_len);
        }
        // Blocks out of order, as they are after some hours of service.
        let table: Vec<_> = (0..blocks).map(|i| BlockId((i ^ 5) as u32)).collect();
        let cols = SHAPE.heads * SHAPE.head_dim;
        let ty = WeightType::Q4_1;
        let data = vec![0; cols * ty.row_bytes(cols).expect("576 columns are whole blocks")];
        let part = WeightPart { ty, rows: cols, cols, data: &data };
        let consumer = backend.load_linear(&[part], PartOrder::Concat, None)?;
        let inv_freq: Vec<_> = (0..32).map(|i| 100_000_f64.powf(-f64::from(i) / 32.0)).collect();
        let rope = backend.load_rope(&inv_freq, 1.0, 4096)?;
        let layout = KvLayout { layers: LAYERS, kv_heads: SHAPE.kv_heads, head_dim: SHAPE.head_dim, ty: KvType::F16 };
        let kv = backend.alloc_kv(layout, blocks + 8)?;
        let qkv = backend.alloc_buffer(rows, SHAPE.qkv_cols())?;
        let out = backend.alloc_act(rows, cols)?;
        let mut step = Self { backend, qkv, rope, kv, out, consumer, spans, table };
        step.fill()?;
        Ok(step)
    }

    /// Writes keys and values to every position of every layer: a sequence at a time, as many rows as there are.
    fn fill(&mut self) -> Result<()> {
        let spans = std::mem::take(&mut self.spans);
        let rows = spans.iter().map(|span| span.rows).sum::<u32>();
        for span in &spans {
            for pos0 in (0..span.pos0 + span.rows).step_by(rows as usize) {
                let count = rows.min(span.pos0 + span.rows - pos0);
                self.backend.for_each_row(self.qkv, rows as usize, &|row, values| {
                    for (i, value) in values.iter_mut().enumerate() {
                        *value = ((row * 7919 + i * 104_729 + pos0 as usize) % 2003) as f32 / 1001.5 - 1.0;
                    }
                })?;
                self.spans = vec![SeqSpan { row0: 0, rows: count, pos0, ..*span }];
                (0..LAYERS).try_for_each(|layer| self.rope_store(layer))?;
            }
        }
        self.spans = spans;
        Ok(())
    }

    fn rope_store(&mut self, layer: usize) -> Result<()> {
        self.backend.rope_store(RopeStore {
            qkv: self.qkv,
            shape: SHAPE,
            rope: self.rope,
            pairs: RopePairs::Interleaved,
            query_scale: 0.125,
            qk_norm: None,
            kv: self.kv,
            layer,
            spans: &self.spans,
            block_table: &self.table,
        })
    }

    fn attention(&mut self, layer: usize) -> Result<()> {
        self.backend.attention(Attention {
            qkv: self.qkv,
            shape: SHAPE,
            softcap: None,
            window: None,
            kv: self.kv,
            layer,
            spans: &self.spans,
            block_table: &self.table,
            out: self.out,
            consumer: self.consumer,
        })
    }
}
