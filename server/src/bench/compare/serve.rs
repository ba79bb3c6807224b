//! Servers in turn: each is started, loaded with the same workloads by the same client, weighed and stopped.

use std::net::TcpListener;
use std::time::Duration;

use serde_json::Map;

use super::engine::{CUPOLA, Common, Peer, Room, cupola_server, peer_server};
use super::process::{Launch, Process};
use super::record::{BYTES, FAILED, LOAD, Sample};
use super::{CompareError, Recorder, Watch};
use crate::bench::serve::report::{Metric, Report, Selection};
use crate::bench::serve::{self, Dialect, Options};

const POLL: Duration = Duration::from_millis(20);
/// Seeds of warm-up prompts, far from those that count.
const WARM_SEEDS: u64 = 1 << 32;
/// How often a long start is spoken of.
const PROGRESS: Duration = Duration::from_secs(15);

/// What to send.
#[derive(Clone, Debug)]
pub struct Load {
    /// Requests at once, kept up; one workload each.
    pub concurrency: Vec<usize>,
    /// Requests that arrive all at once and then no more; one workload each.
    pub bursts: Vec<usize>,
    /// Requests of a workload of `concurrency` [default: three times as many, and at least four].
    pub num_prompts: Option<usize>,
    /// Requests before each workload that do not count.
    pub num_warmups: usize,
    /// Prompt tokens after the shared prefix.
    pub input_len: usize,
    /// Tokens to generate.
    pub output_len: usize,
    /// Tokens at the start of every prompt that all share.
    pub prefix_len: usize,
    /// Requests that begin with a prefix nobody has computed yet; one workload for each concurrency.
    pub shared: SharedPrefix,
    /// Time for a server to come up.
    pub start_timeout: Duration,
    /// Time for one request.
    pub request_timeout: Duration,
    /// Sent to peers that are running already.
    pub api_key: Option<String>,
}

/// Twice as many requests as run at once, all with the same beginning, which no request had before.
#[derive(Clone, Debug, Default)]
pub struct SharedPrefix {
    /// Requests at once; one workload each.
    pub concurrency: Vec<usize>,
    /// Tokens that all share.
    pub prefix_len: usize,
    /// Prompt tokens of each request's own.
    pub input_len: usize,
    /// Tokens to generate.
    pub output_len: usize,
}

/// One kind of load.
pub(super) struct Workload {
    pub(super) name: String,
    concurrency: usize,
    pub(super) prompts: usize,
    /// Tokens: shared prefix, own prompt, answer.
    lengths: [usize; 3],
    /// Warm-up requests have another prefix than those that are measured.
    cold_prefix: bool,
}

impl Load {
    pub(super) fn workloads(&self) -> Vec<Workload> {
        let prefix = if self.prefix_len > 0 { format!(" prefix{}", self.prefix_len) } else { String::new() };
        let lengths = [self.prefix_len, self.input_len, self.output_len];
        let kept_up = self.concurrency.iter().map(|&concurrency| Workload {
            name: format!("c{concurrency}{prefix}"),
            concurrency,
            prompts: self.num_prompts.unwrap_or((3 * concurrency).max(4)),
            lengths,
            cold_prefix: false,
        });
        let bursts = self.bursts.iter().map(|&count| Workload {
            name: format!("burst{count}{prefix}"),
            concurrency: count,
            prompts: count,
            lengths,
            cold_prefix: false,
        });
        let SharedPrefix { concurrency, prefix_len, input_len, output_len } = &self.shared;
        let shared = concurrency.iter().map(|&concurrency| Workload {
            name: format!("shared{prefix_len} c{concurrency}"),
            concurrency,
            prompts: 2 * concurrency,
            lengths: [*prefix_len, *input_len, *output_len],
            cold_prefix: true,
        });
        kept_up.chain(bursts).chain(shared).collect()
    }

    pub(super) fn room(&self) -> Room {
        let workloads = self.workloads();
        let requests = workloads.iter().map(|workload| workload.concurrency).max().unwrap_or(1);
        let tokens = workloads.iter().map(|workload| workload.lengths.iter().sum()).max().unwrap_or(0);
        // A few tokens for special ones and for words that did not fit exactly.
        let tokens = (tokens + 16_usize).next_multiple_of(256);
        Room { requests, tokens }
    }

    pub(super) fn options(&self, base_url: &str, workload: &Workload, seed: u64) -> Options {
        Options {
            base_url: base_url.to_owned(),
            endpoint: "/v1/completions".to_owned(),
            dialect: Dialect::Completions,
            api_key: self.api_key.clone(),
            model: None,
            num_prompts: workload.prompts,
            num_warmups: if workload.cold_prefix { 0 } else { self.num_warmups },
            max_concurrency: Some(workload.concurrency),
            request_rate: f64::INFINITY,
            burstiness: 1.0,
            input_len: workload.lengths[1],
            output_len: workload.lengths[2],
            range_ratio: 0.0,
            prefix_len: workload.lengths[0],
            ignore_eos: true,
            sampling: Map::from_iter([("temperature".to_owned(), 0.0.into())]),
            extra_body: Map::new(),
            seed,
            ready_timeout: Duration::ZERO,
            request_timeout: self.request_timeout,
        }
    }
}

/// Runs all rounds.
///
/// # Errors
/// A server that cannot be started, does not come up or dies, or a load that cannot begin. Requests that fail are counted
/// in the samples.
pub async fn run(
    common: &Common,
    peers: &[Peer],
    load: &Load,
    watch: &mut dyn Watch,
) -> Result<Vec<Sample>, CompareError> {
    let mut recorder = Recorder { samples: Vec::new(), watch };
    for round in 0..common.rounds {
        for peer in std::iter::once(None).chain(peers.iter().map(Some)) {
            let port = free_port()?;
            let launch = match peer {
                None => Some(cupola_server(common, load.room(), port)),
                Some(peer) => peer_server(peer, common, load.room(), port),
            };
            let name = peer.map_or(CUPOLA, Peer::name);
            let url = match peer {
                Some(Peer::Url { url, .. }) => url.clone(),
                _ => format!("http://127.0.0.1:{port}"),
            };
            one(load, (round, name), (&url, launch), &mut recorder).await?;
            recorder.turn_ended();
        }
    }
    Ok(recorder.samples)
}

async fn one(
    load: &Load,
    (round, name): (usize, &str),
    (url, launch): (&str, Option<Launch>),
    recorder: &mut Recorder<'_>,
) -> Result<(), CompareError> {
    let failed = |source| CompareError::Load { engine: name.to_owned(), source };
    let mut process = match launch {
        Some(launch) => {
            let mut process = Process::start(launch, None)?;
            wait_until_healthy(&mut process, (name, url), load.start_timeout, recorder.watch).await?;
            if let Err(error) = serve::first_token(url, load.api_key.as_deref()).await {
                process.check()?;
                return Err(process.died(format!("did not give its first token: {error}")));
            }
            recorder.add((round, name), LOAD, process.age().as_secs_f64());
            Some(process)
        }
        None => None,
    };
    for (index, workload) in load.workloads().iter().enumerate() {
        // Other prompts in every round and workload, so that no cache helps; the same ones for every engine.
        let seed = (100 * round + index) as u64;
        if workload.cold_prefix && load.num_warmups > 0 {
            // The same work with prompts that share nothing with those that count.
            let warm = Workload { name: String::new(), prompts: load.num_warmups, ..*workload };
            serve::run(load.options(url, &warm, WARM_SEEDS + seed), &mut |_| {}).await.map_err(failed)?;
        }
        let run = serve::run(load.options(url, workload, seed), &mut |_| {}).await;
        if let Some(process) = &mut process {
            process.check()?;
        }
        let run = run.map_err(failed)?;
        let selection = Selection { metrics: Metric::NAMED.map(|(_, metric)| metric).to_vec(), ..Selection::default() };
        let report = Report::new(&run, &selection);
        let json = report.json(Map::new());
        let mut keys = vec![FAILED];
        if !report.all_failed() {
            keys.extend(["output_throughput", "median_ttft_ms", "median_itl_ms"]);
            keys.extend(workload.cold_prefix.then_some("duration"));
        }
        for key in keys {
            let value = json[key].as_f64().unwrap_or(f64::NAN);
            recorder.add((round, name), format!("{} {key}", workload.name), value);
        }
        for note in report.failures_in_words() {
            recorder.watch.note(&format!("{name}, {}: {note}", workload.name));
        }
        if !run.exact_prompts {
            recorder.watch.note(&format!("{name} has no /tokenize: its prompts were planned in words"));
        }
    }
    if let Some(bytes) = process.as_ref().and_then(Process::peak_memory) {
        recorder.add((round, name), BYTES, bytes as f64 / f64::from(1 << 20));
    }
    Ok(())
}

async fn wait_until_healthy(
    process: &mut Process,
    (name, url): (&str, &str),
    limit: Duration,
    watch: &mut dyn Watch,
) -> Result<(), CompareError> {
    let mut next_word = PROGRESS;
    loop {
        process.check()?;
        if serve::healthy(url).await {
            return Ok(());
        }
        let age = process.age();
        if age > limit {
            return Err(process.died(format!("did not answer on {url}/health within {} s", limit.as_secs())));
        }
        if age > next_word {
            watch.note(&format!("{name} has been starting for {} s", age.as_secs()));
            next_word += PROGRESS;
        }
        tokio::time::sleep(POLL).await;
    }
}

/// A port that was free a moment ago.
fn free_port() -> Result<u16, CompareError> {
    let socket = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    socket.map(|address| address.port()).map_err(CompareError::io("find a free port"))
}
