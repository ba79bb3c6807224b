//! Matrix products by weight type, shape and batch size: operations a second, and bytes a second for one row.
//!
//! `cargo bench -p cupola-benches -- Q4_1` runs a part. `CUPOLA_ISA` forces an instruction set.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use cupola_kernels::cpu::{CpuBackend, CpuConfig};
use cupola_kernels::{Backend, Epilogue, PartOrder, Rows, WeightPart, WeightType};

const TYPES: [WeightType; 6] =
    [WeightType::Q4_0, WeightType::Q4_1, WeightType::Q8_0, WeightType::F16, WeightType::Bf16, WeightType::F32];

/// `[out_features, in_features]`: the layers of SmolLM2-135M, and one of an 8B model's.
const SHAPES: [(usize, usize); 4] = [(960, 576), (576, 1536), (3072, 576), (4096, 4096)];

const ROWS: [usize; 4] = [1, 4, 16, 256];

/// Bytes that are a valid tensor of any type: small positive scales and arbitrary quants.
fn weights(ty: WeightType, rows: usize, cols: usize) -> Vec<u8> {
    let row_bytes = ty.row_bytes(cols).expect("whole blocks");
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
        (state >> 24) as u8
    };
    let mut bytes: Vec<u8> = (0..rows * row_bytes).map(|_| next()).collect();
    // The high byte of every f16, bf16 or f32 is set to that of a number between 0.001 and 0.1.
    let (stride, high): (usize, &[usize]) = match ty {
        WeightType::F32 => (4, &[3]),
        WeightType::Q4_1 => (ty.block_bytes(), &[1, 3]),
        _ => (ty.block_bytes(), &[1]),
    };
    let value = if matches!(ty, WeightType::F32 | WeightType::Bf16) { 0x3c } else { 0x1c };
    for block in bytes.chunks_mut(stride) {
        high.iter().for_each(|&i| block[i] = value);
    }
    bytes
}

fn products(c: &mut Criterion) {
    for ty in TYPES {
        for (n, k) in SHAPES {
            let mut backend = CpuBackend::new(CpuConfig::default()).expect("a CPU backend");
            let data = weights(ty, n, k);
            let part = WeightPart { ty, rows: n, cols: k, data: &data };
            let weight = backend.load_linear(&[part], PartOrder::Concat, None).expect("a supported type");
            let most = ROWS[ROWS.len() - 1];
            let x = backend.alloc_buffer(most, k).expect("memory");
            let act = backend.alloc_act(most, k).expect("memory");
            let out = backend.alloc_buffer(most, n).expect("memory");
            let ones = backend.load_vector(&vec![1.0; k]).expect("memory");
            backend
                .for_each_row(x, most, &|row, values| {
                    values.iter_mut().enumerate().for_each(|(i, v)| *v = ((i * 37 + row * 11) % 101) as f32 - 50.0);
                })
                .expect("rows of the arena");
            let mut group = c.benchmark_group(format!("{} {n}x{k} {}", ty.name(), backend.describe()));
            for rows in ROWS {
                backend.rms_norm(x, Rows::First(rows), (ones, 1e-5), weight, act).expect("shapes fit");
                group.throughput(if rows == 1 {
                    Throughput::Bytes(data.len() as u64)
                } else {
                    Throughput::Elements(2 * (rows * n * k) as u64)
                });
                group.bench_function(BenchmarkId::from_parameter(rows), |b| {
                    b.iter(|| backend.linear(act, rows, weight, Epilogue::Store, out).expect("shapes fit"));
                });
            }
        }
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
