//! The model hub over HTTP: one request to learn where a file is and what its hash must be, one to fetch it.
//!
//! The client is `ureq` with short timeouts until it is connected and no retries, so that a network without a hub costs
//! moments. The first refusal is remembered: a hub that cannot be reached is asked once.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use serde_json::Value;
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

use super::digest::{Known, Partial};
use super::{Fetched, HubConfig, Progress, once};

/// Time to find the hub's address, and again to connect to it.
const CONNECT: Duration = Duration::from_secs(2);
/// Time to wait for the start of an answer, and for each piece of it.
const PATIENCE: Duration = Duration::from_secs(30);
const MAX_REDIRECTS: usize = 5;
/// Bytes of the list of a repository's files.
const MAX_LISTING: u64 = 64 << 20;
/// Files of a model folder beside its weights.
const SMALL_FILES: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];
/// Weight types to prefer among the GGUF files of a repository: small but nearly lossless first.
const PREFERRED: &[&str] = &["q8_0", "q4_1", "q4_0", "bf16", "f16", "fp16", "f32"];

pub(super) struct Client {
    agent: Agent,
    cache: PathBuf,
    hf_cache: Option<PathBuf>,
    endpoint: String,
    token: Option<String>,
    /// Why the hub is not asked (any more).
    refused: Mutex<Option<String>>,
}

impl Client {
    pub(super) fn new(config: &HubConfig) -> Self {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(PATIENCE))
            .timeout_per_read(Some(PATIENCE))
            .user_agent(concat!("cupola/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        Self {
            agent,
            cache: config.cache.clone(),
            hf_cache: config.hf_cache.clone(),
            endpoint: config.endpoint.clone(),
            token: config.token.clone(),
            refused: Mutex::new(config.offline.then(|| "HF_HUB_OFFLINE is set".to_owned())),
        }
    }

    /// A file that is here already, in our cache or in that of the Hugging Face tools.
    pub(super) fn cached(&self, repo: &str, file: &str, revision: &str) -> Option<PathBuf> {
        let own = self.folder(repo, revision).join(file);
        if own.is_file() {
            return Some(own);
        }
        let theirs = self.hf_cache.as_ref()?.join(format!("models--{}", repo.replace('/', "--")));
        let commit = std::fs::read_to_string(theirs.join("refs").join(revision));
        let commit = commit.map_or_else(|_| revision.to_owned(), |commit| commit.trim().to_owned());
        let path = theirs.join("snapshots").join(commit).join(file);
        path.is_file().then_some(path)
    }

    /// Fetches one file of a repository, unless it is here.
    pub(super) fn file(
        &self,
        repo: &str,
        file: &str,
        revision: &str,
        known: Option<&Known>,
        progress: &dyn Progress,
    ) -> Fetched<PathBuf> {
        let right =
            |path: &Path| known.is_none_or(|known| std::fs::metadata(path).is_ok_and(|m| m.len() == known.bytes));
        if let Some(path) = self.cached(repo, file, revision).filter(|path| right(path)) {
            return Ok(path);
        }
        let place = self.folder(repo, revision).join(file);
        if place.is_file() && !right(&place) {
            std::fs::remove_file(&place)
                .map_err(|e| format!("{} is damaged and cannot be removed: {e}", place.display()))?;
        }
        let url = format!("{}/{repo}/resolve/{}/{}", self.endpoint, escape(revision), escape(file));
        once(&self.cache, &place, progress, || self.download(&url, file, &place, known, progress))?;
        Ok(place)
    }

    /// Fetches what [`crate::Model::open`] needs: a folder with `config.json`, or the best GGUF file of a repository.
    pub(super) fn model(&self, repo: &str, revision: &str, progress: &dyn Progress) -> Fetched<PathBuf> {
        let folder = self.folder(repo, revision);
        // Written last, so its presence says that the folder is complete.
        let marker = folder.join("config.json");
        if marker.is_file() {
            return Ok(folder);
        }
        let files = self.list(repo, revision)?;
        let has = |name: &str| files.iter().any(|file| file == name);
        let mut weights: Vec<&str> =
            files.iter().map(String::as_str).filter(|f| f.ends_with(".safetensors") && !f.contains('/')).collect();
        // Some repositories have their weights twice, under other names.
        if weights.iter().any(|f| f.starts_with("model")) {
            weights.retain(|f| f.starts_with("model"));
        }
        if has("config.json") && has("tokenizer.json") && !weights.is_empty() {
            let small = SMALL_FILES.iter().copied().filter(|name| *name != "config.json" && has(name));
            for file in small.chain(weights).chain(["config.json"]) {
                self.file(repo, file, revision, None, progress)?;
            }
            return Ok(folder);
        }
        let gguf = choose_gguf(&files)?;
        self.file(repo, gguf, revision, None, progress)
    }

    fn folder(&self, repo: &str, revision: &str) -> PathBuf {
        self.cache.join("hf").join(repo.replace('/', "--")).join(revision.replace('/', "--"))
    }

    fn list(&self, repo: &str, revision: &str) -> Fetched<Vec<String>> {
        let url = format!("{}/api/models/{repo}/revision/{}", self.endpoint, escape(revision));
        let (mut response, _) = self.get(&url, 0)?;
        let body = response.body_mut().with_config().limit(MAX_LISTING).read_to_vec().map_err(|e| e.to_string())?;
        let listing: Value =
            serde_json::from_slice(&body).map_err(|e| format!("its list of files is not JSON: {e}"))?;
        let files = listing["siblings"].as_array().into_iter().flatten();
        let safe = |name: &&str| name.split('/').all(|part| !part.is_empty() && part != ".." && !part.contains('\\'));
        Ok(files.filter_map(|file| file["rfilename"].as_str()).filter(safe).map(str::to_owned).collect())
    }

    fn download(
        &self,
        url: &str,
        what: &str,
        place: &Path,
        known: Option<&Known>,
        progress: &dyn Progress,
    ) -> Fetched<()> {
        let mut partial = Partial::open(place)?;
        let (mut response, mut promised) = match self.get(url, partial.len) {
            Ok(answer) => answer,
            Err(reason) => {
                partial.abandon();
                return Err(reason);
            }
        };
        // What an earlier attempt left is only of use where the whole can be checked at the end.
        let unusable =
            response.status() == StatusCode::RANGE_NOT_SATISFIABLE || (known.is_none() && promised.is_none());
        if partial.len > 0 && unusable {
            partial.restart()?;
            (response, promised) = self.get(url, 0)?;
        } else if response.status() != StatusCode::PARTIAL_CONTENT {
            partial.restart()?;
        }
        let rest = response.body().content_length();
        let total = known.map(|known| known.bytes).or(rest.map(|rest| rest + partial.len));
        let sha256 = known.map(|known| known.sha256.clone()).or(promised);
        progress.start(what, total);
        progress.advance(partial.len);
        let written = partial.write_all(response.into_body().into_reader(), total.unwrap_or(u64::MAX), Some(progress));
        progress.finish();
        written?;
        partial.finish(place, total, sha256.as_deref())
    }

    /// Asks for a URL from byte `from` on, following redirects. Also returns the SHA-256 that the hub promises for
    /// files of its large-file store; only the first answer has it, and only to the hub itself goes the token.
    fn get(&self, url: &str, from: u64) -> Fetched<(Response<Body>, Option<String>)> {
        if let Some(reason) = &*self.refused.lock().unwrap_or_else(|e| e.into_inner()) {
            return Err(reason.clone());
        }
        let mut url = url.to_owned();
        let mut promised = None;
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.agent.get(&url);
            if let Some(token) = self.token.as_ref().filter(|_| same_origin(&url, &self.endpoint)) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            if from > 0 {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let response = request.call().map_err(|e| self.unreachable(&url, &e))?;
            let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
            if promised.is_none() {
                promised = header("x-linked-etag").and_then(sha256_of_etag);
            }
            let status = response.status();
            if status.is_redirection() {
                let target =
                    header("location").ok_or_else(|| format!("a redirect without a target from {}", origin(&url)))?;
                url = if target.starts_with('/') { format!("{}{target}", origin(&url)) } else { target.to_owned() };
                continue;
            }
            return match status.as_u16() {
                200 | 206 => Ok((response, promised)),
                416 if from > 0 => Ok((response, promised)),
                401 | 403 => Err(format!(
                    "the hub answers {status}: the repository is private, gated or not there; set HF_TOKEN if you have access"
                )),
                404 => Err(format!("the hub answers {status}: no such repository, revision or file")),
                _ => Err(format!("the hub answers {status}")),
            };
        }
        Err(format!("more than {MAX_REDIRECTS} redirects"))
    }

    /// Remembers that the hub cannot be reached. Another host that fails, behind a redirect, says nothing about it.
    fn unreachable(&self, url: &str, error: &ureq::Error) -> String {
        let reason = match error {
            ureq::Error::Timeout(_) => format!("{} does not answer in time", origin(url)),
            ureq::Error::HostNotFound => format!("{} is not known here (no network or no name service)", origin(url)),
            other => format!("{} cannot be reached: {other}", origin(url)),
        };
        if same_origin(url, &self.endpoint) {
            *self.refused.lock().unwrap_or_else(|e| e.into_inner()) = Some(reason.clone());
        }
        reason
    }
}

/// Scheme and host of a URL.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find(['/', '?', '#']).map_or(url.len(), |at| host + at);
    &url[..end]
}

fn same_origin(a: &str, b: &str) -> bool {
    origin(a).eq_ignore_ascii_case(origin(b))
}

/// A large file's tag is its SHA-256; other tags are not.
fn sha256_of_etag(tag: &str) -> Option<String> {
    let tag = tag.trim_start_matches("W/").trim_matches('"');
    (tag.len() == 64 && tag.bytes().all(|b| b.is_ascii_hexdigit())).then(|| tag.to_ascii_lowercase())
}

/// Percent-encodes what may not stand in a path.
fn escape(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => out.push(char::from(byte)),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

/// The GGUF file to take when the user named none.
fn choose_gguf(files: &[String]) -> Fetched<&str> {
    let ggufs: Vec<&str> = files
        .iter()
        .map(String::as_str)
        .filter(|f| f.ends_with(".gguf") && !f.contains("mmproj") && !f.contains("-of-0"))
        .collect();
    if let [only] = ggufs[..] {
        return Ok(only);
    }
    let best = PREFERRED.iter().find_map(|ty| {
        let mark = |f: &&&str| f.to_lowercase().trim_end_matches(".gguf").ends_with(ty);
        ggufs.iter().find(mark)
    });
    match best {
        Some(file) => Ok(file),
        None if ggufs.is_empty() => {
            Err("it has neither a .gguf file nor config.json with tokenizer.json and *.safetensors".to_owned())
        }
        None => Err(format!("name one of its files after a colon: {}", ggufs.join(", "))),
    }
}
