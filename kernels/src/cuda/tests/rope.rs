//! Rotation against complex numbers in f64, and the places that keys and values go to.

use half::bf16;

use super::{backend, fp8, get, set};
use crate::cpu::tests::noise;
use crate::kv::{BLOCK_SIZE, BlockId, KvLayout, KvType, SeqSpan};
use crate::{Backend, Error, HeadShape, RopePairs, RopeStore};

const SCALE: f64 = 1.1;
const QUERY_SCALE: f32 = 0.125;
const ROWS: usize = 77;

struct World {
    shape: HeadShape,
    pairs: RopePairs,
    ty: KvType,
    inv_freq: Vec<f64>,
    norm: Option<(Vec<f32>, Vec<f32>)>,
    spans: Vec<SeqSpan>,
    table: Vec<BlockId>,
}

/// What a run leaves behind: queries, and the pool with the width of its heads.
struct Outcome {
    before: Vec<Vec<f32>>,
    qkv: Vec<Vec<f32>>,
    kv: Vec<u8>,
    width: usize,
}

impl World {
    fn new((heads, kv_heads, head_dim): (usize, usize, usize), rotary_dim: usize, pairs: RopePairs) -> Self {
        let span = |row0, rows, pos0, table0, table_len| SeqSpan { row0, rows, pos0, table0, table_len };
        // Rows 0..70 from position 0, one row at 45, none for row 71, rows across a block boundary.
        let spans = vec![span(0, 70, 0, 0, 3), span(70, 1, 45, 3, 2), span(72, 5, 30, 5, 2)];
        Self {
            shape: HeadShape { heads, kv_heads, head_dim },
            pairs,
            ty: KvType::F16,
            inv_freq: (0..rotary_dim / 2).map(|i| 10_000_f64.powf(-2.0 * i as f64 / rotary_dim as f64)).collect(),
            norm: None,
            spans,
            table: [6, 2, 5, 0, 1, 7, 3].map(BlockId).to_vec(),
        }
    }

    fn try_run(&self) -> Result<Outcome, Error> {
        let mut backend = backend();
        let rope = backend.load_rope(&self.inv_freq, SCALE, 100)?;
        let layout = KvLayout { layers: 3, kv_heads: self.shape.kv_heads, head_dim: self.shape.head_dim, ty: self.ty };
        let kv = backend.alloc_kv(layout, 8)?;
        let qkv = backend.alloc_buffer(ROWS, self.shape.qkv_cols())?;
        set(&mut backend, qkv, ROWS, |row, col| noise(row * 10_007 + col));
        let before = get(&mut backend, qkv, ROWS);
        let qk_norm = match &self.norm {
            Some((q, k)) => Some((backend.load_vector(q)?, backend.load_vector(k)?, 1e-6)),
            None => None,
        };
        backend.rope_store(RopeStore {
            qkv,
            shape: self.shape,
            rope,
            pairs: self.pairs,
            query_scale: QUERY_SCALE,
            qk_norm,
            kv,
            layer: 1,
            spans: &self.spans,
            block_table: &self.table,
        })?;
        let (kv, width) = backend.pool_bytes(kv);
        Ok(Outcome { before, qkv: get(&mut backend, qkv, ROWS), kv, width })
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

    fn check(&self) {
        let outcome = self.try_run().unwrap();
        let HeadShape { heads, kv_heads, head_dim: d } = self.shape;
        let close =
            |got: f64, expected: f64, relative: f64| (got - expected).abs() <= relative * (expected.abs() + 1.0);
        let layout = KvLayout { layers: 3, kv_heads, head_dim: outcome.width, ty: self.ty };
        let mut written = vec![false; outcome.kv.len()];
        for span in &self.spans {
            for i in 0..span.rows as usize {
                let (row, position) = (span.row0 as usize + i, span.pos0 as usize + i);
                let (before, after) = (&outcome.before[row], &outcome.qkv[row]);
                for head in 0..heads {
                    let expected = self.turned(&before[head * d..][..d], self.norm.as_ref().map(|n| &n.0), position);
                    for (got, expected) in after[head * d..][..d].iter().zip(expected) {
                        let expected = expected * f64::from(QUERY_SCALE);
                        assert!(close(f64::from(*got), expected, 2e-6), "row {row} head {head}: {got} {expected}");
                    }
                }
                let block = self.table[span.table0 as usize + position / BLOCK_SIZE].0 as usize;
                let slot = position % BLOCK_SIZE;
                for head in 0..kv_heads {
                    let start = ((block * 3 + 1) * kv_heads + head) * 2 * layout.head_words();
                    let values = &before[(heads + kv_heads + head) * d..][..d];
                    let expected =
                        self.turned(&before[(heads + head) * d..][..d], self.norm.as_ref().map(|n| &n.1), position);
                    if self.ty == KvType::Fp8 {
                        let parts = [0, 1].map(|part| {
                            let at = |dim| fp8::place(outcome.width, part, (slot, dim));
                            written[start + at(0).1] = true;
                            (0..d).for_each(|dim| written[start + at(dim).0] = true);
                            (outcome.kv[start + at(0).1], (0..d).map(|dim| outcome.kv[start + at(dim).0]).collect())
                        });
                        let [keys, stored]: [(u8, Vec<u8>); 2] = parts;
                        assert_eq!(stored, fp8::codes(values), "value {row} {head}");
                        let scale = 2f64.powi(i32::from(keys.0) - 127);
                        for (dim, (&code, expected)) in keys.1.iter().zip(expected).enumerate() {
                            let key = fp8::element(keys.0, code);
                            // Half a step of the code, which is below 2^-6 that of the smallest normal one.
                            let room = (expected.abs() / 16.0).max(scale / 1024.0) + 4e-6;
                            assert!((key - expected).abs() <= room, "key {row} {head} {dim}: {key} {expected}");
                        }
                        continue;
                    }
                    let at = |element: usize| start + 2 * element;
                    let read = |at: usize| u16::from_le_bytes([outcome.kv[at], outcome.kv[at + 1]]);
                    for dim in 0..d {
                        let places = [slot * outcome.width + dim, (outcome.width + dim) * BLOCK_SIZE + slot].map(at);
                        let key = f64::from(bf16::from_bits(read(places[0])).to_f32());
                        assert!(close(key, expected[dim], 4e-3), "key {row} {head} {dim}: {key} {}", expected[dim]);
                        assert_eq!(read(places[1]), bf16::from_f32(values[dim]).to_bits(), "value {row} {head} {dim}");
                        places.iter().for_each(|&at| written[at..at + 2].fill(true));
                    }
                }
            }
        }
        assert!(outcome.kv.iter().zip(written).all(|(&x, written)| written || x == 0), "something else was written");
        assert_eq!(outcome.qkv[71], outcome.before[71], "a row of no sequence");
    }
}

#[test]
fn rows_turn_and_land_where_they_belong() {
    let shapes = [
        ((9, 3, 64), 64),
        ((4, 4, 32), 20),
        ((2, 1, 16), 16),
        ((3, 1, 80), 48),
        ((4, 2, 128), 128),
        ((1, 1, 16), 0),
        ((2, 1, 256), 256),
    ];
    for (shape, rotary_dim) in shapes {
        for pairs in [RopePairs::Interleaved, RopePairs::Halves] {
            let mut world = World::new(shape, rotary_dim, pairs);
            let weight = |seed| (0..shape.2).map(|i| noise(seed + i) * 0.1 + 1.0).collect();
            for norm in [None, Some((weight(10), weight(500)))] {
                world.norm = norm;
                for ty in [KvType::F16, KvType::Fp8] {
                    world.ty = ty;
                    world.check();
                }
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |change: &dyn Fn(&mut World)| {
        let mut world = World::new((4, 2, 32), 32, RopePairs::Halves);
        change(&mut world);
        match world.try_run() {
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
}
