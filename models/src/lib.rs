//! What a model is on disk, and what it becomes in memory.
//!
//! ```text
//!   "smollm2-135m-instruct"                     hub        a name -> a file or folder on this machine
//!           |
//!   model.gguf | config.json + *.safetensors    weights    tensors by name, still in their file format
//!           |                                   arch       metadata -> DecoderSpec (plain data)
//!           |                                   tokenizer  text <-> token ids;   template  messages -> prompt
//!           v
//!   Model --Decoder::load(backend)--> Decoder   decoder    the one forward pass, over kernels::Backend
//! ```

pub mod batch;
pub mod error;
pub mod spec;

pub use batch::Batch;
pub use error::{Error, Result};
pub use spec::DecoderSpec;
