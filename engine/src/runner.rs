//! What the step loop needs of a model, so that tests can put a small one in its place.

use cupola_models::{Batch, Decoder};

/// Runs forward passes. Results of the last pass stay readable until the next one.
pub trait ModelRunner: Send {
    /// Tokens of the vocabulary, the length of a row of logits.
    fn vocab_size(&self) -> usize;

    /// Computes all rows of a batch.
    ///
    /// # Errors
    /// One sentence; the requests of this batch then fail, and the engine goes on.
    fn forward(&mut self, batch: &Batch) -> Result<(), String>;

    /// The most likely token of each output row of the last batch; only after a batch with `greedy` set.
    fn argmax(&self) -> &[u32];

    /// Runs `f(i, logits)` for the `i`-th output row of the last batch, several at a time; only after a batch without
    /// `greedy`. `f` may change the logits.
    ///
    /// # Errors
    /// One sentence; the requests of this batch then fail, and the engine goes on.
    fn for_each_logits(&mut self, f: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<(), String>;
}

impl ModelRunner for Decoder {
    fn vocab_size(&self) -> usize {
        self.spec().vocab
    }

    fn forward(&mut self, batch: &Batch) -> Result<(), String> {
        Decoder::forward(self, batch).map_err(|error| error.to_string())
    }

    fn argmax(&self) -> &[u32] {
        Decoder::argmax(self)
    }

    fn for_each_logits(&mut self, f: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<(), String> {
        Decoder::for_each_logits(self, f).map_err(|error| error.to_string())
    }
}
