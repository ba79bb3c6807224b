//! Gemma 3: a tiny model against candle-transformers, beyond its window too, and the real file against a plain f32
//! forward pass and llama.cpp's answers.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::gemma3;
use cupola_kernels::WeightType;
use cupola_models::Model;
use cupola_models::testing::{Scratch, gemma};

use super::{TEXT, argmax, reference};
use crate::support::{cosine, decoder_logits, gemma_model};

/// Four times the tiny model's window.
const TOKENS: usize = 4 * gemma::WINDOW;

fn tokens() -> Vec<u32> {
    (0..TOKENS as u32).map(|i| (i * i * 31 + i * 7) % 297 + 3).collect()
}

/// Logits after every token. One token at a time: only then does candle's window hold what the model's paper and its
/// authors' code say, a position itself and `window - 1` before it; a longer input sees one more.
fn candle(folder: &Path, tokens: &[u32]) -> Vec<Vec<f32>> {
    let read = |name: &str| std::fs::read(folder.join(name)).expect("the tiny model has this file");
    let config: gemma3::Config = serde_json::from_slice(&read("config.json")).expect("a config.json for candle");
    let weights = VarBuilder::from_buffered_safetensors(read("model.safetensors"), DType::F32, &Device::Cpu);
    let mut model = gemma3::Model::new(false, &config, weights.expect("weights")).expect("candle loads the model");
    let step = |(at, token): (usize, &u32)| {
        let input = Tensor::new(&[[*token]], &Device::Cpu)?;
        model.forward(&input, at)?.flatten_all()?.to_vec1::<f32>()
    };
    tokens.iter().enumerate().map(step).collect::<candle_core::Result<_>>().expect("candle runs the model")
}

/// Largest difference as a share of the spread of the expected values.
fn worst(expected: &[Vec<f32>], got: &[Vec<f32>]) -> f32 {
    assert_eq!(expected.len(), got.len());
    let difference = |(expected, got): (&Vec<f32>, &Vec<f32>)| {
        let size = (expected.iter().map(|e| e * e).sum::<f32>() / expected.len() as f32).sqrt();
        expected.iter().zip(got).map(|(e, g)| (e - g).abs()).fold(0.0, f32::max) / size
    };
    expected.iter().zip(got).map(difference).fold(0.0, f32::max)
}

#[test]
fn a_tiny_model_agrees_with_candle_beyond_its_window() {
    let scratch = Scratch::new("gemma-candle");
    for seed in [1, 2] {
        let folder = gemma::tiny_safetensors(scratch.path(), WeightType::F32, seed);
        let expected = candle(&folder, &tokens());
        let got = decoder_logits(&Model::open(&folder).expect("the tiny model opens"), &tokens());
        let worst = worst(&expected, &got);
        println!("largest difference from candle-transformers: {worst:.5} of the spread");
        // Keys and values are kept as halves.
        assert!(worst < 0.01, "{worst}");
    }
}

#[test]
fn the_window_and_both_rotary_embeddings_matter() {
    let scratch = Scratch::new("gemma-window");
    let mut model = Model::open(&gemma::tiny_safetensors(scratch.path(), WeightType::F32, 1)).expect("it opens");
    let right = decoder_logits(&model, &tokens());
    let sliding = model.spec.sliding.clone().expect("Gemma 3 has a window");
    for change in 0..4 {
        let mut wrong = sliding.clone();
        match change {
            0 => wrong.window += 1,
            1 => wrong.window -= 1,
            2 => wrong.rope = model.spec.rope.clone(),
            _ => wrong.layers.rotate_left(1),
        }
        model.spec.sliding = Some(wrong);
        let got = decoder_logits(&model, &tokens());
        assert!(worst(&right, &got) > 0.02, "change {change} would not have been seen: {}", worst(&right, &got));
    }
}

#[test]
fn both_files_of_the_tiny_model_compute_the_same() {
    let scratch = Scratch::new("gemma-both");
    let logits = |path: &Path| decoder_logits(&Model::open(path).expect("the tiny model opens"), &tokens());
    let floats = logits(&gemma::tiny_safetensors(scratch.path(), WeightType::F32, 3));
    assert_eq!(worst(&floats, &logits(&gemma::tiny_gguf(scratch.path(), WeightType::F32, 3))), 0.0);
    let eight = logits(&gemma::tiny_gguf(scratch.path(), WeightType::Q8_0, 3));
    let cosines: Vec<f64> = floats.iter().zip(&eight).map(|(a, b)| cosine(a, b)).collect();
    let mean = cosines.iter().sum::<f64>() / cosines.len() as f64;
    assert!(mean > 0.999, "mean cosine of 8-bit weights {mean}");
}

#[test]
fn the_plain_forward_is_candles_too() {
    let scratch = Scratch::new("gemma-reference");
    let folder = gemma::tiny_safetensors(scratch.path(), WeightType::F32, 4);
    let model = Model::open(&folder).expect("the tiny model opens");
    let worst = worst(&candle(&folder, &tokens()), &reference::logits(&model, &tokens(), 0..TOKENS));
    assert!(worst < 1e-3, "{worst}");
}

#[test]
fn the_real_file_agrees_with_a_plain_f32_forward() {
    let Some(path) = gemma_model() else { return };
    let model = Model::open(&path).expect("Gemma 3 opens");
    let tokens = model.tokenizer.encode(TEXT, true).expect("plain text");
    let tokens = &tokens[..48];
    let expected = reference::logits(&model, tokens, 32..48);
    let got = &decoder_logits(&model, tokens)[32..];
    let cosines: Vec<f64> = expected.iter().zip(got).map(|(e, g)| cosine(e, g)).collect();
    let mean = cosines.iter().sum::<f64>() / cosines.len() as f64;
    let same = expected.iter().zip(got).filter(|(e, g)| argmax(e) == argmax(g)).count();
    println!(
        "cosine mean {mean:.6}, worst {:.6}; same most likely token {same} of 16",
        cosines.iter().fold(1.0, |a: f64, b| a.min(*b))
    );
    assert!(mean > 0.998 && same >= 14, "mean cosine {mean}, same most likely token {same} of 16");
}
