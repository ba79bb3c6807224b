//! Two layers of a small decoder on both backends: every op, from tokens to logits, over several steps of two sequences.

use super::{backend, get, loaded};
use crate::cpu::{CpuBackend, CpuConfig, Isa};
use crate::kv::{BlockId, KvLayout, KvType, SeqSpan};
use crate::{
    Attention, Backend, Epilogue, GateFn, HeadShape, PartOrder, Pass, PassLimits, RopePairs, RopeStore, Rows, Turn,
    WeightType,
};

/// Runs a prefill of two prompts and some decoding steps; returns the logits of all rows.
/// `told` passes are announced, so that a device gets each in one copy.
fn run(backend: &mut dyn Backend, told: bool) -> Vec<Vec<f32>> {
    // Float weights, so that the CPU does not round activations to 8 bits.
    const TY: WeightType = WeightType::Bf16;
    let shape = HeadShape { heads: 6, kv_heads: 2, head_dim: 32 };
    let (vocab, hidden, ffn, layers, most) = (200, 192, 272, 2, 80);
    let (embedding, _) = loaded(backend, &[(TY, vocab)], hidden, PartOrder::Concat, None);
    let weights: Vec<_> = (0..layers)
        .map(|_| {
            let parts = [(TY, 192), (TY, 64), (TY, 64)];
            let (qkv, _) = loaded(backend, &parts, hidden, PartOrder::Concat, Some(&vec![0.1; 320]));
            let (o, _) = loaded(backend, &[(TY, hidden)], hidden, PartOrder::Concat, None);
            let (gate_up, _) = loaded(backend, &[(TY, ffn), (TY, ffn)], hidden, PartOrder::GateUp, None);
            let (down, _) = loaded(backend, &[(TY, hidden)], ffn, PartOrder::Concat, None);
            (qkv, o, gate_up, down)
        })
        .collect();
    let norm = (backend.load_vector(&vec![0.9; hidden]).unwrap(), 1e-5);
    let head_norm = backend.load_vector(&[1.1; 32]).unwrap();
    let frequencies: Vec<f64> = (0..16).map(|i| 0.5f64.powi(i)).collect();
    let rope = backend.load_rope(&frequencies, 1.0, 128).unwrap();
    let kv = backend.alloc_kv(KvLayout { layers, kv_heads: 2, head_dim: 32, ty: KvType::F16 }, 8).unwrap();
    let x = backend.alloc_buffer(most, hidden).unwrap();
    let y = backend.alloc_buffer(most, hidden).unwrap();
    let qkv = backend.alloc_buffer(most, shape.qkv_cols()).unwrap();
    let normed = backend.alloc_act(most, hidden).unwrap();
    let attended = backend.alloc_act(most, hidden).unwrap();
    let gated = backend.alloc_act(most, ffn).unwrap();
    let logits = backend.alloc_buffer(most, vocab).unwrap();

    if told {
        let windows = &[None, Some(20)];
        let limits =
            PassLimits { rows: most, sequences: 2, positions: 96, group: 3, windows, head: embedding, head_rows: 2 };
        backend.reserve(&limits).unwrap();
    }

    let block_table: Vec<_> = [3, 1, 6, 0, 7, 2].map(BlockId).to_vec();
    let mut all = Vec::new();
    // (rows, first position) of both sequences in each step.
    for step in [[(70, 0), (9, 0)], [(1, 70), (1, 9)], [(1, 71), (1, 10)], [(1, 72), (5, 11)]] {
        let mut spans = Vec::new();
        let mut row0 = 0;
        for (i, (rows, pos0)) in step.into_iter().enumerate() {
            spans.push(SeqSpan { row0, rows, pos0, table0: 3 * i as u32, table_len: 3 });
            row0 += rows;
        }
        let rows = row0 as usize;
        let tokens: Vec<u32> = (0..row0).map(|i| (i * 37 + step[0].1 * 11) % vocab as u32).collect();
        let (spans, block_table) = (&spans[..], &block_table[..]);
        let last: Vec<u32> = spans.iter().map(|span| span.row0 + span.rows - 1).collect();
        if told {
            let (tokens, kept) = (&tokens[..], &last[..]);
            let (carried, turn) = (&[][..], Turn::A);
            let pass = Pass { tokens, carried, turn, spans, last_spans: spans, kept, block_table, repeated: None };
            backend.begin_pass(&pass).unwrap();
        }
        backend.embed(embedding, &tokens, 1.5, x).unwrap();
        for (layer, &(qkv_w, o_w, gate_up_w, down_w)) in weights.iter().enumerate() {
            backend.rms_norm(x, Rows::First(rows), norm, qkv_w, normed).unwrap();
            backend.linear(normed, rows, qkv_w, Epilogue::Store, qkv).unwrap();
            let (pairs, query_scale, qk_norm) = (RopePairs::Halves, 0.17, Some((head_norm, head_norm, 1e-6)));
            let store = RopeStore { qkv, shape, rope, pairs, query_scale, qk_norm, kv, layer, spans, block_table };
            backend.rope_store(store).unwrap();
            let window = (layer == 1).then_some(20);
            let (out, consumer, softcap) = (attended, o_w, Some(30.0));
            let op = Attention { qkv, shape, softcap, window, kv, layer, spans, block_table, out, consumer };
            backend.attention(op).unwrap();
            backend.linear(attended, rows, o_w, Epilogue::Store, y).unwrap();
            backend.rms_norm_add(y, rows, norm, x).unwrap();
            backend.rms_norm(x, Rows::First(rows), norm, gate_up_w, normed).unwrap();
            backend.gate_up(normed, rows, gate_up_w, GateFn::Silu, down_w, gated).unwrap();
            backend.linear(gated, rows, down_w, Epilogue::Add, x).unwrap();
        }
        backend.keep_rows(x, &last).unwrap();
        backend.rms_norm(x, Rows::First(last.len()), norm, embedding, normed).unwrap();
        backend.linear(normed, last.len(), embedding, Epilogue::Store, logits).unwrap();
        all.extend(get(backend, logits, last.len()));
        backend.linear_argmax(normed, last.len(), embedding, 0).unwrap();
        let best = backend.chosen(Turn::A, last.len()).unwrap();
        for (row, &best) in all[all.len() - last.len()..].iter().zip(best) {
            assert!(row.iter().all(|&x| x <= row[best as usize]));
        }
    }
    all
}

#[test]
fn a_decoder_gives_the_logits_of_the_cpu() {
    let mut cpu = CpuBackend::new(CpuConfig { threads: Some(1), isa: Some(Isa::Scalar) }).unwrap();
    let (expected, got) = (run(&mut cpu, false), run(&mut backend(), false));
    for (row, (got, expected)) in got.iter().zip(&expected).enumerate() {
        let size = (expected.iter().map(|x| x * x).sum::<f32>() / expected.len() as f32).sqrt();
        let off = (got.iter().zip(expected).map(|(a, b)| (a - b).powi(2)).sum::<f32>() / got.len() as f32).sqrt();
        assert!(off <= 0.02 * size, "row {row}: off by {off} of {size}");
    }
}

#[test]
fn a_pass_that_is_told_is_one_copy_and_changes_no_bit() {
    let (mut told, mut plain) = (backend(), backend());
    assert_eq!(run(&mut told, true), run(&mut plain, false));
    assert_eq!(told.copies(), 4, "one for each step");
    assert!(plain.copies() > 4);
}
