//! Writer of small GGUF files, for tests.

use cupola_kernels::WeightType;
use half::f16;

/// A metadata value to write.
#[derive(Clone, Debug)]
pub(crate) enum Item {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    #[cfg(test)]
    F32s(Vec<f32>),
}

/// A GGUF file in the making. Nothing is checked, so that tests can write wrong ones.
#[derive(Clone, Debug)]
pub(crate) struct GgufWriter {
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
    pub(crate) alignment: usize,
    pub(crate) keys: Vec<(String, Item)>,
    pub(crate) tensors: Vec<TensorItem>,
}

/// A tensor to write.
#[derive(Clone, Debug)]
pub(crate) struct TensorItem {
    pub(crate) name: String,
    /// Outermost dimension first.
    pub(crate) shape: Vec<u64>,
    /// ggml's number of the type.
    pub(crate) ty: u32,
    pub(crate) data: Vec<u8>,
}

impl GgufWriter {
    pub(crate) fn new() -> Self {
        Self { magic: *b"GGUF", version: 3, alignment: 32, keys: Vec::new(), tensors: Vec::new() }
    }

    pub(crate) fn key(&mut self, key: &str, item: Item) -> &mut Self {
        self.keys.push((key.to_owned(), item));
        self
    }

    pub(crate) fn u32(&mut self, key: &str, value: u32) -> &mut Self {
        self.key(key, Item::U32(value))
    }

    pub(crate) fn text(&mut self, key: &str, value: &str) -> &mut Self {
        self.key(key, Item::Text(value.to_owned()))
    }

    /// Adds a tensor of f32 values, encoded in a type.
    pub(crate) fn tensor(&mut self, name: &str, shape: &[usize], ty: WeightType, values: &[f32]) -> &mut Self {
        self.tensors.push(TensorItem {
            name: name.to_owned(),
            shape: shape.iter().map(|&d| d as u64).collect(),
            ty: type_number(ty),
            data: encode(ty, values),
        });
        self
    }

    pub(crate) fn finish(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(self.magic);
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, item) in &self.keys {
            put_text(&mut out, key);
            put_item(&mut out, item);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            put_text(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(tensor.ty.to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset = (offset + tensor.data.len()).next_multiple_of(self.alignment);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&tensor.data);
        }
        out
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_item(out: &mut Vec<u8>, item: &Item) {
    let array = |out: &mut Vec<u8>, element: u32, len: usize| {
        out.extend(9u32.to_le_bytes());
        out.extend(element.to_le_bytes());
        out.extend((len as u64).to_le_bytes());
    };
    match item {
        Item::U32(value) => {
            out.extend(4u32.to_le_bytes());
            out.extend(value.to_le_bytes());
        }
        Item::F32(value) => {
            out.extend(6u32.to_le_bytes());
            out.extend(value.to_le_bytes());
        }
        Item::Bool(value) => {
            out.extend(7u32.to_le_bytes());
            out.push(u8::from(*value));
        }
        Item::Text(value) => {
            out.extend(8u32.to_le_bytes());
            put_text(out, value);
        }
        Item::Texts(values) => {
            array(out, 8, values.len());
            values.iter().for_each(|value| put_text(out, value));
        }
        Item::I32s(values) => {
            array(out, 5, values.len());
            values.iter().for_each(|value| out.extend(value.to_le_bytes()));
        }
        #[cfg(test)]
        Item::F32s(values) => {
            array(out, 6, values.len());
            values.iter().for_each(|value| out.extend(value.to_le_bytes()));
        }
    }
}

/// ggml's number of a type.
fn type_number(ty: WeightType) -> u32 {
    match ty {
        WeightType::F32 => 0,
        WeightType::F16 => 1,
        WeightType::Q4_0 => 2,
        WeightType::Q4_1 => 3,
        WeightType::Q8_0 => 8,
        WeightType::Bf16 => 30,
        other => panic!("no writer for {}", other.name()),
    }
}

/// Values in a weight type; a block format wants whole blocks.
pub(crate) fn encode(ty: WeightType, values: &[f32]) -> Vec<u8> {
    let blocks = values.chunks_exact(32);
    match ty {
        WeightType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        WeightType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        WeightType::Bf16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        WeightType::Q8_0 => blocks.flat_map(q8_0).collect(),
        WeightType::Q4_0 => blocks.flat_map(q4_0).collect(),
        WeightType::Q4_1 => blocks.flat_map(q4_1).collect(),
        other => panic!("no writer for {}", other.name()),
    }
}

fn largest(block: &[f32]) -> f32 {
    block.iter().fold(0.0, |max: f32, v| max.max(v.abs()))
}

fn q8_0(block: &[f32]) -> Vec<u8> {
    let scale = f16::from_f32(largest(block) / 127.0);
    let step = scale.to_f32().max(f32::MIN_POSITIVE);
    let mut out = scale.to_le_bytes().to_vec();
    out.extend(block.iter().map(|v| (v / step).round().clamp(-127.0, 127.0) as i8 as u8));
    out
}

/// Nibble `j` of the low half is value `j`, of the high half value `j + 16`.
fn nibbles(block: &[f32], quantise: impl Fn(f32) -> u8) -> impl Iterator<Item = u8> {
    (0..16).map(move |j| quantise(block[j]) | quantise(block[j + 16]) << 4)
}

fn q4_0(block: &[f32]) -> Vec<u8> {
    let scale = f16::from_f32(largest(block) / 7.0);
    let step = scale.to_f32().max(f32::MIN_POSITIVE);
    let mut out = scale.to_le_bytes().to_vec();
    out.extend(nibbles(block, |v| ((v / step).round() + 8.0).clamp(0.0, 15.0) as u8));
    out
}

fn q4_1(block: &[f32]) -> Vec<u8> {
    let (low, high) = block.iter().fold((f32::MAX, f32::MIN), |(low, high), v| (low.min(*v), high.max(*v)));
    let (scale, min) = (f16::from_f32((high - low) / 15.0), f16::from_f32(low));
    let step = scale.to_f32().max(f32::MIN_POSITIVE);
    let mut out = scale.to_le_bytes().to_vec();
    out.extend(min.to_le_bytes());
    out.extend(nibbles(block, |v| ((v - min.to_f32()) / step).round().clamp(0.0, 15.0) as u8));
    out
}
