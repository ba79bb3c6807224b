//! What the step loop needs of a model, so that tests can put a small one in its place.

use cupola_kernels::{Draw, Drawn, Turn};
use cupola_models::{Batch, Decoder};

/// Why a batch was not computed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunError {
    /// One sentence.
    pub message: String,
    /// The runner cannot go on: its device has failed, and what lies there can no longer be trusted.
    pub fatal: bool,
}

impl From<String> for RunError {
    fn from(message: String) -> Self {
        Self { message, fatal: false }
    }
}

impl From<cupola_models::Error> for RunError {
    fn from(error: cupola_models::Error) -> Self {
        let fatal = matches!(error, cupola_models::Error::Kernel(cupola_kernels::Error::Device { .. }));
        Self { message: error.to_string(), fatal }
    }
}

/// Runs forward passes. Logits of the last pass stay readable until the next one, tokens that it has chosen until the next one
/// of the same turn.
pub trait ModelRunner: Send {
    /// Tokens of the vocabulary, the length of a row of logits.
    fn vocab_size(&self) -> usize;

    /// True when [`ModelRunner::forward`] returns before the work is done: whoever wants the results waits for them, and
    /// may do something else before.
    fn is_asynchronous(&self) -> bool {
        false
    }

    /// Computes all rows of a batch, or submits that.
    ///
    /// # Errors
    /// The requests of this batch then fail, and the engine goes on unless the error is fatal.
    fn forward(&mut self, batch: &Batch) -> Result<(), RunError>;

    /// What the last batch of this turn has chosen for each output row, for [`cupola_kernels::drawn`]: after a batch with
    /// `greedy` set the most likely tokens, else those of [`ModelRunner::submit_draws`]. Waits for them. A runner that is not
    /// asynchronous has those of the last batch alone.
    ///
    /// # Errors
    /// As [`ModelRunner::forward`], for work that was submitted before.
    fn chosen(&mut self, turn: Turn) -> Result<&[u32], RunError>;

    /// True when a batch may have rows whose tokens the batch before has chosen ([`Batch::carried`]), submitted before these
    /// are read. Such a runner has [`ModelRunner::submit_draws`] if it draws tokens at all.
    fn carries(&self) -> bool {
        false
    }

    /// Draws a token for every output row of the last batch, without waiting: [`ModelRunner::chosen`] has them. Only for a
    /// runner that carries and draws tokens, after a batch without `greedy`.
    ///
    /// # Errors
    /// As [`ModelRunner::forward`].
    fn submit_draws(&mut self, _draws: &[Draw<'_>]) -> Result<(), RunError> {
        Err("this runner draws no tokens".to_owned().into())
    }

    /// Runs `f(i, logits)` for the `i`-th output row of the last batch, several at a time; only after a batch without
    /// `greedy`. `f` may change the logits.
    ///
    /// # Errors
    /// As [`ModelRunner::forward`].
    fn for_each_logits(&mut self, f: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<(), RunError>;

    /// True when [`ModelRunner::draw`] draws tokens where the logits are.
    fn draws(&self) -> bool {
        false
    }

    /// For a runner that draws tokens, as [`ModelRunner::for_each_logits`], with a place in `draws` for every output row: where there is a
    /// draw, its token goes to `drawn`, one after the other, and `f` runs for the other rows alone.
    ///
    /// # Errors
    /// As [`ModelRunner::forward`].
    fn draw(
        &mut self,
        _draws: &[Option<Draw<'_>>],
        _drawn: &mut Vec<Drawn>,
        _f: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> Result<(), RunError> {
        Err("this runner draws no tokens".to_owned().into())
    }
}

impl ModelRunner for Decoder {
    fn vocab_size(&self) -> usize {
        self.spec().vocab
    }

    fn is_asynchronous(&self) -> bool {
        Decoder::is_asynchronous(self)
    }

    fn forward(&mut self, batch: &Batch) -> Result<(), RunError> {
        Ok(Decoder::forward(self, batch)?)
    }

    fn chosen(&mut self, turn: Turn) -> Result<&[u32], RunError> {
        Ok(Decoder::chosen(self, turn)?)
    }

    fn carries(&self) -> bool {
        Decoder::carries(self)
    }

    fn submit_draws(&mut self, draws: &[Draw<'_>]) -> Result<(), RunError> {
        Ok(Decoder::submit_draws(self, draws)?)
    }

    fn for_each_logits(&mut self, f: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<(), RunError> {
        Ok(Decoder::for_each_logits(self, f)?)
    }

    fn draws(&self) -> bool {
        Decoder::draws(self)
    }

    fn draw(
        &mut self,
        draws: &[Option<Draw<'_>>],
        drawn: &mut Vec<Drawn>,
        f: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> Result<(), RunError> {
        Ok(Decoder::draw(self, draws, drawn, f)?)
    }
}
