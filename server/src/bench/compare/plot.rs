//! A record as a picture: one bar a test, how many times better or worse than the peer, on a logarithmic scale. Plain SVG.

use std::fmt::Write as _;

use super::record::FAILED;
use super::summary::{Row, Spread, Summary, ratio_number};

const WIDTH: f64 = 800.0;
/// Where the axis begins and ends; labels are left of it, values right of the bars.
const LEFT: f64 = 300.0;
const RIGHT: f64 = 720.0;
const ROW: f64 = 26.0;
const HEAD: f64 = 52.0;
const FOOT: f64 = 58.0;
const BAR: f64 = 14.0;

/// Neutral colours that also serve on a dark page.
const STYLE: &str = "text{font:13px system-ui,sans-serif;fill:#24292f}.title{font-weight:600}.small{font-size:11px;fill:#57606a}\
.page{fill:#ffffff}.grid{stroke:#d8dee4}.one{stroke:#57606a}.spread{stroke:#24292f}.better{fill:#5b8db8}.worse{fill:#b9bec5}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9198a1}.page{fill:#0d1117}.grid{stroke:#30363d}\
.one{stroke:#9198a1}.spread{stroke:#e6edf3}.better{fill:#6ea3cf}.worse{fill:#5b626b}}";

/// The SVG of a summary; `None` where there is no peer to compare with.
pub fn svg(summary: &Summary) -> Option<String> {
    let bars: Vec<(&Row, usize, Spread)> = (1..summary.engines.len())
        .flat_map(|peer| {
            let rows = summary.rows.iter().filter(|row| row.metric.key != FAILED);
            rows.filter_map(move |row| Some((row, peer, gain(row, peer)?)))
        })
        .collect();
    let least = bars.iter().map(|(.., gain)| gain.min).reduce(f64::min)?.min(0.9);
    let most = bars.iter().map(|(.., gain)| gain.max).reduce(f64::max)?.max(1.1);
    let (low, high) = (least.log2().floor(), most.log2().ceil());
    let x = |gain: f64| LEFT + (gain.log2() - low) / (high - low) * (RIGHT - LEFT);
    let bottom = HEAD + bars.len() as f64 * ROW;
    let height = bottom + FOOT;

    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         role=\"img\">\n<style>{STYLE}</style>\n<rect class=\"page\" width=\"100%\" height=\"100%\"/>\n"
    );
    let mut line = |text: String| writeln!(out, "{text}").expect("writing to a string cannot fail");
    let peers = summary.engines[1..].join(", ");
    line(format!(
        "<text class=\"title\" x=\"16\" y=\"24\">{}</text>",
        escape(&format!("{} against {peers}", summary.engines[0]))
    ));
    line(format!("<text class=\"small\" x=\"16\" y=\"41\">{}</text>", escape(&shorten(&summary.head, 120))));
    let steps = (high - low) as i32;
    for step in 0..=steps {
        let gain = (low + f64::from(step)).exp2();
        let class = if gain == 1.0 { "one" } else { "grid" };
        let at = x(gain);
        line(format!("<line class=\"{class}\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{HEAD}\" y2=\"{bottom:.1}\"/>"));
        let label = if gain < 1.0 { format!("1/{}", (1.0 / gain).round()) } else { format!("{gain}") };
        line(format!(
            "<text class=\"small\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
            bottom + 15.0
        ));
    }
    for (index, (row, peer, gain)) in bars.iter().enumerate() {
        let middle = HEAD + (index as f64 + 0.5) * ROW;
        let label = match summary.engines.len() {
            2 => row.label.clone(),
            _ => format!("{} ({})", row.label, summary.engines[*peer]),
        };
        let label = escape(&shorten(&label, 44));
        line(format!("<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>", LEFT - 10.0, middle + 4.5));
        let (from, to) = (x(gain.median.min(1.0)), x(gain.median.max(1.0)));
        let class = if gain.median >= 1.0 { "better" } else { "worse" };
        line(format!(
            "<rect class=\"{class}\" x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{BAR}\" rx=\"1\"/>",
            middle - BAR / 2.0,
            (to - from).max(1.0)
        ));
        let mut end = to;
        if gain.rounds > 1 {
            let (min, max) = (x(gain.min), x(gain.max));
            end = end.max(max);
            line(format!(
                "<line class=\"spread\" x1=\"{min:.1}\" x2=\"{max:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\"/>"
            ));
        }
        let value = ratio_number(gain.median);
        line(format!("<text x=\"{:.1}\" y=\"{:.1}\">{value}x</text>", end + 7.0, middle + 4.5));
    }
    let axis = "times better than the peer: speed as ours / theirs, time and memory as theirs / ours";
    let centre = f64::midpoint(LEFT, RIGHT);
    line(format!(
        "<text class=\"small\" x=\"{centre}\" y=\"{:.1}\" text-anchor=\"middle\">{axis}</text>",
        bottom + 34.0
    ));
    let note = "bar: ratio of medians; thin line: range over the rounds";
    line(format!(
        "<text class=\"small\" x=\"{centre}\" y=\"{:.1}\" text-anchor=\"middle\">{note}</text>",
        bottom + 49.0
    ));
    line("</svg>".to_owned());
    Some(out)
}

/// How many times better the first engine is: above 1 is better, whether more or less of the metric is.
fn gain(row: &Row, peer: usize) -> Option<Spread> {
    let ratio = row.ratios.get(peer - 1).copied().flatten().filter(|ratio| ratio.min > 0.0)?;
    if row.metric.more_is_better {
        return Some(ratio);
    }
    Some(Spread { median: 1.0 / ratio.median, min: 1.0 / ratio.max, max: 1.0 / ratio.min, ..ratio })
}

fn shorten(text: &str, most: usize) -> String {
    if text.chars().count() <= most { text.to_owned() } else { text.chars().take(most - 1).chain(['…']).collect() }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
