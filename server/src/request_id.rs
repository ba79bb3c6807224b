//! One id for every request: taken from `x-request-id` when the caller sends a decent one, made up otherwise.

use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use http::{HeaderMap, HeaderName};

/// The header that carries the id, both ways.
pub(crate) const HEADER: HeaderName = HeaderName::from_static("x-request-id");

/// The longest id taken over from a caller, in bytes.
const LONGEST: usize = 128;

/// The caller's id, or a new one. Only letters, digits and `-_.:` are taken over: the id goes into logs.
pub(crate) fn of(headers: &HeaderMap) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.:".contains(&b);
    headers
        .get(HEADER)
        .and_then(|value| value.to_str().ok())
        .filter(|id| (1..=LONGEST).contains(&id.len()) && id.bytes().all(plain))
        .map_or_else(|| fresh("req"), str::to_owned)
}

/// A new id, `prefix-` and 32 hexadecimal digits: unique on this machine, hard to guess, not a secret.
pub(crate) fn fresh(prefix: &str) -> String {
    static KEYS: OnceLock<(RandomState, RandomState)> = OnceLock::new();
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let (high, low) = KEYS.get_or_init(|| (RandomState::new(), RandomState::new()));
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{prefix}-{:016x}{:016x}", high.hash_one(count), low.hash_one(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decent_ids_are_kept_and_others_replaced() {
        let with = |id: &[u8]| {
            let mut headers = HeaderMap::new();
            headers.insert(HEADER, http::HeaderValue::from_bytes(id).expect("a header value"));
            of(&headers)
        };
        assert_eq!(with(b"trace-1.2:3_x"), "trace-1.2:3_x");
        for bad in [&b""[..], b"a b", b"\xff", b"{}", &[b'a'; 129]] {
            assert!(with(bad).starts_with("req-"));
        }
        assert!(of(&HeaderMap::new()).starts_with("req-"));
    }

    #[test]
    fn ids_differ() {
        let (a, b) = (fresh("chatcmpl"), fresh("chatcmpl"));
        assert_ne!(a, b);
        assert_eq!(a.len(), "chatcmpl-".len() + 32);
    }
}
