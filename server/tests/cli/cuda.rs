//! `--device` with no driver, and with the emulated one: the flags, the memory table, a whole server, and its end when the
//! device fails. What the kernels compute is tested where they are.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cupola_kernels::cuda::testing::emulated_driver;
use serde_json::{Value, json};

use super::{Served, cupola, scratch, stdout, text, tiny_model};

/// Flags of a server that starts at once.
const SMALL: &[&str] =
    &["--port", "0", "--device", "cuda", "--kv-cache-memory", "8M", "--served-model-name", "m", "--max-num-seqs", "4"];
const DRIVER: &str = "CUPOLA_CUDA_DRIVER";

/// The command with the emulated driver; `None` after saying so where there is no compiler to build it with.
fn with_device(args: &[&str]) -> Option<Command> {
    match emulated_driver() {
        Ok(driver) => {
            let mut command = cupola(args);
            command.env(DRIVER, driver);
            Some(command)
        }
        Err(why) => {
            let required = std::env::var("CUPOLA_TEST_REQUIRE").is_ok_and(|list| list.contains("all"));
            assert!(!required, "the emulated driver is required: {why}");
            eprintln!("\n*** NOT TESTED: the emulated CUDA driver is missing: {why} ***\n");
            None
        }
    }
}

fn without_driver(args: &[&str]) -> Command {
    let mut command = cupola(args);
    command.env(DRIVER, "/nowhere/libcuda.so.1");
    command
}

#[test]
fn a_device_that_is_not_there_is_an_error_and_auto_says_why_not() {
    let output = without_driver(&["plan", tiny_model(), "--device", "cuda"]).output().expect("the binary runs");
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cuda:0 cannot be used: the driver library cannot be opened"), "{said}");
    assert!(said.contains("choose cpu") && !said.contains("panicked"), "{said}");

    let output = without_driver(&["plan", tiny_model(), "--device", "auto"]).output().expect("the binary runs");
    let said = text(&output.stderr);
    assert!(said.starts_with("no GPU is used: the driver library cannot be opened"), "{said}");
    assert!(stdout(&output).contains("available on cpu"), "{}", stdout(&output));

    let output = without_driver(&["plan", tiny_model(), "--device", "gpu"]).output().expect("the binary runs");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("cpu, cuda, cuda:N or auto"), "{}", text(&output.stderr));
}

#[test]
fn the_plan_is_made_for_the_device() {
    let Some(mut command) = with_device(&["plan", tiny_model(), "--device", "auto", "--json"]) else { return };
    let plan: Value = serde_json::from_str(&stdout(&command.output().expect("the binary runs"))).expect("JSON");
    assert_eq!(plan["device"], "cuda:0 Emulated device (CPU) (1.0 GiB, compute capability 8.0)");
    let number = |key: &str| plan[key].as_u64().expect("a number");
    // Nine tenths of a gibibyte, all of it used.
    assert_eq!(number("available_bytes"), (0.9 * f64::from(1 << 30)) as u64);
    assert!(number("total_bytes") <= number("available_bytes"), "{plan}");
    assert!(number("available_bytes") - number("total_bytes") < 1 << 20, "{plan}");

    let args = ["plan", tiny_model(), "--device", "cuda:0", "--gpu-memory-utilization", "0.5", "--json"];
    let mut command = with_device(&args).expect("as above");
    let half: Value = serde_json::from_str(&stdout(&command.output().expect("the binary runs"))).expect("JSON");
    assert_eq!(half["available_bytes"], 1 << 29);

    let mut command =
        with_device(&["plan", tiny_model(), "--device", "cuda", "--kv-cache-dtype", "int8"]).expect("as above");
    let said = text(&command.output().expect("the binary runs").stderr);
    assert!(said.contains("--kv-cache-dtype must be fp8 on a CUDA device") && said.contains("got int8"), "{said}");
    let output = cupola(&["plan", tiny_model(), "--kv-cache-dtype", "fp8"]).output().expect("the binary runs");
    let said = text(&output.stderr);
    assert!(said.contains("--kv-cache-dtype must be int8 on the CPU") && said.contains("got fp8"), "{said}");

    // Heads of 32 dimensions: 64 bytes of 16-bit keys and values and 2 of exponents for each 128 bytes.
    let args = ["plan", tiny_model(), "--device", "cuda", "--kv-cache-memory", "8M", "--json"];
    let tokens = |more: &[&str]| -> f64 {
        let mut command = with_device(&[&args, more].concat()).expect("as above");
        let plan: Value = serde_json::from_str(&stdout(&command.output().expect("the binary runs"))).expect("JSON");
        plan["kv_tokens"].as_f64().expect("a number")
    };
    let ratio = tokens(&["--kv-cache-dtype", "fp8"]) / tokens(&[]);
    assert!((1.9..1.95).contains(&ratio), "{ratio}");

    let mut command = with_device(&["plan", tiny_model(), "--device", "cuda:7"]).expect("as above");
    let said = text(&command.output().expect("the binary runs").stderr);
    assert!(said.contains("cuda:7 cannot be used: there is no such device; choose cuda:0"), "{said}");
}

#[test]
fn too_little_device_memory_is_said_with_numbers() {
    let Some(mut command) = with_device(&["plan", tiny_model(), "--device", "cuda"]) else { return };
    let output = command.env("CUPOLA_EMULATOR_MEMORY", (64 << 20).to_string()).output().expect("the binary runs");
    let said = text(&output.stderr);
    assert!(said.contains("weights") && said.contains("raise --gpu-memory-utilization"), "{said}");

    // The plan fits, and then others take most of the memory.
    let args = ["serve", tiny_model(), "--device", "cuda", "--port", "0"];
    let mut command = with_device(&args).expect("as above");
    let output = command.env("CUPOLA_EMULATOR_OTHERS", (512 << 20).to_string()).output().expect("the binary runs");
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("the device ran out of memory") && said.contains("kv cache"), "{said}");
    assert!(said.contains("set --kv-cache-memory to at most"), "{said}");
}

#[test]
fn the_start_says_what_multiplies_matrices() {
    for (setting, expected) in
        [("", "matrix products: cuBLASLt 13.0"), ("off", "matrix products: own kernels (CUPOLA_CUBLASLT=off)")]
    {
        let Some(mut command) =
            with_device(&["run", tiny_model(), "a", "--raw", "--device", "cuda", "--max-tokens", "1"])
        else {
            return;
        };
        let output =
            command.env("CUPOLA_CUBLASLT", setting).env("CUPOLA_LOG", "info").output().expect("the binary runs");
        let said = text(&output.stderr);
        assert!(output.status.success() && said.contains(expected), "{said}");
    }
}

fn serve(command: &mut Command) -> Served {
    Served::spawned(command.stdout(Stdio::piped()).stderr(Stdio::piped()))
}

#[test]
fn a_server_on_the_emulated_device_answers_like_itself() {
    let Some(mut command) = with_device(&[&["serve", tiny_model()], SMALL].concat()) else { return };
    let server = serve(&mut command);
    let ask = json!({
        "model": "m", "prompt": "the in re a on", "max_tokens": 6, "temperature": 0, "ignore_eos": true, "logprobs": 2,
    });
    let (status, first) = server.post("/v1/completions", &ask);
    assert!(status.contains("200"), "{status} {first}");
    assert_eq!(first["usage"]["completion_tokens"], 6);
    let logprobs = first["choices"][0]["logprobs"]["token_logprobs"].as_array().expect("log-probabilities");
    assert!(logprobs.iter().all(|value| value.as_f64().is_some_and(|value| value <= 0.0)), "{first}");
    let (_, again) = server.post("/v1/completions", &ask);
    assert_eq!(first["choices"][0]["text"], again["choices"][0]["text"], "a warm prefix changes nothing");
}

#[test]
fn a_device_that_fails_ends_requests_and_is_not_alive() {
    let broken = scratch("cuda").join("broken");
    drop(std::fs::remove_file(&broken));
    let Some(mut command) = with_device(&[&["serve", tiny_model()], SMALL].concat()) else { return };
    let server = serve(command.env("CUPOLA_EMULATOR_FAIL_FILE", &broken));
    assert!(server.get("/live").contains("200"));
    std::fs::write(&broken, "").expect("a scratch file");
    let ask = json!({"model": "m", "prompt": "the in re", "max_tokens": 4, "temperature": 0});
    let (status, answer) = server.post("/v1/completions", &ask);
    assert!(status.contains("500"), "{status} {answer}");
    let began = Instant::now();
    while server.get("/live").contains("200") {
        assert!(began.elapsed() < Duration::from_secs(10), "/live goes on saying ok");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(server.get("/ready").contains("503"), "{}", server.get("/ready"));
    drop(std::fs::remove_file(&broken));
}

#[test]
fn random_weights_serve_from_a_config_alone() {
    let folder = scratch("dummy");
    let whole = cupola_models::testing::tiny_safetensors(&folder, cupola_kernels::WeightType::Bf16, 1);
    let bare = folder.join("bare");
    std::fs::create_dir_all(&bare).expect("a scratch folder");
    std::fs::copy(Path::new(&whole).join("config.json"), bare.join("config.json")).expect("a scratch file");
    let bare = bare.to_str().expect("UTF-8");
    let plan = stdout(&cupola(&["plan", bare, "--load-format", "dummy"]).output().expect("the binary runs"));
    assert!(plan.contains("BF16, random"), "{plan}");
    let server = serve(&mut cupola(&["serve", bare, "--load-format", "dummy", "--port", "0"]));
    let ask = json!({"model": "bare", "prompt": "Hello", "max_tokens": 4, "ignore_eos": true});
    let (status, answer) = server.post("/v1/completions", &ask);
    assert!(status.contains("200"), "{status} {answer}");
}
