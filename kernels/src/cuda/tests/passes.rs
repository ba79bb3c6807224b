//! Passes that are told beforehand, and passes that are recorded.

use super::{backend, get, loaded};
use crate::cuda::CudaBackend;
use crate::kv::{BlockId, KvLayout, KvType, SeqSpan};
use crate::{
    Backend, BufferId, HeadShape, LinearId, PartOrder, Pass, Recorded, RopeId, RopePairs, RopeStore, Turn, WeightType,
};

const VOCAB: usize = 40;
const COLS: usize = 96;

/// A backend with what a pass of embedding and storing needs, which is to record.
struct Rig {
    backend: CudaBackend,
    table: LinearId,
    out: BufferId,
    qkv: BufferId,
    rope: RopeId,
    kv: crate::KvId,
    /// Times that the ops were run.
    ran: usize,
}

impl Rig {
    fn new() -> Self {
        let mut backend = backend();
        let (table, _) = loaded(&mut backend, &[(WeightType::Bf16, VOCAB)], COLS, PartOrder::Concat, None);
        let out = backend.alloc_buffer(4, COLS).unwrap();
        let qkv = backend.alloc_buffer(4, COLS).unwrap();
        let rope = backend.load_rope(&[1.0; 16], 1.0, 100).unwrap();
        let kv = backend.alloc_kv(KvLayout { layers: 1, kv_heads: 1, head_dim: 32, ty: KvType::F16 }, 8).unwrap();
        assert!(backend.record_passes(true));
        Self { backend, table, out, qkv, rope, kv, ran: 0 }
    }

    /// A pass of these tokens, one sequence each at `position`, padded to 4 rows.
    fn pass(&mut self, tokens: &[u32], position: u32) {
        let spans: Vec<_> = (0..tokens.len() as u32)
            .map(|row| SeqSpan { row0: row, rows: 1, pos0: position, table0: row, table_len: 1 })
            .collect();
        let block_table: Vec<_> = (0..tokens.len() as u32).map(|block| BlockId(block + 2)).collect();
        let mut padded = tokens.to_vec();
        padded.resize(4, 0);
        let pass = Pass {
            tokens: &padded,
            carried: &[],
            turn: Turn::A,
            spans: &spans,
            last_spans: &spans,
            kept: &[],
            block_table: &block_table,
            repeated: Some(0),
        };
        self.backend.begin_pass(&pass).unwrap();
        let Self { table, out, qkv, rope, kv, ran, .. } = *self;
        let mut count = 0;
        let mut ops = |backend: &mut dyn Backend| {
            count += 1;
            backend.embed(table, &padded, 1.0, out)?;
            backend.embed(table, &padded, 2.0, qkv)?;
            let shape = HeadShape { heads: 1, kv_heads: 1, head_dim: 32 };
            let (spans, block_table) = (&spans[..], &block_table[..]);
            let (pairs, query_scale, qk_norm) = (RopePairs::Halves, 1.0, None);
            backend.rope_store(RopeStore {
                qkv,
                shape,
                rope,
                pairs,
                query_scale,
                qk_norm,
                kv,
                layer: 0,
                spans,
                block_table,
            })
        };
        self.backend.replay(&mut ops).unwrap();
        self.ran = ran + count;
    }
}

#[test]
fn a_recorded_pass_reads_what_it_was_told_last() {
    let mut rig = Rig::new();
    let steps: [&[u32]; 6] = [&[1, 2, 3], &[4, 5, 6], &[7], &[39, 0, 8, 9], &[2, 2], &[1]];
    for (i, tokens) in steps.into_iter().enumerate() {
        rig.pass(tokens, i as u32);
        // Another backend that records nothing.
        let mut plain = Rig::new();
        plain.backend.record_passes(false);
        plain.pass(tokens, i as u32);
        let rows = |rig: &mut Rig, buffer| get(&mut rig.backend, buffer, tokens.len());
        let (out, qkv) = (rig.out, rig.qkv);
        assert_eq!(rows(&mut rig, out), rows(&mut plain, out), "{tokens:?}");
        assert_eq!(rows(&mut rig, qkv), rows(&mut plain, qkv), "{tokens:?}");
        // Position i of the blocks: the only one that the other backend has written.
        let ((got, width), (expected, _)) = (rig.backend.pool_bytes(rig.kv), plain.backend.pool_bytes(plain.kv));
        let key = |bytes: &[u8], block: usize| bytes[(block * 2 * 32 + i) * width * 2..][..2 * width].to_vec();
        for block in 0..8 {
            assert_eq!(key(&got, block), key(&expected, block), "block {block} in step {i}");
            assert_eq!(key(&got, block).iter().any(|&x| x != 0), (2..2 + tokens.len()).contains(&block));
        }
    }
    assert_eq!(rig.ran, 2, "once to load the kernels, once to record");
    assert_eq!(rig.backend.recorded(), Recorded { graphs: 1, failed: None });
    assert_eq!(rig.backend.copies(), steps.len(), "one copy a pass");
}

#[test]
fn an_op_that_waits_ends_recording_and_not_the_pass() {
    let mut rig = Rig::new();
    rig.pass(&[1, 2], 0);
    let (out, table, tokens) = (rig.out, rig.table, [1, 2, 0, 0]);
    for _ in 0..2 {
        let mut ops = |backend: &mut dyn Backend| {
            backend.embed(table, &tokens, 1.0, out)?;
            backend.for_each_row(out, 1, &|_, values| values.fill(7.0))
        };
        rig.backend.replay(&mut ops).unwrap();
    }
    let failed = rig.backend.recorded().failed.expect("it cannot be recorded");
    assert!(!failed.is_empty());
    assert_eq!(get(&mut rig.backend, out, 1)[0], [7.0; COLS]);
    assert!(!rig.backend.record_passes(true), "it stays off");
}
