//! The meaning of weight bytes in files: plain dequantisation, the reference for every packed kernel.
//!
//! ```text
//!   Q4_0   d: f16            16 bytes, byte i = value i in the low nibble, value i + 16 in the high one
//!   Q4_1   d: f16  m: f16    16 bytes, likewise
//!   Q8_0   d: f16            32 signed bytes
//! ```

use half::{bf16, f16};

use super::WeightType;

/// Values of one quantised block.
pub const BLOCK: usize = 32;

/// Reads the little-endian half at `bytes[at..at + 2]`.
fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Turns one row of file bytes into `out.len()` values.
///
/// # Panics
/// When `bytes` is not the row's length.
pub fn dequantise_row(ty: WeightType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(Some(bytes.len()), ty.row_bytes(out.len()), "bytes of a {} row of {} values", ty.name(), out.len());
    let blocks = bytes.chunks_exact(ty.block_bytes()).zip(out.chunks_exact_mut(ty.block_len()));
    for (src, dst) in blocks {
        match ty {
            WeightType::F32 => dst[0] = f32::from_le_bytes([src[0], src[1], src[2], src[3]]),
            WeightType::F16 => dst[0] = half_at(src, 0),
            WeightType::Bf16 => dst[0] = bf16::from_le_bytes([src[0], src[1]]).to_f32(),
            WeightType::Q4_0 => {
                let d = half_at(src, 0);
                nibbles(&src[2..], dst, |q| d * (f32::from(q) - 8.0));
            }
            WeightType::Q4_1 => {
                let (d, m) = (half_at(src, 0), half_at(src, 2));
                nibbles(&src[4..], dst, |q| d * f32::from(q) + m);
            }
            WeightType::Q8_0 => {
                let d = half_at(src, 0);
                for (value, &q) in dst.iter_mut().zip(&src[2..]) {
                    *value = d * f32::from(q.cast_signed());
                }
            }
        }
    }
}

fn nibbles(bytes: &[u8], out: &mut [f32], value: impl Fn(u8) -> f32) {
    let (low, high) = out.split_at_mut(BLOCK / 2);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(bytes) {
        *low = value(byte & 15);
        *high = value(byte >> 4);
    }
}
