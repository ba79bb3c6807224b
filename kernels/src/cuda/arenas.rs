//! Arenas and parameters on a device, with the checks of what an op asks of them.

use super::driver::DeviceBytes;
use super::products::Input;
use super::weights::TILE_COLS;
use crate::{Error, Result};

/// An f32 arena of shape `[rows, cols]`.
pub(super) struct Buffer {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) values: DeviceBytes,
}

impl Buffer {
    pub(super) fn check(&self, op: &'static str, rows: usize, cols: usize) -> Result<()> {
        check_fits(op, (self.rows, self.cols), (rows, cols))
    }
}

/// A bf16 arena of shape `[rows, stride]`, of which `cols` columns are used and the others are zero.
pub(super) struct Act {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) stride: usize,
    /// Rows that an op has written.
    pub(super) ready: usize,
    pub(super) values: DeviceBytes,
}

impl Act {
    pub(super) fn check(&self, op: &'static str, rows: usize, cols: usize) -> Result<()> {
        check_fits(op, (self.rows, self.cols), (rows, cols))
    }

    /// The first `rows` rows, which were written before.
    pub(super) fn read(&self, op: &'static str, rows: usize, cols: usize) -> Result<Input<'_>> {
        self.check(op, rows, cols)?;
        if rows > self.ready {
            let expected = format!("at most the {} rows that were written", self.ready);
            return Err(Error::Shape { op, expected, got: rows.to_string() });
        }
        Ok(Input { memory: &self.values, stride: self.stride, rows })
    }
}

/// A vector of f32 parameters.
pub(super) struct Vector {
    pub(super) len: usize,
    pub(super) values: DeviceBytes,
}

/// Cosines and sines, `[positions, 2 * pairs]`.
pub(super) struct Rope {
    pub(super) pairs: usize,
    pub(super) positions: usize,
    pub(super) values: DeviceBytes,
}

/// Elements of an activation row: whole tiles.
pub(super) fn act_stride(cols: usize) -> usize {
    cols.next_multiple_of(TILE_COLS)
}

/// An arena of `(rows, columns)` holds this many rows, and rows are as long as asked for.
fn check_fits(op: &'static str, arena: (usize, usize), asked: (usize, usize)) -> Result<()> {
    if asked.0 <= arena.0 && asked.1 == arena.1 {
        return Ok(());
    }
    let expected = format!("at most {} rows of {} columns", arena.0, arena.1);
    Err(Error::Shape { op, expected, got: format!("{} rows of {}", asked.0, asked.1) })
}
