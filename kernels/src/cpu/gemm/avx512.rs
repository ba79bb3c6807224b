//! Integer dot products with AVX-512 VNNI: four products of unsigned by signed bytes are added into each 32-bit lane.
//!
//! One 64-byte word of a packed panel is one register, so 16 weight rows by up to 8 activation rows take 8 words, 8 sums
//! and 8 f32 accumulators of the 32 registers; activations come as 4-byte broadcasts from memory, which the dot product
//! takes as an operand. Where a row has a scale for each 16 columns, the sums of both are kept apart until they are scaled.
//! What a type's zero asks for is one more dot product, of 16-bit pairs with the sums of both 16 columns.
//!
//! Codes are unpacked in registers for every tile: next to the 64 dot products of a full tile and block, its dozen
//! instructions do not pay for a pass through memory as they do with AVX2.

use std::arch::x86_64::{
    __m128i, __m256i, __m512, __m512i, _mm_loadu_si128, _mm256_loadu_si256, _mm512_add_epi32, _mm512_and_si512,
    _mm512_broadcast_i32x4, _mm512_cvtepi8_epi16, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtepu8_epi16,
    _mm512_cvtepu8_epi32, _mm512_cvtph_ps, _mm512_dpbusd_epi32, _mm512_dpwssd_epi32, _mm512_fmadd_ps,
    _mm512_loadu_si512, _mm512_mul_ps, _mm512_mullo_epi16, _mm512_mullo_epi32, _mm512_or_si512, _mm512_set1_epi8,
    _mm512_set1_epi16, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_shuffle_epi8,
    _mm512_slli_epi16, _mm512_slli_epi32, _mm512_srai_epi32, _mm512_srli_epi16, _mm512_srli_epi32, _mm512_storeu_ps,
    _mm512_sub_ps,
};

use super::{Group, IntDot, Lanes, PREFETCH, TileActs, exact, prefetch};
use crate::cpu::simd::Avx512;
use crate::format::ggml::BLOCK;
use crate::format::pack::{Codes, IQ4_CODES, PANEL, Packed, Scales, Word, Zero, ZeroKind};

impl IntDot for Avx512 {
    const TILE_ROWS: usize = 8;

    #[inline(always)]
    fn panel<B: Packed>(self, panel: &[B], rows: Group<'_>, _: &mut [u8], out: &mut [Lanes]) {
        // SAFETY: `self` came from `detect`, which saw every one of these features.
        unsafe { any_rows(panel, rows, out) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn any_rows<B: Packed>(panel: &[B], rows: Group<'_>, out: &mut [Lanes]) {
    // Few rows use a panel up as fast as it comes; with more, the next panel arrives while this one is multiplied with the
    // first tile.
    let mut ahead = Some(if rows.len() < Avx512::TILE_ROWS { PREFETCH } else { size_of_val(panel) });
    for tile in rows.tiles() {
        let out = &mut out[tile.row - rows.first..][..tile.len];
        let ahead = ahead.take();
        match tile.len {
            8 => tile_of::<B, 8>(panel, ahead, rows.acts(tile), exact(out)),
            4 => tile_of::<B, 4>(panel, ahead, rows.acts(tile), exact(out)),
            2 => tile_of::<B, 2>(panel, ahead, rows.acts(tile), exact(out)),
            _ => tile_of::<B, 1>(panel, ahead, rows.acts(tile), exact(out)),
        }
    }
}

/// Multiplies a panel with one tile; asks meanwhile for what lies so many bytes `ahead`.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn tile_of<B: Packed, const N: usize>(panel: &[B], ahead: Option<usize>, acts: TileActs<'_, N>, out: &mut [Lanes; N]) {
    let mut acc = [_mm512_setzero_ps(); N];
    for (unit, acts) in panel.iter().zip(acts.split(B::BLOCKS)) {
        for b in 0..B::BLOCKS {
            if let Some(ahead) = ahead {
                prefetch(unit, b, ahead);
            }
            let (x, [d_x, s_x], x_sums) = (&acts.quants[b], acts.scales[b], &acts.sums[b]);
            let w = words(unit.codes(b));
            let factors = factors(unit, b);
            let mut low = [_mm512_setzero_si512(); N];
            // Two chains for each row where their sums are wanted apart, or where one would wait for its own result.
            let mut high = [_mm512_setzero_si512(); N];
            let two = B::SHAPE.scales == 2 || N <= 2;
            for (j, w) in w.into_iter().enumerate() {
                for n in 0..N {
                    let chain = if two && j >= 4 { &mut high[n] } else { &mut low[n] };
                    *chain = _mm512_dpbusd_epi32(*chain, w, broadcast(&x[n], j));
                }
            }
            for n in 0..N {
                let sum = scaled::<B>(low[n], high[n], &factors, x_sums[n]);
                let scale = _mm512_mul_ps(factors.d, _mm512_set1_ps(d_x[n]));
                acc[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc[n]);
                acc[n] = match B::SHAPE.zero {
                    ZeroKind::Float => _mm512_fmadd_ps(factors.offset, _mm512_set1_ps(s_x[n]), acc[n]),
                    ZeroKind::Codes => acc[n],
                    ZeroKind::Mins => {
                        let mins = _mm512_dpwssd_epi32(_mm512_setzero_si512(), factors.pairs, both_sums(x_sums[n]));
                        let scale = _mm512_mul_ps(factors.offset, _mm512_set1_ps(d_x[n]));
                        _mm512_fmadd_ps(_mm512_cvtepi32_ps(mins), scale, acc[n])
                    }
                };
            }
        }
    }
    for (acc, out) in acc.into_iter().zip(out) {
        // SAFETY: `Lanes` holds 16 floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), acc) };
    }
}

/// What the codes of a block are multiplied with.
struct Factors {
    d: __m512,
    /// Times the scaled sum of the activations, or times `d_x` for [`ZeroKind::Mins`].
    offset: __m512,
    /// Of the first and the last 16 columns.
    scales: [__m512i; 2],
    /// 16-bit pairs for the sums of both 16 columns, for all but [`ZeroKind::Float`].
    pairs: __m512i,
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx2,f16c")]
fn factors<B: Packed>(unit: &B, b: usize) -> Factors {
    let d = load_halves(unit.d());
    let none = _mm512_setzero_si512();
    let (scales, mut pairs) = match unit.scales(b) {
        Scales::One => ([none; 2], none),
        Scales::Each(scales) => {
            let scales = _mm512_cvtepi8_epi32(load_16(&scales.map(i8::cast_unsigned)));
            let low = _mm512_and_si512(scales, _mm512_set1_epi32(0xffff));
            ([scales; 2], _mm512_or_si512(low, _mm512_slli_epi32::<16>(scales)))
        }
        Scales::Halves(scales) => {
            let pairs = _mm512_cvtepi8_epi16(load_pairs(&scales.map(|pair| pair.map(i8::cast_unsigned))));
            let first = _mm512_srai_epi32::<16>(_mm512_slli_epi32::<16>(pairs));
            ([first, _mm512_srai_epi32::<16>(pairs)], pairs)
        }
        Scales::LowNibbles(packed) => {
            let bytes = _mm512_cvtepu8_epi16(load_pairs(packed));
            let nibble = _mm512_set1_epi32(15);
            let scales = [bytes, _mm512_srli_epi32::<16>(bytes)].map(|part| _mm512_and_si512(part, nibble));
            (scales, _mm512_srli_epi16::<4>(bytes))
        }
    };
    let negative = |halves: &[u16; PANEL]| _mm512_sub_ps(_mm512_setzero_ps(), load_halves(halves));
    let offset = match unit.zero(b) {
        Zero::Code(z) if B::SHAPE.scales == 0 => _mm512_mul_ps(d, _mm512_set1_ps(-f32::from(z))),
        Zero::Code(z) => {
            pairs = _mm512_mullo_epi16(pairs, _mm512_set1_epi16(-i16::from(z)));
            _mm512_setzero_ps()
        }
        Zero::Add(m) => load_halves(m),
        Zero::Mins(dmin, mins) => {
            _mm512_mul_ps(negative(dmin), _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_16(mins))))
        }
        Zero::HighNibbles(dmin, _) => negative(dmin),
    };
    Factors { d, offset, scales, pairs }
}

/// The integer sum of a block from its two chains: scaled, and with zero where the type has it.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn scaled<B: Packed>(low: __m512i, high: __m512i, factors: &Factors, x_sums: [i16; 2]) -> __m512i {
    let sum = match B::SHAPE.scales {
        0 => _mm512_add_epi32(low, high),
        1 => _mm512_mullo_epi32(_mm512_add_epi32(low, high), factors.scales[0]),
        _ => {
            let [low, high] = [(low, 0), (high, 1)].map(|(sum, half)| _mm512_mullo_epi32(sum, factors.scales[half]));
            _mm512_add_epi32(low, high)
        }
    };
    match B::SHAPE.zero {
        ZeroKind::Codes => _mm512_dpwssd_epi32(sum, factors.pairs, both_sums(x_sums)),
        ZeroKind::Float | ZeroKind::Mins => sum,
    }
}

/// Both sums of an activation block in every lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn both_sums([low, high]: [i16; 2]) -> __m512i {
    _mm512_set1_epi32(i32::from(low) & 0xffff | i32::from(high) << 16)
}

/// The block's codes as bytes: word `j` holds columns `4j..4j + 4`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn words(codes: Codes<'_>) -> [__m512i; 8] {
    let mut out = [_mm512_setzero_si512(); 8];
    match codes {
        Codes::Two(low) => add_pairs(&mut out, low, 0),
        Codes::Three(low, high) => {
            add_pairs(&mut out, low, 0);
            add_bits(&mut out, high, 2);
        }
        Codes::Four(low) => add_nibbles(&mut out, low),
        Codes::Five(low, high) => {
            add_nibbles(&mut out, low);
            add_bits(&mut out, high, 4);
        }
        Codes::Six(low, high) => {
            add_nibbles(&mut out, low);
            add_pairs(&mut out, high, 4);
        }
        Codes::Eight(words) => {
            for (out, word) in out.iter_mut().zip(words) {
                *out = load_word(word);
            }
        }
        Codes::Table(low) => {
            add_nibbles(&mut out, low);
            let table = _mm512_broadcast_i32x4(load_16(&IQ4_CODES));
            for word in &mut out {
                *word = _mm512_shuffle_epi8(table, *word);
            }
        }
    }
    out
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn add_nibbles(out: &mut [__m512i; 8], words: &[Word; 4]) {
    let mask = _mm512_set1_epi8(0x0f);
    for (j, word) in words.iter().enumerate() {
        let word = load_word(word);
        out[j] = _mm512_and_si512(word, mask);
        out[j + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(word), mask);
    }
}

/// Pairs of bits, to bit 0 or 4.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn add_pairs(out: &mut [__m512i; 8], words: &[Word; 2], to: usize) {
    for (words, packed) in out.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        let packed = load_word(packed);
        let (mask, shifted) = if to == 0 {
            let shifted =
                [_mm512_srli_epi16::<2>(packed), _mm512_srli_epi16::<4>(packed), _mm512_srli_epi16::<6>(packed)];
            (0x03, [packed, shifted[0], shifted[1], shifted[2]])
        } else {
            let shifted =
                [_mm512_slli_epi16::<4>(packed), _mm512_slli_epi16::<2>(packed), _mm512_srli_epi16::<2>(packed)];
            (0x30, [shifted[0], shifted[1], packed, shifted[2]])
        };
        for (word, pairs) in words.iter_mut().zip(shifted) {
            *word = _mm512_or_si512(*word, _mm512_and_si512(pairs, _mm512_set1_epi8(mask)));
        }
    }
}

/// Single bits, to bit 2 or 4.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn add_bits(out: &mut [__m512i; 8], packed: &Word, to: usize) {
    // From bit `j` of each byte: what crosses from one byte to the next, the mask takes away.
    let packed = load_word(packed);
    let shifted = if to == 2 {
        let up =
            [_mm512_slli_epi16::<2>(packed), _mm512_slli_epi16::<1>(packed), packed, _mm512_srli_epi16::<1>(packed)];
        let down = [
            _mm512_srli_epi16::<2>(packed),
            _mm512_srli_epi16::<3>(packed),
            _mm512_srli_epi16::<4>(packed),
            _mm512_srli_epi16::<5>(packed),
        ];
        [up, down]
    } else {
        let up = [
            _mm512_slli_epi16::<4>(packed),
            _mm512_slli_epi16::<3>(packed),
            _mm512_slli_epi16::<2>(packed),
            _mm512_slli_epi16::<1>(packed),
        ];
        let down =
            [packed, _mm512_srli_epi16::<1>(packed), _mm512_srli_epi16::<2>(packed), _mm512_srli_epi16::<3>(packed)];
        [up, down]
    };
    let mask = _mm512_set1_epi8(1 << to);
    for (word, bits) in out.iter_mut().zip(shifted.into_iter().flatten()) {
        *word = _mm512_or_si512(*word, _mm512_and_si512(bits, mask));
    }
}

/// Columns `4j..4j + 4` of an activation block in every lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn broadcast(x: &[i8; BLOCK], j: usize) -> __m512i {
    let group = x.as_chunks::<4>().0[j];
    _mm512_set1_epi32(i32::from_ne_bytes(group.map(i8::cast_unsigned)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_word(word: &Word) -> __m512i {
    // SAFETY: the array holds 64 bytes; the load needs no alignment.
    unsafe { _mm512_loadu_si512(word.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx2")]
fn load_halves(halves: &[u16; PANEL]) -> __m512 {
    // SAFETY: the array holds 32 bytes; the load needs no alignment.
    let halves = unsafe { _mm256_loadu_si256(halves.as_ptr().cast()) };
    _mm512_cvtph_ps(halves)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_16(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the array holds 16 bytes; the load needs no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

/// Pairs of bytes of 16 rows.
#[inline]
#[target_feature(enable = "avx512f,avx2")]
fn load_pairs(pairs: &[[u8; 2]; PANEL]) -> __m256i {
    // SAFETY: the array holds 32 bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(pairs.as_ptr().cast()) }
}
