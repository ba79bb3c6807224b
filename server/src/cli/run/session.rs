//! One model and the settings of its answers: text in, streamed text out, stoppable.

use std::future::Future;
use std::io::Write;
use std::pin::pin;
use std::time::{Duration, Instant};

use cupola_engine::{EngineHandle, Event, FinishReason, Request, SamplingParams, StopParams, SubmitError, Usage};
use cupola_models::{ChatTemplate, Tokenizer};
use serde_json::{Map, Value, json};

use crate::cli::error::Error;

/// A running model and how it shall answer.
pub(super) struct Session {
    pub(super) engine: EngineHandle,
    pub(super) sampling: SamplingParams,
    pub(super) stop: StopParams,
    pub(super) tokenizer: Tokenizer,
    /// Absent: prompts are continued as they are.
    pub(super) template: Option<ChatTemplate>,
}

/// What an answer was and took.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) text: String,
    /// `None` when it was stopped from here.
    pub(super) reason: Option<FinishReason>,
    pub(super) usage: Usage,
    /// From submission to the first text.
    pub(super) first_token: Option<Duration>,
    /// From the first text to the last.
    pub(super) decode: Duration,
}

/// A message of a conversation.
pub(super) fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// Ends when Ctrl-C is pressed; never, where that cannot be watched.
pub(super) async fn stopped_by_ctrl_c() {
    if let Err(error) = tokio::signal::ctrl_c().await {
        tracing::warn!(%error, "Ctrl-C cannot be watched here and ends the program");
        std::future::pending::<()>().await;
    }
}

impl Session {
    /// A conversation as the prompt of its next answer. The template writes its own special tokens.
    pub(super) fn chat_tokens(&self, messages: &[Value]) -> Result<Vec<u32>, Error> {
        let Some(template) = &self.template else {
            return Err(Error::Failed("this model has no chat template".to_owned()));
        };
        let prompt = template.render(&Value::from(messages.to_vec()), None, true, &Map::new())?;
        Ok(self.tokenizer.encode(&prompt, false)?)
    }

    /// A text to be continued as it is.
    pub(super) fn plain_tokens(&self, text: &str) -> Result<Vec<u32>, Error> {
        Ok(self.tokenizer.encode(text, true)?)
    }

    /// Writes the answer to `prompt` to `out` as it comes. Ends early, with what there is, when `interrupt` does.
    pub(super) async fn answer(
        &self,
        prompt: Vec<u32>,
        out: &mut dyn Write,
        interrupt: impl Future<Output = ()>,
    ) -> Result<Answer, Error> {
        let prompt_tokens = prompt.len();
        let request =
            Request { sampling: self.sampling.clone(), stop: self.stop.clone(), ..Request::greedy(prompt, 1) };
        let submitted = Instant::now();
        let mut stream = self.engine.submit_now(request).map_err(explain)?;
        let mut interrupt = pin!(interrupt);
        let mut answer = Answer {
            text: String::new(),
            reason: None,
            usage: Usage { prompt_tokens, ..Usage::default() },
            first_token: None,
            decode: Duration::ZERO,
        };
        loop {
            let event = tokio::select! {
                event = stream.next() => event,
                // Dropping the stream cancels the request within one step.
                () = &mut interrupt => return Ok(answer),
            };
            match event {
                Some(Event::Tokens { tokens, text, .. }) => {
                    let now = submitted.elapsed();
                    let first = *answer.first_token.get_or_insert(now);
                    answer.decode = now.saturating_sub(first);
                    answer.usage.completion_tokens += tokens.len();
                    answer.put(&text, out)?;
                }
                Some(Event::Finished { text, reason, usage, .. }) => {
                    answer.put(&text, out)?;
                    answer.reason = Some(reason);
                    answer.usage = usage;
                    return Ok(answer);
                }
                Some(Event::Failed { message }) => return Err(Error::Failed(message)),
                Some(Event::Prompt { .. }) => {}
                None => return Err(Error::Failed("the engine ended without an answer".to_owned())),
            }
        }
    }
}

/// The engine's refusal in terms of what the user can do here.
fn explain(error: SubmitError) -> Error {
    match error {
        SubmitError::PromptTooLong { prompt, max } => Error::Failed(format!(
            "the prompt has {prompt} tokens and the context holds {max} with the answer; shorten it, /clear the \
             conversation, or raise --max-model-len if the model allows"
        )),
        other => other.into(),
    }
}

impl Answer {
    fn put(&mut self, text: &str, out: &mut dyn Write) -> Result<(), Error> {
        if !text.is_empty() {
            self.text.push_str(text);
            out.write_all(text.as_bytes())?;
            out.flush()?;
        }
        Ok(())
    }

    /// Why it ended, as the API names it.
    pub(super) fn reason(&self) -> &'static str {
        match self.reason {
            Some(FinishReason::Stop) => "stop",
            Some(FinishReason::Length) => "length",
            Some(FinishReason::Cancelled) | None => "cancelled",
        }
    }

    /// Speed after the first token; `None` below two tokens.
    pub(super) fn tokens_per_second(&self) -> Option<f64> {
        let further = self.usage.completion_tokens.checked_sub(1).filter(|n| *n > 0)?;
        (self.decode > Duration::ZERO).then(|| further as f64 / self.decode.as_secs_f64())
    }

    /// One line of counts and times.
    pub(super) fn figures(&self) -> String {
        let Usage { prompt_tokens, cached_tokens, completion_tokens, .. } = self.usage;
        let first =
            self.first_token.map_or_else(|| "-".to_owned(), |time| format!("{:.0} ms", time.as_secs_f64() * 1e3));
        let rate = self.tokens_per_second().map_or_else(|| "-".to_owned(), |rate| format!("{rate:.1}"));
        format!(
            "{prompt_tokens} prompt tokens ({cached_tokens} cached), {completion_tokens} generated; first token after \
             {first}, then {rate} tokens/s; {}",
            self.reason()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speed_leaves_the_first_token_out() {
        let mut answer = Answer {
            text: String::new(),
            reason: Some(FinishReason::Stop),
            usage: Usage { completion_tokens: 1, ..Usage::default() },
            first_token: Some(Duration::from_millis(20)),
            decode: Duration::ZERO,
        };
        assert_eq!(answer.tokens_per_second(), None);
        answer.usage.completion_tokens = 11;
        answer.decode = Duration::from_secs(2);
        assert_eq!(answer.tokens_per_second(), Some(5.0));
        assert!(answer.figures().ends_with("first token after 20 ms, then 5.0 tokens/s; stop"), "{}", answer.figures());
    }
}
