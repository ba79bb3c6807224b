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
    /// 32 x 5 bit, one f16 scale, values `d * (q - 16)`
    Q5_0,
    /// 32 x 5 bit, f16 scale and minimum, values `d * q + m`
    Q5_1,
    /// 32 x 8 bit signed, one f16 scale
    Q8_0,
    /// 256 x 2 bit, scale and minimum of 4 bits for each 16, values `d * s * q - dmin * m`
    Q2K,
    /// 256 x 3 bit, scale of 6 bits for each 16, values `d * s * (q - 4)`
    Q3K,
    /// 256 x 4 bit, scale and minimum of 6 bits for each 32, values `d * s * q - dmin * m`
    Q4K,
    /// 256 x 5 bit, scale and minimum of 6 bits for each 32, values `d * s * q - dmin * m`
    Q5K,
    /// 256 x 6 bit, scale of 8 bits for each 16, values `d * s * (q - 32)`
    Q6K,
    /// 32 x 4 bit that choose from 16 values, one f16 scale
    Iq4Nl,
    /// 256 x 4 bit that choose from 16 values, scale of 6 bits for each 32
    Iq4Xs,
}

impl WeightType {
    /// Every type.
    pub const ALL: [WeightType; 15] = [
        WeightType::F32,
        WeightType::F16,
        WeightType::Bf16,
        WeightType::Q4_0,
        WeightType::Q4_1,
        WeightType::Q5_0,
        WeightType::Q5_1,
        WeightType::Q8_0,
        WeightType::Q2K,
        WeightType::Q3K,
        WeightType::Q4K,
        WeightType::Q5K,
        WeightType::Q6K,
        WeightType::Iq4Nl,
        WeightType::Iq4Xs,
    ];

    /// Name, values of a block, bytes of a block.
    const fn facts(self) -> (&'static str, usize, usize) {
        match self {
            WeightType::F32 => ("F32", 1, 4),
            WeightType::F16 => ("F16", 1, 2),
            WeightType::Bf16 => ("BF16", 1, 2),
            WeightType::Q4_0 => ("Q4_0", 32, 18),
            WeightType::Q4_1 => ("Q4_1", 32, 20),
            WeightType::Q5_0 => ("Q5_0", 32, 22),
            WeightType::Q5_1 => ("Q5_1", 32, 24),
            WeightType::Q8_0 => ("Q8_0", 32, 34),
            WeightType::Q2K => ("Q2_K", 256, 84),
            WeightType::Q3K => ("Q3_K", 256, 110),
            WeightType::Q4K => ("Q4_K", 256, 144),
            WeightType::Q5K => ("Q5_K", 256, 176),
            WeightType::Q6K => ("Q6_K", 256, 210),
            WeightType::Iq4Nl => ("IQ4_NL", 32, 18),
            WeightType::Iq4Xs => ("IQ4_XS", 256, 136),
        }
    }

    /// Name as ggml writes it.
    pub const fn name(self) -> &'static str {
        self.facts().0
    }

    /// Values in one block.
    pub const fn block_len(self) -> usize {
        self.facts().1
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        self.facts().2
    }

    /// True for types of single floats, false for blocks of quants.
    pub const fn is_float(self) -> bool {
        self.block_len() == 1
    }

    /// Bytes of a row of `cols` values; `None` when `cols` is not a whole number of blocks or the size overflows.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        cols.is_multiple_of(self.block_len()).then(|| (cols / self.block_len()).checked_mul(self.block_bytes()))?
    }

    /// Bytes that a matrix of `rows` rows takes in memory once it is packed for the kernels: up to 4 % more than in its
    /// file, and rows come in sixteens. `None` as for [`WeightType::row_bytes`].
    pub fn packed_bytes(self, rows: usize, cols: usize) -> Option<usize> {
        pack::panel_bytes(self, cols)?.checked_mul(rows.div_ceil(pack::PANEL))
    }

    /// Turns the bytes of whole rows into `out.len()` values: the plain meaning of a format, for tests and tools.
    ///
    /// # Panics
    /// When `bytes` has not the length of that many values.
    pub fn dequantise(self, bytes: &[u8], out: &mut [f32]) {
        ggml::dequantise_row(self, bytes, out);
    }
}
