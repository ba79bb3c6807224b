//! Packed weights: panels of 16 output rows, side by side, in the order in which kernels read them.
//!
//! ```text
//!   panel    unit 0 | unit 1 | ...           a unit holds a file's block, 32 or 256 columns, of 16 rows
//!   unit     d: 16 x f16 | ..                see `simple` (32 columns) and `superblocks` (256 columns)
//!   floats   column by column, 16 rows each
//! ```
//!
//! Quants lie in words of 64 bytes, lane r (4 bytes) = row r. Of the 8 groups of 4 columns of a block, group j holds columns
//! `4j..4j + 4`, one for each byte of the lane:
//!
//! ```text
//!   bytes     8 words   word j = group j, stored as q + 128
//!   nibbles   4 words   word j: low nibbles = group j, high nibbles = group j + 4
//!   pairs     2 words   word p: bits 2k..2k + 2 = group 4p + k
//!   bits      1 word    bit j = group j
//! ```
//!
//! One word is one AVX-512 vector, two AVX2 vectors or four NEON vectors, with an output row per 32-bit lane: dot products of
//! unsigned weights and signed activations land in the lane of their row, and no lane ever crosses to another.

mod simple;
mod superblocks;
#[cfg(test)]
mod tests;

use half::f16;

use super::WeightType;
use super::ggml::{BLOCK, IQ4_VALUES};
use crate::memory::{Plain, cast, cast_mut};
use simple::{Iq4Nlx16, Q4_0x16, Q4_1x16, Q5_0x16, Q5_1x16, Q8_0x16};
use superblocks::{Iq4Xsx16, Q2Kx16, Q3Kx16, Q4Kx16, Q5Kx16, Q6Kx16};

/// Output rows of a panel.
pub(crate) const PANEL: usize = 16;

/// Four columns of 16 rows, or several such groups of few bits.
pub(crate) type Word = [u8; 64];

/// What the nibbles of the IQ4 types stand for, plus 128: the code that kernels multiply.
pub(crate) const IQ4_CODES: [u8; 16] = {
    let mut codes = [0; 16];
    let mut i = 0;
    while i < 16 {
        codes[i] = IQ4_VALUES[i].cast_unsigned() ^ 0x80;
        i += 1;
    }
    codes
};

/// The unsigned codes of a block: 32 columns of 16 rows.
#[derive(Clone, Copy)]
pub(crate) enum Codes<'a> {
    /// 2 bits: pairs.
    Two(&'a [Word; 2]),
    /// 3 bits: pairs, and bit 2.
    Three(&'a [Word; 2], &'a Word),
    /// 4 bits: nibbles.
    Four(&'a [Word; 4]),
    /// 5 bits: nibbles, and bit 4.
    Five(&'a [Word; 4], &'a Word),
    /// 6 bits: nibbles, and bits 4 and 5 as pairs.
    Six(&'a [Word; 4], &'a [Word; 2]),
    /// 8 bits: bytes.
    Eight(&'a [Word; 8]),
    /// Nibbles that choose from [`IQ4_CODES`], 8 bits.
    Table(&'a [Word; 4]),
}

impl Codes<'_> {
    /// Codes of row `lane`.
    pub(crate) fn lane(self, lane: usize) -> [u8; BLOCK] {
        let mut out = [0; BLOCK];
        for (column, code) in out.iter_mut().enumerate() {
            let (group, at) = (column / 4, lane * 4 + column % 4);
            let nibble = |words: &[Word; 4]| words[group % 4][at] >> (4 * (group / 4)) & 15;
            let pair = |words: &[Word; 2]| words[group / 4][at] >> (2 * (group % 4)) & 3;
            let bit = |word: &Word| word[at] >> group & 1;
            *code = match self {
                Codes::Two(low) => pair(low),
                Codes::Three(low, high) => pair(low) | bit(high) << 2,
                Codes::Four(low) => nibble(low),
                Codes::Five(low, high) => nibble(low) | bit(high) << 4,
                Codes::Six(low, high) => nibble(low) | pair(high) << 4,
                Codes::Eight(words) => words[group][at],
                Codes::Table(low) => IQ4_CODES[usize::from(nibble(low))],
            };
        }
        out
    }
}

/// Whole numbers that the codes of a block are scaled with, before `d`.
#[derive(Clone, Copy)]
pub(crate) enum Scales<'a> {
    /// None: `d` alone.
    One,
    /// One for each row.
    Each(&'a [i8; PANEL]),
    /// Two for each row, one for each 16 columns.
    Halves(&'a [[i8; 2]; PANEL]),
    /// Likewise, in the low nibbles; the high ones are mins.
    LowNibbles(&'a [[u8; 2]; PANEL]),
}

impl Scales<'_> {
    /// Scales of row `lane`, for each 16 columns.
    pub(crate) fn lane(self, lane: usize) -> [i8; 2] {
        match self {
            Scales::One => [1; 2],
            Scales::Each(scales) => [scales[lane]; 2],
            Scales::Halves(scales) => scales[lane],
            Scales::LowNibbles(packed) => packed[lane].map(|byte| (byte & 15) as i8),
        }
    }
}

/// Where the values of a block have their zero.
#[derive(Clone, Copy)]
pub(crate) enum Zero<'a> {
    /// At this code.
    Code(u8),
    /// `m`, as f16, is added for each row.
    Add(&'a [u16; PANEL]),
    /// `dmin * min` is taken off for each row; `dmin` as f16.
    Mins(&'a [u16; PANEL], &'a [u8; PANEL]),
    /// Likewise for each 16 columns of a row; mins are the high nibbles.
    HighNibbles(&'a [u16; PANEL], &'a [[u8; 2]; PANEL]),
}

/// What a kernel must know of a type before it runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Bits of a code as it is multiplied.
    pub(crate) bits: usize,
    /// Whole-number scales of a row in a block: 0, 1 or 2.
    pub(crate) scales: usize,
    /// How its zero is accounted for.
    pub(crate) zero: ZeroKind,
}

/// How the zero of a type is accounted for in a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ZeroKind {
    /// As a float for each row, times the scaled sum of the activations: [`Zero::Code`] without whole-number scales,
    /// [`Zero::Add`] and [`Zero::Mins`].
    Float,
    /// In whole numbers, from the sums of 16 activations: [`Zero::Code`] with whole-number scales.
    Codes,
    /// Likewise, but with a scale of its own: [`Zero::HighNibbles`].
    Mins,
}

/// A unit of a packed panel: 16 rows of one block of a file.
pub(crate) trait Packed: Plain {
    /// What it is packed from.
    const TYPE: WeightType;
    /// What its accessors return.
    const SHAPE: Shape;
    /// Blocks of 32 columns.
    const BLOCKS: usize = Self::TYPE.block_len() / BLOCK;

    /// Scales of the 16 rows, as f16.
    fn d(&self) -> &[u16; PANEL];
    /// Codes of a block.
    fn codes(&self, block: usize) -> Codes<'_>;
    /// Scales of a block.
    fn scales(&self, block: usize) -> Scales<'_>;
    /// Where a block has its zero.
    fn zero(&self, block: usize) -> Zero<'_>;
    /// Writes row `lane` from the bytes of one block in a file.
    fn set_lane(&mut self, lane: usize, source: &[u8]);

    /// Writes all rows, each from the bytes of one block: the same as [`Packed::set_lane`] for each of them.
    #[inline(always)]
    fn set_lanes(&mut self, sources: [&[u8]; PANEL]) {
        for (lane, source) in sources.into_iter().enumerate() {
            self.set_lane(lane, source);
        }
    }

    /// Values of row `lane`.
    fn lane(&self, lane: usize, out: &mut [f32]) {
        let d = f16::from_bits(self.d()[lane]).to_f32();
        for (block, out) in out.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            let (codes, scales, zero) = (self.codes(block).lane(lane), self.scales(block).lane(lane), self.zero(block));
            for (half, (out, codes)) in out.chunks_exact_mut(16).zip(codes.chunks_exact(16)).enumerate() {
                let scale = d * f32::from(scales[half]);
                let (z, add) = match zero {
                    Zero::Code(z) => (f32::from(z), 0.0),
                    Zero::Add(m) => (0.0, f16::from_bits(m[lane]).to_f32()),
                    Zero::Mins(dmin, mins) => (0.0, -f16::from_bits(dmin[lane]).to_f32() * f32::from(mins[lane])),
                    Zero::HighNibbles(dmin, packed) => {
                        (0.0, -f16::from_bits(dmin[lane]).to_f32() * f32::from(packed[lane][half] >> 4))
                    }
                };
                for (value, &code) in out.iter_mut().zip(codes) {
                    *value = scale * (f32::from(code) - z) + add;
                }
            }
        }
    }
}

/// Does something with the packed form of a block type.
pub(crate) trait ForPacked {
    /// What comes out.
    type Output;
    /// Does it.
    fn run<B: Packed>(self) -> Self::Output;
}

/// Runs `f` for the packed form of a type; `None` for float types.
#[inline(always)]
pub(crate) fn for_packed<F: ForPacked>(ty: WeightType, f: F) -> Option<F::Output> {
    Some(match ty {
        WeightType::F32 | WeightType::F16 | WeightType::Bf16 => return None,
        WeightType::Q4_0 => f.run::<Q4_0x16>(),
        WeightType::Q4_1 => f.run::<Q4_1x16>(),
        WeightType::Q5_0 => f.run::<Q5_0x16>(),
        WeightType::Q5_1 => f.run::<Q5_1x16>(),
        WeightType::Q8_0 => f.run::<Q8_0x16>(),
        WeightType::Q2K => f.run::<Q2Kx16>(),
        WeightType::Q3K => f.run::<Q3Kx16>(),
        WeightType::Q4K => f.run::<Q4Kx16>(),
        WeightType::Q5K => f.run::<Q5Kx16>(),
        WeightType::Q6K => f.run::<Q6Kx16>(),
        WeightType::Iq4Nl => f.run::<Iq4Nlx16>(),
        WeightType::Iq4Xs => f.run::<Iq4Xsx16>(),
    })
}

/// Bytes of a packed panel of `cols` columns; `None` when the type does not allow that number.
pub(crate) fn panel_bytes(ty: WeightType, cols: usize) -> Option<usize> {
    struct UnitBytes;
    impl ForPacked for UnitBytes {
        type Output = usize;

        fn run<B: Packed>(self) -> usize {
            size_of::<B>()
        }
    }
    let unit = for_packed(ty, UnitBytes).unwrap_or(PANEL * ty.block_bytes());
    cols.is_multiple_of(ty.block_len()).then(|| (cols / ty.block_len()).checked_mul(unit))?
}

/// Packs up to 16 consecutive rows of a file into a zeroed panel. Rows that are missing stay zero.
///
/// # Panics
/// When the lengths do not belong to `ty` and `cols`.
pub(crate) fn pack_panel(ty: WeightType, cols: usize, rows: &[u8], panel: &mut [u8]) {
    let row_bytes = ty.row_bytes(cols).expect("the shape was checked when the matrix was taken");
    assert!(rows.len() <= row_bytes * PANEL && rows.len().is_multiple_of(row_bytes), "at most {PANEL} whole rows");
    assert_eq!(Some(panel.len()), panel_bytes(ty, cols), "bytes of a panel");
    match ty {
        WeightType::F32 => pack_floats::<4>(rows, row_bytes, panel),
        WeightType::F16 | WeightType::Bf16 => pack_floats::<2>(rows, row_bytes, panel),
        _ => {
            for_packed(ty, PackBlocks { rows, row_bytes, panel });
        }
    }
}

struct PackBlocks<'a> {
    rows: &'a [u8],
    row_bytes: usize,
    panel: &'a mut [u8],
}

impl ForPacked for PackBlocks<'_> {
    type Output = ();

    fn run<B: Packed>(self) {
        let units = cast_mut::<B>(self.panel);
        let block = B::TYPE.block_bytes();
        if self.rows.len() == self.row_bytes * PANEL {
            for (index, unit) in units.iter_mut().enumerate() {
                unit.set_lanes(std::array::from_fn(|lane| {
                    &self.rows[lane * self.row_bytes + index * block..][..block]
                }));
            }
            return;
        }
        for (lane, row) in self.rows.chunks_exact(self.row_bytes).enumerate() {
            for (unit, source) in units.iter_mut().zip(row.chunks_exact(block)) {
                unit.set_lane(lane, source);
            }
        }
    }
}

/// Files are little-endian, kernels read native numbers.
fn pack_floats<const SIZE: usize>(rows: &[u8], row_bytes: usize, panel: &mut [u8]) {
    if cfg!(target_endian = "little") && rows.len() == row_bytes * PANEL {
        for (column, out) in panel.chunks_exact_mut(PANEL * SIZE).enumerate() {
            for (lane, out) in out.as_chunks_mut::<SIZE>().0.iter_mut().enumerate() {
                out.copy_from_slice(&rows[lane * row_bytes + column * SIZE..][..SIZE]);
            }
        }
        return;
    }
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
        _ => {
            for_packed(ty, ReadBlocks { panel, lane, out });
        }
    }
}

struct ReadBlocks<'a> {
    panel: &'a [u8],
    lane: usize,
    out: &'a mut [f32],
}

impl ForPacked for ReadBlocks<'_> {
    type Output = ();

    fn run<B: Packed>(self) {
        for (unit, values) in cast::<B>(self.panel).iter().zip(self.out.chunks_exact_mut(B::BLOCKS * BLOCK)) {
            unit.lane(self.lane, values);
        }
    }
}

fn read_floats<T: Plain>(panel: &[[T; PANEL]], lane: usize, out: &mut [f32], to_f32: impl Fn(T) -> f32) {
    for (column, value) in panel.iter().zip(out) {
        *value = to_f32(column[lane]);
    }
}

/// The groups of 4 columns of a row.
#[inline(always)]
fn groups(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.as_chunks::<4>().0.iter().map(|group| u32::from_ne_bytes(*group))
}

/// Writes a group of 4 columns of row `lane`.
#[inline(always)]
fn set_group(word: &mut Word, lane: usize, group: u32) {
    word.as_chunks_mut::<4>().0[lane] = group.to_ne_bytes();
}

/// Copies the groups of a row into its lane of each word.
#[inline(always)]
fn set_words<const WORDS: usize>(words: &mut [Word; WORDS], lane: usize, source: &[u8], flip: u8) {
    for (word, group) in words.iter_mut().zip(groups(source)) {
        set_group(word, lane, group ^ u32::from_ne_bytes([flip; 4]));
    }
}

/// [`set_words`] for all rows, whose quants begin at byte `at`: 4 x 4 groups are transposed at a time, which compilers do in
/// registers.
#[inline(always)]
fn set_all_words<const WORDS: usize>(words: &mut [Word; WORDS], sources: &[&[u8]; PANEL], at: usize, flip: u8) {
    let flip = u32::from_ne_bytes([flip; 4]);
    for (run, words) in words.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        for quarter in 0..4 {
            let rows: [[u32; 4]; 4] = std::array::from_fn(|row| {
                let bytes = &sources[4 * quarter + row][at + 16 * run..][..16];
                std::array::from_fn(|group| u32::from_ne_bytes([0, 1, 2, 3].map(|byte| bytes[4 * group + byte])) ^ flip)
            });
            for (group, word) in words.iter_mut().enumerate() {
                let lanes = rows.map(|row| row[group].to_ne_bytes());
                word.as_chunks_mut::<16>().0[quarter].copy_from_slice(lanes.as_flattened());
            }
        }
    }
}

/// Writes bits 0 to 3 of a row's codes.
#[inline(always)]
fn set_nibbles(words: &mut [Word; 4], lane: usize, codes: &[u8; BLOCK]) {
    let (low, high) = codes.split_at(16);
    for (word, (low, high)) in words.iter_mut().zip(groups(low).zip(groups(high))) {
        set_group(word, lane, low & 0x0f0f_0f0f | (high & 0x0f0f_0f0f) << 4);
    }
}

/// Writes bits `bit` and `bit + 1` of a row's codes.
#[inline(always)]
fn set_pairs(words: &mut [Word; 2], lane: usize, codes: &[u8; BLOCK], bit: u32) {
    for (word, codes) in words.iter_mut().zip(codes.as_chunks::<16>().0) {
        let pairs = groups(codes).zip((0..).step_by(2)).map(|(group, shift)| (group >> bit & 0x0303_0303) << shift);
        set_group(word, lane, pairs.fold(0, |all, pairs| all | pairs));
    }
}

/// Writes bit `bit` of a row's codes.
#[inline(always)]
fn set_bits(word: &mut Word, lane: usize, codes: &[u8; BLOCK], bit: u32) {
    let bits = groups(codes).zip(0..).map(|(group, shift)| (group >> bit & 0x0101_0101) << shift);
    set_group(word, lane, bits.fold(0, |all, bits| all | bits));
}
