//! The engines of a comparison: what they are called and how each is started.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::Duration;

use super::process::{Launch, Process};

/// Name of Cupola in records; it is always the first engine.
pub const CUPOLA: &str = "cupola";

/// Time for a program to tell its version: some load half of themselves for it.
const VERSION_LIMIT: Duration = Duration::from_secs(30);

/// Whom to compare with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// llama.cpp: `llama-bench`, `llama-batched-bench` and `llama-server` of a folder, or of the search path.
    LlamaCpp {
        /// The folder.
        folder: Option<PathBuf>,
    },
    /// `vllm serve`.
    Vllm {
        /// The program.
        program: PathBuf,
    },
    /// A server that is running already.
    Url {
        /// Name in the record.
        name: String,
        /// Where it is, without the endpoint.
        url: String,
    },
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
        let is_url = |text: &str| text.starts_with("http://");
        match (name, value) {
            ("llama.cpp", folder) => Ok(Self::LlamaCpp { folder: folder.map(PathBuf::from) }),
            ("vllm", program) => Ok(Self::Vllm { program: program.unwrap_or("vllm").into() }),
            (CUPOLA, _) => Err("the name cupola is taken".to_owned()),
            (name, Some(url)) if is_url(url) && is_name(name) => {
                Ok(Self::Url { name: name.to_owned(), url: url.to_owned() })
            }
            _ if is_url(text) => Ok(Self::Url { name: "peer".to_owned(), url: text.to_owned() }),
            _ => Err(format!("expected llama.cpp[=FOLDER], vllm[=PROGRAM] or [NAME=]http://..., got {text:?}")),
        }
    }
}

/// Fit for a cell of a record.
fn is_name(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || matches!(c, '.' | '-' | '_' | ' '))
}

impl Peer {
    /// Name in the record.
    pub fn name(&self) -> &str {
        match self {
            Self::LlamaCpp { .. } => "llama.cpp",
            Self::Vllm { .. } => "vllm",
            Self::Url { name, .. } => name,
        }
    }
}

/// What all engines of a comparison share.
#[derive(Clone, Debug)]
pub struct Common {
    /// The model file or folder.
    pub model: PathBuf,
    /// The same model in another format, for peers that need one.
    pub peer_model: Option<PathBuf>,
    /// This program.
    pub cupola: PathBuf,
    /// Threads of every engine.
    pub threads: usize,
    /// Rounds of turns.
    pub rounds: usize,
    /// More arguments for Cupola.
    pub cupola_args: Vec<String>,
    /// More arguments for started peers.
    pub peer_args: Vec<String>,
}

impl Common {
    fn peer_model(&self) -> &Path {
        self.peer_model.as_deref().unwrap_or(&self.model)
    }
}

/// What a server must have room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    /// Requests at once.
    pub(super) requests: usize,
    /// Tokens of each: prompt and answer.
    pub(super) tokens: usize,
}

/// Words of a command line, of text and paths.
macro_rules! words {
    ($($word:expr),* $(,)?) => { [$(OsString::from($word)),*] };
}

pub(super) fn llama_program(folder: Option<&Path>, program: &str) -> PathBuf {
    folder.map_or_else(|| PathBuf::from(program), |folder| folder.join(program))
}

pub(super) fn llama_hint() -> String {
    "name the folder of llama.cpp's programs with --peer llama.cpp=FOLDER".to_owned()
}

fn launch(
    engine: &str,
    program: &Path,
    hint: &str,
    words: impl IntoIterator<Item = OsString>,
    more: &[String],
) -> Launch {
    let mut command = Command::new(program);
    command.args(words).args(more);
    Launch { engine: engine.to_owned(), command, hint: hint.to_owned() }
}

/// `cupola serve` on `port`.
pub(super) fn cupola_server(common: &Common, room: Room, port: u16) -> Launch {
    let words = words![
        "serve",
        &common.model,
        "--port",
        port.to_string(),
        "--threads",
        common.threads.to_string(),
        "--max-num-seqs",
        room.requests.to_string(),
        "--max-model-len",
        room.tokens.to_string(),
    ];
    launch(CUPOLA, &common.cupola, "", words, &common.cupola_args)
}

/// The peer's server on `port`; `None` for one that is running already.
pub(super) fn peer_server(peer: &Peer, common: &Common, room: Room, port: u16) -> Option<Launch> {
    let (threads, port) = (common.threads.to_string(), port.to_string());
    match peer {
        Peer::Url { .. } => None,
        Peer::LlamaCpp { folder } => {
            // Its context is one pool: every slot gets an equal part.
            let context = (room.requests * room.tokens).to_string();
            let slots = room.requests.to_string();
            let words = words![
                "-m",
                common.peer_model(),
                "-t",
                threads,
                "-np",
                slots,
                "-c",
                context,
                "-fa",
                "on",
                "--host",
                "127.0.0.1",
                "--port",
                port,
            ];
            let program = llama_program(folder.as_deref(), "llama-server");
            Some(launch(peer.name(), &program, &llama_hint(), words, &common.peer_args))
        }
        Peer::Vllm { program } => {
            let (requests, tokens) = (room.requests.to_string(), room.tokens.to_string());
            let words = words![
                "serve",
                common.peer_model(),
                "--host",
                "127.0.0.1",
                "--port",
                port,
                "--max-num-seqs",
                requests,
                "--max-model-len",
                tokens,
            ];
            let hint = "name the program with --peer vllm=PROGRAM";
            let mut launch = launch(peer.name(), program, hint, words, &common.peer_args);
            // Its CPU backend takes no flag for threads.
            launch.command.env("OMP_NUM_THREADS", threads);
            Some(launch)
        }
    }
}

/// What the peers that are programs say of their versions, for the head of a record.
pub async fn versions(peers: &[Peer]) -> Vec<String> {
    let mut found = Vec::new();
    for peer in peers {
        let program = match peer {
            Peer::LlamaCpp { folder } => llama_program(folder.as_deref(), "llama-server"),
            Peer::Vllm { program } => program.clone(),
            Peer::Url { .. } => continue,
        };
        // One that cannot tell is told apart by nothing; whether it runs at all is seen soon enough.
        let Ok(mut process) = Process::start(launch(peer.name(), &program, "", words!["--version"], &[]), None) else {
            continue;
        };
        let ended = tokio::time::timeout(VERSION_LIMIT, process.finish()).await;
        let said = if matches!(ended, Ok(Ok(()))) { process.said() } else { String::new() };
        if let Some(line) = said.lines().find(|line| line.contains(|c: char| c.is_ascii_digit())) {
            let version = line.trim().trim_start_matches("version:").trim().replace(',', ";");
            found.push(format!("{} {version}", peer.name()));
        }
    }
    found
}
