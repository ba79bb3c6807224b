//! Medians, spreads and ratios of a record, as a Markdown table and as JSON.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::record::{FAILED, Metric, Record, metric_of};
use crate::bench::stats::Sorted;

/// Median and range of a value over the rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Middle value.
    pub median: f64,
    /// Least value.
    pub min: f64,
    /// Greatest value.
    pub max: f64,
    /// How many.
    pub rounds: usize,
}

impl Spread {
    fn new(values: &[f64]) -> Option<Self> {
        let sorted = Sorted::new(values);
        (!values.is_empty()).then(|| Self {
            median: sorted.median(),
            min: sorted.percentile(0.0),
            max: sorted.percentile(100.0),
            rounds: values.len(),
        })
    }
}

/// One test of all engines.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The test as the record names it.
    pub test: String,
    /// In words.
    pub label: String,
    /// What its values are.
    pub metric: Metric,
    /// One an engine, in the order of [`Summary::engines`].
    pub values: Vec<Option<Spread>>,
    /// The first engine's value over each other's: the ratio of the medians, and the range of those of single rounds.
    pub ratios: Vec<Option<Spread>>,
}

/// What a record says.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// The record's head.
    pub head: String,
    /// Engines, the one that is compared first.
    pub engines: Vec<String>,
    /// Tests, in the order of the record.
    pub rows: Vec<Row>,
}

impl Summary {
    /// Sums a record up.
    pub fn new(record: &Record) -> Self {
        let unique = |of: fn(&super::record::Sample) -> &String| {
            let mut found: Vec<String> = Vec::new();
            for sample in &record.samples {
                if !found.contains(of(sample)) {
                    found.push(of(sample).clone());
                }
            }
            found
        };
        let (engines, tests) = (unique(|sample| &sample.engine), unique(|sample| &sample.test));
        let row = |test: String| {
            let of = |engine: &String| {
                let samples = record.samples.iter().filter(|s| s.engine == *engine && s.test == test);
                samples.map(|s| (s.round, s.value)).collect::<Vec<_>>()
            };
            let series: Vec<Vec<(usize, f64)>> = engines.iter().map(of).collect();
            let values: Vec<Option<Spread>> = series
                .iter()
                .map(|series| Spread::new(&series.iter().map(|(_, value)| *value).collect::<Vec<_>>()))
                .collect();
            let ratios = (1..engines.len()).map(|other| {
                let (ours, theirs) = (values[0]?, values[other]?);
                let pairs = series[0].iter().filter_map(|(round, ours)| {
                    let theirs = series[other].iter().find(|(r, _)| r == round)?.1;
                    (theirs > 0.0).then(|| ours / theirs)
                });
                let spread = Spread::new(&pairs.collect::<Vec<_>>())?;
                (theirs.median > 0.0).then(|| Spread { median: ours.median / theirs.median, ..spread })
            });
            let (metric, label) = metric_of(&test);
            Row { label, metric, ratios: ratios.collect(), values, test }
        };
        Self { head: record.head.clone(), rows: tests.into_iter().map(row).collect(), engines }
    }

    /// Rows worth reading: failures only where there are any.
    pub fn shown(&self) -> impl Iterator<Item = &Row> {
        let any = |row: &&Row| row.values.iter().flatten().any(|value| value.max > 0.0);
        self.rows.iter().filter(move |row| row.metric.key != FAILED || any(row))
    }

    /// A Markdown table: median and, in parentheses, the range over the rounds.
    pub fn markdown(&self) -> String {
        let mut heading = vec![String::new()];
        heading.extend(self.engines.iter().cloned());
        heading.extend(self.engines.iter().skip(1).map(|other| format!("{} / {other}", self.engines[0])));
        let mut lines = vec![heading];
        for row in self.shown() {
            let unit = if row.metric.unit.is_empty() { String::new() } else { format!(", {}", row.metric.unit) };
            let mut line = vec![format!("{}{unit}", row.label)];
            line.extend(row.values.iter().map(|value| cell(*value, number, "")));
            line.extend(row.ratios.iter().map(|ratio| cell(*ratio, ratio_number, "x")));
            lines.push(line);
        }
        let columns = lines[0].len();
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for (index, line) in lines.iter().enumerate() {
            let cells: Vec<String> = (0..columns)
                .map(|c| match c {
                    0 => format!("{:<width$}", line[c], width = widths[c]),
                    _ => format!("{:>width$}", line[c], width = widths[c]),
                })
                .collect();
            writeln!(text, "| {} |", cells.join(" | ")).expect("writing to a string cannot fail");
            if index == 0 {
                let rule = |c: usize| if c == 0 { "-".repeat(widths[c]) } else { "-".repeat(widths[c] - 1) + ":" };
                let rules: Vec<String> = (0..columns).map(rule).collect();
                writeln!(text, "| {} |", rules.join(" | ")).expect("writing to a string cannot fail");
            }
        }
        text
    }

    /// The same for programs.
    pub fn json(&self) -> Value {
        let spread = |s: &Spread| json!({"median": s.median, "min": s.min, "max": s.max, "rounds": s.rounds});
        let named = |names: &[String], values: &[Option<Spread>]| {
            let pairs = names.iter().zip(values);
            pairs.map(|(name, value)| (name.clone(), value.as_ref().map_or(Value::Null, spread))).collect::<Map<_, _>>()
        };
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                json!({
                    "test": row.test,
                    "unit": row.metric.unit,
                    "more_is_better": row.metric.more_is_better,
                    "engines": named(&self.engines, &row.values),
                    "ratios": named(&self.engines[1..], &row.ratios),
                })
            })
            .collect();
        json!({"head": self.head, "engines": self.engines, "tests": rows})
    }
}

fn cell(value: Option<Spread>, show: fn(f64) -> String, mark: &str) -> String {
    match value {
        None => "-".to_owned(),
        Some(Spread { median, rounds: 1, .. }) => format!("{}{mark}", show(median)),
        Some(Spread { median, min, max, .. }) => format!("{}{mark} ({}..{})", show(median), show(min), show(max)),
    }
}

/// Three digits or all of the whole part.
fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || v == 0.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// A ratio with two or three digits.
pub(super) fn ratio_number(value: f64) -> String {
    if value >= 10.0 {
        format!("{value:.0}")
    } else if value >= 1.95 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}
