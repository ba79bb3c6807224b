//! Byte-level BPE: the printable alphabet for bytes, and how each known tokenizer splits text before merging.

use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

use super::library;
use crate::error::{Error, Result};

/// How text is cut before merges apply. Names are those of `tokenizer.ggml.pre`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Splitter {
    /// The pattern of GPT-2.
    Gpt2,
    /// The same after cutting out each digit.
    DigitsThenGpt2,
    /// A pattern of its own.
    Pattern(&'static str),
}

/// A row of the table below.
struct Known {
    names: &'static [&'static str],
    splitter: Splitter,
    /// A word that is in the vocabulary as a whole is taken without merging.
    whole_words: bool,
    /// Text is brought into Unicode normal form C first.
    nfc: bool,
    /// Texts begin with BOS where the file does not say.
    bos: bool,
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const KNOWN: &[Known] = &[
    Known {
        // `default` is what converters wrote before they told tokenizers apart.
        names: &["gpt-2", "gpt2", "default", "phi-2", "mpt", "olmo"],
        splitter: Splitter::Gpt2,
        whole_words: false,
        nfc: false,
        bos: false,
    },
    Known {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"],
        splitter: Splitter::DigitsThenGpt2,
        whole_words: false,
        nfc: false,
        bos: false,
    },
    Known {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"],
        splitter: Splitter::Pattern(LLAMA3),
        whole_words: true,
        nfc: false,
        bos: true,
    },
    Known {
        names: &["qwen2", "deepseek-r1-qwen", "megrez"],
        splitter: Splitter::Pattern(QWEN2),
        whole_words: false,
        nfc: true,
        bos: false,
    },
    Known {
        names: &["tekken", "mistral-tekken"],
        splitter: Splitter::Pattern(TEKKEN),
        whole_words: true,
        nfc: false,
        bos: true,
    },
    Known {
        names: &["gpt-4o", "llama4"],
        splitter: Splitter::Pattern(GPT4O),
        whole_words: true,
        nfc: false,
        bos: false,
    },
];

/// What a value of `tokenizer.ggml.pre` means.
pub(super) struct PreTokenizer {
    pub(super) splitter: PreTokenizerWrapper,
    pub(super) whole_words: bool,
    pub(super) nfc: bool,
    pub(super) bos: bool,
}

/// Looks a pre-tokenizer up.
///
/// # Errors
/// [`Error::Unsupported`] with the known names.
pub(super) fn pre_tokenizer(name: &str) -> Result<PreTokenizer> {
    let Some(known) = KNOWN.iter().find(|known| known.names.contains(&name)) else {
        let names: Vec<&str> = KNOWN.iter().flat_map(|known| known.names).copied().collect();
        return Err(Error::Unsupported {
            what: format!("pre-tokenizer {name}"),
            hint: format!("known ones are {}", names.join(", ")),
        });
    };
    let bytes = |use_regex| PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, use_regex));
    let both = |first| PreTokenizerWrapper::Sequence(Sequence::new(vec![first, bytes(false)]));
    let splitter = match known.splitter {
        Splitter::Gpt2 => bytes(true),
        Splitter::DigitsThenGpt2 => PreTokenizerWrapper::Sequence(Sequence::new(vec![
            PreTokenizerWrapper::Digits(Digits::new(true)),
            bytes(true),
        ])),
        Splitter::Pattern(pattern) => {
            let pattern = SplitPattern::Regex(pattern.to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(library)?;
            both(PreTokenizerWrapper::Split(split))
        }
    };
    Ok(PreTokenizer { splitter, whole_words: known.whole_words, nfc: known.nfc, bos: known.bos })
}

/// First code point that no byte is written as.
const ALPHABET_END: usize = 0x144;

/// The printable characters that GPT-2 writes bytes as: bytes that print in Latin-1 as themselves, the others in order
/// from U+0100.
pub(crate) fn byte_characters() -> [char; 256] {
    let mut stand_ins = '\u{100}'..;
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
            _ => stand_ins.next().expect("there are 68 of them"),
        }
    })
}

/// The way back from [`byte_characters`].
#[derive(Clone, Debug)]
pub(super) struct ByteAlphabet {
    /// The byte behind each code point.
    bytes: [Option<u8>; ALPHABET_END],
}

impl ByteAlphabet {
    pub(super) fn new() -> Self {
        let mut bytes = [None; ALPHABET_END];
        for (byte, character) in (0..=u8::MAX).zip(byte_characters()) {
            bytes[character as usize] = Some(byte);
        }
        Self { bytes }
    }

    /// The byte that a character stands for, if any.
    pub(super) fn byte(&self, c: char) -> Option<u8> {
        *self.bytes.get(c as usize)?
    }

    /// Bytes that a token's text stands for; `None` when it has a character outside of the alphabet.
    pub(super) fn decode(&self, text: &str, out: &mut Vec<u8>) -> Option<()> {
        for c in text.chars() {
            out.push(self.byte(c)?);
        }
        Some(())
    }
}
