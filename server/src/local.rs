//! The model this server runs itself: its names, its tokenizer and template, and the engine that computes for it.
//!
//! ```text
//!   messages --template--> text --tokenizer--> prompts --engine--> n streams of events --merged--> Generation
//!                                              ^ permits are taken before any of this
//! ```

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use cupola_engine::EngineHandle;
use cupola_models::{ChatTemplate, GenerationDefaults, ModelInfo, Tokenizer};
use tokio::sync::Semaphore;

use crate::error::ApiError;

/// Texts longer than this are tokenised away from the threads that serve HTTP: 4 KiB take well under a millisecond.
const INLINE_BYTES: usize = 4096;
/// Large texts in work at the same time.
const LARGE_TEXTS: usize = 2;

/// Seconds since 1970.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A model with everything a request needs of it.
pub struct LocalModel {
    /// Names it answers to; the first one is how it calls itself.
    pub names: Vec<String>,
    /// The running engine.
    pub engine: EngineHandle,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// How messages become a prompt; absent: no chat.
    pub template: Option<Arc<ChatTemplate>>,
    /// What the model file says.
    pub info: ModelInfo,
    /// Sampling defaults of the model.
    pub defaults: GenerationDefaults,
    /// When it was loaded, in seconds since 1970.
    created: u64,
    /// Bytes of the longest token: no text has fewer tokens than its bytes divided by this.
    longest_token: usize,
    large_texts: Arc<Semaphore>,
}

impl LocalModel {
    /// Puts a model together. `names` must not be empty; the first one is shown.
    ///
    /// # Panics
    /// When `names` is empty.
    pub fn new(
        names: Vec<String>,
        engine: EngineHandle,
        tokenizer: Tokenizer,
        template: Option<ChatTemplate>,
        info: ModelInfo,
    ) -> Self {
        assert!(!names.is_empty(), "a served model has at least one name");
        let ids = 0..u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
        let longest_token = ids.map(|id| tokenizer.token_bytes(id).len()).max().unwrap_or(0).max(1);
        Self {
            names,
            engine,
            tokenizer,
            template: template.map(Arc::new),
            defaults: info.generation,
            info,
            created: unix_now(),
            longest_token,
            large_texts: Arc::new(Semaphore::new(LARGE_TEXTS)),
        }
    }

    /// The name it calls itself.
    pub fn name(&self) -> &str {
        &self.names[0]
    }

    /// When it was loaded, in seconds since 1970.
    pub fn created(&self) -> u64 {
        self.created
    }

    /// Checks the `model` field of a request; absent or empty means this model.
    ///
    /// # Errors
    /// [`ApiError::ModelNotFound`].
    pub fn check_name(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked {
            None | Some("") => Ok(()),
            Some(name) if self.names.iter().any(|known| known == name) => Ok(()),
            Some(name) => {
                let model = name.chars().take(200).collect();
                Err(ApiError::ModelNotFound { model, available: self.names.clone() })
            }
        }
    }

    /// Refuses a text that cannot fit the context whatever its tokens are, without looking at it.
    ///
    /// # Errors
    /// [`ApiError::ContextLength`] with the fewest tokens the text can have.
    pub fn check_size(&self, bytes: usize, answer: usize, param: &'static str) -> Result<(), ApiError> {
        let fewest = bytes / self.longest_token;
        let max = self.engine.max_model_len();
        if fewest <= max {
            return Ok(());
        }
        Err(ApiError::ContextLength { param, prompt: fewest, completion: answer, max, exact: false })
    }

    /// Runs `work` on this thread when `size` bytes are few, and on a thread for blocking work when they are not; no
    /// more than a few at a time there, so that large texts queue up among themselves.
    ///
    /// # Errors
    /// What `work` returns; [`ApiError::Internal`] when it panics.
    pub async fn work<T: Send + 'static>(
        &self,
        size: usize,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        if size <= INLINE_BYTES {
            return work();
        }
        let turn = Arc::clone(&self.large_texts).acquire_owned().await.map_err(|_| ApiError::Internal)?;
        // The turn goes along: a client that leaves does not stop the work, so it must not free the place either.
        let done = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work()
        });
        done.await.unwrap_or(Err(ApiError::Internal))
    }
}
