//! Offline generation: `cargo run --release -p cupola-engine --example generate -- MODEL.gguf PROMPT...`
//!
//! Every prompt is one request; they run together and each is printed as it comes to its end.

use std::path::Path;

use cupola_engine::{Device, Engine, EngineConfig, Event, Request};
use cupola_models::Model;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: generate MODEL.gguf PROMPT...")?;
    let model = Model::open(Path::new(&path))?;
    let engine = Engine::load(&model, EngineConfig::default(), &Device::default())?;

    let mut streams = Vec::new();
    for prompt in arguments {
        let tokens = model.tokenizer.encode(&prompt, true)?;
        streams.push((prompt, engine.submit_now(Request::greedy(tokens, 64))?));
    }
    for (prompt, mut stream) in streams {
        print!("{prompt}");
        while let Some(event) = stream.blocking_next() {
            match event {
                Event::Prompt { .. } => {}
                Event::Tokens { text, .. } => print!("{text}"),
                Event::Finished { text, reason, usage, .. } => println!("{text}\n  [{reason:?}, {usage:?}]\n"),
                Event::Failed { message } => println!("\n  [{message}]\n"),
            }
        }
    }
    Ok(())
}
