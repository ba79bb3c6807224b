//! Attention against a plain f64 softmax over what was stored, and the promise on a row's bits.

use super::{backend, bits, identity, read_act, round, set};
use crate::cpu::tests::noise;
use crate::cuda::CudaBackend;
use crate::kv::{BLOCK_SIZE, BlockId, KvLayout, KvType, SeqSpan, blocks_for};
use crate::{ActId, Attention, Backend, BufferId, Error, HeadShape, KvId, LinearId, RopePairs, RopeStore};

/// Sequences whose keys and values are in the pool, in blocks in a scrambled order.
struct World {
    backend: CudaBackend,
    shape: HeadShape,
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
    fn new((heads, kv_heads, head_dim): (usize, usize, usize), sequences: &[(usize, usize)]) -> Self {
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
        let kv = backend.alloc_kv(KvLayout { layers: 2, kv_heads, head_dim, ty: KvType::F16 }, size).unwrap();
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
        let mut world = Self { backend, shape, softcap: None, window: None, spans, table, qkv, kv, act, consumer };
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

    /// The definition, in f64, of some rows of each sequence.
    fn check(&mut self, what: &str) {
        let HeadShape { heads, kv_heads, head_dim } = self.shape;
        let rows = self.rows();
        let queries = super::get(&mut self.backend, self.qkv, rows);
        let got = self.run();
        for (sequence, span) in self.spans.iter().enumerate() {
            for i in (0..span.rows as usize).filter(|i| i % 3 == 0 || *i + 1 == span.rows as usize) {
                let end = span.pos0 as usize + i + 1;
                let start = self.window.map_or(0, |window| end.saturating_sub(window));
                let row = span.row0 as usize + i;
                for head in 0..heads {
                    let kv_head = head / (heads / kv_heads);
                    let query = &queries[row][head * head_dim..][..head_dim];
                    let key = |p: usize, d: usize| round(stored(sequence, p, (heads + kv_head) * head_dim + d));
                    let value =
                        |p: usize, d: usize| round(stored(sequence, p, (heads + kv_heads + kv_head) * head_dim + d));
                    let mut scores: Vec<f64> = (start..end)
                        .map(|p| {
                            let product = |(d, &q): (usize, &f32)| f64::from(round(q)) * f64::from(key(p, d));
                            let score: f64 = query.iter().enumerate().map(product).sum();
                            self.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                        })
                        .collect();
                    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    scores.iter_mut().for_each(|score| *score = (*score - top).exp());
                    let sum: f64 = scores.iter().sum();
                    for d in (0..head_dim).step_by(7) {
                        let weighed = (start..end).zip(&scores).map(|(p, w)| w * f64::from(value(p, d)));
                        let (expected, got) = (weighed.sum::<f64>() / sum, f64::from(got[row][head * head_dim + d]));
                        // Weights and result are rounded to bf16; values lie within 1.
                        let room = 2e-3 + 4e-3 * expected.abs();
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

#[test]
fn all_shapes_agree_with_the_definition() {
    for shape in SHAPES {
        World::new(shape, &[(0, 5), (30, 1), (63, 3), (100, 33), (511, 3)]).check(&format!("{shape:?}"));
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
    let mut world = World::new((4, 2, 32), &[(0, 90), (120, 40), (1030, 9), (700, 1)]);
    for window in [1, 2, 31, 32, 33, 64, 100, 300, 600] {
        world.window = Some(window);
        world.softcap = None;
        world.check(&format!("window {window}"));
        world.softcap = Some(1.5);
        world.check(&format!("softcap and window {window}"));
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let mut world = World::new((3, 3, 64), &[(0, 40), (600, 2)]);
    world.set_queries(1e6);
    assert!(world.run().iter().flatten().all(|x| x.abs() <= 1.0));
}

#[test]
fn a_decoding_row_has_the_same_bits_alone_and_in_a_batch() {
    for shape in [(9, 3, 64), (4, 2, 80)] {
        for window in [None, Some(300)] {
            let mut world = World::new(shape, &[(3, 1), (800, 1), (255, 1), (256, 2), (0, 70)]);
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
        let mut world = World::new((4, 2, 32), &[(0, 3), (40, 2)]);
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
