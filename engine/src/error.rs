//! What can go wrong at start, and why a request may be refused.

use std::time::Duration;

/// An error of starting or planning an engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting that cannot work.
    #[error("{field} must be {expected}, got {got}")]
    Config {
        /// Field of [`crate::EngineConfig`].
        field: &'static str,
        /// What would be right.
        expected: String,
        /// What came.
        got: String,
    },
    /// Memory that is not there.
    #[error("{what} needs {needed} bytes and {available} are available; {fits}")]
    Memory {
        /// What was asked for.
        what: String,
        /// Bytes it takes.
        needed: u64,
        /// Bytes there are.
        available: u64,
        /// The number that would fit, and the setting to put it in.
        fits: String,
    },
    /// A device that is not there.
    #[error("{device} cannot be used: {why}; choose {instead}")]
    Device {
        /// The device asked for.
        device: String,
        /// Why not.
        why: String,
        /// Devices that would work.
        instead: String,
    },
    /// A device whose memory ran out while the model was loaded, although the plan fitted.
    #[error("the device ran out of memory: {source}; planned were\n{plan}\n{fits}")]
    DeviceMemory {
        /// What the backend said.
        source: cupola_kernels::Error,
        /// The plan as a table.
        plan: String,
        /// The number that would fit, and the setting to put it in.
        fits: String,
    },
    /// The model could not be loaded.
    #[error(transparent)]
    Model(#[from] cupola_models::Error),
    /// A kernel refused.
    #[error(transparent)]
    Kernel(#[from] cupola_kernels::Error),
    /// The engine's thread could not be started.
    #[error("cannot start the engine thread: {0}")]
    Thread(std::io::Error),
}

/// Why a request was not taken. Nothing has been computed for it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// Too many requests or prompt tokens wait already.
    #[error("the queue is full: {queued} of at most {limit} {unit} are waiting")]
    QueueFull {
        /// Requests or tokens waiting now.
        queued: usize,
        /// The limit they reached.
        limit: usize,
        /// `requests` or `prompt tokens`.
        unit: &'static str,
        /// When to try again, from the backlog and the measured prefill rate.
        retry_after: Duration,
    },
    /// The prompt leaves no room for an answer.
    #[error("the prompt has {prompt} tokens; the context holds {max} with the answer")]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Longest prompt plus answer.
        max: usize,
    },
    /// A prompt without tokens.
    #[error("the prompt is empty; it needs at least one token")]
    Empty,
    /// A token id that the model does not have.
    #[error("token {token} is out of range; the vocabulary has {vocab} tokens")]
    TokenOutOfRange {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A sampling or stop parameter outside its range.
    #[error("{name} {message}")]
    InvalidParameter {
        /// Field name.
        name: &'static str,
        /// What would be right, and what came.
        message: String,
    },
    /// The engine takes no new requests.
    #[error("the engine is shutting down")]
    ShuttingDown,
    /// The engine stopped after a fault.
    #[error("the engine has stopped after a fault")]
    Dead,
}
