//! Measures matrix products beside what the machine can do at most: integer multiply-adds and memory reads per second.
//!
//! `cargo run --release -p cupola-kernels --example roofline [THREADS] [PART OF A SHAPE'S NAME] [ROWS,ROWS..]`
//!
//! Weights of every shape are copied until they exceed any cache, and the copies are used in turn, as a model's layers are.

use std::time::{Duration, Instant};

use cupola_kernels::cpu::{CpuBackend, CpuConfig, default_threads};
use cupola_kernels::{ActId, Backend, BufferId, Epilogue, LinearId, PartOrder, Result, Rows, WeightPart, WeightType};

/// Bytes of weights that no cache holds.
const COLD: usize = 160 << 20;
const ROWS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 512];
const SHAPES: [(WeightType, usize, usize); 18] = [
    (WeightType::Q4_1, 576, 576),
    (WeightType::Q4_1, 960, 576),
    (WeightType::Q4_1, 1536, 576),
    (WeightType::Q4_1, 576, 1536),
    (WeightType::Q4_0, 1536, 576),
    (WeightType::Q8_0, 1536, 576),
    (WeightType::Q8_0, 49152, 576),
    (WeightType::F16, 1536, 576),
    (WeightType::Q4_0, 1536, 2048),
    (WeightType::Q5_0, 1536, 2048),
    (WeightType::Q8_0, 1536, 2048),
    (WeightType::Iq4Nl, 1536, 2048),
    (WeightType::Iq4Xs, 1536, 2048),
    (WeightType::Q2K, 1536, 2048),
    (WeightType::Q3K, 1536, 2048),
    (WeightType::Q4K, 1536, 2048),
    (WeightType::Q5K, 1536, 2048),
    (WeightType::Q6K, 1536, 2048),
];

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let threads = args.next().and_then(|n| n.parse().ok()).unwrap_or_else(default_threads);
    let only = args.next().unwrap_or_default();
    let asked: Vec<usize> = args.next().iter().flat_map(|list| list.split(',')).flat_map(str::parse).collect();
    let mut backend = CpuBackend::new(CpuConfig { threads: Some(threads), isa: None })?;
    println!("{}", backend.describe());
    println!("read {:.1} GB/s", read_bandwidth(threads) / 1e9);
    if let Some(peak) = integer_peak(threads) {
        println!("8-bit multiply-add peak {:.0} GOPS", peak / 1e9);
    }
    println!("{:<18} {:>5} {:>9} {:>8} {:>8}", "weights", "rows", "us", "GOPS", "GB/s");
    for (ty, out, cols) in SHAPES {
        let name = format!("{} {out}x{cols}", ty.name());
        if !name.contains(&only) {
            continue;
        }
        let bytes = ty.row_bytes(cols).expect("whole blocks") * out;
        // Any bytes are weights; small ones keep the scales finite.
        let data: Vec<u8> = (0..bytes).map(|i| (i * 131 % 61) as u8).collect();
        let part = WeightPart { ty, rows: out, cols, data: &data };
        let copies = (0..COLD.div_ceil(bytes))
            .map(|_| backend.load_linear(&[part], PartOrder::Concat, None))
            .collect::<Result<Vec<_>>>()?;
        for rows in if asked.is_empty() { ROWS.to_vec() } else { asked.clone() } {
            let (act, target) = input(&mut backend, rows, cols, (out, copies[0]))?;
            let mut times = Vec::new();
            let mut turn = copies.iter().cycle();
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(300) || times.len() < 5 {
                let weight = *turn.next().expect("a cycle does not end");
                let start = Instant::now();
                backend.linear(act, rows, weight, Epilogue::Store, target)?;
                times.push(start.elapsed().as_secs_f64());
            }
            times.sort_by(f64::total_cmp);
            // The fastest tenth: what the kernels can do, also on a machine that does other things beside.
            let time = times[times.len() / 10];
            let gops = 2.0 * (rows * out * cols) as f64 / time / 1e9;
            println!("{name:<18} {rows:>5} {:>9.1} {gops:>8.1} {:>8.1}", time * 1e6, bytes as f64 / time / 1e9);
        }
    }
    Ok(())
}

/// Rows of activations for `consumer`, and a buffer for its result.
fn input(
    backend: &mut CpuBackend,
    rows: usize,
    cols: usize,
    (out, consumer): (usize, LinearId),
) -> Result<(ActId, BufferId)> {
    let x = backend.alloc_buffer(rows, cols)?;
    backend.for_each_row(x, rows, &|row, values| {
        values.iter_mut().enumerate().for_each(|(col, x)| *x = ((row * 7 + col * 13) % 29) as f32 - 14.0);
    })?;
    let norm = backend.load_vector(&vec![1.0; cols])?;
    let act = backend.alloc_act(rows, cols)?;
    backend.rms_norm(x, Rows::First(rows), (norm, 1e-5), consumer, act)?;
    Ok((act, backend.alloc_buffer(rows, out)?))
}

/// Best of several passes over memory that no cache holds, in bytes per second.
fn read_bandwidth(threads: usize) -> f64 {
    let data = vec![1u64; COLD / size_of::<u64>()];
    let pass = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in data.chunks(data.len().div_ceil(threads)) {
                scope.spawn(move || std::hint::black_box(part.iter().fold(0, |sum: u64, x| sum.wrapping_add(*x))));
            }
        });
        COLD as f64 / start.elapsed().as_secs_f64()
    };
    (0..8).map(|_| pass()).fold(0.0, f64::max)
}

/// Multiplications and additions per second with registers alone, as the products here use them.
fn integer_peak(threads: usize) -> Option<f64> {
    let one = |passes: usize| -> Option<usize> {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512f") {
                // SAFETY: the features were just detected.
                return Some(unsafe { x86::dpbusd(passes) });
            }
            if is_x86_feature_detected!("avx2") {
                // SAFETY: the feature was just detected.
                return Some(unsafe { x86::maddubs(passes) });
            }
        }
        let _ = passes;
        None
    };
    one(1)?;
    let pass = || {
        let start = Instant::now();
        let ops: usize = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| one(2_000_000).unwrap_or(0))).collect();
            workers.into_iter().map(|worker| worker.join().unwrap_or(0)).sum()
        });
        ops as f64 / start.elapsed().as_secs_f64()
    };
    Some((0..8).map(|_| pass()).fold(0.0, f64::max))
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        _mm256_add_epi16, _mm256_maddubs_epi16, _mm256_set1_epi8, _mm256_setzero_si256, _mm512_dpbusd_epi32,
        _mm512_set1_epi8, _mm512_setzero_si512,
    };
    use std::hint::black_box;

    /// 12 independent chains of multiply-add, 64 operations in each vector of 32 bytes.
    #[target_feature(enable = "avx2")]
    pub(super) fn maddubs(passes: usize) -> usize {
        let (w, x) = (black_box(_mm256_set1_epi8(1)), black_box(_mm256_set1_epi8(2)));
        let mut sums = [_mm256_setzero_si256(); 12];
        for _ in 0..passes {
            for sum in &mut sums {
                // The product depends on the sum, or else it would be computed once.
                *sum = _mm256_add_epi16(x, _mm256_maddubs_epi16(*sum, w));
            }
        }
        black_box(sums);
        passes * 12 * 64
    }

    /// As [`maddubs`], with the instruction that adds into 32 bits.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn dpbusd(passes: usize) -> usize {
        let (w, x) = (black_box(_mm512_set1_epi8(1)), black_box(_mm512_set1_epi8(2)));
        let mut sums = [_mm512_setzero_si512(); 12];
        for _ in 0..passes {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, w, x);
            }
        }
        black_box(sums);
        passes * 12 * 128
    }
}
