//! The loops over rows, blocks and halves of a panel, around the dot product of an instruction set.

/// From this many rows on, a panel is unpacked before it is used.
pub(super) const UNPACK_ROWS: usize = 12;

/// Repeats the body for each of the 8 groups of a block, unrolled.
macro_rules! each_group {
    ($j:ident => $body:block) => {
        each_group!(@each $j $body 0 1 2 3 4 5 6 7)
    };
    (@each $j:ident $body:block $($group:literal)*) => {
        $({
            let $j: usize = $group;
            $body
        })*
    };
}

/// Implements [`IntDot`](crate::cpu::gemm::IntDot) for the token `$token`, which proves `$features`, from what the module that
/// calls this defines:
///
/// ```text
///   SIGNED                whether it wants codes of 8 bits signed
///   side_by_side::<B>()   true where both vectors of a panel's rows are multiplied at once: each broadcast serves two products
///   dots::<B, N, H>(..)   a block's scaled sums, of H vectors of 8 weight rows with N rows of activations
/// ```
macro_rules! tiles {
    ($token:ty, $features:literal) => {
        use std::arch::x86_64::{_mm256_setzero_ps, _mm256_setzero_si256};

        use super::memory::{half_mut, load_bytes, store_f32};
        use super::tiles::UNPACK_ROWS;
        use super::{
            Factors, Strip, accumulate, barrier, factors, group, has_no_zero, in_memory, strip_factors, strip_scales,
            unpack,
        };
        use crate::cpu::act::Tile;
        use crate::cpu::gemm::{Group, IntDot, Lanes, PREFETCH, TileActs, exact, prefetch};
        use crate::format::ggml::BLOCK;
        use crate::format::pack::ZeroKind;
        use crate::memory::{cast, cast_mut};

        impl IntDot for $token {
            const TILE_ROWS: usize = 4;

            fn scratch_bytes(cols: usize) -> usize {
                2 * (cols / BLOCK) * size_of::<Strip<3>>()
            }

            #[inline(always)]
            fn panel<B: Packed>(self, panel: &[B], rows: Group<'_>, scratch: &mut [u8], out: &mut [Lanes]) {
                // SAFETY: `self` came from `detect`, which saw every one of these features.
                unsafe { any_rows(panel, rows, scratch, out) }
            }
        }

        #[target_feature(enable = $features)]
        fn any_rows<B: Packed>(panel: &[B], rows: Group<'_>, scratch: &mut [u8], out: &mut [Lanes]) {
            // What `strip_scales` and `strip_factors` read: nothing, one scale, or two and the pairs for the type's zero.
            let ints = match B::SHAPE.scales {
                0 => 0,
                1 if has_no_zero::<B, SIGNED>() || matches!(B::SHAPE.zero, ZeroKind::Float) => 1,
                _ => 3,
            };
            match ints {
                0 => rows_of::<B, 0>(panel, rows, scratch, out),
                1 => rows_of::<B, 1>(panel, rows, scratch, out),
                _ => rows_of::<B, 3>(panel, rows, scratch, out),
            }
        }

        /// Multiplies a panel, whose blocks have `I` vectors of whole numbers.
        #[target_feature(enable = $features)]
        fn rows_of<B: Packed, const I: usize>(panel: &[B], rows: Group<'_>, scratch: &mut [u8], out: &mut [Lanes]) {
            if rows.len() >= UNPACK_ROWS {
                return unpacked::<B, I>(panel, rows, scratch, out);
            }
            for tile in rows.tiles() {
                let out = &mut out[tile.row - rows.first..][..tile.len];
                match tile.len {
                    4 => packed_tile::<B, 4>(panel, rows.acts(tile), exact(out)),
                    2 => packed_tile::<B, 2>(panel, rows.acts(tile), exact(out)),
                    _ => packed_tile::<B, 1>(panel, rows.acts(tile), exact(out)),
                }
            }
        }

        /// Multiplies a packed panel with one tile.
        #[inline(never)]
        #[target_feature(enable = $features)]
        fn packed_tile<B: Packed, const N: usize>(panel: &[B], acts: TileActs<'_, N>, out: &mut [Lanes; N]) {
            let mut acc = [[_mm256_setzero_ps(); 2]; N];
            for (unit, acts) in panel.iter().zip(acts.split(B::BLOCKS)) {
                for b in 0..B::BLOCKS {
                    prefetch(unit, b, PREFETCH);
                    let ([d_x, s_x], x_sums) = (acts.scales[b], &acts.sums[b]);
                    let w = [factors::<B, SIGNED>(unit, b, 0), factors::<B, SIGNED>(unit, b, 1)];
                    let codes = |j, half| group::<SIGNED>(unit.codes(b), j, half);
                    let mut sums = [[_mm256_setzero_si256(); 2]; N];
                    if side_by_side::<B>() {
                        sums = dots::<B, N, 2>(codes, [w[0].scales, w[1].scales], &acts.quants[b]);
                    } else {
                        // Half by half: sums of runs and of the block at once would need too many registers.
                        for half in 0..2 {
                            let part = dots::<B, N, 1>(|j, _| codes(j, half), [w[half].scales], &acts.quants[b]);
                            for n in 0..N {
                                sums[n][half] = part[n][0];
                            }
                        }
                    }
                    for n in 0..N {
                        for half in 0..2 {
                            acc[n][half] = accumulate::<B, SIGNED>(
                                acc[n][half],
                                sums[n][half],
                                &w[half],
                                [d_x[n], s_x[n]],
                                x_sums[n],
                            );
                        }
                    }
                }
            }
            for ([low, high], out) in acc.into_iter().zip(out) {
                store_f32(low, half_mut(out, 0));
                store_f32(high, half_mut(out, 1));
            }
        }

        /// Unpacks a panel, then multiplies it with every tile.
        #[target_feature(enable = $features)]
        fn unpacked<B: Packed, const I: usize>(panel: &[B], rows: Group<'_>, scratch: &mut [u8], out: &mut [Lanes]) {
            let blocks = panel.len() * B::BLOCKS;
            let scratch = &mut scratch[..2 * blocks * size_of::<Strip<I>>()];
            let strips = cast_mut::<Strip<I>>(scratch);
            for (i, unit) in panel.iter().enumerate() {
                for b in 0..B::BLOCKS {
                    for half in 0..2 {
                        let block = i * B::BLOCKS + b;
                        // Side by side where both are multiplied at once, one after the other where not.
                        let place = if side_by_side::<B>() { 2 * block + half } else { half * blocks + block };
                        unpack::<B, SIGNED, I>(unit, b, half, &mut strips[place]);
                    }
                }
            }
            let strips = cast::<Strip<I>>(scratch);
            // The next panel arrives while this one is multiplied with the first tile.
            let mut this = Some(panel);
            if side_by_side::<B>() {
                for tile in rows.tiles() {
                    strip_tiles::<B, I, 2>(strips.as_chunks().0, (0, this.take()), (rows, tile), out);
                }
            } else {
                for (half, strip) in strips.chunks_exact(blocks).enumerate() {
                    for tile in rows.tiles() {
                        strip_tiles::<B, I, 1>(strip.as_chunks().0, (half, this.take()), (rows, tile), out);
                    }
                }
            }
        }

        /// Multiplies `H` strips side by side, from `first` on, with one tile; asks meanwhile for what follows the panel, when it is
        /// given.
        #[inline]
        #[target_feature(enable = $features)]
        fn strip_tiles<B: Packed, const I: usize, const H: usize>(
            strips: &[[Strip<I>; H]],
            first: (usize, Option<&[B]>),
            (rows, tile): (Group<'_>, Tile),
            out: &mut [Lanes],
        ) {
            let out = &mut out[tile.row - rows.first..][..tile.len];
            match tile.len {
                4 => strip_tile::<B, I, H, 4>(strips, first, rows.acts(tile), exact(out)),
                2 => strip_tile::<B, I, H, 2>(strips, first, rows.acts(tile), exact(out)),
                _ => strip_tile::<B, I, H, 1>(strips, first, rows.acts(tile), exact(out)),
            }
        }

        #[inline(never)]
        #[target_feature(enable = $features)]
        fn strip_tile<B: Packed, const I: usize, const H: usize, const N: usize>(
            strips: &[[Strip<I>; H]],
            (first, panel): (usize, Option<&[B]>),
            acts: TileActs<'_, N>,
            out: &mut [Lanes; N],
        ) {
            let mut place = [[_mm256_setzero_ps(); H]; N];
            let acc = in_memory(&mut place);
            let acts = acts.quants.iter().zip(acts.scales.iter().zip(acts.sums));
            for (i, (strips, (quants, ([d_x, s_x], x_sums)))) in strips.iter().zip(acts).enumerate() {
                if let Some(panel) = panel {
                    prefetch(&panel[i / B::BLOCKS], i % B::BLOCKS, size_of_val(panel));
                }
                let mut scales = [[_mm256_setzero_si256(); 2]; H];
                for (scales, strip) in scales.iter_mut().zip(strips) {
                    *scales = strip_scales(strip);
                }
                barrier();
                let codes = |j: usize, h: usize| load_bytes(&strips[h].codes[j]);
                let sums = dots::<B, N, H>(codes, scales, quants);
                let w: [Factors; H] = std::array::from_fn(|h| strip_factors(&strips[h], scales[h]));
                for n in 0..N {
                    let mut sum = acc[n];
                    for h in 0..H {
                        sum[h] = accumulate::<B, SIGNED>(sum[h], sums[n][h], &w[h], [d_x[n], s_x[n]], x_sums[n]);
                    }
                    acc[n] = sum;
                }
            }
            for (acc, out) in acc.iter().zip(out) {
                for (h, acc) in acc.iter().enumerate() {
                    store_f32(*acc, half_mut(out, first + h));
                }
            }
        }
    };
}
