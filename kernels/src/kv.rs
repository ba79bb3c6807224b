//! The paged key/value pool: how blocks are named, shaped and addressed.
//!
//! ```text
//!   pool    [block][layer]                      one (block, layer) is contiguous
//!   block   [kv head][ K: group of 16 positions x dim x 16 | V: position x dim ]                 f16
//!           [kv head][ f32 scales of 32 keys, of 32 values                                       int8
//!                    | K: group of 16 positions x dim / 2 x 16 x 2 | V: position / 2 x dim x 2 ]
//!           as `cuda/cu/kv.cuh` says, with a byte of exponent for each of 32 keys and values           fp8
//! ```
//!
//! Keys are stored transposed in groups of 16 positions, so that 16 scores come out of one vector without horizontal
//! sums; values are stored position by position. As int8, a key or value of one head and position is `scale * q` with
//! `scale = max|x| / 127`, and the two elements that meet in one sum (two dimensions of a key, the values of two positions)
//! are neighbours, because integer products are summed in pairs.

/// Index of a block in the pool; the same in every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// Positions in one block. A block is the unit of allocation and of prefix reuse.
pub const BLOCK_SIZE: usize = 32;

/// Blocks that `tokens` tokens fill or touch.
pub const fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_SIZE)
}

/// What keys and values are stored as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvType {
    /// 16 bits: IEEE halves on a CPU, bf16 on a CUDA device.
    #[default]
    F16,
    /// Bytes with one scale for each key and each value of a head: a little more than half the memory and half the bytes
    /// that a long context reads, for a relative rounding error of up to 1/254 of the largest element.
    Int8,
    /// E4M3 bytes with one exponent for each key and each value of a head, on CUDA devices: half the memory of 16 bits, for a
    /// relative rounding error of up to 1/16 of each element.
    Fp8,
}

impl KvType {
    /// Name for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Int8 => "int8",
            Self::Fp8 => "fp8",
        }
    }
}

/// Words (u16) of the scales in one head's part of an int8 block.
pub(crate) const SCALE_WORDS: usize = 2 * BLOCK_SIZE * size_of::<f32>() / size_of::<u16>();

/// Words (u16) of the exponents in one head's part of a block of fp8.
const EXPONENT_WORDS: usize = 2 * BLOCK_SIZE / size_of::<u16>();

/// Shape of a key/value pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Decoder layers.
    pub layers: usize,
    /// Key/value heads of a layer.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// What its elements are.
    pub ty: KvType,
}

impl KvLayout {
    /// Words (u16) of one head in one block and layer.
    pub fn head_words(&self) -> usize {
        match self.ty {
            KvType::F16 => 2 * self.head_dim * BLOCK_SIZE,
            KvType::Int8 => SCALE_WORDS + self.head_dim * BLOCK_SIZE,
            KvType::Fp8 => self.head_dim * BLOCK_SIZE + EXPONENT_WORDS,
        }
    }

    /// Words (u16) of one block in one layer.
    pub fn block_words(&self) -> usize {
        self.kv_heads * self.head_words()
    }

    /// Where a block of a layer starts, in words. All layers of a block lie together, so that a pool of which few
    /// blocks were ever used holds few pages.
    pub fn offset(&self, block: BlockId, layer: usize) -> usize {
        (block.0 as usize * self.layers + layer) * self.block_words()
    }

    /// Blocks in a pool of this many words.
    pub fn blocks_in(&self, words: usize) -> usize {
        words / (self.layers * self.block_words()).max(1)
    }

    /// Bytes of one block over all layers.
    pub fn block_bytes(&self) -> usize {
        self.layers * self.block_words() * size_of::<u16>()
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
