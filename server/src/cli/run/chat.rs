//! The chat loop: a line, an answer, the next line; commands begin with a slash.
//!
//! ```text
//!   waiting --line--> answering --end or Ctrl-C--> waiting       Ctrl-C while waiting: a hint; twice in a row: end
//!      ^--/command--'                              Ctrl-D: end
//! ```
//!
//! A stopped answer stays in the conversation as far as it came: the model has said that much.

use std::io::{IsTerminal, Write};

use serde_json::Value;
use tokio::sync::mpsc;

use super::session::{Answer, Session, message, stopped_by_ctrl_c};
use super::{Error, RunArgs};

const HELP: &str = "\
/clear         forget the conversation
/system TEXT   tell the model something before the conversation, which is forgotten; without TEXT, tell it nothing
/stats         counts and times of the last answer
/exit          leave, as does Ctrl-D
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one.";

/// What a line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Input<'a> {
    Nothing,
    Help,
    Clear,
    System(&'a str),
    Stats,
    Exit,
    Unknown(&'a str),
    Say(&'a str),
}

fn parse(line: &str) -> Input<'_> {
    let line = line.trim();
    if line.is_empty() {
        return Input::Nothing;
    }
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    match word {
        "/help" | "/?" => Input::Help,
        "/clear" => Input::Clear,
        "/system" => Input::System(rest.trim()),
        "/stats" => Input::Stats,
        "/exit" | "/quit" | "/bye" => Input::Exit,
        // A path is something to talk about, and not a command.
        _ if word.starts_with('/') && word[1..].chars().all(|c| c.is_ascii_alphabetic()) && word.len() > 1 => {
            Input::Unknown(word)
        }
        _ => Input::Say(line),
    }
}

/// The messages so far; the first one may be the system's.
#[derive(Debug, Default)]
struct Conversation {
    messages: Vec<Value>,
}

impl Conversation {
    fn new(system: Option<&str>) -> Self {
        let system = system.filter(|text| !text.is_empty());
        Self { messages: system.map(|text| message("system", text)).into_iter().collect() }
    }

    fn clear(&mut self) {
        self.messages.retain(|message| message["role"] == "system");
    }
}

/// Lines of standard input, read by a thread of their own: a terminal read cannot be given up.
fn lines() -> mpsc::Receiver<std::io::Result<String>> {
    let (send, receive) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines() {
            let failed = line.is_err();
            if send.blocking_send(line).is_err() || failed {
                return;
            }
        }
    });
    receive
}

pub(super) async fn chat(args: &RunArgs, session: &Session, name: &str, out: &mut dyn Write) -> Result<(), Error> {
    let mut conversation = Conversation::new(args.system.as_deref());
    let mut last: Option<Answer> = None;
    let mut lines = lines();
    let terminal = std::io::stdin().is_terminal();
    if terminal {
        writeln!(out, "{name}; /help lists the commands, Ctrl-D leaves")?;
    }
    if session.template.is_none() {
        drop(writeln!(std::io::stderr(), "each line is continued on its own, without those before it"));
    }
    while let Some(line) = read(&mut lines, terminal, out).await? {
        match parse(&line) {
            Input::Nothing => {}
            Input::Help => writeln!(out, "{HELP}")?,
            Input::Clear => conversation.clear(),
            Input::System(text) => conversation = Conversation::new(Some(text)),
            Input::Stats => match &last {
                Some(answer) => writeln!(out, "{}", answer.figures())?,
                None => writeln!(out, "no answer yet")?,
            },
            Input::Exit => break,
            Input::Unknown(word) => writeln!(out, "no such command: {word}; /help lists them")?,
            Input::Say(text) => match reply(session, &mut conversation, text, out).await {
                Ok(answer) => {
                    if args.verbose {
                        drop(writeln!(std::io::stderr(), "{}", answer.figures()));
                    }
                    last = Some(answer);
                }
                Err(error @ Error::Output(_)) => return Err(error),
                // The conversation goes on without the turn that failed.
                Err(error) => drop(writeln!(std::io::stderr(), "error: {error}")),
            },
        }
    }
    Ok(())
}

/// Answers `text` and keeps both in the conversation.
async fn reply(
    session: &Session,
    conversation: &mut Conversation,
    text: &str,
    out: &mut dyn Write,
) -> Result<Answer, Error> {
    let tokens = if session.template.is_some() {
        let mut messages = conversation.messages.clone();
        messages.push(message("user", text));
        session.chat_tokens(&messages)?
    } else {
        session.plain_tokens(text)?
    };
    let answer = session.answer(tokens, out, stopped_by_ctrl_c()).await?;
    writeln!(out, "{}", if answer.reason.is_none() { " [stopped]" } else { "" })?;
    conversation.messages.extend([message("user", text), message("assistant", &answer.text)]);
    Ok(answer)
}

/// The next line, joined with those that follow a closing backslash; `None` at the end of the input or after Ctrl-C was
/// pressed twice.
async fn read(
    lines: &mut mpsc::Receiver<std::io::Result<String>>,
    terminal: bool,
    out: &mut dyn Write,
) -> Result<Option<String>, Error> {
    let mut text = String::new();
    let mut warned = false;
    loop {
        if terminal {
            write!(out, "{}", if text.is_empty() { ">>> " } else { "... " })?;
            out.flush()?;
        }
        let line = tokio::select! {
            line = lines.recv() => line,
            () = stopped_by_ctrl_c() => {
                if warned {
                    writeln!(out)?;
                    return Ok(None);
                }
                warned = true;
                text.clear();
                writeln!(out, "\nCtrl-C again or Ctrl-D leaves")?;
                continue;
            }
        };
        let Some(line) = line else {
            if terminal {
                writeln!(out)?;
            }
            return Ok(None);
        };
        let line = line.map_err(Error::io("read standard input"))?;
        match line.strip_suffix('\\') {
            Some(part) => {
                text.push_str(part);
                text.push('\n');
            }
            None => {
                text.push_str(&line);
                return Ok(Some(text));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_or_something_to_say() {
        assert_eq!(parse("  \t"), Input::Nothing);
        assert_eq!(parse("/help"), Input::Help);
        assert_eq!(parse(" /system  Be brief. "), Input::System("Be brief."));
        assert_eq!(parse("/system"), Input::System(""));
        assert_eq!(parse("/quit"), Input::Exit);
        assert_eq!(parse("/celar"), Input::Unknown("/celar"));
        assert_eq!(parse("/etc/passwd is a file"), Input::Say("/etc/passwd is a file"));
        assert_eq!(parse("/ 2"), Input::Say("/ 2"));
        assert_eq!(parse(" hello /help "), Input::Say("hello /help"));
    }

    #[test]
    fn clearing_keeps_the_system_message() {
        let mut conversation = Conversation::new(Some("Be brief."));
        conversation.messages.push(message("user", "hello"));
        conversation.clear();
        assert_eq!(conversation.messages, [message("system", "Be brief.")]);
        assert!(Conversation::new(Some("")).messages.is_empty());
    }

    #[tokio::test]
    async fn a_backslash_continues_a_line() {
        let (send, mut receive) = mpsc::channel(4);
        for line in ["one \\", "two", "three"] {
            send.send(Ok(line.to_owned())).await.expect("room for four");
        }
        drop(send);
        let mut out = Vec::new();
        let mut next = async || read(&mut receive, false, &mut out).await.expect("no I/O");
        assert_eq!(next().await.as_deref(), Some("one \ntwo"));
        assert_eq!(next().await.as_deref(), Some("three"));
        assert_eq!(next().await, None);
    }
}
