//! The paged key/value pool on a device, and the launches of attention over it.
//!
//! ```text
//!   pool    [block][layer][kv head][ K | V ]    32 positions of bf16, or of bytes with exponents (`cu/kv.cuh`)
//!   items   few rows ──> decode_*  ──pieces──> attention_merge
//!           many     ──> prefill_*
//! ```

use super::batch::SLOTS;
use super::driver::{Arg, Device, DeviceBytes, Launch};
use super::fields::Fields;
use super::pass::View;
use crate::cpu::spans::check_heads;
use crate::kv::{BLOCK_SIZE, KvType};
use crate::{Error, HeadShape, KvLayout, Result};

/// A window that holds every position.
pub(super) const NO_WINDOW: usize = i32::MAX as usize;
/// Widths of a head that have attention kernels.
const WIDTHS: [usize; 5] = [32, 64, 96, 128, 256];

/// A paged key/value pool, and what pieces of sequences leave behind.
pub(super) struct Pool {
    pub(super) layout: KvLayout,
    pub(super) blocks: usize,
    /// A head's dimension as it is stored.
    pub(super) width: usize,
    pub(super) values: DeviceBytes,
    pub(super) partial: DeviceBytes,
    pub(super) partial_state: DeviceBytes,
}

impl Pool {
    /// Allocates a pool of zeros.
    ///
    /// # Errors
    /// [`Error::Shape`] for heads that no kernel takes, and those of [`Device::alloc`].
    pub(super) fn new(device: &mut Device, layout: KvLayout, blocks: usize) -> Result<Self> {
        if layout.ty == KvType::Int8 {
            let expected = "keys and values of 16 bits or fp8 on a CUDA device".into();
            return Err(Error::Shape { op: "alloc_kv", expected, got: layout.ty.name().into() });
        }
        let Some(width) = width_of(layout.head_dim) else {
            let expected = format!("heads of at most {} dimensions", WIDTHS[WIDTHS.len() - 1]);
            return Err(Error::Shape { op: "alloc_kv", expected, got: layout.head_dim.to_string() });
        };
        let values = device.alloc_zeroed(kv_block_bytes(layout).saturating_mul(blocks), "the key/value pool")?;
        let [partial, partial_state] = piece_bytes(layout);
        let partial = device.alloc(partial, "pieces of attention")?;
        let partial_state = device.alloc(partial_state, "pieces of attention")?;
        Ok(Self { layout, blocks, width, values, partial, partial_state })
    }

    /// The kernel that writes it.
    pub(super) fn store_kernel(&self) -> &'static str {
        if self.is_fp8() { "rope_store_fp8" } else { "rope_store" }
    }

    fn is_fp8(&self) -> bool {
        self.layout.ty == KvType::Fp8
    }

    /// `Pool` of `cu/kv.cuh`.
    pub(super) fn fields(&self, layer: usize) -> Fields {
        Fields::default()
            .pointer(self.values.at(0))
            .number(self.layout.layers)
            .number(layer)
            .number(self.layout.kv_heads)
            .number(self.width)
    }

    pub(super) fn check(&self, op: &'static str, layer: usize, shape: HeadShape) -> Result<()> {
        check_heads(op, shape, self.layout)?;
        if layer < self.layout.layers {
            return Ok(());
        }
        Err(Error::Shape { op, expected: format!("a layer below {}", self.layout.layers), got: layer.to_string() })
    }
}

/// Bytes of one block of a pool over all layers, on a device.
pub fn kv_block_bytes(layout: KvLayout) -> usize {
    let width = width_of(layout.head_dim).unwrap_or(layout.head_dim);
    KvLayout { head_dim: width, ..layout }.block_bytes()
}

/// Bytes of what pieces of sequences leave behind: values, and how they are merged.
pub(super) fn piece_bytes(layout: KvLayout) -> [usize; 2] {
    let rows = SLOTS * layout.kv_heads * 16;
    [rows * width_of(layout.head_dim).unwrap_or(layout.head_dim) * 4, rows * 8]
}

/// The width that heads of this dimension are stored in.
fn width_of(head_dim: usize) -> Option<usize> {
    WIDTHS.into_iter().find(|&width| width >= head_dim)
}

/// Submits the items of attention: those of few rows, of many, and the merges. `fields` are the arguments for a list of items.
///
/// # Errors
/// Those of [`Device::launch`].
pub(super) fn launch_attention(
    device: &mut Device,
    pool: &Pool,
    view: &View,
    fields: impl Fn(Arg) -> [Arg; 1],
) -> Result<()> {
    let kv_heads = pool.layout.kv_heads as u32;
    let width = WIDTHS.iter().position(|&width| width == pool.width).expect("the pool was made with one of them");
    let (items, counts) = (&view.items, view.counts);
    if counts.few > 0 {
        let name = if pool.is_fp8() {
            ["decode_fp8_32", "decode_fp8_64", "decode_fp8_96", "decode_fp8_128", "decode_fp8_256"]
        } else {
            ["decode_32", "decode_64", "decode_96", "decode_128", "decode_256"]
        }[width];
        let kernel = device.kernel("attention_decode", name)?;
        let shape = Launch { grid: (counts.few as u32, kv_heads), block: 128, shared: 0 };
        device.launch(&kernel, shape, &fields(items.few))?;
    }
    if counts.merges > 0 {
        let kernel = device.kernel("attention_decode", "attention_merge")?;
        let shape = Launch { grid: (counts.merges as u32, kv_heads), block: 128, shared: 0 };
        device.launch(&kernel, shape, &fields(items.merges))?;
    }
    if counts.many > 0 {
        let name = if pool.is_fp8() {
            ["prefill_fp8_32", "prefill_fp8_64", "prefill_fp8_96", "prefill_fp8_128", "prefill_fp8_256"]
        } else {
            ["prefill_32", "prefill_64", "prefill_96", "prefill_128", "prefill_256"]
        }[width];
        // Queries of 4 warps, the stages of the ring, and bytes as bf16, as in `cu/attention_prefill.cu`.
        let stages = if pool.width <= 128 { 3 } else { 2 };
        let stage = 2 * KvLayout { head_dim: pool.width, ..pool.layout }.head_words();
        let expanded = if pool.is_fp8() { 2 * BLOCK_SIZE * pool.width * 2 } else { 0 };
        let shared = (4 * pool.width / 32 * 2 * 32 * 16 + stages * stage + expanded) as u32;
        let kernel = device.kernel("attention_prefill", name)?;
        device.allow_shared(&kernel, shared)?;
        let shape = Launch { grid: (counts.many as u32, kv_heads), block: 128, shared };
        device.launch(&kernel, shape, &fields(items.many))?;
    }
    Ok(())
}
