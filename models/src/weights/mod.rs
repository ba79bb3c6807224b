//! Weight tensors by name, mapped and still in their file format.
//!
//! ```text
//!   model.gguf            --gguf-->        \
//!                                            Weights { name -> (file, byte range, shape, type) }
//!   *.safetensors (1..n)  --safetensors--> /          |
//!                                           part(name) -> WeightPart   bytes in place, for Backend::load_linear
//!                                           vector(name) -> Vec<f32>   norms and biases
//!                                           release(name)              the pages may go once packed
//! ```

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use cupola_kernels::memory::MappedFile;
use cupola_kernels::{WeightPart, WeightType};
use half::{bf16, f16};

use crate::error::{Error, Result};

pub mod gguf;
pub mod safetensors;
#[cfg(test)]
mod tests;
#[cfg(any(test, feature = "testing"))]
pub(crate) mod writer;

/// Element type of a stored tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TensorType {
    /// One that the kernels read.
    Known(WeightType),
    /// Any other, by name; an error only when the tensor is used.
    Other(String),
}

impl TensorType {
    /// Its name as the file format writes it.
    pub fn name(&self) -> &str {
        match self {
            TensorType::Known(ty) => ty.name(),
            TensorType::Other(name) => name,
        }
    }
}

/// Where one tensor lies.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    /// Index of the file.
    pub(crate) file: usize,
    /// Its bytes within the file; checked by the reader.
    pub(crate) range: Range<usize>,
    /// Outermost dimension first.
    pub(crate) shape: Vec<usize>,
    pub(crate) ty: TensorType,
}

/// Tensors by name.
pub struct Weights {
    files: Vec<(PathBuf, MappedFile)>,
    tensors: BTreeMap<String, Tensor>,
}

impl Weights {
    pub(crate) fn new(files: Vec<(PathBuf, MappedFile)>, tensors: BTreeMap<String, Tensor>) -> Self {
        Self { files, tensors }
    }

    /// The file that messages about these tensors name: the only one, or the first of several.
    pub fn path(&self) -> &Path {
        self.files.first().map_or(Path::new(""), |(path, _)| path)
    }

    /// A number that stands for these files as they are now: their sizes and times of change.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that is gone.
    pub fn fingerprint(&self) -> Result<u64> {
        let mut facts = Vec::new();
        for (path, _) in &self.files {
            let io = |source| Error::Io { path: path.clone(), source };
            let metadata = std::fs::metadata(path).map_err(io)?;
            // A file without a time, or from before 1970, has only its size.
            let changed = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
            facts.extend(metadata.len().to_le_bytes());
            facts.extend(changed.map_or(0, |time| time.as_nanos()).to_le_bytes());
        }
        Ok(cupola_kernels::cpu::checksum(&facts))
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// True when there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Shape of a tensor, outermost dimension first (`[rows, cols]` for a matrix).
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|t| &t.shape[..])
    }

    /// Element type of a tensor.
    pub fn tensor_type(&self, name: &str) -> Option<&TensorType> {
        self.tensors.get(name).map(|t| &t.ty)
    }

    /// Bytes of a tensor in its file; 0 where the type is not known.
    pub fn bytes(&self, name: &str) -> Option<usize> {
        self.tensors.get(name).map(|t| t.range.len())
    }

    /// A matrix `[rows, cols]`, in place.
    ///
    /// # Errors
    /// [`Error::Missing`] without such a tensor, [`Error::Unsupported`] for a type without kernels, [`Error::Format`]
    /// when it is not a matrix.
    pub fn part(&self, name: &str) -> Result<WeightPart<'_>> {
        let (tensor, ty) = self.known(name)?;
        let &[rows, cols] = &tensor.shape[..] else {
            return Err(self.wrong_shape(name, tensor, "[rows, cols]"));
        };
        Ok(WeightPart { ty, rows, cols, data: self.data(tensor) })
    }

    /// A vector, converted to f32.
    ///
    /// # Errors
    /// As [`Weights::part`]; [`Error::Unsupported`] also for block formats.
    pub fn vector(&self, name: &str) -> Result<Vec<f32>> {
        let (tensor, ty) = self.known(name)?;
        if tensor.shape.len() != 1 {
            return Err(self.wrong_shape(name, tensor, "[values]"));
        }
        let data = self.data(tensor);
        match ty {
            WeightType::F32 => Ok(data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
            WeightType::F16 => Ok(data.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect()),
            WeightType::Bf16 => Ok(data.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()),
            other => Err(Error::Unsupported {
                what: format!("tensor {name} of type {}", other.name()),
                hint: "a vector is read as F32, F16 or BF16".to_owned(),
            }),
        }
    }

    /// Says that the pages of this tensor are not needed any more; reading it again is slow, not wrong.
    pub fn release(&self, name: &str) {
        if let Some(tensor) = self.tensors.get(name) {
            self.files[tensor.file].1.release(tensor.range.clone());
        }
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|t| t.range.len() as u64).sum()
    }

    /// Bytes of all tensors once their matrices are packed for the kernels.
    pub fn packed_bytes(&self) -> u64 {
        self.bytes_as(&|ty, rows, cols| ty.packed_bytes(rows, cols))
    }

    /// Bytes of all tensors once their matrices take `matrix(type, rows, columns)` bytes; vectors, and matrices that this
    /// gives nothing for, as in their files.
    pub fn bytes_as(&self, matrix: &dyn Fn(WeightType, usize, usize) -> Option<usize>) -> u64 {
        let bytes = |tensor: &Tensor| {
            let packed = match (&tensor.ty, &tensor.shape[..]) {
                (TensorType::Known(ty), &[rows, cols]) => matrix(*ty, rows, cols),
                _ => None,
            };
            packed.unwrap_or(tensor.range.len()) as u64
        };
        self.tensors.values().map(bytes).sum()
    }

    /// Number of values in all tensors.
    pub fn parameters(&self) -> u64 {
        self.tensors.values().map(|t| t.shape.iter().map(|&d| d as u64).fold(1, u64::saturating_mul)).sum()
    }

    /// The type that most bytes of matrices have.
    pub fn dominant_type(&self) -> String {
        let mut bytes: BTreeMap<&str, u128> = BTreeMap::new();
        for tensor in self.tensors.values().filter(|t| t.shape.len() > 1) {
            // Unknown types have no size here: count a byte a value.
            let size = match tensor.ty {
                TensorType::Known(_) => tensor.range.len() as u128,
                TensorType::Other(_) => tensor.shape.iter().map(|&d| d as u128).product(),
            };
            *bytes.entry(tensor.ty.name()).or_default() += size;
        }
        bytes.into_iter().max_by_key(|(_, bytes)| *bytes).map_or_else(|| "none".to_owned(), |(name, _)| name.to_owned())
    }

    fn data(&self, tensor: &Tensor) -> &[u8] {
        &self.files[tensor.file].1.bytes()[tensor.range.clone()]
    }

    fn known(&self, name: &str) -> Result<(&Tensor, WeightType)> {
        let Some(tensor) = self.tensors.get(name) else {
            return Err(Error::Missing { path: self.path().to_owned(), what: format!("tensor {name}") });
        };
        match &tensor.ty {
            TensorType::Known(ty) => Ok((tensor, *ty)),
            TensorType::Other(other) => Err(Error::Unsupported {
                what: format!("tensor {name} of type {other}"),
                hint: format!("choose a file in {}", known_types()),
            }),
        }
    }

    fn wrong_shape(&self, name: &str, tensor: &Tensor, expected: &str) -> Error {
        Error::Format {
            path: self.files[tensor.file].0.clone(),
            what: format!("tensor {name} has shape {:?}, expected {expected}", tensor.shape),
        }
    }
}

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Weights").field("files", &self.files.len()).field("tensors", &self.tensors.len()).finish()
    }
}

/// Names of the types that the kernels read.
fn known_types() -> String {
    WeightType::ALL.map(WeightType::name).join(", ")
}

/// Maps a file.
pub(crate) fn map(path: &Path) -> Result<MappedFile> {
    Ok(MappedFile::open(path)?)
}

/// Bytes of a tensor; `None` when its rows are not whole blocks or the size overflows.
pub(crate) fn tensor_bytes(ty: WeightType, shape: &[usize]) -> Option<usize> {
    let (cols, outer) = shape.split_last()?;
    outer.iter().try_fold(ty.row_bytes(*cols)?, |bytes, dim| bytes.checked_mul(*dim))
}
