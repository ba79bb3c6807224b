//! What weight bytes mean, against candle: blocks that candle writes, read by both.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use cupola_kernels::WeightType;

/// Types that candle can write too.
const TYPES: [(WeightType, GgmlDType); 10] = [
    (WeightType::Q4_0, GgmlDType::Q4_0),
    (WeightType::Q4_1, GgmlDType::Q4_1),
    (WeightType::Q5_0, GgmlDType::Q5_0),
    (WeightType::Q5_1, GgmlDType::Q5_1),
    (WeightType::Q8_0, GgmlDType::Q8_0),
    (WeightType::Q2K, GgmlDType::Q2K),
    (WeightType::Q3K, GgmlDType::Q3K),
    (WeightType::Q4K, GgmlDType::Q4K),
    (WeightType::Q5K, GgmlDType::Q5K),
    (WeightType::Q6K, GgmlDType::Q6K),
];

/// Something like a bell, with a few values far outside, so that scales, mins and codes of all sizes occur.
fn values(count: usize) -> Vec<f32> {
    let noise = |i: usize| {
        let mixed =
            (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(31).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (mixed >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let bell = |i: usize| (0..4).map(|k| noise(4 * i + k)).sum::<f32>() * 0.05 + 0.01;
    (0..count).map(|i| if i % 97 == 5 { bell(i) * 8.0 } else { bell(i) }).collect()
}

#[test]
fn every_type_that_candle_writes_is_read_alike() {
    let (rows, cols) = (24, 1024);
    let values = Tensor::from_vec(values(rows * cols), (rows, cols), &Device::Cpu).expect("a matrix");
    for (ty, theirs) in TYPES {
        let tensor = QTensor::quantize(&values, theirs).expect("candle writes this type");
        let bytes = tensor.data().expect("bytes of a CPU tensor");
        let expected = tensor.dequantize(&Device::Cpu).and_then(|t| t.flatten_all()).and_then(|t| t.to_vec1::<f32>());
        let expected = expected.expect("candle reads its own blocks");
        assert_eq!(Some(bytes.len()), ty.row_bytes(rows * cols), "bytes of {}", ty.name());
        let mut got = vec![0.0; rows * cols];
        ty.dequantise(&bytes, &mut got);
        for (i, (expected, got)) in expected.iter().zip(&got).enumerate() {
            let error = (expected - got).abs();
            assert!(error <= 1e-6 * expected.abs() + 1e-9, "{} value {i}: {got}, expected {expected}", ty.name());
        }
    }
}
