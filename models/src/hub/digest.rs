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

/// A file being written beside its place. Dropped unfinished, it stays for a later attempt to continue.
pub(super) struct Partial {
    path: PathBuf,
    file: File,
    hash: Sha256,
    pub(super) len: u64,
}

impl Partial {
    /// Starts a file, or takes up what an earlier attempt left.
    pub(super) fn open(place: &Path) -> Fetched<Self> {
        let mut path = place.as_os_str().to_owned();
        path.push(".part");
        let path = PathBuf::from(path);
        let failed = |e: std::io::Error| format!("cannot write {}: {e}", path.display());
        let mut file =
            File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        let mut hash = Sha256::new();
        // Reading to the end also leaves the position where writing goes on.
        let len = std::io::copy(&mut file, &mut hash).map_err(failed)?;
        Ok(Self { path, file, hash, len })
    }

    /// Gives up before anything came: an empty file is of no use to a later attempt.
    pub(super) fn abandon(self) {
        if self.len == 0 {
            // Left behind, it is empty and will be written over.
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// Forgets what is there.
    pub(super) fn restart(&mut self) -> Fetched<()> {
        use std::io::Seek as _;
        let path = &self.path;
        let failed = |e: std::io::Error| format!("cannot write {}: {e}", path.display());
        self.file.set_len(0).map_err(failed)?;
        self.file.rewind().map_err(failed)?;
        self.hash = Sha256::new();
        self.len = 0;
        Ok(())
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
        let got: String = self.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        let wrong = match (bytes, sha256) {
            (Some(bytes), _) if bytes != self.len => Some(format!("it has {} bytes, expected {bytes}", self.len)),
            (_, Some(sha256)) if !sha256.eq_ignore_ascii_case(&got) => {
                Some(format!("its SHA-256 is {got}, expected {sha256}"))
            }
            _ => None,
        };
        if let Some(wrong) = wrong {
            let _ = std::fs::remove_file(&self.path);
            return Err(wrong);
        }
        let failed = |e: std::io::Error| format!("cannot write {}: {e}", place.display());
        self.file.sync_all().map_err(failed)?;
        std::fs::rename(&self.path, place).map_err(failed)
    }
}
