//! Keys and values of 8 bits: what their codes mean, how numbers are rounded to them, and where they lie.

use super::{backend, identity, read_act, set};
use crate::kv::{BLOCK_SIZE, BlockId, KvLayout, KvType, SeqSpan};
use crate::{Attention, Backend, HeadShape, RopePairs, RopeStore};

/// The number of a code, by the definition of E4M3.
fn number(code: u8) -> f64 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let size = if exponent == 0 { fraction * 2f64.powi(-9) } else { (8.0 + fraction) * 2f64.powi(exponent - 10) };
    if code < 128 { size } else { -size }
}

/// The code of the number nearest to `x`, the even one of two; the largest for what is larger.
fn nearest(x: f64) -> u8 {
    let distance = |code: &u8| ((number(*code) - x.abs()).abs(), code & 1);
    let code = (0..=0x7e).min_by(|a, b| distance(a).partial_cmp(&distance(b)).unwrap()).unwrap();
    if x.is_sign_negative() { code | 0x80 } else { code }
}

/// The byte of a head's exponent, and its codes.
pub(super) fn codes(head: &[f32]) -> (u8, Vec<u8>) {
    let largest = head.iter().fold(0f64, |largest, x| largest.max(f64::from(x.abs())));
    let exponent = (-126..=118).find(|&e| largest <= 448.0 * 2f64.powi(e)).unwrap_or(118);
    let code = |&x: &f32| nearest(f64::from(x) * 2f64.powi(-exponent));
    (u8::try_from(exponent + 127).unwrap(), head.iter().map(code).collect())
}

/// What is read of a head that was written.
pub(super) fn rounded(head: &[f32]) -> Vec<f32> {
    let (exponent, codes) = codes(head);
    codes.into_iter().map(|code| element(exponent, code) as f32).collect()
}

/// The number that a byte of exponent and a code stand for.
pub(super) fn element(exponent: u8, code: u8) -> f64 {
    if exponent == 0 { 0.0 } else { number(code) * 2f64.powi(i32::from(exponent) - 127) }
}

/// Where in its head's part of a block an element lies, and the exponent that it shares; `part` is 0 for keys, 1 for values.
pub(super) fn place(width: usize, part: usize, (slot, dim): (usize, usize)) -> (usize, usize) {
    let byte = |i: usize| [0, 2, 1, 3, 4, 6, 5, 7][i % 8];
    let tiles = match part {
        // Lane 4 g + t has eight dimensions of the key of column g in each of two score tiles.
        0 => {
            let (g, n) = (slot / 8 * 2 + slot % 2, slot % 8 / 2);
            ((dim / 32 * 2 + n / 2) * 32 + 4 * g + dim % 32 / 8) * 16 + n % 2 * 8 + byte(dim)
        }
        // And of two groups of eight dimensions the values of eight positions.
        _ => BLOCK_SIZE * width + (dim / 16 * 32 + 4 * (dim % 8) + slot / 8) * 16 + dim % 16 / 8 * 8 + byte(slot),
    };
    (tiles, 2 * BLOCK_SIZE * width + part * BLOCK_SIZE + slot)
}

const DIMS: usize = 256;
const SHAPE: HeadShape = HeadShape { heads: 1, kv_heads: 1, head_dim: DIMS };
const LAYOUT: KvLayout = KvLayout { layers: 1, kv_heads: 1, head_dim: DIMS, ty: KvType::Fp8 };

/// Stores rows as keys and as values; returns the exponents and codes of both.
fn stored(rows: &[Vec<f32>]) -> Vec<[(u8, Vec<u8>); 2]> {
    let mut backend = backend();
    let rope = backend.load_rope(&[], 1.0, rows.len()).unwrap();
    let blocks = rows.len().div_ceil(BLOCK_SIZE);
    let kv = backend.alloc_kv(LAYOUT, blocks).unwrap();
    let qkv = backend.alloc_buffer(rows.len(), 3 * DIMS).unwrap();
    set(&mut backend, qkv, rows.len(), |row, col| rows[row][col % DIMS]);
    let [count, table_len] = [rows.len(), blocks].map(|n| u32::try_from(n).unwrap());
    let spans = &[SeqSpan { row0: 0, rows: count, pos0: 0, table0: 0, table_len }][..];
    let block_table: &[_] = &(0..table_len).map(BlockId).collect::<Vec<_>>();
    let (shape, pairs, query_scale, qk_norm, layer) = (SHAPE, RopePairs::Halves, 1.0, None, 0);
    backend
        .rope_store(RopeStore { qkv, shape, rope, pairs, query_scale, qk_norm, kv, layer, spans, block_table })
        .unwrap();
    let (bytes, width) = backend.pool_bytes(kv);
    assert_eq!(bytes.len(), blocks * 2 * LAYOUT.head_words());
    let read = |row: usize, part: usize| {
        let block = &bytes[row / BLOCK_SIZE * 2 * LAYOUT.head_words()..];
        let at = |dim: usize| place(width, part, (row % BLOCK_SIZE, dim));
        (block[at(0).1], (0..DIMS).map(|dim| block[at(dim).0]).collect())
    };
    (0..rows.len()).map(|row| [read(row, 0), read(row, 1)]).collect()
}

/// Rows of 256 numbers, the first of which is the largest code, so that the exponent is that of 1.
fn padded(numbers: &[f32]) -> Vec<Vec<f32>> {
    let row = |numbers: &[f32]| {
        let mut row = vec![0.0; DIMS];
        row[0] = 448.0;
        row[1..=numbers.len()].copy_from_slice(numbers);
        row
    };
    numbers.chunks(DIMS - 1).map(row).collect()
}

#[test]
fn every_code_is_written_for_the_numbers_nearest_to_it() {
    let mut numbers = vec![0.0, 1e-30, f32::MIN_POSITIVE, 2f32.powi(-11)];
    for code in 0..0x7e {
        let (low, high) = (number(code) as f32, number(code + 1) as f32);
        let middle = f32::midpoint(low, high);
        numbers.extend([low, middle.next_down(), middle, middle.next_up(), high.next_down(), low.next_up()]);
    }
    numbers.extend(numbers.clone().iter().map(|x| -x));
    let rows = padded(&numbers);
    let mut seen = [false; 256];
    for (row, parts) in rows.iter().zip(stored(&rows)) {
        let (exponent, expected) = codes(row);
        assert_eq!(exponent, 127);
        for (exponent, got) in parts {
            assert_eq!(exponent, 127);
            for ((got, expected), x) in got.iter().zip(&expected).zip(row) {
                assert_eq!(got, expected, "{x}: {} instead of {}", number(*got), number(*expected));
                seen[usize::from(*got)] = true;
            }
        }
    }
    assert!(seen[..=0x7e].iter().chain(&seen[0x80..0xff]).all(|&seen| seen), "all numbers were written");
    assert!(!seen[0x7f] && !seen[0xff], "no NaN was");
}

#[test]
fn the_exponent_is_the_smallest_that_reaches_the_largest_number() {
    let mut rows = Vec::new();
    for power in [-126, -30, -1, 0, 1, 40, 118] {
        let most = 448.0 * 2f32.powi(power);
        for largest in [most, most.next_down(), most.next_up(), -most * 0.6] {
            rows.push((0..DIMS).map(|i| if i == 7 { largest } else { largest / (i as f32 + 1.5) }).collect());
        }
    }
    rows.push(vec![0.0; DIMS]);
    rows.push(vec![f32::from_bits(3); DIMS]);
    for (row, parts) in rows.iter().zip(stored(&rows)) {
        for got in parts {
            assert_eq!(got, codes(row), "{}", row[7]);
        }
    }
}

#[test]
fn what_is_no_number_or_too_large_becomes_the_largest() {
    let row = |rest: f32, odd: &[f32]| [odd, &[rest]].concat().into_iter().cycle().take(DIMS).collect::<Vec<_>>();
    let rows = [row(1.0, &[f32::NAN, -2.0]), row(1.0, &[f32::INFINITY, f32::NEG_INFINITY, f32::MAX])];
    let got = stored(&rows);
    for (exponent, codes) in &got[0] {
        // 2 is 256 x 2^-7.
        assert_eq!(*exponent, 120);
        assert_eq!((codes[0] & 0x7f, element(*exponent, codes[1]), element(*exponent, codes[2])), (0x7e, -2.0, 1.0));
    }
    for (exponent, codes) in &got[1] {
        assert_eq!((*exponent, &codes[..4]), (245, &[0x7e, 0xfe, 0x7e, 0][..]));
    }
}

/// Every row sees its own position alone, so that its result is the value there, through both kernels.
#[test]
fn every_code_is_read_as_its_number_with_every_exponent() {
    for (rows, exponent0) in [(31, 10), (31, 100), (64, 110), (64, 200)] {
        let mut backend = backend();
        let kv = backend.alloc_kv(LAYOUT, 2).unwrap();
        let exponent = |position: usize| u8::try_from(exponent0 + position % 46).unwrap();
        let code = |position: usize, dim: usize| u8::try_from((position * 37 + dim) % 256).unwrap();
        let mut bytes = vec![0; 4 * LAYOUT.head_words()];
        for (position, dim) in (0..rows).flat_map(|position| (0..DIMS).map(move |dim| (position, dim))) {
            let block = &mut bytes[position / BLOCK_SIZE * 2 * LAYOUT.head_words()..];
            let (at, shared) = place(DIMS, 1, (position % BLOCK_SIZE, dim));
            (block[at], block[shared]) = (code(position, dim), exponent(position));
        }
        backend.set_pool_bytes(kv, &bytes);
        let qkv = backend.alloc_buffer(rows, 3 * DIMS).unwrap();
        let consumer = identity(&mut backend, DIMS);
        let out = backend.alloc_act(rows, DIMS).unwrap();
        let count = u32::try_from(rows).unwrap();
        let spans = &[SeqSpan { row0: 0, rows: count, pos0: 0, table0: 0, table_len: 2 }][..];
        let block_table = &[BlockId(0), BlockId(1)][..];
        let (shape, softcap, window, layer) = (SHAPE, None, Some(1), 0);
        backend
            .attention(Attention { qkv, shape, softcap, window, kv, layer, spans, block_table, out, consumer })
            .unwrap();
        for (position, row) in read_act(&mut backend, out, rows, DIMS).iter().enumerate() {
            for (dim, &got) in row.iter().enumerate() {
                // The codes of NaN are never written, and read as if they were numbers.
                let expected = element(exponent(position), code(position, dim));
                assert_eq!(f64::from(got), expected, "code {:#x} at {position}, {dim}", code(position, dim));
            }
        }
    }
}
