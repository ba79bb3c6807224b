//! Ops on rows: embedding, norms, moving rows, and what their misuse says.

use super::{backend, get, identity, loaded, read_act, round, set};
use crate::cpu::tests::noise;
use crate::kv::{KvLayout, KvType};
use crate::{Backend, Epilogue, Error, PartOrder, Rows, WeightPart, WeightType};

#[test]
fn embedding_reads_rows_of_every_format() {
    let mut backend = backend();
    for ty in [WeightType::F32, WeightType::Bf16, WeightType::Q4_0, WeightType::Q4K, WeightType::Q8_0, WeightType::Q6K]
    {
        let (vocab, cols) = (61, if ty.is_float() { 45 } else { 256 });
        let (table, values) = loaded(&mut backend, &[(ty, vocab)], cols, PartOrder::Concat, None);
        let tokens = [0u32, 60, 15, 16, 17, 31, 32, 3, 3];
        let out = backend.alloc_buffer(tokens.len() + 1, cols).unwrap();
        set(&mut backend, out, tokens.len() + 1, |_, _| f32::NAN);
        backend.embed(table, &tokens, 2.5, out).unwrap();
        let got = get(&mut backend, out, tokens.len() + 1);
        for (row, &token) in got.iter().zip(&tokens) {
            for (got, value) in row.iter().zip(&values[token as usize * cols..]) {
                assert!((got - 2.5 * value).abs() <= 2.5 * (0.004 * value.abs() + 2e-4), "{} {got} {value}", ty.name());
            }
        }
        assert!(got[tokens.len()].iter().all(|x| x.is_nan()), "the row behind the last was written");
        assert!(matches!(backend.embed(table, &[61], 1.0, out), Err(Error::Shape { op: "embed", .. })));
    }
}

#[test]
fn norms_of_all_widths() {
    let mut backend = backend();
    for cols in [1, 3, 31, 64, 100, 576, 1028, 2051] {
        let rows = 5;
        let x = backend.alloc_buffer(rows, cols).unwrap();
        set(&mut backend, x, rows, |row, col| noise(row * 77 + col) * 3.0);
        let norm: Vec<f32> = (0..cols).map(|i| noise(i + 5) + 1.5).collect();
        let weight = backend.load_vector(&norm).unwrap();
        let values = get(&mut backend, x, rows);
        let expected = |row: usize, eps: f64| -> Vec<f32> {
            let mean = values[row].iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / cols as f64;
            let normed = |(&x, &w): (&f32, &f32)| (f64::from(x) / (mean + eps).sqrt() * f64::from(w)) as f32;
            values[row].iter().zip(&norm).map(normed).collect()
        };
        // Rows in the form of activations, picked and not; wide ones would need a large identity.
        if cols <= 600 {
            let consumer = identity(&mut backend, cols);
            let act = backend.alloc_act(rows, cols).unwrap();
            for picked in [&[0u32, 1, 2, 3, 4][..], &[4], &[3, 0, 0]] {
                let from = if picked.len() == rows { Rows::First(rows) } else { Rows::Picked(picked) };
                backend.rms_norm(x, from, (weight, 1e-5), consumer, act).unwrap();
                for (got, &row) in read_act(&mut backend, act, picked.len(), cols).iter().zip(picked) {
                    for (got, expected) in got.iter().zip(expected(row as usize, 1e-5)) {
                        assert!(
                            (got - round(expected)).abs() <= expected.abs() / 128.0,
                            "{cols} {row}: {got} {expected}"
                        );
                    }
                }
            }
        }
        let y = backend.alloc_buffer(rows + 1, cols).unwrap();
        set(&mut backend, y, rows + 1, |row, col| noise(row * 31 + col));
        let before = get(&mut backend, y, rows + 1);
        backend.rms_norm_add(x, rows, (weight, 1e-5), y).unwrap();
        let after = get(&mut backend, y, rows + 1);
        for row in 0..rows {
            for ((after, before), normed) in after[row].iter().zip(&before[row]).zip(expected(row, 1e-5)) {
                assert!((after - before - normed).abs() <= 2e-6 * (1.0 + normed.abs() + before.abs()), "{cols} {row}");
            }
        }
        assert_eq!(after[rows], before[rows]);
    }
}

#[test]
fn kept_rows_move_together() {
    let mut backend = backend();
    for cols in [3, 64, 260] {
        let buffer = backend.alloc_buffer(40, cols).unwrap();
        for kept in [&[0u32, 2, 4][..], &[39], &[0, 1, 2], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 20, 39], &[]] {
            set(&mut backend, buffer, 40, |row, col| (row * 1000 + col) as f32);
            backend.keep_rows(buffer, kept).unwrap();
            for (got, &from) in get(&mut backend, buffer, kept.len()).iter().zip(kept) {
                assert!(got.iter().enumerate().all(|(col, &x)| x == (from as usize * 1000 + col) as f32), "{from}");
            }
        }
        for wrong in [&[1, 40][..], &[2, 1], &[1, 1]] {
            assert!(matches!(backend.keep_rows(buffer, wrong), Err(Error::Shape { op: "keep_rows", .. })));
        }
    }
}

#[test]
fn misuse_is_refused_with_both_sizes() {
    let mut backend = backend();
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
    assert!(backend.rms_norm_add(x, 1, (norm, 1e-5), x).is_err());
    backend.rms_norm(x, Rows::Picked(&[3, 0]), (norm, 1e-5), weight, act).unwrap();
    assert!(backend.linear(act, 2, weight, Epilogue::Store, wrong).is_err());
    assert!(backend.linear(act, 3, weight, Epilogue::Store, out).is_err());
    backend.linear(act, 2, weight, Epilogue::Store, out).unwrap();
    let bytes = KvLayout { layers: 1, kv_heads: 1, head_dim: 64, ty: KvType::Int8 };
    assert!(backend.alloc_kv(bytes, 1).unwrap_err().to_string().contains("got int8"));
    let wide = KvLayout { head_dim: 512, ty: KvType::F16, ..bytes };
    assert!(backend.alloc_kv(wide, 1).unwrap_err().to_string().contains("at most 256"));
    assert!(backend.allocated_bytes() > 320);
    assert!(backend.describe().starts_with("cuda:"), "{}", backend.describe());
}
