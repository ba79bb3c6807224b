//! The meaning of weight bytes in files: plain dequantisation, the reference for every packed kernel.
//!
//! ```text
//!   32 values
//!     Q4_0    d: f16            16 bytes, byte i = value i in the low nibble, value i + 16 in the high one
//!     Q4_1    d: f16  m: f16    16 bytes, likewise
//!     Q5_0    d: f16            4 bytes, bit i = bit 4 of value i; 16 bytes as above
//!     Q5_1    d: f16  m: f16    likewise
//!     Q8_0    d: f16            32 signed bytes
//!     IQ4_NL  d: f16            16 bytes as above, each nibble an index into [`IQ4_VALUES`]
//!   256 values, 8 blocks b of 32
//!     Q2_K    16 bytes: scale | min << 4, for each 16 values; 64 bytes of 2 bits; d: f16, dmin: f16
//!     Q3_K    32 bytes: bit b of byte i = bit 2 of value i of block b; 64 bytes of 2 bits; 12 bytes of scales; d: f16
//!     Q4_K    d: f16  dmin: f16  12 bytes of scales and mins; 128 bytes: 32 for a pair of blocks, low and high nibbles
//!     Q5_K    d: f16  dmin: f16  12 bytes likewise; 32 bytes: bit b of byte i = bit 4 of value i of block b; 128 likewise
//!     Q6_K    128 bytes of nibbles; 64 bytes of bits 4 and 5; 16 signed scales, for each 16 values; d: f16
//!     IQ4_XS  d: f16  6 bytes of scales; 8 x 16 bytes, each as in IQ4_NL
//! ```
//!
//! The 2-bit planes (Q2_K, Q3_K, the upper bits of Q6_K) hold 4 blocks in 32 bytes: bits `2k..2k + 2` of byte `i` belong to
//! value `i` of block `k` of the four.

use half::{bf16, f16};

use super::WeightType;

/// Values of one quantised block, and columns that share an activation's scale.
pub const BLOCK: usize = 32;

/// Values of a block of the K types and of IQ4_XS.
pub(crate) const SUPER: usize = 256;

/// What the nibbles of the IQ4 types stand for.
pub(crate) const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Reads the little-endian half at `bytes[at..at + 2]`.
fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_bits(u16_at(bytes, at)).to_f32()
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Turns one row of file bytes into `out.len()` values.
///
/// # Panics
/// When `bytes` is not the row's length.
pub fn dequantise_row(ty: WeightType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(Some(bytes.len()), ty.row_bytes(out.len()), "bytes of a {} row of {} values", ty.name(), out.len());
    let blocks = bytes.chunks_exact(ty.block_bytes()).zip(out.chunks_exact_mut(ty.block_len()));
    for (src, dst) in blocks {
        match ty {
            WeightType::F32 => dst[0] = f32::from_le_bytes([src[0], src[1], src[2], src[3]]),
            WeightType::F16 => dst[0] = half_at(src, 0),
            WeightType::Bf16 => dst[0] = bf16::from_le_bytes([src[0], src[1]]).to_f32(),
            WeightType::Q4_0 => {
                let d = half_at(src, 0);
                nibbles(&src[2..], dst, |q, _| d * (f32::from(q) - 8.0));
            }
            WeightType::Q4_1 => {
                let (d, m) = (half_at(src, 0), half_at(src, 2));
                nibbles(&src[4..], dst, |q, _| d * f32::from(q) + m);
            }
            WeightType::Q5_0 => {
                let (d, high) = (half_at(src, 0), high_bits(src, 2));
                nibbles(&src[6..], dst, |q, i| d * (f32::from(q | high(i)) - 16.0));
            }
            WeightType::Q5_1 => {
                let (d, m, high) = (half_at(src, 0), half_at(src, 2), high_bits(src, 4));
                nibbles(&src[8..], dst, |q, i| d * f32::from(q | high(i)) + m);
            }
            WeightType::Q8_0 => {
                let d = half_at(src, 0);
                for (value, &q) in dst.iter_mut().zip(&src[2..]) {
                    *value = d * f32::from(q.cast_signed());
                }
            }
            WeightType::Iq4Nl => {
                let d = half_at(src, 0);
                nibbles(&src[2..], dst, |q, _| d * f32::from(IQ4_VALUES[usize::from(q)]));
            }
            WeightType::Q2K | WeightType::Q4K | WeightType::Q5K => {
                let block = super_block(ty, src);
                let (d, dmin) = (f16::from_bits(block.d).to_f32(), f16::from_bits(block.dmin).to_f32());
                block.each(dst, |scale, min, q| d * f32::from(scale) * f32::from(q) - dmin * f32::from(min));
            }
            WeightType::Q3K | WeightType::Q6K => {
                let (block, zero) = (super_block(ty, src), if ty == WeightType::Q3K { 4.0 } else { 32.0 });
                let d = f16::from_bits(block.d).to_f32();
                block.each(dst, |scale, _, q| d * f32::from(scale) * (f32::from(q) - zero));
            }
            WeightType::Iq4Xs => {
                let block = super_block(ty, src);
                let d = f16::from_bits(block.d).to_f32();
                block.each(dst, |scale, _, q| d * f32::from(scale) * f32::from(IQ4_VALUES[usize::from(q)]));
            }
        }
    }
}

/// `value(nibble, index)` of each value of a block of 32.
fn nibbles(bytes: &[u8], out: &mut [f32], value: impl Fn(u8, usize) -> f32) {
    let (low, high) = out.split_at_mut(BLOCK / 2);
    for (i, ((low, high), &byte)) in low.iter_mut().zip(high).zip(bytes).enumerate() {
        *low = value(byte & 15, i);
        *high = value(byte >> 4, i + BLOCK / 2);
    }
}

/// Bit 4 of each value, from the 4 bytes at `at`.
fn high_bits(bytes: &[u8], at: usize) -> impl Fn(usize) -> u8 {
    let bits = u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    move |i| (bits >> i & 1) as u8 * 16
}

/// A block of 256 values, taken apart.
pub(crate) struct SuperBlock {
    /// Scale of the scales, as f16.
    pub(crate) d: u16,
    /// Scale of the mins, as f16.
    pub(crate) dmin: u16,
    /// For each 16 values.
    pub(crate) scales: [i8; SUPER / 16],
    /// For each 16 values.
    pub(crate) mins: [u8; SUPER / 16],
    /// Unsigned quants, in the order of the values.
    pub(crate) codes: [[u8; BLOCK]; SUPER / BLOCK],
}

impl SuperBlock {
    /// `value(scale, min, code)` of each value.
    fn each(&self, out: &mut [f32], value: impl Fn(i8, u8, u8) -> f32) {
        for (i, (out, &code)) in out.iter_mut().zip(self.codes.as_flattened()).enumerate() {
            *out = value(self.scales[i / 16], self.mins[i / 16], code);
        }
    }
}

/// Takes a block of one of the types of 256 values apart.
#[inline(always)]
pub(crate) fn super_block(ty: WeightType, src: &[u8]) -> SuperBlock {
    let mut out = SuperBlock { d: 0, dmin: 0, scales: [0; 16], mins: [0; 16], codes: [[0; BLOCK]; 8] };
    match ty {
        WeightType::Q2K => {
            for (i, &byte) in src[..16].iter().enumerate() {
                (out.scales[i], out.mins[i]) = ((byte & 15) as i8, byte >> 4);
            }
            pairs(&src[16..80], &mut out.codes, |code, pair| *code = pair);
            (out.d, out.dmin) = (u16_at(src, 80), u16_at(src, 82));
        }
        WeightType::Q3K => {
            pairs(&src[32..96], &mut out.codes, |code, pair| *code = pair);
            high_plane(&src[..32], &mut out.codes, 2);
            let scales = &src[96..108];
            for (i, scale) in out.scales.iter_mut().enumerate() {
                let low = scales[i % 8] >> (4 * (i / 8)) & 15;
                let high = scales[8 + i % 4] >> (2 * (i / 4)) & 3;
                *scale = (low | high << 4) as i8 - 32;
            }
            out.d = u16_at(src, 108);
        }
        WeightType::Q4K => {
            (out.d, out.dmin) = (u16_at(src, 0), u16_at(src, 2));
            scales_and_mins(&src[4..16], &mut out);
            nibble_pairs(&src[16..144], &mut out.codes);
        }
        WeightType::Q5K => {
            (out.d, out.dmin) = (u16_at(src, 0), u16_at(src, 2));
            scales_and_mins(&src[4..16], &mut out);
            nibble_pairs(&src[48..176], &mut out.codes);
            high_plane(&src[16..48], &mut out.codes, 4);
        }
        WeightType::Q6K => {
            // Each half of 128 values: blocks 0 and 1 are the low nibbles of its 2 x 32 bytes, 2 and 3 the high ones.
            for (half, bytes) in src[..128].as_chunks::<64>().0.iter().enumerate() {
                for (codes, bytes) in out.codes[4 * half..].iter_mut().zip(bytes.as_chunks::<BLOCK>().0) {
                    *codes = bytes.map(|byte| byte & 15);
                }
                for (codes, bytes) in out.codes[4 * half + 2..].iter_mut().zip(bytes.as_chunks::<BLOCK>().0) {
                    *codes = bytes.map(|byte| byte >> 4);
                }
            }
            pairs(&src[128..192], &mut out.codes, |code, pair| *code |= pair << 4);
            for (scale, &byte) in out.scales.iter_mut().zip(&src[192..208]) {
                *scale = byte.cast_signed();
            }
            out.d = u16_at(src, 208);
        }
        WeightType::Iq4Xs => {
            out.d = u16_at(src, 0);
            let high = u16_at(src, 2);
            for (b, (codes, bytes)) in out.codes.iter_mut().zip(src[8..].as_chunks::<16>().0).enumerate() {
                let scale = (src[4 + b / 2] >> (4 * (b % 2)) & 15) | ((high >> (2 * b) & 3) as u8) << 4;
                out.scales[2 * b..][..2].fill(scale as i8 - 32);
                let (low, high) = codes.split_at_mut(16);
                low.copy_from_slice(&bytes.map(|byte| byte & 15));
                high.copy_from_slice(&bytes.map(|byte| byte >> 4));
            }
        }
        _ => unreachable!("{} has no blocks of 256 values", ty.name()),
    }
    out
}

/// Hands out 2-bit planes: 32 bytes for each 4 blocks.
#[inline(always)]
fn pairs(bytes: &[u8], codes: &mut [[u8; BLOCK]; 8], put: impl Fn(&mut u8, u8)) {
    for (b, codes) in codes.iter_mut().enumerate() {
        for (code, &byte) in codes.iter_mut().zip(&bytes.as_chunks::<BLOCK>().0[b / 4]) {
            put(code, byte >> (2 * (b % 4)) & 3);
        }
    }
}

/// Bit `b` of byte `i` becomes bit `bit` of value `i` of block `b`.
#[inline(always)]
fn high_plane(bytes: &[u8], codes: &mut [[u8; BLOCK]; 8], bit: u32) {
    for (b, codes) in codes.iter_mut().enumerate() {
        for (code, &byte) in codes.iter_mut().zip(bytes) {
            *code |= (byte >> b & 1) << bit;
        }
    }
}

/// Nibbles of Q4_K and Q5_K: 32 bytes for each pair of blocks.
#[inline(always)]
fn nibble_pairs(bytes: &[u8], codes: &mut [[u8; BLOCK]; 8]) {
    for ([low, high], bytes) in codes.as_chunks_mut::<2>().0.iter_mut().zip(bytes.as_chunks::<BLOCK>().0) {
        *low = bytes.map(|byte| byte & 15);
        *high = bytes.map(|byte| byte >> 4);
    }
}

/// Scales and mins of Q4_K and Q5_K, 6 bits each for 8 blocks: those of blocks 0 to 3 in bytes of their own, whose upper
/// bits are the upper bits of the others.
#[inline(always)]
fn scales_and_mins(bytes: &[u8], out: &mut SuperBlock) {
    for b in 0..8 {
        let (scale, min) = if b < 4 {
            (bytes[b] & 63, bytes[b + 4] & 63)
        } else {
            (bytes[b + 4] & 15 | bytes[b - 4] >> 6 << 4, bytes[b + 4] >> 4 | bytes[b] >> 6 << 4)
        };
        out.scales[2 * b..][..2].fill(scale as i8);
        out.mins[2 * b..][..2].fill(min);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads one block whose bytes are zero but for those given.
    fn read(ty: WeightType, bytes: &[(usize, u8)]) -> Vec<f32> {
        let (mut block, mut out) = (vec![0; ty.block_bytes()], vec![0.0; ty.block_len()]);
        for &(at, byte) in bytes {
            block[at] = byte;
        }
        dequantise_row(ty, &block, &mut out);
        out
    }

    // 1.0 as a half is 0x3c00, 0.5 is 0x3800.

    #[test]
    fn blocks_of_32_worked_out_by_hand() {
        let q5_0 = read(WeightType::Q5_0, &[(1, 0x3c), (2, 0b10), (5, 0x80), (6, 0x21), (7, 0x03), (21, 0x40)]);
        assert_eq!((q5_0[0], q5_0[16], q5_0[1], q5_0[31], q5_0[2]), (-15.0, -14.0, 3.0, 4.0, -16.0));
        let q5_1 = read(WeightType::Q5_1, &[(1, 0x3c), (3, 0x38), (4, 0b100), (10, 0x97)]);
        assert_eq!((q5_1[2], q5_1[18], q5_1[0]), (23.5, 9.5, 0.5));
        let iq4 = read(WeightType::Iq4Nl, &[(1, 0x38), (2, 0xf0), (17, 0x78)]);
        assert_eq!((iq4[0], iq4[16], iq4[15], iq4[31]), (-63.5, 56.5, 0.5, -5.0));
    }

    #[test]
    fn blocks_of_256_worked_out_by_hand() {
        // Values 16 to 32 have scale 2 and min 3; value 20 is bits 0 and 1 of byte 20.
        let q2 = read(WeightType::Q2K, &[(1, 0x32), (16 + 20, 0b11), (81, 0x3c), (83, 0x38)]);
        assert_eq!((q2[20], q2[16], q2[0]), (4.5, -1.5, 0.0));
        // Scale 9 of 16 (values 144 to 160, block 4): low bits in the high nibble of byte 1, high bits in byte 9.
        let q3 = read(
            WeightType::Q3K,
            &[(17, 0x10), (32 + 32 + 17, 0b10), (96 + 1, 0x30), (96 + 9, 0b11 << 4), (109, 0x3c)],
        );
        assert_eq!((q3[145], q3[144]), (19.0 * 2.0, 19.0 * -4.0));
        // Block 5: low 4 bits of scale and min in byte 9, high 2 bits on top of bytes 1 and 5.
        let q4 = read(
            WeightType::Q4K,
            &[(1, 0x3c), (3, 0x3c), (4 + 9, 0x21), (4 + 1, 0x40), (4 + 5, 0xc0), (16 + 64 + 7, 0xd0)],
        );
        assert_eq!((q4[167], q4[160]), (17.0 * 13.0 - 50.0, -50.0));
        // Block 2: scale 3 in byte 2, min 0; value 64 + 8 is the low nibble of byte 32 + 8, its bit 4 is bit 2 of byte 8.
        let q5 = read(WeightType::Q5K, &[(1, 0x3c), (4 + 2, 3), (16 + 8, 0b100), (48 + 32 + 8, 0x0f)]);
        assert_eq!((q5[72], q5[73]), (93.0, 0.0));
        // Block 6 (second half, third of four): high nibbles of bytes 64 to 96, bits 4 and 5 of bytes 32 to 64 of the pairs.
        let q6 = read(WeightType::Q6K, &[(64 + 1, 0x70), (128 + 32 + 1, 0x20), (192 + 12, 0xfe), (209, 0x3c)]);
        assert_eq!((q6[193], q6[192]), (-2.0 * (39.0 - 32.0), 64.0));
        // Block 3: scale 5 + 16 * 2 - 32 = 5.
        let iq4 = read(WeightType::Iq4Xs, &[(1, 0x3c), (2, 0b10 << 6), (4 + 1, 0x50), (8 + 48 + 2, 0x90)]);
        assert_eq!((iq4[96 + 2], iq4[96 + 18]), (5.0 * -127.0, 5.0 * 13.0));
    }
}
