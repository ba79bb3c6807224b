//! The table of `bench kernel`, in the formats and with the column names of `llama-bench`.

use std::io::Write;

use cupola_models::ModelInfo;
use serde_json::{Value, json};

use super::Measured;
use crate::bench::stats::{mean, sample_std};

/// How results are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A Markdown table.
    Markdown,
    /// One JSON array.
    Json,
    /// One JSON object a line.
    JsonLines,
    /// Comma-separated values.
    Csv,
}

/// Columns of [`Format::Csv`], keys of the JSON rows. The last three are our own, empty where there is no such number: bytes
/// that a step of a generation test reads, bytes that the device moves in a second, and the share of these that was reached.
const COLUMNS: [&str; 18] = [
    "test",
    "model_filename",
    "model_type",
    "model_size",
    "model_n_params",
    "backends",
    "n_threads",
    "n_ubatch",
    "n_prompt",
    "n_gen",
    "n_depth",
    "n_seqs",
    "avg_ts",
    "stddev_ts",
    "median_ts",
    "step_bytes",
    "bandwidth",
    "bandwidth_share",
];

/// Writes all results; `test_time` is the start of the run in ISO 8601.
///
/// # Errors
/// Those of `out`.
pub fn write(
    out: &mut dyn Write,
    format: Format,
    (model, results): (&ModelInfo, &[Measured]),
    test_time: &str,
) -> std::io::Result<()> {
    let mut rows = results.iter().map(|result| row(model, result, test_time));
    match format {
        Format::Json => writeln!(out, "{:#}", Value::from(rows.collect::<Vec<_>>())),
        Format::JsonLines => rows.try_for_each(|row| writeln!(out, "{row}")),
        Format::Csv => {
            writeln!(out, "{}", COLUMNS.join(","))?;
            for row in rows {
                let cells: Vec<String> = COLUMNS.iter().map(|column| csv_cell(&row[*column])).collect();
                writeln!(out, "{}", cells.join(","))?;
            }
            Ok(())
        }
        Format::Markdown => markdown(out, model, results),
    }
}

fn model_type(model: &ModelInfo) -> String {
    format!("{} {} {}", model.architecture, crate::cli::size::count(model.parameters), model.quantization)
}

fn row(model: &ModelInfo, result: &Measured, test_time: &str) -> Value {
    let (mean_rate, std_rate, median_rate) = result.summary();
    let nanoseconds: Vec<f64> = result.samples.iter().map(|time| time.as_nanos() as f64).collect();
    let file = model.path.file_name().map(|name| name.to_string_lossy().into_owned());
    json!({
        "test": result.test.name(),
        "build_version": env!("CARGO_PKG_VERSION"),
        "cpu_info": cpu_name(),
        "backends": result.backend,
        "model_filename": file,
        "model_type": model_type(model),
        "model_size": model.weight_bytes,
        "model_n_params": model.parameters,
        "n_ubatch": result.chunk,
        "n_threads": result.threads,
        "n_prompt": result.test.prompt,
        "n_gen": result.test.generation,
        "n_depth": result.test.depth,
        "n_seqs": result.test.sequences,
        "test_time": test_time,
        "avg_ns": mean(&nanoseconds).round() as u64,
        "stddev_ns": sample_std(&nanoseconds).round() as u64,
        "avg_ts": mean_rate,
        "stddev_ts": std_rate,
        "median_ts": median_rate,
        "step_bytes": result.step_bytes,
        "bandwidth": result.bandwidth.map(f64::round),
        "bandwidth_share": result.bandwidth_share(),
        "samples_ns": result.samples.iter().map(|time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)).collect::<Vec<_>>(),
        "samples_ts": result.rates(),
    })
}

fn csv_cell(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    if text.contains([',', '"', '\n']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text }
}

fn markdown(out: &mut dyn Write, model: &ModelInfo, results: &[Measured]) -> std::io::Result<()> {
    let heading =
        ["model", "size", "params", "backend", "threads", "test", "t/s", "median", "read a step", "bandwidth"];
    let rows: Vec<[String; 10]> = results
        .iter()
        .map(|result| {
            let (mean_rate, std_rate, median_rate) = result.summary();
            [
                model_type(model),
                crate::cli::size::Bytes(model.weight_bytes).to_string(),
                crate::cli::size::count(model.parameters),
                result.backend.clone(),
                result.threads.to_string(),
                result.test.name(),
                format!("{mean_rate:.2} ± {std_rate:.2}"),
                format!("{median_rate:.2}"),
                result.step_bytes.map_or_else(String::new, |bytes| crate::cli::size::Bytes(bytes).to_string()),
                result.bandwidth_share().map_or_else(String::new, |share| format!("{:.0} %", 100.0 * share)),
            ]
        })
        .collect();
    let widths: [usize; 10] = std::array::from_fn(|column| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([heading[column].len()]).max().unwrap_or(0)
    });
    let line = |cells: [&str; 10]| {
        let padded: Vec<String> = (0..10)
            .map(|column| match column {
                0 | 3 => format!(" {:<width$} |", cells[column], width = widths[column]),
                _ => format!(" {:>width$} |", cells[column], width = widths[column]),
            })
            .collect();
        format!("|{}", padded.concat())
    };
    writeln!(out, "{}", line(heading))?;
    let rule: Vec<String> = (0..10)
        .map(|column| match column {
            0 | 3 => format!(" {}|", "-".repeat(widths[column] + 1)),
            _ => format!(" {}:|", "-".repeat(widths[column])),
        })
        .collect();
    writeln!(out, "|{}", rule.concat())?;
    rows.iter().try_for_each(|row| writeln!(out, "{}", line(row.each_ref().map(String::as_str))))
}

/// The processor's name, where the system tells.
pub(crate) fn cpu_name() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use cupola_models::GenerationDefaults;

    use super::super::Test;
    use super::*;

    fn results() -> Vec<Measured> {
        let measured = |test, millis: [u64; 2]| Measured {
            test,
            threads: 2,
            backend: "CPU, 2 threads".to_owned(),
            chunk: 512,
            samples: millis.map(Duration::from_millis).to_vec(),
            step_bytes: (test.generation > 0).then_some(3 << 20),
            bandwidth: Some(4e9),
        };
        vec![
            measured(Test { prompt: 512, generation: 0, depth: 0, sequences: 1 }, [500, 256]),
            measured(Test { prompt: 0, generation: 128, depth: 64, sequences: 4 }, [1000, 1000]),
        ]
    }

    fn text(format: Format) -> String {
        let mut out = Vec::new();
        let model = ModelInfo {
            path: "/somewhere/tiny.gguf".into(),
            weight_bytes: 2 << 20,
            packed_bytes: 2 << 20,
            parameters: 1_500_000,
            architecture: "llama".to_owned(),
            quantization: "Q4_1".to_owned(),
            file_bytes: 2 << 20,
            name: None,
            eos_tokens: Vec::new(),
            generation: GenerationDefaults::default(),
        };
        write(&mut out, format, (&model, &results()), "2026-01-02T03:04:05Z").expect("a vector takes everything");
        String::from_utf8(out).expect("UTF-8")
    }

    #[test]
    fn markdown_lines_up() {
        let text = text(Format::Markdown);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines.iter().all(|line| line.chars().count() == lines[0].chars().count()), "{text}");
        assert!(lines[2].contains("pp512 | 1512.00 ± 690.14 | 1512.00 |             |           |"), "{text}");
        // 128 steps a second.
        assert!(lines[3].contains("tg128 b4 @ d64 |    512.00 ± 0.00 |  512.00 |     3.0 MiB |      10 % |"), "{text}");
    }

    #[test]
    fn json_has_the_keys_that_records_read() {
        let rows: Value = serde_json::from_str(&text(Format::Json)).expect("JSON");
        assert_eq!(rows[0]["test"], "pp512");
        assert_eq!(rows[0]["median_ts"], 1512.0);
        assert_eq!(rows[1]["samples_ns"], json!([1_000_000_000u64, 1_000_000_000u64]));
        assert_eq!(rows[1]["n_seqs"], 4);
        assert_eq!((&rows[0]["step_bytes"], &rows[1]["step_bytes"]), (&Value::Null, &json!(3 << 20)));
        assert!((rows[1]["bandwidth_share"].as_f64().expect("a number") - 0.1007).abs() < 1e-4);
        assert_eq!(rows[1]["model_filename"], "tiny.gguf");
        assert_eq!(text(Format::JsonLines).lines().count(), 2);
    }

    #[test]
    fn csv_quotes_what_must_be_quoted() {
        let text = text(Format::Csv);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], COLUMNS.join(","));
        assert!(
            lines[1].starts_with("pp512,tiny.gguf,llama 1.5M Q4_1,2097152,1500000,\"CPU, 2 threads\",2,512,"),
            "{text}"
        );
    }
}
