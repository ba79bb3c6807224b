//! A model that is on this machine already.

use std::path::Path;

use super::Resolved;
use crate::error::{Error, Result};

/// Checks that a path is there and names the model after it.
///
/// # Errors
/// [`Error::Io`] when it is not.
pub(super) fn resolve(path: &Path) -> Result<Resolved> {
    let path = expand_home(path);
    let full = std::fs::canonicalize(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
    // A folder's name may have dots that are no extension.
    let name = if full.is_dir() { full.file_name() } else { full.file_stem() };
    let name = name.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned());
    Ok(Resolved { path: full, name, source: "path".to_owned() })
}

/// Replaces a leading `~` where no shell did.
fn expand_home(path: &Path) -> std::path::PathBuf {
    match (path.strip_prefix("~"), std::env::home_dir()) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path.to_owned(),
    }
}
