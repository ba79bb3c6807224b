//! The model hub, over `hf-hub`: its repositories, its cache on disk, its downloads.
//!
//! ```text
//!   <hub cache>/models--org--repo/refs/main            the commit                 the layout of `hf download`:
//!                                /snapshots/COMMIT/file -> ../../blobs/TAG         what either fetched, both find
//!
//!   cached?  --no-->  probe (is there a hub, what is the file)  -->  hf-hub downloads, watched  -->  size and SHA-256
//! ```
//!
//! What `hf-hub` leaves to its callers is done here: a bound on every wait ([`super::probe`], [`super::download`]), the
//! check of what came, and care for the token, which goes along only where the hub insists on it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::digest::{self, Known};
use super::download::{download, list};
use super::probe::{PATIENCE, Probe};
use super::{Fetched, HubConfig, Progress, once};
use crate::weights::safetensors::weight_files;

/// A download is given up when nothing came for so long.
const STALL: Duration = Duration::from_secs(60);
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
    probe: Probe,
    /// The Hugging Face tools' own folder.
    cache: Cache,
    /// Where locks lie.
    own_cache: PathBuf,
    endpoint: String,
    token: Option<String>,
    pub(super) stall: Duration,
}

impl Client {
    pub(super) fn new(config: &HubConfig) -> Self {
        Self {
            probe: Probe::new(&config.endpoint, config.token.as_deref(), config.offline),
            cache: Cache::new(config.hf_cache.clone()),
            own_cache: config.cache.clone(),
            endpoint: config.endpoint.clone(),
            token: config.token.clone(),
            stall: STALL,
        }
    }

    /// A file that is here already.
    pub(super) fn cached(&self, repo: &str, file: &str, revision: &str) -> Option<PathBuf> {
        Some(self.snapshot(&model(repo, revision))?.join(file)).filter(|path| path.is_file())
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
        let right = |path: &PathBuf| known.is_none_or(|k| std::fs::metadata(path).is_ok_and(|m| m.len() == k.bytes));
        let find = || self.cached(repo, file, revision).filter(right);
        let lock = format!("hf--{repo}--{revision}--{file}");
        once(&self.own_cache, &lock, progress, find, || {
            if let Some(damaged) = self.cached(repo, file, revision) {
                std::fs::remove_file(&damaged)
                    .map_err(|e| format!("{} is damaged and cannot be removed: {e}", damaged.display()))?;
            }
            self.fetch(&model(repo, revision), file, known, progress)
        })
    }

    /// Fetches what [`crate::Model::open`] needs: a folder with `config.json`, or the best GGUF file of a repository.
    pub(super) fn model(&self, repo: &str, revision: &str, progress: &dyn Progress) -> Fetched<PathBuf> {
        let here = self.snapshot(&model(repo, revision));
        if let Some(folder) = here.as_ref().filter(|folder| is_complete(folder)) {
            return Ok(folder.clone());
        }
        let files = match self.list(repo, revision) {
            Ok(files) => files,
            // Without a hub, a weight file that was fetched by name before will do.
            Err(reason) => {
                let names = here.as_deref().map(names).unwrap_or_default();
                return match choose_gguf(&names) {
                    Ok(gguf) => self.file(repo, gguf, revision, None, progress),
                    Err(_) => Err(reason),
                };
            }
        };
        let has = |name: &str| files.iter().any(|file| file == name);
        let mut weights: Vec<&str> =
            files.iter().map(String::as_str).filter(|f| f.ends_with(".safetensors") && !f.contains('/')).collect();
        // Some repositories have their weights twice, under other names.
        if weights.iter().any(|f| f.starts_with("model")) {
            weights.retain(|f| f.starts_with("model"));
        }
        if has("config.json") && has("tokenizer.json") && !weights.is_empty() {
            // The configuration comes last: a folder that has it is complete.
            let small = SMALL_FILES.iter().copied().filter(|name| *name != "config.json" && has(name));
            for file in small.chain(weights) {
                self.file(repo, file, revision, None, progress)?;
            }
            let config = self.file(repo, "config.json", revision, None, progress)?;
            return Ok(config.parent().unwrap_or(&config).to_owned());
        }
        let gguf = choose_gguf(&files)?;
        self.file(repo, gguf, revision, None, progress)
    }

    /// The folder of the files of a revision, which is a branch, a tag or a commit.
    fn snapshot(&self, repo: &Repo) -> Option<PathBuf> {
        let branch = self.cache.path().join(repo.folder_name()).join("refs").join(repo.revision());
        let commit = std::fs::read_to_string(branch);
        let commit = commit.as_deref().map_or(repo.revision(), str::trim);
        Some(self.cache.repo(repo.clone()).pointer_path(commit)).filter(|folder| folder.is_dir())
    }

    /// hf-hub's view of a repository. The token is a part of every request it makes, also of one to a host that the hub
    /// redirects to.
    fn api(&self, repo: &Repo, with_token: bool) -> Fetched<ApiRepo> {
        let api = ApiBuilder::from_cache(self.cache.clone())
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone().filter(|_| with_token))
            .with_progress(false)
            .with_user_agent("cupola", env!("CARGO_PKG_VERSION"));
        Ok(api.build().map_err(|e| e.to_string())?.repo(repo.clone()))
    }

    fn list(&self, repo: &str, revision: &str) -> Fetched<Vec<String>> {
        let repo = model(repo, revision);
        let with_token = self.probe.reach(&format!("{}/api/{}", self.endpoint, repo.api_url()))?;
        let files = list(self.api(&repo, with_token)?, PATIENCE)?;
        let safe = |name: &String| name.split('/').all(|part| !part.is_empty() && part != ".." && !part.contains('\\'));
        Ok(files.into_iter().filter(safe).collect())
    }

    fn fetch(&self, repo: &Repo, file: &str, known: Option<&Known>, progress: &dyn Progress) -> Fetched<PathBuf> {
        // hf-hub puts the name into the URL as it is.
        let escaped = escape(file);
        let about = self.probe.about(&self.api(repo, false)?.url(&escaped))?;
        if let (Some(known), Some(bytes)) = (known, about.bytes)
            && known.bytes != bytes
        {
            return Err(format!("it has {bytes} bytes, expected {}", known.bytes));
        }
        let bytes = known.map(|known| known.bytes).or(about.bytes);
        let sha256 = known.map(|known| known.sha256.clone()).or(about.sha256);
        let blob = self.cache.repo(repo.clone()).blob_path(&about.etag);
        // hf-hub goes on with what an earlier attempt left here, whatever it is: that is only of use where the whole can
        // be checked at the end.
        let part = blob.with_extension("part");
        let left = || std::fs::metadata(&part).map_or(0, |m| m.len());
        if sha256.is_none() || bytes.is_none_or(|bytes| left() >= bytes) {
            remove(&part)?;
        }
        loop {
            let resumed = left() > 0;
            let path = download(self.api(repo, about.needs_token)?, (file, &escaped), self.stall, progress)?;
            let Err(reason) = digest::check(&path, bytes, sha256.as_deref(), progress) else {
                return put_name_right(path, file, &escaped);
            };
            remove(&path)?;
            remove(&blob)?;
            if !resumed {
                return Err(reason);
            }
            // The beginning was of something else, or the hub sent the whole again: once more, from the start.
        }
    }
}

fn model(repo: &str, revision: &str) -> Repo {
    Repo::with_revision(repo.to_owned(), RepoType::Model, revision.to_owned())
}

/// A model folder with all its files, as `hf download` of a whole repository leaves it.
fn is_complete(folder: &Path) -> bool {
    ["config.json", "tokenizer.json"].iter().all(|name| folder.join(name).is_file()) && weight_files(folder).is_ok()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn remove(path: &Path) -> Fetched<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(format!("cannot remove {}: {e}", path.display())),
        _ => Ok(()),
    }
}

/// hf-hub names the file as it stands in the URL; other tools, as it stands in the repository.
fn put_name_right(path: PathBuf, file: &str, escaped: &str) -> Fetched<PathBuf> {
    let depth = file.split('/').count();
    let Some(snapshot) = path.ancestors().nth(depth).filter(|_| file != escaped) else { return Ok(path) };
    let right = snapshot.join(file);
    let failed = |e: std::io::Error| format!("cannot write {}: {e}", right.display());
    std::fs::create_dir_all(right.parent().unwrap_or(snapshot)).map_err(failed)?;
    // The link is relative, and as deep as before.
    std::fs::rename(&path, &right).map_err(failed)?;
    Ok(right)
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
