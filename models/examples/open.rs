//! What opening a model costs before any weight is loaded: `cargo run --release -p cupola-models --example open -- FILE`
//! prints milliseconds and the memory that it takes (Linux).

use std::path::Path;
use std::time::Instant;

use cupola_models::Model;
use cupola_models::weights::gguf::Gguf;

/// A line of `/proc/self/status`, in MiB; 0 where the system has none.
fn status(key: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}

fn report(what: &str, began: Instant) {
    let (own, peak) = (status("RssAnon"), status("VmHWM"));
    println!(
        "{what:<12} {:>7.1} ms   {own:>6.1} MiB held   {peak:>6.1} MiB peak resident",
        began.elapsed().as_secs_f64() * 1e3
    );
}

fn main() {
    let path = std::env::args().nth(1).expect("the path of a .gguf file or model folder");
    let path = Path::new(&path);
    report("start", Instant::now());
    if path.extension().is_some_and(|extension| extension == "gguf") {
        let began = Instant::now();
        drop(Gguf::open(path).expect("a GGUF file"));
        report("metadata", began);
    }
    let began = Instant::now();
    let model = Model::open(path).expect("a model");
    report("open", began);
    let began = Instant::now();
    let tokens = model.tokenizer.encode("The quick brown fox jumps over the lazy dog.", true).expect("plain text");
    report("first text", began);
    println!("{} tokens of {}", tokens.len(), model.tokenizer.vocab_size());
}
