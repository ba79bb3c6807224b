//! The paged key/value pool: how blocks are named, shaped and addressed.
//!
//! ```text
//!   pool    [block][layer]                      one (block, layer) is contiguous
//!   block   [kv head][ K: group of 16 positions x dim x 16 | V: position x dim ]     f16
//! ```
//!
//! Keys are stored transposed in groups of 16 positions, so that 16 scores come out of one vector without horizontal
//! sums; values are stored position by position.

/// Index of a block in the pool; the same in every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// Positions in one block. A block is the unit of allocation and of prefix reuse.
pub const BLOCK_SIZE: usize = 32;

/// Blocks that `tokens` tokens fill or touch.
pub const fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_SIZE)
}

/// Shape of a key/value pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Decoder layers.
    pub layers: usize,
    /// Key/value heads of a layer.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
}

impl KvLayout {
    /// f16 values of one block in one layer.
    pub fn block_elements(&self) -> usize {
        2 * self.kv_heads * self.head_dim * BLOCK_SIZE
    }

    /// Where a block of a layer starts, in f16 values. All layers of a block lie together, so that a pool of which few
    /// blocks were ever used holds few pages.
    pub fn offset(&self, block: BlockId, layer: usize) -> usize {
        (block.0 as usize * self.layers + layer) * self.block_elements()
    }

    /// Blocks in a pool of this many f16 values.
    pub fn blocks_in(&self, values: usize) -> usize {
        values / (self.layers * self.block_elements()).max(1)
    }

    /// Bytes of one block over all layers.
    pub fn block_bytes(&self) -> usize {
        self.layers * self.block_elements() * size_of::<u16>()
    }

    /// Bytes of one token over all layers.
    pub fn token_bytes(&self) -> usize {
        self.block_bytes() / BLOCK_SIZE
    }
}

/// Consecutive rows of a batch that belong to one sequence.
///
/// ```text
///   positions   0 ........ pos0 ........ pos0 + rows
///               | in the pool | this step's rows |
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeqSpan {
    /// First row in the batch.
    pub row0: u32,
    /// Number of rows, at least 1.
    pub rows: u32,
    /// Position of the first row in its sequence.
    pub pos0: u32,
    /// Where this sequence's blocks start in the batch's block table.
    pub table0: u32,
    /// Blocks in its table: at least `blocks_for(pos0 + rows)`.
    pub table_len: u32,
}
