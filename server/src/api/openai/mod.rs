//! OpenAI's routes.
//!
//! ```text
//!   body --request--> GenerationRequest --params--> Params ---------\
//!                            \---------prompt--> token ids ----------> generation --> chat | completions --wire--> body
//! ```

pub(crate) mod chat;
pub(crate) mod completions;
mod guard;
pub(crate) mod logprobs;
pub(crate) mod models;
pub(crate) mod params;
pub(crate) mod prompt;
pub(crate) mod request;
mod streamed;
pub(crate) mod wire;
