//! Launches of matrix products and of the embedding (`cu/gemm_small.cu`, `cu/gemm_tile.cu`, `cu/elementwise.cu`).
//!
//! ```text
//!   up to 64 rows   small_*   every format, weights read once, panels x 1
//!   more            tile_*    bf16; quants are first expanded into a scratch that stays in the L2 cache, some panels at a time
//!   from 512        cuBLASLt, where it is found (`large.rs`)
//! ```
//!
//! Which kernel runs depends on the number of rows, so a row's bits may differ between the ranges; within the first they
//! do not depend on the number of rows at all.

use std::ops::Range;

use super::driver::{Arg, Device, DeviceBytes, Launch};
use super::fields::{Fields, NULL};
use super::large::Large;
use super::weights::{Format, Linear, Part, TILE_COLS, TILE_ROWS};
use crate::{Epilogue, GateFn, Result, WeightType};

/// Most rows of the small kernels.
const SMALL_ROWS: usize = 64;
/// Bytes of expanded weights at a time: a third of an H100's L2 cache.
const EXPANDED: usize = 16 << 20;

/// What is done with a product: `Finish` of `cu/tiles.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finish {
    Store = 0,
    Add = 1,
    GateSilu = 2,
    GateGelu = 3,
    Argmax = 4,
}

impl From<Epilogue> for Finish {
    fn from(epilogue: Epilogue) -> Self {
        match epilogue {
            Epilogue::Store => Finish::Store,
            Epilogue::Add => Finish::Add,
        }
    }
}

impl From<GateFn> for Finish {
    fn from(f: GateFn) -> Self {
        match f {
            GateFn::Silu => Finish::GateSilu,
            GateFn::GeluTanh => Finish::GateGelu,
        }
    }
}

/// Activations: `rows` rows of bf16, `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    pub(super) memory: &'a DeviceBytes,
    pub(super) stride: usize,
    pub(super) rows: usize,
}

/// Where a product goes: rows `stride` elements apart (f32, or bf16 of a gated product), and for an argmax the features.
#[derive(Clone, Copy)]
pub(super) struct Output<'a> {
    pub(super) memory: &'a DeviceBytes,
    pub(super) stride: usize,
    pub(super) index: Option<&'a DeviceBytes>,
}

/// Expanded weights of products with many rows.
#[derive(Default)]
pub(super) struct Expanded {
    memory: Option<DeviceBytes>,
}

impl Expanded {
    /// Panels of `blocks` tiles that are expanded at a time: whole tiles of output.
    fn panels(blocks: usize) -> usize {
        (EXPANDED / (blocks * Format::Bf16.tile_bytes())).next_multiple_of(8).max(8)
    }

    /// Makes room for the parts of a matrix.
    ///
    /// # Errors
    /// Those of [`Device::alloc`].
    pub(super) fn fit(&mut self, device: &mut Device, weight: &Linear) -> Result<()> {
        let blocks = weight.blocks();
        let quants = weight.parts.iter().filter(|part| part.format != Format::Bf16);
        let panels = quants.map(|part| Self::panels(blocks).min(part.panels)).max().unwrap_or(0);
        let bytes = panels * blocks * Format::Bf16.tile_bytes();
        if bytes > self.memory.as_ref().map_or(0, DeviceBytes::len) {
            // The old one first, so that both never exist at once.
            self.memory = None;
            self.memory = Some(device.alloc(bytes, "expanded weights")?);
        }
        Ok(())
    }
}

/// Bytes into which a matrix of this type and shape is expanded for products of many rows, alone or as one of two that are
/// interleaved. All matrices of a model share the largest of these.
pub fn expanded_bytes(ty: WeightType, rows: usize, cols: usize) -> usize {
    if Format::of(ty) == Format::Bf16 {
        return 0;
    }
    let (blocks, panels) = (cols.div_ceil(TILE_COLS), 2 * rows.div_ceil(TILE_ROWS));
    Expanded::panels(blocks).min(panels) * blocks * Format::Bf16.tile_bytes()
}

/// `out = finish(x * weight^T + bias)`; sizes were checked by the caller.
///
/// # Errors
/// Those of [`Device::launch`].
pub(super) fn product(
    device: &mut Device,
    (expanded, large): (&Expanded, &mut Large),
    weight: &Linear,
    x: Input<'_>,
    finish: Finish,
    out: Output<'_>,
) -> Result<()> {
    let mut panels_before = 0;
    for part in &weight.parts {
        let call = Call { weight, part, x, finish, out, panels_before };
        if x.rows <= SMALL_ROWS || finish == Finish::Argmax {
            call.small(device)?;
        } else {
            let done = large.product(device, &call)?;
            call.many(device, expanded, done..part.panels)?;
        }
        panels_before += part.panels;
    }
    Ok(())
}

/// A product with one part of a matrix.
pub(super) struct Call<'a> {
    pub(super) weight: &'a Linear,
    pub(super) part: &'a Part,
    pub(super) x: Input<'a>,
    pub(super) finish: Finish,
    pub(super) out: Output<'a>,
    /// Of the parts before this one.
    panels_before: usize,
}

impl Call<'_> {
    /// `Product` of `cu/tiles.cuh`, for `panels` of the part that lie at `tiles`.
    fn fields(&self, tiles: Arg, scales: Arg, panels: Range<usize>) -> Fields {
        let (part, gated) = (self.part, matches!(self.finish, Finish::GateSilu | Finish::GateGelu));
        let skipped = panels.start * if gated { 8 } else { 16 };
        let first = part.first + skipped;
        let bias = self.weight.bias.as_ref().map_or(NULL, |bias| bias.at(4 * first));
        let out_first = if self.finish == Finish::Argmax { self.panels_before } else { first };
        Fields::default()
            .pointer(tiles)
            .pointer(scales)
            .pointer(bias)
            .pointer(self.x.memory.at(0))
            .pointer(self.out.memory.at(0))
            .pointer(self.out.index.map_or(NULL, |index| index.at(0)))
            .number(self.x.stride)
            .number(self.x.rows)
            .number(panels.len())
            .number(self.weight.blocks())
            .number(part.features - skipped)
            .number(self.out.stride)
            .number(out_first)
            .number(self.finish as usize)
            .number(part.first)
            .number(part.features)
    }

    fn small(&self, device: &mut Device) -> Result<()> {
        let part = self.part;
        let processors = device.info().processors as usize;
        // Two panels a block share the reads of many rows, once there are blocks enough.
        let pairs = self.x.rows > 32 && part.panels >= 4 * processors;
        let size = match self.x.rows {
            0..=8 => 0,
            9..=16 => 1,
            17..=32 => 2,
            _ if !pairs => 3,
            _ => 4,
        };
        let names: [&'static str; 5] = match part.format {
            Format::Bf16 => {
                ["small_bf16_8_1", "small_bf16_16_1", "small_bf16_32_1", "small_bf16_64_1", "small_bf16_64_2"]
            }
            Format::Q4 => ["small_q4_8_1", "small_q4_16_1", "small_q4_32_1", "small_q4_64_1", "small_q4_64_2"],
            Format::Q8 => ["small_q8_8_1", "small_q8_16_1", "small_q8_32_1", "small_q8_64_1", "small_q8_64_2"],
            Format::Q8Half => ["small_q8h_8_1", "small_q8h_16_1", "small_q8h_32_1", "small_q8h_64_1", "small_q8h_64_2"],
        };
        let kernel = device.kernel("gemm_small", names[size])?;
        let panels_a_block = if size == 4 { 2 } else { 1 };
        let grid = (part.panels.div_ceil(panels_a_block) as u32, self.x.rows.div_ceil(SMALL_ROWS) as u32);
        let [tiles, scales] = part.starting_at(0);
        let fields = self.fields(tiles, scales, 0..part.panels);
        device.launch(&kernel, Launch { grid, block: 256, shared: 0 }, &[Arg::Fields(fields)])
    }

    /// These panels, with more rows than the small kernels take.
    fn many(&self, device: &mut Device, expanded: &Expanded, panels: Range<usize>) -> Result<()> {
        let blocks = self.weight.blocks();
        if panels.is_empty() {
            return Ok(());
        }
        if self.part.format == Format::Bf16 {
            let [tiles, _] = self.part.starting_at(panels.start * blocks);
            return self.tiles(device, tiles, panels);
        }
        let memory = expanded.memory.as_ref().expect("`fit` was called when the matrix was loaded");
        let step = Expanded::panels(blocks);
        for start in panels.clone().step_by(step) {
            let panels = start..panels.end.min(start + step);
            self.expand(device, memory, panels.clone())?;
            self.tiles(device, memory.at(0), panels)?;
        }
        Ok(())
    }

    /// bf16 tiles of these panels, which begin at `tiles`.
    fn tiles(&self, device: &mut Device, tiles: Arg, panels: Range<usize>) -> Result<()> {
        const STAGES: usize = 4;
        let rows = self.x.rows;
        let blocks_of = |size: usize| (rows.div_ceil(size) as u32, (panels.len() * 16).div_ceil(size) as u32);
        let large = blocks_of(128);
        // The larger tile reads less for each product; the smaller one fills a device with work earlier.
        let (name, size, grid) = if (large.0 * large.1) as usize >= device.info().processors as usize {
            ("tile_128", 128, large)
        } else {
            ("tile_64", 64, blocks_of(64))
        };
        let shared = (STAGES * 2 * size * 64) as u32;
        let kernel = device.kernel("gemm_tile", name)?;
        device.allow_shared(&kernel, shared)?;
        let fields = self.fields(tiles, NULL, panels);
        device.launch(&kernel, Launch { grid, block: 128, shared }, &[Arg::Fields(fields)])
    }

    fn expand(&self, device: &mut Device, to: &DeviceBytes, panels: Range<usize>) -> Result<()> {
        let (part, blocks) = (self.part, self.weight.blocks());
        let name = match part.format {
            Format::Bf16 => return Ok(()),
            Format::Q4 => "expand_q4",
            Format::Q8 => "expand_q8",
            Format::Q8Half => "expand_q8h",
        };
        let kernel = device.kernel("gemm_tile", name)?;
        let [tiles, scales] = part.starting_at(panels.start * blocks);
        let grid = ((panels.len() * blocks) as u32, 1);
        device.launch(&kernel, Launch { grid, block: 64, shared: 0 }, &[tiles, scales, to.at(0)])
    }
}
