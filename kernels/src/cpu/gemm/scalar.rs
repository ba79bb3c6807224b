//! Integer dot products in plain Rust: the reference.

use half::f16;

use super::{Group, IntDot, Lanes, PackedDot, TileActs, TileQuants, TileScales, exact};
use crate::cpu::simd::Scalar;
use crate::format::ggml::BLOCK;
use crate::format::pack::{Offset, PANEL, Packed, PanelBlock, Quants, Scales, Zero};

impl PackedDot for Scalar {}

/// Multiplies a panel with all rows of a group.
pub(super) fn panel<B: Packed>(panel: &[B], rows: Group<'_>, out: &mut [Lanes]) {
    for tile in rows.tiles() {
        let out = &mut out[tile.row - rows.first..][..tile.len];
        match tile.len {
            8 => packed_tile::<B, 8>(panel, rows.acts_of(tile), exact(out)),
            4 => packed_tile::<B, 4>(panel, rows.acts_of(tile), exact(out)),
            2 => packed_tile::<B, 2>(panel, rows.acts_of(tile), exact(out)),
            _ => packed_tile::<B, 1>(panel, rows.acts_of(tile), exact(out)),
        }
    }
}

fn packed_tile<B: Packed, const N: usize>(panel: &[B], acts: TileActs<'_, N>, out: &mut [Lanes; N]) {
    *out = [[0.0; PANEL]; N];
    for (i, TileActs { quants, scales, sums }) in acts.split(B::BLOCKS).enumerate() {
        let unit = &panel[i];
        for b in 0..B::BLOCKS {
            let [d_x, s_x] = scales[b];
            for lane in 0..PANEL {
                let float = |halves: &[u16; PANEL]| f16::from_bits(halves[lane]).to_f32();
                let (d, codes, scales) = (float(unit.d()), unit.codes(b).lane(lane), unit.scales(b));
                for n in 0..N {
                    let acc = &mut out[n][lane];
                    let x_sums = sums[b][n].map(i32::from);
                    let mut dots = half_dots(&codes, &quants[b][n]);
                    if let (Scales::Each(_) | Scales::Halves(_), Zero::Code(z)) = (scales, unit.zero(b)) {
                        dots = [0, 1].map(|half| dots[half] - i32::from(z) * x_sums[half]);
                    }
                    let [low, high] = scales.lane(lane).map(i32::from);
                    *acc += (low * dots[0] + high * dots[1]) as f32 * (d * d_x[n]);
                    match unit.zero(b) {
                        Zero::Code(z) if matches!(scales, Scales::One) => *acc += d * -f32::from(z) * s_x[n],
                        Zero::Code(_) => {}
                        Zero::Add(m) => *acc += float(m) * s_x[n],
                        Zero::Mins(dmin, mins) => *acc += -float(dmin) * f32::from(mins[lane]) * s_x[n],
                        Zero::HighNibbles(dmin, packed) => {
                            let [low, high] = packed[lane].map(|byte| i32::from(byte >> 4));
                            let mins = low * x_sums[0] + high * x_sums[1];
                            *acc += mins as f32 * (-float(dmin) * d_x[n]);
                        }
                    }
                }
            }
        }
    }
}

/// Exact dot products of the first and the last 16 unsigned codes with signed quants.
pub(super) fn half_dots(codes: &[u8; BLOCK], x: &[i8; BLOCK]) -> [i32; 2] {
    [0, 16].map(|at| codes[at..at + 16].iter().zip(&x[at..]).map(|(&q, &x)| i32::from(q) * i32::from(x)).sum())
}

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
