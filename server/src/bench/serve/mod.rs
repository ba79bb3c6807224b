//! Load over HTTP: sends requests as a rate or a number of callers asks, and keeps what each one did.
//!
//! ```text
//!   prompts --arrival times--> one task a request --slot free?--> exchange ==HTTP==> server
//!                                     |                              |
//!                                     |  Outcome                     | stamped chunks
//!                                     v                              v
//!                                  report: the block and the JSON keys of `vllm bench serve`
//! ```
//!
//! Open loop (a rate): a request is sent when its time has come, whatever the server does. Closed loop
//! (`--max-concurrency` with an infinite rate): the next request waits for a free slot, and that wait is reported apart.

mod client;
mod exchange;
mod prompts;
pub mod report;

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tokio::sync::{Semaphore, mpsc};

use self::client::Client;
pub use self::client::ClientError;
pub use self::exchange::{Dialect, Outcome};
use self::exchange::{body, exchange};
use self::prompts::Prompt;
use super::random::Random;

/// Answered with 200 by every server once its model is loaded.
const HEALTH: &str = "/health";

/// What load to make.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the server is, without the endpoint: `http://127.0.0.1:8000`.
    pub base_url: String,
    /// The path requests go to.
    pub endpoint: String,
    /// The shape of requests to that path.
    pub dialect: Dialect,
    /// Sent as a bearer token.
    pub api_key: Option<String>,
    /// Model name; the server's first model when absent.
    pub model: Option<String>,
    /// Requests to measure.
    pub num_prompts: usize,
    /// Requests before them that are not measured.
    pub num_warmups: usize,
    /// Most requests under way at once.
    pub max_concurrency: Option<usize>,
    /// Requests a second; infinite sends all at once.
    pub request_rate: f64,
    /// Shape of the gamma distribution of gaps between requests; 1 is a Poisson process, infinite is a steady beat.
    pub burstiness: f64,
    /// Prompt tokens after the shared prefix.
    pub input_len: usize,
    /// Tokens to generate.
    pub output_len: usize,
    /// Lengths vary by this share either way.
    pub range_ratio: f64,
    /// Tokens at the start of every prompt that all of them share.
    pub prefix_len: usize,
    /// Ask for exactly the output length.
    pub ignore_eos: bool,
    /// Sampling parameters for every request.
    pub sampling: Map<String, Value>,
    /// More fields for every request.
    pub extra_body: Map<String, Value>,
    /// Seed of prompts and arrivals.
    pub seed: u64,
    /// How long to wait for the server to answer at all.
    pub ready_timeout: Duration,
    /// Most time for one request.
    pub request_timeout: Duration,
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Requests to come, in all.
    pub total: usize,
    /// Requests that ended well.
    pub done: usize,
    /// Requests that failed.
    pub failed: usize,
    /// Tokens generated.
    pub output_tokens: usize,
}

/// What a run was and did.
#[derive(Clone, Debug)]
pub struct Run {
    /// Its options.
    pub options: Options,
    /// The model that was asked.
    pub model: String,
    /// Prompt lengths were counted by the server's tokenizer.
    pub exact_prompts: bool,
    /// One a request, in arrival order.
    pub outcomes: Vec<Outcome>,
    /// From the first arrival to the last answer, in seconds.
    pub duration: f64,
    /// Processor time of this process during the run, in seconds, where the system tells.
    pub client_cpu: Option<f64>,
}

/// Makes the load and waits for its end. `watch` is called after each request.
///
/// # Errors
/// A [`ClientError`] when the run cannot begin; failures of single requests are outcomes.
pub async fn run(options: Options, watch: &mut dyn FnMut(Standing)) -> Result<Run, ClientError> {
    let client = Arc::new(Client::new(&options.base_url, options.api_key.as_deref())?);
    let served = first_model(&client, options.ready_timeout).await;
    let model = match (&options.model, served) {
        (Some(model), Ok(_) | Err(ClientError::Status { .. } | ClientError::Nonsense(_))) => model.clone(),
        (None, Ok(model)) => model,
        (_, Err(error)) => return Err(error),
    };
    let prompts = prompts::make(&options, &client, &model).await?;
    let load = Load { options: &options, client: &client, model: &model };
    load.send(&prompts.warmups, &vec![0.0; prompts.warmups.len()], &mut |_| {}).await;

    let arrivals = arrivals(&options);
    let cpu_before = cpu_seconds();
    let began = Instant::now();
    let outcomes = load.send(&prompts.measured, &arrivals, watch).await;
    let duration = began.elapsed().as_secs_f64();
    let client_cpu = cpu_before.zip(cpu_seconds()).map(|(before, after)| after - before);
    Ok(Run { model, exact_prompts: prompts.exact, outcomes, duration, client_cpu, options })
}

/// Everything that all requests of a run share.
struct Load<'a> {
    options: &'a Options,
    client: &'a Arc<Client>,
    model: &'a str,
}

impl Load<'_> {
    /// Sends `prompts` at `arrivals` (seconds from now) and returns their outcomes in order.
    async fn send(&self, prompts: &[Prompt], arrivals: &[f64], watch: &mut dyn FnMut(Standing)) -> Vec<Outcome> {
        let slots = self.options.max_concurrency.map(|slots| Arc::new(Semaphore::new(slots)));
        let (report, mut reports) = mpsc::unbounded_channel();
        let began = Instant::now();
        for (index, (prompt, &arrival)) in prompts.iter().zip(arrivals).enumerate() {
            let (client, slots, report) = (Arc::clone(self.client), slots.clone(), report.clone());
            let body = body(self.options, self.model, prompt);
            let (path, limit, prompt) = (self.options.endpoint.clone(), self.options.request_timeout, prompt.clone());
            tokio::spawn(async move {
                let due = began + Duration::from_secs_f64(arrival);
                tokio::time::sleep_until(due.into()).await;
                let _slot = match slots {
                    Some(slots) => Some(slots.acquire_owned().await.expect("this semaphore is never closed")),
                    None => None,
                };
                let sent = Instant::now();
                let mut outcome = exchange(&client, &path, body, &prompt, limit).await;
                outcome.start = (sent - began).as_secs_f64();
                outcome.queued = (sent - due).as_secs_f64();
                // The receiver lives until every sender is gone.
                report.send((index, outcome)).ok();
            });
        }
        drop(report);
        let mut outcomes = vec![Outcome::default(); prompts.len()];
        let mut standing = Standing { total: prompts.len(), ..Standing::default() };
        while let Some((index, outcome)) = reports.recv().await {
            match outcome.failure {
                None => standing.done += 1,
                Some(_) => standing.failed += 1,
            }
            standing.output_tokens += outcome.output_tokens;
            outcomes[index] = outcome;
            watch(standing);
        }
        outcomes
    }
}

/// When each request is due, in seconds after the start. Scaled so that the last one is due after exactly
/// `num_prompts / request_rate` seconds: otherwise seeds would differ in the offered load.
fn arrivals(options: &Options) -> Vec<f64> {
    let count = options.num_prompts;
    if options.request_rate.is_infinite() {
        return vec![0.0; count];
    }
    let mut random = Random::new(options.seed, 3);
    let mut due = 0.0;
    let mut times: Vec<f64> = (0..count)
        .map(|_| {
            due += if options.burstiness.is_infinite() {
                1.0 / options.request_rate
            } else {
                random.gamma(options.burstiness, 1.0 / (options.request_rate * options.burstiness))
            };
            due
        })
        .collect();
    if due > 0.0 {
        let scale = count as f64 / options.request_rate / due;
        times.iter_mut().for_each(|time| *time *= scale);
    }
    times
}

/// The first model the server lists; waits for the server up to `patience`.
async fn first_model(client: &Client, patience: Duration) -> Result<String, ClientError> {
    let deadline = Instant::now() + patience;
    loop {
        match client.get_json("/v1/models").await {
            Ok(list) => {
                let id = list.pointer("/data/0/id").and_then(Value::as_str);
                return id
                    .map(str::to_owned)
                    .ok_or_else(|| ClientError::Nonsense("/v1/models lists no model".to_owned()));
            }
            // Loading servers refuse connections or answer 503.
            Err(ClientError::Status { status, .. }) if status.as_u16() == 503 && Instant::now() < deadline => {}
            Err(ClientError::Connect { .. } | ClientError::Broken { .. }) if Instant::now() < deadline => {}
            Err(error) => return Err(error),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Whether the server says that it is up: `GET /health` with status 200.
pub async fn healthy(base_url: &str) -> bool {
    let Ok(client) = Client::new(base_url, None) else { return false };
    client.get(HEALTH).await.is_ok()
}

/// Asks the server's first model for one token and waits for the end of the answer.
///
/// # Errors
/// Every [`ClientError`].
pub async fn first_token(base_url: &str, api_key: Option<&str>) -> Result<(), ClientError> {
    let client = Client::new(base_url, api_key)?;
    let model = first_model(&client, Duration::ZERO).await?;
    let body = json!({"model": model, "prompt": "Hello", "max_tokens": 1, "temperature": 0});
    client.post_json("/v1/completions", &body).await.map(drop)
}

/// Processor seconds this process has used.
fn cpu_seconds() -> Option<f64> {
    // Fields after the command name, which is in parentheses and may contain spaces; times count 1/100 s on Linux.
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some((ticks(11)? + ticks(12)?) as f64 / 100.0)
}

#[cfg(test)]
mod tests;
