//! `GET /metrics` in Prometheus' text format (<https://prometheus.io/docs/instrumenting/exposition_formats/>): the only
//! place that names a metric.
//!
//! What vLLM measures too carries vLLM's name, labels and unit, so that its dashboards and scrapers work; the rest is
//! `cupola_*`, and HTTP traffic is `http_*` as usual.

use std::fmt::{Display, Write};

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use cupola_engine::metrics::{EngineMetrics, Histogram};
use http::header;

use crate::app::AppState;
use crate::meter::{DURATION_BOUNDS, Meter};

/// The route.
pub(crate) async fn metrics(State(app): State<AppState>) -> Response {
    let mut page = Page::default();
    let model = Labels::default().with("model_name", app.model.name()).with("engine", 0);
    let engine = &app.model.engine;
    vllm(&mut page, engine.metrics(), &model);
    native(&mut page, engine.metrics(), &model);

    page.family("cupola_engine_up", "gauge", "1 while the engine thread runs");
    page.sample("cupola_engine_up", &model, u8::from(engine.is_alive()));
    page.family("cupola_queued_prompt_tokens", "gauge", "Prompt tokens waiting in the queue");
    page.sample("cupola_queued_prompt_tokens", &model, engine.backlog().1);
    page.family("cupola_step_age_seconds", "gauge", "How long the step in progress has been running");
    page.sample("cupola_step_age_seconds", &model, engine.heartbeat_age().as_secs_f64());
    let plan = engine.plan();
    page.family("cupola_memory_bytes", "gauge", "Memory as planned at start");
    for (kind, bytes) in [("weights", plan.weights_bytes), ("kv", plan.kv_bytes), ("arenas", plan.arena_bytes)] {
        page.sample("cupola_memory_bytes", &model.clone().with("kind", kind), bytes);
    }
    page.family("vllm:cache_config_info", "gauge", "Shape of the key/value pool");
    let shape = model.clone().with("block_size", cupola_kernels::kv::BLOCK_SIZE).with("num_gpu_blocks", plan.kv_blocks);
    page.sample("vllm:cache_config_info", &shape, 1);

    http(&mut page, &app.meter);
    page.family("cupola_build_info", "gauge", "The version that runs");
    page.sample("cupola_build_info", &Labels::default().with("version", env!("CARGO_PKG_VERSION")), 1);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page.0).into_response()
}

/// The set that vLLM's dashboards draw.
fn vllm(page: &mut Page, m: &EngineMetrics, labels: &Labels) {
    let counters = [
        ("vllm:prompt_tokens_total", "Prompt tokens processed, cached ones included", m.prompt_tokens.get()),
        ("vllm:generation_tokens_total", "Tokens generated", m.generation_tokens.get()),
        ("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache", m.prefix_queries.get()),
        ("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache", m.prefix_hits.get()),
        ("vllm:num_preemptions_total", "Requests that lost their blocks and were computed again", m.preemptions.get()),
    ];
    for (name, help, value) in counters {
        page.family(name, "counter", help);
        page.sample(name, labels, value);
    }
    page.family("vllm:request_success_total", "counter", "Requests ended, by reason");
    let cancelled = m.cancelled_running.get() + m.cancelled_waiting.get();
    let reasons = [
        ("stop", m.finished_stop.get()),
        ("length", m.finished_length.get()),
        ("abort", cancelled),
        ("error", m.failed.get()),
    ];
    for (reason, count) in reasons {
        page.sample("vllm:request_success_total", &labels.clone().with("finished_reason", reason), count);
    }
    page.family("vllm:num_requests_running", "gauge", "Requests running");
    page.sample("vllm:num_requests_running", labels, m.running.get());
    page.family("vllm:num_requests_waiting", "gauge", "Requests waiting, preempted ones included");
    page.sample("vllm:num_requests_waiting", labels, m.waiting.get());
    for name in ["vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"] {
        page.family(name, "gauge", "Share of the key/value pool in use, 0 to 1");
        page.sample(name, labels, m.kv_usage());
    }
    let histograms = [
        ("vllm:time_to_first_token_seconds", "From submission to the first token", &m.time_to_first_token),
        ("vllm:inter_token_latency_seconds", "Between consecutive tokens of a request", &m.inter_token_latency),
        ("vllm:time_per_output_token_seconds", "Older name of the inter-token latency", &m.inter_token_latency),
        (
            "vllm:request_time_per_output_token_seconds",
            "Mean after the first token, by request",
            &m.time_per_output_token,
        ),
        ("vllm:e2e_request_latency_seconds", "From submission to the end", &m.e2e),
        ("vllm:request_queue_time_seconds", "From submission to the first step", &m.queue),
        ("vllm:request_prefill_time_seconds", "From the first step to the first token", &m.prefill),
        ("vllm:request_decode_time_seconds", "From the first token to the last", &m.decode),
        ("vllm:request_prompt_tokens", "Prompt lengths", &m.request_prompt_tokens),
        ("vllm:request_generation_tokens", "Answer lengths", &m.request_generation_tokens),
        ("vllm:request_params_max_tokens", "max_tokens of requests", &m.request_max_tokens),
        ("vllm:request_max_num_generation_tokens", "max_tokens of requests, older name", &m.request_max_tokens),
        ("vllm:iteration_tokens_total", "Rows of a step", &m.iteration_tokens),
    ];
    for (name, help, histogram) in histograms {
        page.histogram(name, help, labels, histogram);
    }
}

/// What vLLM has no name for.
fn native(page: &mut Page, m: &EngineMetrics, labels: &Labels) {
    let counters = [
        ("cupola_computed_tokens_total", "Rows computed, recomputation included", m.computed_tokens.get()),
        ("cupola_steps_total", "Steps run", m.steps.get()),
        (
            "cupola_steps_ahead_total",
            "Steps submitted before the tokens of the one before were known",
            m.steps_ahead.get(),
        ),
    ];
    for (name, help, value) in counters {
        page.family(name, "counter", help);
        page.sample(name, labels, value);
    }
    page.family("cupola_requests_cancelled_total", "counter", "Requests whose client left, by phase");
    for (phase, count) in [("waiting", m.cancelled_waiting.get()), ("running", m.cancelled_running.get())] {
        page.sample("cupola_requests_cancelled_total", &labels.clone().with("phase", phase), count);
    }
    page.family("cupola_engine_rejected_total", "counter", "Requests the engine refused, by reason");
    let refused = [("queue_full", m.rejected_queue_full.get()), ("too_long", m.rejected_too_long.get())];
    for (reason, count) in refused {
        page.sample("cupola_engine_rejected_total", &labels.clone().with("reason", reason), count);
    }
    page.family("cupola_kv_blocks", "gauge", "Blocks of the key/value pool, by state");
    let (total, leased, cached) = (m.kv_blocks_total.get(), m.kv_blocks_leased.get(), m.kv_blocks_cached.get());
    let free = total.saturating_sub(leased + cached);
    for (state, count) in [("leased", leased), ("cached", cached), ("free", free)] {
        page.sample("cupola_kv_blocks", &labels.clone().with("state", state), count);
    }
    page.family("cupola_prefill_tokens_per_second", "gauge", "Prompt tokens computed a second, smoothed");
    page.sample("cupola_prefill_tokens_per_second", labels, m.prefill_rate.get());
    page.histogram("cupola_step_seconds", "Duration of a step", labels, &m.step_time);
    page.histogram("cupola_step_overhead_seconds", "A step without its forward pass", labels, &m.step_overhead);
}

fn http(page: &mut Page, meter: &Meter) {
    page.family("http_requests_total", "counter", "Requests, by route, method and status");
    for (series, count) in meter.requests() {
        let labels = Labels::default()
            .with("handler", &series.handler)
            .with("method", series.method)
            .with("status", series.status);
        page.sample("http_requests_total", &labels, count);
    }
    page.family("http_request_duration_seconds", "histogram", "From request head to the end of the answer, by route");
    for (handler, durations) in meter.durations() {
        let bounds = DURATION_BOUNDS.iter().copied().chain([f64::INFINITY]);
        let mut total = 0;
        let buckets = bounds.zip(durations.counts).map(|(bound, count)| {
            total += count;
            (bound, total)
        });
        let labels = Labels::default().with("handler", &handler);
        page.buckets("http_request_duration_seconds", &labels, buckets, durations.sum);
    }
    page.family("cupola_requests_rejected_total", "counter", "Requests answered with an error, by code");
    for (reason, count) in meter.rejected() {
        page.sample("cupola_requests_rejected_total", &Labels::default().with("reason", reason), count);
    }
    let none = Labels::default();
    page.family("cupola_http_requests_in_flight", "gauge", "Requests being answered");
    page.sample("cupola_http_requests_in_flight", &none, meter.in_flight());
    page.family("cupola_http_connections", "gauge", "Open connections");
    page.sample("cupola_http_connections", &none, meter.connections());
    page.family("cupola_http_clients_gone_total", "counter", "Requests whose client left before the end");
    page.sample("cupola_http_clients_gone_total", &none, meter.client_gone());
}

/// Label pairs, rendered.
#[derive(Clone, Default)]
struct Labels(String);

impl Labels {
    fn with(mut self, name: &str, value: impl Display) -> Self {
        let value = value.to_string().replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let comma = if self.0.is_empty() { "" } else { "," };
        put(&mut self.0, format_args!("{comma}{name}=\"{value}\""));
        self
    }
}

/// The text being built.
#[derive(Default)]
struct Page(String);

fn put(out: &mut String, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("writing to memory succeeds");
}

impl Page {
    /// Begins the samples of one metric.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        put(&mut self.0, format_args!("# HELP {name} {help}.\n# TYPE {name} {kind}\n"));
    }

    fn sample(&mut self, name: &str, labels: &Labels, value: impl Display) {
        match labels.0.as_str() {
            "" => put(&mut self.0, format_args!("{name} {value}\n")),
            labels => put(&mut self.0, format_args!("{name}{{{labels}}} {value}\n")),
        }
    }

    fn histogram(&mut self, name: &str, help: &str, labels: &Labels, histogram: &Histogram) {
        self.family(name, "histogram", help);
        self.buckets(name, labels, histogram.cumulative(), histogram.sum());
    }

    /// Cumulative counts by upper bound, the last bound being infinite.
    fn buckets(&mut self, name: &str, labels: &Labels, buckets: impl IntoIterator<Item = (f64, u64)>, sum: f64) {
        let mut count = 0;
        for (bound, total) in buckets {
            let bound = if bound.is_infinite() { "+Inf".to_owned() } else { bound.to_string() };
            self.sample(&format!("{name}_bucket"), &labels.clone().with("le", bound), total);
            count = total;
        }
        self.sample(&format!("{name}_sum"), labels, sum);
        self.sample(&format!("{name}_count"), labels, count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        let labels = Labels::default().with("a", "x\"y\\z\n").with("b", 1);
        assert_eq!(labels.0, "a=\"x\\\"y\\\\z\\n\",b=\"1\"");
    }

    #[test]
    fn a_histogram_ends_with_its_count() {
        let mut page = Page::default();
        page.buckets("h", &Labels::default(), [(0.5, 1), (f64::INFINITY, 3)], 2.5);
        assert_eq!(page.0, "h_bucket{le=\"0.5\"} 1\nh_bucket{le=\"+Inf\"} 3\nh_sum 2.5\nh_count 3\n");
    }
}
