//! A real `cupola serve` process on a free port, stopped when the test is done with it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

/// The `cupola` binary of this build, built first when it is not.
pub(crate) fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        // .../target/<profile>/deps/e2e-<hash>  ->  .../target/<profile>/cupola
        let test = std::env::current_exe().expect("the path of this test");
        let profile = test.ancestors().nth(2).expect("a profile folder above deps/");
        let mut build = Command::new(env!("CARGO"));
        build
            .args(["build", "--quiet", "--package", "cupola"])
            .env("CARGO_TARGET_DIR", profile.parent().expect("target"));
        if profile.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().expect("cargo starts").success(), "cargo build --package cupola failed");
        profile.join("cupola")
    })
}

/// A running server.
pub(crate) struct Server {
    child: Child,
    /// `http://127.0.0.1:PORT`
    pub(crate) url: String,
}

impl Server {
    /// Starts `cupola serve MODEL --port 0 ARGS...` and waits until it listens.
    pub(crate) fn start(model: &Path, args: &[&str]) -> Self {
        let mut command = Command::new(binary());
        command.arg("serve").arg(model).args(["--port", "0", "--served-model-name", "test-model"]).args(args);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("cupola starts");
        let mut lines = BufReader::new(child.stdout.take().expect("a piped stdout")).lines();
        let url = lines.by_ref().find_map(|line| {
            line.expect("UTF-8 on stdout").strip_prefix("listening on ").map(|url| url.trim().to_owned())
        });
        Self { child, url: url.expect("the server says where it listens before it ends") }
    }

    /// Sends a request with a JSON body; the status and the parsed answer.
    pub(crate) fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.post_raw(path, body.to_string().as_bytes())
    }

    /// Sends any bytes as a JSON request.
    pub(crate) fn post_raw(&self, path: &str, body: &[u8]) -> (u16, Value) {
        let sent = agent().post(format!("{}{path}", self.url)).header("content-type", "application/json").send(body);
        read_json(sent.expect("the server answers"))
    }

    /// Gets a JSON document.
    pub(crate) fn get(&self, path: &str) -> (u16, Value) {
        read_json(agent().get(format!("{}{path}", self.url)).call().expect("the server answers"))
    }

    /// Gets a text document.
    pub(crate) fn get_text(&self, path: &str) -> String {
        let mut answer = agent().get(format!("{}{path}", self.url)).call().expect("the server answers");
        answer.body_mut().read_to_string().expect("a text body")
    }

    /// Sends a streaming request and collects the JSON of every event, without the final `[DONE]`.
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut answer = agent()
            .post(format!("{}{path}", self.url))
            .header("content-type", "application/json")
            .send(body.to_string().as_bytes())
            .expect("the server answers");
        assert_eq!(answer.status().as_u16(), 200, "{}", answer.body_mut().read_to_string().unwrap_or_default());
        let body = answer.body_mut().read_to_string().expect("a text body");
        let mut events: Vec<&str> = body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(events.pop(), Some("[DONE]"), "a complete stream ends with [DONE]");
        events.into_iter().map(|event| serde_json::from_str(event).expect("JSON in every event")).collect()
    }

    /// The value of a metric without labels, or the sum over its labels.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.get_text("/metrics");
        let values = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            rest.starts_with(['{', ' ']).then(|| rest.rsplit(' ').next()?.parse::<f64>().ok())?
        });
        let values: Vec<f64> = values.collect();
        assert!(!values.is_empty(), "no metric {name} in:\n{text}");
        values.iter().sum()
    }

    /// Waits until a metric has a value, for things that end within a step or two: a busy machine may take its time over them.
    pub(crate) fn wait_for_metric(&self, name: &str, wanted: f64) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.metric(name) != wanted {
            assert!(Instant::now() < deadline, "{name} is {} and not {wanted}", self.metric(name));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Process id, for signals.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the process to end by itself.
    pub(crate) fn wait(&mut self) -> std::process::ExitStatus {
        self.child.wait().expect("the process can be waited for")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The process may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(300)))
        .build()
        .into()
}

fn read_json(mut answer: http::Response<ureq::Body>) -> (u16, Value) {
    let status = answer.status().as_u16();
    let text = answer.body_mut().read_to_string().expect("a text body");
    let value = serde_json::from_str(&text);
    (status, value.unwrap_or_else(|error| panic!("status {status} with a body that is not JSON ({error}): {text}")))
}
