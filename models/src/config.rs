//! `config.json` and its companions in a model folder, with errors that name file and key.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Largest JSON file that is read whole (`tokenizer.json` of a 262,000-token vocabulary has 33 MB).
const MAX_JSON_BYTES: u64 = 256 << 20;

/// A JSON object from a file, or an object within it.
#[derive(Clone, Debug)]
pub struct HfConfig {
    path: PathBuf,
    /// Dotted path of this object within the file, with a trailing dot; empty for the whole file.
    prefix: String,
    object: Map<String, Value>,
}

impl HfConfig {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Format`] when it is not a JSON object.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = read_bounded(path)?;
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(object)) => Ok(Self { path: path.to_owned(), prefix: String::new(), object }),
            Ok(_) => Err(Error::Format { path: path.to_owned(), what: "expected a JSON object".into() }),
            Err(e) => Err(Error::Format { path: path.to_owned(), what: format!("invalid JSON: {e}") }),
        }
    }

    /// An object that is in no file; `path` is what messages call it.
    pub(crate) fn from_object(path: &Path, object: Map<String, Value>) -> Self {
        Self { path: path.to_owned(), prefix: String::new(), object }
    }

    /// Reads a file that may be absent.
    ///
    /// # Errors
    /// As [`HfConfig::read`].
    pub fn read_optional(path: &Path) -> Result<Option<Self>> {
        if path.exists() { Self::read(path).map(Some) } else { Ok(None) }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A value as it stands; absent and null are the same.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// A size that may be absent.
    ///
    /// # Errors
    /// [`Error::Format`] when it is no whole number.
    pub fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().and_then(|v| usize::try_from(v).ok()) {
            Some(size) => Ok(Some(size)),
            None => Err(self.mismatch(key, "a whole number", value)),
        }
    }

    /// A size that must be there.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Format`].
    pub fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?.ok_or_else(|| self.missing(key))
    }

    /// A number that may be absent.
    ///
    /// # Errors
    /// [`Error::Format`] when it is no number.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.mismatch(key, "a number", value))
    }

    /// A positive number that must be there.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Format`].
    pub fn required_number(&self, key: &str) -> Result<f64> {
        match self.number(key)? {
            Some(value) if value.is_finite() && value > 0.0 => Ok(value),
            Some(value) => Err(self.mismatch(key, "a positive number", &Value::from(value))),
            None => Err(self.missing(key)),
        }
    }

    /// A boolean that may be absent.
    ///
    /// # Errors
    /// [`Error::Format`] when it is something else.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.mismatch(key, "true or false", value))
    }

    /// A string that may be absent.
    ///
    /// # Errors
    /// [`Error::Format`] when it is something else.
    pub fn optional_text(&self, key: &str) -> Result<Option<&str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.mismatch(key, "a string", value))
    }

    /// A string that must be there.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Format`].
    pub fn text(&self, key: &str) -> Result<&str> {
        self.optional_text(key)?.ok_or_else(|| self.missing(key))
    }

    /// An object within this one, which may be absent.
    ///
    /// # Errors
    /// [`Error::Format`] when it is something else.
    pub fn section(&self, key: &str) -> Result<Option<HfConfig>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(HfConfig {
                path: self.path.clone(),
                prefix: format!("{}{key}.", self.prefix),
                object: object.clone(),
            })),
            Some(other) => Err(self.mismatch(key, "an object", other)),
        }
    }

    /// A token id, or a list of them, as `eos_token_id` has it; empty when absent.
    ///
    /// # Errors
    /// [`Error::Format`] when it is neither.
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let id = |value: &Value| value.as_u64().and_then(|v| u32::try_from(v).ok());
        let ids = match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.mismatch(key, "a token id or a list of them", value))
    }

    /// A token's text, which stands there as a string or as an object with `content`.
    pub fn token_text(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::String(text) => Some(text),
            Value::Object(token) => token.get("content")?.as_str(),
            _ => None,
        }
    }

    fn missing(&self, key: &str) -> Error {
        Error::Missing { path: self.path.clone(), what: format!("key {}{key}", self.prefix) }
    }

    fn mismatch(&self, key: &str, expected: &str, got: &Value) -> Error {
        let mut got = got.to_string();
        if let Some((end, _)) = got.char_indices().nth(60) {
            got.truncate(end);
            got.push_str("...");
        }
        Error::Format { path: self.path.clone(), what: format!("{}{key} is {got}, expected {expected}", self.prefix) }
    }
}

/// Reads a file of at most 256 MiB.
///
/// # Errors
/// [`Error::Io`], or [`Error::Format`] when it is larger.
pub(crate) fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let size = std::fs::metadata(path).map_err(io)?.len();
    if size > MAX_JSON_BYTES {
        let what = format!("it has {size} bytes, expected at most {MAX_JSON_BYTES}");
        return Err(Error::Format { path: path.to_owned(), what });
    }
    std::fs::read(path).map_err(io)
}
