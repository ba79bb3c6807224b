//! The decoder alone in turn with llama.cpp's: `cupola bench kernel`, `llama-bench` and `llama-batched-bench`.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::engine::{CUPOLA, Common, LLAMA_CPP, Peer, llama_hint, llama_program};
use super::process::{Launch, output_of};
use super::record::Sample;
use super::{CompareError, Recorder, Watch};
use crate::bench::stats::Sorted;

/// What to measure: every combination of the lists, as `cupola bench kernel` has it.
#[derive(Clone, Debug)]
pub struct Cases {
    /// Prompt lengths; 0 for none.
    pub prompts: Vec<usize>,
    /// Generation lengths; 0 for none.
    pub generations: Vec<usize>,
    /// Tokens in the cache before a test.
    pub depths: Vec<usize>,
    /// Sequences that generate together.
    pub batches: Vec<usize>,
    /// Runs of each test in a round; their median counts.
    pub repetitions: usize,
}

fn list(values: &[usize]) -> String {
    values.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

/// Runs all rounds. Peers other than llama.cpp have no such benchmark.
///
/// # Errors
/// A program that cannot be started, fails, or says something else than expected.
pub async fn run(
    common: &Common,
    peers: &[Peer],
    cases: &Cases,
    watch: &mut dyn Watch,
) -> Result<Vec<Sample>, CompareError> {
    let mut recorder = Recorder { samples: Vec::new(), watch };
    let mut batched_missing = false;
    for round in 0..common.rounds {
        for (test, value) in cupola(common, cases).await? {
            recorder.add((round, CUPOLA), test, value);
        }
        recorder.turn_ended();
        for peer in peers {
            let Peer::LlamaCpp { folder } = peer else { continue };
            let bench = llama_program(folder.as_deref(), "llama-bench");
            if cases.batches.contains(&1) || cases.prompts.iter().any(|n| *n > 0) {
                for (test, value) in llama_bench(common, cases, &bench).await? {
                    recorder.add((round, peer.name()), test, value);
                }
            }
            let batched = llama_program(folder.as_deref(), "llama-batched-bench");
            for case in batched_cases(cases) {
                match llama_batched(common, case, &batched).await {
                    Ok(value) => recorder.add((round, peer.name()), case.name(), value),
                    Err(CompareError::Start { program, .. }) if !batched_missing => {
                        batched_missing = true;
                        recorder
                            .watch
                            .note(&format!("{program} is not there: no peer for {} and its like", case.name()));
                    }
                    Err(CompareError::Start { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            recorder.turn_ended();
        }
    }
    Ok(recorder.samples)
}

async fn cupola(common: &Common, cases: &Cases) -> Result<Vec<(String, f64)>, CompareError> {
    let mut command = Command::new(&common.cupola);
    command.args(["bench", "kernel", "-o", "json", "-m"]).arg(&common.model);
    command.args(["-t", &common.threads.to_string(), "-r", &cases.repetitions.to_string()]);
    command.args(["-p", &list(&cases.prompts), "-n", &list(&cases.generations)]);
    command.args(["-d", &list(&cases.depths), "-b", &list(&cases.batches)]).args(&common.cupola_args);
    let output = output_of(Launch { engine: CUPOLA.to_owned(), command, hint: String::new() }).await?;
    parse_cupola(&output).ok_or_else(|| CompareError::Output {
        program: "cupola bench kernel".to_owned(),
        what: "expected rows with test and median_ts".to_owned(),
    })
}

fn parse_cupola(json: &str) -> Option<Vec<(String, f64)>> {
    let rows: Vec<Value> = serde_json::from_str(json).ok()?;
    rows.iter().map(|row| Some((row["test"].as_str()?.to_owned(), row["median_ts"].as_f64()?))).collect()
}

async fn llama_bench(common: &Common, cases: &Cases, program: &Path) -> Result<Vec<(String, f64)>, CompareError> {
    let generations = if cases.batches.contains(&1) { list(&cases.generations) } else { "0".to_owned() };
    let mut command = Command::new(program);
    command.arg("-m").arg(common.peer_model(LLAMA_CPP));
    command.args(["-t", &common.threads.to_string(), "-r", &cases.repetitions.to_string(), "-fa", "1", "-o", "json"]);
    command.args(["-p", &list(&cases.prompts), "-n", &generations, "-d", &list(&cases.depths)]);
    common.extend(&mut command, LLAMA_CPP);
    let output = output_of(Launch { engine: "llama-bench".to_owned(), command, hint: llama_hint() }).await?;
    parse_llama_bench(&output)
        .map_err(|what| CompareError::Output { program: program.to_string_lossy().into_owned(), what })
}

/// Tests, named as ours, and the median of their runs in tokens a second.
pub(super) fn parse_llama_bench(json: &str) -> Result<Vec<(String, f64)>, String> {
    let rows: Vec<Value> = serde_json::from_str(json).map_err(|error| format!("expected a JSON array: {error}"))?;
    let read = |row: &Value| {
        let count = |key: &str| row.get(key).and_then(Value::as_u64).unwrap_or(0);
        let mut name = match (count("n_prompt"), count("n_gen")) {
            (prompt, 0) => format!("pp{prompt}"),
            (0, generation) => format!("tg{generation}"),
            (prompt, generation) => format!("pp{prompt}+tg{generation}"),
        };
        if count("n_depth") > 0 {
            name.push_str(&format!(" @ d{}", count("n_depth")));
        }
        let rates: Vec<f64> = row.get("samples_ts")?.as_array()?.iter().filter_map(Value::as_f64).collect();
        (!rates.is_empty()).then(|| (name, Sorted::new(&rates).median()))
    };
    rows.iter().map(|row| read(row).ok_or_else(|| "a row has no samples_ts".to_owned())).collect()
}

/// A generation of several sequences together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Batched {
    sequences: usize,
    generation: usize,
    depth: usize,
}

impl Batched {
    fn name(self) -> String {
        let depth = if self.depth > 0 { format!(" @ d{}", self.depth) } else { String::new() };
        format!("tg{} b{}{depth}", self.generation, self.sequences)
    }
}

fn batched_cases(cases: &Cases) -> Vec<Batched> {
    let mut found = Vec::new();
    for &depth in &cases.depths {
        for &sequences in cases.batches.iter().filter(|n| **n > 1) {
            for &generation in cases.generations.iter().filter(|n| **n > 0) {
                found.push(Batched { sequences, generation, depth });
            }
        }
    }
    found
}

async fn llama_batched(common: &Common, case: Batched, program: &Path) -> Result<f64, CompareError> {
    // Every sequence needs a prompt there; one token is as good as none.
    let prompt = case.depth.max(1);
    let context = case.sequences * (prompt + case.generation);
    let mut words: Vec<OsString> = vec!["-m".into(), common.peer_model(LLAMA_CPP).into()];
    for (flag, value) in
        [("-t", common.threads), ("-c", context), ("-npp", prompt), ("-ntg", case.generation), ("-npl", case.sequences)]
    {
        words.extend([flag.into(), value.to_string().into()]);
    }
    let mut command = Command::new(program);
    command.args(words).args(["-fa", "on", "--output-format", "jsonl"]);
    common.extend(&mut command, LLAMA_CPP);
    let output = output_of(Launch { engine: "llama-batched-bench".to_owned(), command, hint: llama_hint() }).await?;
    parse_batched(&output).ok_or_else(|| CompareError::Output {
        program: program.to_string_lossy().into_owned(),
        what: "expected a JSON line with speed_tg".to_owned(),
    })
}

/// Tokens a second of all sequences, from the one JSON line among those of the log.
pub(super) fn parse_batched(output: &str) -> Option<f64> {
    let rows = output.lines().filter_map(|line| serde_json::from_str::<Value>(line.trim()).ok());
    rows.filter_map(|row| row.get("speed_tg")?.as_f64()).next()
}
