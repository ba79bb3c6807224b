//! A tokenizer from `tokenizer.json` and the small files beside it.

use std::path::Path;

use serde_json::Value;

use super::bpe::ByteAlphabet;
use super::{Joining, MAX_VOCAB, Specials, TokenTable, Tokenizer, library, spm};
use crate::config::{HfConfig, read_bounded};
use crate::error::{Error, Result};

/// How the text of a vocabulary entry becomes bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// Characters of the byte alphabet.
    Bytes,
    /// U+2581 for a space, `<0x0A>` for a byte.
    SentencePiece { strips_leading_space: bool },
    /// As it stands.
    Literal,
}

/// Builds the tokenizer of a model folder. `settings` is its `tokenizer_config.json`; `eos` lists ids known from
/// `generation_config.json` or `config.json`.
///
/// # Errors
/// [`Error::Missing`] without `tokenizer.json`, [`Error::Format`] or [`Error::Tokenizer`] when it cannot be used.
pub(crate) fn from_folder(folder: &Path, settings: Option<&HfConfig>, eos: Vec<u32>) -> Result<Tokenizer> {
    let path = folder.join("tokenizer.json");
    if !path.exists() {
        let hint = if folder.join("tokenizer.model").exists() { " (tokenizer.model alone is not enough)" } else { "" };
        return Err(Error::Missing { path: folder.to_owned(), what: format!("tokenizer.json{hint}") });
    }
    from_json(&read_bounded(&path)?, &path, settings, eos)
}

/// [`from_folder`] with the content of a `tokenizer.json`; `path` is what messages call it.
///
/// # Errors
/// [`Error::Format`] or [`Error::Tokenizer`] when it cannot be used.
pub(crate) fn from_json(json: &[u8], path: &Path, settings: Option<&HfConfig>, eos: Vec<u32>) -> Result<Tokenizer> {
    let pipeline = tokenizers::Tokenizer::from_bytes(json)
        .map_err(|e| Error::Format { path: path.to_owned(), what: e.to_string() })?;
    let spelling = spelling(&pipeline, path)?;
    let table = table(&pipeline, spelling, path)?;
    let specials = specials(&pipeline, settings, eos)?;
    let strips = spelling == Spelling::SentencePiece { strips_leading_space: true };
    Ok(Tokenizer::new(pipeline, table, Joining::Library, specials, strips))
}

/// Finds out from the decoder how entries are spelt.
fn spelling(pipeline: &tokenizers::Tokenizer, path: &Path) -> Result<Spelling> {
    let decoder = serde_json::to_value(pipeline.get_decoder())
        .map_err(|e| Error::Format { path: path.to_owned(), what: e.to_string() })?;
    let steps: Vec<&Value> = match decoder.get("decoders").and_then(Value::as_array) {
        Some(steps) => steps.iter().collect(),
        None if decoder.is_null() => Vec::new(),
        None => vec![&decoder],
    };
    let find = |kind: &str| steps.iter().find(|step| step["type"] == kind);
    if find("ByteLevel").is_some() {
        return Ok(Spelling::Bytes);
    }
    let metaspace = find("Metaspace");
    if metaspace.is_some() || find("ByteFallback").is_some() {
        let prepends = metaspace.is_some_and(|step| step["prepend_scheme"] != "never");
        let strips = find("Strip").is_some_and(|step| step["content"] == " " && step["start"] != 0);
        return Ok(Spelling::SentencePiece { strips_leading_space: prepends || strips });
    }
    match steps.first() {
        None => Ok(Spelling::Literal),
        Some(step) => Err(Error::Unsupported {
            what: format!("decoder {} in {}", step["type"], path.display()),
            hint: "known decoders are ByteLevel, Metaspace and ByteFallback".to_owned(),
        }),
    }
}

fn table(pipeline: &tokenizers::Tokenizer, spelling: Spelling, path: &Path) -> Result<TokenTable> {
    let mut entries: Vec<(u32, String)> = pipeline.get_vocab(true).into_iter().map(|(text, id)| (id, text)).collect();
    entries.sort_unstable();
    match entries.last() {
        Some((last, _)) if (*last as usize) < MAX_VOCAB => {}
        Some((last, _)) => {
            let what = format!("its highest token id is {last}, expected less than {MAX_VOCAB}");
            return Err(Error::Format { path: path.to_owned(), what });
        }
        None => return Err(Error::Format { path: path.to_owned(), what: "its vocabulary is empty".into() }),
    }
    let added = pipeline.get_added_tokens_decoder();
    let alphabet = ByteAlphabet::new();
    let mut table = TokenTable::with_capacity(entries.len(), entries.iter().map(|(_, text)| text.len()).sum());
    for (id, text) in entries {
        // Ids that the vocabulary skips stand for nothing.
        while table.len() < id as usize {
            table.push([], false)?;
        }
        if table.len() > id as usize {
            continue;
        }
        if let Some(token) = added.get(&id) {
            table.push(token.content.bytes(), token.special)?;
            continue;
        }
        let mut bytes = Vec::with_capacity(text.len());
        match spelling {
            Spelling::Bytes if alphabet.decode(&text, &mut bytes).is_some() => {}
            Spelling::Bytes | Spelling::Literal => bytes = text.into_bytes(),
            Spelling::SentencePiece { .. } => match spm::byte_token(&text) {
                Some(byte) => bytes.push(byte),
                None => bytes.extend_from_slice(&spm::piece_bytes(&text)),
            },
        }
        table.push(bytes, false)?;
    }
    Ok(table)
}

fn specials(pipeline: &tokenizers::Tokenizer, settings: Option<&HfConfig>, mut eos: Vec<u32>) -> Result<Specials> {
    let named = |key: &str| settings.and_then(|s| s.token_text(key)).and_then(|text| pipeline.token_to_id(text));
    if eos.is_empty() {
        eos.extend(named("eos_token"));
    }
    // What the post-processor puts around a text shows on any text.
    let ids = |special| Ok::<_, Error>(pipeline.encode_fast("a", special).map_err(library)?.get_ids().to_vec());
    let (bare, full) = (ids(false)?, ids(true)?);
    let at = (0..=full.len().saturating_sub(bare.len())).find(|&at| full[at..].starts_with(&bare)).unwrap_or(0);
    Ok(Specials {
        bos: named("bos_token"),
        eos,
        prefix: full[..at].to_vec(),
        suffix: full.get(at + bare.len()..).unwrap_or_default().to_vec(),
    })
}
