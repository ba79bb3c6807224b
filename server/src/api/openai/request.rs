//! The body of a chat or completion request, as data. Unknown fields are taken and ignored; `null` means absent.
//!
//! One struct serves both routes: they share nearly every field, and a flattened struct would lose the JSON path of a
//! wrong value.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// Fields of `/v1/chat/completions` and `/v1/completions`, OpenAI's and vLLM's.
#[derive(Debug, Default, serde::Deserialize)]
pub(crate) struct GenerationRequest {
    pub(crate) model: Option<String>,
    pub(crate) messages: Option<Vec<Message>>,
    pub(crate) prompt: Option<Prompts>,

    pub(crate) stream: Option<bool>,
    pub(crate) stream_options: Option<StreamOptions>,
    pub(crate) n: Option<u64>,
    pub(crate) best_of: Option<u64>,
    pub(crate) echo: Option<bool>,
    pub(crate) logprobs: Option<Logprobs>,
    pub(crate) top_logprobs: Option<u64>,
    pub(crate) return_token_ids: Option<bool>,
    pub(crate) timings: Option<bool>,

    pub(crate) temperature: Option<f64>,
    pub(crate) top_p: Option<f64>,
    pub(crate) top_k: Option<i64>,
    pub(crate) min_p: Option<f64>,
    pub(crate) repetition_penalty: Option<f64>,
    pub(crate) repeat_penalty: Option<f64>,
    pub(crate) presence_penalty: Option<f64>,
    pub(crate) frequency_penalty: Option<f64>,
    pub(crate) logit_bias: Option<Map<String, Value>>,
    pub(crate) seed: Option<Seed>,

    pub(crate) max_tokens: Option<u64>,
    pub(crate) max_completion_tokens: Option<u64>,
    pub(crate) min_tokens: Option<u64>,
    pub(crate) stop: Option<Stop>,
    pub(crate) stop_token_ids: Option<Vec<u32>>,
    pub(crate) include_stop_str_in_output: Option<bool>,
    pub(crate) ignore_eos: Option<bool>,

    pub(crate) add_special_tokens: Option<bool>,
    pub(crate) add_generation_prompt: Option<bool>,
    pub(crate) chat_template_kwargs: Option<Map<String, Value>>,
    pub(crate) cache_salt: Option<String>,
    pub(crate) cache_prompt: Option<bool>,
    pub(crate) tools: Option<Vec<Value>>,
    pub(crate) tool_choice: Option<Value>,
    pub(crate) response_format: Option<Value>,
    pub(crate) modalities: Option<Vec<String>>,

    // Refused unless absent, empty or off: ignoring them would change what the answer means.
    pub(crate) suffix: Option<Value>,
    pub(crate) functions: Option<Value>,
    pub(crate) audio: Option<Value>,
    pub(crate) web_search_options: Option<Value>,
    pub(crate) structured_outputs: Option<Value>,
    pub(crate) guided_json: Option<Value>,
    pub(crate) guided_regex: Option<Value>,
    pub(crate) guided_choice: Option<Value>,
    pub(crate) guided_grammar: Option<Value>,
    pub(crate) grammar: Option<Value>,
    pub(crate) json_schema: Option<Value>,
    pub(crate) chat_template: Option<Value>,
    pub(crate) continue_final_message: Option<Value>,
    pub(crate) use_beam_search: Option<Value>,
    pub(crate) truncate_prompt_tokens: Option<Value>,
    pub(crate) prompt_embeds: Option<Value>,
}

/// `stream_options`.
#[derive(Clone, Copy, Debug, Default, serde::Deserialize)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: Option<bool>,
    pub(crate) continuous_usage_stats: Option<bool>,
}

/// One message of a chat.
#[derive(Debug, serde::Deserialize)]
pub(crate) struct Message {
    pub(crate) role: String,
    pub(crate) content: Option<Content>,
    pub(crate) name: Option<String>,
    pub(crate) tool_calls: Option<Vec<Value>>,
    pub(crate) tool_call_id: Option<String>,
    pub(crate) reasoning: Option<String>,
    pub(crate) reasoning_content: Option<String>,
}

/// What a message says.
#[derive(Debug, PartialEq)]
pub(crate) enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// One part of a message.
#[derive(Debug, PartialEq, serde::Deserialize)]
pub(crate) struct Part {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) text: Option<String>,
}

/// The prompts of a completion: a text, tokens, or a list of either.
#[derive(Debug, PartialEq)]
pub(crate) struct Prompts(pub(crate) Vec<Prompt>);

/// One prompt.
#[derive(Debug, PartialEq)]
pub(crate) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

/// A boolean in chat, a number in completions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Logprobs {
    Switch(bool),
    Count(u64),
}

/// Texts that end an answer.
#[derive(Debug, PartialEq)]
pub(crate) struct Stop(pub(crate) Vec<String>);

/// Any 64-bit integer, signed or not.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Seed(pub(crate) u64);

/// Implements `Deserialize` for a type through a visitor that says what was expected.
macro_rules! by_visitor {
    ($type:ty, $visitor:ident, $expecting:literal, $method:ident, { $($body:item)* }) => {
        struct $visitor;
        impl<'de> Visitor<'de> for $visitor {
            type Value = $type;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str($expecting)
            }
            $($body)*
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.$method($visitor)
            }
        }
    };
}

by_visitor!(Content, ContentVisitor, "a string or a list of content parts", deserialize_any, {
    fn visit_str<E: de::Error>(self, text: &str) -> Result<Content, E> {
        Ok(Content::Text(text.to_owned()))
    }
    fn visit_string<E: de::Error>(self, text: String) -> Result<Content, E> {
        Ok(Content::Text(text))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content, A::Error> {
        let mut parts = Vec::new();
        while let Some(part) = seq.next_element()? {
            parts.push(part);
        }
        Ok(Content::Parts(parts))
    }
});

/// One element of a prompt list.
enum PromptItem {
    Text(String),
    Token(u32),
    Tokens(Vec<u32>),
}

by_visitor!(PromptItem, PromptItemVisitor, "a string, a token id or a list of token ids", deserialize_any, {
    fn visit_str<E: de::Error>(self, text: &str) -> Result<PromptItem, E> {
        Ok(PromptItem::Text(text.to_owned()))
    }
    fn visit_string<E: de::Error>(self, text: String) -> Result<PromptItem, E> {
        Ok(PromptItem::Text(text))
    }
    fn visit_u64<E: de::Error>(self, token: u64) -> Result<PromptItem, E> {
        u32::try_from(token)
            .map(PromptItem::Token)
            .map_err(|_| E::invalid_value(de::Unexpected::Unsigned(token), &"a token id"))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<PromptItem, A::Error> {
        let mut tokens = Vec::new();
        while let Some(token) = seq.next_element()? {
            tokens.push(token);
        }
        Ok(PromptItem::Tokens(tokens))
    }
});

by_visitor!(
    Prompts,
    PromptsVisitor,
    "a string, a list of strings, a list of token ids or a list of such lists",
    deserialize_any,
    {
        fn visit_str<E: de::Error>(self, text: &str) -> Result<Prompts, E> {
            Ok(Prompts(vec![Prompt::Text(text.to_owned())]))
        }
        fn visit_string<E: de::Error>(self, text: String) -> Result<Prompts, E> {
            Ok(Prompts(vec![Prompt::Text(text)]))
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Prompts, A::Error> {
            let mut prompts = Vec::new();
            let mut tokens = Vec::new();
            while let Some(item) = seq.next_element()? {
                match item {
                    PromptItem::Text(text) => prompts.push(Prompt::Text(text)),
                    PromptItem::Tokens(list) => prompts.push(Prompt::Tokens(list)),
                    PromptItem::Token(token) => tokens.push(token),
                }
                if !tokens.is_empty() && !prompts.is_empty() {
                    return Err(de::Error::custom("token ids of one prompt cannot stand beside other prompts"));
                }
            }
            if !tokens.is_empty() {
                prompts.push(Prompt::Tokens(tokens));
            }
            Ok(Prompts(prompts))
        }
    }
);

by_visitor!(Logprobs, LogprobsVisitor, "a boolean or a whole number", deserialize_any, {
    fn visit_bool<E: de::Error>(self, on: bool) -> Result<Logprobs, E> {
        Ok(Logprobs::Switch(on))
    }
    fn visit_u64<E: de::Error>(self, count: u64) -> Result<Logprobs, E> {
        Ok(Logprobs::Count(count))
    }
});

by_visitor!(Stop, StopVisitor, "a string or a list of strings", deserialize_any, {
    fn visit_str<E: de::Error>(self, text: &str) -> Result<Stop, E> {
        Ok(Stop(vec![text.to_owned()]))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Stop, A::Error> {
        let mut texts = Vec::new();
        while let Some(text) = seq.next_element()? {
            texts.push(text);
        }
        Ok(Stop(texts))
    }
});

by_visitor!(Seed, SeedVisitor, "a whole number", deserialize_any, {
    fn visit_u64<E: de::Error>(self, seed: u64) -> Result<Seed, E> {
        Ok(Seed(seed))
    }
    fn visit_i64<E: de::Error>(self, seed: i64) -> Result<Seed, E> {
        Ok(Seed(seed.cast_unsigned()))
    }
});

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::parse;

    fn prompts(json: &str) -> Vec<Prompt> {
        let body = format!("{{\"prompt\": {json}}}");
        parse::<GenerationRequest>(body.as_bytes()).expect(json).prompt.expect("a prompt").0
    }

    fn param_of(body: &str) -> String {
        let error = parse::<GenerationRequest>(body.as_bytes()).expect_err(body);
        error.body()["error"]["param"].as_str().expect("a path").to_owned()
    }

    #[test]
    fn prompts_come_in_four_shapes() {
        let text = |t: &str| Prompt::Text(t.to_owned());
        assert_eq!(prompts("\"a\""), [text("a")]);
        assert_eq!(prompts("[\"a\", \"b\"]"), [text("a"), text("b")]);
        assert_eq!(prompts("[1, 2]"), [Prompt::Tokens(vec![1, 2])]);
        assert_eq!(prompts("[[1], [2, 3]]"), [Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]);
        assert_eq!(prompts("[\"a\", [2]]"), [text("a"), Prompt::Tokens(vec![2])]);
        assert_eq!(prompts("[]"), []);
    }

    #[test]
    fn wrong_values_are_named_by_path() {
        for (body, param) in [
            (r#"{"prompt": [[1, -2]]}"#, "prompt[0][1]"),
            (r#"{"prompt": [1, "a"]}"#, "prompt"),
            (r#"{"prompt": 5}"#, "prompt"),
            (r#"{"prompt": [1.5]}"#, "prompt[0]"),
            (r#"{"messages": [{"content": "x"}]}"#, "messages[0]"),
            (r#"{"messages": [{"role": "user", "content": 5}]}"#, "messages[0].content"),
            (r#"{"messages": [{"role": "user", "content": [{"text": "x"}]}]}"#, "messages[0].content[0]"),
            (r#"{"messages": "hello"}"#, "messages"),
            (r#"{"temperature": "warm"}"#, "temperature"),
            (r#"{"temperature": NaN}"#, "temperature"),
            (r#"{"max_tokens": -1}"#, "max_tokens"),
            (r#"{"n": 1.5}"#, "n"),
            (r#"{"stop": ["a", 1]}"#, "stop[1]"),
            (r#"{"stream": "yes"}"#, "stream"),
            (r#"{"stream_options": {"include_usage": 1}}"#, "stream_options.include_usage"),
            (r#"{"seed": 1e30}"#, "seed"),
        ] {
            assert_eq!(param_of(body), param, "{body}");
        }
    }

    #[test]
    fn seeds_take_either_sign() {
        let seed = |text: &str| parse::<GenerationRequest>(text.as_bytes()).expect(text).seed.expect("a seed").0;
        assert_eq!(seed(r#"{"seed": 7}"#), 7);
        assert_eq!(seed(r#"{"seed": -1}"#), u64::MAX);
        assert_eq!(seed(r#"{"seed": 18446744073709551615}"#), u64::MAX);
    }
}
