//! Records of comparisons: one value a line, as committed under `benches/record/`.
//!
//! ```text
//!   # 2026-11-22 CPU, threads, command, versions
//!   round,engine,test,value
//!   0,cupola,pp512,890.127                      kernel: tokens a second
//!   0,llama.cpp,c16 median_ttft_ms,11713.9      serve: workload and metric
//! ```

use std::fmt::Write as _;

/// From the start of the process to the end of its first token, in seconds.
pub const LOAD: &str = "load_s";
/// Peak resident memory, in MiB.
pub const BYTES: &str = "peak_rss_mib";
/// Requests that failed.
pub const FAILED: &str = "failed";

/// One measured value.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Round, from 0.
    pub round: usize,
    /// Who.
    pub engine: String,
    /// What: a kernel test, or workload and metric.
    pub test: String,
    /// How much, in the metric's unit.
    pub value: f64,
}

/// What the last word of a test's name says about its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// The last word; empty for kernel tests, which have none.
    pub key: &'static str,
    /// In words, after the workload.
    pub label: &'static str,
    /// Unit.
    pub unit: &'static str,
    /// More is better.
    pub more_is_better: bool,
}

const KERNEL: Metric = Metric { key: "", label: "", unit: "tok/s", more_is_better: true };
const METRICS: [Metric; 7] = [
    Metric { key: "output_throughput", label: "output", unit: "tok/s", more_is_better: true },
    Metric { key: "median_ttft_ms", label: "median time to first token", unit: "ms", more_is_better: false },
    Metric { key: "median_itl_ms", label: "median inter-token latency", unit: "ms", more_is_better: false },
    Metric { key: "duration", label: "total time", unit: "s", more_is_better: false },
    Metric { key: FAILED, label: "failed requests", unit: "", more_is_better: false },
    Metric { key: LOAD, label: "process start to first token", unit: "s", more_is_better: false },
    Metric { key: BYTES, label: "peak resident memory", unit: "MiB", more_is_better: false },
];

/// The metric of a test, and the test's name in words.
pub fn metric_of(test: &str) -> (Metric, String) {
    let (workload, key) = test.rsplit_once(' ').unwrap_or(("", test));
    match METRICS.iter().find(|metric| metric.key == key) {
        Some(metric) if workload.is_empty() => (*metric, metric.label.to_owned()),
        Some(metric) => (*metric, format!("{workload} {}", metric.label)),
        None => (KERNEL, test.to_owned()),
    }
}

/// A head line and its values.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// When, where and how, in one line.
    pub head: String,
    /// The values, in the order they were measured.
    pub samples: Vec<Sample>,
}

impl Record {
    /// The file's text.
    pub fn csv(&self) -> String {
        let mut text = format!("# {}\nround,engine,test,value\n", self.head);
        for sample in &self.samples {
            writeln!(text, "{},{},{},{:.3}", sample.round, sample.engine, sample.test, sample.value)
                .expect("writing to a string cannot fail");
        }
        text
    }

    /// Reads what [`Record::csv`] wrote.
    ///
    /// # Errors
    /// A sentence that names the line.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut head = String::new();
        let mut samples = Vec::new();
        for (index, line) in text.lines().enumerate() {
            if let Some(comment) = line.strip_prefix('#') {
                head = comment.trim().to_owned();
                continue;
            }
            if line.is_empty() || line == "round,engine,test,value" {
                continue;
            }
            let cells: Vec<&str> = line.split(',').collect();
            let sample =
                match cells[..] {
                    [round, engine, test, value] => round.parse().ok().zip(value.parse().ok()).map(|(round, value)| {
                        Sample { round, engine: engine.to_owned(), test: test.to_owned(), value }
                    }),
                    _ => None,
                };
            samples.push(sample.ok_or_else(|| format!("line {}: expected round,engine,test,value", index + 1))?);
        }
        if samples.is_empty() { Err("it holds no values".to_owned()) } else { Ok(Self { head, samples }) }
    }
}
