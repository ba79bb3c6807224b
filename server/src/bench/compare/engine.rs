//! The engines of a comparison: what they are called and how each is started.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::Duration;

use super::process::{Launch, Process};

/// Name of Cupola in records; it is always the first engine.
pub const CUPOLA: &str = "cupola";

/// Name of llama.cpp in records and on the command line.
pub(super) const LLAMA_CPP: &str = "llama.cpp";

/// Time for a program to tell its version: some load half of themselves for it.
const VERSION_LIMIT: Duration = Duration::from_secs(90);

/// What a [`Peer::Command`] begins with after its name.
const COMMAND: &str = "cmd:";

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
    /// Any other server, started by a command line in which [`PLACES`] are filled in.
    Command {
        /// Name in the record.
        name: String,
        /// Program and arguments, separated by spaces.
        line: String,
    },
    /// A server that is running already.
    Url {
        /// Name in the record.
        name: String,
        /// Where it is, without the endpoint.
        url: String,
    },
}

/// What a [`Peer::Command`] may name: the port to listen on, the model, threads, requests at once, tokens of each.
pub const PLACES: [&str; 5] = ["{port}", "{model}", "{threads}", "{requests}", "{tokens}"];

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
        let is_url = |text: &str| text.starts_with("http://");
        match (name, value) {
            (LLAMA_CPP, folder) => Ok(Self::LlamaCpp { folder: folder.map(PathBuf::from) }),
            ("vllm", program) => Ok(Self::Vllm { program: program.unwrap_or("vllm").into() }),
            (CUPOLA, _) => Err("the name cupola is taken".to_owned()),
            (name, Some(value)) if value.starts_with(COMMAND) && is_name(name) => {
                let line = value[COMMAND.len()..].trim();
                if line.is_empty() || !line.contains("{port}") {
                    return Err(format!(
                        "expected {name}=cmd:PROGRAM and arguments with {{port}} among them, got {line:?}"
                    ));
                }
                Ok(Self::Command { name: name.to_owned(), line: line.to_owned() })
            }
            (name, Some(url)) if is_url(url) && is_name(name) => {
                Ok(Self::Url { name: name.to_owned(), url: url.to_owned() })
            }
            _ if is_url(text) => Ok(Self::Url { name: "peer".to_owned(), url: text.to_owned() }),
            _ => Err(format!(
                "expected llama.cpp[=FOLDER], vllm[=PROGRAM], [NAME=]http://... or NAME=cmd:..., got {text:?}"
            )),
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
            Self::LlamaCpp { .. } => LLAMA_CPP,
            Self::Vllm { .. } => "vllm",
            Self::Url { name, .. } | Self::Command { name, .. } => name,
        }
    }
}

/// What all engines of a comparison share.
#[derive(Clone, Debug)]
pub struct Common {
    /// The model file or folder.
    pub model: PathBuf,
    /// The same model in another format, for peers that need one.
    pub peer_models: Vec<Setting>,
    /// This program.
    pub cupola: PathBuf,
    /// Threads of every engine.
    pub threads: usize,
    /// Rounds of turns.
    pub rounds: usize,
    /// More arguments for Cupola.
    pub cupola_args: Vec<String>,
    /// More arguments for started peers, separated by spaces.
    pub peer_args: Vec<Setting>,
    /// `KEY=VALUE`, more environment of started peers.
    pub peer_env: Vec<Setting>,
}

/// A setting of one peer or of all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The name of the peer; `None` for all.
    pub peer: Option<String>,
    /// The setting.
    pub value: String,
}

impl Setting {
    /// `NAME=VALUE` where NAME is one of `peers`, or the value for all.
    pub fn parse(text: &str, peers: &[Peer]) -> Self {
        match text.split_once('=') {
            Some((name, value)) if peers.iter().any(|peer| peer.name() == name) => {
                Self { peer: Some(name.to_owned()), value: value.to_owned() }
            }
            _ => Self { peer: None, value: text.to_owned() },
        }
    }

    /// Those of `peer`: first what is for all, then its own.
    fn of<'a, 'b>(settings: &'a [Self], peer: &'b str) -> impl Iterator<Item = &'a str> + use<'a, 'b> {
        let all = settings.iter().filter(|setting| setting.peer.is_none());
        let own = settings.iter().filter(move |setting| setting.peer.as_deref() == Some(peer));
        all.chain(own).map(|setting| setting.value.as_str())
    }
}

impl Common {
    /// The model as `peer` gets it.
    pub(super) fn peer_model(&self, peer: &str) -> &Path {
        Setting::of(&self.peer_models, peer).last().map_or(&self.model, Path::new)
    }

    /// Adds the arguments and the environment that were given for `peer`.
    pub(super) fn extend(&self, command: &mut Command, peer: &str) {
        command.args(Setting::of(&self.peer_args, peer).flat_map(str::split_whitespace));
        command.envs(Setting::of(&self.peer_env, peer).filter_map(|pair| pair.split_once('=')));
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

fn launch(engine: &str, program: &Path, hint: &str, words: impl IntoIterator<Item = OsString>) -> Launch {
    let mut command = Command::new(program);
    command.args(words);
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
    let mut launch = launch(CUPOLA, &common.cupola, "", words);
    launch.command.args(&common.cupola_args);
    launch
}

/// The peer's server on `port`; `None` for one that is running already.
pub(super) fn peer_server(peer: &Peer, common: &Common, room: Room, port: u16) -> Option<Launch> {
    let (threads, port) = (common.threads.to_string(), port.to_string());
    let model = common.peer_model(peer.name());
    let mut launch = match peer {
        Peer::Url { .. } => return None,
        Peer::Command { name, line } => {
            let numbers = [room.requests.to_string(), room.tokens.to_string()];
            let values = [&port, &*model.to_string_lossy(), &threads, &numbers[0], &numbers[1]];
            let fill = |word: &str| {
                let filled = PLACES.iter().zip(values).fold(word.to_owned(), |word, (place, v)| word.replace(place, v));
                OsString::from(filled)
            };
            let mut words = line.split_whitespace().map(fill);
            let program = PathBuf::from(words.next().unwrap_or_default());
            launch(name, &program, "the command of a peer begins with its program", words)
        }
        Peer::LlamaCpp { folder } => {
            // Its context is one pool: every slot gets an equal part.
            let context = (room.requests * room.tokens).to_string();
            let slots = room.requests.to_string();
            let words = words![
                "-m",
                model,
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
            launch(peer.name(), &program, &llama_hint(), words)
        }
        Peer::Vllm { program } => {
            let (requests, tokens) = (room.requests.to_string(), room.tokens.to_string());
            // An interpreter of Python has the module where the script of that name is not on the search path.
            let python = program.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python"));
            let mut words = match python {
                true => words!["-m", "vllm.entrypoints.openai.api_server", "--model", model].to_vec(),
                false => words!["serve", model].to_vec(),
            };
            words.extend(words![
                "--host",
                "127.0.0.1",
                "--port",
                port,
                "--max-num-seqs",
                requests,
                "--max-model-len",
                tokens,
            ]);
            let hint = "name the program with --peer vllm=PROGRAM";
            let mut launch = launch(peer.name(), program, hint, words);
            // Its CPU backend takes no flag for threads, and by itself keeps one processor free.
            launch.command.env("OMP_NUM_THREADS", threads);
            if let Some(cpus) = allowed_cpus().and_then(|list| first_cpus(&list, common.threads)) {
                launch.command.env("VLLM_CPU_OMP_THREADS_BIND", cpus);
            }
            launch
        }
    };
    common.extend(&mut launch.command, peer.name());
    Some(launch)
}

/// Processors that this process may use, as Linux lists them: `0-3,8`.
fn allowed_cpus() -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).map(|list| list.trim().to_owned())
}

/// The first `count` processors of such a list; `None` where there are fewer.
pub(super) fn first_cpus(list: &str, count: usize) -> Option<String> {
    let mut cpus = Vec::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        cpus.extend(first.parse::<u32>().ok()?..=last.parse::<u32>().ok()?);
    }
    let chosen = cpus.get(..count)?;
    Some(chosen.iter().map(u32::to_string).collect::<Vec<_>>().join(","))
}

/// What the peers that are programs say of their versions, for the head of a record.
pub async fn versions(peers: &[Peer], common: &Common) -> Vec<String> {
    let mut found = Vec::new();
    for peer in peers {
        let program = match peer {
            Peer::LlamaCpp { folder } => llama_program(folder.as_deref(), "llama-server"),
            Peer::Vllm { program } => program.clone(),
            Peer::Url { .. } | Peer::Command { .. } => continue,
        };
        let python = program.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python"));
        let words = match python {
            true => words!["-c", "import vllm; print(vllm.__version__)"].to_vec(),
            false => words!["--version"].to_vec(),
        };
        let mut launch = launch(peer.name(), &program, "", words);
        launch.command.envs(Setting::of(&common.peer_env, peer.name()).filter_map(|pair| pair.split_once('=')));
        // One that cannot tell is told apart by nothing; whether it runs at all is seen soon enough.
        let Ok(mut process) = Process::start(launch, None) else {
            continue;
        };
        let ended = tokio::time::timeout(VERSION_LIMIT, process.finish()).await;
        let said = if matches!(ended, Ok(Ok(()))) { process.said() } else { String::new() };
        if let Some(version) = version_in(&said) {
            found.push(format!("{} {version}", peer.name()));
        }
    }
    found
}

/// The version in what a program said: the last line that begins like one, with or without a word before it. Libraries
/// put warnings with numbers in them around it.
pub(super) fn version_in(said: &str) -> Option<String> {
    let mut versions = said.lines().filter_map(|line| {
        let line = line.trim();
        let line = line.strip_prefix("version:").unwrap_or(line).trim();
        line.starts_with(|c: char| c.is_ascii_digit()).then(|| line.replace(',', ";"))
    });
    versions.next_back()
}
