//! The OpenAI Python SDK against a real server.

use std::path::Path;
use std::process::Command;

use crate::support::server::Server;
use crate::support::{default_model, skip};

#[test]
fn openai_python_sdk() {
    let Some(model) = default_model() else { return };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = [root.join("../.venv/bin/python"), "python3".into()].into_iter().find(|python| {
        Command::new(python).args(["-c", "import openai"]).output().is_ok_and(|output| output.status.success())
    });
    let Some(python) = python else {
        return skip(
            "openai",
            "no python with the openai package (python3 -m venv .venv, then install tests/clients/requirements.txt)",
        );
    };
    let server = Server::start(&model, &[]);
    let output = Command::new(python)
        .arg(root.join("clients/openai_sdk.py"))
        .args([server.url.as_str(), "test-model"])
        .output()
        .expect("python starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    println!("{}", text(&output.stdout));
    assert!(output.status.success(), "{}", text(&output.stderr));
}
