//! Is there a hub, and what does it say of a file? One bounded request before `hf-hub`, which would wait without end.
//!
//! ```text
//!   HEAD <endpoint>/org/repo/resolve/main/file      3 s for the first answer, 30 s once the hub is known to be there
//!     no answer  -> the reason, remembered: a hub that cannot be reached is asked once
//!     401 403 429 -> once more with the token, if there is one
//!     else       -> commit, tag, size and SHA-256 of the file, or the refusal in words
//! ```

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

use super::Fetched;

/// Time for the first answer of a hub: name, connection, TLS and headers together.
const FIRST: Duration = Duration::from_secs(3);
/// Time for an answer once there has been one.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
const MAX_REDIRECTS: usize = 5;
/// The public hub's own domains: it answers on the first and stores on both.
const HUGGING_FACE: [&str; 2] = ["huggingface.co", "hf.co"];

/// What the hub tells of a file before it is fetched.
#[derive(Clone, Debug)]
pub(super) struct About {
    /// Name of the content in the cache.
    pub(super) etag: String,
    pub(super) bytes: Option<u64>,
    /// Promised for files of the hub's large-file store.
    pub(super) sha256: Option<String>,
    /// The hub gives it only to somebody it knows.
    pub(super) needs_token: bool,
}

pub(super) struct Probe {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    /// It has answered before.
    reached: AtomicBool,
    /// Why the hub is not asked (any more).
    refused: Mutex<Option<String>>,
}

impl Probe {
    pub(super) fn new(endpoint: &str, token: Option<&str>, offline: bool) -> Self {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("cupola/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        Self {
            agent,
            endpoint: endpoint.to_owned(),
            token: token.map(str::to_owned),
            reached: AtomicBool::new(false),
            refused: Mutex::new(offline.then(|| "HF_HUB_OFFLINE is set".to_owned())),
        }
    }

    /// What the hub says of the file at `url`.
    pub(super) fn about(&self, url: &str) -> Fetched<About> {
        let (response, needs_token) = self.ask(url)?;
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let target = header("location").filter(|_| response.status().is_redirection());
        if let Some(target) = target.filter(|target| needs_token && !same_site(target, &self.endpoint)) {
            return Err(format!(
                "the hub keeps it at {}, and HF_TOKEN is for {} alone",
                origin(target),
                origin(&self.endpoint)
            ));
        }
        let odd = |what: &str| format!("{} answers without {what}: it is no model hub", origin(&self.endpoint));
        let linked = header("x-linked-etag");
        // hf-hub names files of the cache after these two.
        let name = |text: Option<&str>, what: &str| {
            let text = text.map(|text| text.replace('"', "")).ok_or_else(|| odd(what))?;
            let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/');
            let safe = !text.is_empty() && !text.contains("..") && !text.starts_with('/') && text.bytes().all(plain);
            if safe { Ok(text) } else { Err(odd(&format!("a usable {what}"))) }
        };
        name(header("x-repo-commit"), "X-Repo-Commit")?;
        let size = match target {
            Some(_) => header("x-linked-size"),
            None => header("content-length"),
        };
        Ok(About {
            etag: name(linked.or(header("etag")), "ETag")?,
            bytes: size.and_then(|size| size.parse().ok()),
            sha256: linked.and_then(sha256_of_etag),
            needs_token,
        })
    }

    /// Whether `url` is there, and whether only for somebody the hub knows.
    pub(super) fn reach(&self, url: &str) -> Fetched<bool> {
        self.ask(url).map(|(_, needs_token)| needs_token)
    }

    /// The answer to `HEAD url`, and whether it took the token.
    fn ask(&self, url: &str) -> Fetched<(Response<Body>, bool)> {
        let mut response = self.follow(url, None)?;
        let mut needs_token = false;
        if let Some(token) = self.token.as_deref().filter(|_| matches!(response.status().as_u16(), 401 | 403 | 429)) {
            response = self.follow(url, Some(token))?;
            needs_token = true;
        }
        let status = response.status();
        if status.is_success() || status.is_redirection() { Ok((response, needs_token)) } else { Err(refusal(status)) }
    }

    /// Follows redirects within the hub, such as those of a repository that was renamed, and no others.
    fn follow(&self, url: &str, token: Option<&str>) -> Fetched<Response<Body>> {
        let mut url = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.head(&url, token)?;
            let target = response.headers().get("location").and_then(|value| value.to_str().ok());
            match target.filter(|target| response.status().is_redirection() && target.starts_with('/')) {
                Some(target) => url = format!("{}{target}", origin(&self.endpoint)),
                None => return Ok(response),
            }
        }
        Err(format!("more than {MAX_REDIRECTS} redirects"))
    }

    fn head(&self, url: &str, token: Option<&str>) -> Fetched<Response<Body>> {
        if let Some(reason) = &*self.refused.lock().unwrap_or_else(|e| e.into_inner()) {
            return Err(reason.clone());
        }
        let patience = if self.reached.load(Relaxed) { PATIENCE } else { FIRST };
        let mut request = self.agent.head(url).config().timeout_global(Some(patience)).build();
        // Sizes are those of the files, not of something compressed on the way.
        request = request.header("Accept-Encoding", "identity");
        if let Some(token) = token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        let response = request.call().map_err(|error| {
            let reason = match error {
                ureq::Error::Timeout(_) => format!("{} does not answer in time", origin(url)),
                ureq::Error::HostNotFound => {
                    format!("{} is not known here (no network or no name service)", origin(url))
                }
                other => format!("{} cannot be reached: {other}", origin(url)),
            };
            *self.refused.lock().unwrap_or_else(|e| e.into_inner()) = Some(reason.clone());
            reason
        })?;
        self.reached.store(true, Relaxed);
        Ok(response)
    }
}

/// A status that is no file, in words.
pub(super) fn refusal(status: StatusCode) -> String {
    match status.as_u16() {
        401 | 403 => format!(
            "the hub answers {status}: the repository is private, gated or not there; set HF_TOKEN if you have access"
        ),
        404 => format!("the hub answers {status}: no such repository, revision or file"),
        _ => format!("the hub answers {status}"),
    }
}

/// Scheme and host of a URL.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find(['/', '?', '#']).map_or(url.len(), |at| host + at);
    &url[..end]
}

/// The two URLs are of one host, or both of the public hub.
fn same_site(a: &str, b: &str) -> bool {
    let hugging_face = |url: &str| {
        let origin = origin(url).to_ascii_lowercase();
        let host = origin.strip_prefix("https://").unwrap_or_default();
        HUGGING_FACE
            .iter()
            .any(|domain| host.strip_suffix(domain).is_some_and(|before| before.is_empty() || before.ends_with('.')))
    };
    origin(a).eq_ignore_ascii_case(origin(b)) || (hugging_face(a) && hugging_face(b))
}

/// A large file's tag is its SHA-256; other tags are not.
fn sha256_of_etag(tag: &str) -> Option<String> {
    let tag = tag.trim_start_matches("W/").trim_matches('"');
    (tag.len() == 64 && tag.bytes().all(|b| b.is_ascii_hexdigit())).then(|| tag.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::same_site;

    #[test]
    fn the_token_stays_within_one_site() {
        let hub = "https://huggingface.co";
        assert!(same_site("https://huggingface.co/a", hub) && same_site("https://cas-bridge.xethub.hf.co/x?y", hub));
        for elsewhere in
            ["https://evilhf.co/x", "https://hf.co.evil.org/x", "http://cdn.hf.co/x", "https://evil.org/hf.co", "/x"]
        {
            assert!(!same_site(elsewhere, hub), "{elsewhere}");
        }
        assert!(same_site("http://mirror:80/x", "http://mirror:80") && !same_site("http://mirror:81", "http://mirror"));
        assert!(!same_site("https://cdn.hf.co/x", "https://mirror.org"));
    }
}
