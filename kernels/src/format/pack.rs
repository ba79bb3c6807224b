//! Packed weights: panels of 16 output rows, side by side, in the order in which kernels read them.
//!
//! ```text
//!   panel            block 0 | block 1 | ...                  a block holds 32 columns of 16 rows
//!   block            d: 16 x f16 | (m: 16 x f16) | quants     the same bytes as 16 blocks of the file
//!   quants, nibbles  4 x 64 bytes: lane r (4 bytes) = row r;  64-byte word j: low nibbles = columns 4j..4j+4,
//!                                                                             high nibbles = columns 16+4j..16+4j+4
//!   quants, bytes    8 x 64 bytes: word j = columns 4j..4j+4, stored as q + 128
//!   floats           column by column, 16 rows each
//! ```
//!
//! One 64-byte word is one AVX-512 vector, two AVX2 vectors or four NEON vectors, with an output row per 32-bit lane: dot
//! products of unsigned weights and signed activations land in the lane of their row, and no lane ever crosses to another.

use half::f16;

use super::WeightType;
use super::ggml::BLOCK;
use crate::memory::{Plain, cast, cast_mut};

/// Output rows of a panel.
pub(crate) const PANEL: usize = 16;

/// 32 columns of 16 rows of [`WeightType::Q4_0`].
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct Q4_0x16 {
    d: [u16; PANEL],
    q: [[u8; 64]; 4],
}

/// 32 columns of 16 rows of [`WeightType::Q4_1`].
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct Q4_1x16 {
    d: [u16; PANEL],
    m: [u16; PANEL],
    q: [[u8; 64]; 4],
}

/// 32 columns of 16 rows of [`WeightType::Q8_0`].
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct Q8_0x16 {
    d: [u16; PANEL],
    q: [[u8; 64]; 8],
}

const _: () = assert!(size_of::<Q4_0x16>() == PANEL * WeightType::Q4_0.block_bytes());
const _: () = assert!(size_of::<Q4_1x16>() == PANEL * WeightType::Q4_1.block_bytes());
const _: () = assert!(size_of::<Q8_0x16>() == PANEL * WeightType::Q8_0.block_bytes());

impl Plain for Q4_0x16 {}
impl Plain for Q4_1x16 {}
impl Plain for Q8_0x16 {}

/// The unsigned quants of a block.
#[derive(Clone, Copy)]
pub(crate) enum Quants<'a> {
    /// 4 bits each.
    Nibbles(&'a [[u8; 64]; 4]),
    /// 8 bits each.
    Bytes(&'a [[u8; 64]; 8]),
}

/// What is added to `d * q`, per row.
#[derive(Clone, Copy)]
pub(crate) enum Offset<'a> {
    /// A value of its own, as f16.
    Each(&'a [u16; PANEL]),
    /// This many times `d`.
    Scales(f32),
}

/// A block of a packed panel: `weight = d * q + offset`, with unsigned `q`.
pub(crate) trait PanelBlock: Plain {
    /// Bits of a quant: 4 or 8.
    const BITS: usize;

    /// Scales of the 16 rows, as f16.
    fn scales(&self) -> &[u16; PANEL];
    /// Offsets of the 16 rows.
    fn offset(&self) -> Offset<'_>;
    /// Quants of the 16 rows.
    fn quants(&self) -> Quants<'_>;
    /// Writes row `lane` from the bytes of one block in a file.
    fn set_lane(&mut self, lane: usize, source: &[u8]);

    /// Values of row `lane`.
    fn lane(&self, lane: usize, out: &mut [f32; BLOCK]) {
        let d = f16::from_bits(self.scales()[lane]).to_f32();
        for (column, value) in out.iter_mut().enumerate() {
            let q = match self.quants() {
                Quants::Nibbles(q) => {
                    let byte = q[column % 16 / 4][lane * 4 + column % 4];
                    if column < 16 { byte & 15 } else { byte >> 4 }
                }
                Quants::Bytes(q) => q[column / 4][lane * 4 + column % 4],
            };
            *value = match self.offset() {
                Offset::Each(m) => d * f32::from(q) + f16::from_bits(m[lane]).to_f32(),
                Offset::Scales(times) => d * (f32::from(q) + times),
            };
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Copies 4-byte groups of a row into its lane of each word.
fn set_words<const WORDS: usize>(words: &mut [[u8; 64]; WORDS], lane: usize, source: &[u8], flip: u8) {
    for (word, group) in words.iter_mut().zip(source.as_chunks::<4>().0) {
        let group = u32::from_ne_bytes(*group) ^ u32::from_ne_bytes([flip; 4]);
        word[lane * 4..][..4].copy_from_slice(&group.to_ne_bytes());
    }
}

impl PanelBlock for Q4_0x16 {
    const BITS: usize = 4;

    #[inline(always)]
    fn scales(&self) -> &[u16; PANEL] {
        &self.d
    }
    #[inline(always)]
    fn offset(&self) -> Offset<'_> {
        Offset::Scales(-8.0)
    }
    #[inline(always)]
    fn quants(&self) -> Quants<'_> {
        Quants::Nibbles(&self.q)
    }
    fn set_lane(&mut self, lane: usize, source: &[u8]) {
        self.d[lane] = u16_at(source, 0);
        set_words(&mut self.q, lane, &source[2..], 0);
    }
}

impl PanelBlock for Q4_1x16 {
    const BITS: usize = 4;

    #[inline(always)]
    fn scales(&self) -> &[u16; PANEL] {
        &self.d
    }
    #[inline(always)]
    fn offset(&self) -> Offset<'_> {
        Offset::Each(&self.m)
    }
    #[inline(always)]
    fn quants(&self) -> Quants<'_> {
        Quants::Nibbles(&self.q)
    }
    fn set_lane(&mut self, lane: usize, source: &[u8]) {
        self.d[lane] = u16_at(source, 0);
        self.m[lane] = u16_at(source, 2);
        set_words(&mut self.q, lane, &source[4..], 0);
    }
}

impl PanelBlock for Q8_0x16 {
    const BITS: usize = 8;

    #[inline(always)]
    fn scales(&self) -> &[u16; PANEL] {
        &self.d
    }
    #[inline(always)]
    fn offset(&self) -> Offset<'_> {
        Offset::Scales(-128.0)
    }
    #[inline(always)]
    fn quants(&self) -> Quants<'_> {
        Quants::Bytes(&self.q)
    }
    fn set_lane(&mut self, lane: usize, source: &[u8]) {
        self.d[lane] = u16_at(source, 0);
        set_words(&mut self.q, lane, &source[2..], 0x80);
    }
}

/// Bytes of a packed panel of `cols` columns; `None` when the type does not allow that number.
pub(crate) fn panel_bytes(ty: WeightType, cols: usize) -> Option<usize> {
    ty.row_bytes(cols)?.checked_mul(PANEL)
}

/// Packs up to 16 consecutive rows of a file into a zeroed panel. Rows that are missing stay zero.
///
/// # Panics
/// When the lengths do not belong to `ty` and `cols`.
pub(crate) fn pack_panel(ty: WeightType, cols: usize, rows: &[u8], panel: &mut [u8]) {
    let row_bytes = ty.row_bytes(cols).expect("the shape was checked when the matrix was taken");
    assert!(
        rows.len() <= row_bytes * PANEL && rows.len().is_multiple_of(row_bytes) && panel.len() == row_bytes * PANEL
    );
    match ty {
        WeightType::F32 => pack_floats::<4>(rows, row_bytes, panel),
        WeightType::F16 | WeightType::Bf16 => pack_floats::<2>(rows, row_bytes, panel),
        WeightType::Q4_0 => pack_blocks::<Q4_0x16>(ty, rows, row_bytes, panel),
        WeightType::Q4_1 => pack_blocks::<Q4_1x16>(ty, rows, row_bytes, panel),
        WeightType::Q8_0 => pack_blocks::<Q8_0x16>(ty, rows, row_bytes, panel),
    }
}

fn pack_blocks<B: PanelBlock>(ty: WeightType, rows: &[u8], row_bytes: usize, panel: &mut [u8]) {
    const { assert!(size_of::<B>() >= PANEL * (2 + BLOCK * B::BITS / 8), "quants and at least a scale for each row") };
    for (lane, row) in rows.chunks_exact(row_bytes).enumerate() {
        for (block, source) in cast_mut::<B>(panel).iter_mut().zip(row.chunks_exact(ty.block_bytes())) {
            block.set_lane(lane, source);
        }
    }
}

/// Files are little-endian, kernels read native numbers.
fn pack_floats<const SIZE: usize>(rows: &[u8], row_bytes: usize, panel: &mut [u8]) {
    for (lane, row) in rows.chunks_exact(row_bytes).enumerate() {
        for (column, source) in row.as_chunks::<SIZE>().0.iter().enumerate() {
            let mut value = *source;
            if cfg!(target_endian = "big") {
                value.reverse();
            }
            panel[(column * PANEL + lane) * SIZE..][..SIZE].copy_from_slice(&value);
        }
    }
}

/// Reads row `lane` of a packed panel back as floats.
///
/// # Panics
/// When the lengths do not belong to `ty` and `out.len()`.
pub(crate) fn panel_row(ty: WeightType, panel: &[u8], lane: usize, out: &mut [f32]) {
    assert_eq!(Some(panel.len()), panel_bytes(ty, out.len()), "bytes of a panel");
    match ty {
        WeightType::F32 => read_floats(cast::<[f32; PANEL]>(panel), lane, out, |x| x),
        WeightType::F16 => read_floats(cast::<[u16; PANEL]>(panel), lane, out, |x| f16::from_bits(x).to_f32()),
        WeightType::Bf16 => read_floats(cast::<[u16; PANEL]>(panel), lane, out, |x| f32::from_bits(u32::from(x) << 16)),
        WeightType::Q4_0 => read_blocks(cast::<Q4_0x16>(panel), lane, out),
        WeightType::Q4_1 => read_blocks(cast::<Q4_1x16>(panel), lane, out),
        WeightType::Q8_0 => read_blocks(cast::<Q8_0x16>(panel), lane, out),
    }
}

fn read_blocks<B: PanelBlock>(panel: &[B], lane: usize, out: &mut [f32]) {
    for (block, values) in panel.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        block.lane(lane, values);
    }
}

fn read_floats<T: Plain>(panel: &[[T; PANEL]], lane: usize, out: &mut [f32], to_f32: impl Fn(T) -> f32) {
    for (column, value) in panel.iter().zip(out) {
        *value = to_f32(column[lane]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ggml::dequantise_row;
    use crate::memory::Arena;

    const TYPES: [WeightType; 6] =
        [WeightType::F32, WeightType::F16, WeightType::Bf16, WeightType::Q4_0, WeightType::Q4_1, WeightType::Q8_0];

    #[test]
    fn panels_hold_what_files_say() {
        for ty in TYPES {
            for (rows, cols) in [(16, 32), (16, 96), (5, 64), (1, 32)] {
                let row_bytes = ty.row_bytes(cols).unwrap();
                // Any bytes make blocks; the top bits of each byte are kept low so that no float is NaN or infinite.
                let file: Vec<u8> = (0..rows * row_bytes).map(|i| ((i * 167 + i / 7) % 251) as u8 & 0xbb).collect();
                let mut panel = Arena::<u8>::zeroed(panel_bytes(ty, cols).unwrap(), "test").unwrap();
                pack_panel(ty, cols, &file, &mut panel);
                let (mut expected, mut got) = (vec![0.0; cols], vec![1.0; cols]);
                for lane in 0..PANEL {
                    panel_row(ty, &panel, lane, &mut got);
                    if lane < rows {
                        dequantise_row(ty, &file[lane * row_bytes..][..row_bytes], &mut expected);
                    } else {
                        expected.fill(0.0);
                    }
                    for (a, b) in expected.iter().zip(&got) {
                        assert!((a - b).abs() <= 1e-6 * a.abs().max(b.abs()) + 1e-30, "{}: {a} {b}", ty.name());
                    }
                }
            }
        }
    }
}
