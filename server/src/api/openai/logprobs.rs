//! Log-probabilities in OpenAI's two dialects: a list of objects in chat, four parallel lists in completions.

use std::fmt::Write;

use cupola_engine::request::TokenLogprobs;
use cupola_models::Tokenizer;
use serde::Serialize;
use serde_json::{Map, Value};

/// What JSON, which has no infinity, shows for a token that cannot come.
const FLOOR: f32 = -9999.0;

/// As a 64-bit number: the same digits whether a body is built from it or a chunk is written at once.
fn finite(logprob: f32) -> f64 {
    // A NaN becomes the floor as well.
    if logprob > FLOOR { logprob.into() } else { FLOOR.into() }
}

/// `choices[].logprobs` of a chat.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: (),
}

#[derive(Debug, PartialEq, Serialize)]
struct ChatToken {
    #[serde(flatten)]
    token: OneToken,
    top_logprobs: Vec<OneToken>,
}

#[derive(Debug, PartialEq, Serialize)]
struct OneToken {
    token: String,
    logprob: f64,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    /// `entries` in order; each shows its `top` most likely tokens.
    pub(crate) fn new(tokenizer: &Tokenizer, entries: &[TokenLogprobs]) -> Self {
        let one = |token: u32, logprob: f32| {
            let bytes = tokenizer.token_bytes(token);
            OneToken {
                token: String::from_utf8_lossy(bytes).into_owned(),
                logprob: finite(logprob),
                bytes: bytes.to_vec(),
            }
        };
        let content = entries.iter().map(|entry| ChatToken {
            token: one(entry.token, entry.logprob),
            top_logprobs: entry.top.iter().map(|&(token, logprob)| one(token, logprob)).collect(),
        });
        Self { content: content.collect(), refusal: () }
    }
}

/// `choices[].logprobs` of a completion: one entry a token in each list.
#[derive(Debug, Default, PartialEq, Serialize)]
pub(crate) struct CompletionLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f64>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Where each token begins in the answer's text, in characters.
    text_offset: Vec<usize>,
}

/// Builds the lists of one choice over as many pieces as it comes in.
#[derive(Debug, Default)]
pub(crate) struct OffsetCounter {
    /// Characters complete so far.
    characters: usize,
    /// The beginning of a character whose other bytes are still to come.
    pending: Vec<u8>,
}

impl OffsetCounter {
    /// Where the next token begins, which has these bytes.
    fn advance(&mut self, bytes: &[u8]) -> usize {
        let start = self.characters;
        self.pending.extend_from_slice(bytes);
        loop {
            let (complete, broken) = match std::str::from_utf8(&self.pending) {
                Ok(text) => (text.len(), Some(0)),
                Err(e) => (e.valid_up_to(), e.error_len()),
            };
            let text = std::str::from_utf8(&self.pending[..complete]).expect("just checked");
            self.characters += text.chars().count();
            // Bytes that can become no character count as one, as they do in the text; bytes at the end that still
            // can become one wait.
            self.pending.drain(..complete + broken.unwrap_or(0));
            match broken {
                Some(1..) => self.characters += 1,
                Some(0) | None => return start,
            }
        }
    }
}

impl CompletionLogprobs {
    /// Appends a token of a prompt whose probability is not known, such as the first.
    pub(crate) fn push_unknown(&mut self, tokenizer: &Tokenizer, token: u32, offsets: &mut OffsetCounter) {
        self.push_token(tokenizer, token, offsets);
        self.token_logprobs.push(None);
        self.top_logprobs.push(None);
    }

    /// Appends a token.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, entry: &TokenLogprobs, offsets: &mut OffsetCounter) {
        self.push_token(tokenizer, entry.token, offsets);
        self.token_logprobs.push(Some(finite(entry.logprob)));
        let mut top = Map::new();
        // The token itself is always among them: scorers compare it with the best.
        for &(token, logprob) in entry.top.iter().chain([&(entry.token, entry.logprob)]) {
            top.insert(label(tokenizer.token_bytes(token)), finite(logprob).into());
        }
        self.top_logprobs.push(Some(top));
    }

    fn push_token(&mut self, tokenizer: &Tokenizer, token: u32, offsets: &mut OffsetCounter) {
        let bytes = tokenizer.token_bytes(token);
        self.tokens.push(label(bytes));
        self.text_offset.push(offsets.advance(bytes));
    }
}

/// A token as text; one that is no text of its own is spelled `bytes:\xNN`, so that different tokens stay different.
fn label(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold(String::from("bytes:"), |mut out, byte| {
            write!(out, "\\x{byte:02x}").expect("writing to memory succeeds");
            out
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_count_characters_across_split_ones() {
        let mut offsets = OffsetCounter::default();
        let snow = "☃".as_bytes();
        let starts: Vec<usize> = [&b"ab"[..], &snow[..1], &snow[1..], b"c", b"\xff", b"d", b"e"]
            .into_iter()
            .map(|bytes| offsets.advance(bytes))
            .collect();
        assert_eq!(starts, [0, 2, 2, 3, 4, 5, 6]);
        assert_eq!(offsets.characters, 7);
    }

    #[test]
    fn every_split_of_a_text_ends_at_its_length() {
        let text = "aé☃😀z";
        for cut in 0..=text.len() {
            for second in cut..=text.len() {
                let mut offsets = OffsetCounter::default();
                let bytes = text.as_bytes();
                for piece in [&bytes[..cut], &bytes[cut..second], &bytes[second..]] {
                    offsets.advance(piece);
                }
                assert_eq!((offsets.characters, offsets.pending.len()), (5, 0), "{cut} {second}");
            }
        }
    }

    #[test]
    fn broken_characters_have_distinct_labels() {
        assert_eq!(label(b"ok"), "ok");
        assert_eq!(label(b"\xe2\x98"), "bytes:\\xe2\\x98");
        assert_ne!(label(b"\xe2"), label(b"\xe3"));
    }

    #[test]
    fn infinities_become_numbers() {
        assert_eq!(finite(f32::NEG_INFINITY), -9999.0);
        assert_eq!(finite(f32::NAN), -9999.0);
        assert_eq!(finite(-0.5), -0.5);
    }
}
