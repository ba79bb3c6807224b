//! Weights of a folder of safetensors files (format: <https://github.com/huggingface/safetensors#format>).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ::safetensors::{Dtype, SafeTensorError, SafeTensors};
use cupola_kernels::WeightType;
use serde_json::Value;

use super::{Tensor, TensorType, Weights, map};
use crate::config::HfConfig;
use crate::error::{Error, Result};
use crate::model::files_with_extension;

/// Maps all weight files of a folder: those that `model.safetensors.index.json` lists, else `model.safetensors`, else
/// every `*.safetensors`. Returns the files as well.
///
/// # Errors
/// [`Error::Missing`] without any, [`Error::Format`] for a damaged one or a tensor that occurs twice.
pub(crate) fn open_folder(folder: &Path) -> Result<(Weights, Vec<PathBuf>)> {
    let paths = weight_files(folder)?;
    let mut files = Vec::with_capacity(paths.len());
    let mut tensors = BTreeMap::new();
    for path in &paths {
        let file = map(path)?;
        let fail = |what: String| Error::Format { path: path.clone(), what };
        // The library checks that the tensors fill the file without gaps and match their shapes and types.
        let (header, metadata) = SafeTensors::read_metadata(file.bytes()).map_err(|e| match e {
            SafeTensorError::MetadataIncompleteBuffer => {
                fail("its length is not what its header says (was it copied or downloaded completely?)".to_owned())
            }
            other => fail(other.to_string()),
        })?;
        let start = 8 + header;
        for (name, info) in metadata.tensors() {
            let (begin, end) = info.data_offsets;
            let tensor = Tensor {
                file: files.len(),
                range: start + begin..start + end,
                shape: info.shape.clone(),
                ty: tensor_type(info.dtype),
            };
            if tensors.insert(name.clone(), tensor).is_some() {
                return Err(fail(format!("tensor {name} is in another file of the folder too")));
            }
        }
        files.push((path.clone(), file));
    }
    Ok((Weights::new(files, tensors), paths))
}

fn tensor_type(dtype: Dtype) -> TensorType {
    match dtype {
        Dtype::F32 => TensorType::Known(WeightType::F32),
        Dtype::F16 => TensorType::Known(WeightType::F16),
        Dtype::BF16 => TensorType::Known(WeightType::Bf16),
        other => TensorType::Other(other.to_string()),
    }
}

/// The weight files of a folder, as [`open_folder`] chooses them.
pub(crate) fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    if let Some(index) = HfConfig::read_optional(&folder.join("model.safetensors.index.json"))? {
        let map = index.get("weight_map").and_then(Value::as_object);
        let bad = |what: String| Error::Format { path: index.path().to_owned(), what };
        let mut names = BTreeSet::new();
        for file in map.ok_or_else(|| bad("expected an object weight_map".into()))?.values() {
            match file.as_str() {
                // Only files of this very folder: an index must not point elsewhere.
                Some(name) if Path::new(name).file_name().is_some_and(|n| n == name) => names.insert(name),
                _ => return Err(bad(format!("weight_map names {file}, expected a file of this folder"))),
            };
        }
        if let Some(name) = names.iter().find(|name| !folder.join(name).exists()) {
            return Err(Error::Missing { path: folder.to_owned(), what: format!("{name}, which its index lists") });
        }
        return Ok(names.into_iter().map(|name| folder.join(name)).collect());
    }
    let single = folder.join("model.safetensors");
    let found = if single.exists() { vec![single] } else { files_with_extension(folder, "safetensors")? };
    if found.is_empty() {
        return Err(Error::Missing { path: folder.to_owned(), what: "*.safetensors file".into() });
    }
    Ok(found)
}
