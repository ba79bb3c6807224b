//! Perplexity of a text, counted as llama.cpp's `llama-perplexity` counts it.
//!
//! ```text
//!   tokens of the text    | window of C | window of C | window of C |  rest is left out
//!   one window            | first half: context | second half: each token is scored given all before it |
//! ```
//!
//! A window begins with the model's beginning-of-sequence token, where its vocabulary adds one, in place of the text's own
//! first token. `perplexity = e^(mean of -ln p)`, natural logarithms.

use std::sync::Mutex;

use cupola_kernels::kv::blocks_for;
use cupola_kernels::{Backend, BlockId, KvType};
use cupola_models::decoder::{Decoder, DecoderLimits};
use cupola_models::{Batch, Model};

/// Most tokens of one forward pass.
const CHUNK: usize = 512;

/// How well a model foretells a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Perplexity {
    /// Windows that the text filled.
    pub windows: usize,
    /// Tokens that were scored.
    pub scored: usize,
    /// Sum of `-ln p` of the scored tokens.
    pub nats: f64,
    /// Sum of its squares.
    pub squares: f64,
}

impl Perplexity {
    /// `e^(mean of -ln p)`
    pub fn value(&self) -> f64 {
        self.mean().exp()
    }

    /// Standard error of [`Perplexity::value`], from the spread of the tokens' own `-ln p`.
    pub fn error(&self) -> f64 {
        let variance = self.squares / self.scored as f64 - self.mean().powi(2);
        self.value() * (variance.max(0.0) / self.scored.saturating_sub(1).max(1) as f64).sqrt()
    }

    fn mean(&self) -> f64 {
        self.nats / self.scored as f64
    }
}

/// Scores `tokens` in windows of `context`, at least 4, with keys and values stored as `kv_type`; `bos` takes the first
/// place of each. `watch` is called after each window with what there is so far. `None` when the text does not fill one
/// window.
///
/// # Errors
/// A model that the backend cannot load.
pub fn measure(
    model: &Model,
    backend: Box<dyn Backend>,
    (tokens, bos): (&[u32], Option<u32>),
    (context, kv_type): (usize, KvType),
    watch: &mut dyn FnMut(&Perplexity, usize),
) -> cupola_models::Result<Option<Perplexity>> {
    let blocks = blocks_for(context);
    let limits = DecoderLimits {
        max_batch_tokens: CHUNK.min(context),
        max_seqs: 1,
        kv_blocks: blocks,
        kv_type,
        max_model_len: context,
    };
    let mut decoder = Decoder::load(model, backend, limits, &mut |_, _| {})?;
    let table: Vec<BlockId> = (0..).map(BlockId).take(blocks).collect();
    let mut total = Perplexity { windows: 0, scored: 0, nats: 0.0, squares: 0.0 };
    let mut batch = Batch::default();
    let windows = tokens.chunks_exact(context);
    let count = windows.len();
    for window in windows {
        let mut window = window.to_vec();
        if let Some(bos) = bos {
            window[0] = bos;
        }
        for start in (0..context).step_by(limits.max_batch_tokens) {
            let end = context.min(start + limits.max_batch_tokens);
            batch.clear();
            batch.push(&window[start..end], start, &table[..blocks_for(end)]);
            // The last token of a window foretells nothing that is scored.
            let first = start.max(context / 2);
            batch.outputs.extend((first..end.min(context - 1)).map(|position| (position - start) as u32));
            decoder.forward(&batch)?;
            let scores = Mutex::new(Vec::with_capacity(batch.outputs.len()));
            decoder.for_each_logits(&|index, logits| {
                let score = nats(logits, window[first + index + 1] as usize);
                scores.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((index, score));
            })?;
            // Rows come in any order; sums of floats must not.
            let mut scores = scores.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
            scores.sort_unstable_by_key(|(index, _)| *index);
            for (_, score) in scores {
                total.scored += 1;
                total.nats += score;
                total.squares += score * score;
            }
        }
        total.windows += 1;
        watch(&total, count);
    }
    Ok((total.windows > 0).then_some(total))
}

/// `-ln softmax(logits)[token]`
fn nats(logits: &[f32], token: usize) -> f64 {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - top).exp()).sum();
    sum.ln() - f64::from(logits[token] - top)
}

#[cfg(test)]
mod tests {
    use cupola_kernels::WeightType;
    use cupola_kernels::cpu::{CpuBackend, CpuConfig};
    use cupola_models::testing::{Scratch, tiny_gguf};

    use super::*;

    /// The same, one token of one window at a time.
    fn plainly(model: &Model, backend: Box<dyn Backend>, window: &[u32]) -> f64 {
        let blocks = blocks_for(window.len());
        let limits = DecoderLimits {
            max_batch_tokens: 1,
            max_seqs: 1,
            kv_blocks: blocks,
            kv_type: KvType::F16,
            max_model_len: window.len(),
        };
        let mut decoder = Decoder::load(model, backend, limits, &mut |_, _| {}).unwrap();
        let table: Vec<BlockId> = (0..).map(BlockId).take(blocks).collect();
        let sum = Mutex::new(0.0);
        for position in 0..window.len() - 1 {
            let mut batch = Batch::default();
            batch.push(&window[position..=position], position, &table[..blocks_for(position + 1)]);
            batch.outputs.push(0);
            decoder.forward(&batch).unwrap();
            let next = window[position + 1] as usize;
            decoder
                .for_each_logits(&|_, logits| {
                    if position >= window.len() / 2 {
                        *sum.lock().unwrap() += nats(logits, next);
                    }
                })
                .unwrap();
        }
        sum.into_inner().unwrap()
    }

    #[test]
    fn windows_are_scored_as_token_by_token() {
        let folder = Scratch::new("perplexity");
        let model = Model::open(&tiny_gguf(folder.path(), WeightType::Q8_0, 3)).unwrap();
        let backend = || Box::new(CpuBackend::new(CpuConfig { threads: Some(2), ..CpuConfig::default() }).unwrap());
        let tokens: Vec<u32> = (0..100).map(|i| (i * 7 + i * i % 11) % model.spec.vocab as u32).collect();
        let mut seen = 0;
        let got =
            measure(&model, backend(), (&tokens, Some(1)), (40, KvType::F16), &mut |_, _| seen += 1).unwrap().unwrap();
        assert_eq!((got.windows, got.scored, seen), (2, 2 * 19, 2), "the rest is left out");
        let expected: f64 = [&tokens[..40], &tokens[40..80]]
            .into_iter()
            .map(|window| plainly(&model, backend(), &[&[1], &window[1..]].concat()))
            .sum();
        assert!((got.nats - expected).abs() < 1e-9 * expected, "{} {expected}", got.nats);
        assert!(measure(&model, backend(), (&tokens, None), (101, KvType::F16), &mut |_, _| ()).unwrap().is_none());
    }

    #[test]
    fn equal_logits_are_as_perplexing_as_there_are_tokens() {
        assert!((nats(&[2.5; 50], 7).exp() - 50.0).abs() < 1e-9);
        assert!((nats(&[0.0, (3.0f32).ln()], 1).exp() - 4.0 / 3.0).abs() < 1e-6);
    }

    #[test]
    fn the_error_follows_the_spread() {
        let even = Perplexity { windows: 1, scored: 4, nats: 8.0, squares: 16.0 };
        assert!((even.value() - 2f64.exp()).abs() < 1e-9 && even.error() < 1e-9);
        let spread = Perplexity { squares: 20.0, ..even };
        assert!((spread.error() - 2f64.exp() * (1.0f64 / 3.0).sqrt()).abs() < 1e-9);
    }
}
