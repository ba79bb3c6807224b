//! Products of many rows through cuBLASLt, some panels of the weights at a time (`cu/gemm_large.cu`).
//!
//! ```text
//!   tiles ──plain_*──> rows of bf16 ──matmul──> output ──add_bias──>                  Store, Add
//!                        in the L2        └───> sums ──finish_gate──> activations     gate and up
//! ```
//!
//! Weights lie in tiles, which no stride describes, so a slice of them is first written as plain rows into memory that stays
//! in the cache. Activations are plain rows anyway.
//!
//! The library is found when the backend is made. Whatever fails later is said once, and the kernels of our own do the rest:
//! of the product under way, and of all others.

use std::ops::Range;

use super::cublaslt::{self, Blas, Matmul, WORKSPACE};
use super::driver::{Arg, Device, DeviceBytes, Launch};
use super::fields::NULL;
use super::products::{Call, Finish};
use super::weights::{Format, TILE_COLS, TILE_ROWS};
use crate::Result;

/// Rows from which the library takes over. Writing a weight as a plain row costs 2 bytes read from memory, 0.7 ps at 3 TB/s, and
/// a product costs 2 operations a row: 3 fs at 700 TFLOP/s, 5 fs at the 400 that kernels without wgmma can be expected to reach.
/// The difference pays for the write from some 300 rows on, or 900 should they reach 550.
pub(super) const LEAST_ROWS: usize = 512;
/// Bytes of weights as plain rows: half of an H100's L2 cache, with room for the activations beside them.
const PLAIN: usize = 32 << 20;
/// Bytes of the sums of a gated product.
const SUMS: usize = 16 << 20;
/// Panels that make a tile of the library's output, in whose numbers slices are measured.
const UNIT: usize = 8;

/// Products of many rows.
pub(super) struct Large {
    /// Or why kernels of our own do everything.
    blas: std::result::Result<Blas, String>,
    /// Bytes of [`PLAIN`] and [`SUMS`], fewer in tests.
    room: [usize; 2],
    memory: Option<Memory>,
    /// Products submitted so far.
    #[cfg(test)]
    pub(super) products: usize,
}

struct Memory {
    plain: DeviceBytes,
    sums: DeviceBytes,
    workspace: DeviceBytes,
}

/// Bytes on the device for steps of up to `rows` rows.
pub(super) fn large_bytes(rows: usize) -> usize {
    if rows >= LEAST_ROWS && cublaslt::found().is_ok() { PLAIN + SUMS + WORKSPACE } else { 0 }
}

impl Large {
    pub(super) fn new(device: &Device) -> Self {
        let blas = cublaslt::found().map_err(str::to_owned).and_then(|library| {
            Blas::new(library, device).map_err(|why| format!("{} failed: {why}", library.describe()))
        });
        Self {
            blas,
            room: [PLAIN, SUMS],
            memory: None,
            #[cfg(test)]
            products: 0,
        }
    }

    /// What computes products of many rows, for people.
    pub(super) fn describe(&self) -> String {
        match &self.blas {
            Ok(blas) => blas.describe(),
            Err(why) => format!("own kernels ({why})"),
        }
    }

    /// Makes room for activations of up to `rows` rows.
    ///
    /// # Errors
    /// Those of [`Device::alloc`].
    pub(super) fn fit(&mut self, device: &mut Device, rows: usize) -> Result<()> {
        if rows >= LEAST_ROWS && self.blas.is_ok() && self.memory.is_none() {
            self.memory = Some(Memory {
                plain: device.alloc(self.room[0], "weights as plain rows")?,
                sums: device.alloc(self.room[1], "sums of gated products")?,
                workspace: device.alloc(WORKSPACE, "the workspace of cuBLASLt")?,
            });
        }
        Ok(())
    }

    /// Less room, so that small matrices take several slices.
    #[cfg(test)]
    pub(super) fn shrink(&mut self, room: [usize; 2]) {
        assert!(self.memory.is_none(), "it is too late");
        self.room = room;
    }

    /// Submits a product, or its first panels; returns how many. The others are left to the kernels of our own.
    ///
    /// # Errors
    /// Those of [`Device::launch`].
    pub(super) fn product(&mut self, device: &mut Device, call: &Call<'_>) -> Result<usize> {
        let (Ok(blas), Some(memory)) = (&mut self.blas, &self.memory) else { return Ok(0) };
        let (rows, panels) = (call.x.rows, call.part.panels);
        if rows < LEAST_ROWS {
            return Ok(0);
        }
        let slice = slice(call, self.room, device.info().processors as usize);
        if slice == 0 {
            return Ok(0);
        }
        for start in (0..panels).step_by(slice) {
            let slice = start..panels.min(start + slice);
            plain(device, call, &memory.plain, slice.clone())?;
            if let Err(why) = matmul(blas, device, call, (memory, slice.clone())) {
                tracing::warn!(why, "cuBLASLt failed: products of many rows go to kernels of our own from now on");
                self.blas = Err(format!("cuBLASLt failed: {why}"));
                return Ok(start);
            }
            #[cfg(test)]
            {
                self.products += 1;
            }
            finish(device, call, &memory.sums, slice)?;
        }
        Ok(panels)
    }
}

fn gated(call: &Call<'_>) -> bool {
    matches!(call.finish, Finish::GateSilu | Finish::GateGelu)
}

/// Panels at a time: as many as there is room for, or some fewer that leave less of the device without work at the end.
fn slice(call: &Call<'_>, [plain, sums]: [usize; 2], processors: usize) -> usize {
    let (rows, panels) = (call.x.rows, call.part.panels);
    let mut most = plain / (call.weight.blocks() * Format::Bf16.tile_bytes());
    if gated(call) {
        most = most.min(sums / (4 * TILE_ROWS * rows));
    }
    if panels <= most { panels } else { UNIT * units(most / UNIT, rows, processors) }
}

/// Units of 128 features at a time, from half of `most` to `most`: tiles of 128 rows by 128 features fill whole waves best.
fn units(most: usize, rows: usize, processors: usize) -> usize {
    let tiles = |units: usize| units * rows.div_ceil(128);
    // Busy tiles of a thousand.
    let busy = |units: usize| 1000 * tiles(units) / tiles(units).next_multiple_of(processors).max(1);
    (most.div_ceil(2)..=most).max_by_key(|&units| (busy(units), units)).unwrap_or(0)
}

/// Writes these panels as plain rows.
fn plain(device: &mut Device, call: &Call<'_>, to: &DeviceBytes, panels: Range<usize>) -> Result<()> {
    const TILES: usize = 4;
    let (part, blocks) = (call.part, call.weight.blocks());
    let name = match part.format {
        Format::Bf16 => "plain_bf16",
        Format::Q4 => "plain_q4",
        Format::Q8 => "plain_q8",
        Format::Q8Half => "plain_q8h",
    };
    let kernel = device.kernel("gemm_large", name)?;
    let [tiles, scales] = part.starting_at(panels.start * blocks);
    let grid = (blocks.div_ceil(TILES) as u32, panels.len() as u32);
    let args = [tiles, scales, to.at(0), Arg::U32(blocks as u32)];
    device.launch(&kernel, Launch { grid, block: 256, shared: 0 }, &args)
}

/// The product with these panels, into its output or into the sums of a gated one.
fn matmul(
    blas: &mut Blas,
    device: &Device,
    call: &Call<'_>,
    (memory, panels): (&Memory, Range<usize>),
) -> std::result::Result<(), String> {
    let (part, out) = (call.part, call.out);
    let (weights, cols, x, workspace) = (&memory.plain, call.weight.blocks() * TILE_COLS, call.x, &memory.workspace);
    let features = panels.len() * TILE_ROWS;
    let op = if gated(call) {
        let out = &memory.sums;
        Matmul { weights, features, cols, x, out, first: 0, out_stride: features, add: false, workspace }
    } else {
        let skipped = panels.start * TILE_ROWS;
        let (features, first) = (features.min(part.features - skipped), part.first + skipped);
        let add = call.finish == Finish::Add;
        Matmul { weights, features, cols, x, out: out.memory, first, out_stride: out.stride, add, workspace }
    };
    blas.matmul(device, &op)
}

/// What is left to do with the sums of these panels.
fn finish(device: &mut Device, call: &Call<'_>, sums: &DeviceBytes, panels: Range<usize>) -> Result<()> {
    let (part, out, rows) = (call.part, call.out, call.x.rows as u32);
    let skipped = panels.start * if gated(call) { TILE_ROWS / 2 } else { TILE_ROWS };
    let first = part.first + skipped;
    let bias = call.weight.bias.as_ref().map(|bias| bias.at(4 * first));
    if gated(call) {
        const BLOCK: u32 = 128;
        let kernel = device.kernel("gemm_large", "finish_gate")?;
        let features = (panels.len() * TILE_ROWS / 2).min(part.features - skipped) as u32;
        let args = [
            sums.at(0),
            bias.unwrap_or(NULL),
            out.memory.at(2 * first),
            Arg::U32(panels.len() as u32),
            Arg::U32(features),
            Arg::U32(out.stride as u32),
            Arg::U32(part.features as u32),
            Arg::U32(call.finish as u32),
        ];
        let grid = (rows, features.div_ceil(4 * BLOCK));
        return device.launch(&kernel, Launch { grid, block: BLOCK, shared: 0 }, &args);
    }
    let Some(bias) = bias else { return Ok(()) };
    const BLOCK: u32 = 256;
    let kernel = device.kernel("gemm_large", "add_bias")?;
    let features = (panels.len() * TILE_ROWS).min(part.features - skipped) as u32;
    let args = [out.memory.at(4 * first), bias, Arg::U32(features), Arg::U32(out.stride as u32)];
    device.launch(&kernel, Launch { grid: (rows, features.div_ceil(BLOCK)), block: BLOCK, shared: 0 }, &args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_fill_whole_waves() {
        // An H100 with 4096 and 14,336 columns: 32 and 9 units fit.
        let chosen = |columns: usize, rows| units(PLAIN / (columns * 2 * 128), rows, 132);
        assert_eq!(chosen(4096, 2048), 32, "512 tiles of 528");
        assert_eq!(chosen(14_336, 2048), 8, "128 tiles of 132");
        assert_eq!(chosen(4096, 512), 32, "128 tiles of 132");
        for (most, rows, processors) in [(1, 512, 132), (7, 700, 1), (64, 8192, 108), (5, 100_000, 132)] {
            let got = units(most, rows, processors);
            assert!(most <= 2 * got && got <= most, "{most} {rows} {processors}: {got}");
        }
        assert_eq!(units(0, 512, 132), 0, "there is no room for one unit");
    }
}
