//! Activation arenas: rows in the forms that matrix products read.
//!
//! ```text
//!   rows     | tile of T | tile of T | ... | T/2 | .. | 1 |        T = 4 or 8, greedily: no row is padding
//!   tile     [block of 32 columns][row of the tile][32 x i8]       quants, so that a kernel reads forward only
//!            [block of 32 columns]{ d: rows of the tile x f32 | s: rows of the tile x f32 }
//!            [block of 32 columns][row of the tile][2 x i16]     sums of the quants of the first and the last 16 columns
//!   float    [row][column] f32                                     for weights that are floats themselves
//! ```
//!
//! A row is quantised in blocks of 32: `x = d * q` with `d = max|x| / 127`, and `s = d * sum(q)` pays for the offset of
//! unsigned weights; where those have a scale for each 16 columns, the two sums pay for it in whole numbers. Which of the two forms a row gets is what its consumer's weights need ([`Form`]).

use super::simd::{LANES, Simd};
use crate::format::ggml::BLOCK;
use crate::memory::{Arena, Plain, SharedMut};
use crate::{Error, Result};

/// Below this largest magnitude a block counts as zero: `127 / max` must stay finite.
const SMALLEST: f32 = 1e-36;

/// Forms of an activation that a matrix product reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Form {
    /// Quantised, for block weights.
    pub(crate) int8: bool,
    /// As floats, for float weights.
    pub(crate) float: bool,
}

impl Form {
    /// True when everything that `other` has is here too.
    pub(crate) fn covers(self, other: Form) -> bool {
        self.int8 >= other.int8 && self.float >= other.float
    }

    /// What either has.
    pub(crate) fn union(self, other: Form) -> Form {
        Form { int8: self.int8 || other.int8, float: self.float || other.float }
    }
}

/// One tile of the greedy split: rows `row..row + len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    pub(crate) row: usize,
    pub(crate) len: usize,
}

/// The tiles of rows `from..rows`, in order; `from` is where a tile starts.
pub(crate) fn tiles(from: usize, rows: usize, tile_rows: usize) -> impl Iterator<Item = Tile> + Clone {
    let next = move |row: usize| {
        let left = rows - row;
        (left > 0).then(|| Tile { row, len: if left >= tile_rows { tile_rows } else { 1 << left.ilog2() } })
    };
    std::iter::successors(next(from), move |tile| next(tile.row + tile.len))
}

/// The tile that `row` lies in.
#[inline]
fn tile_of(row: usize, rows: usize, tile_rows: usize) -> Tile {
    let start = row / tile_rows * tile_rows;
    if start + tile_rows <= rows {
        return Tile { row: start, len: tile_rows };
    }
    tiles(start, rows, tile_rows).find(|tile| row < tile.row + tile.len).expect("the tiles of a group cover its rows")
}

/// An activation arena.
pub(crate) struct Act {
    /// Most rows that it holds.
    pub(crate) capacity: usize,
    /// Columns of a row.
    pub(crate) cols: usize,
    /// Rows that it holds now, and in which form.
    rows: usize,
    form: Form,
    tile_rows: usize,
    quants: Arena<i8>,
    scales: Arena<f32>,
    sums: Arena<[i16; 2]>,
    floats: Arena<f32>,
}

impl Act {
    /// Allocates room for `capacity` rows in both forms; a form that is never used costs no resident memory.
    pub(crate) fn new(capacity: usize, cols: usize, tile_rows: usize) -> Result<Self> {
        let what = "an activation arena";
        let size = capacity.checked_mul(cols).ok_or(Error::OutOfMemory { bytes: usize::MAX, what })?;
        let blocks = if cols.is_multiple_of(BLOCK) { size / BLOCK } else { 0 };
        Ok(Self {
            capacity,
            cols,
            rows: 0,
            form: Form::default(),
            tile_rows,
            quants: Arena::zeroed(blocks * BLOCK, what)?,
            scales: Arena::zeroed(blocks * 2, what)?,
            sums: Arena::zeroed(blocks, what)?,
            floats: Arena::zeroed(size, what)?,
        })
    }

    /// Bytes of memory at most in use.
    pub(crate) fn bytes(&self) -> usize {
        self.quants.bytes() + self.scales.bytes() + self.sums.bytes() + self.floats.bytes()
    }

    /// Starts to fill the arena with `rows` rows, in the form that a consumer needs.
    ///
    /// # Errors
    /// [`Error::Shape`] when the rows or the form do not fit.
    pub(crate) fn begin(&mut self, op: &'static str, rows: usize, form: Form) -> Result<ActWriter<'_>> {
        if rows > self.capacity {
            let (expected, got) = (format!("at most {} rows", self.capacity), format!("{rows}"));
            return Err(Error::Shape { op, expected, got });
        }
        if form.int8 && !self.cols.is_multiple_of(BLOCK) {
            let expected = format!("columns in multiples of {BLOCK}, for a consumer of block weights");
            return Err(Error::Shape { op, expected, got: format!("{}", self.cols) });
        }
        self.rows = rows;
        self.form = form;
        Ok(ActWriter {
            rows,
            cols: self.cols,
            tile_rows: self.tile_rows,
            quants: form.int8.then(|| Quantised {
                quants: SharedMut::new(&mut self.quants),
                scales: SharedMut::new(&mut self.scales),
                sums: SharedMut::new(&mut self.sums),
            }),
            floats: form.float.then(|| SharedMut::new(&mut self.floats)),
        })
    }

    /// The first `rows` rows, for a product that needs `form`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the arena does not hold them: quantised rows are laid out for their number, so it must be
    /// the number that was written.
    pub(crate) fn read(&self, op: &'static str, rows: usize, form: Form) -> Result<ActReader<'_>> {
        if !self.form.covers(form) || (form.int8 && rows != self.rows) || rows > self.rows {
            return Err(Error::Shape {
                op,
                expected: format!("the {} rows that the arena holds, as {:?}", self.rows, self.form),
                got: format!("{rows} rows, as {form:?}"),
            });
        }
        let (quants, scales, sums, floats) = (&self.quants, &self.scales, &self.sums, &self.floats);
        Ok(ActReader { rows, cols: self.cols, tile_rows: self.tile_rows, quants, scales, sums, floats })
    }
}

/// Read access to the rows of an activation arena.
#[derive(Clone, Copy)]
pub(crate) struct ActReader<'a> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) tile_rows: usize,
    quants: &'a [i8],
    scales: &'a [f32],
    sums: &'a [[i16; 2]],
    floats: &'a [f32],
}

impl<'a> ActReader<'a> {
    /// Quants and scales of a tile, all blocks.
    #[inline(always)]
    pub(crate) fn tile(&self, tile: Tile) -> (&'a [i8], &'a [f32]) {
        let blocks = self.cols / BLOCK;
        let (at, len) = (tile.row * blocks, tile.len * blocks);
        (&self.quants[at * BLOCK..][..len * BLOCK], &self.scales[at * 2..][..len * 2])
    }

    /// Sums of the quants of a tile, all blocks.
    #[inline(always)]
    pub(crate) fn sums(&self, tile: Tile) -> &'a [[i16; 2]] {
        let blocks = self.cols / BLOCK;
        &self.sums[tile.row * blocks..][..tile.len * blocks]
    }

    /// Consecutive rows as floats.
    #[inline(always)]
    pub(crate) fn floats(&self, tile: Tile) -> &'a [f32] {
        &self.floats[tile.row * self.cols..][..tile.len * self.cols]
    }
}

/// The quantised form of an activation, to be written.
#[derive(Clone, Copy)]
struct Quantised<'a> {
    quants: SharedMut<'a, i8>,
    scales: SharedMut<'a, f32>,
    sums: SharedMut<'a, [i16; 2]>,
}

/// Write access to the rows of an activation arena, from several threads at once.
#[derive(Clone, Copy)]
pub(crate) struct ActWriter<'a> {
    rows: usize,
    cols: usize,
    tile_rows: usize,
    /// Quants, when they are wanted.
    quants: Option<Quantised<'a>>,
    /// Floats, when they are wanted.
    floats: Option<SharedMut<'a, f32>>,
}

impl ActWriter<'_> {
    /// Rows to be written.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of a row.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// True when rows are written in quantised form, so that parts of a row must be whole blocks of 32 columns.
    pub(crate) fn in_blocks(&self) -> bool {
        self.quants.is_some()
    }

    /// Writes `values` to columns `col..` of a row, in every form that is wanted. In quantised form, `col` and the number
    /// of values are multiples of 32.
    ///
    /// # Safety
    /// No other thread writes any of these columns of this row at the same time.
    #[inline(always)]
    pub(crate) unsafe fn write<S: Simd>(&self, s: S, row: usize, col: usize, values: &[f32]) {
        assert!(row < self.rows && col + values.len() <= self.cols, "row {row} of {}, column {col}", self.rows);
        if let Some(floats) = self.floats {
            // SAFETY: the caller is alone with these columns.
            let out = unsafe { floats.part(row * self.cols + col, values.len()) };
            out.copy_from_slice(values);
        }
        if let Some(Quantised { quants, scales, sums }) = self.quants {
            let (blocks, rest) = values.as_chunks::<BLOCK>();
            assert!(
                rest.is_empty() && col.is_multiple_of(BLOCK),
                "columns {col}+{} are not whole blocks",
                values.len()
            );
            let tile = tile_of(row, self.rows, self.tile_rows);
            let first = tile.row * (self.cols / BLOCK) + col / BLOCK * tile.len;
            for (b, block) in blocks.iter().enumerate() {
                let at = first + b * tile.len;
                // SAFETY: the caller is alone with this block of the row.
                let quants = unsafe { quants.part((at + row - tile.row) * BLOCK, BLOCK) };
                let (d, half_sums) = quantise_block(s, block, as_block_mut(quants));
                let place = at * 2 + row - tile.row;
                // SAFETY: as above: this value belongs to this row's block alone.
                let scale = unsafe { scales.part(place, 1) };
                // SAFETY: so does this one.
                let scaled_sum = unsafe { scales.part(place + tile.len, 1) };
                // SAFETY: and so does this.
                let sums = unsafe { sums.part(at + row - tile.row, 1) };
                (scale[0], scaled_sum[0]) = (d, d * (half_sums[0] + half_sums[1]) as f32);
                // 16 quants of at most 127 each.
                sums[0] = half_sums.map(|sum| sum as i16);
            }
        }
    }
}

fn as_block_mut<T: Plain, const N: usize>(slice: &mut [T]) -> &mut [T; N] {
    slice.try_into().expect("the part was taken with this length")
}

/// Quantises 32 values: returns the scale, and the sums of the quants of the first and the last 16.
#[inline(always)]
fn quantise_block<S: Simd>(s: S, x: &[f32; BLOCK], out: &mut [i8; BLOCK]) -> (f32, [i32; 2]) {
    let (halves, _) = x.as_chunks::<LANES>();
    let (low, high) = (s.load(&halves[0]), s.load(&halves[1]));
    let largest = s.reduce_max(s.max(s.abs(low), s.abs(high)));
    let (d, inverse) = if largest > SMALLEST { (largest * (1.0 / 127.0), 127.0 / largest) } else { (0.0, 0.0) };
    let inverse = s.splat(inverse);
    (d, s.round_i8([s.mul(low, inverse), s.mul(high, inverse)], out))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::Scalar;

    #[test]
    fn tiles_cover_every_row_once_without_padding() {
        for tile_rows in [4, 8] {
            for rows in 0..70 {
                let mut next = 0;
                for tile in tiles(0, rows, tile_rows) {
                    assert_eq!(tile.row, next);
                    assert!(tile.len <= tile_rows && tile.len.is_power_of_two());
                    for row in tile.row..tile.row + tile.len {
                        assert_eq!(tile_of(row, rows, tile_rows), tile);
                    }
                    next += tile.len;
                }
                assert_eq!(next, rows);
            }
        }
    }

    #[test]
    fn written_rows_read_back_within_half_a_step() {
        let (rows, cols) = (7, 96);
        let mut act = Act::new(9, cols, 4).unwrap();
        let writer = act.begin("test", rows, Form { int8: true, float: true }).unwrap();
        let value = |row: usize, col: usize| ((row * 37 + col * 11) % 23) as f32 - 11.0;
        for row in 0..rows {
            let values: Vec<f32> = (0..cols).map(|col| value(row, col)).collect();
            // SAFETY: one thread.
            unsafe { writer.write(Scalar, row, 0, &values[..32]) };
            // SAFETY: one thread.
            unsafe { writer.write(Scalar, row, 32, &values[32..]) };
        }
        let reader = act.read("test", rows, Form { int8: true, float: false }).unwrap();
        for tile in tiles(0, rows, 4) {
            let (quants, scales) = reader.tile(tile);
            for r in 0..tile.len {
                for block in 0..cols / 32 {
                    let d = scales[block * 2 * tile.len + r];
                    let q = &quants[(block * tile.len + r) * 32..][..32];
                    let sum: i32 = q.iter().map(|&q| i32::from(q)).sum();
                    assert_eq!(scales[(block * 2 + 1) * tile.len + r], d * sum as f32);
                    let halves = reader.sums(tile)[block * tile.len + r];
                    assert_eq!(
                        halves.map(i32::from),
                        [0, 16].map(|at| q[at..at + 16].iter().map(|&q| i32::from(q)).sum())
                    );
                    for (i, &q) in q.iter().enumerate() {
                        let x = value(tile.row + r, block * 32 + i);
                        assert!((d * f32::from(q) - x).abs() <= d * 0.501);
                        assert_eq!(reader.floats(tile)[r * cols + block * 32 + i], x);
                    }
                }
            }
        }
        assert!(act.read("test", rows - 1, Form { int8: true, float: false }).is_err());
        assert!(act.read("test", rows - 1, Form { int8: false, float: true }).is_ok());
        assert!(act.begin("test", 10, Form::default()).is_err());
    }

    #[test]
    fn tiny_and_zero_blocks_are_zero_and_extremes_reach_127() {
        for (x, d, q) in [(0.0, 0.0, 0), (1e-40, 0.0, 0), (-3.0e38, 3.0e38 / 127.0, -127), (2.0, 2.0 / 127.0, 127)] {
            let mut out = [1; 32];
            let (got_d, sums) = quantise_block(Scalar, &[x; 32], &mut out);
            assert!((got_d - d).abs() <= d * 1e-6);
            assert_eq!((out, sums), ([q; 32], [i32::from(q) * 16; 2]));
        }
    }
}
