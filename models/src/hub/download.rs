//! Work of `hf-hub` on a thread of its own, watched: it has no time limits, so whoever waits for it has one.
//!
//! ```text
//!   caller:  recv(timeout) <-- total, bytes, result --  thread: hf-hub
//!               |                                          ^
//!               +-- gives up: drops the receiver ----------+   ends at the next word it has for nobody
//! ```
//!
//! A thread that is given up while the network holds it stays until the connection ends; it owns nothing but the
//! unfinished file.

use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use hf_hub::api::sync::{ApiError, ApiRepo};
use ureq::http::StatusCode;

use super::probe::refusal;
use super::{Fetched, Progress};

/// What the thread says.
enum Word<T> {
    Total(u64),
    Bytes(u64),
    Done(Result<T, ApiError>),
}

struct Teller(Sender<Word<PathBuf>>);

impl Teller {
    fn tell(&self, word: Word<PathBuf>) {
        if self.0.send(word).is_err() {
            // Nobody waits any more. This is the only way to stop hf-hub, and it is silent.
            resume_unwind(Box::new("given up"));
        }
    }
}

impl hf_hub::api::Progress for Teller {
    fn init(&mut self, size: usize, _: &str) {
        self.tell(Word::Total(size as u64));
    }
    fn update(&mut self, size: usize) {
        self.tell(Word::Bytes(size as u64));
    }
    fn finish(&mut self) {}
}

/// Downloads a file into the cache of `api`, or goes on with what an earlier attempt left there. Gives up when nothing
/// comes for `stall`.
pub(super) fn download(
    api: ApiRepo,
    (file, escaped): (&str, &str),
    stall: Duration,
    progress: &dyn Progress,
) -> Fetched<PathBuf> {
    let escaped = escaped.to_owned();
    let words = spawn(move |words| api.download_with_progress(&escaped, Teller(words)));
    let mut started = false;
    let mut bytes = 0;
    let result = loop {
        match words.recv_timeout(stall) {
            // hf-hub says it twice.
            Ok(Word::Total(_)) if started => {}
            Ok(Word::Total(total)) => {
                progress.start(file, Some(total));
                started = true;
            }
            Ok(Word::Bytes(more)) => {
                bytes += more;
                progress.advance(more);
            }
            Ok(Word::Done(result)) => break result.map_err(|error| say(&error, bytes)),
            Err(RecvTimeoutError::Timeout) => {
                break Err(format!(
                    "nothing came for {} seconds; its {bytes} bytes are kept for the next attempt",
                    stall.as_secs_f64()
                ));
            }
            Err(RecvTimeoutError::Disconnected) => break Err("the download failed inside hf-hub".to_owned()),
        }
    };
    if started {
        progress.finish();
    }
    result
}

/// Names of the files of a repository.
pub(super) fn list(api: ApiRepo, patience: Duration) -> Fetched<Vec<String>> {
    let words = spawn(move |_| api.info());
    match words.recv_timeout(patience) {
        Ok(Word::Done(Ok(info))) => Ok(info.siblings.into_iter().map(|file| file.rfilename).collect()),
        Ok(Word::Done(Err(error))) => Err(say(&error, 0)),
        _ => Err(format!("no list of its files came within {} seconds", patience.as_secs())),
    }
}

fn spawn<T: Send + 'static>(
    work: impl FnOnce(Sender<Word<T>>) -> Result<T, ApiError> + Send + 'static,
) -> Receiver<Word<T>> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let result = work(sender.clone());
        // The receiver may have given up.
        let _ = sender.send(Word::Done(result));
    });
    receiver
}

fn say(error: &ApiError, bytes: u64) -> String {
    match error {
        ApiError::RequestError(request) => match &**request {
            ureq::Error::StatusCode(status) => {
                StatusCode::from_u16(*status).map_or_else(|_| format!("the hub answers {status}"), refusal)
            }
            other => format!("the hub cannot be reached any more: {other}"),
        },
        ApiError::IoError(cause) => format!("it broke off after {bytes} bytes: {cause}"),
        ApiError::LockAcquisition(path) => format!("another process is downloading it ({})", path.display()),
        other => format!("the hub's answer makes no sense: {other}"),
    }
}
