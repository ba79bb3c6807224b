//! Matrix products of every weight type, layer shape, batch size and instruction set, beside what the machine can do at most.
//!
//! `cargo bench -p cupola-benches` measures all cases of `cupola_kernels::testing`, which the tests check for correctness;
//! `cargo bench -p cupola-benches -- --quick` a part of them within two minutes, and a word (`Q4_1`, `SmolLM2`, `b512`) those
//! whose names contain it. `CUPOLA_ISA` measures one instruction set, `CUPOLA_BENCH_THREADS` sets the threads. The table at the
//! end says which share of its bound each case reaches: reading its weights from memory, or its operations. For that, case
//! and bound are measured in turn, and the share is the median of the turns': a shared machine's speed changes by the second.
//!
//! Weights are copied until no cache holds them, and the copies are used in turn, as a model's layers are.

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use cupola_kernels::cpu::roofline::{Gauge, Roofline};
use cupola_kernels::cpu::{CpuBackend, CpuConfig, ISA_VARIABLE, Isa, default_threads};
use cupola_kernels::testing::{Case, Layer, cases, random_weights};
use cupola_kernels::{ActId, Backend, BufferId, Epilogue, LinearId, PartOrder, Rows, WeightPart, WeightType};

/// Bytes of weights that no cache holds.
const COLD: usize = 96 << 20;

/// A part that shows every kind of kernel: `--quick`.
fn is_quick(case: &Case) -> bool {
    let types =
        [WeightType::Q4_0, WeightType::Q4_1, WeightType::Q8_0, WeightType::Q4K, WeightType::Q6K, WeightType::Bf16];
    let k_type = case.ty.block_len() > 32;
    let layer = if k_type { case.layer.name == "down" } else { case.layer.model == "SmolLM2-135M" };
    types.contains(&case.ty) && layer && [1, 16, 512].contains(&case.batch)
}

/// A matrix in a backend with all that a product needs.
struct Loaded {
    backend: CpuBackend,
    copies: Vec<LinearId>,
    input: BufferId,
    norm: cupola_kernels::VectorId,
    act: ActId,
    out: BufferId,
}

impl Loaded {
    fn new(ty: WeightType, layer: Layer, most_rows: usize, config: CpuConfig) -> cupola_kernels::Result<Self> {
        let Layer { rows, cols, .. } = layer;
        let mut backend = CpuBackend::new(config)?;
        let data = random_weights(ty, (rows, cols), 1);
        let part = WeightPart { ty, rows, cols, data: &data };
        let copies = (0..COLD.div_ceil(data.len()))
            .map(|_| backend.load_linear(&[part], PartOrder::Concat, None))
            .collect::<cupola_kernels::Result<_>>()?;
        let input = backend.alloc_buffer(most_rows, cols)?;
        backend.for_each_row(input, most_rows, &|row, values| {
            values.iter_mut().enumerate().for_each(|(col, x)| *x = ((row * 7 + col * 13) % 29) as f32 - 14.0);
        })?;
        let norm = backend.load_vector(&vec![1.0; cols])?;
        let (act, out) = (backend.alloc_act(most_rows, cols)?, backend.alloc_buffer(most_rows, rows)?);
        Ok(Self { backend, copies, input, norm, act, out })
    }

    /// Time of `count` products of `rows` rows.
    fn time(&mut self, rows: usize, count: u64) -> cupola_kernels::Result<Duration> {
        self.backend.rms_norm(self.input, Rows::First(rows), (self.norm, 1e-5), self.copies[0], self.act)?;
        let start = Instant::now();
        for copy in self.copies.iter().cycle().take(count as usize) {
            self.backend.linear(self.act, rows, *copy, Epilogue::Store, self.out)?;
        }
        Ok(start.elapsed())
    }

    /// Share of its bound that a case of about so many seconds reaches: the median of some turns of both.
    fn share(&mut self, case: &Case, seconds: f64, (bound, gauge): (Bound, &Gauge)) -> f64 {
        const TURNS: usize = 7;
        const TURN: f64 = 0.04;
        let count = (TURN / seconds).ceil() as u64;
        let shares = (0..TURNS).map(|_| {
            let least = bound.seconds(case, gauge) * count as f64;
            least / self.time(case.batch, count).expect("shapes fit").as_secs_f64()
        });
        median(shares.collect()).unwrap_or(0.0)
    }
}

/// What a case cannot be faster than.
#[derive(Clone, Copy)]
enum Bound {
    Read,
    Int8,
    Float,
}

impl Bound {
    fn of(case: &Case, roof: &Roofline) -> Self {
        let (bytes, operations) = (case.weight_bytes() as f64, case.operations() as f64);
        let int8 = !case.ty.is_float();
        match roof.seconds(bytes, operations, int8) <= bytes / roof.read {
            true => Bound::Read,
            false if int8 && roof.int8.is_some() => Bound::Int8,
            false => Bound::Float,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Bound::Read => "read",
            Bound::Int8 => "int8",
            Bound::Float => "f32",
        }
    }

    /// Least seconds of a case, as the machine is now.
    fn seconds(self, case: &Case, gauge: &Gauge) -> f64 {
        match self {
            Bound::Read => case.weight_bytes() as f64 / gauge.read(),
            Bound::Int8 => case.operations() as f64 / gauge.int8().unwrap_or(f64::INFINITY),
            Bound::Float => case.operations() as f64 / gauge.float(),
        }
    }
}

/// A case, its seconds, and the share of its bound that it reaches: medians.
struct Measured {
    isa: Isa,
    case: Case,
    seconds: f64,
    bound: Bound,
    share: f64,
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn measure(criterion: &mut Criterion, isa: Isa, roof: &Roofline, threads: usize, quick: bool) -> Vec<Measured> {
    let gauge = Gauge::new(isa, threads).expect("the set is available, and memory to read");
    let config = CpuConfig { threads: Some(threads), isa: Some(isa) };
    let mut measured = Vec::new();
    let cases: Vec<Case> = cases(isa).into_iter().filter(|case| !quick || is_quick(case)).collect();
    for group in cases.chunk_by(|a, b| (a.ty, a.layer) == (b.ty, b.layer)) {
        let Layer { model, name, rows, cols } = group[0].layer;
        let most_rows = group.iter().map(|case| case.batch).max().unwrap_or(1);
        let title = format!("{} {} {model} {name} {rows}x{cols}", isa.name(), group[0].ty.name());
        let mut criterion_group = criterion.benchmark_group(title);
        // Packed when the first case of it is asked for: a filter may leave all of them out.
        let mut loaded: Option<Loaded> = None;
        for case in group {
            criterion_group.throughput(match case.batch {
                1 => Throughput::Bytes(case.weight_bytes() as u64),
                _ => Throughput::Elements(case.operations() as u64),
            });
            let bound = Bound::of(case, roof);
            let mut times = Vec::new();
            criterion_group.bench_function(format!("b{}", case.batch), |bencher| {
                let loaded = loaded.get_or_insert_with(|| {
                    Loaded::new(case.ty, case.layer, most_rows, config).expect("a case of the table, and memory for it")
                });
                bencher.iter_custom(|count| {
                    let time = loaded.time(case.batch, count).expect("shapes fit");
                    times.push(time.as_secs_f64() / count as f64);
                    time
                });
            });
            // A filter may have left it out.
            if let (Some(seconds), Some(loaded)) = (median(times), &mut loaded) {
                let share = loaded.share(case, seconds, (bound, &gauge));
                measured.push(Measured { isa, case: *case, seconds, bound, share });
            }
        }
        criterion_group.finish();
    }
    measured
}

fn table(measured: &[Measured], roofs: &[(Isa, Roofline)], threads: usize) {
    println!("\n{threads} threads");
    for (isa, roof) in roofs {
        let int8 = roof.int8.map_or("-".to_owned(), |peak| format!("{:.0}", peak / 1e9));
        println!(
            "{:<7} reads {:.1} GB/s from memory, {:.0} GB/s from L2; {int8} GOPS of int8, {:.0} GFLOPS of f32",
            isa.name(),
            roof.read / 1e9,
            roof.cached_read / 1e9,
            roof.float / 1e9
        );
    }
    println!(
        "\n{:<7} {:<7} {:<34} {:>5} {:>10} {:>8} {:>8}  {:<5} {:>5}",
        "isa", "weights", "layer", "batch", "us", "GB/s", "GOPS", "bound", "of it"
    );
    for Measured { isa, case, seconds, bound, share } in measured {
        let (bytes, operations) = (case.weight_bytes() as f64, case.operations() as f64);
        let Layer { model, name, rows, cols } = case.layer;
        println!(
            "{:<7} {:<7} {:<34} {:>5} {:>10.1} {:>8.1} {:>8.1}  {:<5} {:>4.0}%",
            isa.name(),
            case.ty.name(),
            format!("{model} {name} {rows}x{cols}"),
            case.batch,
            seconds * 1e6,
            bytes / seconds / 1e9,
            operations / seconds / 1e9,
            bound.name(),
            100.0 * share
        );
    }
}

fn main() {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let forced = std::env::var_os(ISA_VARIABLE).is_some_and(|name| !name.is_empty());
    let isas = match quick || forced {
        true => vec![Isa::choose(None).expect("CUPOLA_ISA names a set of this CPU")],
        false => Isa::available(),
    };
    let asked = std::env::var("CUPOLA_BENCH_THREADS").ok();
    let threads = asked.map_or_else(default_threads, |n| n.parse().expect("CUPOLA_BENCH_THREADS is a number"));
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(50))
        .measurement_time(Duration::from_millis(400))
        .configure_from_args();
    let (mut measured, mut roofs) = (Vec::new(), Vec::new());
    for isa in isas {
        let roof = Roofline::measure(isa, threads).expect("the set is available");
        measured.extend(measure(&mut criterion, isa, &roof, threads, quick));
        roofs.push((isa, roof));
    }
    criterion.final_summary();
    table(&measured, &roofs, threads);
}
