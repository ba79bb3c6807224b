//! Rows of a buffer on the host, for the rare ops that threads of the host do.

use super::arenas::Buffer;
use super::driver::Device;
use crate::memory::{Arena, cast_mut};
use crate::{Result, Rows};

/// Host memory for rows of a buffer, which grows as needed.
pub(super) struct HostRows(Arena<u8>);

impl HostRows {
    /// Room for none.
    ///
    /// # Errors
    /// Those of [`Arena::zeroed`].
    pub(super) fn new() -> Result<Self> {
        Arena::zeroed(0, "rows on the host").map(Self)
    }

    /// Copies rows from the device and hands them to `f` with their number among them, on several threads.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for rows that the buffer lacks, and those of the device.
    pub(super) fn take(
        &mut self,
        device: &Device,
        buffer: &Buffer,
        rows: Rows<'_>,
        f: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> Result<()> {
        let cols = buffer.cols;
        let end = match rows {
            Rows::First(n) => n,
            Rows::Picked(rows) => rows.iter().max().map_or(0, |&row| row as usize + 1),
        };
        buffer.check("for_each_row", end, cols)?;
        let row_bytes = cols * size_of::<f32>();
        let bytes = rows.len() * row_bytes;
        if bytes == 0 {
            return Ok(());
        }
        if self.0.len() < bytes {
            self.0 = Arena::zeroed(bytes.next_power_of_two(), "rows on the host")?;
        }
        let host = &mut self.0[..bytes];
        match rows {
            Rows::First(_) => device.download(&buffer.values, 0, host)?,
            Rows::Picked(rows) => {
                for (&row, host) in rows.iter().zip(host.chunks_exact_mut(row_bytes)) {
                    device.download(&buffer.values, row as usize * row_bytes, host)?;
                }
            }
        }
        let values: &mut [f32] = cast_mut(host);
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(rows.len());
        let share = rows.len().div_ceil(threads);
        std::thread::scope(|scope| {
            for (i, values) in values.chunks_mut(share * cols).enumerate() {
                let mut work = move || {
                    for (row, values) in values.chunks_exact_mut(cols).enumerate() {
                        f(i * share + row, values);
                    }
                };
                // A single share needs no thread.
                if threads == 1 {
                    work();
                } else {
                    scope.spawn(work);
                }
            }
        });
        Ok(())
    }

    /// Copies the first `rows` rows, which were taken last, back to the buffer.
    ///
    /// # Errors
    /// Those of the device.
    pub(super) fn give_back(&self, device: &Device, buffer: &mut Buffer, rows: usize) -> Result<()> {
        let bytes = rows * buffer.cols * size_of::<f32>();
        device.upload(&mut buffer.values, 0, &self.0[..bytes])
    }
}
