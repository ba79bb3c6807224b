//! Why a command failed: one sentence for the user and an exit code for the shell.

use std::process::ExitCode;

/// An error of a command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Flags that cannot go together or values that mean nothing. Exit code 2, as clap's own.
    #[error("{0}")]
    Usage(String),
    /// The model could not be found, fetched or opened.
    #[error(transparent)]
    Model(#[from] cupola_models::Error),
    /// The engine refused to start.
    #[error(transparent)]
    Engine(#[from] cupola_engine::Error),
    /// A kernel refused, outside of the engine.
    #[error(transparent)]
    Kernel(#[from] cupola_kernels::Error),
    /// The engine refused a request.
    #[error(transparent)]
    Submit(#[from] cupola_engine::SubmitError),
    /// The server could not start.
    #[error(transparent)]
    Serve(#[from] crate::listen::ServeError),
    /// The benchmark could not begin.
    #[error("{source}; {hint}")]
    Client {
        /// Cause.
        source: crate::bench::serve::ClientError,
        /// What to do.
        hint: String,
    },
    /// A file or stream.
    #[error("cannot {what}: {source}")]
    Io {
        /// The verb and its object.
        what: String,
        /// Cause.
        source: std::io::Error,
    },
    /// Standard output, or a result that could not be written to it.
    #[error("cannot write the result: {0}")]
    Output(#[from] std::io::Error),
    /// Ctrl-C ended the one thing that was asked for. Exit code 130, as shells have it.
    #[error("stopped")]
    Interrupted,
    /// Anything that one sentence says in full.
    #[error("{0}")]
    Failed(String),
}

impl Error {
    /// A wrapper for `map_err` on I/O: `what` is a verb and its object, such as `read keys.txt`.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// Nothing that the user should hear about: they stopped the command, or closed its output (`cupola models | head`).
    pub(crate) fn is_silent(&self) -> bool {
        matches!(self, Self::Interrupted) || self.is_broken_pipe()
    }

    fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output(source) if source.kind() == std::io::ErrorKind::BrokenPipe)
    }

    /// 2 for usage, 1 for everything else.
    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Usage(_) | Self::Serve(crate::listen::ServeError::Config(_)) => ExitCode::from(2),
            Self::Interrupted => ExitCode::from(130),
            _ if self.is_broken_pipe() => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        }
    }
}
