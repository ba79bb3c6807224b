//! Numbers: weight types against candle, the decoder against a plain f32 forward pass and candle-transformers.
//!
//! Cupola multiplies 4-bit weights with 8-bit activations, so its logits differ from exact ones by a few percent of
//! their spread; direction (cosine) and the most likely token must agree.

mod formats;
mod gemma;
mod reference;

use candle_core::quantized::gguf_file;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use cupola_models::Model;

use crate::support::{cosine, decoder_logits, default_model};

/// About 200 tokens of plain English.
const TEXT: &str = "The lighthouse stood at the end of the long stone pier, and every evening its keeper climbed the \
    ninety-two steps to light the lamp. He had done so for thirty years. In winter the wind pushed against the door so \
    hard that he had to lean on it with his shoulder, and in summer the children of the village came to ask him how far \
    the light could be seen. Twenty miles, he always said, on a clear night, and half of that in rain. One day a letter \
    arrived from the city. It said that the lamp would soon be lit by a machine, and that the keeper could go home. He \
    read the letter twice, folded it, and put it into his pocket. Then he climbed the steps, because it was getting \
    dark, and lit the lamp. The ships that passed that night saw the same light as always, and their captains wrote in \
    their books that all was well. In the morning he wrote a short answer to the city.";

fn argmax(values: &[f32]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

#[test]
fn logits_agree_with_a_plain_f32_forward() {
    let Some(path) = default_model() else { return };
    let model = Model::open(&path).expect("the default model opens");
    let tokens = model.tokenizer.encode(TEXT, true).expect("plain text");
    let tokens = &tokens[..tokens.len().min(200)];
    let expected = reference::logits(&model, tokens, 0..tokens.len());
    let got = decoder_logits(&model, tokens);

    let mut same_argmax = 0;
    let mut worst = 1.0f64;
    for (expected, got) in expected.iter().zip(&got) {
        same_argmax += usize::from(argmax(expected) == argmax(got));
        worst = worst.min(cosine(expected, got));
    }
    let mean = expected.iter().zip(&got).map(|(e, g)| cosine(e, g)).sum::<f64>() / got.len() as f64;
    let last = tokens.len() - 1;
    println!(
        "{} positions: cosine mean {mean:.6}, worst {worst:.6}; same most likely token at {same_argmax}",
        tokens.len()
    );
    assert!(mean > 0.999, "mean cosine {mean}");
    assert_eq!(argmax(&expected[last]), argmax(&got[last]), "most likely token after the whole text");
    assert!(same_argmax * 100 >= tokens.len() * 95, "same most likely token at only {same_argmax} of {}", tokens.len());
}

#[test]
fn logits_agree_with_candle_transformers() {
    let Some(path) = default_model() else { return };
    let model = Model::open(&path).expect("the default model opens");
    let tokens = model.tokenizer.encode(TEXT, true).expect("plain text");
    let tokens = &tokens[..tokens.len().min(200)];

    let mut file = std::fs::File::open(&path).expect("the model file opens");
    let content = gguf_file::Content::read(&mut file).expect("candle reads the file");
    let mut candle = ModelWeights::from_gguf(content, &mut file, &Device::Cpu).expect("candle loads the model");
    let input = Tensor::new(tokens, &Device::Cpu).and_then(|t| t.unsqueeze(0)).expect("a token tensor");
    let expected = candle.forward(&input, 0).and_then(|t| t.squeeze(0)).and_then(|t| t.to_vec1::<f32>());
    let expected = expected.expect("candle runs the model");

    let got = decoder_logits(&model, tokens).pop().expect("one row of logits a token");
    let cosine = cosine(&expected, &got);
    println!("cosine with candle-transformers after {} tokens: {cosine:.6}", tokens.len());
    assert!(cosine > 0.999, "cosine {cosine}");
    assert_eq!(argmax(&expected), argmax(&got));
}
