//! What can go wrong between a model's name and a loaded model.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the models crate. Every message is one sentence that names the file or tensor and what would be right.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder that cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// A weight or tokenizer file that breaks its format.
    #[error("{path} is damaged or not a model file: {what}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What was expected and found.
        what: String,
    },
    /// A tensor, key or file that the model needs and does not have.
    #[error("{path} has no {what}")]
    Missing {
        /// File or folder looked in.
        path: PathBuf,
        /// What is missing.
        what: String,
    },
    /// Something recognised that Cupola cannot run.
    #[error("{what} is not supported: {hint}")]
    Unsupported {
        /// The architecture, type or option.
        what: String,
        /// What is supported.
        hint: String,
    },
    /// Text that the tokenizer refused.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A chat template that failed to parse or to render.
    #[error("chat template: {0}")]
    Template(String),
    /// A model name that names nothing.
    #[error("unknown model {name:?}: {hint}")]
    UnknownModel {
        /// The name as given.
        name: String,
        /// What would be right.
        hint: String,
    },
    /// Every source of a model failed.
    #[error("could not fetch {name}: {tried}")]
    Fetch {
        /// The model.
        name: String,
        /// Each source with its reason.
        tried: String,
    },
    /// A kernel refused.
    #[error(transparent)]
    Kernel(#[from] cupola_kernels::Error),
}
