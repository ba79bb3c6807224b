//! The HTTP application: its state, its routes and the layers around them. It needs no socket, so tests call it directly.
//!
//! ```text
//!   request --> observe (id, log, metrics, panics) --> host --> key --> route --> handler --> error | body | stream
//! ```

use std::ops::Deref;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};

use crate::api::{admin, health, metrics, openai, openapi, tokenize};
use crate::config::ServerConfig;
use crate::error::ApiError;
use crate::lifecycle::{Lifecycle, Phase};
use crate::local::LocalModel;
use crate::meter::Meter;
use crate::{auth, host, observe, ui};

/// What every handler can reach. Clones share it.
#[derive(Clone)]
pub struct AppState(Arc<App>);

/// The parts of [`AppState`].
pub struct App {
    /// Settings, already validated.
    pub config: ServerConfig,
    /// The model served.
    pub model: Arc<LocalModel>,
    /// Serving, draining or stopping.
    pub lifecycle: Lifecycle,
    /// Counters of the HTTP side.
    pub meter: Arc<Meter>,
    /// Only this machine can reach the server, so its `Host` must name this machine.
    pub loopback_only: bool,
}

impl AppState {
    /// Puts an application together. `loopback_only` says that it listens on a loopback address.
    pub fn new(config: ServerConfig, model: LocalModel, loopback_only: bool) -> Self {
        Self(Arc::new(App {
            config,
            model: Arc::new(model),
            lifecycle: Lifecycle::default(),
            meter: Arc::default(),
            loopback_only,
        }))
    }
}

impl Deref for AppState {
    type Target = App;

    fn deref(&self) -> &App {
        &self.0
    }
}

/// All routes within all layers.
pub fn build_router(app: AppState) -> Router {
    let generating = Router::new()
        .route("/v1/chat/completions", post(openai::chat::chat_completions))
        .route("/v1/completions", post(openai::completions::completions))
        .layer(middleware::from_fn_with_state(app.clone(), refuse_while_draining));
    Router::new()
        .merge(generating)
        .route("/v1/models", get(openai::models::list))
        .route("/v1/models/{*id}", get(openai::models::one))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/tokenizer_info", get(tokenize::info))
        .route("/health", get(health::ready))
        .route("/ping", get(health::ready).post(health::ready))
        .route("/ready", get(health::ready))
        .route("/live", get(health::live))
        .route("/version", get(health::version))
        .route("/metrics", get(metrics::metrics))
        .route("/openapi.json", get(openapi::document))
        .route("/admin/reset_prefix_cache", post(admin::reset_prefix_cache))
        .merge(ui::routes())
        .fallback(no_route)
        .method_not_allowed_fallback(wrong_method)
        // The last layer added is the outermost.
        .layer(middleware::from_fn_with_state(app.clone(), auth::require_key))
        .layer(middleware::from_fn_with_state(app.clone(), host::check_host))
        .layer(middleware::from_fn_with_state(app.clone(), observe::observe))
        .with_state(app)
}

async fn refuse_while_draining(State(app): State<AppState>, request: Request, next: Next) -> Response {
    if app.lifecycle.phase() > Phase::Serving {
        return ApiError::Draining.into_response();
    }
    next.run(request).await
}

async fn no_route(request: Request) -> ApiError {
    ApiError::NoRoute { path: shown_path(&request) }
}

async fn wrong_method(request: Request) -> ApiError {
    ApiError::Method { method: request.method().to_string(), path: shown_path(&request) }
}

fn shown_path(request: &Request) -> String {
    request.uri().path().chars().take(200).collect()
}
