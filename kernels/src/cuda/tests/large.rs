//! Products of many rows through cuBLASLt, or on the emulated driver through its stand-in: every weight type, odd sizes, in
//! one slice and in several.

use super::products::{on_device, tolerance};
use super::{CudaBackend, backend, bits, dot, get, input, loaded, read_act, set};
use crate::{Backend, Epilogue, GateFn, PartOrder, WeightType};
use WeightType::{Bf16, F16, F32, Iq4Nl, Iq4Xs, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};

/// A backend that has the library, and at most so much room for slices. `None`, and said so, on a GPU without it.
fn with_library(room: Option<[usize; 2]>) -> Option<CudaBackend> {
    let mut backend = backend();
    let products = backend.describe_products().unwrap();
    if !products.starts_with("cuBLASLt") {
        assert!(!backend.describe().contains("Emulated"), "the emulated driver has a stand-in: {products}");
        eprintln!("not tested, matrix products: {products}");
        return None;
    }
    room.into_iter().for_each(|room| backend.large().shrink(room));
    Some(backend)
}

/// Slices of two or three units of 128 features with 64 columns, or of one with 160.
const LITTLE: [usize; 2] = [48 << 10, 3 * 128 * 4 * 640];

#[test]
fn linear_stores_adds_and_biases() {
    let cases: [(&[(WeightType, usize)], usize); 7] = [
        (&[(Q4_1, 48), (Q4_0, 17), (Q8_0, 5)], 96),
        (&[(Bf16, 500)], 64),
        (&[(F32, 21)], 37),
        (&[(F16, 33), (Q4_0, 390)], 64),
        (&[(Q5_0, 18), (Q5_1, 5), (Iq4Nl, 33)], 96),
        (&[(Q4K, 150), (Q6K, 5), (Q8_0, 2)], 256),
        (&[(Q2K, 5), (Q3K, 18), (Q5K, 3), (Iq4Xs, 16)], 256),
    ];
    let mut most_slices = 0;
    for (i, (parts, cols)) in cases.into_iter().enumerate() {
        for (rows, room) in [(512 + 37 * i, None), (640 - 5 * i, Some(LITTLE))] {
            let Some(mut backend) = with_library(room) else { return };
            let out_rows: usize = parts.iter().map(|part| part.1).sum();
            let bias: Vec<f32> = (0..out_rows).map(|i| i as f32 * 0.25).collect();
            let bias = (i % 3 != 2).then_some(bias);
            let (weight, mut values) = loaded(&mut backend, parts, cols, PartOrder::Concat, bias.as_deref());
            on_device(parts, cols, &mut values);
            let (act, x) = input(&mut backend, rows, cols, weight);
            let out = backend.alloc_buffer(rows + 1, out_rows).unwrap();
            set(&mut backend, out, rows + 1, |_, _| f32::NAN);
            backend.linear(act, rows, weight, Epilogue::Store, out).unwrap();
            let slices = backend.large().products;
            // Where there is no room for 128 features of so many columns, kernels of our own do it.
            assert!(slices >= 1 || room.is_some() && cols > 160, "{parts:?} {rows}");
            most_slices = most_slices.max(slices / parts.len());
            let got = get(&mut backend, out, rows + 1);
            // An expanded quant is rounded to bf16.
            let off = if tolerance(parts) > 5e-4 { 2e-3 } else { tolerance(parts) };
            for (row, (got, x)) in got.iter().zip(&x).enumerate() {
                for (i, (&got, weights)) in got.iter().zip(values.chunks_exact(cols)).enumerate() {
                    let (sum, size) = dot(weights, x);
                    let expected = sum + bias.as_ref().map_or(0.0, |bias| f64::from(bias[i]));
                    let room = off * size + 1e-6 * expected.abs();
                    assert!((f64::from(got) - expected).abs() <= room, "{parts:?} {row} {i}: {got} {expected} {size}");
                }
            }
            assert!(got[rows].iter().all(|x| x.is_nan()), "the row behind the last was written");

            backend.linear(act, rows, weight, Epilogue::Store, out).unwrap();
            assert_eq!(bits(&get(&mut backend, out, rows)), bits(&got[..rows]), "the same product has the same bits");

            set(&mut backend, out, rows, |row, col| (row + col) as f32);
            backend.linear(act, rows, weight, Epilogue::Add, out).unwrap();
            for (row, (sum, once)) in get(&mut backend, out, rows).iter().zip(&got).enumerate() {
                for (col, (&sum, &once)) in sum.iter().zip(once).enumerate() {
                    let (old, size) = ((row + col) as f32, once.abs() + (row + col) as f32);
                    assert!((sum - old - once).abs() <= 1e-6 * size, "{parts:?} {row} {col}: {sum} {old} {once}");
                }
            }
        }
    }
    assert!(most_slices >= 2, "no product took several slices");
}

#[test]
fn gate_up_multiplies_and_hands_on() {
    for (types, cols, ffn, f) in [
        ([Q4_1, Q4_1], 64, 96, GateFn::Silu),
        ([Bf16, Bf16], 64, 241, GateFn::Silu),
        ([Q4_1, Q8_0], 64, 33, GateFn::GeluTanh),
        ([Q8_0, Q8_0], 96, 202, GateFn::GeluTanh),
        ([Q6K, Q6K], 256, 19, GateFn::Silu),
    ] {
        for (rows, room, biased) in [(515, None, true), (600, Some(LITTLE), false)] {
            let Some(mut backend) = with_library(room) else { return };
            let bias: Vec<f32> = (0..2 * ffn).map(|i| crate::cpu::tests::noise(i) * 0.1).collect();
            let bias = biased.then_some(bias);
            let parts = types.map(|ty| (ty, ffn));
            let (weight, values) = loaded(&mut backend, &parts, cols, PartOrder::GateUp, bias.as_deref());
            let consumer = super::identity(&mut backend, ffn);
            let (act, x) = input(&mut backend, rows, cols, weight);
            let hidden = backend.alloc_act(rows, ffn).unwrap();
            backend.gate_up(act, rows, weight, f, consumer, hidden).unwrap();
            let slices = backend.large().products;
            // An expanded quant is rounded to bf16.
            let off = if types == [Bf16, Bf16] { 2e-4 } else { 2e-3 };
            assert!(slices >= 1, "{types:?} {rows}");
            if room.is_some() && ffn > 200 {
                assert!(slices >= 2, "{types:?} {rows} in {slices}");
            }
            for (row, (got, x)) in read_act(&mut backend, hidden, rows, ffn).iter().zip(&x).enumerate() {
                for (i, &got) in got.iter().enumerate() {
                    let bias = |feature: usize| bias.as_ref().map_or(0.0, |bias| f64::from(bias[feature]));
                    let of = |feature: usize| {
                        let (sum, size) = dot(&values[feature * cols..][..cols], x);
                        (sum + bias(feature), off * size)
                    };
                    let ((gate, gate_off), (up, up_off)) = (of(i), of(ffn + i));
                    let gated = match f {
                        GateFn::Silu => gate / (1.0 + (-gate).exp()),
                        GateFn::GeluTanh => {
                            0.5 * gate * (1.0 + (0.797_884_56 * (gate + 0.044_715 * gate.powi(3))).tanh())
                        }
                    };
                    let (expected, size) = (gated * up, 1.0 + gated.abs() + up.abs());
                    // Neither function is steeper than 1.2.
                    let room = 0.01 * expected.abs() + 0.004 * size + 1.2 * gate_off * up.abs() + up_off * gated.abs();
                    assert!((f64::from(got) - expected).abs() <= room, "{types:?} {row} {i}: {got} {expected}");
                }
            }
        }
    }
}

#[test]
fn fewer_rows_stay_with_kernels_of_our_own() {
    let Some(mut backend) = with_library(None) else { return };
    let (weight, _) = loaded(&mut backend, &[(Bf16, 20)], 32, PartOrder::Concat, None);
    for (rows, expected) in [(64, 0), (511, 0), (512, 1)] {
        // The arena is large enough for the library.
        let (act, _) = input(&mut backend, 512, 32, weight);
        let out = backend.alloc_buffer(512, 20).unwrap();
        backend.linear(act, rows, weight, Epilogue::Store, out).unwrap();
        assert_eq!(backend.large().products, expected, "{rows}");
    }
}
