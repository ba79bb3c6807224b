//! Matrix products: one panel of 16 output rows against many rows of activations.
//!
//! ```text
//!   multiply(run of panels, rows)  16 outputs of each row and panel, into a small stage [panels][rows][16]
//!     │ blocks                        │ floats
//!   IntDot::panel                    float::panel
//!     └─ tiles of 1, 2, 4 or 8 rows share each load of the panel
//! ```
//!
//! **Numbers.** Unsigned codes times signed activations, exact in i32 within a block of 32 columns, whole-number scales
//! included; then, block after block, `acc = fma(sum, d_w * d_x, acc)`, and what the type's zero asks for ([`Zero`]):
//!
//! ```text
//!   Code(z), no scales     acc = fma(-z * d_w, s_x, acc)                      s_x = d_x * sum of the block's quants x
//!   Code(z), scales s      nothing: sum = s . (codes . x - z * sum of x)      for each 16 columns
//!   Add(m)                 acc = fma(m, s_x, acc)
//!   Mins(dmin, m)          acc = fma(-(dmin * m), s_x, acc)
//!   HighNibbles(dmin, m)   acc = fma(m . sum of x, -dmin * d_x, acc)          for each 16 columns
//! ```
//!
//! That order is the same for every tile, so a row's result does not depend on the rows beside it. AVX2 takes codes of 8 bits
//! with their sign, so that their zero asks for nothing.
//!
//! [`Zero`]: crate::format::pack::Zero

pub(super) mod float;
mod scalar;

#[cfg(target_arch = "x86_64")]
mod avx;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

#[cfg(test)]
mod tests;

use super::act::{ActReader, Tile, tiles};
use super::isa::Isa;
use super::simd::{Kernel, Simd, dispatch, prefetch_line};
use super::weights::Run;
use crate::WeightType;
use crate::format::ggml::BLOCK;
use crate::format::pack::{ForPacked, PANEL, Packed, for_packed};
use crate::memory::{Plain, cast};

/// 16 outputs of one activation row.
pub(super) type Lanes = [f32; PANEL];

/// Rows that are multiplied with a panel before the next panel: their activations stay in the L2 cache, and so does what
/// an instruction set unpacks a panel into.
pub(super) const GROUP: usize = 128;

/// One block of a tile of `N` rows: their quants.
pub(super) type TileQuants<const N: usize> = [[i8; BLOCK]; N];
/// One block of a tile of `N` rows: their scales, then their scaled sums.
pub(super) type TileScales<const N: usize> = [[f32; N]; 2];
/// One block of a tile of `N` rows: sums of their quants, of the first and the last 16 columns.
pub(super) type TileSums<const N: usize> = [[i16; 2]; N];

/// Blocks of a tile of `N` rows, one entry for each in every slice.
#[derive(Clone, Copy)]
pub(crate) struct TileActs<'a, const N: usize> {
    quants: &'a [TileQuants<N>],
    scales: &'a [TileScales<N>],
    sums: &'a [TileSums<N>],
}

impl<'a, const N: usize> TileActs<'a, N> {
    /// The same in runs of `blocks` blocks.
    #[inline(always)]
    fn split(self, blocks: usize) -> impl Iterator<Item = TileActs<'a, N>> {
        let floats = self.scales.chunks_exact(blocks).zip(self.sums.chunks_exact(blocks));
        let runs = self.quants.chunks_exact(blocks).zip(floats);
        runs.map(|(quants, (scales, sums))| TileActs { quants, scales, sums })
    }
}

/// Integer dot products of one instruction set.
pub(crate) trait IntDot: Copy {
    /// Rows of a full activation tile: 4 or 8.
    const TILE_ROWS: usize;

    /// Bytes of scratch that [`IntDot::panel`] wants for panels of `cols` columns.
    fn scratch_bytes(cols: usize) -> usize {
        let _ = cols;
        0
    }

    /// Multiplies a panel with all rows of a group; `out` has one entry for each.
    fn panel<B: Packed>(self, panel: &[B], rows: Group<'_>, scratch: &mut [u8], out: &mut [Lanes]);
}

/// Consecutive activation rows that are multiplied together: whole tiles.
#[derive(Clone, Copy)]
pub(crate) struct Group<'a> {
    acts: ActReader<'a>,
    first: usize,
    end: usize,
}

impl<'a> Group<'a> {
    /// All groups of an activation.
    pub(super) fn split(acts: ActReader<'a>) -> impl Iterator<Item = Group<'a>> {
        (0..acts.rows).step_by(GROUP).map(move |first| Group { acts, first, end: acts.rows.min(first + GROUP) })
    }

    /// Index of the first row.
    pub(super) fn first(&self) -> usize {
        self.first
    }

    /// Number of rows.
    pub(super) fn len(&self) -> usize {
        self.end - self.first
    }

    #[inline(always)]
    fn tiles(&self) -> impl Iterator<Item = Tile> + use<> {
        tiles(self.first, self.end, self.acts.tile_rows)
    }

    /// All blocks of a tile of `N` rows.
    #[inline(always)]
    fn acts<const N: usize>(&self, tile: Tile) -> TileActs<'a, N> {
        let (quants, scales) = self.acts.tile(tile);
        TileActs {
            quants: quants.as_chunks::<BLOCK>().0.as_chunks::<N>().0,
            scales: scales.as_chunks::<N>().0.as_chunks::<2>().0,
            sums: self.acts.sums(tile).as_chunks::<N>().0,
        }
    }
}

/// How far ahead of the block in use packed weights are fetched, in bytes: the hardware's own prefetch stops at each
/// 4 KiB page.
const PREFETCH: usize = 4096;

/// Asks for the memory `ahead` bytes after block `b` of a unit, which need not exist.
#[inline(always)]
fn prefetch<B: Packed>(unit: &B, b: usize, ahead: usize) {
    let (start, end) = (size_of::<B>() * b / B::BLOCKS, size_of::<B>() * (b + 1) / B::BLOCKS);
    let ahead = std::ptr::from_ref(unit).cast::<u8>().wrapping_add(ahead);
    for line in start.div_ceil(64)..end.div_ceil(64) {
        prefetch_line(ahead.wrapping_add(line * 64));
    }
}

/// A slice as an array of the length that it is known to have.
#[inline(always)]
fn exact<T: Plain, const N: usize>(slice: &mut [T]) -> &mut [T; N] {
    slice.try_into().expect("the slice was cut to the tile's length")
}

/// Multiplies packed panels with all rows of a group; `out` has room for an entry for each panel and row, panel by panel.
pub(super) fn multiply(isa: Isa, run: Run<'_>, rows: Group<'_>, to: (&mut [u8], &mut [Lanes])) {
    let (scratch, out) = to;
    dispatch(isa, Multiply { run, rows, scratch, out });
}

struct Multiply<'a> {
    run: Run<'a>,
    rows: Group<'a>,
    scratch: &'a mut [u8],
    out: &'a mut [Lanes],
}

impl Kernel for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { run, rows, scratch, out } = self;
        match run.ty {
            WeightType::F32 => floats::<S, float::AsF32>(s, run, rows, out),
            WeightType::F16 => floats::<S, float::AsF16>(s, run, rows, out),
            WeightType::Bf16 => floats::<S, float::AsBf16>(s, run, rows, out),
            ty => {
                for_packed(ty, Blocks { s, run, rows, scratch, out });
            }
        }
    }
}

#[inline(always)]
fn floats<S: Simd, C: float::Column>(s: S, run: Run<'_>, rows: Group<'_>, out: &mut [Lanes]) {
    for (panel, out) in run.bytes.chunks_exact(run.panel_bytes).zip(out.chunks_exact_mut(rows.len())) {
        float::panel(s, cast::<C>(panel), rows, out);
    }
}

struct Blocks<'a, S> {
    s: S,
    run: Run<'a>,
    rows: Group<'a>,
    scratch: &'a mut [u8],
    out: &'a mut [Lanes],
}

impl<S: Simd> ForPacked for Blocks<'_, S> {
    type Output = ();

    #[inline(always)]
    fn run<B: Packed>(self) {
        let Self { s, run, rows, scratch, out } = self;
        let units = cast::<B>(run.bytes);
        for (panel, out) in units.chunks_exact(run.panel_bytes / size_of::<B>()).zip(out.chunks_exact_mut(rows.len())) {
            s.panel(panel, rows, scratch, out);
        }
    }
}
