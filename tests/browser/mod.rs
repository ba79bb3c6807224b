//! The chat page in headless Chromium, driven by keyboard (see `chat.mjs`).

use std::path::Path;
use std::process::Command;

use crate::support::server::Server;
use crate::support::{default_model, skip};

#[test]
fn chat_page() {
    let Some(model) = default_model() else { return };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("browser");
    let chromium = std::env::var("CUPOLA_CHROMIUM").unwrap_or_else(|_| "/usr/bin/chromium".to_owned());
    if !Path::new(&chromium).exists() {
        return skip("browser", "no Chromium at /usr/bin/chromium (CUPOLA_CHROMIUM names another place)");
    }
    if !folder.join("node_modules/playwright-core").exists() {
        return skip("browser", "no playwright-core (run `npm ci` in tests/browser)");
    }
    let server = Server::start(&model, &[]);
    let locked = Server::start(&model, &["--api-key", "open-sesame"]);
    let mut test = Command::new("node");
    test.arg(folder.join("chat.mjs")).args(["--url", &server.url, "--locked-url", &locked.url, "--key", "open-sesame"]);
    if let Some(picture) = std::env::var_os("CUPOLA_TEST_SCREENSHOT") {
        test.arg("--screenshot").arg(picture);
    }
    let output = test.output().expect("node starts");
    println!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
