//! Cupola and its peers in turn (A B A B ...) on one model file: the same load, the same client, one record.
//!
//! ```text
//!   for each round, for each engine:
//!     kernel   cupola bench kernel | llama-bench | llama-batched-bench    one process a run, its JSON read
//!     serve    start -> /health -> first token -> workloads -> peak memory -> stop    or a URL that is there already
//!                 |                                   |
//!              process.rs: log file, own group,       +--> Sample { round, engine, test, value }
//!              stopped on drop                                  |
//!                              record.rs: CSV <-----------------+------> summary.rs: medians, ratios --> plot.rs: SVG
//! ```
//!
//! Turns keep a machine that grows warm or busy from favouring either side; nothing that fails is left out. The record is
//! written after each turn: what was measured before a failure, hours into a comparison, is not lost.

pub mod engine;
pub mod kernel;
pub mod plot;
mod process;
pub mod record;
pub mod serve;
pub mod summary;

use std::path::PathBuf;

use self::record::Sample;
use super::serve::ClientError;

/// Why a comparison ended. Each message is one sentence, then what the peer said last.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompareError {
    /// A program that is not there or not executable.
    #[error("cannot start {program}: {source}; {hint}")]
    Start {
        /// The program.
        program: String,
        /// Cause.
        source: std::io::Error,
        /// Where it could be named.
        hint: String,
    },
    /// A program that ended when it should not, or badly.
    #[error("{engine} {how}; its last lines:\n{lines}\nall of its output: {}", log.display())]
    Died {
        /// The engine.
        engine: String,
        /// What it did, as a predicate.
        how: String,
        /// Its last lines.
        lines: String,
        /// Its whole output.
        log: PathBuf,
    },
    /// Output of a benchmark that is not as expected.
    #[error("the output of {program} makes no sense: {what}")]
    Output {
        /// The program.
        program: String,
        /// What was expected.
        what: String,
    },
    /// The load could not begin.
    #[error("{engine}: {source}")]
    Load {
        /// The engine.
        engine: String,
        /// Cause.
        source: ClientError,
    },
    /// A file, a socket or a process of our own.
    #[error("cannot {what}: {source}")]
    Io {
        /// The verb and its object.
        what: String,
        /// Cause.
        source: std::io::Error,
    },
}

impl CompareError {
    fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// Hears each value as it is measured, and what is under way.
pub trait Watch {
    /// A value.
    fn sample(&mut self, sample: &Sample);
    /// A sentence for a person.
    fn note(&mut self, text: &str);
    /// An engine has had its turn; all values so far.
    fn turn_ended(&mut self, samples: &[Sample]);
}

/// Collects samples and passes them on.
struct Recorder<'a> {
    samples: Vec<Sample>,
    watch: &'a mut dyn Watch,
}

impl Recorder<'_> {
    fn add(&mut self, (round, engine): (usize, &str), test: impl Into<String>, value: f64) {
        let sample = Sample { round, engine: engine.to_owned(), test: test.into(), value };
        self.watch.sample(&sample);
        self.samples.push(sample);
    }

    fn turn_ended(&mut self) {
        self.watch.turn_ended(&self.samples);
    }
}

#[cfg(test)]
mod tests;
