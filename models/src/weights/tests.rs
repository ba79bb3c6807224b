//! Tests of the weight readers: what they accept, and every kind of damage.

use std::path::Path;

use cupola_kernels::WeightType;

use super::gguf::{Gguf, parse};
use super::writer::{GgufWriter, Item, TensorItem, encode};
use crate::testing::{Scratch, real_model, tiny_gguf, tiny_safetensors, tiny_writer};
use crate::{Error, Model};

/// The message for these bytes as a GGUF file; panics when they are accepted.
fn refusal(bytes: &[u8]) -> String {
    match parse(Path::new("test.gguf"), bytes) {
        Err(e @ Error::Format { .. }) => e.to_string(),
        Err(other) => panic!("expected a format error, got {other}"),
        Ok(_) => panic!("accepted"),
    }
}

fn small() -> GgufWriter {
    let mut file = GgufWriter::new();
    file.text("general.architecture", "llama").u32("n", 7).key("list", Item::F32s(vec![0.5, 1.5]));
    file.tensor("w", &[2, 32], WeightType::F32, &[0.25; 64]).tensor("v", &[3], WeightType::F16, &[1.0, 2.0, 3.0]);
    file
}

#[test]
fn reads_what_was_written_in_versions_2_and_3() {
    for version in [2, 3] {
        let scratch = Scratch::new("gguf");
        let path = scratch.path().join("a.gguf");
        std::fs::write(&path, GgufWriter { version, ..small() }.finish()).unwrap();
        let gguf = Gguf::open(&path).unwrap();
        assert_eq!(gguf.text("general.architecture").unwrap(), Some("llama"));
        assert_eq!(gguf.size("n").unwrap(), 7);
        assert_eq!(gguf.numbers("list").unwrap(), Some(vec![0.5, 1.5]));
        assert_eq!(gguf.shape("w"), Some(&[2, 32][..]));
        assert!(gguf.text("n").unwrap_err().to_string().contains("key n is an integer, expected a string"));
        assert!(gguf.size("absent").unwrap_err().to_string().ends_with("has no key absent"));

        let weights = gguf.into_weights();
        let part = weights.part("w").unwrap();
        assert_eq!((part.ty, part.rows, part.cols, part.data.len()), (WeightType::F32, 2, 32, 256));
        assert_eq!(weights.vector("v").unwrap(), [1.0, 2.0, 3.0]);
        assert!(weights.part("v").unwrap_err().to_string().contains("expected [rows, cols]"));
        assert!(weights.part("x").unwrap_err().to_string().contains("has no tensor x"));
        weights.release("w");
        assert_eq!(weights.part("w").unwrap().data[..4], 0.25f32.to_le_bytes(), "released pages are read again");
        assert_eq!((weights.total_bytes(), weights.parameters(), &*weights.dominant_type()), (262, 67, "F32"));
        assert_eq!(weights.packed_bytes(), 16 * 32 * 4 + 6, "rows are packed in sixteens");
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = tiny_writer(WeightType::Q4_0, 1).finish();
    for i in 0..64 {
        let cut = &bytes[..bytes.len() * i / 64];
        let message = refusal(cut);
        assert!(message.starts_with("test.gguf is damaged or not a model file: "), "{message}");
    }
    // Every single length within the metadata, where most of the decisions are.
    for end in 0..600 {
        refusal(&bytes[..end]);
    }
    parse(Path::new("test.gguf"), &bytes).unwrap();
}

#[test]
fn the_real_model_cut_anywhere_is_refused() {
    let Some(path) = real_model() else { return };
    let file = super::map(&path).unwrap();
    let bytes = file.bytes();
    for i in 0..64 {
        refusal(&bytes[..bytes.len() / 64 * i]);
    }
    parse(&path, bytes).unwrap();
}

#[test]
fn flipped_bytes_never_panic() {
    let bytes = small().finish();
    for at in 0..bytes.len() - 300 {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut bad = bytes.clone();
            bad[at] = value;
            let _ = parse(Path::new("test.gguf"), &bad);
        }
    }
}

#[test]
fn wrong_magic_and_version_are_named() {
    assert!(refusal(&GgufWriter { magic: *b"PK\x03\x04", ..small() }.finish()).contains("expected \"GGUF\""));
    for version in [0, 1, 4, 3 << 24] {
        let message = refusal(&GgufWriter { version, ..small() }.finish());
        assert!(message.contains(&format!("version is {version}, expected 2 or 3")), "{message}");
    }
    refusal(b"");
}

#[test]
fn lengths_that_overflow_are_refused() {
    let bytes = small().finish();
    // Tensor count, key count, length of the first key.
    for at in [8, 16, 24] {
        for huge in [u64::MAX, u64::MAX / 8, 1 << 60, 1 << 32] {
            let mut bad = bytes.clone();
            bad[at..at + 8].copy_from_slice(&huge.to_le_bytes());
            refusal(&bad);
        }
    }
    // Length of an array, whose product with the width of an element overflows.
    let at = bytes.windows(4).position(|w| w == b"list").unwrap() + 4 + 4 + 4;
    for huge in [u64::MAX, 1 << 62] {
        let mut bad = bytes.clone();
        bad[at..at + 8].copy_from_slice(&huge.to_le_bytes());
        refusal(&bad);
    }
}

#[test]
fn tensors_that_do_not_fit_are_refused() {
    let with = |change: fn(&mut TensorItem)| {
        let mut file = small();
        change(&mut file.tensors[0]);
        refusal(&file.finish())
    };
    assert!(with(|t| t.shape = vec![1 << 40, 32]).contains("but the file has only"));
    assert!(with(|t| t.shape = vec![u64::MAX, 32]).contains("not possible"));
    assert!(with(|t| t.shape = vec![u64::MAX / 2, u64::MAX / 2]).contains("not possible"));
    assert!(with(|t| t.shape = vec![2, 0]).contains("dimension of 0"));
    assert!(with(|t| t.shape = vec![1; 5]).contains("5 dimensions"));
    assert!(with(|t| t.shape = vec![]).contains("0 dimensions"));
    assert!(with(|t| (t.ty, t.shape) = (2, vec![2, 33])).contains("type Q4_0 has shape [2, 33]"));

    // An offset beyond the file, and one that is not aligned.
    let bytes = small().finish();
    let at = bytes.windows(1).rposition(|w| w == b"v").unwrap() + 1 + 4 + 8 + 4;
    for (offset, expected) in
        [(1 << 40, "but the file has only"), (u64::MAX - 31, "but the file"), (3, "multiple of 32")]
    {
        let mut bad = bytes.clone();
        bad[at..at + 8].copy_from_slice(&u64::to_le_bytes(offset));
        let message = refusal(&bad);
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn duplicates_and_odd_alignments_are_refused() {
    let mut file = small();
    file.u32("n", 8);
    assert!(refusal(&file.finish()).contains("key n occurs twice"));
    let mut file = small();
    file.tensor("w", &[1], WeightType::F32, &[1.0]);
    assert!(refusal(&file.finish()).contains("tensor w occurs twice"));
    for alignment in [0, 3, 1 << 21] {
        let mut file = small();
        file.u32("general.alignment", alignment);
        assert!(refusal(&file.finish()).contains("general.alignment"));
    }
    let mut file = small();
    file.u32("general.alignment", 64);
    file.alignment = 64;
    parse(Path::new("test.gguf"), &file.finish()).unwrap();
}

#[test]
fn an_unknown_type_matters_only_when_used() {
    let mut file = tiny_writer(WeightType::F32, 1);
    let extra = TensorItem { name: "extra".into(), shape: vec![2, 256], ty: 18, data: vec![0; 420] };
    file.tensors.push(extra.clone());
    file.tensors.push(TensorItem { name: "future".into(), ty: 99, ..extra });
    let scratch = Scratch::new("unknown-type");
    let path = scratch.path().join("a.gguf");
    std::fs::write(&path, file.finish()).unwrap();
    let model = Model::open(&path).unwrap();
    let message = model.weights.part("extra").unwrap_err().to_string();
    assert!(message.contains("tensor extra of type IQ3_XXS is not supported"), "{message}");
    assert!(model.weights.part("future").unwrap_err().to_string().contains("type number 99"));
}

#[test]
fn block_formats_keep_their_values() {
    let values: Vec<f32> = (0..64).map(|i| (i as f32 - 31.0) / 20.0).collect();
    for (ty, bytes) in [(WeightType::Q8_0, 68), (WeightType::Q4_0, 36), (WeightType::Q4_1, 40), (WeightType::Bf16, 128)]
    {
        assert_eq!(encode(ty, &values).len(), bytes);
        assert_eq!(super::tensor_bytes(ty, &[2, 32]), Some(bytes));
    }
    assert_eq!(super::tensor_bytes(WeightType::F32, &[usize::MAX, 2]), None);
}

#[test]
fn a_folder_may_be_in_several_files() {
    let scratch = Scratch::new("shards");
    let folder = tiny_safetensors(scratch.path(), WeightType::Bf16, 3);
    let whole = Model::open(&folder).unwrap();
    // The second file gets one tensor, the first the others.
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let is_norm = |name: &str| name == "model.norm.weight";
    let shard = |pick: &dyn Fn(&str) -> bool| {
        safetensors::serialize(tensors.iter().filter(|(name, _)| pick(name)), None).unwrap()
    };
    std::fs::write(folder.join("a.safetensors"), shard(&|name| !is_norm(name))).unwrap();
    std::fs::write(folder.join("b.safetensors"), shard(&is_norm)).unwrap();
    std::fs::remove_file(folder.join("model.safetensors")).unwrap();
    let map = |file: &str| {
        let entry = |name: &str| (name.to_owned(), if is_norm(name) { file.into() } else { "a.safetensors".into() });
        let map: serde_json::Map<_, _> = tensors.iter().map(|(name, _)| entry(name)).collect();
        let index = serde_json::json!({ "weight_map": map }).to_string();
        std::fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
        Model::open(&folder)
    };
    let parts = map("b.safetensors").unwrap();
    assert_eq!(parts.weights.vector("model.norm.weight").unwrap(), whole.weights.vector("model.norm.weight").unwrap());
    assert_eq!(parts.info.parameters, whole.info.parameters);
    assert!(map("../b.safetensors").unwrap_err().to_string().contains("expected a file of this folder"));
    assert!(map("c.safetensors").unwrap_err().to_string().contains("has no c.safetensors, which its index lists"));
    assert!(map("a.safetensors").unwrap_err().to_string().contains("has no tensor model.norm.weight"));
}

#[test]
fn damaged_safetensors_are_refused() {
    let scratch = Scratch::new("cut-safetensors");
    let folder = tiny_safetensors(scratch.path(), WeightType::F32, 3);
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    for i in 0..64 {
        std::fs::write(&path, &bytes[..bytes.len() * i / 64]).unwrap();
        let error = Model::open(&folder).unwrap_err();
        assert!(error.to_string().contains("model.safetensors"), "{error}");
    }
}

#[test]
fn both_formats_hold_the_same_network() {
    let scratch = Scratch::new("same");
    let gguf = Model::open(&tiny_gguf(scratch.path(), WeightType::F32, 5)).unwrap();
    let folder = Model::open(&tiny_safetensors(scratch.path(), WeightType::F32, 5)).unwrap();
    let rows = |model: &Model, name: &str| {
        let part = model.weights.part(name).unwrap();
        part.data.chunks(4 * part.cols).map(<[u8]>::to_vec).collect::<Vec<_>>()
    };
    assert_eq!(rows(&gguf, "blk.1.attn_v.weight"), rows(&folder, "model.layers.1.self_attn.v_proj.weight"));
    let (turned, plain) = (rows(&gguf, "blk.1.attn_q.weight"), rows(&folder, "model.layers.1.self_attn.q_proj.weight"));
    assert_eq!((&turned[0], &turned[1], &turned[2]), (&plain[0], &plain[8], &plain[1]));
    assert_eq!(gguf.info.parameters, folder.info.parameters);
}
