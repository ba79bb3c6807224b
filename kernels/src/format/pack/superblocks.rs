//! Packed blocks of 256 columns: eight blocks of 32, with whole-number scales in bytes instead of packed bits.
//!
//! ```text
//!              for all 256 columns         for each block of 32 columns                          bits a weight
//!   Q2_K       d, dmin: 16 x f16           scale | min << 4: 16 x 2    pairs                     2.63
//!   Q3_K       d: 16 x f16                 scales: 16 x 2              pairs    bits             3.56
//!   Q4_K       d, dmin: 16 x f16           scales: 16  mins: 16        nibbles                   4.63
//!   Q5_K       d, dmin: 16 x f16           scales: 16  mins: 16        nibbles  bits             5.63
//!   Q6_K       d: 16 x f16                 scales: 16 x 2              nibbles  pairs            6.56
//!   IQ4_XS     d: 16 x f16                 scales: 16                  nibbles                   4.31
//! ```
//!
//! Each field is an array over the blocks of its own, so that words of quants start at whole vectors.

use super::{Codes, PANEL, Packed, Scales, Shape, Word, Zero, ZeroKind, set_bits, set_nibbles, set_pairs};
use crate::WeightType;
use crate::format::ggml::{SuperBlock, super_block};
use crate::memory::Plain;

/// Blocks of 32 columns.
const BLOCKS: usize = 8;

/// Declares a packed block of a type: its fields after `d`, how to read block `b` of it, and how to write a row of it.
macro_rules! super_block {
    (
        $ty:ident, $name:ident { $($field:ident: $kind:ty),* }, $bytes:literal, $shape:expr;
        |$this:ident, $b:ident| codes: $codes:expr, scales: $scales:expr, zero: $zero:expr;
        |$lane:ident, $source:ident| $set:block
    ) => {
        #[doc = concat!("256 columns of 16 rows of [`WeightType::", stringify!($ty), "`].")]
        #[derive(Clone, Copy)]
        #[repr(C, align(32))]
        pub(crate) struct $name {
            d: [u16; PANEL],
            $($field: $kind,)*
        }

        const _: () = assert!(size_of::<$name>() == $bytes);

        impl Plain for $name {}

        impl Packed for $name {
            const TYPE: WeightType = WeightType::$ty;
            const SHAPE: Shape = $shape;

            #[inline(always)]
            fn d(&self) -> &[u16; PANEL] {
                &self.d
            }
            #[inline(always)]
            fn codes(&self, $b: usize) -> Codes<'_> {
                let $this = self;
                $codes
            }
            #[inline(always)]
            fn scales(&self, $b: usize) -> Scales<'_> {
                let $this = self;
                $scales
            }
            #[inline(always)]
            fn zero(&self, $b: usize) -> Zero<'_> {
                let ($this, _) = (self, $b);
                let _ = $this;
                $zero
            }
            #[inline]
            fn set_lane(&mut self, $lane: usize, source: &[u8]) {
                let $source = super_block(Self::TYPE, source);
                let $this = self;
                $this.d[$lane] = $source.d;
                for $b in 0..BLOCKS $set
            }
        }
    };
}

super_block!(Q2K, Q2Kx16 { dmin: [u16; PANEL], scales: [[[u8; 2]; PANEL]; BLOCKS], q: [[Word; 2]; BLOCKS] }, 1344, Shape { bits: 2, scales: 2, zero: ZeroKind::Mins };
|this, b| codes: Codes::Two(&this.q[b]), scales: Scales::LowNibbles(&this.scales[b]),
    zero: Zero::HighNibbles(&this.dmin, &this.scales[b]);
|lane, source| {
    this.dmin[lane] = source.dmin;
    this.scales[b][lane] = [0, 1].map(|half| source.scales[2 * b + half].cast_unsigned() | source.mins[2 * b + half] << 4);
    set_pairs(&mut this.q[b], lane, &source.codes[b], 0);
});

super_block!(Q3K, Q3Kx16 { scales: [[[i8; 2]; PANEL]; BLOCKS], q: [[Word; 2]; BLOCKS], high: [Word; BLOCKS] }, 1824, Shape { bits: 3, scales: 2, zero: ZeroKind::Codes };
|this, b| codes: Codes::Three(&this.q[b], &this.high[b]), scales: Scales::Halves(&this.scales[b]),
    zero: Zero::Code(4);
|lane, source| {
    this.scales[b][lane] = halves(&source, b);
    set_pairs(&mut this.q[b], lane, &source.codes[b], 0);
    set_bits(&mut this.high[b], lane, &source.codes[b], 2);
});

super_block!(Q4K, Q4Kx16 { dmin: [u16; PANEL], scales: [[i8; PANEL]; BLOCKS], mins: [[u8; PANEL]; BLOCKS], q: [[Word; 4]; BLOCKS] }, 2368, Shape { bits: 4, scales: 1, zero: ZeroKind::Float };
|this, b| codes: Codes::Four(&this.q[b]), scales: Scales::Each(&this.scales[b]),
    zero: Zero::Mins(&this.dmin, &this.mins[b]);
|lane, source| {
    this.dmin[lane] = source.dmin;
    this.scales[b][lane] = source.scales[2 * b];
    this.mins[b][lane] = source.mins[2 * b];
    set_nibbles(&mut this.q[b], lane, &source.codes[b]);
});

super_block!(Q5K, Q5Kx16 { dmin: [u16; PANEL], scales: [[i8; PANEL]; BLOCKS], mins: [[u8; PANEL]; BLOCKS], q: [[Word; 4]; BLOCKS], high: [Word; BLOCKS] }, 2880, Shape { bits: 5, scales: 1, zero: ZeroKind::Float };
|this, b| codes: Codes::Five(&this.q[b], &this.high[b]), scales: Scales::Each(&this.scales[b]),
    zero: Zero::Mins(&this.dmin, &this.mins[b]);
|lane, source| {
    this.dmin[lane] = source.dmin;
    this.scales[b][lane] = source.scales[2 * b];
    this.mins[b][lane] = source.mins[2 * b];
    set_nibbles(&mut this.q[b], lane, &source.codes[b]);
    set_bits(&mut this.high[b], lane, &source.codes[b], 4);
});

super_block!(Q6K, Q6Kx16 { scales: [[[i8; 2]; PANEL]; BLOCKS], q: [[Word; 4]; BLOCKS], high: [[Word; 2]; BLOCKS] }, 3360, Shape { bits: 6, scales: 2, zero: ZeroKind::Codes };
|this, b| codes: Codes::Six(&this.q[b], &this.high[b]), scales: Scales::Halves(&this.scales[b]),
    zero: Zero::Code(32);
|lane, source| {
    this.scales[b][lane] = halves(&source, b);
    set_nibbles(&mut this.q[b], lane, &source.codes[b]);
    set_pairs(&mut this.high[b], lane, &source.codes[b], 4);
});

super_block!(Iq4Xs, Iq4Xsx16 { scales: [[i8; PANEL]; BLOCKS], q: [[Word; 4]; BLOCKS] }, 2208, Shape { bits: 8, scales: 1, zero: ZeroKind::Codes };
|this, b| codes: Codes::Table(&this.q[b]), scales: Scales::Each(&this.scales[b]), zero: Zero::Code(128);
|lane, source| {
    this.scales[b][lane] = source.scales[2 * b];
    set_nibbles(&mut this.q[b], lane, &source.codes[b]);
});

/// The two scales of a block.
fn halves(source: &SuperBlock, b: usize) -> [i8; 2] {
    [source.scales[2 * b], source.scales[2 * b + 1]]
}
