//! The built binary as a shell sees it: output, messages and exit codes, on a tiny random model.

#[cfg(unix)]
#[path = "cli/compare.rs"]
mod compare;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[path = "cli/cuda.rs"]
mod cuda;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

use cupola_kernels::WeightType;
use cupola_models::testing;
use serde_json::Value;

fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli").join(name);
    std::fs::create_dir_all(&folder).expect("a scratch folder");
    folder
}

/// A model without a chat template.
fn base_model() -> &'static str {
    static MODEL: OnceLock<String> = OnceLock::new();
    MODEL.get_or_init(|| {
        let path = testing::gemma::tiny_gguf(&scratch("model"), WeightType::Q8_0, 1);
        path.to_str().expect("a UTF-8 path").to_owned()
    })
}

/// A file with a chat template.
fn template() -> &'static str {
    static FILE: OnceLock<String> = OnceLock::new();
    FILE.get_or_init(|| {
        let path = scratch("model").join("template.jinja");
        std::fs::write(&path, testing::TEMPLATE).expect("a scratch file");
        path.to_str().expect("a UTF-8 path").to_owned()
    })
}

fn tiny_model() -> &'static str {
    static MODEL: OnceLock<String> = OnceLock::new();
    MODEL.get_or_init(|| {
        let path = testing::tiny_gguf(&scratch("model"), WeightType::Q8_0, 1);
        path.to_str().expect("a UTF-8 path").to_owned()
    })
}

/// The command in a bare environment: an empty cache, no network, no keys.
fn cupola(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cupola"));
    command.args(args).stdin(Stdio::null()).env("CUPOLA_CACHE", scratch("cache")).env("HF_HUB_OFFLINE", "1");
    command
        .env("HF_HUB_CACHE", scratch("hub"))
        .env("CUPOLA_PIP", "false")
        .env_remove("CUPOLA_API_KEY")
        .env_remove("OPENAI_API_KEY")
        .env_remove("CUPOLA_LOG");
    command
}

fn run(args: &[&str]) -> Output {
    cupola(args).output().expect("the binary runs")
}

fn fed(args: &[&str], input: &str) -> Output {
    let mut child = cupola(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("the binary reads");
    child.wait_with_output().expect("the binary ends")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// Asserts success and returns what came on standard output.
fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}: {}", output.status, text(&output.stderr));
    text(&output.stdout)
}

fn interrupt(child: &Child, signal: &str) {
    let status = Command::new("kill").args([signal, &child.id().to_string()]).status().expect("kill runs");
    assert!(status.success(), "the process is there to be signalled");
}

/// A server that has said where it listens.
struct Served {
    child: Child,
    url: String,
}

impl Served {
    fn start(args: &[&str]) -> Self {
        Self::with(tiny_model(), args)
    }

    fn with(model: &str, args: &[&str]) -> Self {
        let mut all = vec!["serve", model, "--port", "0"];
        all.extend(args);
        Self::spawned(cupola(&all).stdout(Stdio::piped()).stderr(Stdio::piped()))
    }

    /// Starts a command whose output is piped.
    fn spawned(command: &mut Command) -> Self {
        let mut child = command.spawn().expect("the binary runs");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let Some(line) = lines.next() else {
            let mut said = String::new();
            child.stderr.take().expect("piped").read_to_string(&mut said).expect("UTF-8");
            panic!("the server ended before it listened: {said}");
        };
        let line = line.expect("UTF-8");
        let url = line.strip_prefix("listening on ").unwrap_or_else(|| panic!("unexpected first line: {line}"));
        Self { url: url.to_owned(), child }
    }

    /// The status line of a GET.
    fn get(&self, path: &str) -> String {
        let host = self.url.trim_start_matches("http://");
        let mut socket = std::net::TcpStream::connect(host).expect("the server accepts");
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).expect("the server reads");
        let mut answer = String::new();
        socket.read_to_string(&mut answer).expect("UTF-8");
        answer.lines().next().unwrap_or_default().to_owned()
    }

    /// Posts JSON and returns the status line and the body.
    fn post(&self, path: &str, body: &Value) -> (String, Value) {
        let host = self.url.trim_start_matches("http://");
        let mut socket = std::net::TcpStream::connect(host).expect("the server accepts");
        let body = body.to_string();
        let length = body.len();
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        );
        socket.write_all(request.as_bytes()).expect("the server reads");
        let mut answer = String::new();
        socket.read_to_string(&mut answer).expect("UTF-8");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        let status = head.lines().next().expect("a status line").to_owned();
        (status, serde_json::from_str(body).expect("a JSON body"))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn help_is_success_and_a_wrong_flag_is_2() {
    let help = stdout(&run(&["--help"]));
    assert!(help.contains("cupola serve") && help.contains("Examples:"), "{help}");
    for command in [
        &["serve"][..],
        &["run"],
        &["pull"],
        &["models"],
        &["plan"],
        &["bench", "serve"],
        &["bench", "kernel"],
        &["bench", "perplexity"],
    ] {
        let mut args = command.to_vec();
        args.push("--help");
        assert!(stdout(&run(&args)).contains("Usage: cupola"), "{command:?}");
    }
    for args in [&[][..], &["fly"], &["serve", "--no-such-flag"], &["bench", "kernel", "-p", "0", "-n", "0"]] {
        assert_eq!(run(args).status.code(), Some(2), "{args:?}");
    }
    let made_up = run(&["run", "llama-3.2-1b", "hello", "--load-format", "dummy", "--packed-cache", "anywhere"]);
    let said = text(&made_up.stderr);
    assert_eq!(made_up.status.code(), Some(2), "{said}");
    assert!(said.contains("--packed-cache") && said.contains("--load-format dummy"), "{said}");
}

#[test]
fn errors_are_one_sentence_and_exit_1() {
    let damaged = scratch("model").join("damaged.gguf");
    std::fs::write(&damaged, b"GGUF but not really").expect("a scratch file");
    let damaged = damaged.to_str().expect("UTF-8");
    for (args, part) in [
        (&["plan", "smolm2-135m-instruct"][..], "smollm2-135m-instruct"),
        (&["run", "./no/such/file.gguf", "hello"], "no/such/file.gguf"),
        (&["pull", "smollm2-135m-instruct"], "smollm2-135m-instruct"),
        (&["serve", damaged, "--port", "0"], "damaged"),
        (&["bench", "kernel", "-m", damaged], "damaged"),
        (&["plan", tiny_model(), "--kv-cache-memory", "9999T"], "--kv-cache-memory"),
        (&["bench", "serve", "--base-url", "https://localhost"], "--base-url"),
    ] {
        let output = run(args);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        let last = said.lines().last().unwrap_or_default();
        assert!(last.starts_with("error: ") && last.contains(part), "{args:?}: {said}");
        assert!(!said.contains("panicked"), "{args:?}: {said}");
    }
}

#[test]
fn a_public_address_needs_a_key() {
    let output = run(&["serve", tiny_model(), "--host", "0.0.0.0", "--port", "0"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("--api-key"), "{}", text(&output.stderr));
}

#[test]
fn models_plan_and_pull_have_json() {
    let models: Value = serde_json::from_str(&stdout(&run(&["models", "--json"]))).expect("JSON");
    assert!(models.as_array().expect("a list").iter().any(|model| model["default"] == true), "{models}");
    assert!(stdout(&run(&["models"])).contains("smollm2-135m-instruct"));

    let plan: Value =
        serde_json::from_str(&stdout(&run(&["plan", tiny_model(), "--json", "--max-num-seqs", "2"]))).expect("JSON");
    assert!(plan["total_bytes"].as_u64() > plan["kv_bytes"].as_u64(), "{plan}");
    assert!(stdout(&run(&["plan", tiny_model()])).contains("weights"));

    let pulled: Value = serde_json::from_str(&stdout(&run(&["pull", tiny_model(), "--json"]))).expect("JSON");
    assert_eq!(pulled["path"], tiny_model());
}

#[test]
fn a_closed_pipe_is_no_error() {
    let mut child = cupola(&["models"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary runs");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("the binary ends");
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn run_answers_a_prompt_from_argument_or_pipe() {
    let flags = ["--raw", "--temperature", "0", "--max-tokens", "8"];
    let call = |prompt: &[&str], input: &str| {
        let mut args = vec!["run", tiny_model()];
        args.extend(prompt);
        args.extend(flags);
        stdout(&fed(&args, input))
    };
    let given = call(&["hello"], "");
    assert!(given.ends_with('\n'), "{given:?}");
    assert_eq!(call(&["-"], "hello"), given);
    assert_eq!(call(&[], "hello"), given);
    let json: Value = serde_json::from_str(&call(&["hello", "--json"], "")).expect("JSON");
    assert_eq!(json["text"].as_str().expect("text").trim_end(), given.trim_end());
    assert!(json["completion_tokens"].as_u64().is_some_and(|n| (1..=8).contains(&n)), "{json}");

    let empty = fed(&["run", tiny_model()], " \n");
    assert_eq!(empty.status.code(), Some(2), "{}", text(&empty.stderr));
}

#[test]
fn packed_weights_are_kept_mapped_and_never_trusted() {
    let folder = scratch("packed-cache").join("kept");
    let args = ["run", tiny_model(), "hello", "--temperature", "0", "--max-tokens", "8", "--packed-cache"];
    let answer = || stdout(&run(&[&args[..], &[folder.to_str().expect("UTF-8")]].concat()));
    let plain = stdout(&run(&args[..args.len() - 1]));
    assert_eq!(answer(), plain, "packed by this start");
    let files: Vec<PathBuf> =
        std::fs::read_dir(&folder).expect("made").map(|entry| entry.expect("readable").path()).collect();
    let [file] = &files[..] else { panic!("one file, got {files:?}") };
    let (whole, written) =
        (std::fs::read(file).expect("written"), std::fs::metadata(file).expect("there").modified().ok());
    assert_eq!(answer(), plain, "mapped by this start");
    assert_eq!(std::fs::metadata(file).expect("there").modified().ok(), written, "and not written again");
    let mut damaged = whole.clone();
    *damaged.last_mut().expect("not empty") ^= 1;
    let at = damaged.len() / 2;
    damaged[at] ^= 1;
    std::fs::write(file, &damaged).expect("writable");
    assert_eq!(answer(), plain, "damaged");
    assert!(std::fs::read(file).expect("there") == whole, "and made anew");
}

#[test]
fn a_base_model_says_that_it_has_no_chat_template() {
    let flags = ["--temperature", "0", "--max-tokens", "4"];
    let call = |more: &[&str]| {
        let mut args = vec!["run", base_model(), "hello"];
        args.extend(flags);
        args.extend(more);
        run(&args)
    };
    let plain = call(&[]);
    let said = text(&plain.stderr);
    assert!(
        said.starts_with("note: gemma has no chat template and") && said.contains("--chat-template FILE"),
        "{said}"
    );
    let raw = call(&["--raw"]);
    assert_eq!((stdout(&plain), text(&raw.stderr)), (stdout(&raw), String::new()), "--raw says that it is meant");
    let json = |output: &Output| serde_json::from_str::<Value>(&stdout(output)).expect("JSON");
    let templated = call(&["--json", "--chat-template", template()]);
    assert_eq!(text(&templated.stderr), "");
    let tokens = |output: &Output| json(output)["prompt_tokens"].as_u64().expect("a number");
    assert!(tokens(&templated) > tokens(&call(&["--json", "--raw"])), "the template is part of the prompt");
    let chat = fed(&["run", base_model(), "-i", "--max-tokens", "2"], "hello\n");
    assert!(text(&chat.stderr).contains("each line is continued on its own"), "{}", text(&chat.stderr));

    let broken = scratch("model").join("broken.jinja");
    std::fs::write(&broken, "{% if %}").expect("a scratch file");
    for (file, part) in [(broken.to_str().expect("UTF-8"), "chat template"), ("./no.jinja", "no.jinja")] {
        let refused = call(&["--chat-template", file]);
        assert_eq!(refused.status.code(), Some(1));
        assert!(text(&refused.stderr).contains(part), "{}", text(&refused.stderr));
    }
}

#[test]
fn a_base_model_serves_completions_and_chat_once_it_has_a_template() {
    let chat = serde_json::json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2});
    let completion = serde_json::json!({"prompt": "hi", "max_tokens": 2});
    let server = Served::with(base_model(), &["--max-num-seqs", "2"]);
    let (status, body) = server.post("/v1/chat/completions", &chat);
    assert!(status.contains(" 400 "), "{status}");
    assert_eq!(body["error"]["code"], "no_chat_template");
    assert!(body["error"]["message"].as_str().expect("text").contains("--chat-template FILE"), "{body}");
    assert!(server.post("/v1/completions", &completion).0.contains(" 200 "));
    drop(server);
    let server = Served::with(base_model(), &["--max-num-seqs", "2", "--chat-template", template()]);
    let (status, body) = server.post("/v1/chat/completions", &chat);
    assert!(status.contains(" 200 ") && body["choices"][0]["message"]["content"].is_string(), "{status} {body}");
}

#[test]
fn a_chat_takes_commands_and_ends_with_its_input() {
    let args = ["run", tiny_model(), "-i", "--raw", "--max-tokens", "4", "--verbose"];
    let output = fed(&args, "/stats\nhello\n/stats\n/nonsense\n/clear\n/help\n/exit\nnever read\n");
    let said = stdout(&output);
    for part in ["no answer yet", "generated; first token after", "no such command: /nonsense", "/system TEXT"] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    assert!(text(&output.stderr).contains("tokens/s"), "--verbose");
    assert!(fed(&["run", tiny_model(), "-i", "--raw"], "").status.success(), "the end of input ends a chat");
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_an_answer_and_not_the_chat() {
    let Some(model) = testing::real_model() else { return };
    let args = ["run", model.to_str().expect("UTF-8"), "-i", "--raw", "--temperature", "0"];
    let mut child = cupola(&args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    let mut input = child.stdin.take().expect("piped");
    let mut output = child.stdout.take().expect("piped");
    input.write_all(b"One, two, three, four,\n").expect("the chat reads");
    // The answer has begun: from here on it runs until it is stopped or the context is full.
    output.read_exact(&mut [0; 1]).expect("an answer begins");
    interrupt(&child, "-INT");
    input.write_all(b"/stats\n/exit\n").expect("the chat goes on");
    let mut rest = Vec::new();
    output.read_to_end(&mut rest).expect("the chat ends");
    let rest = String::from_utf8_lossy(&rest).into_owned();
    assert!(child.wait().expect("it ends").success());
    assert!(rest.contains(" [stopped]\n"), "the answer was stopped: {rest}");
    assert!(rest.contains("generated; first token after") && rest.contains("; cancelled"), "the chat went on: {rest}");
}

#[test]
fn bench_kernel_writes_every_format() {
    let shape = ["-p", "16,0", "-n", "4", "-b", "1,3", "-d", "0,8", "-r", "2", "-t", "1"];
    let with = |format: &str| {
        let mut args = vec!["bench", "kernel", "-m", tiny_model(), "-o", format];
        args.extend(shape);
        stdout(&run(&args))
    };
    let rows: Value = serde_json::from_str(&with("json")).expect("JSON");
    let names: Vec<&str> = rows.as_array().expect("rows").iter().filter_map(|row| row["test"].as_str()).collect();
    assert_eq!(names, ["pp16", "pp16 @ d8", "tg4", "tg4 b3", "tg4 @ d8", "tg4 b3 @ d8"]);
    assert!(rows[0]["avg_ts"].as_f64().expect("a rate") > 0.0);
    assert_eq!(rows[0]["samples_ts"].as_array().map(Vec::len), Some(2));
    assert_eq!(with("md").lines().count(), 2 + 6);
    assert_eq!(with("csv").lines().count(), 1 + 6);
    assert_eq!(with("jsonl").lines().count(), 6);
}

#[cfg(unix)]
#[test]
fn bench_perplexity_scores_a_text_and_says_what_is_wrong_with_one() {
    let text = scratch("text").join("text.txt");
    std::fs::write(&text, "The lamp was lit at dusk, and the ships went by. ".repeat(40)).expect("a writable folder");
    let with = |file: &str, context: &str| {
        run(&["bench", "perplexity", "-m", tiny_model(), "-f", file, "-c", context, "-t", "1", "--json"])
    };
    let text = text.to_str().expect("UTF-8");
    let result: Value = serde_json::from_str(&stdout(&with(text, "32"))).expect("JSON");
    let windows = result["windows"].as_u64().expect("a count");
    assert_eq!(result["scored_tokens"].as_u64(), Some(windows * 15), "{result}");
    assert!(result["perplexity"].as_f64().is_some_and(|p| p > 1.0), "{result}");
    for (file, context, named) in [("no-such.txt", "32", "no-such.txt"), (text, "100000", "100000")] {
        let refused = with(file, context);
        assert!(!refused.status.success() && self::text(&refused.stderr).contains(named), "{refused:?}");
    }
}

#[test]
fn serve_says_where_bench_measures_it_and_sigterm_ends_it() {
    let mut server = Served::start(&["--api-key", "secret", "--max-num-seqs", "4"]);
    let folder = scratch("results");
    let folder = folder.to_str().expect("UTF-8");
    let bench = |key: &str| {
        run(&[
            "bench",
            "serve",
            "--base-url",
            &server.url,
            "--api-key",
            key,
            "--num-prompts",
            "6",
            "--max-concurrency",
            "3",
            "--random-input-len",
            "12",
            "--random-output-len",
            "5",
            "--ignore-eos",
            "--num-warmups",
            "1",
            "--json",
            "--result-dir",
            folder,
            "--result-filename",
            "result.json",
            "--metadata",
            "run=1",
        ])
    };
    let refused = bench("wrong");
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("--api-key"), "{}", text(&refused.stderr));

    let json: Value = serde_json::from_str(&stdout(&bench("secret"))).expect("JSON");
    for (key, value) in [("completed", 6), ("failed", 0), ("total_input_tokens", 72), ("total_output_tokens", 30)] {
        assert_eq!(json[key], value, "{key} in {json:#}");
    }
    assert_eq!(json["run"], "1");
    assert_eq!(json["cupola"]["prompt_lengths_exact"], true);
    let saved = std::fs::read_to_string(Path::new(folder).join("result.json")).expect("saved");
    assert_eq!(serde_json::from_str::<Value>(&saved).expect("JSON"), json);

    interrupt(&server.child, "-TERM");
    assert!(server.child.wait().expect("it ends").success(), "SIGTERM ends a server cleanly");
}

#[test]
fn a_taken_port_is_one_sentence() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = taken.local_addr().expect("bound").port().to_string();
    let output = run(&["serve", tiny_model(), "--port", &port]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("already in use"), "{}", text(&output.stderr));
}

#[test]
fn nobody_to_measure_is_one_sentence_with_what_to_do() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound");
    let output = run(&["bench", "serve", "--port", &free.port().to_string(), "--num-prompts", "1"]);
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(said.starts_with("error: cannot connect to 127.0.0.1:") && said.contains("cupola serve"), "{said}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_a_single_answer_with_130() {
    // The tiny model would be done before the signal comes.
    let Some(model) = testing::real_model() else { return };
    let args = ["run", model.to_str().expect("UTF-8"), "One, two, three, four,", "--raw", "--temperature", "0"];
    let mut child = cupola(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary runs");
    let mut output = child.stdout.take().expect("piped");
    output.read_exact(&mut [0; 1]).expect("an answer begins");
    interrupt(&child, "-INT");
    let mut rest = Vec::new();
    output.read_to_end(&mut rest).expect("the answer ends");
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
}
