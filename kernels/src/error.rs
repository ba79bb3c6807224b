//! What can go wrong when weights are packed or an op is called.

/// Result of a kernel call.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the kernels crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Sizes that do not fit together.
    #[error("{op}: expected {expected}, got {got}")]
    Shape {
        /// The op or loader that refused.
        op: &'static str,
        /// What would have been right.
        expected: String,
        /// What came.
        got: String,
    },
    /// A weight type or shape that no kernel takes.
    #[error("weight type {ty} of shape [{rows}, {cols}] is not supported: {why}")]
    UnsupportedWeight {
        /// Name of the type.
        ty: &'static str,
        /// Output features.
        rows: usize,
        /// Input features.
        cols: usize,
        /// Reason.
        why: &'static str,
    },
    /// Memory that the system would not give.
    #[error("cannot allocate {bytes} bytes for {what}")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// Their purpose.
        what: &'static str,
    },
    /// A CPU path that was asked for and cannot run here.
    #[error("instruction set {asked:?} is not available on this machine; it has: {available}")]
    Isa {
        /// The name asked for.
        asked: String,
        /// Names that would work.
        available: String,
    },
    /// Worker threads that the system would not start.
    #[error("cannot start {count} worker threads: {source}")]
    Threads {
        /// Threads asked for.
        count: usize,
        /// Cause.
        source: std::io::Error,
    },
    /// A device, or its driver, that failed. What failed once usually keeps failing.
    #[error("{what}: {why}")]
    Device {
        /// What was tried.
        what: String,
        /// The driver's name and text of the error.
        why: String,
    },
    /// A file of packed weights that could not be written.
    #[error("cannot write packed weights to {path}: {source}")]
    PackedFile {
        /// The file.
        path: std::path::PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// A file that could not be mapped.
    #[error("cannot map {path}: {source}")]
    Map {
        /// The file.
        path: std::path::PathBuf,
        /// Cause.
        source: std::io::Error,
    },
}
