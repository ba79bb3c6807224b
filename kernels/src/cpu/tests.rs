//! Tests of whole ops through the backend, on every instruction set that this CPU has and several thread counts.

use half::f16;

use super::*;
use crate::cpu::simd::tests::runnable;
use crate::{BlockId, HeadShape, KvType, RopePairs, SeqSpan, Turn, WeightType};

fn backends() -> impl Iterator<Item = CpuBackend> {
    let configs = runnable().into_iter().flat_map(|isa| [1, 2, 5].map(|threads| (isa, threads)));
    configs.map(|(isa, threads)| CpuBackend::new(CpuConfig { threads: Some(threads), isa: Some(isa) }).unwrap())
}

pub(crate) fn noise(i: usize) -> f32 {
    let mixed = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// Rows of a matrix in the file format of `ty`, and the values that they stand for.
pub(crate) fn matrix(ty: WeightType, rows: usize, cols: usize, seed: usize) -> (Vec<u8>, Vec<f32>) {
    let mut file = Vec::new();
    for block in 0..rows * cols / ty.block_len() {
        let at = seed + block * 40;
        let quants = |count: usize| (0..count).map(move |i| (noise(at + 2 + i) * 128.0) as i8 as u8);
        let half = |x: f32| f16::from_f32(x).to_le_bytes();
        match ty {
            WeightType::F32 => file.extend((noise(at) * 0.2).to_le_bytes()),
            WeightType::F16 => file.extend(half(noise(at) * 0.2)),
            WeightType::Bf16 => file.extend(half::bf16::from_f32(noise(at) * 0.2).to_le_bytes()),
            _ => {
                // Scales first, then quants, but for types that have it the other way round.
                let halves: Vec<u8> = match ty {
                    WeightType::Q4_1 | WeightType::Q5_1 => [half(noise(at) * 0.02), half(noise(at + 1) * 0.1)].concat(),
                    WeightType::Q2K | WeightType::Q4K | WeightType::Q5K => {
                        [half(noise(at) * 0.002), half(noise(at + 1) * 0.002)].concat()
                    }
                    WeightType::Q4_0 | WeightType::Q5_0 => half(noise(at) * 0.02).to_vec(),
                    _ => half(noise(at) * 0.001).to_vec(),
                };
                let quants = quants(ty.block_bytes() - halves.len());
                if matches!(ty, WeightType::Q2K | WeightType::Q3K | WeightType::Q6K) {
                    file.extend(quants.chain(halves));
                } else {
                    file.extend(halves.into_iter().chain(quants));
                }
            }
        }
    }
    let mut values = vec![0.0; rows * cols];
    let row_bytes = ty.row_bytes(cols).unwrap();
    for (row, values) in file.chunks_exact(row_bytes).zip(values.chunks_exact_mut(cols)) {
        crate::format::ggml::dequantise_row(ty, row, values);
    }
    (file, values)
}

fn set(backend: &mut CpuBackend, buffer: BufferId, rows: usize, value: impl Fn(usize, usize) -> f32 + Sync) {
    let fill = |row: usize, values: &mut [f32]| {
        values.iter_mut().enumerate().for_each(|(col, x)| *x = value(row, col));
    };
    backend.for_each_row(buffer, rows, &fill).unwrap();
}

fn get(backend: &mut CpuBackend, buffer: BufferId, rows: usize) -> Vec<Vec<f32>> {
    let out = Mutex::new(vec![Vec::new(); rows]);
    backend.for_each_row(buffer, rows, &|row, values| out.lock().unwrap()[row] = values.to_vec()).unwrap();
    out.into_inner().unwrap()
}

/// A matrix in a backend, with the activations `x` of `rows` rows ready for it: `x` is 1 / sqrt(mean) of noise.
fn loaded(
    backend: &mut CpuBackend,
    parts: &[(WeightType, usize)],
    cols: usize,
    order: PartOrder,
    bias: Option<&[f32]>,
) -> (LinearId, Vec<f32>) {
    let made: Vec<_> = parts.iter().enumerate().map(|(i, &(ty, rows))| matrix(ty, rows, cols, i * 90_001)).collect();
    let parts: Vec<_> =
        parts.iter().zip(&made).map(|(&(ty, rows), (data, _))| WeightPart { ty, rows, cols, data }).collect();
    let id = backend.load_linear(&parts, order, bias).unwrap();
    (id, made.into_iter().flat_map(|(_, values)| values).collect())
}

/// Norms `rows` rows of noise into an activation arena; returns the arena and the rows as floats.
fn input(backend: &mut CpuBackend, rows: usize, cols: usize, consumer: LinearId) -> (ActId, Vec<Vec<f32>>) {
    let x = backend.alloc_buffer(rows, cols).unwrap();
    set(backend, x, rows, |row, col| noise(row * 1009 + col));
    let weight = backend.load_vector(&vec![1.0; cols]).unwrap();
    let act = backend.alloc_act(rows, cols).unwrap();
    backend.rms_norm(x, Rows::First(rows), (weight, 1e-6), consumer, act).unwrap();
    let values = get(backend, x, rows);
    let normed = |row: Vec<f32>| {
        let mean = row.iter().map(|x| x * x).sum::<f32>() / cols as f32;
        row.into_iter().map(|x| x / (mean + 1e-6).sqrt()).collect()
    };
    (act, values.into_iter().map(normed).collect())
}

/// Asserts `got` = `x * weights^T` within the error of int8 activations (none where there are none).
fn assert_product(
    got: &[Vec<f32>],
    x: &[Vec<f32>],
    weights: &[f32],
    tolerance: f32,
    expect: impl Fn(usize, f32) -> f32,
) {
    for (got, x) in got.iter().zip(x) {
        for (i, (&got, weights)) in got.iter().zip(weights.chunks_exact(x.len())).enumerate() {
            let size = weights.iter().map(|w| w * w).sum::<f32>().sqrt() * x.iter().map(|x| x * x).sum::<f32>().sqrt();
            let expected = expect(i, weights.iter().zip(x).map(|(w, x)| w * x).sum());
            assert!((got - expected).abs() <= tolerance * size + 1e-5, "{i}: {got} {expected} of {size}");
        }
    }
}

#[test]
fn linear_stores_adds_and_biases() {
    use WeightType::{Bf16, F16, F32, Iq4Nl, Iq4Xs, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    for mut backend in backends() {
        let cases: [(&[(WeightType, usize)], usize); 9] = [
            (&[(Q4_1, 48), (Q4_0, 17), (Q8_0, 5)], 96),
            (&[(Q4_0, 16), (F16, 33)], 64),
            (&[(F32, 20)], 37),
            (&[(Bf16, 31)], 64),
            (&[(Q8_0, 1)], 32),
            (&[(Q4_1, 576)], 576),
            (&[(Q5_0, 18), (Q5_1, 5), (Iq4Nl, 33)], 96),
            (&[(Q4K, 37), (Q6K, 5), (Q8_0, 2)], 512),
            (&[(Q2K, 5), (Q3K, 18), (Q5K, 3), (Iq4Xs, 16)], 256),
        ];
        for (parts, cols) in cases {
            let out_rows: usize = parts.iter().map(|part| part.1).sum();
            let bias: Vec<f32> = (0..out_rows).map(|i| i as f32 * 0.25).collect();
            let (weight, values) = loaded(&mut backend, parts, cols, PartOrder::Concat, Some(&bias));
            for rows in [1, 5, 19] {
                let (act, x) = input(&mut backend, rows, cols, weight);
                let out = backend.alloc_buffer(rows, out_rows).unwrap();
                backend.linear(act, rows, weight, Epilogue::Store, out).unwrap();
                let got = get(&mut backend, out, rows);
                assert_product(&got, &x, &values, 4e-3, |i, sum| sum + bias[i]);
                backend.linear(act, rows, weight, Epilogue::Add, out).unwrap();
                for (twice, once) in get(&mut backend, out, rows).iter().zip(&got) {
                    assert!(twice.iter().zip(once).all(|(twice, once)| *twice == once * 2.0));
                }
            }
        }
    }
}

#[test]
fn gate_up_multiplies_and_hands_on() {
    for mut backend in backends() {
        for (types, consumer_ty, ffn, f) in [
            ([WeightType::Q4_1, WeightType::Q4_1], WeightType::Q4_1, 96, GateFn::Silu),
            ([WeightType::Q4_1, WeightType::Q8_0], WeightType::F32, 96, GateFn::GeluTanh),
            ([WeightType::F16, WeightType::F16], WeightType::F16, 41, GateFn::Silu),
        ] {
            let cols = 64;
            let bias: Vec<f32> = (0..2 * ffn).map(|i| noise(i) * 0.1).collect();
            let parts = types.map(|ty| (ty, ffn));
            let (weight, values) = loaded(&mut backend, &parts, cols, PartOrder::GateUp, Some(&bias));
            // The consumer is an identity, so that the hidden values can be read.
            let mut identity = vec![0f32; ffn * ffn];
            (0..ffn).for_each(|i| identity[i * ffn + i] = 1.0);
            let data: Vec<u8> = match consumer_ty {
                WeightType::F32 => identity.iter().flat_map(|x| x.to_le_bytes()).collect(),
                WeightType::F16 => identity.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
                _ => identity
                    .chunks_exact(32)
                    .flat_map(|block| {
                        let mut bytes = vec![0; 20];
                        bytes[..2].copy_from_slice(&f16::ONE.to_le_bytes());
                        (0..16).for_each(|i| bytes[4 + i] = block[i] as u8 | (block[16 + i] as u8) << 4);
                        bytes
                    })
                    .collect(),
            };
            let part = WeightPart { ty: consumer_ty, rows: ffn, cols: ffn, data: &data };
            let down = backend.load_linear(&[part], PartOrder::Concat, None).unwrap();
            for rows in [1, 6, 13] {
                let (act, x) = input(&mut backend, rows, cols, weight);
                let hidden = backend.alloc_act(rows, ffn).unwrap();
                let out = backend.alloc_buffer(rows, ffn).unwrap();
                backend.gate_up(act, rows, weight, f, down, hidden).unwrap();
                backend.linear(hidden, rows, down, Epilogue::Store, out).unwrap();
                for (got, x) in get(&mut backend, out, rows).iter().zip(&x) {
                    let dot = |row: usize| -> f32 {
                        let row = &values[row * cols..][..cols];
                        row.iter().zip(x).map(|(w, x)| w * x).sum()
                    };
                    let largest = got.iter().fold(0f32, |m, x| m.max(x.abs()));
                    for (i, got) in got.iter().enumerate() {
                        let (gate, up) = (dot(i) + bias[i], dot(ffn + i) + bias[ffn + i]);
                        let gate = match f {
                            GateFn::Silu => gate / (1.0 + (-gate).exp()),
                            GateFn::GeluTanh => {
                                0.5 * gate * (1.0 + (0.797_884_6 * (gate + 0.044_715 * gate.powi(3))).tanh())
                            }
                        };
                        assert!((got - gate * up).abs() <= 0.02 * largest + 0.02, "{i}: {got} {}", gate * up);
                    }
                }
            }
        }
    }
}

#[test]
fn argmax_and_embed_read_the_same_table() {
    for mut backend in backends() {
        for ty in [WeightType::Q8_0, WeightType::Q4_1, WeightType::F16, WeightType::F32] {
            let (vocab, cols, rows) = (1500, 64, 9);
            let (table, values) = loaded(&mut backend, &[(ty, vocab)], cols, PartOrder::Concat, None);
            let tokens = [0u32, 1, 15, 16, 17, 700, 1498, 1499, 3];
            let out = backend.alloc_buffer(rows, cols).unwrap();
            backend.embed(table, &tokens, 2.0, out).unwrap();
            for (row, &token) in get(&mut backend, out, rows).iter().zip(&tokens) {
                let expected = values[token as usize * cols..][..cols].iter().map(|x| x * 2.0);
                assert!(row.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6));
            }

            let (act, _) = input(&mut backend, rows, cols, table);
            let logits = backend.alloc_buffer(rows, vocab).unwrap();
            backend.linear(act, rows, table, Epilogue::Store, logits).unwrap();
            // In two rounds: the first results stay.
            backend.linear_argmax(act, rows, table, 0).unwrap();
            backend.linear_argmax(act, rows, table, rows).unwrap();
            let best = backend.chosen(Turn::A, 2 * rows).unwrap().to_vec();
            assert_eq!(best[..rows], best[rows..]);
            assert!(backend.chosen(Turn::A, 2 * rows + 1).is_err());
            for (row, &best) in get(&mut backend, logits, rows).iter().zip(&best) {
                let largest = row.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
                assert_eq!(row.iter().position(|&x| x == largest), Some(best as usize));
            }
        }
    }
}

/// One layer of a small decoder: every op, from rows of noise to the residual stream.
fn layer(backend: &mut CpuBackend, order: &[usize]) -> Vec<Vec<f32>> {
    use WeightType::{Q4_0, Q4_1, Q8_0};
    let shape = HeadShape { heads: 6, kv_heads: 2, head_dim: 32 };
    let (hidden, ffn, rows) = (192, 256, order.len());
    let parts = [(Q4_1, 192), (Q4_0, 64), (Q8_0, 64)];
    let (qkv_w, _) = loaded(backend, &parts, hidden, PartOrder::Concat, None);
    let (o_w, _) = loaded(backend, &[(Q4_1, hidden)], hidden, PartOrder::Concat, None);
    let (gate_up_w, _) = loaded(backend, &[(Q4_1, ffn), (Q4_1, ffn)], hidden, PartOrder::GateUp, None);
    let (down_w, _) = loaded(backend, &[(Q8_0, hidden)], ffn, PartOrder::Concat, None);
    let norm = backend.load_vector(&vec![0.5; hidden]).unwrap();
    let frequencies: Vec<f64> = (0..16).map(|i| 0.5f64.powi(i)).collect();
    let rope = backend.load_rope(&frequencies, 1.0, 64).unwrap();
    let layout = KvLayout { layers: 3, kv_heads: 2, head_dim: 32, ty: KvType::F16 };
    let kv = backend.alloc_kv(layout, rows).unwrap();
    let x = backend.alloc_buffer(rows, hidden).unwrap();
    let qkv = backend.alloc_buffer(rows, shape.qkv_cols()).unwrap();
    let act = backend.alloc_act(rows, hidden).unwrap();
    let act_ffn = backend.alloc_act(rows, ffn).unwrap();
    set(backend, x, rows, |row, col| noise(order[row] * 5000 + col));

    let spans: Vec<_> =
        (0..rows as u32).map(|row| SeqSpan { row0: row, rows: 1, pos0: 0, table0: row, table_len: 1 }).collect();
    let block_table: Vec<_> = (0..rows as u32).rev().map(BlockId).collect();
    let (spans, block_table) = (&spans[..], &block_table[..]);
    backend.rms_norm(x, Rows::First(rows), (norm, 1e-5), qkv_w, act).unwrap();
    backend.linear(act, rows, qkv_w, Epilogue::Store, qkv).unwrap();
    let pairs = RopePairs::Interleaved;
    let (query_scale, qk_norm) = (0.17, None);
    let store = RopeStore { qkv, shape, rope, pairs, query_scale, qk_norm, kv, layer: 2, spans, block_table };
    backend.rope_store(store).unwrap();
    let attention = Attention {
        qkv,
        shape,
        softcap: None,
        window: None,
        kv,
        layer: 2,
        spans,
        block_table,
        out: act,
        consumer: o_w,
    };
    backend.attention(attention).unwrap();
    backend.linear(act, rows, o_w, Epilogue::Add, x).unwrap();
    backend.rms_norm(x, Rows::First(rows), (norm, 1e-5), gate_up_w, act).unwrap();
    backend.gate_up(act, rows, gate_up_w, GateFn::Silu, down_w, act_ffn).unwrap();
    backend.linear(act_ffn, rows, down_w, Epilogue::Add, x).unwrap();
    get(backend, x, rows)
}

#[test]
fn a_row_gives_the_same_bits_in_any_company_and_on_any_number_of_threads() {
    for isa in runnable() {
        let make = |threads| CpuBackend::new(CpuConfig { threads: Some(threads), isa: Some(isa) }).unwrap();
        let order: Vec<usize> = (0..21).collect();
        let all = layer(&mut make(1), &order);
        assert!(all.iter().flatten().all(|x| x.is_finite()));
        for threads in [2, 3, 6] {
            assert!(layer(&mut make(threads), &order) == all, "{isa:?} on {threads} threads");
        }
        for few in [&[4][..], &[20, 3], &[9, 8, 7, 6, 5], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0]] {
            let got = layer(&mut make(2), few);
            for (row, &index) in got.iter().zip(few) {
                assert!(*row == all[index], "{isa:?}: row {index} among {few:?}");
            }
        }
    }
}

#[test]
fn kept_rows_move_together() {
    let mut backend = backends().next().unwrap();
    let buffer = backend.alloc_buffer(5, 3).unwrap();
    set(&mut backend, buffer, 5, |row, col| (row * 10 + col) as f32);
    backend.keep_rows(buffer, &[0, 2, 4]).unwrap();
    assert_eq!(get(&mut backend, buffer, 3), [[0.0, 1.0, 2.0], [20.0, 21.0, 22.0], [40.0, 41.0, 42.0]]);
    for wrong in [&[1, 5][..], &[2, 1], &[1, 1]] {
        assert!(matches!(backend.keep_rows(buffer, wrong), Err(Error::Shape { op: "keep_rows", .. })));
    }
}

#[test]
fn misuse_is_refused_with_both_sizes() {
    let mut backend = CpuBackend::new(CpuConfig { threads: Some(1), isa: Some(Isa::Scalar) }).unwrap();
    let data = vec![0; 20 * 16];
    let part = WeightPart { ty: WeightType::Q4_1, rows: 16, cols: 32, data: &data };
    let weight = backend.load_linear(&[part], PartOrder::Concat, None).unwrap();
    let mut refused = |parts: &[WeightPart<'_>], order, bias: Option<&[f32]>, says: &str| {
        let error = backend.load_linear(parts, order, bias).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    refused(&[], PartOrder::Concat, None, "at least one part");
    refused(&[WeightPart { cols: 31, ..part }], PartOrder::Concat, None, "whole blocks");
    refused(&[WeightPart { rows: 15, ..part }], PartOrder::Concat, None, "320 bytes");
    refused(&[part, WeightPart { cols: 64, rows: 8, ..part }], PartOrder::Concat, None, "32 columns");
    refused(&[part], PartOrder::GateUp, None, "gate and up");
    refused(&[part], PartOrder::Concat, Some(&[0.0; 3]), "16 values");

    let out = backend.alloc_buffer(4, 16).unwrap();
    let wrong = backend.alloc_buffer(4, 17).unwrap();
    let act = backend.alloc_act(4, 32).unwrap();
    assert!(backend.linear(act, 1, weight, Epilogue::Store, out).is_err(), "nothing was written yet");
    let x = backend.alloc_buffer(4, 32).unwrap();
    let norm = backend.load_vector(&[1.0; 32]).unwrap();
    assert!(backend.rms_norm(x, Rows::First(5), (norm, 1e-5), weight, act).is_err());
    assert!(backend.rms_norm(x, Rows::Picked(&[0, 4]), (norm, 1e-5), weight, act).is_err());
    backend.rms_norm(x, Rows::Picked(&[3, 0]), (norm, 1e-5), weight, act).unwrap();
    assert!(backend.linear(act, 2, weight, Epilogue::Store, wrong).is_err());
    assert!(backend.linear(act, 3, weight, Epilogue::Store, out).is_err());
    let device = KvLayout { layers: 1, kv_heads: 1, head_dim: 32, ty: KvType::Fp8 };
    assert!(backend.alloc_kv(device, 1).unwrap_err().to_string().contains("f16 or int8 keys and values on a CPU"));
    backend.linear(act, 2, weight, Epilogue::Store, out).unwrap();
    assert!(backend.embed(weight, &[16], 1.0, x).is_err());
    assert!(backend.allocated_bytes() > 320);
    assert_eq!(backend.describe(), "cpu, scalar, 1 thread");
}
