//! Integer dot products in plain Rust: the reference.

use half::f16;

use super::{Group, IntDot, Lanes, TileActs, exact};
use crate::cpu::simd::Scalar;
use crate::format::ggml::BLOCK;
use crate::format::pack::{PANEL, Packed, Scales, Zero};

impl IntDot for Scalar {
    const TILE_ROWS: usize = 4;

    fn panel<B: Packed>(self, panel: &[B], rows: Group<'_>, _: &mut [u8], out: &mut [Lanes]) {
        for tile in rows.tiles() {
            let out = &mut out[tile.row - rows.first..][..tile.len];
            match tile.len {
                4 => tile_of::<B, 4>(panel, rows.acts(tile), exact(out)),
                2 => tile_of::<B, 2>(panel, rows.acts(tile), exact(out)),
                _ => tile_of::<B, 1>(panel, rows.acts(tile), exact(out)),
            }
        }
    }
}

/// Multiplies a panel with one tile.
fn tile_of<B: Packed, const N: usize>(panel: &[B], acts: TileActs<'_, N>, out: &mut [Lanes; N]) {
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
fn half_dots(codes: &[u8; BLOCK], x: &[i8; BLOCK]) -> [i32; 2] {
    [0, 16].map(|at| codes[at..at + 16].iter().zip(&x[at..]).map(|(&q, &x)| i32::from(q) * i32::from(x)).sum())
}
