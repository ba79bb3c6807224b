//! Arithmetic, formats, and whole comparisons against programs and servers that these tests play.

use std::path::PathBuf;
use std::time::Duration;

use super::engine::{Common, Peer, Room, Setting, first_cpus, peer_server, version_in};
use super::kernel::{parse_batched, parse_llama_bench};
use super::plot::svg;
use super::process::{family, peak_of};
use super::record::{Record, Sample, metric_of};
use super::serve::{Load, SharedPrefix};
use super::summary::Summary;

/// Settings as they are given beside peers of these two names.
fn settings(texts: &[&str]) -> Vec<Setting> {
    let peers = ["llama.cpp", "vllm"].map(|peer| peer.parse().expect("valid"));
    texts.iter().map(|text| Setting::parse(text, &peers)).collect()
}

fn record() -> Record {
    let values = [
        (0, "cupola", "pp512", 800.0),
        (0, "llama.cpp", "pp512", 200.0),
        (1, "cupola", "pp512", 900.0),
        (1, "llama.cpp", "pp512", 150.0),
        (2, "cupola", "pp512", 700.0),
        (2, "llama.cpp", "pp512", 175.0),
        (0, "cupola", "tg128 b4", 300.0),
        (0, "cupola", "c16 median_ttft_ms", 50.0),
        (0, "llama.cpp", "c16 median_ttft_ms", 25.0),
        (0, "cupola", "c16 failed", 0.0),
        (0, "llama.cpp", "c16 failed", 2.0),
        (0, "cupola", "c1 failed", 0.0),
        (0, "llama.cpp", "c1 failed", 0.0),
        (0, "cupola", "peak_rss_mib", 456.0),
        (0, "llama.cpp", "peak_rss_mib", 1090.0),
    ];
    let sample = |(round, engine, test, value): (usize, &str, &str, f64)| Sample {
        round,
        engine: engine.to_owned(),
        test: test.to_owned(),
        value,
    };
    Record { head: "2026-01-02 <CPU> x2, 2 threads".to_owned(), samples: values.map(sample).to_vec() }
}

#[test]
fn records_are_read_as_they_were_written() {
    let record = record();
    assert_eq!(Record::parse(&record.csv()).expect("its own text"), record);
    assert_eq!(
        Record::parse("# x\nround,engine,test,value\n0,a,b\n"),
        Err("line 3: expected round,engine,test,value".to_owned())
    );
    assert!(Record::parse("# nothing\n").is_err());
    assert_eq!(metric_of("c16 median_ttft_ms").1, "c16 median time to first token");
    assert_eq!((metric_of("load_s").0.unit, metric_of("tg128 b4").0.unit), ("s", "tok/s"));
}

#[test]
fn ratios_are_of_medians_and_their_range_of_rounds() {
    let summary = Summary::new(&record());
    let row = |test: &str| summary.rows.iter().find(|row| row.test == test).expect("measured");
    let values = row("pp512").values[0].expect("measured");
    assert_eq!((values.median, values.min, values.max, values.rounds), (800.0, 700.0, 900.0, 3));
    let ratio = row("pp512").ratios[0].expect("both measured");
    assert_eq!((ratio.median, ratio.min, ratio.max), (800.0 / 175.0, 4.0, 6.0));
    assert_eq!(row("tg128 b4").ratios, [None], "a test without a peer has no ratio");
    assert_eq!(row("c1 failed").ratios, [None], "nothing over nothing is no ratio");

    let markdown = summary.markdown();
    let lines: Vec<&str> = markdown.lines().collect();
    assert_eq!(
        lines[0],
        "|                                    |         cupola |      llama.cpp | cupola / llama.cpp |"
    );
    assert_eq!(
        lines[1],
        "| ---------------------------------- | -------------: | -------------: | -----------------: |"
    );
    assert_eq!(
        lines[2],
        "| pp512, tok/s                       | 800 (700..900) | 175 (150..200) |    4.6x (4.0..6.0) |"
    );
    assert_eq!(
        lines[3],
        "| tg128 b4, tok/s                    |            300 |              - |                  - |"
    );
    assert!(lines.iter().any(|line| line.starts_with("| c16 failed requests ")), "{markdown}");
    assert!(!markdown.contains("c1 failed"), "no failures, no row: {markdown}");

    let json = summary.json();
    assert_eq!(json["tests"][0]["ratios"]["llama.cpp"]["max"], 6.0);
    assert_eq!(json["tests"][1]["engines"]["llama.cpp"], serde_json::Value::Null);
}

#[test]
fn the_picture_is_as_it_was() {
    let picture = svg(&Summary::new(&record())).expect("there is a peer");
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/bench/compare/snapshot.svg");
    if std::env::var_os("CUPOLA_BLESS").is_some() {
        std::fs::write(&path, &picture).expect("the snapshot can be written");
    }
    let expected = std::fs::read_to_string(&path).expect("the snapshot is there");
    assert_eq!(picture, expected, "CUPOLA_BLESS=1 writes {} anew", path.display());
    // Half the speed is a bar to the left, less memory one to the right.
    assert!(picture.contains("class=\"worse\"") && picture.contains(">2.4x<") && picture.contains("&lt;CPU&gt;"));

    let alone = record().samples.into_iter().filter(|sample| sample.engine == "cupola").collect();
    assert_eq!(svg(&Summary::new(&Record { head: String::new(), samples: alone })), None);
}

#[test]
fn the_output_of_the_benchmarks_of_llama_cpp_is_read() {
    let json = r#"[{"n_prompt": 512, "n_gen": 0, "n_depth": 0, "avg_ts": 3.0, "samples_ts": [150.5, 160.5, 170.0]},
                   {"n_prompt": 0, "n_gen": 128, "n_depth": 1024, "samples_ts": [80.0, 90.0]}]"#;
    let expected = [("pp512".to_owned(), 160.5), ("tg128 @ d1024".to_owned(), 85.0)];
    assert_eq!(parse_llama_bench(json).expect("as llama-bench writes it"), expected);
    assert!(parse_llama_bench(r#"[{"n_prompt": 1, "samples_ts": []}]"#).is_err());
    assert!(parse_llama_bench("error").expect_err("no JSON").starts_with("expected a JSON array"));
    let lines = "main: n_kv_max = 64\n{\"pp\": 1, \"tg\": 128, \"pl\": 4, \"speed_tg\": 123.5, \"speed\": 1.0}\n\nllama_perf ...";
    assert_eq!(parse_batched(lines), Some(123.5));
    assert_eq!(parse_batched("nothing"), None);
    assert_eq!(peak_of("Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t 1 kB\n"), Some(2 << 20));
}

#[test]
fn peers_are_named() {
    let parse = |text: &str| text.parse::<Peer>();
    assert_eq!(parse("llama.cpp"), Ok(Peer::LlamaCpp { folder: None }));
    assert_eq!(parse("llama.cpp=/x"), Ok(Peer::LlamaCpp { folder: Some("/x".into()) }));
    assert_eq!(parse("vllm"), Ok(Peer::Vllm { program: "vllm".into() }));
    let url = |name: &str| Ok(Peer::Url { name: name.into(), url: "http://h:1".into() });
    assert_eq!((parse("http://h:1"), parse("sglang=http://h:1")), (url("peer"), url("sglang")));
    let line = "run --port {port}";
    assert_eq!(parse(&format!("x=cmd:{line}")), Ok(Peer::Command { name: "x".into(), line: line.into() }));
    for wrong in ["", "x", "https://h", "a,b=http://h", "cupola=http://h", "=http://h", "x=cmd:", "x=cmd:run"] {
        assert!(parse(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_server_gets_room_for_all_its_requests() {
    let common = Common {
        model: "m.gguf".into(),
        peer_models: settings(&["general", "llama.cpp=other"]),
        cupola: "cupola".into(),
        threads: 2,
        rounds: 1,
        cupola_args: Vec::new(),
        peer_args: settings(&["--more", "llama.cpp=--own a=b", "vllm=--dtype bfloat16"]),
        peer_env: settings(&["A=1", "vllm=B=2=3", "llama.cpp=C=4"]),
    };
    let peer: Peer = "llama.cpp=/bin".parse().expect("valid");
    let launch = peer_server(&peer, &common, Room { requests: 16, tokens: 512 }, 9).expect("started by us");
    let line = format!("{:?}", launch.command);
    for part in [
        "\"/bin/llama-server\"",
        "\"-m\" \"other\"",
        "\"-np\" \"16\" \"-c\" \"8192\" \"-fa\" \"on\"",
        "\"--more\" \"--own\" \"a=b\"",
        "C=\"4\"",
    ] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
    assert!(!line.contains("bfloat16") && !line.contains("B="), "what is the other peer's: {line}");

    let line = |peer: &str| {
        let peer: Peer = peer.parse().expect("valid");
        format!("{:?}", peer_server(&peer, &common, Room { requests: 4, tokens: 256 }, 9).expect("started").command)
    };
    let vllm = line("vllm=/v/vllm");
    let tail = "\"--max-num-seqs\" \"4\" \"--max-model-len\" \"256\" \"--more\" \"--dtype\" \"bfloat16\"";
    for part in ["OMP_NUM_THREADS=\"2\"", "B=\"2=3\"", "\"/v/vllm\" \"serve\" \"general\"", tail] {
        assert!(vllm.contains(part), "{part} is not in {vllm}");
    }
    let python = line("vllm=/v/python3");
    assert!(python.contains("\"/v/python3\" \"-m\" \"vllm.entrypoints.openai.api_server\" \"--model\" \"general\""));
    let other = line("x=cmd:run -m {model} --port={port} -t {threads} -n {requests} -c {tokens}");
    let words = "\"run\" \"-m\" \"general\" \"--port=9\" \"-t\" \"2\" \"-n\" \"4\" \"-c\" \"256\" \"--more\"";
    assert!(other.contains(words), "{other}");
}

#[test]
fn processors_and_versions_are_read() {
    assert_eq!(first_cpus("0-3,8", 2).as_deref(), Some("0,1"));
    assert_eq!(first_cpus("1,4-6", 3).as_deref(), Some("1,4,5"));
    assert_eq!((first_cpus("0-1", 3), first_cpus("x", 1)), (None, None));
    let version = version_in("INFO 11-22 loading 3 plugins\n0.32.0\n");
    assert_eq!(version.as_deref(), Some("0.32.0"));
    assert_eq!(version_in("version: 5 (abc, def)\nbuilt with gcc 12\n").as_deref(), Some("5 (abc; def)"));
    assert_eq!(version_in("no idea"), None);
}

#[test]
fn memory_is_counted_over_the_group_and_all_descendants() {
    // Number, parent, group: 10 leads its group, 12 left it, 14 is a child of that one, 20 is a stranger.
    let known = [[10, 1, 10], [11, 10, 10], [14, 12, 14], [12, 11, 12], [20, 1, 20]];
    let mut own = family(10, &known);
    own.sort_unstable();
    assert_eq!(own, [10, 11, 12, 14]);
}

#[test]
fn a_shared_prefix_is_a_workload_of_its_own() {
    let load = Load {
        concurrency: vec![4],
        bursts: vec![3],
        num_prompts: None,
        num_warmups: 2,
        input_len: 10,
        output_len: 20,
        prefix_len: 0,
        shared: SharedPrefix { concurrency: vec![8], prefix_len: 512, input_len: 32, output_len: 40 },
        start_timeout: Duration::ZERO,
        request_timeout: Duration::ZERO,
        api_key: None,
    };
    let workloads = load.workloads();
    let named: Vec<_> = workloads.iter().map(|workload| (workload.name.as_str(), workload.prompts)).collect();
    assert_eq!(named, [("c4", 12), ("burst3", 3), ("shared512 c8", 16)]);
    assert_eq!(load.room(), Room { requests: 8, tokens: 768 }, "for the longest, with some to spare");
    let options = |index: usize| load.options("http://h", &workloads[index], 1);
    let lengths = |index: usize| (options(index).prefix_len, options(index).input_len, options(index).output_len);
    assert_eq!((lengths(0), lengths(2)), ((0, 10, 20), (512, 32, 40)));
    assert_eq!((options(0).num_warmups, options(2).num_warmups), (2, 0), "a warm-up would compute the prefix");
    assert_eq!(options(2).max_concurrency, Some(8));
    assert_eq!(metric_of("shared512 c8 duration").1, "shared512 c8 total time");
    assert_eq!(metric_of("shared512 c8 duration").0.unit, "s");
}
