//! Chat templates: Jinja that turns messages into the text a model was trained on.
//!
//! Templates come with models and are not trusted: they can load nothing, run for a bounded number of steps, and write
//! a bounded amount of text. The environment is that of Hugging Face's `apply_chat_template`
//! (<https://huggingface.co/docs/transformers/chat_templating>).

use std::borrow::Cow;
use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Value as Jinja};
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

#[cfg(test)]
mod tests;

/// Instructions that one rendering may take; a conversation of 1,000 messages takes about 100,000.
const FUEL: u64 = 5_000_000;
/// Nested macro calls.
const RECURSION: usize = 64;
/// Bytes of a template's source.
const MAX_SOURCE: usize = 1 << 20;
/// Bytes of a rendered prompt.
const MAX_OUTPUT: usize = 64 << 20;
const NAME: &str = "chat";

/// A parsed chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos: String,
    eos: String,
    /// The template reads content that is a list of parts; for others the text parts are joined.
    takes_parts: bool,
}

impl ChatTemplate {
    /// Parses a template; `bos` and `eos` are the texts of these tokens, empty where the model has none.
    ///
    /// # Errors
    /// [`Error::Template`] with the line that does not parse.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self> {
        if source.len() > MAX_SOURCE {
            return Err(Error::Template(format!("it has {} bytes, expected at most {MAX_SOURCE}", source.len())));
        }
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: &str| strftime(SystemTime::now(), format));
        environment.add_filter("tojson", tojson);
        environment.add_template_owned(NAME, without_generation_tags(source).into_owned()).map_err(explain)?;
        let mut template = Self {
            environment,
            source: source.to_owned(),
            bos: bos.to_owned(),
            eos: eos.to_owned(),
            takes_parts: false,
        };
        template.takes_parts = template.probe_parts();
        Ok(template)
    }

    /// Prompt of a conversation.
    ///
    /// `messages` is a list of `{"role": .., "content": ..}` as in the OpenAI API; content that is a list of text parts
    /// is joined where the template does not read lists. `kwargs` are further variables, such as `enable_thinking`.
    ///
    /// # Errors
    /// [`Error::Template`] with the template's own words when it raises an exception, or the reason it failed.
    pub fn render(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
        kwargs: &Map<String, Value>,
    ) -> Result<String> {
        if self.takes_parts {
            self.run(messages, tools, add_generation_prompt, kwargs)
        } else {
            self.run(&join_parts(messages)?, tools, add_generation_prompt, kwargs)
        }
    }

    /// The source, as the model has it.
    pub fn source(&self) -> &str {
        &self.source
    }

    fn run(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        generate: bool,
        kwargs: &Map<String, Value>,
    ) -> Result<String> {
        let base = context! {
            messages => Jinja::from_serialize(messages),
            tools => Jinja::from_serialize(tools),
            documents => Jinja::from(()),
            add_generation_prompt => generate,
            bos_token => &self.bos,
            eos_token => &self.eos,
        };
        // The template's own interface wins over `kwargs`.
        let context = context! { ..base, ..Jinja::from_serialize(kwargs) };
        let template = self.environment.get_template(NAME).map_err(explain)?;
        let mut out = Bounded(Vec::new());
        template.render_captured_to(context, &mut out).map_err(explain)?;
        String::from_utf8(out.0).map_err(|e| Error::Template(e.to_string()))
    }

    /// True when a message with one text part renders like the same text as a string.
    fn probe_parts(&self) -> bool {
        let render = |content: Value| {
            let messages = json!([{"role": "user", "content": content}]);
            self.run(&messages, None, true, &Map::new()).ok()
        };
        let parts = render(json!([{"type": "text", "text": "probe"}]));
        parts.is_some() && parts == render(json!("probe"))
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("source", &self.source).finish_non_exhaustive()
    }
}

/// Replaces every content that is a list by its text parts, a line each.
fn join_parts(messages: &Value) -> Result<Value> {
    let mut messages = messages.clone();
    for message in messages.as_array_mut().into_iter().flatten() {
        let Some(content) = message.get_mut("content") else { continue };
        let Value::Array(parts) = &*content else { continue };
        let mut texts = Vec::with_capacity(parts.len());
        for part in parts {
            match (part, part.get("text")) {
                (Value::String(text), _) | (_, Some(Value::String(text))) => texts.push(text.as_str()),
                _ => {
                    let kind = part.get("type").and_then(Value::as_str).unwrap_or("unknown");
                    return Err(Error::Template(format!(
                        "this model reads text only, but a message has a part of type {kind}"
                    )));
                }
            }
        }
        *content = Value::String(texts.join("\n"));
    }
    Ok(messages)
}

/// Turns the tags that mark an assistant's words for training into tags without effect.
fn without_generation_tags(source: &str) -> Cow<'_, str> {
    if !source.contains("endgeneration") {
        return Cow::Borrowed(source);
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        let Some(end) = tag.find("%}") else { break };
        let (tag, after) = tag.split_at(end + 2);
        out.push_str(before);
        out.push_str(&match tag.trim_matches(['{', '%', '-', '+', '}', ' ', '\t', '\n', '\r']) {
            "generation" => tag.replace("generation", "if true"),
            "endgeneration" => tag.replace("endgeneration", "endif"),
            _ => tag.to_owned(),
        });
        rest = after;
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// Output that ends the rendering when it becomes too long.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::Error::other(format!("the prompt grows beyond {MAX_OUTPUT} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn raise_exception(message: &str) -> std::result::Result<Jinja, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

/// One sentence from an error and its causes.
fn explain(error: minijinja::Error) -> Error {
    let mut text = match (error.detail(), error.kind()) {
        (Some(detail), ErrorKind::InvalidOperation) => detail.to_owned(),
        _ => error.to_string(),
    };
    if let (Some(line), false) = (error.line(), text.contains("line ")) {
        text.push_str(&format!(" (line {line})"));
    }
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        text.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    Error::Template(text)
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False)` writes it, which is what templates were written against.
fn tojson(value: &Jinja, kwargs: Kwargs) -> std::result::Result<Jinja, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let sort: Option<bool> = kwargs.get("sort_keys")?;
    kwargs.get::<Option<Jinja>>("ensure_ascii")?;
    kwargs.get::<Option<Jinja>>("separators")?;
    kwargs.assert_all_used()?;
    let failed = |e: serde_json::Error| {
        minijinja::Error::new(ErrorKind::InvalidOperation, "cannot serialize to JSON").with_source(e)
    };
    let mut value = serde_json::to_value(value).map_err(failed)?;
    if sort == Some(true) {
        value.sort_all_objects();
    }
    let mut out = Vec::new();
    match indent {
        Some(width) => {
            let width = " ".repeat(width.min(64));
            let formatter = PrettyFormatter::with_indent(width.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut out, formatter)).map_err(failed)?;
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut out, Spaced)).map_err(failed)?,
    }
    let text = String::from_utf8(out).expect("serde_json writes UTF-8");
    Ok(Jinja::from_safe_string(text))
}

/// `{"a": 1, "b": [2, 3]}`: one line, a space after each comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// A date in UTC by `strftime` directives; those that templates use, others as they stand.
fn strftime(now: SystemTime, format: &str) -> String {
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let year_day = days - days_until(year) + 1;
    let mut out = String::with_capacity(format.len() + 16);
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&format!("{:02}", year % 100)),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('e') => out.push_str(&format!("{day:2}")),
            Some('j') => out.push_str(&format!("{year_day:03}")),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('H') => out.push_str(&format!("{hour:02}")),
            Some('I') => out.push_str(&format!("{:02}", (hour + 11) % 12 + 1)),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('M') => out.push_str(&format!("{minute:02}")),
            Some('S') => out.push_str(&format!("{second:02}")),
            Some('F') => out.push_str(&format!("{year}-{month:02}-{day:02}")),
            Some('T') => out.push_str(&format!("{hour:02}:{minute:02}:{second:02}")),
            Some('Z') => out.push_str("UTC"),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Days from 1970-01-01 to the first day of a year.
fn days_until(year: u64) -> u64 {
    let past = year - 1;
    365 * (year - 1970) + (past / 4 - past / 100 + past / 400) - (1969 / 4 - 1969 / 100 + 1969 / 400)
}

/// Year, month from 1 and day from 1 of a day counted from 1970-01-01.
fn civil(days: u64) -> (u64, u64, u64) {
    let mut year = 1970 + days / 366;
    while days_until(year + 1) <= days {
        year += 1;
    }
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut day = days - days_until(year);
    let lengths = [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in lengths {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    (year, month, day + 1)
}
