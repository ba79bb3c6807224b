//! Every op of the CUDA backend against plain arithmetic, and a whole layer against the CPU's scalar backend.
//!
//! They run on a GPU where there is one, else on the emulated driver, and say on which. Activations are bf16 on a device, so
//! what is expected is computed in f64 from inputs rounded in the same places; the tolerances are for sums in another order and
//! for the few inputs that fall to the other side of a rounding.

mod attention;
mod carried;
mod fp8;
mod large;
mod layer;
mod passes;
mod products;
mod rope;
mod rows;
mod sampling;
mod speed;

use std::sync::Mutex;

use half::bf16;

use super::CudaBackend;
use super::driver::Device;
use crate::cpu::tests::{matrix, noise};
use crate::{ActId, Backend, BufferId, LinearId, PartOrder, Rows, WeightPart, WeightType};

/// A backend on the device of the tests.
pub(super) fn backend() -> CudaBackend {
    let info = super::testing::device().expect("tests need a GPU, or g++ for the emulated driver");
    CudaBackend::on(Device::open(info).unwrap()).unwrap()
}

fn set(backend: &mut dyn Backend, buffer: BufferId, rows: usize, value: impl Fn(usize, usize) -> f32 + Sync) {
    let fill = |row: usize, values: &mut [f32]| {
        values.iter_mut().enumerate().for_each(|(col, x)| *x = value(row, col));
    };
    backend.for_each_row(buffer, rows, &fill).unwrap();
}

fn get(backend: &mut dyn Backend, buffer: BufferId, rows: usize) -> Vec<Vec<f32>> {
    let out = Mutex::new(vec![Vec::new(); rows]);
    backend.for_each_row(buffer, rows, &|row, values| out.lock().unwrap()[row] = values.to_vec()).unwrap();
    out.into_inner().unwrap()
}

/// As a number of 16 bits with 8 of them for the mantissa.
fn round(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// A matrix in a backend, and its values.
fn loaded(
    backend: &mut dyn Backend,
    parts: &[(WeightType, usize)],
    cols: usize,
    order: PartOrder,
    bias: Option<&[f32]>,
) -> (LinearId, Vec<f32>) {
    let made: Vec<_> = parts.iter().enumerate().map(|(i, &(ty, rows))| matrix(ty, rows, cols, i * 90_001)).collect();
    let parts: Vec<_> =
        parts.iter().zip(&made).map(|(&(ty, rows), (data, _))| WeightPart { ty, rows, cols, data }).collect();
    let id = backend.load_linear(&parts, order, bias).unwrap();
    (id, made.into_iter().flat_map(|(_, values)| values).collect())
}

/// An identity of `n` rows, with which the content of activations can be read.
fn identity(backend: &mut dyn Backend, n: usize) -> LinearId {
    let data: Vec<u8> = (0..n * n).flat_map(|i| f32::from(u8::from(i % (n + 1) == 0)).to_le_bytes()).collect();
    let part = WeightPart { ty: WeightType::F32, rows: n, cols: n, data: &data };
    backend.load_linear(&[part], PartOrder::Concat, None).unwrap()
}

/// The first `rows` rows of an activation arena of `cols` columns, by way of a product with an identity.
fn read_act(backend: &mut dyn Backend, act: ActId, rows: usize, cols: usize) -> Vec<Vec<f32>> {
    let identity = identity(backend, cols);
    let out = backend.alloc_buffer(rows, cols).unwrap();
    set(backend, out, rows, |_, _| f32::NAN);
    backend.linear(act, rows, identity, crate::Epilogue::Store, out).unwrap();
    get(backend, out, rows)
}

/// Norms `rows` rows of noise into an activation arena; returns the arena and the rows as they are there.
fn input(backend: &mut dyn Backend, rows: usize, cols: usize, consumer: LinearId) -> (ActId, Vec<Vec<f32>>) {
    let x = backend.alloc_buffer(rows, cols).unwrap();
    set(backend, x, rows, |row, col| noise(row * 1009 + col));
    let weight = backend.load_vector(&vec![1.0; cols]).unwrap();
    let act = backend.alloc_act(rows, cols).unwrap();
    backend.rms_norm(x, Rows::First(rows), (weight, 1e-6), consumer, act).unwrap();
    let normed = |row: Vec<f32>| {
        let mean = row.iter().map(|x| x * x).sum::<f32>() / cols as f32;
        row.into_iter().map(|x| round(x / (mean + 1e-6).sqrt())).collect()
    };
    (act, get(backend, x, rows).into_iter().map(normed).collect())
}

/// The sum of products, and the product of the lengths that errors are measured by.
fn dot(a: &[f32], b: &[f32]) -> (f64, f64) {
    let squares = |x: &[f32]| x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
    let sum = a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
    (sum, (squares(a) * squares(b)).sqrt())
}

fn bits(rows: &[Vec<f32>]) -> Vec<u32> {
    rows.iter().flatten().map(|x| x.to_bits()).collect()
}
