//! What can go wrong with a request, and the one place that turns it into a status and OpenAI's error body.

use std::time::Duration;

use axum::response::{IntoResponse, Response};
use cupola_engine::SubmitError;
use http::{HeaderValue, StatusCode, header};
use serde_json::{Value, json};

/// Why a request gets no answer. Every variant says what was expected and what came.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApiError {
    /// The body is not JSON at all.
    #[error("the request body is not valid JSON: {reason}")]
    Json {
        /// What the parser said, with line and column.
        reason: String,
    },
    /// A field is missing, has the wrong type or a value that means nothing.
    #[error("{message}")]
    Field {
        /// JSON path of the field, such as `messages[0].role`.
        param: String,
        /// One sentence.
        message: String,
    },
    /// A field asks for something this server cannot do.
    #[error("{feature} is not supported yet; leave `{param}` out")]
    Unsupported {
        /// JSON path of the field.
        param: String,
        /// What was asked for.
        feature: &'static str,
    },
    /// Prompt and answer do not fit the context.
    #[error("{}", context_message(*.prompt, *.completion, *.max, *.exact))]
    ContextLength {
        /// `prompt` or `messages`.
        param: &'static str,
        /// Prompt tokens; at least this many when not exact.
        prompt: usize,
        /// Tokens asked for beside the prompt.
        completion: usize,
        /// The context length.
        max: usize,
        /// False when the prompt was refused by its size in bytes, before it was cut into tokens.
        exact: bool,
    },
    /// No model of this name.
    #[error("the model `{model}` does not exist here; this server has {}", names(.available))]
    ModelNotFound {
        /// The name as given.
        model: String,
        /// The names that exist.
        available: Vec<String>,
    },
    /// A chat with a model that has no chat template.
    #[error(
        "the model `{model}` has no chat template, so messages cannot be turned into a prompt; start the server with \
         --chat-template FILE, or use /v1/completions"
    )]
    NoChatTemplate {
        /// The model.
        model: String,
    },
    /// The chat template refused the messages.
    #[error("the model's chat template cannot render these messages: {reason}")]
    Template {
        /// What the template said.
        reason: String,
    },
    /// No key was sent.
    #[error("this server needs an API key: send it as `Authorization: Bearer KEY`")]
    MissingKey,
    /// The key is not one of ours.
    #[error("the API key is not known to this server")]
    InvalidKey,
    /// The `Host` header names another site.
    #[error(
        "the Host header `{host}` does not name this machine; a server on a loopback address answers only to localhost \
         (start it with --allowed-host to accept more names)"
    )]
    Host {
        /// The header as given.
        host: String,
    },
    /// No such route.
    #[error("there is no route {path}")]
    NoRoute {
        /// The path as given.
        path: String,
    },
    /// The route exists for other methods.
    #[error("{path} does not take {method}")]
    Method {
        /// The method as given.
        method: String,
        /// The path as given.
        path: String,
    },
    /// The body is not declared as JSON.
    #[error("the body must be sent with `Content-Type: application/json`, got {got}")]
    MediaType {
        /// The header as given, or "none".
        got: String,
    },
    /// The body is larger than the limit.
    #[error("the request body is larger than the {limit} bytes this server takes")]
    BodyTooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// The body did not arrive in time.
    #[error("the request body did not arrive within {} seconds", .limit.as_secs())]
    BodyTimeout {
        /// The limit.
        limit: Duration,
    },
    /// The connection failed while the body was read.
    #[error("the request body could not be read: {reason}")]
    BodyRead {
        /// What the connection said.
        reason: String,
    },
    /// The queue is full.
    #[error(
        "the server is busy: {queued} {unit} are waiting and at most {limit} may; try again in {} s",
        seconds(*.retry_after)
    )]
    Overloaded {
        /// Requests or tokens waiting.
        queued: usize,
        /// The limit on them.
        limit: usize,
        /// `requests` or `prompt tokens`.
        unit: &'static str,
        /// When there may be room.
        retry_after: Duration,
    },
    /// The server is shutting down.
    #[error("the server is shutting down and takes no new requests")]
    Draining,
    /// The server is shutting down and cut this request off.
    #[error("the server shut down before the answer was complete")]
    CutOff,
    /// The engine thread has ended.
    #[error("the inference engine has stopped; the server must be restarted")]
    EngineDead,
    /// The engine gave this request up.
    #[error("{message}")]
    Generation {
        /// One sentence for the client.
        message: String,
    },
    /// A bug.
    #[error("an internal error occurred; the server's log has more under this request id")]
    Internal,
}

fn context_message(prompt: usize, completion: usize, max: usize, exact: bool) -> String {
    let least = if exact { "" } else { "at least " };
    format!(
        "This model's maximum context length is {max} tokens. However, you requested {least}{} tokens ({least}{prompt} in \
         the prompt, {completion} in the completion). Shorten the prompt or ask for fewer tokens.",
        prompt + completion
    )
}

fn names(available: &[String]) -> String {
    available.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

fn seconds(wait: Duration) -> u64 {
    wait.as_secs() + u64::from(wait.subsec_nanos() > 0 || wait.is_zero())
}

impl ApiError {
    /// A field with a wrong value.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Field { param: param.into(), message: message.into() }
    }

    /// A feature that does not exist yet.
    pub fn unsupported(param: impl Into<String>, feature: &'static str) -> Self {
        Self::Unsupported { param: param.into(), feature }
    }

    /// What the engine's refusal means to the client. `param` is the field that holds the prompt.
    pub fn from_submit(error: SubmitError, param: &'static str) -> Self {
        match error {
            SubmitError::QueueFull { queued, limit, unit, retry_after } => {
                Self::Overloaded { queued, limit, unit, retry_after }
            }
            SubmitError::PromptTooLong { prompt, max } => {
                Self::ContextLength { param, prompt, completion: 1, max, exact: true }
            }
            SubmitError::Empty => Self::field(param, "the prompt must have at least one token"),
            SubmitError::InvalidParameter { name, message } => Self::field(name, format!("`{name}` {message}")),
            SubmitError::ShuttingDown => Self::Draining,
            SubmitError::Dead => Self::EngineDead,
            other => Self::field(param, format!("`{param}`: {other}")),
        }
    }

    /// The HTTP status of this error.
    pub fn status(&self) -> StatusCode {
        self.facts().0
    }

    /// Status, OpenAI `type` and `code`: the one match that decides them.
    fn facts(&self) -> (StatusCode, &'static str, &'static str) {
        const INVALID: &str = "invalid_request_error";
        match self {
            Self::Json { .. } => (StatusCode::BAD_REQUEST, INVALID, "invalid_json"),
            Self::Field { .. } => (StatusCode::BAD_REQUEST, INVALID, "invalid_value"),
            Self::Unsupported { .. } => (StatusCode::BAD_REQUEST, INVALID, "unsupported_parameter"),
            Self::ContextLength { .. } => (StatusCode::BAD_REQUEST, INVALID, "context_length_exceeded"),
            Self::ModelNotFound { .. } => (StatusCode::NOT_FOUND, INVALID, "model_not_found"),
            Self::NoChatTemplate { .. } => (StatusCode::BAD_REQUEST, INVALID, "no_chat_template"),
            Self::Template { .. } => (StatusCode::BAD_REQUEST, INVALID, "chat_template_error"),
            Self::MissingKey => (StatusCode::UNAUTHORIZED, "authentication_error", "missing_api_key"),
            Self::InvalidKey => (StatusCode::UNAUTHORIZED, "authentication_error", "invalid_api_key"),
            Self::Host { .. } => (StatusCode::FORBIDDEN, "permission_error", "host_not_allowed"),
            Self::NoRoute { .. } => (StatusCode::NOT_FOUND, INVALID, "route_not_found"),
            Self::Method { .. } => (StatusCode::METHOD_NOT_ALLOWED, INVALID, "method_not_allowed"),
            Self::MediaType { .. } => (StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID, "unsupported_media_type"),
            Self::BodyTooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, INVALID, "body_too_large"),
            Self::BodyTimeout { .. } => (StatusCode::REQUEST_TIMEOUT, INVALID, "body_timeout"),
            Self::BodyRead { .. } => (StatusCode::BAD_REQUEST, INVALID, "body_unreadable"),
            Self::Overloaded { .. } => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "server_overloaded"),
            Self::Draining => (StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", "server_draining"),
            Self::CutOff => (StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", "server_shutdown"),
            Self::EngineDead => (StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", "engine_dead"),
            Self::Generation { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "server_error", "generation_failed"),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "server_error", "internal_error"),
        }
    }

    /// The machine-readable code; also the `reason` label of the rejection metric.
    pub fn code(&self) -> &'static str {
        self.facts().2
    }

    /// The field at fault.
    fn param(&self) -> Option<&str> {
        match self {
            Self::Field { param, .. } | Self::Unsupported { param, .. } => Some(param),
            Self::ContextLength { param, .. } => Some(param),
            Self::ModelNotFound { .. } => Some("model"),
            Self::NoChatTemplate { .. } | Self::Template { .. } => Some("messages"),
            _ => None,
        }
    }

    /// How long to wait before trying again, for errors that pass.
    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Overloaded { retry_after, .. } => Some(*retry_after),
            Self::Draining | Self::CutOff => Some(Duration::from_secs(5)),
            _ => None,
        }
    }

    /// `{"error": {...}}` as OpenAI writes it; `code` and `param` are a string or null.
    pub fn body(&self) -> Value {
        let (_, kind, code) = self.facts();
        let mut error = json!({"message": self.to_string(), "type": kind, "param": self.param(), "code": code});
        if let Self::ContextLength { prompt, max, .. } = self {
            error["n_prompt_tokens"] = (*prompt).into();
            error["n_ctx"] = (*max).into();
        }
        json!({ "error": error })
    }
}

/// Left in a response's extensions for the log line and the rejection metric.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ErrorCode(pub(crate) &'static str);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), axum::Json(self.body())).into_response();
        response.extensions_mut().insert(ErrorCode(self.code()));
        let headers = response.headers_mut();
        if let Some(wait) = self.retry_after() {
            headers.insert(header::RETRY_AFTER, seconds(wait).into());
        }
        match self {
            Self::MissingKey | Self::InvalidKey => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            // What is left of the body would be read as the next request.
            Self::Draining
            | Self::CutOff
            | Self::BodyTooLarge { .. }
            | Self::BodyTimeout { .. }
            | Self::BodyRead { .. } => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_and_param_are_strings_or_null() {
        let body = ApiError::field("temperature", "too hot").body();
        assert_eq!(
            body,
            json!({"error": {
                "message": "too hot", "type": "invalid_request_error", "param": "temperature", "code": "invalid_value",
            }})
        );
        assert_eq!(ApiError::Draining.body()["error"]["param"], Value::Null);
    }

    #[test]
    fn a_long_prompt_is_told_with_both_numbers() {
        let error = ApiError::ContextLength { param: "prompt", prompt: 90, completion: 20, max: 64, exact: true };
        let body = error.body();
        assert_eq!(body["error"]["code"], "context_length_exceeded");
        assert_eq!(body["error"]["n_prompt_tokens"], 90);
        assert_eq!(body["error"]["n_ctx"], 64);
        let message = body["error"]["message"].as_str().expect("text");
        assert!(message.starts_with(
            "This model's maximum context length is 64 tokens. However, you requested 110 tokens (90 in the prompt"
        ));
    }

    #[test]
    fn errors_that_pass_say_when_to_come_back() {
        let busy =
            ApiError::Overloaded { queued: 9, limit: 8, unit: "requests", retry_after: Duration::from_millis(1200) };
        let response = busy.into_response();
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
        let response = ApiError::Draining.into_response();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.headers()[header::CONNECTION], "close");
        assert!(response.headers().contains_key(header::RETRY_AFTER));
    }
}
