//! The CPU backend.
//!
//! ```text
//!   CpuBackend ── Machine (isa, worker pool, scratch of each worker)
//!     │             ├── products   linear, gate_up, argmax, embed     over gemm (panels x tiles of rows)
//!     │             ├── norm       rms_norm, rms_norm_add
//!     │             ├── rope       rotation, writing keys and values
//!     │             └── attention  over the paged pool
//!     └── arenas    buffers (f32) · acts (int8 and/or f32) · weights (packed) · pools (f16 or int8)
//! ```
//!
//! One thread calls; each op shares its work out to the pool and returns when it is done. Nothing runs between calls.

mod act;
mod attention;
mod gemm;
mod isa;
mod lookahead;
mod norm;
mod packed;
mod pool;
mod products;
pub mod roofline;
pub(crate) mod rope;
mod simd;
pub(crate) mod spans;
mod threads;
mod weights;

#[cfg(test)]
pub(crate) mod tests;

use std::path::PathBuf;
use std::sync::Mutex;

use self::act::{Act, Form};
use self::attention::{AttentionOp, AttentionScratch};
use self::norm::{rms_norm, rms_norm_add};
use self::pool::Pool;
use self::products::{ArgmaxScratch, Machine, Target, Work, scratch};
use self::rope::{RopeStoreOp, RopeTable, StoreScratch};
use self::weights::{Linear, Store};
use crate::checks::{check_cols, check_order, next_id};
use crate::kv::KvType;
use crate::memory::{Arena, SharedMut};
use crate::{
    ActId, Attention, Backend, BufferId, Epilogue, Error, GateFn, KvId, KvLayout, LinearId, PartOrder, Result, RopeId,
    RopeStore, Rows, Turn, VectorId, WeightPart,
};

pub use isa::{ISA_VARIABLE, Isa};
pub use packed::checksum;
pub use threads::default_threads;

/// Settings of a [`CpuBackend`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuConfig {
    /// Worker threads, the calling one included; by default [`default_threads`].
    pub threads: Option<usize>,
    /// Instruction set; by default what [`ISA_VARIABLE`] names, else the best of this CPU.
    pub isa: Option<Isa>,
}

/// An f32 arena of shape `[rows, cols]`.
struct Buffer {
    rows: usize,
    cols: usize,
    values: Arena<f32>,
}

impl Buffer {
    fn check(&self, op: &'static str, rows: usize, cols: usize) -> Result<()> {
        if rows <= self.rows && cols == self.cols {
            return Ok(());
        }
        Err(Error::Shape {
            op,
            expected: format!("at most {} rows of {} columns", self.rows, self.cols),
            got: format!("{rows} rows of {cols}"),
        })
    }
}

/// A paged key/value pool.
struct KvPool {
    layout: KvLayout,
    values: Arena<u16>,
    /// Index of the attention scratch for heads of this size.
    scratch: usize,
}

impl KvPool {
    fn check_layer(&self, op: &'static str, layer: usize) -> Result<()> {
        if layer < self.layout.layers {
            return Ok(());
        }
        Err(Error::Shape { op, expected: format!("a layer below {}", self.layout.layers), got: layer.to_string() })
    }
}

/// The ops of a decoder on the CPU.
pub struct CpuBackend {
    machine: Machine,
    store: Store,
    vectors: Vec<Vec<f32>>,
    linears: Vec<Linear>,
    ropes: Vec<RopeTable>,
    buffers: Vec<Buffer>,
    acts: Vec<Act>,
    pools: Vec<KvPool>,
    attention: Vec<AttentionScratch>,
    store_scratch: StoreScratch,
    argmax: ArgmaxScratch,
    /// Results of `linear_argmax`.
    chosen: Vec<u32>,
    /// The matrix that was used last.
    last: Option<LinearId>,
}

impl CpuBackend {
    /// Starts the worker threads.
    ///
    /// # Errors
    /// [`Error::Isa`] when the instruction set asked for is not there, [`Error::Threads`] when the system refuses
    /// threads.
    pub fn new(config: CpuConfig) -> Result<Self> {
        let isa = Isa::choose(config.isa)?;
        let threads = config.threads.unwrap_or_else(default_threads).max(1);
        let pool = Pool::new(threads).map_err(|source| Error::Threads { count: threads, source })?;
        let work = (0..threads).map(|_| Work::new().map(Mutex::new)).collect::<Result<_>>()?;
        Ok(Self {
            machine: Machine { isa, pool, work },
            store: Store::default(),
            vectors: Vec::new(),
            linears: Vec::new(),
            ropes: Vec::new(),
            buffers: Vec::new(),
            acts: Vec::new(),
            pools: Vec::new(),
            attention: Vec::new(),
            store_scratch: StoreScratch::default(),
            argmax: ArgmaxScratch::default(),
            chosen: Vec::new(),
            last: None,
        })
    }

    /// Takes packed weights from the file at `path` where it holds those of `source`, a number that stands for the model's
    /// files; otherwise weights are packed, and [`Backend::weights_loaded`] writes the file. To be called before the first
    /// matrix is loaded.
    ///
    /// # Errors
    /// Why the file cannot be used as it is (such as that there is none), as a clause. Nothing is lost by it.
    pub fn use_packed_file(&mut self, path: PathBuf, source: u64) -> std::result::Result<(), String> {
        self.store.use_file(path, source, &mut self.machine.pool)
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.machine.isa
    }

    /// Makes the workers' scratch large enough for rows of `cols` columns.
    fn fit_scratch(&mut self, cols: usize) -> Result<()> {
        (0..self.machine.work.len())
            .try_for_each(|worker| scratch(&self.machine.work, worker).fit(self.machine.isa, cols))
    }

    /// Notes that a matrix is used, and has idle workers fetch the one that followed it last time.
    fn used(&mut self, weight: LinearId, rows: usize) {
        if let Some(last) = self.last.replace(weight) {
            self.linears[last.0 as usize].next = Some(weight);
        }
        if let Some(next) = self.linears[weight.0 as usize].next {
            self.machine.expect(&self.store, &self.linears[next.0 as usize], rows);
        }
    }

    /// What a consumer of `cols` columns needs its activations as.
    fn consumer(&self, op: &'static str, consumer: LinearId, cols: usize) -> Result<Form> {
        let linear = &self.linears[consumer.0 as usize];
        if linear.cols != cols {
            let expected = format!("{} columns, as its consumer reads", linear.cols);
            return Err(Error::Shape { op, expected, got: cols.to_string() });
        }
        Ok(linear.form)
    }
}

impl Backend for CpuBackend {
    fn describe(&self) -> String {
        let threads = self.machine.pool.threads();
        format!("cpu, {}, {threads} thread{}", self.machine.isa.name(), if threads == 1 { "" } else { "s" })
    }

    fn threads(&self) -> usize {
        self.machine.pool.threads()
    }

    fn bandwidth(&mut self) -> Result<f64> {
        roofline::read_bandwidth(self.machine.isa, self.machine.pool.threads())
    }

    fn linear_bytes(&self, weight: LinearId) -> u64 {
        self.linears[weight.0 as usize].bytes()
    }

    fn kv_position_bytes(&self, kv: KvId) -> u64 {
        (self.pools[kv.0 as usize].layout.block_bytes() / crate::kv::BLOCK_SIZE) as u64
    }

    fn allocated_bytes(&self) -> u64 {
        let scratch = (0..self.machine.work.len()).map(|worker| scratch(&self.machine.work, worker).bytes());
        let vectors = self.vectors.iter().map(|vector| size_of_val(vector.as_slice()));
        let ropes = self.ropes.iter().map(RopeTable::bytes);
        let buffers = self.buffers.iter().map(|buffer| buffer.values.bytes());
        let acts = self.acts.iter().map(Act::bytes);
        let pools = self.pools.iter().map(|pool| pool.values.bytes());
        let attention = self.attention.iter().map(AttentionScratch::bytes);
        let all = scratch.chain(vectors).chain(ropes).chain(buffers).chain(acts).chain(pools).chain(attention);
        self.store.total() + all.sum::<usize>() as u64
    }

    fn load_vector(&mut self, values: &[f32]) -> Result<VectorId> {
        let id = VectorId(next_id(&self.vectors));
        self.vectors.push(values.to_vec());
        Ok(id)
    }

    fn load_linear(&mut self, parts: &[WeightPart<'_>], order: PartOrder, bias: Option<&[f32]>) -> Result<LinearId> {
        let linear = Linear::pack(&mut self.store, &mut self.machine.pool, parts, order, bias)?;
        self.fit_scratch(linear.cols)?;
        let id = LinearId(next_id(&self.linears));
        self.linears.push(linear);
        Ok(id)
    }

    fn weights_loaded(&mut self) -> Result<()> {
        self.store.loaded(&mut self.machine.pool)
    }

    fn load_rope(&mut self, inv_freq: &[f64], scale: f64, max_positions: usize) -> Result<RopeId> {
        let id = RopeId(next_id(&self.ropes));
        self.ropes.push(RopeTable::new(inv_freq, scale, max_positions)?);
        Ok(id)
    }

    fn alloc_buffer(&mut self, rows: usize, cols: usize) -> Result<BufferId> {
        let values = Arena::zeroed(rows.saturating_mul(cols), "a buffer")?;
        let id = BufferId(next_id(&self.buffers));
        self.buffers.push(Buffer { rows, cols, values });
        Ok(id)
    }

    fn alloc_act(&mut self, rows: usize, cols: usize) -> Result<ActId> {
        let act = Act::new(rows, cols, products::tile_rows(self.machine.isa))?;
        let id = ActId(next_id(&self.acts));
        self.acts.push(act);
        Ok(id)
    }

    fn alloc_kv(&mut self, layout: KvLayout, num_blocks: usize) -> Result<KvId> {
        if layout.ty == KvType::Fp8 {
            let expected = "f16 or int8 keys and values on a CPU".into();
            return Err(Error::Shape { op: "alloc_kv", expected, got: layout.ty.name().into() });
        }
        let block = layout.block_words().saturating_mul(layout.layers);
        let values = Arena::zeroed(block.saturating_mul(num_blocks), "the key/value pool")?;
        self.attention.push(AttentionScratch::new(self.machine.pool.threads(), layout.head_dim)?);
        let id = KvId(next_id(&self.pools));
        self.pools.push(KvPool { layout, values, scratch: self.attention.len() - 1 });
        Ok(id)
    }

    fn embed(&mut self, table: LinearId, tokens: &[u32], scale: f32, out: BufferId) -> Result<()> {
        const OP: &str = "embed";
        let weight = &self.linears[table.0 as usize];
        let out = &mut self.buffers[out.0 as usize];
        out.check(OP, tokens.len(), weight.cols)?;
        check_order(OP, weight.order, PartOrder::Concat)?;
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= weight.rows) {
            let expected = format!("tokens below {}", weight.rows);
            return Err(Error::Shape { op: OP, expected, got: token.to_string() });
        }
        let out = SharedMut::new(&mut out.values);
        products::embed(&mut self.machine, &self.store, weight, (tokens, scale), out);
        Ok(())
    }

    fn keep_rows(&mut self, buffer: BufferId, rows: &[u32]) -> Result<()> {
        const OP: &str = "keep_rows";
        let buffer = &mut self.buffers[buffer.0 as usize];
        let cols = buffer.cols;
        buffer.check(OP, rows.last().map_or(0, |&row| row as usize + 1), cols)?;
        if !rows.is_sorted_by(|a, b| a < b) {
            return Err(Error::Shape { op: OP, expected: "rows in ascending order".into(), got: format!("{rows:?}") });
        }
        for (to, &from) in rows.iter().enumerate() {
            let from = from as usize * cols;
            buffer.values.copy_within(from..from + cols, to * cols);
        }
        Ok(())
    }

    fn rms_norm(
        &mut self,
        x: BufferId,
        rows: Rows<'_>,
        (weight, eps): (VectorId, f32),
        consumer: LinearId,
        out: ActId,
    ) -> Result<()> {
        const OP: &str = "rms_norm";
        let x = &self.buffers[x.0 as usize];
        let (weight, cols) = (&self.vectors[weight.0 as usize], x.cols);
        check_cols(OP, cols, weight.len())?;
        let end = match rows {
            Rows::First(n) => n,
            Rows::Picked(rows) => rows.iter().max().map_or(0, |&row| row as usize + 1),
        };
        x.check(OP, end, cols)?;
        let form = self.consumer(OP, consumer, cols)?;
        let act = &mut self.acts[out.0 as usize];
        check_cols(OP, cols, act.cols)?;
        let writer = act.begin(OP, rows.len(), form)?;
        let isa = self.machine.isa;
        self.machine.share(rows.len(), cols, &|chunk, _| {
            for i in chunk {
                let x = &x.values[rows.index(i) * cols..][..cols];
                // SAFETY: each row is in one chunk.
                unsafe { rms_norm(isa, x, weight, eps, (&writer, i)) };
            }
        });
        Ok(())
    }

    fn rms_norm_add(&mut self, y: BufferId, rows: usize, (weight, eps): (VectorId, f32), x: BufferId) -> Result<()> {
        const OP: &str = "rms_norm_add";
        let Ok([y, x]) = self.buffers.get_disjoint_mut([y.0 as usize, x.0 as usize]) else {
            return Err(Error::Shape { op: OP, expected: "two buffers".into(), got: "the same one twice".into() });
        };
        let (weight, cols) = (&self.vectors[weight.0 as usize], x.cols);
        check_cols(OP, cols, weight.len())?;
        y.check(OP, rows, cols)?;
        x.check(OP, rows, cols)?;
        let (isa, out) = (self.machine.isa, SharedMut::new(&mut x.values));
        self.machine.share(rows, cols, &|chunk, _| {
            for row in chunk {
                // SAFETY: each row is in one chunk.
                let out = unsafe { out.part(row * cols, cols) };
                rms_norm_add(isa, &y.values[row * cols..][..cols], weight, eps, out);
            }
        });
        Ok(())
    }

    fn linear(&mut self, x: ActId, rows: usize, weight: LinearId, epilogue: Epilogue, out: BufferId) -> Result<()> {
        const OP: &str = "linear";
        self.used(weight, rows);
        let weight = &self.linears[weight.0 as usize];
        check_order(OP, weight.order, PartOrder::Concat)?;
        let act = &self.acts[x.0 as usize];
        check_cols(OP, weight.cols, act.cols)?;
        let out = &mut self.buffers[out.0 as usize];
        out.check(OP, rows, weight.rows)?;
        let acts = act.read(OP, rows, weight.form)?;
        let target = Target { out: SharedMut::new(&mut out.values), add: epilogue == Epilogue::Add };
        products::linear(&mut self.machine, &self.store, weight, acts, target);
        Ok(())
    }

    fn gate_up(
        &mut self,
        x: ActId,
        rows: usize,
        weight: LinearId,
        f: GateFn,
        consumer: LinearId,
        out: ActId,
    ) -> Result<()> {
        const OP: &str = "gate_up";
        self.used(weight, rows);
        let weight = &self.linears[weight.0 as usize];
        check_order(OP, weight.order, PartOrder::GateUp)?;
        let form = self.consumer(OP, consumer, weight.rows / 2)?;
        let Ok([x, out]) = self.acts.get_disjoint_mut([x.0 as usize, out.0 as usize]) else {
            return Err(Error::Shape { op: OP, expected: "two arenas".into(), got: "the same one twice".into() });
        };
        check_cols(OP, weight.cols, x.cols)?;
        check_cols(OP, weight.rows / 2, out.cols)?;
        let acts = x.read(OP, rows, weight.form)?;
        let out = out.begin(OP, rows, form)?;
        products::gate_up(&mut self.machine, &self.store, weight, (acts, f), out);
        Ok(())
    }

    fn rope_store(&mut self, op: RopeStore<'_>) -> Result<()> {
        const OP: &str = "rope_store";
        let pool = &mut self.pools[op.kv.0 as usize];
        pool.check_layer(OP, op.layer)?;
        let qkv = &mut self.buffers[op.qkv.0 as usize];
        qkv.check(OP, 0, op.shape.qkv_cols())?;
        let vector = |id: VectorId| self.vectors[id.0 as usize].as_slice();
        let store = RopeStoreOp {
            shape: op.shape,
            rope: &self.ropes[op.rope.0 as usize],
            pairs: op.pairs,
            query_scale: op.query_scale,
            qk_norm: op.qk_norm.map(|(q, k, eps)| (vector(q), vector(k), eps)),
            layout: pool.layout,
            layer: op.layer,
            spans: op.spans,
            block_table: op.block_table,
        };
        let Machine { pool: workers, isa, .. } = &mut self.machine;
        rope::rope_store(workers, *isa, &mut self.store_scratch, &store, &mut qkv.values, &mut pool.values)
    }

    fn attention(&mut self, op: Attention<'_>) -> Result<()> {
        const OP: &str = "attention";
        let pool = &self.pools[op.kv.0 as usize];
        pool.check_layer(OP, op.layer)?;
        let qkv = &self.buffers[op.qkv.0 as usize];
        qkv.check(OP, 0, op.shape.qkv_cols())?;
        let cols = op.shape.heads * op.shape.head_dim;
        let form = self.consumer(OP, op.consumer, cols)?;
        let act = &mut self.acts[op.out.0 as usize];
        check_cols(OP, cols, act.cols)?;
        let rows = op.spans.iter().map(|span| span.row0 as usize + span.rows as usize).max().unwrap_or(0);
        let attention = AttentionOp {
            qkv: &qkv.values,
            shape: op.shape,
            softcap: op.softcap,
            window: op.window,
            kv: &pool.values,
            layout: pool.layout,
            layer: op.layer,
            spans: op.spans,
            block_table: op.block_table,
        };
        let scratch = &mut self.attention[pool.scratch];
        let isa = self.machine.isa;
        let out = act.begin(OP, rows, form)?;
        attention::attention(&mut self.machine.pool, isa, scratch, &attention, &out)
    }

    fn replay(&mut self, ops: &mut dyn FnMut(&mut dyn Backend) -> Result<()>) -> Result<()> {
        ops(self)
    }

    fn linear_argmax(&mut self, x: ActId, rows: usize, weight: LinearId, first: usize) -> Result<()> {
        const OP: &str = "linear_argmax";
        self.used(weight, rows);
        let weight = &self.linears[weight.0 as usize];
        check_order(OP, weight.order, PartOrder::Concat)?;
        let act = &self.acts[x.0 as usize];
        check_cols(OP, weight.cols, act.cols)?;
        let acts = act.read(OP, rows, weight.form)?;
        self.chosen.resize(first, 0);
        self.chosen.extend(products::argmax(&mut self.machine, &mut self.argmax, &self.store, weight, acts));
        Ok(())
    }

    fn chosen(&mut self, _turn: Turn, count: usize) -> Result<&[u32]> {
        let chosen = self.chosen.len();
        self.chosen.get(..count).ok_or_else(|| Error::Shape {
            op: "chosen",
            expected: format!("at most the {chosen} results there are"),
            got: count.to_string(),
        })
    }

    fn for_each_row(&mut self, buffer: BufferId, rows: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<()> {
        let buffer = &mut self.buffers[buffer.0 as usize];
        let cols = buffer.cols;
        buffer.check("for_each_row", rows, cols)?;
        let values = SharedMut::new(&mut buffer.values);
        self.machine.pool.run(rows, &|row, _worker| {
            // SAFETY: each row is one chunk.
            f(row, unsafe { values.part(row * cols, cols) });
        });
        Ok(())
    }
}
