//! Whether the process lives, the server may be sent requests, and which version it is.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use crate::app::AppState;
use crate::error::ApiError;
use crate::lifecycle::Phase;

/// A step that takes longer than this hangs: no batch is that large.
const STEP_HANGS_AFTER: Duration = Duration::from_secs(120);

fn ok() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// `/live`: fails only when the engine is gone and a restart is the cure.
pub(crate) async fn live(State(app): State<AppState>) -> Result<Json<Value>, ApiError> {
    if app.model.engine.is_alive() { Ok(ok()) } else { Err(ApiError::EngineDead) }
}

/// `/ready`, `/health` and `/ping`: whether new requests are welcome.
pub(crate) async fn ready(State(app): State<AppState>) -> Result<Json<Value>, ApiError> {
    if app.lifecycle.phase() > Phase::Serving {
        return Err(ApiError::Draining);
    }
    let engine = &app.model.engine;
    if !engine.is_alive() || engine.heartbeat_age() > STEP_HANGS_AFTER {
        return Err(ApiError::EngineDead);
    }
    Ok(ok())
}

/// `/version`.
pub(crate) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}
