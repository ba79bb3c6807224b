//! Rotation against complex numbers in f64, and the places that keys and values go to.

use super::{RopeStoreOp, RopeTable, StoreScratch, rope_store};
use crate::cpu::isa::Isa;
use crate::cpu::pool::Pool;
use crate::cpu::simd::tests::{noise, runnable};
use crate::kv::{BLOCK_SIZE, BlockId, KvLayout, KvType, SCALE_WORDS, SeqSpan};
use crate::memory::cast;
use crate::{Error, HeadShape, RopePairs};
use half::f16;

const SCALE: f64 = 1.1;
const QUERY_SCALE: f32 = 0.125;

struct World {
    shape: HeadShape,
    pairs: RopePairs,
    ty: KvType,
    inv_freq: Vec<f64>,
    norm: Option<(Vec<f32>, Vec<f32>)>,
    spans: Vec<SeqSpan>,
    table: Vec<BlockId>,
    qkv: Vec<f32>,
}

/// What a run leaves behind.
struct Outcome {
    qkv: Vec<f32>,
    kv: Vec<u16>,
}

impl World {
    fn new((heads, kv_heads, head_dim): (usize, usize, usize), rotary_dim: usize, pairs: RopePairs) -> Self {
        let shape = HeadShape { heads, kv_heads, head_dim };
        let span = |row0, rows, pos0, table0, table_len| SeqSpan { row0, rows, pos0, table0, table_len };
        // Rows 0..70 from position 0, one row at 45, rows across a block boundary.
        let spans = vec![span(0, 70, 0, 0, 3), span(70, 1, 45, 3, 2), span(71, 5, 30, 5, 2)];
        let table = [6, 2, 5, 0, 1, 7, 3].map(BlockId).to_vec();
        let inv_freq = (0..rotary_dim / 2).map(|i| 10_000_f64.powf(-2.0 * i as f64 / rotary_dim as f64)).collect();
        let qkv = (0..76 * shape.qkv_cols()).map(|i| noise(i as u64)).collect();
        Self { shape, pairs, ty: KvType::F16, inv_freq, norm: None, spans, table, qkv }
    }

    fn layout(&self) -> KvLayout {
        KvLayout { layers: 1, kv_heads: self.shape.kv_heads, head_dim: self.shape.head_dim, ty: self.ty }
    }

    fn try_run(&self, isa: Isa, threads: usize) -> Result<Outcome, Error> {
        let rope = RopeTable::new(&self.inv_freq, SCALE, 100)?;
        let mut outcome = Outcome { qkv: self.qkv.clone(), kv: vec![0; 8 * self.layout().block_words()] };
        let op = RopeStoreOp {
            shape: self.shape,
            rope: &rope,
            pairs: self.pairs,
            query_scale: QUERY_SCALE,
            qk_norm: self.norm.as_ref().map(|(q, k)| (&q[..], &k[..], 1e-6)),
            layout: self.layout(),
            layer: 0,
            spans: &self.spans,
            block_table: &self.table,
        };
        let mut pool = Pool::new(threads).unwrap();
        rope_store(&mut pool, isa, &mut StoreScratch::default(), &op, &mut outcome.qkv, &mut outcome.kv)?;
        Ok(outcome)
    }

    /// A head after norm and rotation, in f64.
    fn turned(&self, head: &[f32], weight: Option<&Vec<f32>>, position: usize) -> Vec<f64> {
        let mut x: Vec<f64> = head.iter().map(|&v| f64::from(v)).collect();
        if let Some(weight) = weight {
            let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
            let scale = 1.0 / (mean + 1e-6).sqrt();
            x.iter_mut().zip(weight).for_each(|(x, &w)| *x *= scale * f64::from(w));
        }
        let half = self.inv_freq.len();
        for (i, frequency) in self.inv_freq.iter().enumerate() {
            let (a, b) = match self.pairs {
                RopePairs::Interleaved => (2 * i, 2 * i + 1),
                RopePairs::Halves => (i, i + half),
            };
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            (x[a], x[b]) = ((x[a] * cos - x[b] * sin) * SCALE, (x[b] * cos + x[a] * sin) * SCALE);
        }
        x
    }

    fn check(&self, isa: Isa) {
        let outcome = self.try_run(isa, 2).unwrap();
        let HeadShape { heads, kv_heads, head_dim: d } = self.shape;
        let cols = self.shape.qkv_cols();
        let close =
            |got: f64, expected: f64, relative: f64| (got - expected).abs() <= relative * (expected.abs() + 1.0);
        for span in &self.spans {
            for i in 0..span.rows as usize {
                let (row, position) = (span.row0 as usize + i, span.pos0 as usize + i);
                let (before, after) = (&self.qkv[row * cols..][..cols], &outcome.qkv[row * cols..][..cols]);
                for head in 0..heads {
                    let source = &before[head * d..][..d];
                    let expected = self.turned(source, self.norm.as_ref().map(|n| &n.0), position);
                    for (got, expected) in after[head * d..][..d].iter().zip(expected) {
                        assert!(close(f64::from(*got), expected * f64::from(QUERY_SCALE), 2e-6), "{isa:?} row {row}");
                    }
                }
                let block = self.table[span.table0 as usize + position / BLOCK_SIZE].0 as usize;
                let slot = position % BLOCK_SIZE;
                for head in 0..kv_heads {
                    let words = self.layout().head_words();
                    let stored = &outcome.kv[(block * kv_heads + head) * words..][..words];
                    let source = &before[(heads + head) * d..][..d];
                    let expected = self.turned(source, self.norm.as_ref().map(|n| &n.1), position);
                    let values = &before[(heads + kv_heads + head) * d..][..d];
                    for dim in 0..d {
                        let what = format!("{isa:?} {row} {head} {dim}");
                        match self.ty {
                            KvType::F16 => {
                                let key_at = slot / 16 * d * 16 + dim * 16 + slot % 16;
                                let value_at = (BLOCK_SIZE + slot) * d + dim;
                                let key = f16::from_bits(stored[key_at]).to_f64();
                                assert!(close(key, expected[dim], 6e-4), "key {what}: {key}");
                                assert_eq!(stored[value_at], f16::from_f32(values[dim]).to_bits(), "value {what}");
                            }
                            KvType::Int8 => {
                                let key_at = slot / 16 * d * 16 + dim / 2 * 32 + slot % 16 * 2 + dim % 2;
                                let value_at = BLOCK_SIZE * d + slot / 2 * d * 2 + dim * 2 + slot % 2;
                                let (scales, elements) = stored.split_at(SCALE_WORDS);
                                let (scales, elements) = (cast::<f32>(scales), cast::<i8>(elements));
                                let read = |scale: usize, at: usize| f64::from(scales[scale]) * f64::from(elements[at]);
                                // Half a step of the quantisation, and a few rounding errors before it.
                                let step = |scale: usize| f64::from(scales[scale]) * 0.5 + 1e-5;
                                let (key, value) = (read(slot, key_at), read(BLOCK_SIZE + slot, value_at));
                                assert!((key - expected[dim]).abs() <= step(slot), "key {what}: {key}");
                                let error = (value - f64::from(values[dim])).abs();
                                assert!(error <= step(BLOCK_SIZE + slot), "value {what}: {value}");
                            }
                            KvType::Fp8 => unreachable!("not on a CPU"),
                        }
                    }
                    if self.ty == KvType::Int8 {
                        let largest = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
                        let scale = cast::<f32>(&stored[..SCALE_WORDS])[BLOCK_SIZE + slot];
                        assert!((scale * 127.0 - largest).abs() <= largest * 1e-6, "the largest element is 127");
                    }
                }
            }
        }
    }
}

#[test]
fn rows_turn_and_land_where_they_belong() {
    let shapes =
        [((9, 3, 64), 64), ((4, 4, 32), 20), ((2, 1, 16), 16), ((3, 1, 80), 48), ((4, 2, 128), 128), ((1, 1, 16), 0)];
    for isa in runnable() {
        for (shape, rotary_dim) in shapes {
            for pairs in [RopePairs::Interleaved, RopePairs::Halves] {
                let mut world = World::new(shape, rotary_dim, pairs);
                world.check(isa);
                let weight = |seed| (0..shape.2).map(|i| noise(seed + i as u64) * 0.1 + 1.0).collect();
                world.norm = Some((weight(10), weight(500)));
                world.check(isa);
                world.ty = KvType::Int8;
                world.check(isa);
            }
        }
    }
}

#[test]
fn nothing_else_is_written() {
    let world = World::new((2, 1, 16), 16, RopePairs::Halves);
    let kv = world.try_run(Isa::Scalar, 2).unwrap().kv;
    let block = world.layout().block_words();
    assert!(kv[4 * block..5 * block].iter().all(|&x| x == 0), "block 4 is in no table");
    assert!(kv[..block].iter().all(|&x| x == 0), "the first block of the second sequence was there before");
    let slots = 16 * 16 + 13; // first group, and position 45 % 32 = 13 of it is the only one of its block
    let written = kv[block..2 * block].iter().filter(|&&x| x != 0).count();
    assert!(written <= 32 && slots > written, "{written}");
}

#[test]
fn the_number_of_threads_changes_nothing() {
    for isa in runnable() {
        let world = World::new((9, 3, 64), 64, RopePairs::Halves);
        let (one, many) = (world.try_run(isa, 1).unwrap(), world.try_run(isa, 4).unwrap());
        assert!(one.qkv == many.qkv && one.kv == many.kv, "{isa:?}");
    }
}

#[test]
fn values_beyond_a_half_are_kept_finite() {
    let mut world = World::new((2, 1, 16), 16, RopePairs::Halves);
    world.qkv.iter_mut().for_each(|x| *x *= 1e6);
    for isa in runnable() {
        let kv = world.try_run(isa, 1).unwrap().kv;
        assert!(kv.iter().all(|&bits| f16::from_bits(bits).is_finite()), "{isa:?}");
        assert!(kv.contains(&f16::MAX.to_bits()) && kv.contains(&f16::MIN.to_bits()), "{isa:?}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |change: &dyn Fn(&mut World)| {
        let mut world = World::new((4, 2, 32), 32, RopePairs::Halves);
        change(&mut world);
        match world.try_run(Isa::Scalar, 1) {
            Err(error @ Error::Shape { op: "rope_store", .. }) => error.to_string(),
            Err(error) => panic!("another error: {error}"),
            Ok(_) => panic!("accepted"),
        }
    };
    assert!(refused(&|world| world.table[4] = BlockId(6)).contains("twice"));
    assert!(refused(&|world| world.inv_freq = vec![1.0; 17]).contains("rotary"));
    assert!(refused(&|world| world.norm = Some((vec![1.0; 32], vec![1.0; 31]))).contains("norm weights"));
    assert!(refused(&|world| world.spans[1].row0 = 69).contains("rows from 70"));
    assert!(refused(&|world| world.table.iter_mut().for_each(|block| block.0 += 1)).contains("block ids"));
    assert!(
        refused(&|world| {
            world.spans[1].pos0 = 100;
            world.spans[1].table0 = 0;
            world.spans[1].table_len = 7;
        })
        .contains("positions below 100")
    );
}

#[test]
fn angles_far_into_a_text_are_as_good_as_near_ones() {
    let inv_freq: Vec<f64> = (0..64).map(|i| 10_000_f64.powf(f64::from(i) / -64.0)).collect();
    let table = RopeTable::new(&inv_freq, SCALE, 70_001).unwrap();
    assert_eq!(table.positions(), 70_001);
    for position in [0, 1, 255, 256, 257, 511, 4096, 65_535, 70_000] {
        let (cosines, sines) = table.at(position);
        for ((cosine, sine), frequency) in cosines.iter().zip(sines).zip(&inv_freq) {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            let error = (f64::from(*cosine) - SCALE * cos).abs().max((f64::from(*sine) - SCALE * sin).abs());
            assert!(error < 1e-7, "position {position}, frequency {frequency}: off by {error}");
        }
    }
    assert_eq!(RopeTable::new(&inv_freq, SCALE, 0).unwrap().bytes(), 0);
}
