//! Models without weight files, for measuring speed: random weights of the shapes that a `config.json` gives.
//!
//! Every matrix is bf16 and reads the same file of random values from its start, so a model of any size costs the disk one
//! matrix. Without a `tokenizer.json`, text is bytes and every other token of the vocabulary is a made-up word. What such
//! a model says means nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use cupola_kernels::WeightType;
use cupola_kernels::memory::MappedFile;
use half::bf16;
use serde_json::{Map, Value, json};

use crate::arch;
use crate::config::HfConfig;
use crate::error::{Error, Result};
use crate::model::{GenerationDefaults, Model, ModelInfo};
use crate::spec::DecoderSpec;
use crate::tokenizer::bpe::byte_characters;
use crate::tokenizer::{self, Tokenizer};
use crate::weights::{Tensor, TensorType, Weights};

/// Shapes that need no file, by the names that people call the models.
pub const SHAPES: [&str; 2] = ["llama-3.2-1b", "llama-3.1-8b"];

/// The `config.json` of a name in [`SHAPES`]: what is public about the models' shapes.
fn built_in(name: &str) -> Option<Value> {
    let (hidden, layers, heads, ffn, head_dim, factor, tied) = match name {
        "llama-3.2-1b" => (2048, 16, 32, 8192, 64, 32.0, true),
        "llama-3.1-8b" => (4096, 32, 32, 14336, 128, 8.0, false),
        _ => return None,
    };
    Some(json!({
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "head_dim": head_dim, "intermediate_size": ffn, "vocab_size": 128_256,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
        "tie_word_embeddings": tied, "hidden_act": "silu", "eos_token_id": 128_001,
        "rope_scaling": {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }))
}

/// Opens a model with random weights: `what` is a name of [`SHAPES`], or a folder with `config.json`.
///
/// # Errors
/// [`Error::Missing`] for a folder without `config.json`, what the family says of its metadata, [`Error::Io`] when there is
/// no room for one matrix among the temporary files.
pub fn open(what: &str) -> Result<Model> {
    let folder = Path::new(what);
    let config = match built_in(what) {
        Some(Value::Object(object)) => HfConfig::from_object(folder, object),
        _ if folder.join("config.json").exists() => HfConfig::read(&folder.join("config.json"))?,
        _ => {
            let what = format!("config.json; random weights need a folder with one, or one of {}", SHAPES.join(", "));
            return Err(Error::Missing { path: folder.to_owned(), what });
        }
    };
    let spec = arch::from_config(&config)?;
    let eos = config.token_ids("eos_token_id")?;
    let tokenizer = if folder.join("tokenizer.json").exists() {
        let settings = HfConfig::read_optional(&folder.join("tokenizer_config.json"))?;
        tokenizer::from_folder(folder, settings.as_ref(), eos)?
    } else {
        words(spec.vocab, eos)?
    };
    let tied = config.boolean("tie_word_embeddings")?.unwrap_or(spec.family.starts_with("gemma"));
    let weights = random_weights(&spec, tied)?;
    arch::check_tensors(&spec, &weights, folder)?;
    let info = ModelInfo {
        path: folder.to_owned(),
        file_bytes: 0,
        weight_bytes: weights.total_bytes(),
        packed_bytes: weights.packed_bytes(),
        parameters: weights.parameters(),
        architecture: spec.family.clone(),
        quantization: format!("{}, random", weights.dominant_type()),
        name: None,
        eos_tokens: tokenizer.eos().to_vec(),
        generation: GenerationDefaults::default(),
    };
    Ok(Model { spec, weights, tokenizer, chat_template: None, info })
}

/// All tensors of a decoder, in the one file that they share: ones for the vectors, then random values for the matrices.
fn random_weights(spec: &DecoderSpec, tied: bool) -> Result<Weights> {
    const BYTES: usize = size_of::<bf16>();
    let mut shapes = arch::tensors(spec);
    if !tied {
        shapes.push((spec.names.head.to_owned(), vec![spec.vocab, spec.hidden]));
    }
    let values = |shape: &[usize]| shape.iter().product::<usize>();
    let most = |matrix: bool| {
        let sizes = shapes.iter().filter(|(_, shape)| (shape.len() > 1) == matrix).map(|(_, shape)| values(shape));
        sizes.max().unwrap_or(0)
    };
    // Matrices start at a page, as in the files of real models.
    let ones = (most(false) * BYTES).next_multiple_of(4096);
    let (path, file) = random_file(ones / BYTES, most(true))?;
    let place = |shape: Vec<usize>| {
        let start = if shape.len() > 1 { ones } else { 0 };
        let range = start..start + values(&shape) * BYTES;
        Tensor { file: 0, range, shape, ty: TensorType::Known(WeightType::Bf16) }
    };
    let tensors: BTreeMap<String, Tensor> = shapes.into_iter().map(|(name, shape)| (name, place(shape))).collect();
    Ok(Weights::new(vec![(path, file)], tensors))
}

/// A mapped file, already without a name, of so many ones and then so many random values.
fn random_file(ones: usize, random: usize) -> Result<(PathBuf, MappedFile)> {
    /// Values after which the random ones repeat.
    const PERIOD: usize = 1 << 20;
    /// As large as trained weights are.
    const LARGEST: f32 = 0.03;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let unique = format!("cupola-random-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(unique);
    let io = |source| Error::Io { path: path.clone(), source };
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bf16::from_f32(((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * LARGEST)
    };
    let period: Vec<u8> = (0..PERIOD).flat_map(|_| next().to_le_bytes()).collect();
    let write = || -> std::io::Result<()> {
        let mut file = BufWriter::new(File::create_new(&path)?);
        file.write_all(&bf16::ONE.to_le_bytes().repeat(ones))?;
        let mut left = random * size_of::<bf16>();
        while left > 0 {
            let piece = left.min(period.len());
            file.write_all(&period[..piece])?;
            left -= piece;
        }
        file.flush()
    };
    let mapped = write().map_err(io).and_then(|()| Ok(MappedFile::open(&path)?));
    // The mapping keeps the bytes; without a name they go with it.
    let removed = std::fs::remove_file(&path);
    let mapped = mapped?;
    removed.map_err(io)?;
    Ok((path, mapped))
}

/// A tokenizer whose first 256 tokens are bytes and whose others are words that no text has.
fn words(vocab: usize, eos: Vec<u32>) -> Result<Tokenizer> {
    let bytes = byte_characters().into_iter().map(String::from);
    let others = (256..vocab).map(|id| format!("Ġw{id}"));
    let table: Map<String, Value> =
        bytes.chain(others).take(vocab).zip(0u32..).map(|(word, id)| (word, id.into())).collect();
    let pipeline = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null, "truncation": null, "padding": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "model": {"type": "BPE", "vocab": table, "merges": [], "dropout": null, "unk_token": null,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false},
    });
    tokenizer::from_json(pipeline.to_string().as_bytes(), Path::new("made-up words"), None, eos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_shapes_have_the_parameters_that_their_names_say() {
        for (name, billions) in [("llama-3.2-1b", 1.236), ("llama-3.1-8b", 8.030)] {
            let config = HfConfig::from_object(Path::new(name), built_in(name).unwrap().as_object().unwrap().clone());
            let spec = arch::from_config(&config).unwrap();
            let head =
                if config.boolean("tie_word_embeddings").unwrap().unwrap() { 0 } else { spec.vocab * spec.hidden };
            let values: usize = arch::tensors(&spec).iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
            let got = (values + head) as f64 / 1e9;
            assert!((got - billions).abs() < 0.001, "{name} has {got} billion");
        }
    }

    #[test]
    fn a_folder_with_a_config_alone_becomes_a_model() {
        let scratch = crate::testing::Scratch::new("dummy");
        let whole = crate::testing::tiny_safetensors(scratch.path(), WeightType::Bf16, 1);
        let folder = scratch.path().join("config-only");
        std::fs::create_dir(&folder).unwrap();
        std::fs::copy(whole.join("config.json"), folder.join("config.json")).unwrap();
        let model = open(folder.to_str().unwrap()).unwrap();
        let real = Model::open(&whole).unwrap();
        assert_eq!(model.spec, real.spec);
        assert_eq!(model.tokenizer.vocab_size(), crate::testing::VOCAB);
        let text = "Hello, \u{1F30D}!";
        let ids = model.tokenizer.encode(text, true).unwrap();
        assert_eq!(ids.len(), text.len());
        assert_eq!(model.tokenizer.decode(&ids, true), text);
        assert!(model.weights.vector(model.spec.names.final_norm).unwrap().iter().all(|&one| one == 1.0));
    }

    #[test]
    fn what_has_no_shape_is_refused_with_the_names_that_have() {
        let error = open("/nowhere").unwrap_err().to_string();
        assert!(error.contains("llama-3.2-1b"), "{error}");
    }
}
