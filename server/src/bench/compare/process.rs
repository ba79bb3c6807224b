//! A program of a comparison while it runs: its output in a log file, its whole process group stopped when dropped.
//!
//! ```text
//!   start --> running --ended well--> (log removed)
//!                |  \--ended badly--> CompareError::Died: last lines and path of the log, which stays
//!                +------dropped-----> SIGTERM to the group, and SIGKILL after 15 s
//! ```

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::CompareError;

/// Time to end after SIGTERM.
const PATIENCE: Duration = Duration::from_secs(15);
const POLL: Duration = Duration::from_millis(20);
/// Lines shown of a log.
const LAST_LINES: usize = 12;

/// What to run.
#[derive(Debug)]
pub(super) struct Launch {
    /// Name for messages.
    pub(super) engine: String,
    pub(super) command: Command,
    /// What to try when the program is not there.
    pub(super) hint: String,
}

pub(super) struct Process {
    engine: String,
    child: Child,
    log: PathBuf,
    began: Instant,
    keep_log: bool,
}

impl Process {
    /// Starts a program. Its standard error, and its standard output unless `stdout` is given, go to a log file.
    pub(super) fn start(launch: Launch, stdout: Option<File>) -> Result<Self, CompareError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let Launch { engine, mut command, hint } = launch;
        let plain: String = engine.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let name = format!("cupola-compare-{}-{}-{plain}.log", std::process::id(), NEXT.fetch_add(1, Relaxed));
        let log = std::env::temp_dir().join(name);
        let create = || File::create(&log).map_err(CompareError::io(format!("write {}", log.display())));
        let errors = create()?;
        let output = match stdout {
            Some(file) => file,
            None => errors.try_clone().map_err(CompareError::io(format!("write {}", log.display())))?,
        };
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        // A group of its own: servers start processes too, and all must end.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let began = Instant::now();
        let child = command.spawn().map_err(|source| {
            drop(std::fs::remove_file(&log));
            CompareError::Start { program: command.get_program().to_string_lossy().into_owned(), source, hint }
        })?;
        Ok(Self { engine, child, log, began, keep_log: false })
    }

    /// Since it was started.
    pub(super) fn age(&self) -> Duration {
        self.began.elapsed()
    }

    fn ended(&mut self) -> Option<ExitStatus> {
        // What cannot be asked is taken to run on; the waiting has limits of its own.
        self.child.try_wait().ok().flatten()
    }

    /// An error if it has ended: it was to run on.
    pub(super) fn check(&mut self) -> Result<(), CompareError> {
        match self.ended() {
            Some(status) => Err(self.died(format!("ended early ({status})"))),
            None => Ok(()),
        }
    }

    /// Waits for its end, which must be a success.
    pub(super) async fn finish(&mut self) -> Result<(), CompareError> {
        loop {
            match self.ended() {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(self.died(format!("failed ({status})"))),
                None => tokio::time::sleep(POLL).await,
            }
        }
    }

    /// The error of this process, whose log is kept.
    pub(super) fn died(&mut self, how: String) -> CompareError {
        self.keep_log = true;
        let text = self.said();
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let lines = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
        CompareError::Died { engine: self.engine.clone(), how, lines, log: self.log.clone() }
    }

    /// What it has written to its log so far.
    pub(super) fn said(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Peak resident bytes of the process and those it started, where the system tells.
    pub(super) fn peak_memory(&self) -> Option<u64> {
        let folders = std::fs::read_dir("/proc").ok()?.flatten().map(|entry| entry.path());
        let known: Vec<Known> = folders.filter_map(|folder| known(&folder)).collect();
        let own = family(self.child.id(), &known);
        let peaks = own.iter().filter_map(|id| peak_of(&std::fs::read_to_string(format!("/proc/{id}/status")).ok()?));
        peaks.reduce(|a, b| a + b)
    }

    fn signal(&self, signal: &str) {
        // The group's number is the first process's. A shell's own `kill` is there even where no program of that name is.
        let line = format!("kill -s {signal} -- -{}", self.child.id());
        // Failing means that nobody is left to be stopped.
        drop(Command::new("sh").args(["-c", &line]).stderr(Stdio::null()).status());
    }
}

/// A process, its parent and its group, by their numbers.
pub(super) type Known = [u32; 3];

fn known(folder: &Path) -> Option<Known> {
    let id = folder.file_name()?.to_str()?.parse().ok()?;
    let stat = std::fs::read_to_string(folder.join("stat")).ok()?;
    // Fields after the name, which is in parentheses: state, parent, group.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(1).map(str::parse);
    Some([id, fields.next()?.ok()?, fields.next()?.ok()?])
}

/// All that belong to the group of `first` or descend from one that does: servers also start groups of their own.
pub(super) fn family(first: u32, known: &[Known]) -> Vec<u32> {
    let mut own: Vec<u32> =
        known.iter().filter(|[id, _, group]| *group == first || *id == first).map(|k| k[0]).collect();
    let mut next = 0;
    while let Some(&parent) = own.get(next) {
        let children = known.iter().filter(|[_, of, _]| *of == parent).map(|k| k[0]);
        let new: Vec<u32> = children.filter(|id| !own.contains(id)).collect();
        own.extend(new);
        next += 1;
    }
    own
}

/// Runs a program to its end and returns its standard output.
pub(super) async fn output_of(launch: Launch) -> Result<String, CompareError> {
    let engine: String = launch.engine.chars().filter(char::is_ascii_alphanumeric).collect();
    let path = std::env::temp_dir().join(format!("cupola-compare-{}-{engine}.out", std::process::id()));
    let _remove = Remove(path.clone());
    let file = File::create(&path).map_err(CompareError::io(format!("write {}", path.display())))?;
    Process::start(launch, Some(file))?.finish().await?;
    let bytes = std::fs::read(&path).map_err(CompareError::io(format!("read {}", path.display())))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Removes a file when dropped.
struct Remove(PathBuf);

impl Drop for Remove {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}

/// `VmHWM` of `/proc/PID/status`, in bytes.
pub(super) fn peak_of(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.ended().is_none() {
            self.signal("TERM");
            let asked = Instant::now();
            while self.ended().is_none() && asked.elapsed() < PATIENCE {
                std::thread::sleep(POLL);
            }
        }
        // Also what outlived its parent.
        self.signal("KILL");
        drop(self.child.kill());
        drop(self.child.wait());
        if !self.keep_log {
            drop(std::fs::remove_file(&self.log));
        }
    }
}
