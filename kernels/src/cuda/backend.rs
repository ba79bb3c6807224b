//! The ops of a decoder on a CUDA device.
//!
//! ```text
//!   CudaBackend ── Device (stream, kernels)
//!     ├── arenas    buffers f32 [rows, cols] · acts bf16 [rows, cols to a multiple of 32, zeros behind]
//!     ├── weights   Linear: tiles of bf16 or quants          products: small_* | expand_* + tile_* | plain_* + cuBLASLt
//!     ├── samplers  what draws tokens               sample_*
//!     ├── pools     bf16 or fp8, heads padded to a width that has kernels
//!     ├── passes    what ops read of rows and sequences      embed, rope_store, decode_*, prefill_*, attention_merge
//!     ├── results   tokens that passes have chosen           argmax, carry_tokens
//!     └── graphs    passes that were recorded
//! ```
//!
//! Every op checks its sizes as the CPU's do, then submits kernels and returns; only `chosen`, `draw` and ops on rows
//! of the host wait.
//! The residual stream and all projections are f32, what matrix products and attention multiply is bf16, sums are f32.

use std::sync::Arc;

use super::DeviceInfo;
use super::arenas::{Act, Buffer, Rope, Vector, act_stride};
use super::batch::Cut;
use super::driver::{Arg, Device, DeviceBytes, Launch};
use super::fields::{Fields, NULL};
use super::graphs::{Graphs, Next};
use super::host_rows::HostRows;
use super::large::Large;
use super::pass::Passes;
use super::pool::{NO_WINDOW, Pool, launch_attention};
use super::products::{Expanded, Finish, Output, product};
use super::results::Results;
use super::sampling::Sampler;
use super::weights::{Format, Linear};
use crate::checks::{check_cols, check_order, next_id};
use crate::cpu::rope::RopeTable;
use crate::kv::BLOCK_SIZE;
use crate::{
    ActId, Attention, Backend, BufferId, DrawRows, Drawn, Epilogue, Error, GateFn, HeadShape, KvId, KvLayout, LinearId,
    PartOrder, Pass, PassLimits, Recorded, Result, RopeId, RopePairs, RopeStore, Rows, SamplerId, Turn, VectorId,
    WeightPart,
};

/// The ops of a decoder on a CUDA device.
pub struct CudaBackend {
    device: Device,
    vectors: Vec<Vector>,
    linears: Vec<Linear>,
    ropes: Vec<Rope>,
    buffers: Vec<Buffer>,
    acts: Vec<Act>,
    pools: Vec<Pool>,
    samplers: Vec<Sampler>,
    passes: Passes,
    graphs: Graphs,
    expanded: Expanded,
    large: Large,
    results: Results,
    host: HostRows,
}

impl CudaBackend {
    /// Opens a device.
    ///
    /// # Errors
    /// [`Error::Device`] when the driver refuses.
    pub fn new(info: DeviceInfo) -> Result<Self> {
        Self::on(Device::open(info)?)
    }

    /// A backend on an open device.
    pub(super) fn on(device: Device) -> Result<Self> {
        Ok(Self {
            large: Large::new(&device),
            device,
            vectors: Vec::new(),
            linears: Vec::new(),
            ropes: Vec::new(),
            buffers: Vec::new(),
            acts: Vec::new(),
            pools: Vec::new(),
            samplers: Vec::new(),
            passes: Passes::default(),
            graphs: Graphs::default(),
            expanded: Expanded::default(),
            results: Results::default(),
            host: HostRows::new()?,
        })
    }

    /// Submits a kernel of one block for each row.
    fn launch_rows(&mut self, name: &'static str, rows: usize, block: u32, args: &[Arg]) -> Result<()> {
        let kernel = self.device.kernel("elementwise", name)?;
        self.device.launch(&kernel, Launch { grid: (rows as u32, 1), block, shared: 0 }, args)
    }

    /// That the rows of an op lie in its logits, one a draw; gives the number of their buffer.
    fn check_draws(&self, op: &DrawRows<'_>) -> Result<usize> {
        const OP: &str = "draw";
        let vocab = self.samplers[op.sampler.0 as usize].vocab();
        let logits = op.logits.0 as usize;
        self.buffers[logits].check(OP, op.draws.last().map_or(0, |(row, _)| *row as usize + 1), vocab)?;
        if !op.draws.is_sorted_by(|a, b| a.0 < b.0) {
            let rows: Vec<_> = op.draws.iter().map(|(row, _)| row).collect();
            return Err(Error::Shape { op: OP, expected: "rows in ascending order".into(), got: format!("{rows:?}") });
        }
        if op.softcap.is_some_and(|cap| !(cap > 0.0 && cap.is_finite())) {
            let expected = "a softcap above 0".into();
            return Err(Error::Shape { op: OP, expected, got: format!("{:?}", op.softcap) });
        }
        Ok(logits)
    }

    fn check_consumer(&self, op: &'static str, consumer: LinearId, cols: usize) -> Result<()> {
        let consumer = &self.linears[consumer.0 as usize];
        if consumer.cols == cols {
            return Ok(());
        }
        let expected = format!("{} columns, as its consumer reads", consumer.cols);
        Err(Error::Shape { op, expected, got: cols.to_string() })
    }
}

#[cfg(test)]
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
impl CudaBackend {
    /// Waits until all submitted work is done.
    pub(super) fn synchronize(&self) {
        self.device.synchronize().unwrap();
    }

    /// Copies of rows and sequences so far.
    pub(super) fn copies(&self) -> usize {
        self.passes.copies
    }

    /// What takes products of many rows.
    pub(super) fn large(&mut self) -> &mut Large {
        &mut self.large
    }

    /// The content of a pool, and the width of its heads.
    pub(super) fn pool_bytes(&self, kv: KvId) -> (Vec<u8>, usize) {
        let pool = &self.pools[kv.0 as usize];
        let mut bytes = vec![0; pool.values.len()];
        self.device.download(&pool.values, 0, &mut bytes).unwrap();
        (bytes, pool.width)
    }

    /// Fills a pool.
    pub(super) fn set_pool_bytes(&mut self, kv: KvId, bytes: &[u8]) {
        self.device.upload(&mut self.pools[kv.0 as usize].values, 0, bytes).unwrap();
    }
}

/// Copies f32 values to new device memory.
fn upload_floats(device: &mut Device, values: &[f32], what: &'static str) -> Result<DeviceBytes> {
    let mut memory = device.alloc(size_of_val(values), what)?;
    // In pieces, so that a large table does not exist three times.
    let mut bytes = Vec::new();
    for (i, piece) in values.chunks(1 << 20).enumerate() {
        bytes.clear();
        bytes.extend(piece.iter().flat_map(|value| value.to_le_bytes()));
        device.upload(&mut memory, i << 22, &bytes)?;
    }
    Ok(memory)
}

impl Backend for CudaBackend {
    fn describe(&self) -> String {
        let info = self.device.info();
        let (major, minor) = info.capability;
        format!("cuda:{}, {}, compute capability {major}.{minor}", info.ordinal, info.name)
    }

    fn describe_products(&self) -> Option<String> {
        Some(self.large.describe())
    }

    fn threads(&self) -> usize {
        1
    }

    fn bandwidth(&mut self) -> Result<f64> {
        self.device.copy_bandwidth()
    }

    fn linear_bytes(&self, weight: LinearId) -> u64 {
        let parts = self.linears[weight.0 as usize].parts.iter();
        parts.map(|part| part.tiles.len() + part.scales.as_ref().map_or(0, DeviceBytes::len)).sum::<usize>() as u64
    }

    fn kv_position_bytes(&self, kv: KvId) -> u64 {
        (super::kv_block_bytes(self.pools[kv.0 as usize].layout) / BLOCK_SIZE) as u64
    }

    fn allocated_bytes(&self) -> u64 {
        self.device.allocated()
    }

    fn load_vector(&mut self, values: &[f32]) -> Result<VectorId> {
        let id = VectorId(next_id(&self.vectors));
        let memory = upload_floats(&mut self.device, values, "a vector of parameters")?;
        self.vectors.push(Vector { len: values.len(), values: memory });
        Ok(id)
    }

    fn load_linear(&mut self, parts: &[WeightPart<'_>], order: PartOrder, bias: Option<&[f32]>) -> Result<LinearId> {
        let linear = Linear::load(&mut self.device, parts, order, bias)?;
        self.expanded.fit(&mut self.device, &linear)?;
        let id = LinearId(next_id(&self.linears));
        self.linears.push(linear);
        Ok(id)
    }

    fn load_rope(&mut self, inv_freq: &[f64], scale: f64, max_positions: usize) -> Result<RopeId> {
        let table = RopeTable::new(inv_freq, scale, max_positions)?;
        let values = upload_floats(&mut self.device, table.values(), "a rotary table")?;
        let id = RopeId(next_id(&self.ropes));
        self.ropes.push(Rope { pairs: inv_freq.len(), positions: table.positions(), values });
        Ok(id)
    }

    fn alloc_buffer(&mut self, rows: usize, cols: usize) -> Result<BufferId> {
        let values = self.device.alloc_zeroed(rows.saturating_mul(cols).saturating_mul(4), "a buffer")?;
        let id = BufferId(next_id(&self.buffers));
        self.buffers.push(Buffer { rows, cols, values });
        Ok(id)
    }

    fn alloc_act(&mut self, rows: usize, cols: usize) -> Result<ActId> {
        self.large.fit(&mut self.device, rows)?;
        let stride = act_stride(cols);
        let values = self.device.alloc_zeroed(rows.saturating_mul(stride).saturating_mul(2), "activations")?;
        let id = ActId(next_id(&self.acts));
        self.acts.push(Act { rows, cols, stride, ready: 0, values });
        Ok(id)
    }

    fn alloc_kv(&mut self, layout: KvLayout, num_blocks: usize) -> Result<KvId> {
        let pool = Pool::new(&mut self.device, layout, num_blocks)?;
        let id = KvId(next_id(&self.pools));
        self.pools.push(pool);
        Ok(id)
    }

    fn alloc_sampler(&mut self, rows: usize, vocab: usize) -> Result<Option<SamplerId>> {
        let sampler = Sampler::new(&mut self.device, rows, vocab)?;
        let id = SamplerId(next_id(&self.samplers));
        self.samplers.push(sampler);
        Ok(Some(id))
    }

    fn embed(&mut self, table: LinearId, tokens: &[u32], scale: f32, out: BufferId) -> Result<()> {
        const OP: &str = "embed";
        let weight = &self.linears[table.0 as usize];
        self.buffers[out.0 as usize].check(OP, tokens.len(), weight.cols)?;
        check_order(OP, weight.order, PartOrder::Concat)?;
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= weight.rows) {
            let expected = format!("tokens below {}", weight.rows);
            return Err(Error::Shape { op: OP, expected, got: token.to_string() });
        }
        let [part] = &weight.parts[..] else {
            let got = format!("{} parts", weight.parts.len());
            return Err(Error::Shape { op: OP, expected: "a table of one part".into(), got });
        };
        let name = match part.format {
            Format::Bf16 => "embed_bf16",
            Format::Q4 => "embed_q4",
            Format::Q8 => "embed_q8",
            Format::Q8Half => "embed_q8h",
        };
        let (tiles, scales) = (part.tiles.at(0), part.scales.as_ref().map_or(NULL, |scales| scales.at(0)));
        let (blocks, cols) = (weight.blocks() as u32, weight.cols as u32);
        let ids = self.passes.tokens(&mut self.device, (tokens, weight.rows))?;
        let out = self.buffers[out.0 as usize].values.at(0);
        let args = [tiles, scales, ids, out, Arg::U32(blocks), Arg::U32(cols), Arg::F32(scale)];
        self.launch_rows(name, tokens.len(), 128, &args)
    }

    fn keep_rows(&mut self, buffer: BufferId, rows: &[u32]) -> Result<()> {
        const OP: &str = "keep_rows";
        let id = buffer;
        let buffer = &self.buffers[id.0 as usize];
        let cols = buffer.cols;
        buffer.check(OP, rows.last().map_or(0, |&row| row as usize + 1), cols)?;
        if !rows.is_sorted_by(|a, b| a < b) {
            return Err(Error::Shape { op: OP, expected: "rows in ascending order".into(), got: format!("{rows:?}") });
        }
        // Rows that stay where they are, as in a batch of decoding sequences, need no work.
        if rows.last().is_none_or(|&last| last as usize + 1 == rows.len()) {
            return Ok(());
        }
        let ids = self.passes.kept(&mut self.device, rows)?;
        let (name, cols) = if cols.is_multiple_of(4) { ("keep_rows_4", cols / 4) } else { ("keep_rows_1", cols) };
        let values = self.buffers[id.0 as usize].values.at(0);
        let args = [values, ids, Arg::U32(rows.len() as u32), Arg::U32(cols as u32)];
        self.launch_rows(name, cols.div_ceil(64), 64, &args)
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
        let buffer = &self.buffers[x.0 as usize];
        let cols = buffer.cols;
        check_cols(OP, cols, self.vectors[weight.0 as usize].len)?;
        let end = match rows {
            Rows::First(n) => n,
            Rows::Picked(rows) => rows.iter().max().map_or(0, |&row| row as usize + 1),
        };
        buffer.check(OP, end, cols)?;
        self.check_consumer(OP, consumer, cols)?;
        self.acts[out.0 as usize].check(OP, rows.len(), cols)?;
        let (first, ids) = match rows {
            Rows::First(_) => (0, NULL),
            // Neighbours need no list.
            Rows::Picked(rows) if rows.windows(2).all(|pair| pair[0] + 1 == pair[1]) => {
                (rows.first().map_or(0, |&row| row as usize), NULL)
            }
            Rows::Picked(rows) => (0, self.passes.kept(&mut self.device, rows)?),
        };
        let act = &mut self.acts[out.0 as usize];
        act.ready = rows.len();
        let args = [
            self.buffers[x.0 as usize].values.at(4 * first * cols),
            ids,
            self.vectors[weight.0 as usize].values.at(0),
            act.values.at(0),
            Arg::U32(cols as u32),
            Arg::U32(act.stride as u32),
            Arg::F32(eps),
        ];
        self.launch_rows("rms_norm", rows.len(), 256, &args)
    }

    fn rms_norm_add(&mut self, y: BufferId, rows: usize, (weight, eps): (VectorId, f32), x: BufferId) -> Result<()> {
        const OP: &str = "rms_norm_add";
        if x == y {
            return Err(Error::Shape { op: OP, expected: "two buffers".into(), got: "the same one twice".into() });
        }
        let (y, x) = (&self.buffers[y.0 as usize], &self.buffers[x.0 as usize]);
        let (weight, cols) = (&self.vectors[weight.0 as usize], x.cols);
        check_cols(OP, cols, weight.len)?;
        y.check(OP, rows, cols)?;
        x.check(OP, rows, cols)?;
        let args = [y.values.at(0), weight.values.at(0), x.values.at(0), Arg::U32(cols as u32), Arg::F32(eps)];
        self.launch_rows("rms_norm_add", rows, 256, &args)
    }

    fn linear(&mut self, x: ActId, rows: usize, weight: LinearId, epilogue: Epilogue, out: BufferId) -> Result<()> {
        const OP: &str = "linear";
        let weight = &self.linears[weight.0 as usize];
        check_order(OP, weight.order, PartOrder::Concat)?;
        let x = self.acts[x.0 as usize].read(OP, rows, weight.cols)?;
        let out = &self.buffers[out.0 as usize];
        out.check(OP, rows, weight.rows)?;
        let out = Output { memory: &out.values, stride: out.cols, index: None };
        product(&mut self.device, (&self.expanded, &mut self.large), weight, x, epilogue.into(), out)
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
        let weight = &self.linears[weight.0 as usize];
        check_order(OP, weight.order, PartOrder::GateUp)?;
        self.check_consumer(OP, consumer, weight.rows / 2)?;
        let Ok([x, out]) = self.acts.get_disjoint_mut([x.0 as usize, out.0 as usize]) else {
            return Err(Error::Shape { op: OP, expected: "two arenas".into(), got: "the same one twice".into() });
        };
        let x = x.read(OP, rows, weight.cols)?;
        out.check(OP, rows, weight.rows / 2)?;
        out.ready = rows;
        let out = Output { memory: &out.values, stride: out.stride, index: None };
        product(&mut self.device, (&self.expanded, &mut self.large), weight, x, f.into(), out)
    }

    fn rope_store(&mut self, op: RopeStore<'_>) -> Result<()> {
        const OP: &str = "rope_store";
        /// Heads of a block, one a warp.
        const HEADS: usize = 4;
        let refuse = |expected: String, got: String| Err(Error::Shape { op: OP, expected, got });
        let pool = &self.pools[op.kv.0 as usize];
        pool.check(OP, op.layer, op.shape)?;
        let qkv = &self.buffers[op.qkv.0 as usize];
        qkv.check(OP, 0, op.shape.qkv_cols())?;
        let HeadShape { heads, kv_heads, head_dim } = op.shape;
        let rope = &self.ropes[op.rope.0 as usize];
        if 2 * rope.pairs > head_dim {
            return refuse(format!("at most {head_dim} rotary dimensions"), (2 * rope.pairs).to_string());
        }
        if let Some(span) = op.spans.iter().find(|span| span.pos0 as usize + span.rows as usize > rope.positions) {
            return refuse(format!("positions below {}", rope.positions), format!("{span:?}"));
        }
        let (mut norms, mut eps) = ([NULL; 2], 0.0);
        if let Some((q, k, norm_eps)) = op.qk_norm {
            let vectors = [q, k].map(|id| &self.vectors[id.0 as usize]);
            if vectors.iter().any(|vector| vector.len != head_dim) {
                let got = format!("{} and {}", vectors[0].len, vectors[1].len);
                return refuse(format!("norm weights of {head_dim} values"), got);
            }
            (norms, eps) = (vectors.map(|vector| vector.values.at(0)), norm_eps);
        }
        let sequences = (op.spans, op.block_table);
        let view = self.passes.view(&mut self.device, (OP, None), sequences, (pool.blocks, qkv.rows))?;
        // `RopeStore` of `cu/rope.cu`.
        let fields = Fields::default()
            .inner(pool.fields(op.layer))
            .pointer(qkv.values.at(0))
            .pointer(view.positions)
            .pointer(view.places)
            .pointer(rope.values.at(0))
            .pointer(norms[0])
            .pointer(norms[1])
            .number(heads)
            .number(head_dim)
            .number(rope.pairs)
            .number(usize::from(op.pairs == RopePairs::Interleaved))
            .float(op.query_scale)
            .float(eps);
        let kernel = self.device.kernel("rope", pool.store_kernel())?;
        let grid = (view.rows.min(qkv.rows) as u32, (heads + 2 * kv_heads).div_ceil(HEADS) as u32);
        self.device.launch(&kernel, Launch { grid, block: 32 * HEADS as u32, shared: 0 }, &[Arg::Fields(fields)])
    }

    fn attention(&mut self, op: Attention<'_>) -> Result<()> {
        const OP: &str = "attention";
        let refuse = |expected: &str, got: String| Err(Error::Shape { op: OP, expected: expected.into(), got });
        let pool = &self.pools[op.kv.0 as usize];
        pool.check(OP, op.layer, op.shape)?;
        let qkv = &self.buffers[op.qkv.0 as usize];
        qkv.check(OP, 0, op.shape.qkv_cols())?;
        let HeadShape { heads, kv_heads, head_dim } = op.shape;
        let cols = heads * head_dim;
        self.check_consumer(OP, op.consumer, cols)?;
        if op.window == Some(0) {
            return refuse("a window of at least 1", "0".into());
        }
        if op.softcap.is_some_and(|cap| !(cap > 0.0 && cap.is_finite())) {
            return refuse("a softcap above 0", format!("{:?}", op.softcap));
        }
        let out = &mut self.acts[op.out.0 as usize];
        let rows = op.spans.iter().map(|span| span.row0 as usize + span.rows as usize).max().unwrap_or(0);
        out.check(OP, rows, cols)?;
        let cut = Cut { group: heads / kv_heads, window: op.window };
        let sequences = (op.spans, op.block_table);
        let view = self.passes.view(&mut self.device, (OP, Some(cut)), sequences, (pool.blocks, qkv.rows))?;
        // Rows of no sequence keep what was there before: nothing that is read depends on them.
        out.ready = if view.padded { view.rows.min(out.rows) } else { rows };
        let fields = |items: Arg| {
            // `Attention` of `cu/attention.cuh`.
            let fields = Fields::default()
                .inner(pool.fields(op.layer))
                .pointer(qkv.values.at(0))
                .pointer(view.table)
                .pointer(items)
                .pointer(out.values.at(0))
                .pointer(pool.partial.at(0))
                .pointer(pool.partial_state.at(0))
                .number(heads)
                .number(head_dim)
                .number(out.stride)
                .float(op.softcap.unwrap_or(0.0))
                // Kernels see positions in a window by an unsigned difference, which is below 2^31 for those alone.
                .number(op.window.unwrap_or(NO_WINDOW).min(NO_WINDOW));
            [Arg::Fields(fields)]
        };
        launch_attention(&mut self.device, pool, &view, fields)
    }

    fn linear_argmax(&mut self, x: ActId, rows: usize, weight: LinearId, first: usize) -> Result<()> {
        const OP: &str = "linear_argmax";
        let weight = &self.linears[weight.0 as usize];
        check_order(OP, weight.order, PartOrder::Concat)?;
        let x = self.acts[x.0 as usize].read(OP, rows, weight.cols)?;
        let panels = weight.panels();
        let ([values, features], place) = self.results.argmax(&mut self.device, (rows, panels), first + rows)?;
        let output = Output { memory: values, stride: panels, index: Some(features) };
        product(&mut self.device, (&self.expanded, &mut self.large), weight, x, Finish::Argmax, output)?;
        let kernel = self.device.kernel("elementwise", "argmax")?;
        let args = [values.at(0), features.at(0), place.there.at(4 * first), Arg::U32(panels as u32)];
        self.device.launch(&kernel, Launch { grid: (rows as u32, 1), block: 256, shared: 0 }, &args)?;
        place.copy_back(&self.device, first, rows, weight.rows)
    }

    fn chosen(&mut self, turn: Turn, count: usize) -> Result<&[u32]> {
        self.results.chosen(turn, count)
    }

    fn reserve(&mut self, limits: &PassLimits<'_>) -> Result<()> {
        self.passes.reserve(&mut self.device, limits)?;
        let panels = self.linears[limits.head.0 as usize].panels();
        self.results.reserve(&mut self.device, (limits.head_rows, panels), limits.rows)
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn begin_pass(&mut self, pass: &Pass<'_>) -> Result<()> {
        const OP: &str = "begin_pass";
        let blocks = self.pools.iter().map(|pool| pool.blocks).min().unwrap_or(0);
        let positions = self.ropes.iter().map(|rope| rope.positions).min().unwrap_or(0);
        if let Some(span) = pass.spans.iter().find(|span| span.pos0 as usize + span.rows as usize > positions) {
            let expected = format!("positions below {positions}");
            return Err(Error::Shape { op: OP, expected, got: format!("{span:?}") });
        }
        if let Some(span) = pass.spans.iter().find(|span| pass.repeated.is_some() && span.rows != 1) {
            let expected = "one row of each sequence in a pass that is repeated".into();
            return Err(Error::Shape { op: OP, expected, got: format!("{span:?}") });
        }
        let source = self.results.source(pass)?;
        self.results.begin(pass.turn);
        self.passes.begin(&mut self.device, (pass, source), blocks)
    }

    fn replay(&mut self, ops: &mut dyn FnMut(&mut dyn Backend) -> Result<()>) -> Result<()> {
        let (key, generation) = (self.passes.key(), self.passes.generation());
        match self.graphs.next(key, generation) {
            Next::Run => return ops(self),
            Next::Launch(graph) => return self.device.replay(graph),
            Next::Record => {}
        }
        let stream = Arc::clone(&self.device.stream);
        self.passes.hold(true);
        let recorded = Device::record(&stream, || ops(self));
        self.passes.hold(false);
        match recorded {
            Ok(graph) => {
                self.device.replay(&graph)?;
                self.graphs.keep(key.expect("only passes with a key are recorded"), graph);
                Ok(())
            }
            Err(error) => {
                self.graphs.give_up(error.to_string());
                ops(self)
            }
        }
    }

    fn record_passes(&mut self, wanted: bool) -> bool {
        self.graphs.want(wanted)
    }

    fn recorded(&self) -> Recorded {
        self.graphs.recorded()
    }

    fn for_each_row(&mut self, buffer: BufferId, rows: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<()> {
        self.take_rows(buffer, Rows::First(rows), f)?;
        self.host.give_back(&self.device, &mut self.buffers[buffer.0 as usize], rows)
    }

    fn take_rows(&mut self, buffer: BufferId, rows: Rows<'_>, f: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<()> {
        self.host.take(&self.device, &self.buffers[buffer.0 as usize], rows, f)
    }

    fn draw(&mut self, op: DrawRows<'_>, out: &mut Vec<Drawn>) -> Result<()> {
        let logits = self.check_draws(&op)?;
        out.clear();
        let sampler = &mut self.samplers[op.sampler.0 as usize];
        sampler.draw(&mut self.device, &self.buffers[logits].values, (op.softcap, op.draws), out)
    }

    fn submit_draws(&mut self, op: DrawRows<'_>, first: usize) -> Result<()> {
        let logits = self.check_draws(&op)?;
        let (rows, sampler) = (op.draws.len(), &mut self.samplers[op.sampler.0 as usize]);
        let place = self.results.place(&mut self.device, first + rows)?;
        let to = (&place.there, first);
        sampler.submit(&mut self.device, &self.buffers[logits].values, (op.softcap, op.draws), Some(to))?;
        place.copy_back(&self.device, first, rows, sampler.vocab())
    }
}
