//! What a model is on disk, and what it becomes in memory.
//!
//! ```text
//!   "smollm2-135m-instruct"                     hub        a name -> a file or folder on this machine
//!           |
//!   model.gguf | config.json + *.safetensors    weights    tensors by name, still in their file format
//!           |                                   arch       metadata -> DecoderSpec (plain data)
//!           |                                   tokenizer  text <-> token ids;   template  messages -> prompt
//!           v
//!   (dummy: random weights of the shapes of a config.json, for measuring speed)
//!   Model --Decoder::load(backend)--> Decoder   decoder    the one forward pass, over kernels::Backend
//! ```

mod arch;
pub mod batch;
pub mod config;
pub mod decoder;
pub mod dummy;
pub mod error;
pub mod hub;
mod last_rows;
mod layers;
mod model;
pub mod spec;
pub mod template;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod tokenizer;
pub mod weights;

pub use batch::Batch;
pub use decoder::{Decoder, DecoderLimits};
pub use error::{Error, Result};
pub use model::{GenerationDefaults, Model, ModelInfo};
pub use spec::DecoderSpec;
pub use template::ChatTemplate;
pub use tokenizer::{Part, Tokenizer};
pub use weights::Weights;
