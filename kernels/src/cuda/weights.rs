//! Weight matrices in device memory, in the tiles that the kernels read (`cu/tiles.cuh`).
//!
//! ```text
//!   parts of a matrix   [q4_K rows | q4_K rows | q6_K rows]    each a Part: panels of 16 rows, tiles of 32 columns
//!   gate and up         one Part: 8 rows of the gate and the same 8 of up to a panel
//! ```
//!
//! | in the file                             | on the device                                    | bits a weight |
//! |-----------------------------------------|--------------------------------------------------|---------------|
//! | F32, F16, BF16, Q2_K, Q5_1, Q5_K        | bf16                                             | 16            |
//! | Q4_0, Q4_1, Q4_K                        | 4 bits, scale and minimum as halves for each 32  | 5             |
//! | Q8_0, Q5_0, IQ4_NL, IQ4_XS              | 8 bits, scale as a half for each 32              | 8.5           |
//! | Q6_K, Q3_K                              | 8 bits, scale as a half for each 16              | 9             |
//!
//! Rows are packed by several threads, some mebibytes at a time, and copied while the host goes on to the next ones.

use std::ops::Range;

use half::{bf16, f16};

use super::driver::{Arg, Device, DeviceBytes};
use super::fields::NULL;
use crate::checks::check_parts;
use crate::format::ggml::{BLOCK, IQ4_VALUES, dequantise_row, super_block};
use crate::{Error, PartOrder, Result, WeightPart, WeightType};

/// Rows of a tile, and of a panel.
pub(super) const TILE_ROWS: usize = 16;
/// Columns of a tile.
pub(super) const TILE_COLS: usize = BLOCK;
/// Bytes of packed weights that are made at a time on the host.
const STAGING: usize = 16 << 20;

/// How weights lie on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Bf16,
    /// 4 bits, scale and minimum for each 32.
    Q4,
    /// 8 bits, scale for each 32.
    Q8,
    /// 8 bits, scale for each 16.
    Q8Half,
}

impl Format {
    /// The format for weights of a type.
    pub(super) fn of(ty: WeightType) -> Self {
        match ty {
            WeightType::Q4_0 | WeightType::Q4_1 | WeightType::Q4K => Format::Q4,
            WeightType::Q8_0 | WeightType::Q5_0 | WeightType::Iq4Nl | WeightType::Iq4Xs => Format::Q8,
            WeightType::Q6K | WeightType::Q3K => Format::Q8Half,
            WeightType::F32
            | WeightType::F16
            | WeightType::Bf16
            | WeightType::Q2K
            | WeightType::Q5_1
            | WeightType::Q5K => Format::Bf16,
        }
    }

    /// Bytes of a tile's codes.
    pub(super) fn tile_bytes(self) -> usize {
        match self {
            Format::Bf16 => 1024,
            Format::Q4 => 256,
            Format::Q8 | Format::Q8Half => 512,
        }
    }

    /// Bytes of a tile's scales.
    pub(super) fn scale_bytes(self) -> usize {
        match self {
            Format::Bf16 => 0,
            Format::Q8 => 32,
            Format::Q4 | Format::Q8Half => 64,
        }
    }
}

/// Bytes that a matrix of this type and shape takes on a device.
pub fn weight_bytes(ty: WeightType, rows: usize, cols: usize) -> usize {
    let format = Format::of(ty);
    let tiles = rows.div_ceil(TILE_ROWS).saturating_mul(cols.div_ceil(TILE_COLS));
    tiles.saturating_mul(format.tile_bytes() + format.scale_bytes())
}

/// Rows of one format.
pub(super) struct Part {
    pub(super) format: Format,
    /// Features: rows of the matrix, or columns of a gated product's result.
    pub(super) features: usize,
    /// Index of the first feature within the matrix.
    pub(super) first: usize,
    pub(super) panels: usize,
    pub(super) tiles: DeviceBytes,
    pub(super) scales: Option<DeviceBytes>,
}

impl Part {
    /// Where tiles and scales of a tile begin, counted from the part's first; no scales where there are none.
    pub(super) fn starting_at(&self, tile: usize) -> [Arg; 2] {
        let scales = self.scales.as_ref().map_or(NULL, |scales| scales.at(tile * self.format.scale_bytes()));
        [self.tiles.at(tile * self.format.tile_bytes()), scales]
    }
}

/// A weight matrix of shape `[rows, cols]`.
pub(super) struct Linear {
    pub(super) parts: Vec<Part>,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) order: PartOrder,
    pub(super) bias: Option<DeviceBytes>,
}

impl Linear {
    /// Tiles across a row.
    pub(super) fn blocks(&self) -> usize {
        self.cols.div_ceil(TILE_COLS)
    }

    /// Panels of all parts.
    pub(super) fn panels(&self) -> usize {
        self.parts.iter().map(|part| part.panels).sum()
    }

    /// Checks the parts of a matrix and brings them to the device.
    ///
    /// # Errors
    /// As [`crate::Backend::load_linear`], and those of [`Device::alloc`].
    pub(super) fn load(
        device: &mut Device,
        parts: &[WeightPart<'_>],
        order: PartOrder,
        bias: Option<&[f32]>,
    ) -> Result<Self> {
        const OP: &str = "load_linear";
        let refuse = |expected: String, got: String| Err(Error::Shape { op: OP, expected, got });
        let cols = check_parts(parts)?;
        let rows: usize = parts.iter().map(|part| part.rows).sum();
        if let Some(bias) = bias
            && bias.len() != rows
        {
            return refuse(format!("a bias of {rows} values"), bias.len().to_string());
        }
        let loaded = match order {
            PartOrder::Concat => {
                let mut loaded = Vec::with_capacity(parts.len());
                let mut first = 0;
                for &part in parts {
                    let source = Source::Rows(part);
                    loaded.push(load_part(device, &source, Format::of(part.ty), (first, part.rows))?);
                    first += part.rows;
                }
                loaded
            }
            PartOrder::GateUp => {
                let (&[gate, up], true) = (parts, parts.len() == 2 && parts[0].rows == parts[1].rows) else {
                    let shapes: Vec<_> = parts.iter().map(|p| format!("{} x {cols}", p.rows)).collect();
                    return refuse("gate and up of one shape".into(), shapes.join(", "));
                };
                // Both halves of a panel have one format; bf16 holds any.
                let format = if Format::of(gate.ty) == Format::of(up.ty) { Format::of(gate.ty) } else { Format::Bf16 };
                vec![load_part(device, &Source::GateUp(gate, up), format, (0, gate.rows))?]
            }
        };
        let bias = match bias {
            Some(bias) => {
                let bytes: Vec<u8> = bias.iter().flat_map(|x| x.to_le_bytes()).collect();
                let mut memory = device.alloc(bytes.len(), "a bias")?;
                device.upload(&mut memory, 0, &bytes)?;
                Some(memory)
            }
            None => None,
        };
        Ok(Self { parts: loaded, rows, cols, order, bias })
    }
}

/// Where the rows of panels come from.
enum Source<'a> {
    Rows(WeightPart<'a>),
    GateUp(WeightPart<'a>, WeightPart<'a>),
}

impl<'a> Source<'a> {
    fn panels(&self) -> usize {
        match self {
            Source::Rows(part) => part.rows.div_ceil(TILE_ROWS),
            Source::GateUp(gate, _) => gate.rows.div_ceil(TILE_ROWS / 2),
        }
    }

    fn cols(&self) -> usize {
        match self {
            Source::Rows(part) | Source::GateUp(part, _) => part.cols,
        }
    }

    /// Type and bytes of row `row` of a panel, unless it is padding.
    fn row(&self, panel: usize, row: usize) -> Option<(WeightType, &'a [u8])> {
        let (part, index) = match self {
            Source::Rows(part) => (part, panel * TILE_ROWS + row),
            Source::GateUp(gate, up) => {
                let half = TILE_ROWS / 2;
                (if row < half { gate } else { up }, panel * half + row % half)
            }
        };
        let bytes = part.data.len() / part.rows;
        (index < part.rows).then(|| (part.ty, &part.data[index * bytes..][..bytes]))
    }
}

fn load_part(
    device: &mut Device,
    source: &Source<'_>,
    format: Format,
    (first, features): (usize, usize),
) -> Result<Part> {
    let (panels, blocks) = (source.panels(), source.cols().div_ceil(TILE_COLS));
    let (tile_bytes, scale_bytes) = (blocks * format.tile_bytes(), blocks * format.scale_bytes());
    let mut tiles = device.alloc(panels * tile_bytes, "weights")?;
    let mut scales = match scale_bytes {
        0 => None,
        bytes => Some(device.alloc(panels * bytes, "scales of weights")?),
    };
    let step = (STAGING / tile_bytes).clamp(1, panels);
    let (mut tile_stage, mut scale_stage) = (vec![0; step * tile_bytes], vec![0; step * scale_bytes]);
    for start in (0..panels).step_by(step) {
        let range = start..panels.min(start + step);
        let (tile_stage, scale_stage) =
            (&mut tile_stage[..range.len() * tile_bytes], &mut scale_stage[..range.len() * scale_bytes]);
        pack_panels(source, format, range, tile_stage, scale_stage);
        device.upload(&mut tiles, start * tile_bytes, tile_stage)?;
        if let Some(scales) = &mut scales {
            device.upload(scales, start * scale_bytes, scale_stage)?;
        }
    }
    Ok(Part { format, features, first, panels, tiles, scales })
}

/// Packs a range of panels, shared out to threads.
fn pack_panels(source: &Source<'_>, format: Format, range: Range<usize>, tiles: &mut [u8], scales: &mut [u8]) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(range.len()).max(1);
    let (count, share) = (range.len(), range.len().div_ceil(threads));
    let (tile_bytes, scale_bytes) = (tiles.len() / count, scales.len() / count);
    let pack = |first: usize, tiles: &mut [u8], scales: &mut [u8]| {
        for (i, tiles) in tiles.chunks_exact_mut(tile_bytes).enumerate() {
            pack_panel(source, format, first + i, tiles, &mut scales[i * scale_bytes..][..scale_bytes]);
        }
    };
    if threads == 1 {
        return pack(range.start, tiles, scales);
    }
    std::thread::scope(|scope| {
        let mut rest = scales;
        for (i, tiles) in tiles.chunks_mut(share * tile_bytes).enumerate() {
            let (scales, behind) = rest.split_at_mut(tiles.len() / tile_bytes * scale_bytes);
            rest = behind;
            let pack = &pack;
            scope.spawn(move || pack(range.start + i * share, tiles, scales));
        }
    });
}

fn pack_panel(source: &Source<'_>, format: Format, panel: usize, tiles: &mut [u8], scales: &mut [u8]) {
    tiles.fill(0);
    scales.fill(0);
    let mut floats = vec![0.0; source.cols()];
    for row in 0..TILE_ROWS {
        let Some((ty, bytes)) = source.row(panel, row) else { continue };
        let (group, high) = (row % 8, row / 8);
        if format == Format::Bf16 {
            let mut put = |col: usize, bits: u16| {
                let at = col / TILE_COLS * 1024 + row * 2 * TILE_COLS + col % TILE_COLS * 2;
                tiles[at..at + 2].copy_from_slice(&bits.to_le_bytes());
            };
            if ty == WeightType::Bf16 {
                bytes.as_chunks::<2>().0.iter().enumerate().for_each(|(col, &pair)| put(col, u16::from_le_bytes(pair)));
            } else {
                dequantise_row(ty, bytes, &mut floats);
                floats.iter().enumerate().for_each(|(col, &x)| put(col, bf16::from_f32(x).to_bits()));
            }
            continue;
        }
        each_block(ty, bytes, |block, quants| {
            let tile = &mut tiles[block * format.tile_bytes()..][..format.tile_bytes()];
            let scale = &mut scales[block * format.scale_bytes()..][..format.scale_bytes()];
            let mut put_scale = |at: usize, x: f32| {
                scale[2 * at..2 * at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
            };
            match format {
                Format::Bf16 => unreachable!("handled above"),
                Format::Q4 => {
                    for (t, codes) in quants.codes.as_chunks::<8>().0.iter().enumerate() {
                        // Even columns in the lower half of the word, odd ones in the upper half.
                        let word = codes
                            .iter()
                            .enumerate()
                            .fold(0, |word, (i, &code)| word | u32::from(code) << (4 * (i / 2) + 16 * (i % 2)));
                        let at = 8 * (4 * group + t) + 4 * high;
                        tile[at..at + 4].copy_from_slice(&word.to_le_bytes());
                    }
                    put_scale(4 * group + 2 * high, quants.scales[0]);
                    put_scale(4 * group + 2 * high + 1, quants.minimum);
                }
                Format::Q8 | Format::Q8Half => {
                    for (t, codes) in quants.codes.as_chunks::<8>().0.iter().enumerate() {
                        let at = 16 * (4 * group + t) + 8 * high;
                        tile[at..at + 8].copy_from_slice(codes);
                    }
                    if format == Format::Q8 {
                        put_scale(2 * group + high, quants.scales[0]);
                    } else {
                        put_scale(4 * group + high, quants.scales[0]);
                        put_scale(4 * group + 2 + high, quants.scales[1]);
                    }
                }
            }
        });
    }
}

/// 32 columns of a quantised row: `scale * code + minimum` with codes of 4 bits, `scale * (code - 128)` with 8 bits.
struct Quants {
    codes: [u8; BLOCK],
    /// Of the first and the second 16 columns.
    scales: [f32; 2],
    minimum: f32,
}

/// Takes a row of quants apart, 32 columns at a time.
fn each_block(ty: WeightType, bytes: &[u8], mut put: impl FnMut(usize, &Quants)) {
    let half = |bytes: &[u8], at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
    let nibbles = |bytes: &[u8]| -> [u8; BLOCK] {
        std::array::from_fn(|i| if i < BLOCK / 2 { bytes[i] & 15 } else { bytes[i - BLOCK / 2] >> 4 })
    };
    for (index, src) in bytes.chunks_exact(ty.block_bytes()).enumerate() {
        let mut one = |codes, scale, minimum| put(index, &Quants { codes, scales: [scale; 2], minimum });
        match ty {
            WeightType::Q4_0 => one(nibbles(&src[2..]), half(src, 0), -8.0 * half(src, 0)),
            WeightType::Q4_1 => one(nibbles(&src[4..]), half(src, 0), half(src, 2)),
            WeightType::Q8_0 => one(std::array::from_fn(|i| src[2 + i] ^ 0x80), half(src, 0), 0.0),
            WeightType::Q5_0 => {
                let (low, high) = (nibbles(&src[6..]), u32::from_le_bytes([src[2], src[3], src[4], src[5]]));
                let code = |i: usize| 128 - 16 + (low[i] | ((high >> i & 1) as u8 * 16));
                one(std::array::from_fn(code), half(src, 0), 0.0);
            }
            WeightType::Iq4Nl => one(table_codes(nibbles(&src[2..])), half(src, 0), 0.0),
            _ => {
                let block = super_block(ty, src);
                let (d, dmin) = (f16::from_bits(block.d).to_f32(), f16::from_bits(block.dmin).to_f32());
                for (b, &codes) in block.codes.iter().enumerate() {
                    let scales = [block.scales[2 * b], block.scales[2 * b + 1]].map(|scale| d * f32::from(scale));
                    let codes = match ty {
                        WeightType::Q6K => codes.map(|code| code + 128 - 32),
                        WeightType::Q3K => codes.map(|code| code + 128 - 4),
                        WeightType::Iq4Xs => table_codes(codes),
                        _ => codes,
                    };
                    put(index * 8 + b, &Quants { codes, scales, minimum: -dmin * f32::from(block.mins[2 * b]) });
                }
            }
        }
    }
}

fn table_codes(codes: [u8; BLOCK]) -> [u8; BLOCK] {
    codes.map(|code| IQ4_VALUES[usize::from(code)].cast_unsigned() ^ 0x80)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::tests::{matrix, noise};

    /// What a packed part means, read as `values` of `cu/tiles.cuh` does.
    fn unpack(format: Format, tiles: &[u8], scales: &[u8], blocks: usize, row: usize, col: usize) -> f32 {
        let tile = row / TILE_ROWS * blocks + col / TILE_COLS;
        let (tiles, scales) = (&tiles[tile * format.tile_bytes()..], &scales[tile * format.scale_bytes()..]);
        let (row, col) = (row % TILE_ROWS, col % TILE_COLS);
        let (g, high, t, i) = (row % 8, row / 8, col / 8, col % 8);
        let half = |at: usize| f16::from_le_bytes([scales[2 * at], scales[2 * at + 1]]).to_f32();
        let byte = || f32::from(tiles[16 * (4 * g + t) + 8 * high + i]) - 128.0;
        match format {
            Format::Bf16 => {
                let at = 64 * row + 2 * col;
                bf16::from_le_bytes([tiles[at], tiles[at + 1]]).to_f32()
            }
            Format::Q4 => {
                let at = 8 * (4 * g + t) + 4 * high;
                let word = u32::from_le_bytes([tiles[at], tiles[at + 1], tiles[at + 2], tiles[at + 3]]);
                let code = word >> (4 * (i / 2) + 16 * (i % 2)) & 15;
                half(4 * g + 2 * high) * code as f32 + half(4 * g + 2 * high + 1)
            }
            Format::Q8 => half(2 * g + high) * byte(),
            Format::Q8Half => half(4 * g + 2 * (t / 2) + high) * byte(),
        }
    }

    #[test]
    fn packed_rows_mean_what_the_file_says() {
        for ty in WeightType::ALL {
            let (rows, cols) = (37, if ty.is_float() { 45 } else { 512 });
            let (data, values) = matrix(ty, rows, cols, 7);
            let (format, source) = (Format::of(ty), Source::Rows(WeightPart { ty, rows, cols, data: &data }));
            let blocks = cols.div_ceil(TILE_COLS);
            let mut tiles = vec![1; source.panels() * blocks * format.tile_bytes()];
            let mut scales = vec![1; source.panels() * blocks * format.scale_bytes()];
            assert_eq!(tiles.len() + scales.len(), weight_bytes(ty, rows, cols), "{}", ty.name());
            pack_panels(&source, format, 0..source.panels(), &mut tiles, &mut scales);
            for row in 0..source.panels() * TILE_ROWS {
                for col in 0..blocks * TILE_COLS {
                    let got = unpack(format, &tiles, &scales, blocks, row, col);
                    let expected = if row < rows && col < cols { values[row * cols + col] } else { 0.0 };
                    // Folded scales are rounded to halves, floats to bf16.
                    let room = expected.abs() * if format == Format::Bf16 { 4e-3 } else { 1e-3 } + 2e-4;
                    assert!((got - expected).abs() <= room, "{} {row} {col}: {got} {expected}", ty.name());
                }
            }
        }
    }

    #[test]
    fn a_panel_of_gate_and_up_has_eight_rows_of_each() {
        let bytes = |seed: usize| -> Vec<u8> { (0..11 * 32).flat_map(|i| noise(seed + i).to_le_bytes()).collect() };
        let (gate, up) = (bytes(0), bytes(1000));
        let part = |data| WeightPart { ty: WeightType::F32, rows: 11, cols: 32, data };
        let source = Source::GateUp(part(&gate), part(&up));
        assert_eq!(source.panels(), 2);
        assert_eq!(source.row(1, 2), Some((WeightType::F32, &gate[10 * 128..])));
        assert_eq!(source.row(1, 10), Some((WeightType::F32, &up[10 * 128..])));
        assert_eq!(source.row(1, 3), None);
        assert_eq!(source.row(0, 15), Some((WeightType::F32, &up[7 * 128..8 * 128])));
    }
}
