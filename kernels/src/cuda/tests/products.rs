//! Matrix products of every format, for numbers of rows that reach every kernel.

use super::{backend, bits, dot, get, input, loaded, read_act, round, set};
use crate::cuda::weights::Format;
use crate::{Backend, Epilogue, GateFn, PartOrder, Rows, Turn, WeightType};
use WeightType::{Bf16, F16, F32, Iq4Nl, Iq4Xs, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};

/// Weights as the device has them, as far as it changes the result.
pub(super) fn on_device(parts: &[(WeightType, usize)], cols: usize, values: &mut [f32]) {
    let mut rest = values;
    for &(ty, rows) in parts {
        let (part, behind) = rest.split_at_mut(rows * cols);
        rest = behind;
        if Format::of(ty) == Format::Bf16 {
            part.iter_mut().for_each(|x| *x = round(*x));
        }
    }
}

/// How far a product may be off, of the product of its factors' lengths.
pub(super) fn tolerance(parts: &[(WeightType, usize)]) -> f64 {
    let rounded = |&(ty, _): &(WeightType, usize)| matches!(Format::of(ty), Format::Q8Half | Format::Q4 | Format::Q8);
    if parts.iter().any(rounded) { 1e-3 } else { 2e-4 }
}

#[test]
fn linear_stores_adds_and_biases() {
    let mut backend = backend();
    let cases: [(&[(WeightType, usize)], usize); 8] = [
        (&[(Q4_1, 48), (Q4_0, 17), (Q8_0, 5)], 96),
        (&[(Bf16, 272)], 160),
        (&[(F32, 20)], 37),
        (&[(F16, 33), (Q4_0, 16)], 576),
        (&[(Q8_0, 1)], 32),
        (&[(Q5_0, 18), (Q5_1, 5), (Iq4Nl, 33)], 96),
        (&[(Q4K, 300), (Q6K, 5), (Q8_0, 2)], 512),
        (&[(Q2K, 5), (Q3K, 18), (Q5K, 3), (Iq4Xs, 16)], 256),
    ];
    for (parts, cols) in cases {
        let out_rows: usize = parts.iter().map(|part| part.1).sum();
        let bias: Vec<f32> = (0..out_rows).map(|i| i as f32 * 0.25).collect();
        let (weight, mut values) = loaded(&mut backend, parts, cols, PartOrder::Concat, Some(&bias));
        on_device(parts, cols, &mut values);
        for rows in [1, 7, 9, 19, 40, 65, 130] {
            let (act, x) = input(&mut backend, rows, cols, weight);
            let out = backend.alloc_buffer(rows + 1, out_rows).unwrap();
            set(&mut backend, out, rows + 1, |_, _| f32::NAN);
            backend.linear(act, rows, weight, Epilogue::Store, out).unwrap();
            let got = get(&mut backend, out, rows + 1);
            for (got, x) in got.iter().zip(&x) {
                for (i, (&got, weights)) in got.iter().zip(values.chunks_exact(cols)).enumerate() {
                    let (sum, size) = dot(weights, x);
                    let expected = sum + f64::from(bias[i]);
                    let room = tolerance(parts) * size + 1e-6 * expected.abs();
                    assert!((f64::from(got) - expected).abs() <= room, "{parts:?} {rows} {i}: {got} {expected} {size}");
                }
            }
            assert!(got[rows].iter().all(|x| x.is_nan()), "the row behind the last was written");
            set(&mut backend, out, rows, |row, col| (row + col) as f32);
            backend.linear(act, rows, weight, Epilogue::Add, out).unwrap();
            for (row, (sum, once)) in get(&mut backend, out, rows).iter().zip(&got).enumerate() {
                let added =
                    sum.iter().zip(once).enumerate().all(|(col, (&sum, &once))| sum == (row + col) as f32 + once);
                assert!(added, "{parts:?} {rows}");
            }
        }
    }
}

#[test]
fn tiles_of_128_are_used_for_large_products() {
    let mut backend = backend();
    for ty in [Bf16, Q4_1] {
        let (rows, cols, out_rows) = (258, 64, 280);
        let parts = [(ty, out_rows)];
        let (weight, mut values) = loaded(&mut backend, &parts, cols, PartOrder::Concat, None);
        on_device(&parts, cols, &mut values);
        let (act, x) = input(&mut backend, rows, cols, weight);
        let out = backend.alloc_buffer(rows, out_rows).unwrap();
        backend.linear(act, rows, weight, Epilogue::Store, out).unwrap();
        for (got, x) in get(&mut backend, out, rows).iter().zip(&x) {
            for (&got, weights) in got.iter().zip(values.chunks_exact(cols)) {
                let (sum, size) = dot(weights, x);
                // An expanded Q4_1 is rounded to bf16.
                assert!((f64::from(got) - sum).abs() <= 2e-3 * size, "{}: {got} {sum}", ty.name());
            }
        }
    }
}

#[test]
fn gate_up_multiplies_and_hands_on() {
    let mut backend = backend();
    for (types, cols, ffn, f) in [
        ([Q4_1, Q4_1], 64, 96, GateFn::Silu),
        ([Bf16, Bf16], 64, 41, GateFn::Silu),
        ([Q4_1, Q8_0], 64, 33, GateFn::GeluTanh),
        ([Q8_0, Q8_0], 96, 200, GateFn::GeluTanh),
    ] {
        let bias: Vec<f32> = (0..2 * ffn).map(|i| crate::cpu::tests::noise(i) * 0.1).collect();
        let (weight, values) = loaded(&mut backend, &types.map(|ty| (ty, ffn)), cols, PartOrder::GateUp, Some(&bias));
        let consumer = super::identity(&mut backend, ffn);
        for rows in [1, 13, 70, 130] {
            let (act, x) = input(&mut backend, rows, cols, weight);
            let hidden = backend.alloc_act(rows, ffn).unwrap();
            backend.gate_up(act, rows, weight, f, consumer, hidden).unwrap();
            for (row, (got, x)) in read_act(&mut backend, hidden, rows, ffn).iter().zip(&x).enumerate() {
                for (i, &got) in got.iter().enumerate() {
                    let of = |feature: usize| dot(&values[feature * cols..][..cols], x).0 + f64::from(bias[feature]);
                    let (gate, up) = (of(i), of(ffn + i));
                    let gated = match f {
                        GateFn::Silu => gate / (1.0 + (-gate).exp()),
                        GateFn::GeluTanh => {
                            0.5 * gate * (1.0 + (0.797_884_56 * (gate + 0.044_715 * gate.powi(3))).tanh())
                        }
                    };
                    let room = 0.01 * (gated * up).abs() + 0.004 * (1.0 + gated.abs() + up.abs());
                    assert!(
                        (f64::from(got) - gated * up).abs() <= room,
                        "{types:?} {rows} {row} {i}: {got} {}",
                        gated * up
                    );
                }
            }
        }
    }
}

#[test]
fn argmax_is_that_of_the_logits() {
    let mut backend = backend();
    for parts in [&[(Q8_0, 1500)][..], &[(Q4_1, 700)], &[(F16, 333)], &[(Bf16, 30), (Q4_0, 100)]] {
        let cols = 64;
        let vocab = parts.iter().map(|part| part.1).sum();
        let (table, _) = loaded(&mut backend, parts, cols, PartOrder::Concat, None);
        for rows in [1, 9, 70] {
            let (act, _) = input(&mut backend, rows, cols, table);
            let logits = backend.alloc_buffer(rows, vocab).unwrap();
            // In two rounds: the first results stay.
            backend.linear_argmax(act, rows, table, 0).unwrap();
            backend.linear_argmax(act, rows, table, rows).unwrap();
            let best = backend.chosen(Turn::A, 2 * rows).unwrap().to_vec();
            assert_eq!(best[..rows], best[rows..]);
            assert!(backend.chosen(Turn::A, 2 * rows + 1).is_err());
            // In groups of at most 64 rows, where both run the same kernel.
            let same = rows <= 64;
            backend.linear(act, rows, table, Epilogue::Store, logits).unwrap();
            for (row, &best) in get(&mut backend, logits, rows).iter().zip(&best) {
                let largest = row.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
                if same {
                    assert_eq!(row.iter().position(|&x| x == largest), Some(best as usize), "{parts:?} {rows}");
                } else {
                    assert!(largest - row[best as usize] <= 1e-2 * largest.abs(), "{parts:?} {rows}");
                }
            }
        }
    }
    // The lowest among equals.
    let table = equal_rows(&mut backend, 40);
    let (act, _) = input(&mut backend, 3, 32, table);
    backend.linear_argmax(act, 3, table, 0).unwrap();
    assert_eq!(backend.chosen(Turn::A, 3).unwrap(), [0, 0, 0]);
}

/// Rows that are all the same.
fn equal_rows(backend: &mut dyn Backend, rows: usize) -> crate::LinearId {
    let data: Vec<u8> = (0..rows * 32).flat_map(|i| ((i % 32) as f32).to_le_bytes()).collect();
    let part = crate::WeightPart { ty: F32, rows, cols: 32, data: &data };
    backend.load_linear(&[part], PartOrder::Concat, None).unwrap()
}

#[test]
fn a_row_has_the_same_bits_among_up_to_64() {
    let mut backend = backend();
    for (ty, out_rows) in [(Bf16, 40), (Q4_1, 300), (Q8_0, 40), (Q6K, 20)] {
        let cols = 256;
        let (weight, _) = loaded(&mut backend, &[(ty, out_rows)], cols, PartOrder::Concat, None);
        let norm = backend.load_vector(&vec![1.0; cols]).unwrap();
        let x = backend.alloc_buffer(64, cols).unwrap();
        set(&mut backend, x, 64, |row, col| crate::cpu::tests::noise(row * 1009 + col));
        let act = backend.alloc_act(64, cols).unwrap();
        let out = backend.alloc_buffer(64, out_rows).unwrap();
        let mut run = |picked: &[u32]| {
            backend.rms_norm(x, Rows::Picked(picked), (norm, 1e-6), weight, act).unwrap();
            backend.linear(act, picked.len(), weight, Epilogue::Store, out).unwrap();
            get(&mut backend, out, picked.len())
        };
        let all: Vec<u32> = (0..64).collect();
        let together = run(&all);
        for few in [&[5u32][..], &[63, 1, 7], &[0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22], &all[..30]] {
            let expected: Vec<_> = few.iter().map(|&row| together[row as usize].clone()).collect();
            assert_eq!(bits(&run(few)), bits(&expected), "{} {few:?}", ty.name());
        }
    }
}
