//! Integer dot products in plain Rust: the reference.

use half::f16;

use super::{IntDot, Lanes, TileQuants, TileScales};
use crate::cpu::simd::Scalar;
use crate::format::ggml::BLOCK;
use crate::format::pack::{Offset, PANEL, PanelBlock, Quants};

impl IntDot for Scalar {
    const TILE_ROWS: usize = 4;

    fn tile<B: PanelBlock, const N: usize>(
        self,
        panel: &[B],
        quants: &[TileQuants<N>],
        scales: &[TileScales<N>],
        out: &mut [Lanes; N],
    ) {
        *out = [[0.0; PANEL]; N];
        for ((block, quants), [d_x, s_x]) in panel.iter().zip(quants).zip(scales) {
            for lane in 0..PANEL {
                let d = f16::from_bits(block.scales()[lane]).to_f32();
                let offset = match block.offset() {
                    Offset::Each(m) => f16::from_bits(m[lane]).to_f32(),
                    Offset::Scales(times) => d * times,
                };
                for n in 0..N {
                    let sum = dot(block, lane, &quants[n]) as f32;
                    out[n][lane] += sum * (d * d_x[n]);
                    out[n][lane] += offset * s_x[n];
                }
            }
        }
    }
}

/// Exact dot product of a row's 32 unsigned quants with 32 signed ones.
pub(super) fn dot<B: PanelBlock>(block: &B, lane: usize, x: &[i8; BLOCK]) -> i32 {
    let mut sum = 0;
    match block.quants() {
        Quants::Nibbles(words) => {
            for (word, i) in words.iter().zip((0..).step_by(4)) {
                for c in 0..4 {
                    let byte = word[lane * 4 + c];
                    sum += i32::from(byte & 15) * i32::from(x[i + c]) + i32::from(byte >> 4) * i32::from(x[16 + i + c]);
                }
            }
        }
        Quants::Bytes(words) => {
            for (word, i) in words.iter().zip((0..).step_by(4)) {
                for c in 0..4 {
                    sum += i32::from(word[lane * 4 + c]) * i32::from(x[i + c]);
                }
            }
        }
    }
    sum
}
