//! From messages, texts or token ids to the tokens that the engine gets.

use std::sync::Arc;

use cupola_models::ChatTemplate;
use serde_json::{Map, Value, json};

use super::guard::Hidden;
use super::request::{Content, GenerationRequest, Message, Prompt};
use crate::error::ApiError;
use crate::local::LocalModel;

/// Roles a message may have; `developer` is OpenAI's newer word for `system`.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// Names that the template gets from us and that `chat_template_kwargs` must not replace.
const RESERVED: [&str; 6] = ["messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "documents"];

/// A chat, checked and in the shape that templates expect.
#[derive(Debug)]
pub(crate) struct Chat {
    messages: Value,
    tools: Option<Value>,
    kwargs: Map<String, Value>,
    add_generation_prompt: bool,
    add_special_tokens: bool,
    /// Bytes of all texts, which the prompt has at least about as many of.
    pub(crate) bytes: usize,
}

impl Chat {
    /// Checks roles and contents.
    ///
    /// # Errors
    /// [`ApiError::Field`] or [`ApiError::Unsupported`] with the path of the first wrong message.
    pub(crate) fn of(request: &mut GenerationRequest) -> Result<Self, ApiError> {
        let messages = request.messages.take().ok_or_else(|| ApiError::field("messages", "`messages` is missing"))?;
        if messages.is_empty() {
            return Err(ApiError::field("messages", "`messages` must hold at least one message"));
        }
        let mut bytes = 0;
        let mut shaped = Vec::with_capacity(messages.len());
        for (index, message) in messages.into_iter().enumerate() {
            shaped.push(shape(message, index, &mut bytes)?);
        }
        let kwargs = request.chat_template_kwargs.take().unwrap_or_default();
        if let Some(name) = RESERVED.iter().find(|name| kwargs.contains_key(**name)) {
            let param = format!("chat_template_kwargs.{name}");
            return Err(ApiError::field(&param, format!("`{param}` cannot be set: the server sets it")));
        }
        Ok(Self {
            messages: Value::Array(shaped),
            tools: request.tools.take().filter(|tools| !tools.is_empty()).map(Value::Array),
            kwargs,
            add_generation_prompt: request.add_generation_prompt.unwrap_or(true),
            // The template writes the special tokens itself.
            add_special_tokens: request.add_special_tokens.unwrap_or(false),
            bytes,
        })
    }

    /// Renders and tokenises.
    ///
    /// # Errors
    /// [`ApiError::Template`] or [`ApiError::Field`] when the template or the tokenizer refuses the text.
    pub(crate) async fn tokens(
        mut self,
        template: &Arc<ChatTemplate>,
        model: &LocalModel,
    ) -> Result<Vec<u32>, ApiError> {
        let (template, tokenizer) = (Arc::clone(template), model.tokenizer.clone());
        model
            .work(self.bytes, move || {
                let hidden = Hidden::take(&mut self.messages, &tokenizer);
                let text = template
                    .render(&self.messages, self.tools.as_ref(), self.add_generation_prompt, &self.kwargs)
                    .map_err(|e| ApiError::Template { reason: e.to_string() })?;
                let encoded = hidden.encode(&tokenizer, &text, self.add_special_tokens);
                encoded.map_err(|e| ApiError::field("messages", format!("`messages`: {e}")))
            })
            .await
    }
}

/// One message as templates read it.
fn shape(message: Message, index: usize, bytes: &mut usize) -> Result<Value, ApiError> {
    let at = |field: &str| format!("messages[{index}].{field}");
    if !ROLES.contains(&message.role.as_str()) {
        let given: String = message.role.chars().take(64).collect();
        let known = ROLES.join(", ");
        return Err(ApiError::field(at("role"), format!("`{}` must be one of {known}, got `{given}`", at("role"))));
    }
    let content = match message.content {
        None if message.role == "assistant" => None,
        None => return Err(ApiError::field(at("content"), format!("`{}` is missing", at("content")))),
        Some(Content::Text(text)) => Some(text),
        Some(Content::Parts(parts)) => {
            let mut text = String::new();
            for (number, part) in parts.into_iter().enumerate() {
                let path = format!("messages[{index}].content[{number}]");
                match (part.kind.as_str(), part.text) {
                    ("text", Some(piece)) => text.push_str(&piece),
                    ("text", None) => {
                        return Err(ApiError::field(format!("{path}.text"), format!("`{path}.text` is missing")));
                    }
                    _ => return Err(ApiError::unsupported(path, "a message part that is not text")),
                }
            }
            Some(text)
        }
    };
    let role = if message.role == "developer" { "system" } else { &message.role };
    *bytes += content.as_ref().map_or(0, String::len) + role.len();
    let mut shaped = json!({"role": role, "content": content});
    if let Some(name) = message.name {
        shaped["name"] = name.into();
    }
    if let Some(reasoning) = message.reasoning_content.or(message.reasoning) {
        *bytes += reasoning.len();
        shaped["reasoning_content"] = reasoning.into();
    }
    if let Some(id) = message.tool_call_id {
        shaped["tool_call_id"] = id.into();
    }
    if let Some(calls) = message.tool_calls.filter(|calls| !calls.is_empty()) {
        let calls = calls.into_iter().map(with_parsed_arguments);
        let calls = Value::Array(calls.collect());
        *bytes += calls.to_string().len();
        shaped["tool_calls"] = calls;
    }
    Ok(shaped)
}

/// OpenAI sends a call's arguments as JSON in a string; templates want the object.
fn with_parsed_arguments(mut call: Value) -> Value {
    let parsed = call["function"]["arguments"].as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
    if let Some(arguments @ Value::Object(_)) = parsed {
        call["function"]["arguments"] = arguments;
    }
    call
}

impl Prompt {
    /// Bytes of a text, or what so many tokens would take.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Tokens(tokens) => tokens.len().saturating_mul(4),
        }
    }

    /// The tokens of this prompt.
    ///
    /// # Errors
    /// [`ApiError::Field`] when the tokenizer refuses the text.
    pub(crate) async fn tokens(&self, special: bool, model: &LocalModel) -> Result<Vec<u32>, ApiError> {
        match self {
            Self::Tokens(tokens) => Ok(tokens.clone()),
            Self::Text(text) => {
                let (text, tokenizer) = (text.clone(), model.tokenizer.clone());
                model
                    .work(text.len(), move || {
                        let encoded = tokenizer.encode(&text, special);
                        encoded.map_err(|e| ApiError::field("prompt", format!("`prompt`: {e}")))
                    })
                    .await
            }
        }
    }
}

/// Refuses a prompt that leaves no room for the answer asked for; returns the most tokens the answer may have.
///
/// # Errors
/// [`ApiError::ContextLength`] with both numbers.
pub(crate) fn check_context(
    prompt: usize,
    max_tokens: Option<usize>,
    max: usize,
    param: &'static str,
) -> Result<(), ApiError> {
    let completion = max_tokens.unwrap_or(1);
    if prompt.saturating_add(completion) <= max {
        return Ok(());
    }
    Err(ApiError::ContextLength { param, prompt, completion, max, exact: true })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::parse;

    fn chat(body: Value) -> Result<Chat, ApiError> {
        Chat::of(&mut parse(body.to_string().as_bytes())?)
    }

    fn param(body: Value) -> String {
        let error = chat(body).expect_err("wrong");
        error.body()["error"]["param"].as_str().expect("a path").to_owned()
    }

    #[test]
    fn parts_are_joined_and_developer_is_system() {
        let chat = chat(json!({"messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
            {"role": "user", "content": "Hi", "name": "Ada"},
        ]}))
        .expect("fine");
        assert_eq!(
            chat.messages,
            json!([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi", "name": "Ada"}])
        );
        assert_eq!(chat.bytes, 8 + 6 + 2 + 4);
    }

    #[test]
    fn calls_reach_the_template_as_objects() {
        let chat = chat(json!({"messages": [
            {"role": "assistant", "content": null,
             "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
            {"role": "tool", "content": "2", "tool_call_id": "1"},
        ]}))
        .expect("fine");
        assert_eq!(chat.messages[0]["tool_calls"][0]["function"]["arguments"], json!({"a": 1}));
        assert_eq!(chat.messages[1]["tool_call_id"], "1");
    }

    #[test]
    fn wrong_messages_are_named_by_path() {
        assert_eq!(param(json!({})), "messages");
        assert_eq!(param(json!({"messages": []})), "messages");
        assert_eq!(param(json!({"messages": [{"role": "wizard", "content": "x"}]})), "messages[0].role");
        assert_eq!(param(json!({"messages": [{"role": "user"}]})), "messages[0].content");
        assert_eq!(param(json!({"messages": [{"role": "user", "content": null}]})), "messages[0].content");
        let image = json!({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}});
        assert_eq!(
            param(json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, image]}]})),
            "messages[0].content[1]"
        );
        assert_eq!(
            param(json!({"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"messages": []}})),
            "chat_template_kwargs.messages"
        );
    }

    #[test]
    fn room_for_the_answer_is_part_of_the_context() {
        assert!(check_context(10, Some(6), 16, "prompt").is_ok());
        assert!(check_context(10, Some(7), 16, "prompt").is_err());
        assert!(check_context(15, None, 16, "prompt").is_ok());
        assert!(check_context(16, None, 16, "prompt").is_err());
        assert!(check_context(16, Some(0), 16, "prompt").is_ok());
        assert!(check_context(usize::MAX, Some(9), 16, "prompt").is_err());
    }
}
