//! Opening a model: everything known about it before any computation.

use std::path::{Path, PathBuf};

use crate::arch;
use crate::config::HfConfig;
use crate::error::{Error, Result};
use crate::spec::DecoderSpec;
use crate::template::ChatTemplate;
use crate::tokenizer::{self, Tokenizer};
use crate::weights::gguf::Gguf;
use crate::weights::{Weights, safetensors};

/// An opened model. Its weights are mapped, not read.
#[derive(Debug)]
pub struct Model {
    /// Shape and variations, for [`crate::spec`]'s reader.
    pub spec: DecoderSpec,
    /// Tensors by name.
    pub weights: Weights,
    /// Text to token ids and back.
    pub tokenizer: Tokenizer,
    /// Messages to prompt; base models have none.
    pub chat_template: Option<ChatTemplate>,
    /// What people and the memory plan want to know.
    pub info: ModelInfo,
}

/// Facts about a model's files.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// The file or folder.
    pub path: PathBuf,
    /// Bytes on disk of the weight files.
    pub file_bytes: u64,
    /// Bytes of the tensors.
    pub weight_bytes: u64,
    /// Bytes of the tensors once they are packed for the kernels.
    pub packed_bytes: u64,
    /// Number of values in all tensors.
    pub parameters: u64,
    /// Family, as the model files name it.
    pub architecture: String,
    /// The weight type that most bytes of matrices have: `Q4_1`.
    pub quantization: String,
    /// The model's own name.
    pub name: Option<String>,
    /// Tokens that end an answer.
    pub eos_tokens: Vec<u32>,
    /// What the model's authors suggest for sampling.
    pub generation: GenerationDefaults,
}

/// Sampling settings of `generation_config.json`; absent where the model says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Temperature; 0 when the model asks for greedy decoding.
    pub temperature: Option<f32>,
    /// Probability mass kept.
    pub top_p: Option<f32>,
    /// Number of tokens kept.
    pub top_k: Option<u32>,
    /// Share of the most likely token's probability.
    pub min_p: Option<f32>,
    /// Penalty on tokens seen before.
    pub repetition_penalty: Option<f32>,
}

impl Model {
    /// Opens a `.gguf` file, or a folder with `config.json`, `*.safetensors` and `tokenizer.json`, or a folder that
    /// holds one `.gguf` file.
    ///
    /// # Errors
    /// Every variant of [`Error`] but the hub's: the message names the file and what would be right.
    pub fn open(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        if !metadata.is_dir() {
            return open_gguf(path);
        }
        if path.join("config.json").exists() {
            return open_folder(path);
        }
        let mut ggufs = files_with_extension(path, "gguf")?;
        match ggufs.len() {
            1 => open_gguf(&ggufs.remove(0)),
            0 => Err(Error::Missing {
                path: path.to_owned(),
                what: "model: expected config.json with *.safetensors and tokenizer.json, or one .gguf file".to_owned(),
            }),
            n => Err(Error::Unsupported {
                what: format!("a folder with {n} .gguf files ({})", path.display()),
                hint: format!("name one of them, such as {}", ggufs[0].display()),
            }),
        }
    }
}

fn open_gguf(path: &Path) -> Result<Model> {
    let gguf = Gguf::open(path)?;
    if gguf.integer("split.count")?.is_some_and(|parts| parts > 1) {
        return Err(Error::Unsupported {
            what: format!("{}, one part of a split file,", path.display()),
            hint: "join the parts with `llama-gguf-split --merge`".to_owned(),
        });
    }
    let mut spec = arch::from_gguf(&gguf)?;
    let tokenizer = tokenizer::from_gguf(&gguf)?;
    let chat_template = match gguf.text("tokenizer.chat_template")? {
        Some(source) => Some(template_for(source, &tokenizer)?),
        None => None,
    };
    let name = gguf.text("general.name")?.map(str::to_owned);
    let weights = gguf.into_weights();
    arch::check_tensors(&spec, &weights, path)?;
    arch::apply_rope_factors(&mut spec, &weights, path)?;
    let info = info(path, &[path.to_owned()], &spec, &weights, &tokenizer)?;
    Ok(Model { spec, weights, chat_template, info: ModelInfo { name, ..info }, tokenizer })
}

fn open_folder(folder: &Path) -> Result<Model> {
    let config = HfConfig::read(&folder.join("config.json"))?;
    let settings = HfConfig::read_optional(&folder.join("tokenizer_config.json"))?;
    let generation = HfConfig::read_optional(&folder.join("generation_config.json"))?;
    let mut spec = arch::from_config(&config)?;
    let eos = match &generation {
        Some(generation) => generation.token_ids("eos_token_id")?,
        None => Vec::new(),
    };
    let eos = if eos.is_empty() { config.token_ids("eos_token_id")? } else { eos };
    let tokenizer = tokenizer::from_folder(folder, settings.as_ref(), eos)?;
    let chat_template = match template_source(folder, settings.as_ref())? {
        Some(source) => Some(template_for(&source, &tokenizer)?),
        None => None,
    };
    let (weights, files) = safetensors::open_folder(folder)?;
    arch::respell(&mut spec, &weights);
    arch::check_tensors(&spec, &weights, folder)?;
    let info = info(folder, &files, &spec, &weights, &tokenizer)?;
    let generation = match &generation {
        Some(file) => generation_defaults(file)?,
        None => GenerationDefaults::default(),
    };
    let name = config.optional_text("_name_or_path")?.filter(|name| !name.is_empty()).map(str::to_owned);
    Ok(Model { spec, weights, chat_template, info: ModelInfo { generation, name, ..info }, tokenizer })
}

fn info(
    path: &Path,
    files: &[PathBuf],
    spec: &DecoderSpec,
    weights: &Weights,
    tokenizer: &Tokenizer,
) -> Result<ModelInfo> {
    let mut file_bytes = 0;
    for file in files {
        file_bytes += std::fs::metadata(file).map_err(|source| Error::Io { path: file.clone(), source })?.len();
    }
    Ok(ModelInfo {
        path: path.to_owned(),
        file_bytes,
        weight_bytes: weights.total_bytes(),
        packed_bytes: weights.packed_bytes(),
        parameters: weights.parameters(),
        architecture: spec.family.clone(),
        quantization: weights.dominant_type(),
        name: None,
        eos_tokens: tokenizer.eos().to_vec(),
        generation: GenerationDefaults::default(),
    })
}

/// A template with the model's own BOS and EOS texts.
fn template_for(source: &str, tokenizer: &Tokenizer) -> Result<ChatTemplate> {
    let text = |id: Option<u32>| id.map_or_else(String::new, |id| tokenizer.decode(&[id], false));
    ChatTemplate::new(source, &text(tokenizer.bos()), &text(tokenizer.eos().first().copied()))
}

/// The template of a folder: `chat_template.jinja`, or the string or the list of named ones in `tokenizer_config.json`.
fn template_source(folder: &Path, settings: Option<&HfConfig>) -> Result<Option<String>> {
    let path = folder.join("chat_template.jinja");
    if path.exists() {
        return std::fs::read_to_string(&path).map(Some).map_err(|source| Error::Io { path, source });
    }
    let Some(settings) = settings else { return Ok(None) };
    match settings.get("chat_template") {
        Some(serde_json::Value::Array(named)) => {
            let chosen = named.iter().find(|entry| entry["name"] == "default").or(named.first());
            Ok(chosen.and_then(|entry| entry["template"].as_str()).map(str::to_owned))
        }
        _ => Ok(settings.optional_text("chat_template")?.map(str::to_owned)),
    }
}

fn generation_defaults(file: &HfConfig) -> Result<GenerationDefaults> {
    let number = |key: &str| Ok::<_, Error>(file.number(key)?.map(|v| v as f32));
    let greedy = file.boolean("do_sample")? == Some(false);
    Ok(GenerationDefaults {
        temperature: if greedy { Some(0.0) } else { number("temperature")? },
        top_p: number("top_p")?,
        top_k: file.optional_size("top_k")?.map(|k| u32::try_from(k).unwrap_or(u32::MAX)),
        min_p: number("min_p")?,
        repetition_penalty: number("repetition_penalty")?,
    })
}

/// Files of a folder with an extension, sorted.
pub(crate) fn files_with_extension(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let io = |source| Error::Io { path: folder.to_owned(), source };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case(extension)) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
