//! Reader of GGUF files, versions 2 and 3 (specification: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).
//!
//! ```text
//!   [ magic | version | tensor count | key count ]
//!   [ key, type, value ] ...                          scalars are kept, strings and arrays stay in the file
//!   [ name, dimensions, type, offset ] ...
//!   padding to `general.alignment`
//!   [ tensor data ]                                   <- offsets count from here
//! ```
//!
//! The file is not trusted: every length is compared with what is left of the file before it is used, nothing is
//! allocated in proportion to a count that the file merely claims, and all arithmetic on offsets is checked.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use cupola_kernels::WeightType;

use super::{Tensor, TensorType, Weights};
use crate::error::{Error, Result};
use cupola_kernels::memory::MappedFile;

/// Keys and tensors that a file may have. Real files stay below 100 keys and 3,000 tensors.
const MAX_KEYS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 20;
/// Bytes of a key or tensor name.
const MAX_NAME: usize = 1 << 16;
/// Dimensions of a tensor, and depth of arrays in arrays.
const MAX_DIMS: u32 = 4;
const MAX_NESTING: u32 = 4;

/// One metadata value. Strings and arrays are ranges of the file.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(Range<usize>),
    Array { element: u32, len: usize, range: Range<usize> },
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Value::Unsigned(_) | Value::Signed(_) => "an integer",
            Value::Float(_) => "a float",
            Value::Bool(_) => "a boolean",
            Value::Text(_) => "a string",
            Value::Array { .. } => "an array",
        }
    }
}

/// Metadata of a GGUF file; the bytes stay in the mapping, which [`Gguf::into_weights`] hands on.
pub struct Gguf {
    path: PathBuf,
    file: MappedFile,
    values: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Tensor>,
}

impl Gguf {
    /// Maps and reads a file.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, [`Error::Format`] with the place and the expectation when it is damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let file = super::map(path)?;
        let (values, tensors) = parse(path, file.bytes())?;
        Ok(Self { path: path.to_owned(), file, values, tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors, with the mapping they lie in.
    pub fn into_weights(self) -> Weights {
        Weights::new(vec![(self.path, self.file)], self.tensors)
    }

    /// Shape of a tensor, outermost dimension first.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|t| &t.shape[..])
    }

    /// True when the file has this key.
    pub fn contains(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// True when the value of this key is an array.
    pub fn is_array(&self, key: &str) -> bool {
        matches!(self.values.get(key), Some(Value::Array { .. }))
    }

    /// A non-negative integer of any width.
    ///
    /// # Errors
    /// [`Error::Format`] when the value has another type.
    pub fn integer(&self, key: &str) -> Result<Option<u64>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(v)) => Ok(Some(*v)),
            Some(Value::Signed(v)) => match u64::try_from(*v) {
                Ok(v) => Ok(Some(v)),
                Err(_) => Err(self.format(format!("key {key} is {v}, expected a number that is not negative"))),
            },
            Some(other) => Err(self.mismatch(key, "an integer", other)),
        }
    }

    /// A non-negative integer that must be there and fit `usize`.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Format`].
    pub fn size(&self, key: &str) -> Result<usize> {
        let value = self.integer(key)?.ok_or_else(|| self.missing(key))?;
        usize::try_from(value).map_err(|_| self.format(format!("key {key} is {value}, which is too large")))
    }

    /// A float, or an integer read as one.
    ///
    /// # Errors
    /// [`Error::Format`] when the value has another type.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Float(v)) => Ok(Some(*v)),
            Some(Value::Unsigned(v)) => Ok(Some(*v as f64)),
            Some(Value::Signed(v)) => Ok(Some(*v as f64)),
            Some(other) => Err(self.mismatch(key, "a float", other)),
        }
    }

    /// A boolean.
    ///
    /// # Errors
    /// [`Error::Format`] when the value has another type.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Bool(v)) => Ok(Some(*v)),
            Some(other) => Err(self.mismatch(key, "a boolean", other)),
        }
    }

    /// A string.
    ///
    /// # Errors
    /// [`Error::Format`] when the value has another type or is not UTF-8.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Text(range)) => match std::str::from_utf8(&self.file.bytes()[range.clone()]) {
                Ok(text) => Ok(Some(text)),
                Err(_) => Err(self.format(format!("key {key} is not UTF-8"))),
            },
            Some(other) => Err(self.mismatch(key, "a string", other)),
        }
    }

    /// An array of strings, each as its bytes.
    ///
    /// # Errors
    /// [`Error::Format`] when the value is no such array.
    pub fn texts(&self, key: &str) -> Result<Option<Texts<'_>>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Array { element: STRING, len, range }) => {
                Ok(Some(Texts { bytes: &self.file.bytes()[range.clone()], left: *len }))
            }
            Some(other) => Err(self.mismatch(key, "an array of strings", other)),
        }
    }

    /// An array of numbers (integers of any width or floats), read as f64.
    ///
    /// # Errors
    /// [`Error::Format`] when the value is no such array.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        let Value::Array { element, range, .. } = value else {
            return Err(self.mismatch(key, "an array of numbers", value));
        };
        let Some(width) = scalar_width(*element) else {
            return Err(self.mismatch(key, "an array of numbers", value));
        };
        let number = |raw: &[u8]| match scalar(*element, raw) {
            Value::Unsigned(v) => v as f64,
            Value::Signed(v) => v as f64,
            Value::Float(v) => v,
            Value::Bool(v) => f64::from(u8::from(v)),
            Value::Text(_) | Value::Array { .. } => 0.0,
        };
        Ok(Some(self.file.bytes()[range.clone()].chunks_exact(width).map(number).collect()))
    }

    /// An error that says this file has no such key.
    pub fn missing(&self, key: &str) -> Error {
        Error::Missing { path: self.path.clone(), what: format!("key {key}") }
    }

    /// An error about the content of this file.
    pub fn format(&self, what: String) -> Error {
        Error::Format { path: self.path.clone(), what }
    }

    fn mismatch(&self, key: &str, expected: &str, got: &Value) -> Error {
        self.format(format!("key {key} is {}, expected {expected}", got.kind()))
    }
}

/// Strings of an array, in order, still in the file.
#[derive(Clone, Debug)]
pub struct Texts<'a> {
    bytes: &'a [u8],
    left: usize,
}

impl<'a> Iterator for Texts<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.left = self.left.checked_sub(1)?;
        // The parser walked this array once, so both splits succeed; a `None` ends the iteration all the same.
        let (len, rest) = self.bytes.split_first_chunk::<8>()?;
        let (text, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
        self.bytes = rest;
        Some(text)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Texts<'_> {}

const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// Bytes of a scalar metadata type; `None` for strings, arrays and unknown types.
fn scalar_width(ty: u32) -> Option<usize> {
    match ty {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// Reads a scalar; `raw` has [`scalar_width`] bytes.
fn scalar(ty: u32, raw: &[u8]) -> Value {
    let mut wide = [0; 8];
    wide[..raw.len()].copy_from_slice(raw);
    let bits = u64::from_le_bytes(wide);
    let unused = 64 - 8 * raw.len() as u32;
    match ty {
        1 | 3 | 5 | 11 => Value::Signed((bits << unused) as i64 >> unused),
        6 => Value::Float(f64::from(f32::from_bits(bits as u32))),
        7 => Value::Bool(bits != 0),
        12 => Value::Float(f64::from_bits(bits)),
        _ => Value::Unsigned(bits),
    }
}

/// The weight type behind ggml's number, or its name for the message when nothing here can read it.
fn tensor_type(raw: u32) -> TensorType {
    let known = match raw {
        0 => WeightType::F32,
        1 => WeightType::F16,
        2 => WeightType::Q4_0,
        3 => WeightType::Q4_1,
        6 => WeightType::Q5_0,
        7 => WeightType::Q5_1,
        8 => WeightType::Q8_0,
        10 => WeightType::Q2K,
        11 => WeightType::Q3K,
        12 => WeightType::Q4K,
        13 => WeightType::Q5K,
        14 => WeightType::Q6K,
        20 => WeightType::Iq4Nl,
        23 => WeightType::Iq4Xs,
        30 => WeightType::Bf16,
        _ => return TensorType::Other(other_name(raw)),
    };
    TensorType::Known(known)
}

/// Name of a type that has no kernels.
fn other_name(raw: u32) -> String {
    let name = match raw {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        other => return format!("number {other}"),
    };
    name.to_owned()
}

/// Reads the whole metadata of a file.
pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<(BTreeMap<String, Value>, BTreeMap<String, Tensor>)> {
    Parser { path, bytes, at: 0 }.run()
}

/// What the file says about a tensor before the start of the data is known.
struct Header {
    name: String,
    shape: Vec<usize>,
    ty: u32,
    offset: u64,
}

/// A position in the bytes of a file.
struct Parser<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Parser<'a> {
    fn run(mut self) -> Result<(BTreeMap<String, Value>, BTreeMap<String, Tensor>)> {
        let magic = self.take(4, "the magic number")?;
        if magic != b"GGUF" {
            return Err(self.fail(format!("it starts with {:?}, expected \"GGUF\"", String::from_utf8_lossy(magic))));
        }
        let version = self.u32("the version")?;
        if !matches!(version, 2 | 3) {
            // A big-endian file shows its version in the upper byte.
            return Err(self.fail(format!("its GGUF version is {version}, expected 2 or 3 (little-endian)")));
        }
        let tensor_count = self.count("tensor", MAX_TENSORS)?;
        let key_count = self.count("key", MAX_KEYS)?;

        let mut values = BTreeMap::new();
        for _ in 0..key_count {
            let key = self.name("a key")?;
            let ty = self.u32("the type of a value")?;
            let value = self.value(ty, &key, 0)?;
            if values.insert(key.clone(), value).is_some() {
                return Err(self.fail(format!("key {key} occurs twice")));
            }
        }
        let mut headers = Vec::new();
        for _ in 0..tensor_count {
            headers.push(self.header()?);
        }
        let start = self.data_start(&values)?;
        let alignment = alignment(&values).unwrap_or(1);
        let mut tensors = BTreeMap::new();
        for header in headers {
            let name = header.name.clone();
            let tensor = self.place(header, start, alignment)?;
            if tensors.insert(name.clone(), tensor).is_some() {
                return Err(self.fail(format!("tensor {name} occurs twice")));
            }
        }
        Ok((values, tensors))
    }

    /// First byte of tensor data.
    fn data_start(&self, values: &BTreeMap<String, Value>) -> Result<usize> {
        let Some(alignment) = alignment(values) else {
            return Err(self.fail("general.alignment is not a power of two up to 2^20".to_owned()));
        };
        Ok(self.at.next_multiple_of(alignment))
    }

    fn header(&mut self) -> Result<Header> {
        let name = self.name("a tensor's name")?;
        let dims = self.u32("the number of dimensions")?;
        if dims == 0 || dims > MAX_DIMS {
            return Err(self.fail(format!("tensor {name} has {dims} dimensions, expected 1 to {MAX_DIMS}")));
        }
        let mut shape = Vec::with_capacity(MAX_DIMS as usize);
        for _ in 0..dims {
            let dim = self.u64("a dimension")?;
            match usize::try_from(dim) {
                Ok(dim) if dim > 0 => shape.push(dim),
                _ => return Err(self.fail(format!("tensor {name} has a dimension of {dim}"))),
            }
        }
        // The file lists the innermost dimension first; everybody else here the outermost.
        shape.reverse();
        let ty = self.u32("the type of a tensor")?;
        let offset = self.u64("the offset of a tensor")?;
        Ok(Header { name, shape, ty, offset })
    }

    /// Where a tensor's bytes lie, checked against the size of the file.
    fn place(&self, header: Header, start: usize, alignment: usize) -> Result<Tensor> {
        let Header { name, shape, ty, offset } = header;
        if !offset.is_multiple_of(alignment as u64) {
            return Err(self.fail(format!("tensor {name} lies at offset {offset}, expected a multiple of {alignment}")));
        }
        let begin = usize::try_from(offset).ok().and_then(|offset| start.checked_add(offset));
        let ty = tensor_type(ty);
        let len = match &ty {
            TensorType::Known(ty) => match super::tensor_bytes(*ty, &shape) {
                Some(len) => len,
                None => {
                    return Err(self.fail(format!(
                        "tensor {name} of type {} has shape {shape:?}, which is not possible",
                        ty.name()
                    )));
                }
            },
            // Its size is not known; it may stay where it is as long as nobody asks for it.
            TensorType::Other(_) => 0,
        };
        match begin.and_then(|begin| Some(begin..begin.checked_add(len)?)) {
            Some(range) if range.end <= self.bytes.len() => Ok(Tensor { file: 0, range, shape, ty }),
            _ => Err(self.fail(format!(
                "tensor {name} takes {len} bytes at offset {offset} of the data, but the file has only {} bytes (was it \
                 copied or downloaded completely?)",
                self.bytes.len()
            ))),
        }
    }

    fn value(&mut self, ty: u32, key: &str, depth: u32) -> Result<Value> {
        if let Some(width) = scalar_width(ty) {
            return Ok(scalar(ty, self.take(width, "a value")?));
        }
        match ty {
            STRING => {
                let len = self.len("a string")?;
                let start = self.at;
                self.take(len, "a string")?;
                Ok(Value::Text(start..self.at))
            }
            ARRAY if depth < MAX_NESTING => {
                let element = self.u32("the type of an array")?;
                let len = self.len("an array")?;
                let start = self.at;
                match scalar_width(element) {
                    Some(width) => {
                        let bytes = len.checked_mul(width).ok_or_else(|| self.overflow(key))?;
                        self.take(bytes, "an array")?;
                    }
                    // Each element takes at least 8 bytes, so the end of the file bounds this loop whatever `len` says.
                    None => {
                        for _ in 0..len {
                            self.value(element, key, depth + 1)?;
                        }
                    }
                }
                Ok(Value::Array { element, len, range: start..self.at })
            }
            ARRAY => Err(self.fail(format!("key {key} nests arrays deeper than {MAX_NESTING}"))),
            other => Err(self.fail(format!("key {key} has value type {other}, expected 0 to 12"))),
        }
    }

    fn name(&mut self, what: &str) -> Result<String> {
        let len = self.len(what)?;
        if len > MAX_NAME {
            return Err(self.fail(format!("{what} has {len} bytes, expected at most {MAX_NAME}")));
        }
        match std::str::from_utf8(self.take(len, what)?) {
            Ok(name) => Ok(name.to_owned()),
            Err(_) => Err(self.fail(format!("{what} before byte {} is not UTF-8", self.at))),
        }
    }

    fn count(&mut self, what: &str, max: u64) -> Result<u64> {
        let count = self.u64("a count")?;
        if count > max {
            return Err(self.fail(format!("its {what} count is {count}, expected at most {max}")));
        }
        Ok(count)
    }

    /// A length in bytes or elements that the rest of the file could hold.
    fn len(&mut self, what: &str) -> Result<usize> {
        let len = self.u64(what)?;
        let left = self.bytes.len() - self.at;
        match usize::try_from(len) {
            Ok(len) if len <= left => Ok(len),
            _ => Err(self.fail(format!("{what} at byte {} has length {len}, but only {left} bytes follow", self.at))),
        }
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        let mut raw = [0; 4];
        raw.copy_from_slice(self.take(4, what)?);
        Ok(u32::from_le_bytes(raw))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        let mut raw = [0; 8];
        raw.copy_from_slice(self.take(8, what)?);
        Ok(u64::from_le_bytes(raw))
    }

    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8]> {
        match self.bytes[self.at..].split_at_checked(len) {
            Some((taken, _)) => {
                self.at += len;
                Ok(taken)
            }
            None => Err(self.fail(format!("it ends at byte {} within {what}", self.bytes.len()))),
        }
    }

    fn overflow(&self, key: &str) -> Error {
        self.fail(format!("key {key} has a length that overflows"))
    }

    fn fail(&self, what: String) -> Error {
        Error::Format { path: self.path.to_owned(), what }
    }
}

/// `general.alignment`, 32 when absent; `None` when it is not a power of two up to 1 MiB.
fn alignment(values: &BTreeMap<String, Value>) -> Option<usize> {
    match values.get("general.alignment") {
        None => Some(32),
        Some(Value::Unsigned(v)) if v.is_power_of_two() && *v <= 1 << 20 => usize::try_from(*v).ok(),
        Some(_) => None,
    }
}
