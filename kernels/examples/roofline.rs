//! Measures matrix products beside what the machine can do at most: integer multiply-adds and memory reads per second.
//!
//! `cargo run --release -p cupola-kernels --example roofline [THREADS] [PART OF A SHAPE'S NAME] [ROWS,ROWS..]`
//!
//! Weights of every shape are copied until they exceed any cache, and the copies are used in turn, as a model's layers are.

use std::time::{Duration, Instant};

use cupola_kernels::cpu::roofline::Roofline;
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
    let roof = Roofline::measure(backend.isa(), threads)?;
    println!("read {:.1} GB/s, {:.1} GB/s from L2", roof.read / 1e9, roof.cached_read / 1e9);
    if let Some(peak) = roof.int8 {
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
