//! Writing a download to its place: hashed on the way, checked, then renamed.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::{Fetched, Progress};

/// What a file must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Known {
    /// Lower-case hexadecimal.
    pub(super) sha256: String,
    pub(super) bytes: u64,
}

/// A file being written beside its place. Dropped unfinished, it is written over by a later attempt.
pub(super) struct Partial {
    path: PathBuf,
    file: File,
    hash: Sha256,
    len: u64,
}

impl Partial {
    /// Starts a file, over what an earlier attempt may have left.
    pub(super) fn create(place: &Path) -> Fetched<Self> {
        let mut path = place.as_os_str().to_owned();
        path.push(".part");
        let path = PathBuf::from(path);
        let file = File::create(&path).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
        Ok(Self { path, file, hash: Sha256::new(), len: 0 })
    }

    /// Appends all of `from`, at most `max` bytes in total.
    pub(super) fn write_all(&mut self, mut from: impl Read, max: u64, progress: Option<&dyn Progress>) -> Fetched<()> {
        let mut buffer = vec![0; 1 << 16];
        loop {
            let n = match from.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(format!("it broke off after {} bytes: {e}", self.len)),
            };
            self.len += n as u64;
            if self.len > max {
                return Err(format!("it has more than the expected {max} bytes"));
            }
            self.hash.update(&buffer[..n]);
            self.file.write_all(&buffer[..n]).map_err(|e| format!("cannot write {}: {e}", self.path.display()))?;
            if let Some(progress) = progress {
                progress.advance(n as u64);
            }
        }
    }

    /// Checks size and hash where known and moves the file to its place. A file that fails is removed.
    pub(super) fn finish(self, place: &Path, bytes: Option<u64>, sha256: Option<&str>) -> Fetched<()> {
        if let Err(wrong) = compare((self.len, self.hash), bytes, sha256) {
            let _ = std::fs::remove_file(&self.path);
            return Err(wrong);
        }
        let failed = |e: std::io::Error| format!("cannot write {}: {e}", place.display());
        self.file.sync_all().map_err(failed)?;
        std::fs::rename(&self.path, place).map_err(failed)
    }
}

/// Checks the size and hash of a file where known. Reading it through is reported as a step of its own.
pub(super) fn check(path: &Path, bytes: Option<u64>, sha256: Option<&str>, progress: &dyn Progress) -> Fetched<()> {
    let failed = |e: std::io::Error| format!("cannot read {}: {e}", path.display());
    let mut file = File::open(path).map_err(failed)?;
    let len = file.metadata().map_err(failed)?.len();
    let mut hash = Sha256::new();
    if sha256.is_some() && bytes.is_none_or(|bytes| bytes == len) {
        progress.start("checking its SHA-256", Some(len));
        let mut buffer = vec![0; 1 << 16];
        loop {
            match file.read(&mut buffer).map_err(failed)? {
                0 => break,
                n => {
                    hash.update(&buffer[..n]);
                    progress.advance(n as u64);
                }
            }
        }
        progress.finish();
    }
    compare((len, hash), bytes, sha256)
}

fn compare((len, hash): (u64, Sha256), bytes: Option<u64>, sha256: Option<&str>) -> Fetched<()> {
    if let Some(bytes) = bytes.filter(|bytes| *bytes != len) {
        return Err(format!("it has {len} bytes, expected {bytes}"));
    }
    let got: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    match sha256.filter(|sha256| !sha256.eq_ignore_ascii_case(&got)) {
        Some(sha256) => Err(format!("its SHA-256 is {got}, expected {sha256}")),
        None => Ok(()),
    }
}
