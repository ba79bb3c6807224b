//! The command line as clap sees it.

use clap::{CommandFactory, Parser};
use cupola_engine::Device;

use super::bench::BenchCommand;
use super::{Cli, Command};

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

#[test]
fn the_definition_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn flags_of_vllm_are_taken() {
    let line = "cupola serve model.gguf --host 0.0.0.0 --port 0 --max-num-seqs 16 --max-model-len 2048 \
                --max-num-batched-tokens 256 --kv-cache-memory 2GiB --threads 2 --api-key one --api-key two \
                --served-model-name a --served-model-name b --chat-template t.jinja --shutdown-timeout 5 --max-queued-requests 9 \
                --no-enable-prefix-caching --insecure";
    let Command::Serve(args) = parse(line).expect("valid").command else { panic!("serve") };
    let shown = format!("{args:?}");
    assert!(shown.contains(r#"api_key: ["one", "two"]"#), "{shown}");
    assert!(shown.contains(r#"served_model_name: ["a", "b"]"#), "{shown}");
    assert!(shown.contains("kv_cache_memory: Some(Bytes(2147483648))"), "{shown}");
}

#[test]
fn engine_flags_become_its_configuration() {
    let plan = |flags: &str| {
        let Command::Plan(args) = parse(&format!("cupola plan {flags}")).expect("valid").command else {
            panic!("plan")
        };
        args.engine
    };
    let config = plan("--max-num-seqs 3 --kv-cache-memory-bytes 1048576 --no-enable-prefix-caching").config();
    assert_eq!((config.max_num_seqs, config.max_queued_requests), (3, 12));
    assert_eq!((config.kv_cache_bytes, config.enable_prefix_caching), (Some(1 << 20), false));
    assert_eq!(plan("").config(), cupola_engine::EngineConfig::default());
    assert!(plan("--no-enable-prefix-caching --enable-prefix-caching").config().enable_prefix_caching);
    assert_eq!(plan("").config_for_one().max_num_seqs, 1);
    let Device::Cpu(cpu) = plan("-t 2").device().expect("the CPU is always there") else { panic!("not the CPU") };
    assert_eq!(cpu.threads, Some(2));
    assert_eq!(plan("--kv-cache-dtype int8").config().kv_cache_type, cupola_kernels::KvType::Int8);
    for name in ["fp8", "fp8_e4m3"] {
        let dtype = plan(&format!("--kv-cache-dtype {name}")).config().kv_cache_type;
        assert_eq!(dtype, cupola_kernels::KvType::Fp8);
    }
    assert_eq!(plan("--kv-cache-dtype auto").config().kv_cache_type, cupola_kernels::KvType::F16);
}

#[test]
fn flags_of_vllm_bench_serve_are_taken() {
    let line = "cupola bench serve --backend vllm --base-url http://h:1/ --model m --tokenizer m --dataset-name random \
                --num-prompts 8 --max-concurrency 4 --request-rate 2.5 --burstiness 0.5 --random-input-len 64 \
                --random-output-len 32 --random-range-ratio 0.1 --random-prefix-len 16 --ignore-eos --seed 7 \
                --num-warmups 1 --temperature 0 --top-k 5 --save-result --save-detailed --result-dir d \
                --result-filename f.json --percentile-metrics ttft,e2el --metric-percentiles 50,99.9 \
                --goodput ttft:500 tpot:50 --metadata gpu=none run=1 --extra-body {\"user\":\"x\"} --disable-tqdm --json";
    let Command::Bench(BenchCommand::Serve(args)) = parse(line).expect("valid").command else { panic!("bench serve") };
    let options = args.options();
    assert_eq!((options.num_prompts, options.max_concurrency, options.prefix_len), (8, Some(4), 16));
    assert_eq!((options.request_rate, options.burstiness, options.range_ratio), (2.5, 0.5, 0.1));
    assert_eq!(options.endpoint, "/v1/completions");
    assert_eq!(options.sampling["top_k"], 5);
    assert_eq!(options.extra_body["user"], "x");
    assert!(options.ignore_eos);

    let chat = parse("cupola bench serve --backend openai-chat --host ::1 --port 9").expect("valid").command;
    let Command::Bench(BenchCommand::Serve(args)) = chat else { panic!("bench serve") };
    let options = args.options();
    assert_eq!((options.endpoint.as_str(), options.base_url.as_str()), ("/v1/chat/completions", "http://[::1]:9"));
    assert!(options.request_rate.is_infinite());
}

#[test]
fn wrong_values_are_usage_errors_that_name_the_flag() {
    for (line, flag) in [
        ("cupola serve --port 70000", "--port"),
        ("cupola serve --max-num-seqs 0", "--max-num-seqs"),
        ("cupola serve --kv-cache-memory lots", "--kv-cache-memory"),
        ("cupola run --temperature -1", "--temperature"),
        ("cupola run --temperature=nan", "--temperature"),
        ("cupola bench serve --request-rate 0", "--request-rate"),
        ("cupola bench serve --request-rate NaN", "--request-rate"),
        ("cupola bench serve --metric-percentiles 101", "--metric-percentiles"),
        ("cupola bench serve --percentile-metrics ttft,speed", "--percentile-metrics"),
        ("cupola bench serve --goodput ttft", "--goodput"),
        ("cupola bench serve --extra-body []", "--extra-body"),
        ("cupola bench kernel -b 0", "--batch"),
        ("cupola bench kernel -o xml", "--output"),
    ] {
        let error = parse(line).expect_err(line);
        assert_eq!(error.exit_code(), 2, "{line}");
        assert!(error.to_string().contains(flag), "{line}: {error}");
    }
}

/// The reference page of every command, as Markdown.
fn reference() -> String {
    let mut page =
        "# The command line\n\nWhat `--help` says, command by command. Written by a test: `CUPOLA_BLESS=1 cargo \
                    test -p cupola --lib cli` renews it.\n"
            .to_owned();
    let mut cli = Cli::command();
    cli.build();
    write_command(&mut cli, &mut page);
    page
}

fn write_command(command: &mut clap::Command, page: &mut String) {
    let help = command.render_long_help().to_string();
    let lines: Vec<&str> = help.lines().map(str::trim_end).collect();
    let name = command.get_bin_name().unwrap_or("cupola").to_owned();
    page.push_str(&format!("\n## {name}\n\n```text\n{}\n```\n", lines.join("\n").trim_end()));
    for sub in command.get_subcommands_mut().filter(|sub| sub.get_name() != "help") {
        write_command(sub, page);
    }
}

#[test]
fn the_committed_reference_is_what_help_says() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cli.md");
    let now = reference();
    if std::env::var_os("CUPOLA_BLESS").is_some() {
        std::fs::write(&path, &now).expect("the page can be written");
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == now, "docs/cli.md is stale: run CUPOLA_BLESS=1 cargo test -p cupola --lib cli");
}
