//! Attention against a plain f64 softmax, and the promise that a row's bits do not depend on its company.

use super::{AttentionOp, AttentionScratch, STRETCH, attention};
use crate::cpu::act::{Act, ActWriter, Form, Tile, tiles};
use crate::cpu::isa::Isa;
use crate::cpu::pool::Pool;
use crate::cpu::simd::tests::{noise, runnable};
use crate::cpu::simd::{Kernel, Simd, dispatch};
use crate::kv::{BLOCK_SIZE, BlockId, KvLayout, KvType, SCALE_WORDS, SeqSpan, blocks_for};
use crate::memory::{cast, cast_mut};
use crate::{Error, HeadShape};
use half::f16;

/// A pool with random content, and block tables that use its blocks in a scrambled order.
struct World {
    shape: HeadShape,
    softcap: Option<f32>,
    window: Option<usize>,
    spans: Vec<SeqSpan>,
    table: Vec<BlockId>,
    ty: KvType,
    kv: Vec<u16>,
    qkv: Vec<f32>,
}

impl World {
    /// Sequences as (first position, rows).
    fn new(shape: (usize, usize, usize), sequences: &[(usize, usize)]) -> Self {
        Self::of(KvType::F16, shape, sequences)
    }

    fn of(ty: KvType, (heads, kv_heads, head_dim): (usize, usize, usize), sequences: &[(usize, usize)]) -> Self {
        let shape = HeadShape { heads, kv_heads, head_dim };
        let (mut spans, mut blocks, mut row0) = (Vec::new(), 0, 0);
        for &(pos0, rows) in sequences {
            let table_len = blocks_for(pos0 + rows);
            let [row, count, pos, table0, len] = [row0, rows, pos0, blocks, table_len].map(|n| n as u32);
            spans.push(SeqSpan { row0: row, rows: count, pos0: pos, table0, table_len: len });
            (row0, blocks) = (row0 + rows, blocks + table_len);
        }
        // An odd stride walks through all blocks of a pool whose size is a power of two.
        let pool = blocks.next_power_of_two();
        let table = (0..blocks).map(|i| BlockId(((i * 5 + 3) % pool) as u32)).collect();
        let layout = KvLayout { layers: 1, kv_heads, head_dim, ty };
        let mut kv: Vec<u16> =
            (0..pool * layout.block_words()).map(|i| f16::from_f32(noise(i as u64) * 0.2).to_bits()).collect();
        if ty == KvType::Int8 {
            for (i, head) in kv.chunks_exact_mut(layout.head_words()).enumerate() {
                let (scales, elements) = head.split_at_mut(SCALE_WORDS);
                for (j, scale) in cast_mut::<f32>(scales).iter_mut().enumerate() {
                    *scale = (1.0 + noise((i * 64 + j) as u64).abs()) * 0.0015;
                }
                for (j, element) in cast_mut::<i8>(elements).iter_mut().enumerate() {
                    *element = (noise((i * 977 + j) as u64) * 60.0) as i8;
                }
            }
        }
        let scale = (head_dim as f32).powf(-0.5);
        let qkv = (0..row0 * shape.qkv_cols()).map(|i| noise(i as u64 + 1_000_000) * 0.3 * scale).collect();
        Self { shape, softcap: None, window: None, spans, table, ty, kv, qkv }
    }

    fn layout(&self) -> KvLayout {
        KvLayout { layers: 1, kv_heads: self.shape.kv_heads, head_dim: self.shape.head_dim, ty: self.ty }
    }

    fn op(&self) -> AttentionOp<'_> {
        AttentionOp {
            qkv: &self.qkv,
            shape: self.shape,
            softcap: self.softcap,
            window: self.window,
            kv: &self.kv,
            layout: self.layout(),
            layer: 0,
            spans: &self.spans,
            block_table: &self.table,
        }
    }

    fn out_cols(&self) -> usize {
        self.shape.heads * self.shape.head_dim
    }

    fn rows(&self) -> usize {
        self.qkv.len() / self.shape.qkv_cols()
    }

    fn run(&self, isa: Isa, threads: usize) -> Vec<f32> {
        let mut pool = Pool::new(threads).unwrap();
        let mut scratch = AttentionScratch::new(threads, self.shape.head_dim).unwrap();
        let mut act = Act::new(self.rows(), self.out_cols(), 8).unwrap();
        let writer = act.begin("test", self.rows(), FLOATS).unwrap();
        attention(&mut pool, isa, &mut scratch, &self.op(), &writer).unwrap();
        act.read("test", self.rows(), FLOATS).unwrap().floats(Tile { row: 0, len: self.rows() }).to_vec()
    }

    /// Every row by itself, as the one row of a call.
    fn run_alone(&self, isa: Isa) -> Vec<f32> {
        let mut pool = Pool::new(1).unwrap();
        let mut scratch = AttentionScratch::new(1, self.shape.head_dim).unwrap();
        let mut act = Act::new(self.rows(), self.out_cols(), 8).unwrap();
        let writer = act.begin("test", self.rows(), FLOATS).unwrap();
        for span in &self.spans {
            for i in 0..span.rows {
                let alone = [SeqSpan { row0: span.row0 + i, rows: 1, pos0: span.pos0 + i, ..*span }];
                attention(&mut pool, isa, &mut scratch, &AttentionOp { spans: &alone, ..self.op() }, &writer).unwrap();
            }
        }
        act.read("test", self.rows(), FLOATS).unwrap().floats(Tile { row: 0, len: self.rows() }).to_vec()
    }

    fn key(&self, block: BlockId, kv_head: usize, slot: usize, dim: usize) -> f64 {
        let d = self.shape.head_dim;
        let at = match self.ty {
            KvType::F16 => slot / 16 * d * 16 + dim * 16 + slot % 16,
            KvType::Int8 => slot / 16 * d * 16 + dim / 2 * 32 + slot % 16 * 2 + dim % 2,
            KvType::Fp8 => unreachable!("not on a CPU"),
        };
        self.element(block, kv_head, slot, at)
    }

    fn value(&self, block: BlockId, kv_head: usize, slot: usize, dim: usize) -> f64 {
        let d = self.shape.head_dim;
        let at = match self.ty {
            KvType::F16 => slot * d + dim,
            KvType::Int8 => slot / 2 * d * 2 + dim * 2 + slot % 2,
            KvType::Fp8 => unreachable!("not on a CPU"),
        };
        self.element(block, kv_head, BLOCK_SIZE + slot, d * BLOCK_SIZE + at)
    }

    /// Element `at` of a head's part of a block, times scale number `scale` where there are scales.
    fn element(&self, block: BlockId, kv_head: usize, scale: usize, at: usize) -> f64 {
        let words = self.layout().head_words();
        let head = &self.kv[(block.0 as usize * self.shape.kv_heads + kv_head) * words..][..words];
        match self.ty {
            KvType::F16 => f16::from_bits(head[at]).to_f64(),
            KvType::Int8 => {
                let (scales, elements) = head.split_at(SCALE_WORDS);
                f64::from(cast::<f32>(scales)[scale]) * f64::from(cast::<i8>(elements)[at])
            }
            KvType::Fp8 => unreachable!("not on a CPU"),
        }
    }

    /// The definition, in f64.
    fn reference(&self) -> Vec<f64> {
        let HeadShape { heads, kv_heads, head_dim } = self.shape;
        let mut out = Vec::new();
        for span in &self.spans {
            let table = &self.table[span.table0 as usize..][..span.table_len as usize];
            for i in 0..span.rows as usize {
                let end = span.pos0 as usize + i + 1;
                let start = self.window.map_or(0, |window| end.saturating_sub(window));
                let row = &self.qkv[(span.row0 as usize + i) * self.shape.qkv_cols()..];
                for head in 0..heads {
                    let kv_head = head / (heads / kv_heads);
                    let query = &row[head * head_dim..][..head_dim];
                    let mut scores: Vec<f64> = (start..end)
                        .map(|p| {
                            let (block, slot) = (table[p / BLOCK_SIZE], p % BLOCK_SIZE);
                            let products = query.iter().enumerate();
                            let score: f64 =
                                products.map(|(d, &q)| f64::from(q) * self.key(block, kv_head, slot, d)).sum();
                            self.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                        })
                        .collect();
                    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    scores.iter_mut().for_each(|score| *score = (*score - top).exp());
                    let sum: f64 = scores.iter().sum();
                    for d in 0..head_dim {
                        let weighed = (start..end).zip(&scores);
                        let value =
                            weighed.map(|(p, w)| w * self.value(table[p / BLOCK_SIZE], kv_head, p % BLOCK_SIZE, d));
                        out.push(value.sum::<f64>() / sum);
                    }
                }
            }
        }
        out
    }

    fn check(&self, what: &str) {
        let expected = self.reference();
        for isa in runnable() {
            let got = self.run(isa, 2);
            let error = got.iter().zip(&expected).map(|(&a, &b)| (f64::from(a) - b).abs()).fold(0.0, f64::max);
            let allowed = match self.ty {
                // Values lie within 2: a few rounding errors of that size.
                KvType::F16 => 4e-6,
                // Queries have 15 bits: half a step of 0.375 / 32,767 in each of 64 dimensions of keys of up to 2.1 moves a
                // score by up to 7.7e-4, and a result by no more when values lie within 2; wider heads add a little.
                KvType::Int8 => 1e-3,
                KvType::Fp8 => unreachable!("not on a CPU"),
            };
            assert!(error < allowed, "{what} {isa:?}: error {error:e}");
        }
    }
}

const FLOATS: Form = Form { int8: false, float: true };

/// Heads, kv heads and dimensions: grouped, single, many queries to one key, odd widths.
const SHAPES: [(usize, usize, usize); 10] = [
    (9, 3, 64),
    (4, 4, 16),
    (7, 1, 32),
    (8, 2, 80),
    (32, 1, 48),
    (10, 2, 128),
    (2, 1, 256),
    (12, 1, 16),
    (3, 3, 80),
    (6, 3, 112),
];

#[test]
fn all_shapes_agree_with_the_definition() {
    for shape in SHAPES {
        for ty in [KvType::F16, KvType::Int8] {
            World::of(ty, shape, &[(0, 5), (30, 1), (63, 3), (100, 33), (511, 3)]).check(&format!("{shape:?} {ty:?}"));
        }
    }
}

#[test]
fn every_short_length_agrees_with_the_definition() {
    let sequences: Vec<_> = (0..70).map(|pos0| (pos0, 1 + pos0 % 3)).collect();
    World::new((3, 1, 32), &sequences).check("short");
    World::new((6, 2, 16), &[(0, 130)]).check("prefill");
}

#[test]
fn softcap_and_window_agree_with_the_definition() {
    for window in [1, 2, 15, 16, 17, 64, 100, 600] {
        let mut world = World::new((4, 2, 32), &[(0, 90), (120, 40), (1030, 9), (700, 1)]);
        world.window = Some(window);
        world.check(&format!("window {window}"));
        world.softcap = Some(1.5);
        world.check(&format!("softcap and window {window}"));
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let mut world = World::new((3, 3, 64), &[(0, 40), (600, 2)]);
    world.qkv.iter_mut().for_each(|q| *q *= 500.0);
    let (expected, sets) = (world.reference(), runnable());
    for isa in sets {
        for (got, expected) in world.run(isa, 1).iter().zip(&expected) {
            // Scores of some hundreds carry rounding errors of 1e-4, which the softmax passes on.
            assert!((f64::from(*got) - expected).abs() < 2e-3, "{isa:?}: {got} instead of {expected}");
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_in_a_batch_and_with_any_number_of_threads() {
    let long = STRETCH * 3 + 40;
    for shape in SHAPES {
        for (window, ty) in [(None, KvType::F16), (Some(700), KvType::F16), (None, KvType::Int8)] {
            let sequences = [(0, 70), (long, 1), (STRETCH - 7, 20), (3, 1), (2 * STRETCH - 1, 2)];
            let mut world = World::of(ty, shape, &sequences);
            world.window = window;
            for isa in runnable() {
                let alone = world.run_alone(isa);
                for threads in [1, 2, 3, 8] {
                    let together = world.run(isa, threads);
                    let same = alone.iter().zip(&together).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{shape:?} {ty:?} {isa:?} {threads} threads, window {window:?}");
                }
            }
        }
    }
}

#[test]
fn quantised_results_are_those_of_the_floats() {
    // Heads of whole blocks go to the activation at once, others through a buffer: 16 and 80 are half a block over.
    for shape in [(9, 3, 64), (4, 4, 16), (2, 2, 80), (6, 3, 48)] {
        let world = World::new(shape, &[(0, 13), (1500, 1), (40, 2)]);
        for isa in runnable() {
            let floats = world.run(isa, 1);
            let form = Form { int8: true, float: true };
            let (rows, cols) = (world.rows(), world.out_cols());
            let mut acts = [(); 2].map(|()| Act::new(rows, cols, 8).unwrap());
            let [expected, got] = &mut acts;
            let writer = expected.begin("test", rows, form).unwrap();
            dispatch(isa, Quantise { floats: &floats, cols, writer });
            let writer = got.begin("test", rows, form).unwrap();
            let mut scratch = AttentionScratch::new(2, shape.2).unwrap();
            attention(&mut Pool::new(2).unwrap(), isa, &mut scratch, &world.op(), &writer).unwrap();
            let [expected, got] = acts.each_ref().map(|act| act.read("test", rows, form).unwrap());
            for tile in tiles(0, rows, 8) {
                assert_eq!(got.tile(tile), expected.tile(tile), "{shape:?} {isa:?} {tile:?}");
                assert_eq!(got.floats(tile), expected.floats(tile), "{shape:?} {isa:?} {tile:?}");
            }
        }
    }
}

struct Quantise<'a> {
    floats: &'a [f32],
    cols: usize,
    writer: ActWriter<'a>,
}

impl Kernel for Quantise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (row, values) in self.floats.chunks_exact(self.cols).enumerate() {
            // SAFETY: only this thread writes.
            unsafe { self.writer.write(s, row, 0, values) };
        }
    }
}

#[test]
fn what_lies_behind_the_end_of_a_sequence_is_not_read() {
    let mut world = World::new((6, 2, 32), &[(37, 1)]);
    let clean = world.run(Isa::Scalar, 1);
    let infinity = f16::INFINITY.to_bits();
    let (last, d) = (world.table[1].0 as usize, 32);
    let block = &mut world.kv[last * 2 * 2 * d * BLOCK_SIZE..][..2 * 2 * d * BLOCK_SIZE];
    for head in block.chunks_exact_mut(2 * d * BLOCK_SIZE) {
        let (keys, values) = head.split_at_mut(d * BLOCK_SIZE);
        values[6 * d..].fill(infinity);
        for (i, key) in keys.iter_mut().enumerate() {
            if i / (16 * d) * 16 + i % 16 >= 6 {
                *key = infinity;
            }
        }
    }
    let reference = world.run(Isa::Scalar, 1);
    assert_eq!(clean, reference);
    for isa in runnable() {
        assert!(world.run(isa, 1).iter().all(|x| x.is_finite()), "{isa:?}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |change: &dyn Fn(&mut World)| {
        let mut world = World::new((4, 2, 32), &[(0, 3), (40, 2)]);
        change(&mut world);
        let mut pool = Pool::new(1).unwrap();
        let mut scratch = AttentionScratch::new(1, 32).unwrap();
        let mut act = Act::new(5, 4 * 32, 8).unwrap();
        let writer = act.begin("test", 5, FLOATS).unwrap();
        let error = attention(&mut pool, Isa::Scalar, &mut scratch, &world.op(), &writer).unwrap_err();
        assert!(matches!(error, Error::Shape { op: "attention", .. }), "{error}");
        error.to_string()
    };
    assert!(refused(&|world| world.shape.head_dim = 24).contains("multiple of 16"));
    assert!(refused(&|world| world.shape.head_dim = 16).contains("heads of 32"));
    assert!(refused(&|world| world.shape.kv_heads = 3).contains("multiple of the key/value heads"));
    assert!(refused(&|world| world.shape.heads = 2).contains("output of 64 columns"));
    assert!(refused(&|world| world.spans[1].row0 = 2).contains("rows from 3"));
    assert!(refused(&|world| world.spans[1].rows = 0).contains("rows from 3"));
    assert!(refused(&|world| world.spans[1].rows = 3).contains("up to 5"));
    assert!(refused(&|world| world.spans[1].table_len = 1).contains("a block for each"));
    assert!(refused(&|world| world.spans[1].table0 = 7).contains("table within"));
    assert!(refused(&|world| world.table[0] = BlockId(77)).contains("block ids below 4"));
    assert!(refused(&|world| world.window = Some(0)).contains("window"));
    assert!(refused(&|world| world.softcap = Some(0.0)).contains("softcap"));
}
