//! API keys: who may call, decided before anything else looks at a request.
//!
//! ```text
//!   Authorization: Bearer KEY | x-api-key: KEY --sha256--> compared with every stored digest --> Caller { salt }
//! ```
//!
//! Keys are kept as SHA-256 digests only. Every route asks for a key, known or not, except the page shell (`/`, `/ui/*`),
//! which holds no data, and `/live`, which says only that the process runs.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, Uri, header};
use sha2::{Digest, Sha256};

use crate::app::AppState;
use crate::config::ConfigError;
use crate::error::ApiError;
use crate::ui;

type KeyDigest = [u8; 32];

/// The keys that open this server.
#[derive(Clone, Default)]
pub struct ApiKeys {
    digests: Arc<[KeyDigest]>,
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKeys({})", self.digests.len())
    }
}

impl ApiKeys {
    /// Takes these keys.
    ///
    /// # Errors
    /// A key that is empty, very long, or has characters a header cannot carry.
    pub fn new(keys: impl IntoIterator<Item = String>) -> Result<Self, ConfigError> {
        let mut digests = Vec::new();
        for (index, key) in keys.into_iter().enumerate() {
            if !(1..=512).contains(&key.len()) || !key.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(ConfigError::Key { position: index + 1 });
            }
            digests.push(digest(key.as_bytes()));
        }
        Ok(Self { digests: digests.into() })
    }

    /// Takes these keys and those of a file: one a line; empty lines and lines that start with `#` are skipped.
    ///
    /// # Errors
    /// A file that cannot be read or holds no key, or a key that no client could send.
    pub fn with_file(keys: impl IntoIterator<Item = String>, file: Option<&Path>) -> Result<Self, ConfigError> {
        let mut all: Vec<String> = keys.into_iter().collect();
        if let Some(path) = file {
            let failed = |reason: String| ConfigError::KeyFile { path: path.display().to_string(), reason };
            let text = std::fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
            let before = all.len();
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
            all.extend(lines.map(str::to_owned));
            if all.len() == before {
                return Err(failed("it holds no key; write one a line".to_owned()));
            }
        }
        Self::new(all)
    }

    /// No key is needed.
    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// The caller that this key belongs to. Looks at every stored digest whatever matches, so that the time taken says
    /// nothing about the keys.
    fn caller(&self, key: &[u8]) -> Option<Caller> {
        let offered = digest(key);
        let mut found = None;
        for stored in self.digests.iter() {
            let difference = stored.iter().zip(&offered).fold(0u8, |acc, (a, b)| acc | (a ^ b));
            if std::hint::black_box(difference) == 0 {
                found = Some(Caller { salt: first_u64(stored) });
            }
        }
        found
    }
}

/// Who sent a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// Separates this caller's cached prefixes from those of other keys: otherwise the time to the first token would
    /// tell one caller what another one has sent. 0 when the server is open.
    pub salt: u64,
}

impl Caller {
    /// The salt of this caller's prefixes under a salt of the request's own.
    pub fn cache_salt(self, request_salt: Option<&str>) -> u64 {
        match request_salt {
            None => self.salt,
            Some(text) => {
                let mut hash = Sha256::new();
                hash.update(self.salt.to_le_bytes());
                hash.update(text.as_bytes());
                first_u64(&hash.finalize().into())
            }
        }
    }
}

/// The layer that refuses callers without a key.
pub(crate) async fn require_key(State(app): State<AppState>, mut request: Request, next: Next) -> Response {
    let keys = &app.config.api_keys;
    let offered = offered_key(request.headers());
    let caller = match offered.and_then(|key| keys.caller(key)) {
        Some(caller) => caller,
        None if keys.is_empty() || is_public(request.uri()) => Caller::default(),
        None if offered.is_some() => return ApiError::InvalidKey.into_response(),
        None => return ApiError::MissingKey.into_response(),
    };
    request.extensions_mut().insert(caller);
    next.run(request).await
}

fn is_public(uri: &Uri) -> bool {
    uri.path() == "/live" || ui::is_public(uri.path())
}

fn offered_key(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
    });
    bearer.or_else(|| headers.get("x-api-key").map(|value| value.as_bytes()))
}

fn digest(bytes: &[u8]) -> KeyDigest {
    Sha256::digest(bytes).into()
}

fn first_u64(digest: &KeyDigest) -> u64 {
    let (first, _) = digest.split_first_chunk::<8>().expect("a digest has 32 bytes");
    u64::from_le_bytes(*first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_is_known_and_nothing_else_is() {
        let keys = ApiKeys::new(["alpha".to_owned(), "beta".to_owned()]).expect("fine keys");
        let alpha = keys.caller(b"alpha").expect("known");
        let beta = keys.caller(b"beta").expect("known");
        assert_ne!(alpha.salt, beta.salt);
        for wrong in [&b""[..], b"alph", b"alphaa", b"ALPHA", b"gamma"] {
            assert!(keys.caller(wrong).is_none());
        }
        assert!(!format!("{keys:?}").contains("alpha"));
    }

    #[test]
    fn keys_that_cannot_travel_are_refused() {
        for bad in ["", "with space", "tab\t", "naïve", &"x".repeat(513)] {
            assert!(ApiKeys::new([bad.to_owned()]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_key_file_is_one_key_a_line() {
        let path = std::env::temp_dir().join(format!("cupola-keys-{}", std::process::id()));
        std::fs::write(&path, "# team\nfirst\n\n  second  \r\n").expect("write");
        let keys = ApiKeys::with_file(["zero".to_owned()], Some(&path)).expect("fine keys");
        for key in ["zero", "first", "second"] {
            assert!(keys.caller(key.as_bytes()).is_some(), "{key}");
        }
        std::fs::write(&path, "# nothing\n").expect("write");
        assert!(ApiKeys::with_file([], Some(&path)).is_err());
        std::fs::remove_file(&path).expect("remove");
        assert!(ApiKeys::with_file([], Some(&path)).is_err());
    }

    #[test]
    fn both_headers_carry_a_key() {
        let mut headers = HeaderMap::new();
        assert_eq!(offered_key(&headers), None);
        headers.insert("x-api-key", "k1".parse().expect("value"));
        assert_eq!(offered_key(&headers), Some(&b"k1"[..]));
        headers.insert(header::AUTHORIZATION, "bearer k2".parse().expect("value"));
        assert_eq!(offered_key(&headers), Some(&b"k2"[..]));
        headers.insert(header::AUTHORIZATION, "Basic abc".parse().expect("value"));
        assert_eq!(offered_key(&headers), Some(&b"k1"[..]));
    }

    #[test]
    fn salts_separate_callers_and_requests() {
        let open = Caller::default();
        let keyed = Caller { salt: 7 };
        assert_eq!(open.cache_salt(None), 0);
        assert_ne!(open.cache_salt(Some("a")), keyed.cache_salt(Some("a")));
        assert_ne!(keyed.cache_salt(Some("a")), keyed.cache_salt(Some("b")));
        assert_eq!(keyed.cache_salt(None), 7);
    }
}
