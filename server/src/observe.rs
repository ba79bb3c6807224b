//! The outermost layer: gives every request its id, counts it, logs one line when it is over, and survives panics.
//!
//! ```text
//!   request --> Observation starts --> auth, routes --> response head --> body frames ... --> Observation drops
//!                    |                    |                                    |                   |
//!                 id, clock        handlers add counts to RequestRecord     complete?        metric + log line
//! ```
//!
//! The observation moves from the layer's future into the response body. Wherever hyper drops it, because the answer is
//! out or because the client has left, that is the end of the request. Neither content nor keys are ever logged.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::body::{Body, HttpBody};
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::FutureExt;
use http::{HeaderValue, Method};

use crate::app::AppState;
use crate::error::{ApiError, ErrorCode};
use crate::meter::{Meter, Series};
use crate::request_id;

/// Status of a request whose client left before the answer began; a custom of proxies, never sent.
const CLIENT_CLOSED: u16 = 499;

/// Counts that handlers leave for the log line.
#[derive(Clone, Debug, Default)]
struct Facts {
    prompt_tokens: usize,
    cached_tokens: usize,
    completion_tokens: usize,
    first_token: Option<Duration>,
    finish: Option<&'static str>,
    error: Option<&'static str>,
}

/// One request as the log sees it; handlers get it as an extension.
#[derive(Debug)]
pub(crate) struct RequestRecord {
    id: String,
    started: Instant,
    facts: Mutex<Facts>,
}

impl RequestRecord {
    pub(crate) fn new(id: String) -> Self {
        Self { id, started: Instant::now(), facts: Mutex::default() }
    }

    fn with(&self, change: impl FnOnce(&mut Facts)) {
        change(&mut self.facts.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn prompt(&self, tokens: usize) {
        self.with(|facts| facts.prompt_tokens += tokens);
    }

    pub(crate) fn first_token(&self) {
        self.with(|facts| {
            facts.first_token.get_or_insert_with(|| self.started.elapsed());
        });
    }

    pub(crate) fn finished(&self, completion_tokens: usize, cached_tokens: usize, reason: &'static str) {
        self.with(|facts| {
            facts.completion_tokens += completion_tokens;
            facts.cached_tokens += cached_tokens;
            facts.finish = Some(reason);
        });
    }

    /// An error after the response head has been sent.
    pub(crate) fn failed(&self, code: &'static str) {
        self.with(|facts| facts.error = Some(code));
    }
}

struct Observation {
    record: Arc<RequestRecord>,
    meter: Arc<Meter>,
    method: &'static str,
    handler: String,
    path: String,
    status: u16,
    complete: bool,
}

impl Drop for Observation {
    fn drop(&mut self) {
        let took = self.record.started.elapsed();
        let series = Series { handler: self.handler.clone(), method: self.method, status: self.status };
        self.meter.end(series, took, self.complete);
        let facts = self.record.facts.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Self { method, path, status, .. } = self;
        let (id, ms) = (self.record.id.as_str(), took.as_secs_f64() * 1e3);
        let ttft_ms = facts.first_token.map(|time| time.as_secs_f64() * 1e3);
        if facts.prompt_tokens > 0 {
            tracing::info!(
                id,
                method,
                path,
                status,
                ms,
                prompt_tokens = facts.prompt_tokens,
                cached_tokens = facts.cached_tokens,
                completion_tokens = facts.completion_tokens,
                ttft_ms,
                finish = facts.finish,
                error = facts.error,
                client_left = !self.complete,
                "request"
            );
        } else if *status >= 400 {
            tracing::info!(id, method, path, status, ms, error = facts.error, "request");
        } else {
            tracing::debug!(id, method, path, status, ms, "request");
        }
    }
}

/// The layer itself.
pub(crate) async fn observe(State(app): State<AppState>, mut request: Request, next: Next) -> Response {
    let id = request_id::of(request.headers());
    let record = Arc::new(RequestRecord::new(id.clone()));
    app.meter.begin();
    let mut observation = Observation {
        record: Arc::clone(&record),
        meter: Arc::clone(&app.meter),
        method: known(request.method()),
        handler: request
            .extensions()
            .get::<MatchedPath>()
            .map_or_else(|| "unmatched".to_owned(), |path| path.as_str().to_owned()),
        path: request.uri().path().chars().take(128).collect(),
        status: CLIENT_CLOSED,
        complete: false,
    };
    request.extensions_mut().insert(Arc::clone(&record));

    // State that a panic may leave half changed is either an atomic or dropped with the request.
    let outcome = AssertUnwindSafe(next.run(request)).catch_unwind().await;
    let mut response = outcome.unwrap_or_else(|panic| {
        let reason = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
        tracing::error!(id, reason, "a handler panicked");
        ApiError::Internal.into_response()
    });

    if let Some(ErrorCode(code)) = response.extensions().get().copied() {
        record.failed(code);
        app.meter.reject(code);
    }
    observation.status = response.status().as_u16();
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(request_id::HEADER, value);
    }
    response.map(|body| Body::new(ObservedBody { body, observation }))
}

/// Method names become metric labels, so only known ones pass.
fn known(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

struct ObservedBody {
    body: Body,
    observation: Observation,
}

impl HttpBody for ObservedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        // A body of known size is not asked again after its last byte.
        if frame.is_none() || self.body.is_end_stream() {
            self.observation.complete = true;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}
