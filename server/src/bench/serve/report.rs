//! Turns outcomes into the figures, the text block and the JSON keys of `vllm bench serve`, so that scripts written for
//! it read ours, and adds what it does not tell: formulas, failures by kind, length mismatches, cached tokens.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::{Dialect, Outcome, Run};
use crate::bench::stats::{Sorted, mean, population_std};

/// A latency whose distribution is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Time to the first token.
    Ttft,
    /// Time per output token after the first.
    Tpot,
    /// Gaps between chunks.
    Itl,
    /// End-to-end latency.
    E2el,
}

impl Metric {
    /// Every metric with its flag name.
    pub const NAMED: [(&'static str, Self); 4] =
        [("ttft", Self::Ttft), ("tpot", Self::Tpot), ("itl", Self::Itl), ("e2el", Self::E2el)];

    fn header(self) -> &'static str {
        match self {
            Self::Ttft => "Time to First Token",
            Self::Tpot => "Time per Output Token (excl. 1st token)",
            Self::Itl => "Inter-token Latency",
            Self::E2el => "End-to-end Latency",
        }
    }
}

/// What to report.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Latencies to show.
    pub metrics: Vec<Metric>,
    /// Percentiles to show, `0..=100`.
    pub percentiles: Vec<f64>,
    /// Limits in milliseconds that a request must keep to count as good.
    pub goodput: Vec<(Metric, f64)>,
    /// Keep one entry a request in the JSON.
    pub detailed: bool,
}

/// The formulas, as shown.
const FORMULAS: [(&str, &str); 7] = [
    ("ttft", "first chunk with output - request sent"),
    ("tpot", "(e2el - ttft) / (output tokens - 1), one value a request with at least 2 output tokens"),
    ("itl", "chunk - previous chunk, one value a chunk after the first, all requests pooled"),
    ("e2el", "last chunk - request sent"),
    ("output_throughput", "output tokens of successful requests / duration"),
    ("duration", "first arrival to last answer, ramp-up and tail included"),
    ("std", "population standard deviation; percentiles are linear between ranks"),
];

/// The figures of a run.
#[derive(Clone, Debug)]
pub struct Report<'a> {
    run: &'a Run,
    selection: &'a Selection,
    completed: usize,
    input_tokens: usize,
    output_tokens: usize,
    good: usize,
    peak_output: f64,
    peak_concurrent: usize,
    /// One series a metric of [`Metric::NAMED`], in seconds.
    series: [Vec<f64>; 4],
}

impl<'a> Report<'a> {
    /// Computes the figures.
    pub fn new(run: &'a Run, selection: &'a Selection) -> Self {
        let ok: Vec<&Outcome> = run.outcomes.iter().filter(|outcome| outcome.failure.is_none()).collect();
        let series = [Metric::Ttft, Metric::Tpot, Metric::Itl, Metric::E2el]
            .map(|metric| ok.iter().flat_map(|outcome| values(outcome, metric)).collect());
        let good = |outcome: &&&Outcome| {
            let keeps = |&(metric, limit): &(Metric, f64)| values(outcome, metric).iter().all(|v| v * 1e3 <= limit);
            selection.goodput.iter().all(keeps)
        };
        Self {
            run,
            selection,
            completed: ok.len(),
            input_tokens: ok.iter().map(|outcome| outcome.prompt_tokens).sum(),
            output_tokens: ok.iter().map(|outcome| outcome.output_tokens).sum(),
            good: ok.iter().filter(good).count(),
            peak_output: peak_output(&ok),
            peak_concurrent: peak_concurrent(&ok),
            series,
        }
    }

    /// No request succeeded.
    pub fn all_failed(&self) -> bool {
        self.completed == 0
    }

    fn failed(&self) -> usize {
        self.run.outcomes.len() - self.completed
    }

    fn series(&self, metric: Metric) -> &[f64] {
        let index = Metric::NAMED.iter().position(|(_, named)| *named == metric).expect("every metric is named");
        &self.series[index]
    }

    fn per_second(&self, count: usize) -> f64 {
        if self.run.duration > 0.0 { count as f64 / self.run.duration } else { 0.0 }
    }

    /// Failures by kind: how often, and one message.
    fn failures(&self) -> BTreeMap<&str, (usize, &str)> {
        let mut kinds = BTreeMap::new();
        for (class, message) in self.run.outcomes.iter().filter_map(|outcome| outcome.failure.as_ref()) {
            kinds.entry(class.as_str()).or_insert((0, message.as_str())).0 += 1;
        }
        kinds
    }

    /// How many requests failed and why, a sentence a kind.
    pub fn failures_in_words(&self) -> Vec<String> {
        let total = self.run.outcomes.len();
        let say = |(kind, (count, message)): (&str, (usize, &str))| {
            format!("{count} of {total} requests failed, {kind}, such as: {message}")
        };
        self.failures().into_iter().map(say).collect()
    }

    /// Successful requests whose `(prompt, output)` tokens differ from what was planned.
    fn mismatches(&self) -> (usize, usize) {
        let ok = self.run.outcomes.iter().filter(|outcome| outcome.failure.is_none());
        ok.fold((0, 0), |(prompts, outputs), outcome| {
            (
                prompts + usize::from(outcome.prompt_tokens != outcome.planned_prompt),
                outputs + usize::from(outcome.output_tokens != outcome.planned_output),
            )
        })
    }

    fn cached_tokens(&self) -> Option<usize> {
        self.run.outcomes.iter().filter_map(|outcome| outcome.cached_tokens).reduce(|a, b| a + b)
    }

    /// Sentences a reader of the figures should know.
    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let (prompts, outputs) = self.mismatches();
        if outputs > 0 {
            let hint = if self.run.options.ignore_eos { "" } else { "; --ignore-eos makes them exact" };
            notes.push(format!("answers of another length than asked for: {outputs}{hint}"));
        }
        if !self.run.exact_prompts {
            notes.push("the server has no /tokenize: prompt lengths were planned in words".to_owned());
        } else if prompts > 0 && self.run.options.dialect == Dialect::Completions {
            notes.push(format!("prompts of another length than asked for: {prompts}"));
        }
        if self.run.outcomes.iter().any(|outcome| outcome.failure.is_none() && !outcome.counted) {
            notes.push("the server sends no usage: output tokens are chunks, prompt tokens as planned".to_owned());
        }
        match self.cached_tokens() {
            Some(cached) if cached > 0 => notes
                .push(format!("{cached} of {} prompt tokens came from the server's prefix cache", self.input_tokens)),
            _ => {}
        }
        if let Some(cpu) = self.run.client_cpu
            && self.run.duration > 1.0
            && cpu > 0.5 * self.run.duration
        {
            notes.push(format!(
                "this client used {:.0} % of a core: it may be the limit",
                100.0 * cpu / self.run.duration
            ));
        }
        notes
    }

    /// The text block.
    pub fn block(&self) -> String {
        let mut out = String::new();
        let options = &self.run.options;
        let mut line = |label: &str, value: &str| {
            writeln!(out, "{label:<40} {value:<10}").expect("writing to a string cannot fail");
        };
        line("Successful requests:", &self.completed.to_string());
        line("Failed requests:", &self.failed().to_string());
        if let Some(slots) = options.max_concurrency {
            line("Maximum request concurrency:", &slots.to_string());
        }
        if options.request_rate.is_finite() {
            line("Request rate configured (RPS):", &two(options.request_rate));
        }
        line("Benchmark duration (s):", &two(self.run.duration));
        line("Total input tokens:", &self.input_tokens.to_string());
        line("Total generated tokens:", &self.output_tokens.to_string());
        line("Request throughput (req/s):", &two(self.per_second(self.completed)));
        if !self.selection.goodput.is_empty() {
            line("Request goodput (req/s):", &two(self.per_second(self.good)));
        }
        line("Output token throughput (tok/s):", &two(self.per_second(self.output_tokens)));
        line("Peak output token throughput (tok/s):", &two(self.peak_output));
        line("Peak concurrent requests:", &two(self.peak_concurrent as f64));
        line("Total token throughput (tok/s):", &two(self.per_second(self.input_tokens + self.output_tokens)));

        let mut block = format!("{:=^50}\n{out}", " Serving Benchmark Result ");
        for (header, name, _, values) in self.distributions() {
            let sorted = Sorted::new(&values);
            writeln!(block, "{header:-^50}").expect("writing to a string cannot fail");
            let mut line = |label: String, value: f64| {
                writeln!(block, "{label:<40} {:<10}", two(value * 1e3)).expect("writing to a string cannot fail");
            };
            line(format!("Mean {name} (ms):"), mean(&values));
            line(format!("Median {name} (ms):"), sorted.median());
            for &p in &self.selection.percentiles {
                line(format!("P{p} {name} (ms):"), sorted.percentile(p));
            }
        }
        block.push_str(&"=".repeat(50));
        block.push('\n');
        for (kind, (count, message)) in self.failures() {
            writeln!(block, "failed, {kind}: {count}, such as: {message}").expect("writing to a string cannot fail");
        }
        for note in self.notes() {
            writeln!(block, "note: {note}").expect("writing to a string cannot fail");
        }
        for (name, formula) in FORMULAS.iter().take(4) {
            writeln!(block, "{name} = {formula}").expect("writing to a string cannot fail");
        }
        block
    }

    /// Header, name, key and values in seconds of each distribution to show.
    fn distributions(&self) -> Vec<(&'static str, String, &'static str, Vec<f64>)> {
        let mut shown: Vec<_> = Metric::NAMED
            .iter()
            .filter(|(_, metric)| self.selection.metrics.contains(metric))
            .map(|&(key, metric)| (metric.header(), key.to_uppercase(), key, self.series(metric).to_vec()))
            .collect();
        let options = &self.run.options;
        if options.max_concurrency.is_some() && options.request_rate.is_finite() {
            let ok = self.run.outcomes.iter().filter(|outcome| outcome.failure.is_none());
            let queued = ok.map(|outcome| outcome.queued).collect();
            shown.push(("Client-side Queueing", "Client Queue Time".to_owned(), "client_queue_time", queued));
        }
        shown
    }

    /// The JSON object. `facts` (date, label, metadata) come first in it.
    pub fn json(&self, facts: Map<String, Value>) -> Value {
        let options = &self.run.options;
        let mut json = facts;
        let mut put = |key: &str, value: Value| {
            json.insert(key.to_owned(), value);
        };
        put("model_id", self.run.model.as_str().into());
        put("tokenizer_id", self.run.model.as_str().into());
        put("num_prompts", options.num_prompts.into());
        put("request_rate", if options.request_rate.is_finite() { options.request_rate.into() } else { "inf".into() });
        put("burstiness", if options.burstiness.is_finite() { options.burstiness.into() } else { "inf".into() });
        put("max_concurrency", json!(options.max_concurrency));
        put("duration", self.run.duration.into());
        put("completed", self.completed.into());
        put("failed", self.failed().into());
        put("total_input_tokens", self.input_tokens.into());
        put("total_output_tokens", self.output_tokens.into());
        put("request_throughput", self.per_second(self.completed).into());
        let goodput = (!self.selection.goodput.is_empty()).then(|| self.per_second(self.good));
        put("request_goodput", json!(goodput));
        put("output_throughput", self.per_second(self.output_tokens).into());
        put("total_token_throughput", self.per_second(self.input_tokens + self.output_tokens).into());
        if self.selection.detailed {
            let column =
                |value: fn(&Outcome) -> Value| Value::from(self.run.outcomes.iter().map(value).collect::<Vec<_>>());
            put("input_lens", column(|o| o.prompt_tokens.into()));
            put("output_lens", column(|o| o.output_tokens.into()));
            put("ttfts", column(|o| o.ttft.into()));
            put("itls", column(|o| json!(o.gaps)));
            put("latencies", column(|o| o.latency.into()));
            put("start_times", column(|o| o.start.into()));
            put("queue_times", column(|o| o.queued.into()));
            put("generated_texts", column(|o| o.text.as_str().into()));
            put("errors", column(|o| o.failure.as_ref().map_or("", |(_, message)| message.as_str()).into()));
        }
        put("max_output_tokens_per_s", self.peak_output.into());
        put("max_concurrent_requests", self.peak_concurrent.into());
        for (_, _, key, values) in self.distributions() {
            let sorted = Sorted::new(&values);
            put(&format!("mean_{key}_ms"), (mean(&values) * 1e3).into());
            put(&format!("median_{key}_ms"), (sorted.median() * 1e3).into());
            put(&format!("std_{key}_ms"), (population_std(&values) * 1e3).into());
            for &p in &self.selection.percentiles {
                put(&format!("p{p}_{key}_ms"), (sorted.percentile(p) * 1e3).into());
            }
        }
        put("cupola", self.own_json());
        Value::Object(json)
    }

    /// What `vllm bench serve` has no keys for.
    fn own_json(&self) -> Value {
        let options = &self.run.options;
        let (prompts, outputs) = self.mismatches();
        let failures: Map<String, Value> =
            self.failures().into_iter().map(|(kind, (count, _))| (kind.to_owned(), count.into())).collect();
        let percentiles: Map<String, Value> = Metric::NAMED
            .iter()
            .map(|&(key, metric)| {
                let sorted = Sorted::new(self.series(metric));
                let at = |p: f64| sorted.percentile(p) * 1e3;
                (
                    key.to_owned(),
                    json!({"p50": at(50.0), "p90": at(90.0), "p95": at(95.0), "p99": at(99.0), "p99.9": at(99.9)}),
                )
            })
            .collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "endpoint": options.endpoint,
            "input_len": options.input_len,
            "output_len": options.output_len,
            "prefix_len": options.prefix_len,
            "range_ratio": options.range_ratio,
            "seed": options.seed,
            "ignore_eos": options.ignore_eos,
            "num_warmups": options.num_warmups,
            "failures": failures,
            "prompt_length_mismatches": prompts,
            "output_length_mismatches": outputs,
            "prompt_lengths_exact": self.run.exact_prompts,
            "cached_tokens": self.cached_tokens(),
            "client_cpu_seconds": self.run.client_cpu,
            "percentiles_ms": percentiles,
            "formulas": FORMULAS.iter().map(|&(name, text)| (name.to_owned(), text.into())).collect::<Map<_, _>>(),
            "notes": self.notes(),
        })
    }
}

/// The values, in seconds, that a successful request adds to a metric.
fn values(outcome: &Outcome, metric: Metric) -> Vec<f64> {
    match metric {
        Metric::Ttft => vec![outcome.ttft],
        Metric::Itl => outcome.gaps.clone(),
        Metric::E2el => vec![outcome.latency],
        Metric::Tpot if outcome.output_tokens < 2 => Vec::new(),
        Metric::Tpot => vec![(outcome.latency - outcome.ttft) / (outcome.output_tokens - 1) as f64],
    }
}

fn two(value: f64) -> String {
    format!("{value:.2}")
}

/// Most tokens in one second, seconds counted from the first sending. A chunk stands for its share of the tokens.
fn peak_output(ok: &[&Outcome]) -> f64 {
    let origin = ok.iter().map(|outcome| outcome.start).fold(f64::INFINITY, f64::min);
    let mut seconds: BTreeMap<u64, f64> = BTreeMap::new();
    for outcome in ok {
        let share = outcome.output_tokens as f64 / (outcome.gaps.len() + 1) as f64;
        let mut at = outcome.start - origin + outcome.ttft;
        *seconds.entry(at as u64).or_default() += share;
        for gap in &outcome.gaps {
            at += gap;
            *seconds.entry(at as u64).or_default() += share;
        }
    }
    seconds.into_values().fold(0.0, f64::max)
}

/// Most requests under way at one moment; one that ends as another begins does not overlap it.
fn peak_concurrent(ok: &[&Outcome]) -> usize {
    let mut changes: Vec<(f64, i32)> =
        ok.iter().flat_map(|outcome| [(outcome.start, 1), (outcome.start + outcome.latency, -1)]).collect();
    changes.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut now = 0;
    let peak = changes.into_iter().fold(0, |peak, (_, change)| {
        now += change;
        peak.max(now)
    });
    usize::try_from(peak).expect("a peak starts at 0")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(start: f64, ttft: f64, gaps: &[f64], output_tokens: usize) -> Outcome {
        Outcome {
            start,
            ttft,
            gaps: gaps.to_vec(),
            latency: ttft + gaps.iter().sum::<f64>(),
            output_tokens,
            planned_output: output_tokens,
            counted: true,
            ..Outcome::default()
        }
    }

    #[test]
    fn tpot_leaves_the_first_token_out() {
        let values = |outcome| super::values(&outcome, Metric::Tpot);
        assert!(values(outcome(0.0, 1.0, &[], 1)).is_empty());
        let tpot = values(outcome(0.0, 1.0, &[0.5, 0.5], 5));
        assert!((tpot[0] - 0.25).abs() < 1e-12, "(2.0 - 1.0) / 4, and not per chunk");
    }

    #[test]
    fn peaks() {
        let first = outcome(10.0, 0.5, &[0.2, 0.2], 6);
        let second = outcome(10.9, 0.5, &[], 1);
        assert_eq!(peak_concurrent(&[&first, &second]), 1, "one ends exactly as the other begins");
        assert!((peak_output(&[&first, &second]) - 6.0).abs() < 1e-9, "three chunks of two tokens in second 0");
        assert_eq!((peak_concurrent(&[]), peak_output(&[])), (0, 0.0));
    }
}
