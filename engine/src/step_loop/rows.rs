//! The rows of a step: what goes to the runner, who chooses their tokens, and what was chosen.
//!
//! ```text
//!   Step ──fill_batch──> Batch ──forward──┬── Argmax   the runner, all of them the most likely     ┐ they may stay there for the
//!                                         ├── Draws    the runner, each drawn as it is told         ┘ step after, see `carried`
//!                                         └── Host     the sampler, when the rest is done: some row wants more than a token
//! ```

use std::sync::{Mutex, PoisonError};

use cupola_kernels::{Draw, NoToken, Turn, drawn};

use super::StepLoop;
use crate::answer::Answer;
use crate::request::TokenLogprobs;
use crate::runner::RunError;
use crate::sampler::{self, Choice};
use crate::scheduler::Step;

/// A step that was submitted and whose results were not read.
pub(super) struct UnderWay {
    pub(super) step: Step,
    /// Rows whose logits are wanted.
    pub(super) outputs: Vec<Output>,
    pub(super) chooser: Chooser,
    /// Where the runner keeps what it chooses.
    pub(super) turn: Turn,
}

/// A step that came to nothing.
pub(super) struct Failed {
    pub(super) step: Step,
    pub(super) error: RunError,
}

/// Who chooses the tokens of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chooser {
    /// The runner: the most likely ones.
    Argmax,
    /// The runner, which draws them.
    Draws,
    /// The sampler, where the runner does not draw some by the way.
    Host,
}

/// A row whose logits are wanted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    /// Which sequence: its arrival.
    pub(super) arrival: u64,
    /// Place of its request when the step was submitted.
    slot: usize,
    purpose: Purpose,
}

#[derive(Clone, Copy, Debug)]
enum Purpose {
    /// Choose the token with this index in the answer.
    Answer(usize),
    /// Tell how likely this token of the prompt was, beside so many likely ones.
    Score { token: u32, top: u8 },
    /// The last row of a prompt that wants no answer.
    Ignore,
}

/// What became of a row.
pub(super) enum Outcome {
    Choice(Choice),
    Score(TokenLogprobs),
    Nothing,
}

impl StepLoop {
    /// Submits a step; the tokens of its rows that are not known are carried from the step before.
    ///
    /// # Errors
    /// With the step, of which nothing is under way then.
    pub(super) fn submit(&mut self, step: Step, before: Option<&UnderWay>) -> Result<UnderWay, Failed> {
        let (outputs, chooser) = self.fill_batch(&step, before);
        let mut submitted = self.runner.forward(&self.batch);
        if chooser == Chooser::Draws && submitted.is_ok() {
            let draws: Vec<_> = outputs.iter().filter_map(|output| draw_of(&self.answers, output)).collect();
            submitted = self.runner.submit_draws(&draws);
        }
        match submitted {
            Ok(()) => Ok(UnderWay { step, outputs, chooser, turn: self.batch.turn }),
            Err(error) => Err(Failed { step, error }),
        }
    }

    fn fill_batch(&mut self, step: &Step, before: Option<&UnderWay>) -> (Vec<Output>, Chooser) {
        self.batch.clear();
        self.batch.turn = self.batch.turn.other();
        let carried = before.map_or_else(Vec::new, UnderWay::results);
        let mut outputs = Vec::with_capacity(step.spans.len());
        let mut greedy = true;
        for span in &step.spans {
            let sequence = self.scheduler.get(span.arrival).expect("it was just planned");
            let end = span.start + span.len;
            let row0 = match sequence.known.get(span.start..end) {
                Some(tokens) => self.batch.push(tokens, span.start, &sequence.blocks),
                None => {
                    let place = carried.binary_search_by_key(&span.arrival, |result| result.0);
                    let (_, result) = carried[place.expect("the step before chooses what is not known")];
                    self.batch.push_carried(result, span.start, &sequence.blocks)
                }
            };
            let answer = self.answers[sequence.slot].as_ref().expect("a running sequence has a request");
            for position in span.first_output.unwrap_or(end)..end {
                let row = u32::try_from(position - span.start).expect("a span is shorter than 2^32");
                self.batch.outputs.push(row0 + row);
                let purpose = match (sequence.known.get(position + 1), &answer.prompt_logprobs) {
                    (Some(&token), Some((top, _))) => Purpose::Score { token, top: *top },
                    _ if sequence.answers => Purpose::Answer(position + 1 - sequence.prompt_len),
                    _ => Purpose::Ignore,
                };
                greedy &= matches!(purpose, Purpose::Answer(index) if answer.sampler.is_plain(index));
                outputs.push(Output { arrival: span.arrival, slot: sequence.slot, purpose });
            }
        }
        self.batch.greedy = greedy;
        let drawn = || outputs.iter().all(|output| draw_of(&self.answers, output).is_some());
        let chooser = match greedy {
            true => Chooser::Argmax,
            false if self.carries && self.runner.draws() && drawn() => Chooser::Draws,
            false => Chooser::Host,
        };
        (outputs, chooser)
    }

    /// Chooses a token for every output row, into `results`; waits for what that takes.
    pub(super) fn choose(&mut self, UnderWay { outputs, chooser, turn, .. }: &UnderWay) -> Result<(), RunError> {
        self.results.clear();
        if outputs.is_empty() {
            return Ok(());
        }
        if *chooser != Chooser::Host {
            let words = self.runner.chosen(*turn)?;
            if words.len() != outputs.len() {
                let what = format!("the model gave {} tokens for {} rows", words.len(), outputs.len());
                return Err(what.into());
            }
            let vocab = self.shared.vocab;
            self.results.extend(words.iter().map(|&word| {
                let choice = drawn(word, vocab).map(|token| Outcome::Choice(Choice { token, logprobs: None }));
                Mutex::new(choice.map_err(NoToken::message))
            }));
            return Ok(());
        }
        self.results.resize_with(outputs.len(), || Mutex::new(Ok(Outcome::Nothing)));
        let (answers, scratch, results) = (&self.answers, &self.scratch, &self.results);
        let on_host = |row: usize, logits: &mut [f32]| {
            let output = &outputs[row];
            let outcome = match output.purpose {
                Purpose::Answer(index) => {
                    let answer = answers[output.slot].as_ref().expect("a running sequence has a request");
                    answer.sampler.choose(index, logits, scratch).map(Outcome::Choice)
                }
                Purpose::Score { token, top } => sampler::score(logits, token, top).map(Outcome::Score),
                Purpose::Ignore => Ok(Outcome::Nothing),
            };
            *results[row].lock().unwrap_or_else(PoisonError::into_inner) = outcome;
        };
        if !self.runner.draws() {
            return self.runner.for_each_logits(&on_host);
        }
        let draws: Vec<_> = outputs.iter().map(|output| draw_of(answers, output)).collect();
        self.runner.draw(&draws, &mut self.drawn, &on_host)?;
        let rows = self.results.iter_mut().zip(&draws).filter(|(_, draw)| draw.is_some());
        for ((result, _), drawn) in rows.zip(&self.drawn) {
            let choice = drawn.map(|token| Outcome::Choice(Choice { token, logprobs: None }));
            *result = Mutex::new(choice.map_err(NoToken::message));
        }
        Ok(())
    }
}

/// How the runner would draw a row's token; `None` for a row that it cannot answer.
fn draw_of<'a>(answers: &'a [Option<Answer>], output: &Output) -> Option<Draw<'a>> {
    match output.purpose {
        Purpose::Answer(index) => answers[output.slot].as_ref().and_then(|answer| answer.sampler.draw(index)),
        Purpose::Score { .. } | Purpose::Ignore => None,
    }
}

impl UnderWay {
    /// The number of the result of each sequence, by arrival.
    fn results(&self) -> Vec<(u64, u32)> {
        let mut results: Vec<_> = self.outputs.iter().map(|output| output.arrival).zip(0..).collect();
        results.sort_unstable();
        results
    }
}
