//! The engine's promises on the real model: the same tokens whatever runs beside a request.

use std::time::Duration;

use cupola_engine::request::{Event, Request, SamplingParams, StopParams};
use cupola_engine::{Engine, EngineConfig, EngineHandle};
use cupola_kernels::cpu::CpuConfig;
use cupola_models::Model;

use crate::support::default_model;

const TOKENS: usize = 40;

fn start(model: &Model, config: EngineConfig) -> EngineHandle {
    Engine::load(model, config, CpuConfig::default()).expect("the engine starts")
}

fn config() -> EngineConfig {
    EngineConfig { max_model_len: Some(1024), max_num_seqs: 32, ..EngineConfig::default() }
}

/// Requests of all kinds: short and long prompts, shared prefixes, greedy and sampled.
fn requests(model: &Model, n: usize) -> Vec<Request> {
    let shared = "You are a careful assistant who answers in one sentence. ".repeat(12);
    (0..n)
        .map(|i| {
            let own = format!("Question {i}: what is {} times {}? ", i + 3, i * 7 + 2).repeat(1 + i % 5 * 4);
            let text = if i % 3 == 0 { own } else { format!("{shared}{own}") };
            let mut request = Request::greedy(model.tokenizer.encode(&text, true).expect("plain text"), TOKENS);
            request.stop = StopParams { max_tokens: Some(TOKENS), ignore_eos: true, ..StopParams::default() };
            if i % 4 == 3 {
                let seed = Some(i as u64);
                request.sampling = SamplingParams { temperature: 0.9, top_p: 0.95, seed, ..SamplingParams::default() };
            }
            request
        })
        .collect()
}

async fn answer(engine: &EngineHandle, request: Request) -> Vec<u32> {
    let mut stream = engine.submit_now(request).expect("the queue has room");
    let mut all = Vec::new();
    while let Some(event) = stream.next().await {
        match event {
            Event::Tokens { tokens, .. } => all.extend(tokens),
            Event::Failed { message } => panic!("{message}"),
            _ => {}
        }
    }
    all
}

/// Each request alone on a fresh engine without prefix reuse, its prompt in one chunk where it fits.
fn alone(model: &Model, requests: &[Request]) -> Vec<Vec<u32>> {
    let engine = start(model, EngineConfig { enable_prefix_caching: false, max_num_batched_tokens: 1024, ..config() });
    requests.iter().map(|request| block_on(answer(&engine, request.clone()))).collect()
}

/// Runs a future, and the tasks it spawns, on this thread.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, future)
}

/// All requests with at most `concurrency` at a time, arriving at uneven moments, with cancelled ones in between.
fn together(engine: &EngineHandle, requests: &[Request], concurrency: usize) -> Vec<Vec<u32>> {
    block_on(async {
        let gate = std::rc::Rc::new(tokio::sync::Semaphore::new(concurrency));
        let tasks: Vec<_> = requests
            .iter()
            .enumerate()
            .map(|(i, request)| {
                let (gate, engine, request) = (gate.clone(), engine.clone(), request.clone());
                tokio::task::spawn_local(async move {
                    tokio::time::sleep(Duration::from_millis((i as u64 * 37) % 90)).await;
                    let _place = gate.acquire().await.expect("the gate stays open");
                    if i % 5 == 2 {
                        // A twin that leaves after its second event, while the real one goes on.
                        let mut twin = engine.submit_now(request.clone()).expect("the queue has room");
                        twin.next().await;
                        twin.next().await;
                    }
                    answer(&engine, request).await
                })
            })
            .collect();
        let mut answers = Vec::new();
        for task in tasks {
            answers.push(task.await.expect("no task panics"));
        }
        answers
    })
}

fn check(engine: &EngineHandle) {
    let report = block_on(engine.check_integrity()).expect("the key/value pool is consistent");
    assert_eq!((report.leased, report.free + report.cached), (0, report.total));
}

#[test]
fn company_does_not_change_an_answer() {
    let Some(path) = default_model() else { return };
    let model = Model::open(&path).expect("the default model opens");
    for concurrency in [1, 7, 32] {
        let requests = requests(&model, concurrency.max(6));
        let expected = alone(&model, &requests);
        // Chunks of 64 tokens: every longer prompt is prefilled in pieces, mixed with others' decode steps.
        let engine = start(&model, EngineConfig { max_num_batched_tokens: 64, ..config() });
        assert_eq!(together(&engine, &requests, concurrency), expected, "cold, concurrency {concurrency}");
        check(&engine);
        assert_eq!(together(&engine, &requests, concurrency), expected, "warm, concurrency {concurrency}");
        check(&engine);
    }
}

#[test]
fn preemption_does_not_change_an_answer() {
    let Some(path) = default_model() else { return };
    let model = Model::open(&path).expect("the default model opens");
    let requests = requests(&model, 12);
    let expected = alone(&model, &requests);
    // Room for one sequence of full length and little more, so that running ones must give way.
    let bytes = model.spec.kv_layout(cupola_kernels::KvType::F16).token_bytes() as u64 * 1152;
    let engine = start(&model, EngineConfig { kv_cache_bytes: Some(bytes), ..config() });
    assert_eq!(together(&engine, &requests, 12), expected);
    assert!(engine.metrics().preemptions.get() > 0, "the pool was small enough to preempt");
    check(&engine);
}
