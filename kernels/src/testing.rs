//! The cases of matrix products: what `cargo bench` measures is what the tests of this crate check.
//!
//! ```text
//!   LAYERS x WeightType x BATCHES --cases(isa)--> Case --┬-- tests here: against the definition
//!                                                        └-- benches/kernels.rs: against the machine's roofline
//! ```

use half::{bf16, f16};

use crate::WeightType;
use crate::cpu::Isa;

/// A weight matrix of a real model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Whose it is.
    pub model: &'static str,
    /// Which one: parts that are multiplied together count as one matrix.
    pub name: &'static str,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
}

const fn layer(model: &'static str, name: &'static str, rows: usize, cols: usize) -> Layer {
    Layer { model, name, rows, cols }
}

const SMOLLM2: &str = "SmolLM2-135M";
const GEMMA3: &str = "Gemma-3-270M";

/// The shapes of the models that are compared with other engines, and one of a model too large for any cache.
pub const LAYERS: [Layer; 11] = [
    layer(SMOLLM2, "qkv", 960, 576),
    layer(SMOLLM2, "o", 576, 576),
    layer(SMOLLM2, "gate-up", 3072, 576),
    layer(SMOLLM2, "down", 576, 1536),
    layer(SMOLLM2, HEAD, 49152, 576),
    layer(GEMMA3, "qkv", 1536, 640),
    layer(GEMMA3, "o", 640, 1024),
    layer(GEMMA3, "gate-up", 4096, 640),
    layer(GEMMA3, "down", 640, 2048),
    layer("Llama-3-8B", "o", 4096, 4096),
    layer("Llama-3-8B", "kv", 2048, 4096),
];

/// Name of output heads.
const HEAD: &str = "head";

/// Rows of activations that are multiplied together.
pub const BATCHES: [usize; 5] = [1, 4, 16, 128, 512];

/// One product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Type of the weights.
    pub ty: WeightType,
    /// Shape of the weights.
    pub layer: Layer,
    /// Rows of activations.
    pub batch: usize,
}

impl Case {
    /// Bytes of the weights as they lie in a file, which is what a product must at least read.
    pub fn weight_bytes(&self) -> usize {
        self.ty.row_bytes(self.layer.cols).map_or(0, |bytes| bytes * self.layer.rows)
    }

    /// Multiplications and additions.
    pub fn operations(&self) -> usize {
        2 * self.batch * self.layer.rows * self.layer.cols
    }
}

/// Every product worth looking at with an instruction set: the types that a shape allows; for heads, those that files use
/// there, and few rows, as only rows that sample reach it; little of the scalar reference, which is slow.
pub fn cases(isa: Isa) -> Vec<Case> {
    let mut found = Vec::new();
    for ty in WeightType::ALL {
        for layer in LAYERS {
            let head = layer.name == HEAD;
            let of_heads = matches!(ty, WeightType::Q8_0 | WeightType::F16 | WeightType::Bf16);
            if ty.row_bytes(layer.cols).is_none() || head && !of_heads {
                continue;
            }
            let slow = isa == Isa::Scalar;
            if slow && layer.rows * layer.cols > 1 << 20 {
                continue;
            }
            let most = if slow {
                4
            } else if head {
                16
            } else {
                usize::MAX
            };
            found.extend(BATCHES.into_iter().filter(|batch| *batch <= most).map(|batch| Case { ty, layer, batch }));
        }
    }
    found
}

/// Bytes of a matrix in the file format of `ty`: arbitrary codes, and scales of a plausible size, neither infinite nor NaN.
///
/// # Panics
/// When `cols` is not a whole number of blocks.
pub fn random_weights(ty: WeightType, (rows, cols): (usize, usize), seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let len = ty.row_bytes(cols).expect("whole blocks") * rows;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&next().to_le_bytes());
    }
    bytes.truncate(len);
    let mut unit = || (next() >> 40) as f32 / (1 << 23) as f32 - 1.0;
    match ty {
        WeightType::F32 => bytes.as_chunks_mut().0.iter_mut().for_each(|value| *value = (unit() * 0.1).to_le_bytes()),
        WeightType::F16 => {
            bytes.as_chunks_mut().0.iter_mut().for_each(|value| *value = f16::from_f32(unit() * 0.1).to_le_bytes());
        }
        WeightType::Bf16 => {
            bytes.as_chunks_mut().0.iter_mut().for_each(|value| *value = bf16::from_f32(unit() * 0.1).to_le_bytes());
        }
        _ => {
            // Where a block has its halves: scale, then minimum.
            let halves: &[usize] = match ty {
                WeightType::Q4_1 | WeightType::Q5_1 | WeightType::Q4K | WeightType::Q5K => &[0, 2],
                WeightType::Q2K => &[80, 82],
                WeightType::Q3K => &[108],
                WeightType::Q6K => &[208],
                _ => &[0],
            };
            for block in bytes.chunks_exact_mut(ty.block_bytes()) {
                for &at in halves {
                    block[at..at + 2].copy_from_slice(&f16::from_f32(unit() * 0.01).to_le_bytes());
                }
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::cpu::{CpuBackend, CpuConfig};
    use crate::{Backend, Epilogue, LinearId, PartOrder, Rows, WeightPart};

    /// A row of activations that int8 holds exactly: whole numbers to 127, which occurs in every block of 32.
    fn activation(row: usize, col: usize) -> f32 {
        if col % 32 == row % 32 { 127.0 } else { ((row * 31 + col * 17) % 255) as f32 - 127.0 }
    }

    /// The first `rows` rows times `weight`.
    fn product(
        backend: &mut CpuBackend,
        weight: LinearId,
        (cols, outputs): (usize, usize),
        rows: usize,
    ) -> Vec<Vec<f32>> {
        let x = backend.alloc_buffer(rows, cols).unwrap();
        let fill = |row: usize, values: &mut [f32]| {
            values.iter_mut().enumerate().for_each(|(col, x)| *x = activation(row, col));
        };
        backend.for_each_row(x, rows, &fill).unwrap();
        let ones = backend.load_vector(&vec![1.0; cols]).unwrap();
        let act = backend.alloc_act(rows, cols).unwrap();
        backend.rms_norm(x, Rows::First(rows), (ones, 0.0), weight, act).unwrap();
        let out = backend.alloc_buffer(rows, outputs).unwrap();
        backend.linear(act, rows, weight, Epilogue::Store, out).unwrap();
        let got = Mutex::new(vec![Vec::new(); rows]);
        backend.for_each_row(out, rows, &|row, values| got.lock().unwrap()[row] = values.to_vec()).unwrap();
        got.into_inner().unwrap()
    }

    /// A few outputs of a row against the definition in f64.
    fn check(case: Case, isa: Isa, data: &[u8], row: usize, got: &[f32]) {
        let Layer { rows, cols, .. } = case.layer;
        let row_bytes = case.ty.row_bytes(cols).unwrap();
        let x: Vec<f64> = (0..cols).map(|col| f64::from(activation(row, col))).collect();
        let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / cols as f64).sqrt();
        let mut weights = vec![0.0; cols];
        // Of every panel's lanes in turn, and the last one.
        for output in (0..rows).step_by((rows / 37) | 1).chain([rows - 1]) {
            case.ty.dequantise(&data[output * row_bytes..][..row_bytes], &mut weights);
            let terms = weights.iter().zip(&x).map(|(&w, x)| f64::from(w) * x * scale);
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
            // Codes whose zero is in their middle: the terms of the offset cancel, and count.
            let error = (f64::from(got[output]) - sum).abs();
            assert!(error <= 3e-5 * size, "{isa:?} {case:?}, row {row}, output {output}: {} {sum}", got[output]);
        }
    }

    #[test]
    fn every_case_of_the_benchmark_agrees_with_the_definition() {
        println!("instruction sets covered: {:?}", Isa::available());
        for isa in Isa::available() {
            let cases = cases(isa);
            for group in cases.chunk_by(|a, b| (a.ty, a.layer) == (b.ty, b.layer)) {
                let Case { ty, layer: Layer { rows, cols, .. }, .. } = group[0];
                let mut backend = CpuBackend::new(CpuConfig { threads: Some(2), isa: Some(isa) }).unwrap();
                let data = random_weights(ty, (rows, cols), (rows * cols) as u64);
                let part = WeightPart { ty, rows, cols, data: &data };
                let weight = backend.load_linear(&[part], PartOrder::Concat, None).unwrap();
                let mut first: Option<Vec<f32>> = None;
                for case in group {
                    let got = product(&mut backend, weight, (cols, rows), case.batch);
                    for row in [0, case.batch / 2, case.batch - 1] {
                        check(*case, isa, &data, row, &got[row]);
                    }
                    let alone = first.get_or_insert_with(|| got[0].clone());
                    assert!(*alone == got[0], "{isa:?} {case:?}: a row differs in company");
                }
            }
        }
    }

    #[test]
    fn cases_cover_every_type_and_batch() {
        let cases = cases(Isa::best());
        for ty in WeightType::ALL {
            for batch in BATCHES {
                assert!(cases.iter().any(|case| (case.ty, case.batch) == (ty, batch)), "{ty:?} {batch}");
            }
        }
        assert!(cases.iter().all(|case| case.weight_bytes() > 0));
    }
}
