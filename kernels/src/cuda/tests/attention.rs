//! Attention against a plain f64 softmax over what was stored, and the promise on a row's bits.

use super::{backend, bits, fp8, identity, read_act, round, set};
use crate::cpu::tests::noise;
use crate::cuda::CudaBackend;
use crate::kv::{BLOCK_SIZE, BlockId, KvLayout, KvType, SeqSpan, blocks_for};
use crate::{ActId, Attention, Backend, BufferId, Error, HeadShape, KvId, LinearId, RopePairs, RopeStore};

/// Sequences whose keys and values are in the pool, in blocks in a scrambled order.
struct World {
    backend: CudaBackend,
    shape: HeadShape,
    ty: KvType,
    softcap: Option<f32>,
    window: Option<usize>,
    spans: Vec<SeqSpan>,
    table: Vec<BlockId>,
    qkv: BufferId,
    kv: KvId,
    act: ActId,
    consumer: LinearId,
}

/// The stored number of a head: query, key or value.
fn stored(sequence: usize, position: usize, col: usize) -> f32 {
    noise(sequence * 1_000_003 + position * 997 + col)
}

impl World {
    /// Sequences as (first position, rows).
    fn new(ty: KvType, (heads, kv_heads, head_dim): (usize, usize, usize), sequences: &[(usize, usize)]) -> Self {
        let mut backend = backend();
        let shape = HeadShape { heads, kv_heads, head_dim };
        let (mut spans, mut blocks, mut row0) = (Vec::new(), 0, 0);
        for &(pos0, rows) in sequences {
            let table_len = blocks_for(pos0 + rows);
            let [row, count, pos, table0, len] = [row0, rows, pos0, blocks, table_len].map(|n| n as u32);
            spans.push(SeqSpan { row0: row, rows: count, pos0: pos, table0, table_len: len });
            (row0, blocks) = (row0 + rows, blocks + table_len);
        }
        // An odd stride walks through all blocks of a pool whose size is a power of two.
        let size = blocks.next_power_of_two();
        let table: Vec<_> = (0..blocks).map(|i| BlockId(((i * 5 + 3) % size) as u32)).collect();
        let kv = backend.alloc_kv(KvLayout { layers: 2, kv_heads, head_dim, ty }, size).unwrap();
        let rope = backend.load_rope(&[], 1.0, 4096).unwrap();
        for (i, span) in spans.iter().enumerate() {
            let rows = (span.pos0 + span.rows) as usize;
            let all = backend.alloc_buffer(rows, shape.qkv_cols()).unwrap();
            set(&mut backend, all, rows, |row, col| stored(i, row, col));
            let whole = [SeqSpan { row0: 0, rows: rows as u32, pos0: 0, ..*span }];
            let (pairs, query_scale, qk_norm) = (RopePairs::Halves, 1.0, None);
            let (spans, block_table) = (&whole[..], &table[..]);
            let store =
                RopeStore { qkv: all, shape, rope, pairs, query_scale, qk_norm, kv, layer: 1, spans, block_table };
            backend.rope_store(store).unwrap();
        }
        let qkv = backend.alloc_buffer(row0, shape.qkv_cols()).unwrap();
        let consumer = identity(&mut backend, heads * head_dim);
        let act = backend.alloc_act(row0, heads * head_dim).unwrap();
        let mut world = Self { backend, shape, ty, softcap: None, window: None, spans, table, qkv, kv, act, consumer };
        world.set_queries(3.0);
        world
    }

    fn set_queries(&mut self, scale: f32) {
        let spans = self.spans.clone();
        let scale = scale * (self.shape.head_dim as f32).powf(-0.5);
        let rows = self.rows();
        set(&mut self.backend, self.qkv, rows, |row, col| {
            let at = spans.iter().rposition(|span| span.row0 as usize <= row).unwrap();
            scale * stored(at, spans[at].pos0 as usize + row - spans[at].row0 as usize, col)
        });
    }

    fn rows(&self) -> usize {
        self.spans.last().map_or(0, |span| (span.row0 + span.rows) as usize)
    }

    fn try_run(&mut self, spans: &[SeqSpan]) -> Result<Vec<Vec<f32>>, Error> {
        self.backend.attention(Attention {
            qkv: self.qkv,
            shape: self.shape,
            softcap: self.softcap,
            window: self.window,
            kv: self.kv,
            layer: 1,
            spans,
            block_table: &self.table,
            out: self.act,
            consumer: self.consumer,
        })?;
        let rows = spans.last().map_or(0, |span| (span.row0 + span.rows) as usize);
        Ok(read_act(&mut self.backend, self.act, rows, self.shape.heads * self.shape.head_dim))
    }

    fn run(&mut self) -> Vec<Vec<f32>> {
        let spans = self.spans.clone();
        self.try_run(&spans).unwrap()
    }

    /// A head as it is read back: `len` numbers from `col` on.
    fn rounded(&self, sequence: usize, position: usize, col: usize) -> Vec<f32> {
        let head: Vec<_> = (col..col + self.shape.head_dim).map(|col| stored(sequence, position, col)).collect();
        match self.ty {
            KvType::Fp8 => fp8::rounded(&head),
            _ => head.into_iter().map(round).collect(),
        }
    }

    /// The definition, in f64, of some rows of each sequence, over keys and values as they are stored. Weights and result are
    /// rounded to bf16; values lie within 1.
    fn check(&mut self, what: &str) {
        self.check_over(what, 2e-3, &Self::rounded);
    }

    /// The same within `room` of what `head` says that keys and values are.
    fn check_over(&mut self, what: &str, room: f64, head: &dyn Fn(&Self, usize, usize, usize) -> Vec<f32>) {
        let HeadShape { heads, kv_heads, head_dim } = self.shape;
        let rows = self.rows();
        let queries = super::get(&mut self.backend, self.qkv, rows);
        let got = self.run();
        for (sequence, span) in self.spans.iter().enumerate() {
            // Of each kv head, the keys or values of all positions.
            let all = |first: usize| -> Vec<Vec<Vec<f32>>> {
                let of = |kv_head: usize| {
                    let position = |p: u32| head(self, sequence, p as usize, (first + kv_head) * head_dim);
                    (0..span.pos0 + span.rows).map(position).collect()
                };
                (0..kv_heads).map(of).collect()
            };
            let (keys, values) = (all(heads), all(heads + kv_heads));
            for i in (0..span.rows as usize).filter(|i| i % 3 == 0 || *i + 1 == span.rows as usize) {
                let end = span.pos0 as usize + i + 1;
                let start = self.window.map_or(0, |window| end.saturating_sub(window));
                let row = span.row0 as usize + i;
                for head in 0..heads {
                    let kv_head = head / (heads / kv_heads);
                    let query = &queries[row][head * head_dim..][..head_dim];
                    let (keys, values) = (&keys[kv_head], &values[kv_head]);
                    let mut scores: Vec<f64> = (start..end)
                        .map(|p| {
                            let product = |(d, &q): (usize, &f32)| f64::from(round(q)) * f64::from(keys[p][d]);
                            let score: f64 = query.iter().enumerate().map(product).sum();
                            self.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                        })
                        .collect();
                    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    scores.iter_mut().for_each(|score| *score = (*score - top).exp());
                    let sum: f64 = scores.iter().sum();
                    for d in (0..head_dim).step_by(7) {
                        let weighed = (start..end).zip(&scores).map(|(p, w)| w * f64::from(values[p][d]));
                        let (expected, got) = (weighed.sum::<f64>() / sum, f64::from(got[row][head * head_dim + d]));
                        let room = room + 4e-3 * expected.abs();
                        assert!((got - expected).abs() < room, "{what} row {row} head {head} {d}: {got} {expected}");
                    }
                }
            }
        }
    }
}

/// Heads, kv heads and dimensions: grouped, single, many queries to one key, odd widths.
const SHAPES: [(usize, usize, usize); 8] =
    [(9, 3, 64), (4, 4, 16), (7, 1, 32), (4, 2, 80), (20, 1, 48), (8, 2, 128), (2, 1, 256), (12, 1, 16)];

const BOTH: [KvType; 2] = [KvType::F16, KvType::Fp8];

/// What rounding to 8 bits costs: each key and value is off by up to a sixteenth of itself.
#[test]
fn bytes_are_close_to_what_was_stored() {
    for shape in [(9, 3, 64), (8, 2, 128)] {
        let mut world = World::new(KvType::Fp8, shape, &[(0, 5), (63, 3), (100, 33), (511, 3)]);
        world.check_over(&format!("{shape:?}"), FP8_ROOM, &|world, sequence, position, col| {
            (col..col + world.shape.head_dim).map(|col| stored(sequence, position, col)).collect()
        });
    }
}

/// Of results that lie within 1, where scores are some ones large.
const FP8_ROOM: f64 = 0.06;

#[test]
fn all_shapes_agree_with_the_definition() {
    for (ty, shape) in BOTH.into_iter().flat_map(|ty| SHAPES.map(|shape| (ty, shape))) {
        World::new(ty, shape, &[(0, 5), (30, 1), (63, 3), (100, 33), (511, 3)]).check(&format!("{ty:?} {shape:?}"));
    }
}

#[test]
fn every_short_length_agrees_with_the_definition() {
    let sequences: Vec<_> = (0..70).map(|pos0| (pos0, 1 + pos0 % 3)).collect();
    for ty in BOTH {
        World::new(ty, (3, 1, 32), &sequences).check(&format!("{ty:?} short"));
        World::new(ty, (6, 2, 16), &[(0, 130)]).check(&format!("{ty:?} prefill"));
    }
}

#[test]
fn softcap_and_window_agree_with_the_definition() {
    for ty in BOTH {
        let mut world = World::new(ty, (4, 2, 32), &[(0, 90), (120, 40), (1030, 9), (700, 1)]);
        for window in [1, 2, 31, 32, 33, 64, 100, 300, 600] {
            world.window = Some(window);
            world.softcap = None;
            world.check(&format!("{ty:?} window {window}"));
            world.softcap = Some(1.5);
            world.check(&format!("{ty:?} softcap and window {window}"));
        }
    }
}

#[test]
fn large_scores_do_not_overflow() {
    for ty in BOTH {
        let mut world = World::new(ty, (3, 3, 64), &[(0, 40), (600, 2)]);
        world.set_queries(1e6);
        assert!(world.run().iter().flatten().all(|x| x.abs() <= 1.0));
    }
}

#[test]
fn a_decoding_row_has_the_same_bits_alone_and_in_a_batch() {
    for (ty, shape) in BOTH.into_iter().flat_map(|ty| [(9, 3, 64), (4, 2, 80)].map(|shape| (ty, shape))) {
        for window in [None, Some(300)] {
            let mut world = World::new(ty, shape, &[(3, 1), (800, 1), (255, 1), (256, 2), (0, 70)]);
            world.window = window;
            let together = world.run();
            for span in world.spans.clone().into_iter().take(4) {
                let alone = world.try_run(&[span]).unwrap();
                let rows = span.row0 as usize..(span.row0 + span.rows) as usize;
                assert_eq!(bits(&alone[rows.clone()]), bits(&together[rows]), "{shape:?} {window:?} {span:?}");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |change: &dyn Fn(&mut World)| {
        let mut world = World::new(KvType::F16, (4, 2, 32), &[(0, 3), (40, 2)]);
        change(&mut world);
        let spans = world.spans.clone();
        let error = world.try_run(&spans).unwrap_err();
        assert!(matches!(error, Error::Shape { op: "attention", .. }), "{error}");
        error.to_string()
    };
    assert!(refused(&|world| world.shape.head_dim = 24).contains("multiple of 16"));
    assert!(refused(&|world| world.shape.head_dim = 16).contains("heads of 16"));
    assert!(refused(&|world| world.shape.kv_heads = 3).contains("multiple of the key/value heads"));
    assert!(refused(&|world| world.spans[1].row0 = 2).contains("rows from 3"));
    assert!(refused(&|world| world.spans[1].rows = 0).contains("rows from 3"));
    assert!(refused(&|world| world.spans[1].table_len = 1).contains("a block for each"));
    assert!(refused(&|world| world.table[0] = BlockId(77)).contains("block ids below 4"));
    assert!(refused(&|world| world.window = Some(0)).contains("window"));
    assert!(refused(&|world| world.softcap = Some(0.0)).contains("softcap"));
    assert_eq!(BLOCK_SIZE, 32, "the kernels are written for it");
}
