//! What a long wait looks like: a bar on a terminal, a few plain lines everywhere else.
//!
//! ```text
//!   SmolLM2-135M-Instruct.Q4_1.gguf  [==========>         ]  51 %  47.9 of 93.8 MiB  12.3 MiB/s  4 s left
//! ```
//!
//! One bar at a time. Counting (`advance`) may happen on any thread; drawing happens at most ten times a second.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use cupola_models::hub::Progress;

use super::size::Bytes;

/// Time between two drawings of a bar.
const REDRAW: Duration = Duration::from_millis(100);
/// Without a terminal, a line each time another tenth is done, and none sooner than this after the last.
const PLAIN: Duration = Duration::from_secs(2);
const BAR: u64 = 20;

/// Progress on standard error, or on any other writer in tests.
pub(crate) struct ProgressBar<W: Write + Send = std::io::Stderr> {
    terminal: bool,
    state: Mutex<State<W>>,
}

struct State<W> {
    out: W,
    task: Option<Task>,
}

struct Task {
    what: String,
    total: Option<u64>,
    done: u64,
    began: Instant,
    drawn: Instant,
    /// Tenths announced by plain lines.
    tenths: u64,
    /// Characters of the bar on screen, to be wiped by the next drawing.
    width: usize,
}

impl ProgressBar {
    /// Progress on standard error.
    pub(crate) fn stderr() -> Self {
        Self::new(std::io::stderr(), std::io::stderr().is_terminal())
    }
}

impl<W: Write + Send> ProgressBar<W> {
    fn new(out: W, terminal: bool) -> Self {
        Self { terminal, state: Mutex::new(State { out, task: None }) }
    }

    fn with(&self, act: impl FnOnce(&mut State<W>)) {
        act(&mut self.state.lock().expect("nothing panics while it draws"));
    }
}

impl<W: Write> State<W> {
    /// Writes to the screen. A closed standard error must not end a download, so failures are dropped.
    fn put(&mut self, text: &str) {
        let written = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush());
        drop(written);
    }

    fn draw(&mut self, now: Instant) {
        let Some(task) = &mut self.task else { return };
        let line = task.line(now);
        let width = line.chars().count();
        let text = format!("\r{line}{:pad$}", "", pad = task.width.saturating_sub(width));
        task.width = width;
        task.drawn = now;
        self.put(&text);
    }

    /// Takes the bar off the screen, so that a line can be written in its place.
    fn wipe(&mut self) {
        let Some(task) = &mut self.task else { return };
        let width = std::mem::take(&mut task.width);
        if width > 0 {
            self.put(&format!("\r{:width$}\r", ""));
        }
    }
}

impl Task {
    fn line(&self, now: Instant) -> String {
        let seconds = (now - self.began).as_secs_f64();
        let rate = if seconds > 0.2 { Some(self.done as f64 / seconds) } else { None };
        let speed = rate.map(|rate| format!("  {}/s", Bytes(rate as u64))).unwrap_or_default();
        match self.total.filter(|total| *total > 0) {
            None => format!("{}  {}{speed}", self.what, Bytes(self.done)),
            Some(total) => {
                let done = self.done.min(total);
                let filled = usize::try_from(done * BAR / total).expect("at most the width of the bar");
                let arrow = if done < total { ">" } else { "" };
                let bar = format!("{}{arrow}", "=".repeat(filled));
                let left = match rate {
                    Some(rate) if rate > 0.0 && done < total => {
                        format!("  {} s left", ((total - done) as f64 / rate).ceil() as u64)
                    }
                    _ => String::new(),
                };
                let width = usize::try_from(BAR).expect("a short bar");
                format!(
                    "{}  [{bar:<width$}] {:>3} %  {} of {}{speed}{left}",
                    self.what,
                    done * 100 / total,
                    Bytes(done),
                    Bytes(total)
                )
            }
        }
    }
}

impl<W: Write + Send> Progress for ProgressBar<W> {
    fn start(&self, what: &str, total: Option<u64>) {
        self.with(|state| {
            let now = Instant::now();
            let task = Task { what: what.to_owned(), total, done: 0, began: now, drawn: now, tenths: 0, width: 0 };
            state.task = Some(task);
            if self.terminal {
                state.draw(now);
            } else {
                let size = total.map(|total| format!(" ({})", Bytes(total))).unwrap_or_default();
                state.put(&format!("{what}{size}\n"));
            }
        });
    }

    fn advance(&self, bytes: u64) {
        self.with(|state| {
            let Some(task) = &mut state.task else { return };
            task.done += bytes;
            let now = Instant::now();
            let since = now - task.drawn;
            if self.terminal {
                if since >= REDRAW {
                    state.draw(now);
                }
                return;
            }
            let Some(total) = task.total.filter(|total| *total > 0) else { return };
            let tenths = task.done.min(total) * 10 / total;
            if tenths > task.tenths && since >= PLAIN {
                task.tenths = tenths;
                task.drawn = now;
                let line = format!("  {} of {} ({} %)\n", Bytes(task.done), Bytes(total), tenths * 10);
                state.put(&line);
            }
        });
    }

    fn note(&self, line: &str) {
        self.with(|state| {
            state.wipe();
            state.put(&format!("{line}\n"));
            if self.terminal {
                state.draw(Instant::now());
            }
        });
    }

    fn finish(&self) {
        self.with(|state| {
            let now = Instant::now();
            if self.terminal {
                state.draw(now);
                if state.task.is_some() {
                    state.put("\n");
                }
            } else if let Some(task) = &state.task {
                let line = format!("  {} in {:.1} s\n", Bytes(task.done), (now - task.began).as_secs_f64());
                state.put(&line);
            }
            state.task = None;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(terminal: bool, act: impl FnOnce(&ProgressBar<Vec<u8>>)) -> String {
        let bar = ProgressBar::new(Vec::new(), terminal);
        act(&bar);
        String::from_utf8(bar.state.into_inner().expect("not poisoned").out).expect("UTF-8")
    }

    #[test]
    fn a_terminal_gets_one_line_that_is_redrawn() {
        let text = written(true, |bar| {
            bar.start("model.gguf", Some(4 << 20));
            bar.advance(1 << 20);
            bar.note("a mirror answers");
            bar.advance(3 << 20);
            bar.finish();
        });
        assert!(text.starts_with("\rmodel.gguf  [>                   ]   0 %  0 B of 4.0 MiB"), "{text:?}");
        assert!(text.contains("\ra mirror answers\n\rmodel.gguf  [=====>"), "{text:?}");
        assert!(text.ends_with('\n') && text.contains("[====================] 100 %  4.0 MiB of 4.0 MiB"), "{text:?}");
    }

    #[test]
    fn a_pipe_gets_plain_lines_without_control_characters() {
        let text = written(false, |bar| {
            bar.note("source 1 has no such file");
            bar.start("model.gguf", Some(1 << 20));
            for _ in 0..100 {
                bar.advance(10_000);
            }
            bar.finish();
        });
        assert!(!text.contains('\r'), "{text:?}");
        assert!(text.starts_with("source 1 has no such file\nmodel.gguf (1.0 MiB)\n"), "{text:?}");
        assert!(text.lines().count() <= 4, "fast downloads say little: {text:?}");
    }

    #[test]
    fn unknown_and_overfull_totals_are_drawn_too() {
        let now = Instant::now();
        let task = |total, done| Task { what: "x".into(), total, done, began: now, drawn: now, tenths: 0, width: 0 };
        assert_eq!(task(None, 2048).line(now), "x  2.0 KiB");
        assert!(task(Some(10), 25).line(now).contains("100 %  10 B of 10 B"));
        assert_eq!(task(Some(0), 5).line(now), "x  5 B");
    }
}
