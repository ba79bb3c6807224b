//! Tokens to text, one token at a time, without ever cutting a character.
//!
//! ```text
//!   token bytes ──> [ incomplete character, at most 3 bytes ] ──> valid UTF-8 text
//! ```

use cupola_models::Tokenizer;

/// What tokens stand for. Implemented by the tokenizer of `cupola-models`; small ones serve in tests.
pub trait TokenText: Send + Sync {
    /// The exact bytes of a token, which need not be whole characters; empty for an id out of range.
    fn token_bytes(&self, id: u32) -> &[u8];

    /// True for control tokens, which are not part of the text.
    fn is_special(&self, id: u32) -> bool;
}

impl TokenText for Tokenizer {
    fn token_bytes(&self, id: u32) -> &[u8] {
        Tokenizer::token_bytes(self, id)
    }

    fn is_special(&self, id: u32) -> bool {
        Tokenizer::is_special(self, id)
    }
}

/// Text of one answer so far, but for an incomplete character at its end.
#[derive(Debug, Default)]
pub(crate) struct Detokenizer {
    incomplete: Vec<u8>,
}

impl Detokenizer {
    /// Appends the text that became complete with `bytes`. Bytes that can never be UTF-8 become U+FFFD.
    pub(crate) fn push(&mut self, bytes: &[u8], text: &mut String) {
        if self.incomplete.is_empty()
            && let Ok(whole) = std::str::from_utf8(bytes)
        {
            text.push_str(whole);
            return;
        }
        self.incomplete.extend_from_slice(bytes);
        let mut rest = self.incomplete.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(std::str::from_utf8(valid).expect("valid up to here"));
                    rest = after;
                    let Some(bad) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[bad..];
                }
            }
        }
        let done = self.incomplete.len() - rest.len();
        self.incomplete.drain(..done);
    }

    /// Appends what is left when the answer ends: an incomplete character becomes U+FFFD.
    pub(crate) fn finish(&mut self, text: &mut String) {
        if !self.incomplete.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            self.incomplete.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_pieces(bytes: &[u8], cuts: &[usize]) -> String {
        let mut detokenizer = Detokenizer::default();
        let mut text = String::new();
        let mut start = 0;
        for cut in cuts.iter().copied().chain([bytes.len()]) {
            detokenizer.push(&bytes[start..cut], &mut text);
            start = cut;
        }
        detokenizer.finish(&mut text);
        text
    }

    #[test]
    fn any_cut_gives_the_same_text() {
        let samples: [&[u8]; 5] = [
            "plain, naïve, 日本語, 👩‍👩‍👧 and é".as_bytes(),
            b"bad \xff\xfe then \xe6\x97 cut off and \xf0\x9f\x91",
            b"\xf0\x9f\xc3\xa9\x80\xe2\x82\xac",
            b"",
            b"\xe2\x82",
        ];
        for bytes in samples {
            let whole = String::from_utf8_lossy(bytes);
            for a in 0..=bytes.len() {
                for b in a..=bytes.len() {
                    assert_eq!(in_pieces(bytes, &[a, b]), whole, "{bytes:?} cut at {a} and {b}");
                }
            }
            let every: Vec<usize> = (0..bytes.len()).collect();
            assert_eq!(in_pieces(bytes, &every), whole, "{bytes:?} cut everywhere");
        }
    }

    #[test]
    fn text_never_shows_a_character_that_may_still_complete() {
        let mut detokenizer = Detokenizer::default();
        let mut text = String::new();
        for byte in "€".bytes().take(2) {
            detokenizer.push(&[byte], &mut text);
            assert_eq!(text, "");
        }
        detokenizer.push(&"€".as_bytes()[2..], &mut text);
        assert_eq!(text, "€");
    }
}
