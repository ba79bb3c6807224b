//! A tokenizer from the `tokenizer.ggml.*` keys of a GGUF file.

use std::borrow::Cow;

use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;

use super::bpe::{ByteAlphabet, pre_tokenizer};
use super::merges::Merges;
use super::spm::{self, Pieces, Role};
use super::{Joining, MAX_VOCAB, Specials, TokenTable, Tokenizer, library};
use crate::error::{Error, Result};
use crate::weights::gguf::Gguf;

/// `tokenizer.ggml.token_type` of each token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// Turn-ending tokens of common chat formats. A file's `eos_token_id` often names only the end of a document.
const TURN_ENDS: &[&str] =
    &["<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>"];

/// Tokens of a file: text, kind, and score where the file has them.
struct Entries<'a> {
    texts: Vec<Cow<'a, str>>,
    kinds: Vec<Kind>,
    scores: Option<Vec<f64>>,
}

/// Builds the tokenizer of a file.
///
/// # Errors
/// [`Error::Missing`] when the file has none, [`Error::Unsupported`] for an unknown kind, [`Error::Tokenizer`] when its
/// parts contradict each other.
pub(crate) fn from_gguf(gguf: &Gguf) -> Result<Tokenizer> {
    let Some(model) = gguf.text("tokenizer.ggml.model")? else {
        let what = "tokenizer (key tokenizer.ggml.model); convert the model again with its tokenizer".to_owned();
        return Err(Error::Missing { path: gguf.path().to_owned(), what });
    };
    let entries = entries(gguf)?;
    match model {
        "gpt2" => byte_level(gguf, &entries),
        "llama" => sentence_piece(gguf, &entries),
        other => Err(Error::Unsupported {
            what: format!("tokenizer kind {other}"),
            hint: "known kinds are gpt2 (byte-level BPE) and llama (SentencePiece BPE)".to_owned(),
        }),
    }
}

fn entries(gguf: &Gguf) -> Result<Entries<'_>> {
    let key = "tokenizer.ggml.tokens";
    let texts = gguf.texts(key)?.ok_or_else(|| gguf.missing(key))?;
    if texts.len() == 0 || texts.len() >= MAX_VOCAB {
        return Err(gguf.format(format!("{key} has {} entries, expected 1 to {}", texts.len(), MAX_VOCAB - 1)));
    }
    // Almost all of them are UTF-8, which is quicker to see than to repair.
    let text = |bytes| std::str::from_utf8(bytes).map_or_else(|_| String::from_utf8_lossy(bytes), Cow::Borrowed);
    let texts: Vec<Cow<'_, str>> = texts.map(text).collect();
    let same_length = |key: &str, len: usize| {
        if len == texts.len() {
            return Ok(());
        }
        Err(gguf.format(format!("{key} has {len} entries, expected {} as in tokenizer.ggml.tokens", texts.len())))
    };
    let kinds = match gguf.numbers("tokenizer.ggml.token_type")? {
        Some(kinds) => {
            same_length("tokenizer.ggml.token_type", kinds.len())?;
            kinds.into_iter().map(kind).collect()
        }
        None => vec![Kind::Normal; texts.len()],
    };
    let scores = gguf.numbers("tokenizer.ggml.scores")?;
    if let Some(scores) = &scores {
        same_length("tokenizer.ggml.scores", scores.len())?;
    }
    Ok(Entries { texts, kinds, scores })
}

fn kind(number: f64) -> Kind {
    match number as u32 {
        2 => Kind::Unknown,
        3 => Kind::Control,
        4 => Kind::UserDefined,
        5 => Kind::Unused,
        6 => Kind::Byte,
        _ => Kind::Normal,
    }
}

impl Entries<'_> {
    /// A model of the library that knows the added tokens: it cuts them out, and needs to know no others.
    fn added_only(&self) -> Result<BPE> {
        let mut vocab = Vocab::new();
        self.added().for_each(|(id, token)| _ = *vocab.entry(token.content).or_insert(id));
        BPE::builder().vocab_and_merges(vocab, Vec::new()).build().map_err(library)
    }

    /// Tokens that are cut out of a text before anything else happens to it, with their ids.
    fn added(&self) -> impl Iterator<Item = (u32, AddedToken)> {
        let special = |kind| matches!(kind, Kind::Control | Kind::Unknown);
        let chosen = move |kind: Kind| special(kind) || kind == Kind::UserDefined;
        (0..)
            .zip(self.texts.iter().zip(&self.kinds))
            .filter(move |(_, (text, kind))| chosen(**kind) && !text.is_empty())
            .map(move |(id, (text, kind))| (id, AddedToken::from(text.clone(), special(*kind)).normalized(false)))
    }

    /// The byte table; `ordinary` gives the bytes of a normal token.
    fn table<'t, B: AsRef<[u8]>>(&'t self, mut ordinary: impl FnMut(&'t str) -> B) -> Result<TokenTable> {
        let bytes = self.texts.iter().map(|text| text.len()).sum();
        let mut table = TokenTable::with_capacity(self.texts.len(), bytes);
        for (text, kind) in self.texts.iter().zip(&self.kinds) {
            match kind {
                Kind::Control | Kind::Unknown => table.push(text.bytes(), true)?,
                Kind::UserDefined => table.push(text.bytes(), false)?,
                Kind::Byte => match spm::byte_token(text) {
                    Some(byte) => table.push([byte], false)?,
                    None => {
                        return Err(Error::Tokenizer(format!(
                            "token {text:?} is of type byte, expected <0x00> to <0xFF>"
                        )));
                    }
                },
                Kind::Normal | Kind::Unused => table.push(ordinary(text).as_ref().iter().copied(), false)?,
            }
        }
        Ok(table)
    }
}

fn byte_level(gguf: &Gguf, entries: &Entries<'_>) -> Result<Tokenizer> {
    let pre = pre_tokenizer(gguf.text("tokenizer.ggml.pre")?.unwrap_or("default"))?;
    let key = "tokenizer.ggml.merges";
    let lines = gguf.texts(key)?.ok_or_else(|| gguf.missing(key))?;
    let model = entries.added_only()?;
    let mut pipeline = tokenizers::Tokenizer::new(model);
    if pre.nfc {
        pipeline.with_normalizer(Some(NFC)).map_err(library)?;
    }
    pipeline.with_pre_tokenizer(Some(pre.splitter));
    pipeline.add_special_tokens(entries.added().map(|(_, token)| token)).map_err(library)?;

    let alphabet = ByteAlphabet::new();
    let table = entries.table(|text| {
        let mut bytes = Vec::with_capacity(text.len());
        // A token with other characters than the alphabet's can only mean them literally.
        if alphabet.decode(text, &mut bytes).is_none() {
            bytes = text.as_bytes().to_vec();
        }
        bytes
    })?;
    let merges = Merges::new(&table, entries.texts.iter().map(AsRef::as_ref), lines, pre.whole_words)?;
    let specials = specials(gguf, entries, pre.bos)?;
    Ok(Tokenizer::new(pipeline, table, Joining::Merges(Box::new(merges)), specials, false))
}

fn sentence_piece(gguf: &Gguf, entries: &Entries<'_>) -> Result<Tokenizer> {
    let scores = entries.scores.as_ref().ok_or_else(|| gguf.missing("tokenizer.ggml.scores"))?;
    let leading_space = gguf.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let model = entries.added_only()?;
    let mut pipeline = tokenizers::Tokenizer::new(model);
    pipeline.add_special_tokens(entries.added().map(|(_, token)| token)).map_err(library)?;

    let table = entries.table(spm::piece_bytes)?;
    let roles = entries.texts.iter().zip(&entries.kinds).zip(scores).map(|((text, kind), score)| match kind {
        // A space that stands for itself is in no text: those of a text are written otherwise here.
        Kind::Normal | Kind::Unused if text.contains(' ') => Role::Other,
        Kind::Normal => Role::Piece(*score as f32),
        Kind::Unused => Role::Character,
        Kind::Byte => spm::byte_token(text).map_or(Role::Other, Role::Byte),
        Kind::Unknown => Role::Unknown,
        Kind::Control | Kind::UserDefined => Role::Other,
    });
    let pieces = Pieces::new(&table, roles, leading_space);
    let specials = specials(gguf, entries, true)?;
    Ok(Tokenizer::new(pipeline, table, Joining::Pieces(Box::new(pieces)), specials, leading_space))
}

/// Reads which tokens begin and end texts; `bos_by_default` where the file does not say whether to add BOS.
fn specials(gguf: &Gguf, entries: &Entries<'_>, bos_by_default: bool) -> Result<Specials> {
    let count = entries.texts.len();
    let id = |key: &str| -> Result<Option<u32>> {
        match gguf.integer(key)? {
            None => Ok(None),
            // Some converters write -1 as an unsigned number for "none".
            Some(id) if id == u64::from(u32::MAX) => Ok(None),
            Some(id) => match u32::try_from(id) {
                Ok(id) if (id as usize) < count => Ok(Some(id)),
                _ => Err(gguf.format(format!("{key} is {id}, expected a token id below {count}"))),
            },
        }
    };
    let bos = id("tokenizer.ggml.bos_token_id")?;
    let first_eos = id("tokenizer.ggml.eos_token_id")?;
    let mut eos: Vec<u32> = first_eos.into_iter().collect();
    for key in ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        eos.extend(id(key)?);
    }
    for (at, (text, kind)) in (0..).zip(entries.texts.iter().zip(&entries.kinds)) {
        if *kind == Kind::Control && TURN_ENDS.contains(&&**text) {
            eos.push(at);
        }
    }
    let mut seen = Vec::new();
    eos.retain(|id| {
        !seen.contains(id) && {
            seen.push(*id);
            true
        }
    });
    let add_bos = gguf.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or(bos_by_default);
    let add_eos = gguf.boolean("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    Ok(Specials {
        bos,
        prefix: bos.filter(|_| add_bos).into_iter().collect(),
        suffix: first_eos.filter(|_| add_eos).into_iter().collect(),
        eos,
    })
}
