//! Weight types as they lie in files, and their sizes.

pub mod ggml;
pub(crate) mod pack;

/// Element or block type of a weight tensor (names and layouts: ggml, <https://github.com/ggml-org/ggml>).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightType {
    /// 32-bit float
    F32,
    /// IEEE half
    F16,
    /// bfloat16
    Bf16,
    /// 32 x 4 bit, one f16 scale, values `d * (q - 8)`
    Q4_0,
    /// 32 x 4 bit, f16 scale and minimum, values `d * q + m`
    Q4_1,
    /// 32 x 8 bit signed, one f16 scale
    Q8_0,
}

impl WeightType {
    /// Values in one block.
    pub const fn block_len(self) -> usize {
        match self {
            WeightType::F32 | WeightType::F16 | WeightType::Bf16 => 1,
            WeightType::Q4_0 | WeightType::Q4_1 | WeightType::Q8_0 => 32,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            WeightType::F32 => 4,
            WeightType::F16 | WeightType::Bf16 => 2,
            WeightType::Q4_0 => 18,
            WeightType::Q4_1 => 20,
            WeightType::Q8_0 => 34,
        }
    }

    /// Bytes of a row of `cols` values; `None` when `cols` is not a whole number of blocks or the size overflows.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        cols.is_multiple_of(self.block_len()).then(|| (cols / self.block_len()).checked_mul(self.block_bytes()))?
    }

    /// Name as ggml writes it.
    pub const fn name(self) -> &'static str {
        match self {
            WeightType::F32 => "F32",
            WeightType::F16 => "F16",
            WeightType::Bf16 => "BF16",
            WeightType::Q4_0 => "Q4_0",
            WeightType::Q4_1 => "Q4_1",
            WeightType::Q8_0 => "Q8_0",
        }
    }
}
