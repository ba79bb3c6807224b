//! Packed blocks of 32 columns with floats of their own: as many bytes as the 16 blocks of the file.
//!
//! ```text
//!   Q4_0    d: 16 x f16                nibbles
//!   Q4_1    d: 16 x f16  m: 16 x f16   nibbles
//!   Q5_0    d: 16 x f16                nibbles  bits
//!   Q5_1    d: 16 x f16  m: 16 x f16   nibbles  bits
//!   Q8_0    d: 16 x f16                bytes
//!   IQ4_NL  d: 16 x f16                nibbles
//! ```

use super::{Codes, PANEL, Packed, Scales, Shape, Word, Zero, ZeroKind, set_all_words, set_group, set_words};
use crate::WeightType;
use crate::format::ggml::u16_at;
use crate::memory::Plain;

/// Declares a packed block of a type: its fields after `d`, how to read it, where a file's block has the words of quants `q`
/// and what is flipped in them, and how to write what else a row has.
macro_rules! block {
    (
        $ty:ident, $name:ident { $($field:ident: $kind:ty),* }
        |$this:ident| bits: $bits:literal, codes: $codes:expr, zero: $zero:expr;
        words at $at:literal ^ $flip:literal;
        |$lane:ident, $source:ident| $set:block
    ) => {
        #[doc = concat!("32 columns of 16 rows of [`WeightType::", stringify!($ty), "`].")]
        #[derive(Clone, Copy)]
        #[repr(C, align(32))]
        pub(crate) struct $name {
            d: [u16; PANEL],
            $($field: $kind,)*
        }

        const _: () = assert!(size_of::<$name>() == PANEL * WeightType::$ty.block_bytes());

        impl Plain for $name {}

        impl $name {
            /// Writes of row `lane` all but the words of quants.
            #[inline(always)]
            fn set_floats(&mut self, $lane: usize, $source: &[u8]) {
                let $this = self;
                $this.d[$lane] = u16_at($source, 0);
                $set
            }
        }

        impl Packed for $name {
            const TYPE: WeightType = WeightType::$ty;
            const SHAPE: Shape = Shape { bits: $bits, scales: 0, zero: ZeroKind::Float };

            #[inline(always)]
            fn d(&self) -> &[u16; PANEL] {
                &self.d
            }
            #[inline(always)]
            fn codes(&self, _: usize) -> Codes<'_> {
                let $this = self;
                $codes
            }
            #[inline(always)]
            fn scales(&self, _: usize) -> Scales<'_> {
                Scales::One
            }
            #[inline(always)]
            fn zero(&self, _: usize) -> Zero<'_> {
                let $this = self;
                let _ = $this;
                $zero
            }
            #[inline]
            fn set_lane(&mut self, lane: usize, source: &[u8]) {
                self.set_floats(lane, source);
                set_words(&mut self.q, lane, &source[$at..], $flip);
            }
            #[inline(always)]
            fn set_lanes(&mut self, sources: [&[u8]; PANEL]) {
                for (lane, source) in sources.into_iter().enumerate() {
                    self.set_floats(lane, source);
                }
                set_all_words(&mut self.q, &sources, $at, $flip);
            }
        }
    };
}

block!(Q4_0, Q4_0x16 { q: [Word; 4] }
    |this| bits: 4, codes: Codes::Four(&this.q), zero: Zero::Code(8);
    words at 2 ^ 0;
    |lane, source| {});

block!(Q4_1, Q4_1x16 { m: [u16; PANEL], q: [Word; 4] }
|this| bits: 4, codes: Codes::Four(&this.q), zero: Zero::Add(&this.m);
words at 4 ^ 0;
|lane, source| {
    this.m[lane] = u16_at(source, 2);
});

block!(Q5_0, Q5_0x16 { q: [Word; 4], high: Word }
|this| bits: 5, codes: Codes::Five(&this.q, &this.high), zero: Zero::Code(16);
words at 6 ^ 0;
|lane, source| {
    set_high(&mut this.high, lane, &source[2..6]);
});

block!(Q5_1, Q5_1x16 { m: [u16; PANEL], q: [Word; 4], high: Word }
|this| bits: 5, codes: Codes::Five(&this.q, &this.high), zero: Zero::Add(&this.m);
words at 8 ^ 0;
|lane, source| {
    this.m[lane] = u16_at(source, 2);
    set_high(&mut this.high, lane, &source[4..8]);
});

block!(Q8_0, Q8_0x16 { q: [Word; 8] }
    |this| bits: 8, codes: Codes::Eight(&this.q), zero: Zero::Code(128);
    words at 2 ^ 0x80;
    |lane, source| {});

block!(Iq4Nl, Iq4Nlx16 { q: [Word; 4] }
    |this| bits: 8, codes: Codes::Table(&this.q), zero: Zero::Code(128);
    words at 2 ^ 0;
    |lane, source| {});

/// Writes the upper bits of a row: bit `4j + c` of the file's four bytes becomes bit `j` of byte `c`.
#[inline(always)]
fn set_high(word: &mut Word, lane: usize, bits: &[u8]) {
    let bits = u32::from_le_bytes([bits[0], bits[1], bits[2], bits[3]]);
    let bytes = [0, 1, 2, 3].map(|c| {
        // Every fourth bit, moved together: in pairs, fours, eights.
        let ones = bits >> c & 0x1111_1111;
        let twos = (ones | ones >> 3) & 0x0303_0303;
        let fours = (twos | twos >> 6) & 0x000f_000f;
        (fours | fours >> 12) as u8
    });
    set_group(word, lane, u32::from_ne_bytes(bytes));
}
