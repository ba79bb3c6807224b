//! Text to token ids and back.
//!
//! ```text
//!   tokenizer.json  --json--> \                         encode   special tokens cut out -> normalise -> split -> BPE
//!                               pipeline + token table           (from GGUF: -> joined by our own, from the table)
//!   GGUF keys       --gguf--> /                         decode   token table only: the bytes each token stands for
//! ```
//!
//! Encoding is the work of the `tokenizers` crate, but for the joining of GGUF files' vocabularies: what the crate needs for
//! it takes longer to build than all else at start (see `merges.rs`), or is not there at all (see `spm`). Decoding is ours:
//! every token stands for fixed bytes, so an answer is the concatenation of its tokens' bytes, and a character split over
//! tokens is put together by whoever holds them.

use std::ops::Range;
use std::sync::Arc;

use tokenizers::{AddedVocabulary, Model as _, NormalizerWrapper, OffsetReferential, OffsetType, PreTokenizer as _};

use crate::error::{Error, Result};

pub(crate) mod bpe;
mod gguf;
mod index;
mod json;
mod merges;
mod spm;
#[cfg(test)]
mod tests;

pub(crate) use gguf::from_gguf;
pub(crate) use json::{from_folder, from_json};

/// Token ids are below this; a higher one is taken for a sign of a damaged file.
const MAX_VOCAB: usize = 1 << 24;

/// A tokenizer. Clones share everything.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    pipeline: tokenizers::Tokenizer,
    /// The added tokens of `pipeline`, but blind to special ones: for text that must not smuggle any in.
    plain: AddedVocabulary,
    table: TokenTable,
    joining: Joining,
    specials: Specials,
    /// Spellings of special tokens, the longest first, and the bytes that any of them begins with.
    special_texts: (Vec<String>, Vec<u8>),
    strips_leading_space: bool,
}

/// Who joins what a text was split into.
enum Joining {
    /// The pipeline's model.
    Library,
    /// By score; it takes the place of the pipeline's normalizer and splitter too.
    Pieces(Box<spm::Pieces>),
    /// By a list of merges.
    Merges(Box<merges::Merges>),
}

/// A piece of a text to encode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// The text of a special token in it means that token.
    Text(&'a str),
    /// Nothing in it is special.
    Plain(&'a str),
}

/// What surrounds a text, and what ends one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Specials {
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Vec<u32>,
    /// Put before and after a text with `add_special_tokens`.
    pub(crate) prefix: Vec<u32>,
    pub(crate) suffix: Vec<u32>,
}

/// The bytes of every token, one after the other.
#[derive(Debug, Default)]
pub(crate) struct TokenTable {
    bytes: Vec<u8>,
    /// `ends[id]` is where token `id` ends.
    ends: Vec<u32>,
    special: Vec<bool>,
}

impl TokenTable {
    /// Room for so many tokens of so many bytes in all.
    pub(crate) fn with_capacity(tokens: usize, bytes: usize) -> Self {
        Self { bytes: Vec::with_capacity(bytes), ends: Vec::with_capacity(tokens), special: Vec::with_capacity(tokens) }
    }

    /// Appends the token with the next id.
    pub(crate) fn push(&mut self, bytes: impl IntoIterator<Item = u8>, special: bool) -> Result<()> {
        self.bytes.extend(bytes);
        let end = u32::try_from(self.bytes.len());
        self.ends.push(end.map_err(|_| Error::Tokenizer("its tokens take more than 4 GiB together".into()))?);
        self.special.push(special);
        Ok(())
    }

    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    fn get(&self, id: u32) -> &[u8] {
        let Some(&end) = self.ends.get(id as usize) else { return &[] };
        let start = match id {
            0 => 0,
            _ => self.ends[id as usize - 1],
        };
        &self.bytes[start as usize..end as usize]
    }
}

impl Tokenizer {
    /// `joining` has the text between the added tokens of `pipeline`.
    fn new(
        pipeline: tokenizers::Tokenizer,
        table: TokenTable,
        joining: Joining,
        specials: Specials,
        strips_leading_space: bool,
    ) -> Self {
        let mut plain = pipeline.get_added_vocabulary().clone();
        plain.set_encode_special_tokens(true);
        let special_texts = special_texts(&table);
        Self(Arc::new(Inner { pipeline, plain, table, joining, specials, special_texts, strips_leading_space }))
    }

    /// Token ids of a text in which the text of a special token means that token. With `add_special_tokens` the
    /// tokens that the model wants around a text (usually BOS) are added.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the text has a character that the vocabulary cannot express.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        self.encode_parts(&[Part::Text(text)], add_special_tokens)
    }

    /// Token ids of a text in parts, of which some must not be taken for special tokens; otherwise as
    /// [`encode`](Self::encode). Each part is split into tokens for itself.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_parts(&self, parts: &[Part<'_>], add_special_tokens: bool) -> Result<Vec<u32>> {
        let inner = &*self.0;
        let Specials { prefix, suffix, .. } = &inner.specials;
        let mut ids = if add_special_tokens { prefix.clone() } else { Vec::new() };
        for part in parts {
            ids.extend(match part {
                Part::Text(text) => inner.run(inner.pipeline.get_added_vocabulary(), text)?,
                Part::Plain(text) => self.encode_plain(text)?,
            });
        }
        if add_special_tokens {
            ids.extend(suffix);
        }
        Ok(ids)
    }

    /// Where a text first spells a special token; of several at one place, the longest.
    pub fn find_special(&self, text: &str) -> Option<Range<usize>> {
        let (spellings, firsts) = &self.0.special_texts;
        text.bytes().enumerate().filter(|(_, byte)| firsts.contains(byte)).find_map(|(at, _)| {
            let rest = &text.as_bytes()[at..];
            let found = spellings.iter().find(|spelling| rest.starts_with(spelling.as_bytes()))?;
            Some(at..at + found.len())
        })
    }

    /// Token ids of a text in which nothing is special: for text from somebody who must not write `<|im_end|>`.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        self.0.run(&self.0.plain, text)
    }

    /// Text of token ids. Bytes that are not UTF-8 become U+FFFD; the space that SentencePiece puts before the first
    /// word is taken away.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let kept = ids.iter().filter(|&&id| !(skip_special && self.is_special(id)));
        let mut bytes: Vec<u8> = Vec::with_capacity(4 * ids.len());
        for &id in kept {
            let token = self.token_bytes(id);
            let at_start = bytes.is_empty() && self.0.strips_leading_space && !self.is_special(id);
            bytes.extend_from_slice(if at_start { token.strip_prefix(b" ").unwrap_or(token) } else { token });
        }
        match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(e) => String::from_utf8_lossy(e.as_bytes()).into_owned(),
        }
    }

    /// The bytes that a token stands for, which need not be whole characters; a special token's text; nothing for an
    /// id out of range.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.0.table.get(id)
    }

    /// True for tokens that mark structure and are no text (`<s>`, `<|im_end|>`).
    pub fn is_special(&self, id: u32) -> bool {
        self.0.table.special.get(id as usize).copied().unwrap_or(false)
    }

    /// Number of token ids; the model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.0.table.len()
    }

    /// The token that begins a text, when the model has one.
    pub fn bos(&self) -> Option<u32> {
        self.0.specials.bos
    }

    /// Tokens that end an answer.
    pub fn eos(&self) -> &[u32] {
        &self.0.specials.eos
    }

    /// The id of a token by its text in the vocabulary.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        let inner = &*self.0;
        inner.pipeline.token_to_id(text).or_else(|| match &inner.joining {
            Joining::Library => None,
            Joining::Pieces(pieces) => pieces.token_id(&inner.table, text),
            Joining::Merges(merges) => merges.token_id(&inner.table, text),
        })
    }

    /// True when the first token of a text begins with a space that is not in the text (SentencePiece).
    pub fn strips_leading_space(&self) -> bool {
        self.0.strips_leading_space
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).field("specials", &self.0.specials).finish()
    }
}

impl Inner {
    fn run(&self, added: &AddedVocabulary, text: &str) -> Result<Vec<u32>> {
        if let Joining::Pieces(pieces) = &self.joining {
            return self.run_pieces(pieces, added, text);
        }
        let mut pieces = added.extract_and_normalize(self.pipeline.get_normalizer(), text);
        if let Some(splitter) = self.pipeline.get_pre_tokenizer() {
            splitter.pre_tokenize(&mut pieces).map_err(library)?;
        }
        if let Joining::Merges(merges) = &self.joining {
            let mut ids = Vec::with_capacity(text.len() / 4);
            for (word, _, tokens) in pieces.get_splits(OffsetReferential::Original, OffsetType::None) {
                match tokens {
                    Some(tokens) => ids.extend(tokens.iter().map(|token| token.id)),
                    None => merges.encode(&self.table, word, &mut ids),
                }
            }
            return Ok(ids);
        }
        let model = self.pipeline.get_model();
        pieces.tokenize(|piece| model.tokenize(piece.get())).map_err(library)?;
        let encoding = pieces.into_encoding(None, 0, OffsetType::None).map_err(library)?;
        Ok(encoding.get_ids().to_vec())
    }

    fn run_pieces(&self, pieces: &spm::Pieces, added: &AddedVocabulary, text: &str) -> Result<Vec<u32>> {
        let cut = added.extract_and_normalize(None::<&NormalizerWrapper>, text);
        let mut ids = Vec::with_capacity(text.len() / 4);
        for (part, _, tokens) in cut.get_splits(OffsetReferential::Original, OffsetType::None) {
            match tokens {
                Some(tokens) => ids.extend(tokens.iter().map(|token| token.id)),
                None => pieces.encode(&self.table, part, &mut ids)?,
            }
        }
        Ok(ids)
    }
}

fn special_texts(table: &TokenTable) -> (Vec<String>, Vec<u8>) {
    let ids = (0..table.len()).filter(|id| table.special[*id]).filter_map(|id| u32::try_from(id).ok());
    let mut spellings: Vec<String> =
        ids.filter_map(|id| String::from_utf8(table.get(id).to_vec()).ok()).filter(|text| !text.is_empty()).collect();
    spellings.sort_by_key(|text| std::cmp::Reverse(text.len()));
    let mut firsts: Vec<u8> = spellings.iter().map(|text| text.as_bytes()[0]).collect();
    firsts.sort_unstable();
    firsts.dedup();
    (spellings, firsts)
}

/// An error of the `tokenizers` crate as one of ours.
pub(crate) fn library(error: tokenizers::Error) -> Error {
    Error::Tokenizer(error.to_string())
}
