//! A server without a socket over an engine with a stand-in for the model.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use cupola_engine::{Engine, EngineConfig, EngineSetup, MemoryPlan, ModelRunner, RunError};
use cupola_kernels::Turn;
use cupola_kernels::format::WeightType;
use cupola_kernels::kv::BLOCK_SIZE;
use cupola_models::testing::Scratch;
use cupola_models::{Batch, ChatTemplate, Model, Tokenizer};
use http::{HeaderMap, Method, Request, StatusCode, header};
use http_body_util::BodyExt;
use serde_json::Value;
use tokio::net::TcpListener;
use tower::ServiceExt;

use crate::app::{AppState, build_router};
use crate::config::ServerConfig;
use crate::listen;
use crate::local::LocalModel;

pub(super) const MODEL: &str = "org/test-model";
pub(super) const CHAT: &str = "/v1/chat/completions";
pub(super) const COMPLETIONS: &str = "/v1/completions";
/// Longest prompt plus answer, in tokens.
pub(super) const CONTEXT: usize = 256;
const KV_BLOCKS: usize = 96;

const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}\
                        {% if tools %}tools:{{ tools | length }}\n{% endif %}\
                        {% if add_generation_prompt %}<assistant>{% endif %}";

/// How the stand-in behaves; tests change it while it runs.
#[derive(Default)]
pub(super) struct Controls {
    /// Microseconds that a step takes.
    pub(super) step_micros: AtomicU64,
    /// Every step fails.
    pub(super) fail: AtomicBool,
    /// The next step panics.
    pub(super) panic: AtomicBool,
}

/// Chooses each next token from the last token and its position, so that answers are the same however they are computed.
struct StandIn {
    vocab: usize,
    /// Tokens it may say.
    words: Vec<u32>,
    controls: Arc<Controls>,
    /// The likeliest token of each output row, and a number for the rest of the row.
    rows: Vec<(u32, u64)>,
    greedy: Vec<u32>,
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl ModelRunner for StandIn {
    fn vocab_size(&self) -> usize {
        self.vocab
    }

    fn forward(&mut self, batch: &Batch) -> Result<(), RunError> {
        std::thread::sleep(Duration::from_micros(self.controls.step_micros.load(Relaxed)));
        assert!(!self.controls.panic.load(Relaxed), "told to panic");
        if self.controls.fail.load(Relaxed) {
            return Err("the stand-in was told to fail".to_owned().into());
        }
        self.rows.clear();
        for &row in &batch.outputs {
            let span = batch.spans.iter().rfind(|span| span.row0 <= row).expect("every row has a span");
            let position = u64::from(span.pos0 + row - span.row0);
            let seed = mix(u64::from(batch.tokens[row as usize]) << 32 | position);
            self.rows.push((self.words[usize::try_from(seed).expect("64 bit") % self.words.len()], seed));
        }
        self.greedy.clear();
        self.greedy.extend(self.rows.iter().map(|(token, _)| *token));
        Ok(())
    }

    fn chosen(&mut self, _turn: Turn) -> Result<&[u32], RunError> {
        Ok(&self.greedy)
    }

    fn for_each_logits(&mut self, f: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<(), RunError> {
        for (index, &(token, seed)) in self.rows.iter().enumerate() {
            let mut logits: Vec<f32> = vec![-30.0; self.vocab];
            for &word in &self.words {
                logits[word as usize] = (mix(seed ^ u64::from(word)) % 1000) as f32 / 200.0;
            }
            logits[token as usize] = 6.0;
            f(index, &mut logits);
        }
        Ok(())
    }
}

/// The pieces of a test server that tests change before it starts.
pub(super) struct Plan {
    pub(super) config: ServerConfig,
    pub(super) engine: EngineConfig,
    pub(super) loopback_only: bool,
    pub(super) template: bool,
}

impl Default for Plan {
    fn default() -> Self {
        let engine = EngineConfig { max_model_len: Some(CONTEXT), max_num_seqs: 8, ..EngineConfig::default() };
        Self { config: ServerConfig::default(), engine, loopback_only: false, template: true }
    }
}

/// An application and its engine.
pub(super) struct TestServer {
    pub(super) app: AppState,
    pub(super) router: Router,
    pub(super) controls: Arc<Controls>,
}

/// The tiny model; its file is gone again when this returns, what was mapped of it stays.
fn tiny_model() -> Model {
    let folder = Scratch::new("server-tests");
    Model::open(&cupola_models::testing::tiny_gguf(folder.path(), WeightType::F32, 1)).expect("a sound file")
}

fn words(tokenizer: &Tokenizer) -> Vec<u32> {
    let ids = 0..u32::try_from(tokenizer.vocab_size()).expect("few tokens");
    let fine = |id: &u32| !tokenizer.is_special(*id) && !tokenizer.token_bytes(*id).is_empty();
    let printable = |id: &u32| tokenizer.token_bytes(*id).iter().all(|b| *b >= 0x20 && *b != 0x7f);
    ids.filter(fine).filter(printable).collect()
}

impl Plan {
    pub(super) fn start(self) -> TestServer {
        let model = tiny_model();
        let controls = Arc::new(Controls::default());
        let runner = StandIn {
            vocab: model.tokenizer.vocab_size(),
            words: words(&model.tokenizer),
            controls: Arc::clone(&controls),
            rows: Vec::new(),
            greedy: Vec::new(),
        };
        let setup = EngineSetup {
            text: Arc::new(model.tokenizer.clone()),
            eos: model.tokenizer.eos().to_vec(),
            plan: MemoryPlan {
                device: "stand-in".into(),
                weights_bytes: 0,
                kv_bytes: 0,
                kv_tokens: KV_BLOCKS * BLOCK_SIZE,
                kv_blocks: KV_BLOCKS,
                arena_bytes: 0,
                total_bytes: 0,
                max_model_len: CONTEXT,
                available_bytes: None,
            },
        };
        let engine = Engine::start(Box::new(runner), setup, self.engine).expect("the engine starts");
        let template = ChatTemplate::new(TEMPLATE, "", "").expect("a sound template");
        let names = vec![MODEL.to_owned(), "alias".to_owned()];
        let local = LocalModel::new(names, engine, model.tokenizer, self.template.then_some(template), model.info);
        let app = AppState::new(self.config, local, self.loopback_only);
        TestServer { router: build_router(app.clone()), app, controls }
    }
}

pub(super) fn server() -> TestServer {
    Plan::default().start()
}

/// A response, read to its end.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Answer {
    pub(super) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The `error` object, which must have OpenAI's shape.
    pub(super) fn error(&self) -> Value {
        let error = self.json()["error"].clone();
        assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()), "{error}");
        assert!(error["type"].is_string(), "{error}");
        assert!(error["code"].is_string() || error["code"].is_null(), "{error}");
        assert!(error["param"].is_string() || error["param"].is_null(), "{error}");
        error
    }

    /// JSON of every event; the last event must be `[DONE]`.
    pub(super) fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, StatusCode::OK, "{}", self.text());
        assert_eq!(self.headers[header::CONTENT_TYPE], "text/event-stream");
        let text = self.text();
        let mut lines: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(lines.pop(), Some("[DONE]"), "{text}");
        lines.into_iter().map(|line| serde_json::from_str(line).expect(line)).collect()
    }
}

impl TestServer {
    pub(super) async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.expect("the router is infallible");
        let (head, body) = response.into_parts();
        let body = body.collect().await.expect("bodies do not fail").to_bytes();
        Answer { status: head.status, headers: head.headers, body }
    }

    pub(super) async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).expect("a request")).await
    }

    pub(super) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_raw(path, body.to_string()).await
    }

    pub(super) async fn post_raw(&self, path: &str, body: impl Into<Body>) -> Answer {
        self.send(json_request(path, body)).await
    }

    pub(super) fn model(&self) -> &LocalModel {
        &self.app.model
    }

    /// A metric's value, summed over its labels.
    pub(super) async fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").await.text();
        let of = |line: &str| line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' '])).map(str::to_owned);
        let values: Vec<f64> = text
            .lines()
            .filter_map(of)
            .map(|rest| rest.rsplit(' ').next().expect("a value").parse().expect(&rest))
            .collect();
        assert!(!values.is_empty(), "no {name} in {text}");
        values.iter().sum()
    }

    /// Waits until no request runs or waits and no block is in use, and checks the block tables.
    pub(super) async fn settles(&self) {
        let metrics = self.model().engine.metrics();
        let busy = || metrics.running.get() + metrics.waiting.get() + metrics.kv_blocks_leased.get() > 0;
        let waiting = || self.model().engine.backlog().0 > 0;
        wait_until("the engine is idle", || !busy() && !waiting()).await;
        let report = self.model().engine.check_integrity().await.expect("sound block tables");
        assert_eq!(report.leased, 0, "{report:?}");
        assert_eq!(report.free + report.cached, report.total, "{report:?}");
    }

    /// Serves on a free port of this machine.
    pub(super) async fn listen(&self) -> std::net::SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("bound");
        tokio::spawn(listen::accept(listener, self.app.clone()));
        addr
    }
}

pub(super) fn json_request(path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::builder()
        .method(Method::POST)
        .uri(path)
        .header(header::CONTENT_TYPE, "application/json")
        .body(body.into())
        .expect("a request")
}

pub(super) async fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// `base` with the fields of `extra` set.
pub(super) fn with(mut base: Value, extra: Value) -> Value {
    let (Value::Object(fields), Value::Object(more)) = (&mut base, extra) else { panic!("both are objects") };
    fields.extend(more);
    base
}
