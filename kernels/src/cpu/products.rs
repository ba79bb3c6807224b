//! The ops around matrix products: how panels and rows are shared out to the workers, and what happens to the results.
//!
//! ```text
//!   Concat   chunk of panels ──> for each group of 128 rows: multiply -> stage [panels][rows][16] -> bias, store or add | argmax
//!   GateUp   chunk of units  ──> 2 gate and 2 up panels each -> stages -> f(gate) * up -> 32 columns, quantised in place
//! ```
//!
//! As many panels are multiplied at a time as a stage has room for: with one row, a hundred, whose bytes stream through
//! without a pause.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::act::{ActReader, ActWriter};
use super::gemm::{GROUP, Group, Lanes, multiply};
use super::isa::Isa;
use super::pool::Pool;
use super::simd::{Kernel, LANES, Simd, dispatch};
use super::weights::{Linear, Panel, Store};
use crate::format::ggml::BLOCK;
use crate::format::pack::{PANEL, panel_row};
use crate::memory::{Arena, SharedMut};
use crate::{GateFn, PartOrder, Result};

/// Entries of a stage: two panels of a full group.
const STAGE: usize = 2 * GROUP;

/// Scratch memory of one worker.
pub(super) struct Work {
    /// Products of panels with one group of rows, panel by panel: of one matrix, or of the gate and of the up matrix.
    stages: [Arena<Lanes>; 2],
    /// What the instruction set unpacks a panel into.
    unpacked: Arena<u8>,
}

impl Work {
    /// Scratch for matrices without columns; see [`Work::fit`].
    pub(super) fn new() -> Result<Self> {
        let what = "scratch memory of a worker";
        let stage = || Arena::zeroed(STAGE, what);
        Ok(Self { stages: [stage()?, stage()?], unpacked: Arena::zeroed(0, what)? })
    }

    /// Grows the scratch for rows of `cols` columns.
    pub(super) fn fit(&mut self, isa: Isa, cols: usize) -> Result<()> {
        let what = "scratch memory of a worker";
        let bytes = scratch_bytes(isa, cols);
        if self.unpacked.len() < bytes {
            self.unpacked = Arena::zeroed(bytes, what)?;
        }
        Ok(())
    }

    /// Size in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.stages.iter().map(Arena::bytes).sum::<usize>() + self.unpacked.bytes()
    }
}

/// Bytes of scratch that products with rows of `cols` columns want.
pub(super) fn scratch_bytes(isa: Isa, cols: usize) -> usize {
    struct ScratchBytes(usize);
    impl Kernel for ScratchBytes {
        type Output = usize;

        #[inline(always)]
        fn run<S: Simd>(self, _: S) -> usize {
            S::scratch_bytes(self.0)
        }
    }
    dispatch(isa, ScratchBytes(cols))
}

/// Rows of an activation tile of `isa`.
pub(super) fn tile_rows(isa: Isa) -> usize {
    struct TileRows;
    impl Kernel for TileRows {
        type Output = usize;

        #[inline(always)]
        fn run<S: Simd>(self, _: S) -> usize {
            S::TILE_ROWS
        }
    }
    dispatch(isa, TileRows)
}

/// What every op needs: threads, instruction set, scratch of each worker.
pub(super) struct Machine {
    pub(super) isa: Isa,
    pub(super) pool: Pool,
    pub(super) work: Vec<Mutex<Work>>,
}

/// The scratch of a worker, which no one else uses meanwhile: worker indices are distinct.
pub(super) fn scratch(work: &[Mutex<Work>], worker: usize) -> MutexGuard<'_, Work> {
    work[worker].lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    /// Shares `items` of about `cost` nanoseconds each out to the workers, in runs of consecutive ones.
    pub(super) fn share(&mut self, items: usize, cost: usize, job: &(dyn Fn(Range<usize>, &mut Work) + Sync)) {
        let runs = self.runs(items, cost);
        let Machine { pool, work, .. } = self;
        pool.run_apart(runs, &|run, worker| {
            job(run_start(items, runs, run)..run_start(items, runs, run + 1), &mut scratch(work, worker));
        });
    }

    /// How many runs [`Machine::share`] makes: as many for each thread where that is possible.
    fn runs(&self, items: usize, cost: usize) -> usize {
        /// Less than this is not worth the trouble of waking another thread, in nanoseconds.
        const INLINE: usize = 3000;
        /// Runs for each thread: enough that a slow thread leaves its share to the others.
        const RUNS: usize = 6;
        let (threads, total) = (self.pool.threads(), items.saturating_mul(cost));
        let runs = match total / INLINE {
            0 => 1,
            runs if runs < threads => runs.max(2),
            runs => runs.min(threads * RUNS).next_multiple_of(threads),
        };
        runs.min(items)
    }

    /// Says that a matrix will be multiplied with `rows` rows soon: threads that wait fetch what they will read of it. For
    /// [`argmax`], whose runs end elsewhere, that is nearly so.
    pub(super) fn expect(&self, store: &Store, weight: &Linear, rows: usize) {
        /// More rows than these have their products bound by arithmetic.
        const ROWS: usize = 32;
        /// Bytes for each thread: a part of its L2 cache.
        const AHEAD: usize = 128 << 10;
        if rows > ROWS {
            return;
        }
        let (items, cost, panels) = match weight.order {
            PartOrder::Concat => panel_items(weight, rows),
            PartOrder::GateUp => unit_items(weight, rows),
        };
        let runs = self.runs(items, cost);
        self.pool.expect(runs, |run| {
            let first = run_start(items, runs, run) * panels;
            match weight.order {
                PartOrder::Concat => [weight.bytes_from(store, first, AHEAD), &[]],
                PartOrder::GateUp => [0, 1].map(|part| weight.part_bytes_from(store, part, first, AHEAD / 2)),
            }
        });
    }
}

/// First item of a run of [`Machine::share`].
fn run_start(items: usize, runs: usize, run: usize) -> usize {
    items * run / runs
}

/// Number of items that [`linear`] shares out, the cost of one, and its panels.
fn panel_items(weight: &Linear, rows: usize) -> (usize, usize, usize) {
    (weight.panels(), panel_cost(weight, rows), 1)
}

/// Number of items that [`gate_up`] shares out, the cost of one, and its panels of either part.
fn unit_items(weight: &Linear, rows: usize) -> (usize, usize, usize) {
    ((weight.rows / 2).div_ceil(UNIT), 4 * panel_cost(weight, rows), UNIT / PANEL)
}

/// About how long a panel takes with this many rows, in nanoseconds.
fn panel_cost(weight: &Linear, rows: usize) -> usize {
    if weight.form.int8 { weight.cols / BLOCK * (20 + 3 * rows) } else { weight.cols * (2 + rows) }
}

/// Where [`linear`] writes.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    /// `[rows, cols]`, with the product's columns.
    pub(super) out: SharedMut<'a, f32>,
    /// Add to what is there.
    pub(super) add: bool,
}

/// `out = acts * weight^T + bias`, or `out +=`.
pub(super) fn linear(machine: &mut Machine, store: &Store, weight: &Linear, acts: ActReader<'_>, target: Target<'_>) {
    let isa = machine.isa;
    let (items, cost, _) = panel_items(weight, acts.rows);
    machine.share(items, cost, &|panels, work| {
        dispatch(isa, Product { isa, store, weight, acts, panels, work, target });
    });
}

struct Product<'a> {
    isa: Isa,
    store: &'a Store,
    weight: &'a Linear,
    acts: ActReader<'a>,
    panels: Range<usize>,
    work: &'a mut Work,
    target: Target<'a>,
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Target { out, add } = self.target;
        for group in Group::split(self.acts) {
            let rows = group.len();
            for run in self.weight.runs(self.store, self.panels.clone(), STAGE / rows) {
                let Work { stages: [stage, _], unpacked } = &mut *self.work;
                multiply(self.isa, run, group, (unpacked, stage));
                for (panel, lanes) in run.panels().zip(stage.chunks_exact_mut(rows)) {
                    add_bias(self.weight, &panel, lanes);
                    for (lanes, row) in lanes.iter().zip(group.first()..) {
                        // SAFETY: each panel has columns of its own, and each panel is in one chunk.
                        let out = unsafe { out.part(row * self.weight.rows + panel.first, panel.rows) };
                        if let Ok(out) = <&mut Lanes>::try_from(&mut *out) {
                            let value = s.load(lanes);
                            s.store(if add { s.add(s.load(out), value) } else { value }, out);
                        } else {
                            for (out, value) in out.iter_mut().zip(lanes) {
                                *out = if add { *out + *value } else { *value };
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Adds the bias to every row's product with a panel.
#[inline(always)]
fn add_bias(weight: &Linear, panel: &Panel, rows: &mut [Lanes]) {
    if let Some(bias) = &weight.bias {
        let bias = &bias[panel.first..][..panel.rows];
        for lanes in rows {
            for (value, bias) in lanes.iter_mut().zip(bias) {
                *value += bias;
            }
        }
    }
}

/// Best value and its index so far.
type Best = (f32, u32);

/// Memory of [`argmax`], kept between calls.
#[derive(Default)]
pub(super) struct ArgmaxScratch {
    values: Vec<f32>,
    indices: Vec<u32>,
}

/// Index of the largest product of each row, the lowest among equals.
pub(super) fn argmax(
    machine: &mut Machine,
    scratch: &mut ArgmaxScratch,
    store: &Store,
    weight: &Linear,
    acts: ActReader<'_>,
) -> impl Iterator<Item = u32> {
    // Panels per chunk are fixed here, so that a chunk's results have a place of their own.
    const PANELS: usize = 64;
    let (rows, chunks) = (acts.rows, weight.panels().div_ceil(PANELS));
    let ArgmaxScratch { values, indices } = scratch;
    values.clear();
    values.resize(chunks * rows, f32::NEG_INFINITY);
    indices.clear();
    indices.resize(chunks * rows, 0);
    let (best, at) = (SharedMut::new(values), SharedMut::new(indices));
    let isa = machine.isa;
    machine.share(chunks, PANELS * panel_cost(weight, rows), &|run, work| {
        for chunk in run {
            let panels = chunk * PANELS..weight.panels().min((chunk + 1) * PANELS);
            // SAFETY: each chunk has results of its own.
            let values = unsafe { best.part(chunk * rows, rows) };
            // SAFETY: as above.
            let indices = unsafe { at.part(chunk * rows, rows) };
            dispatch(isa, Largest { isa, store, weight, acts, panels, work: &mut *work, values, indices });
        }
    });
    let (values, indices) = (&*values, &*indices);
    (0..rows).map(move |row| {
        let all = (0..chunks).map(|chunk| (values[chunk * rows + row], indices[chunk * rows + row]));
        all.fold((f32::NEG_INFINITY, 0), |best: Best, next| if next.0 > best.0 { next } else { best }).1
    })
}

struct Largest<'a> {
    isa: Isa,
    store: &'a Store,
    weight: &'a Linear,
    acts: ActReader<'a>,
    panels: Range<usize>,
    work: &'a mut Work,
    values: &'a mut [f32],
    indices: &'a mut [u32],
}

impl Kernel for Largest<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for group in Group::split(self.acts) {
            let rows = group.len();
            for run in self.weight.runs(self.store, self.panels.clone(), STAGE / rows) {
                let Work { stages: [stage, _], unpacked } = &mut *self.work;
                multiply(self.isa, run, group, (unpacked, stage));
                for (panel, lanes) in run.panels().zip(stage.chunks_exact_mut(rows)) {
                    add_bias(self.weight, &panel, lanes);
                    for (lanes, row) in lanes.iter_mut().zip(group.first()..) {
                        lanes[panel.rows..].fill(f32::NEG_INFINITY);
                        if s.reduce_max(s.load(lanes)) > self.values[row] {
                            for (value, i) in lanes.iter().zip(panel.first..) {
                                if *value > self.values[row] {
                                    (self.values[row], self.indices[row]) = (*value, i as u32);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// `out = f(acts * gate^T) * (acts * up^T)`
pub(super) fn gate_up(
    machine: &mut Machine,
    store: &Store,
    weight: &Linear,
    (acts, f): (ActReader<'_>, GateFn),
    out: ActWriter<'_>,
) {
    let isa = machine.isa;
    let (items, cost, _) = unit_items(weight, acts.rows);
    machine.share(items, cost, &|units, work| {
        dispatch(isa, GateUp { isa, store, weight, acts, units, work, f, out });
    });
}

/// Columns that are computed together: one block of the result.
const UNIT: usize = BLOCK;
const _: () = assert!(UNIT == 2 * PANEL && PANEL == LANES);

struct GateUp<'a> {
    isa: Isa,
    store: &'a Store,
    weight: &'a Linear,
    acts: ActReader<'a>,
    units: Range<usize>,
    work: &'a mut Work,
    f: GateFn,
    out: ActWriter<'a>,
}

impl Kernel for GateUp<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.weight.rows / 2;
        let Work { stages: [gates, ups], unpacked } = self.work;
        for group in Group::split(self.acts) {
            let rows = group.len();
            let panels = self.units.start * 2..(self.units.end * 2).min(self.weight.part_panels(0));
            let runs = |part| self.weight.part_runs(self.store, part, panels.clone(), STAGE / (2 * rows) * 2);
            for (gate, up) in runs(0).zip(runs(1)) {
                for (run, stage) in [(gate, &mut *gates), (up, &mut *ups)] {
                    multiply(self.isa, run, group, (unpacked, stage));
                    for (panel, lanes) in run.panels().zip(stage.chunks_exact_mut(rows)) {
                        add_bias(self.weight, &panel, lanes);
                    }
                }
                // In two passes, so that a row's long chain of dependent operations overlaps with those of the next rows.
                for (gate, up) in gates.iter_mut().zip(ups.iter()).take(gate.len() * rows) {
                    s.store(s.mul(gate_fn(s, self.f, s.load(gate)), s.load(up)), gate);
                }
                for (unit, lanes) in gates[..gate.len() * rows].chunks(2 * rows).enumerate() {
                    let first = gate.first() + unit * UNIT;
                    // The last unit may have one panel: then the second half is not looked at.
                    let (low, high) = lanes.split_at(rows);
                    let high = if high.is_empty() { low } else { high };
                    for (row, (low, high)) in (group.first()..).zip(low.iter().zip(high)) {
                        let mut values = [0.0; UNIT];
                        values[..LANES].copy_from_slice(low);
                        values[LANES..].copy_from_slice(high);
                        // SAFETY: each unit has columns of its own, and each unit is in one chunk.
                        unsafe { self.out.write(s, row, first, &values[..UNIT.min(cols - first)]) };
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn gate_fn<S: Simd>(s: S, f: GateFn, x: S::V) -> S::V {
    match f {
        GateFn::Silu => s.mul(x, s.sigmoid(x)),
        GateFn::GeluTanh => {
            // x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), from Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415
            let cubic = s.fma(s.mul(s.mul(x, x), x), s.splat(0.044_715), x);
            let t = s.tanh(s.mul(cubic, s.splat(0.797_884_6)));
            s.mul(s.mul(x, s.splat(0.5)), s.add(t, s.splat(1.0)))
        }
    }
}

/// `out[i] = scale * weight[tokens[i]]`
pub(super) fn embed(
    machine: &mut Machine,
    store: &Store,
    weight: &Linear,
    (tokens, scale): (&[u32], f32),
    out: SharedMut<'_, f32>,
) {
    machine.share(tokens.len(), weight.cols, &|rows, _| {
        for row in rows {
            let (panel, lane) = weight.locate(store, tokens[row] as usize);
            // SAFETY: each row is in one chunk.
            let out = unsafe { out.part(row * weight.cols, weight.cols) };
            panel_row(panel.ty, panel.bytes, lane, out);
            if scale != 1.0 {
                out.iter_mut().for_each(|value| *value *= scale);
            }
        }
    });
}
