//! `bench compare` and `bench plot` with peers that are scripts, or another server of our own.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Served, cupola, interrupt, run, scratch, stdout, text, tiny_model};

/// A folder with one executable script.
fn script(name: &str, program: &str, body: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let folder = scratch(name);
    let path = folder.join(program);
    std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).expect("a scratch file");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("executable");
    folder
}

fn peer(folder: &Path) -> String {
    format!("llama.cpp={}", folder.display())
}

#[test]
fn kernels_are_compared_in_turn_and_recorded() {
    let bench = r#"echo 'load_backend: loaded' >&2
case "$*" in *"-t 1 "*"-fa 1 "*"-p 16 -n 4 "*) ;; *) echo "unexpected: $*" >&2; exit 1;; esac
echo '[{"n_prompt":16,"n_gen":0,"n_depth":0,"samples_ts":[1.0,2.0,3.0]},{"n_prompt":0,"n_gen":4,"n_depth":0,"samples_ts":[4.0]}]'"#;
    let folder = script("compare-kernel", "llama-bench", bench);
    let record = folder.join("out/record.csv");
    let (peer, path) = (peer(&folder), record.to_str().expect("UTF-8"));
    let args =
        ["bench", "compare", "kernel", "-m", tiny_model(), "--peer", &peer, "--rounds", "2", "-t", "1", "-r", "1"];
    let output = run(&[&args[..], &["-p", "16", "-n", "4", "-b", "1,2", "--record", path]].concat());
    let table = stdout(&output);
    let first_cells: Vec<&str> = table.lines().map(|line| line.split('|').nth(1).expect("a cell").trim()).collect();
    assert_eq!(first_cells[2..], ["pp16, tok/s", "tg4, tok/s", "tg4 b2, tok/s"], "{table}");
    assert!(table.contains("| 2.00 (2.00..2.00) |"), "the median of its runs: {table}");
    let said = text(&output.stderr);
    assert!(said.contains("llama-batched-bench is not there: no peer for tg4 b2"), "{said}");

    let csv = std::fs::read_to_string(&record).expect("recorded");
    let engines: Vec<&str> = csv.lines().skip(2).map(|line| line.split(',').nth(1).expect("a cell")).collect();
    let round = ["cupola", "cupola", "cupola", "llama.cpp", "llama.cpp"];
    assert_eq!(engines, [round, round].concat());
    let head = csv.lines().next().expect("a head");
    assert!(
        !head.contains(folder.to_str().expect("UTF-8")) && head.contains("--peer llama.cpp=compare-kernel"),
        "{head}"
    );

    let drawn = std::fs::read_to_string(record.with_extension("svg")).expect("drawn");
    let again = folder.join("again.svg");
    stdout(&run(&["bench", "plot", path, "-o", again.to_str().expect("UTF-8")]));
    assert_eq!(std::fs::read_to_string(again).expect("drawn"), drawn);
    assert!(text(&run(&["bench", "plot", tiny_model()]).stderr).contains("cannot read"));
}

#[test]
fn a_running_server_is_compared_under_the_same_load() {
    let peer = Served::start(&["--max-num-seqs", "2"]);
    let args = ["bench", "compare", "serve", "-m", tiny_model(), "--rounds", "1", "-t", "1", "--json"];
    let load = ["--concurrency", "2", "--burst", "3", "--random-input-len", "12", "--random-output-len", "4"];
    let shared = ["--shared-prefix", "2", "--shared-prefix-len", "40", "--shared-prefix-input-len", "5"];
    let shared = [&shared[..], &["--shared-prefix-output-len", "3"]].concat();
    let record = scratch("compare-serve").join("record.csv");
    let record = record.to_str().expect("UTF-8");
    let peers = ["--peer", &format!("other={}", peer.url), "--record", record];
    let output = run(&[&args[..], &load, &shared, &peers].concat());
    let json: Value = serde_json::from_str(&stdout(&output)).expect("JSON");
    assert_eq!(json["engines"], serde_json::json!(["cupola", "other"]));
    let tests = json["tests"].as_array().expect("tests");
    let row = |name: &str| tests.iter().find(|row| row["test"] == name).unwrap_or_else(|| panic!("{name} in {json:#}"));
    for workload in ["c2", "burst3", "shared40 c2"] {
        assert_eq!(row(&format!("{workload} failed"))["engines"]["other"]["max"], 0.0);
        for metric in ["output_throughput", "median_ttft_ms", "median_itl_ms"] {
            let row = row(&format!("{workload} {metric}"));
            assert!(row["ratios"]["other"]["median"].as_f64().expect("a ratio") > 0.0, "{row:#}");
        }
    }
    let total = row("shared40 c2 duration");
    assert!(total["engines"]["other"]["median"].as_f64().expect("seconds") > 0.0, "{total:#}");
    let written = std::fs::read_to_string(record).expect("recorded");
    assert!(written.lines().any(|line| line.starts_with("0,other,shared40 c2 duration,")), "{written}");
    assert!(row("load_s")["engines"]["cupola"]["median"].as_f64().expect("seconds") > 0.0);
    assert_eq!(row("load_s")["engines"]["other"], Value::Null, "it was running already");
    if cfg!(target_os = "linux") {
        assert!(row("peak_rss_mib")["engines"]["cupola"]["median"].as_f64().expect("a size") > 1.0);
    }
}

#[test]
fn a_peer_that_dies_at_start_is_quoted() {
    let folder = script(
        "compare-dies",
        "llama-server",
        "[ \"$1\" = --version ] && exit; echo 'loading'; echo 'error: no such tensor' >&2; exit 3",
    );
    let args = ["bench", "compare", "serve", "-m", tiny_model(), "--concurrency", "1", "-t", "1", "--num-prompts", "1"];
    let output = run(&[&args[..], &["--random-output-len", "2", "--peer", &peer(&folder)]].concat());
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(
        said.contains("llama.cpp ended early (exit status: 3); its last lines:\nloading\nerror: no such tensor\n"),
        "{said}"
    );
    let log = said.lines().find_map(|line| line.strip_prefix("all of its output: ")).expect("the log is named");
    assert!(std::fs::read_to_string(log).expect("the log is kept").contains("no such tensor"));
    std::fs::remove_file(log).expect("the log is ours to remove");

    // A server of another kind, started by its command line; what came before it stays in the record.
    let server = format!("x=cmd:{} serve {{model}} --port {{port}} -t {{threads}}", env!("CARGO_BIN_EXE_cupola"));
    let (record, dies) = (folder.join("partial.csv"), peer(&folder));
    let path = record.to_str().expect("UTF-8");
    let load = ["--random-output-len", "2", "--record", path, "--peer", &server, "--peer", &dies];
    let output = run(&[&args[..], &load].concat());
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    let written = std::fs::read_to_string(&record).expect("what was measured is kept");
    for engine in ["cupola", "x"] {
        assert!(written.contains(&format!("\n0,{engine},load_s,")), "{engine} in {written}");
    }
    assert!(!written.contains("llama.cpp,"), "{written}");

    let missing = run(&[&args[..], &["--peer", "llama.cpp=/nowhere"]].concat());
    assert!(text(&missing.stderr).contains("--peer llama.cpp=FOLDER"), "{}", text(&missing.stderr));
    let no_value = ["serve", "--peer", "vllm", "--peer-env", "vllm=KEY"];
    for wrong in [&["kernel", "--peer", "vllm"][..], &["serve", "--peer", "x"], &["serve"], &no_value] {
        assert_eq!(run(&[&["bench", "compare"], wrong].concat()).status.code(), Some(2), "{wrong:?}");
    }
}

/// Whether a process of the group is alive, and not only waiting for somebody to ask how it ended.
#[cfg(target_os = "linux")]
fn runs(group: &str) -> bool {
    let stats = std::fs::read_dir("/proc").expect("Linux has it").flatten();
    stats.filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok()).any(|stat| {
        // After the name, which is in parentheses: state, parent, group.
        let fields: Vec<&str> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
        fields[2] == group && fields[0] != "Z"
    })
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_stops_the_servers_that_were_started() {
    let body = "[ \"$1\" = --version ] && exit; echo $$ > \"$(dirname \"$0\")/pid\"; sleep 600 & wait";
    let folder = script("compare-stopped", "llama-server", body);
    let pid_file = folder.join("pid");
    drop(std::fs::remove_file(&pid_file));
    let args = ["bench", "compare", "serve", "-m", tiny_model(), "--concurrency", "1", "-t", "1", "--num-prompts", "1"];
    let mut child = cupola(&[&args[..], &["--random-output-len", "2", "--peer", &peer(&folder)]].concat())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    let deadline = Instant::now() + Duration::from_secs(60);
    let pid = loop {
        assert!(Instant::now() < deadline, "the peer was never started");
        match std::fs::read_to_string(&pid_file) {
            Ok(pid) if pid.ends_with('\n') => break pid.trim().to_owned(),
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    assert!(runs(&pid));
    interrupt(&child, "-INT");
    let mut said = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut said).expect("UTF-8");
    assert_eq!(child.wait().expect("it ends").code(), Some(130), "{said}");
    assert!(!runs(&pid), "neither the peer nor what it started is left");
}
