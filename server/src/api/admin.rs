//! Routes for whoever runs the server.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use crate::app::AppState;
use crate::error::ApiError;

/// `POST /admin/reset_prefix_cache`: forgets cached prefixes, so that a benchmark starts cold.
pub(crate) async fn reset_prefix_cache(State(app): State<AppState>) -> Result<Json<Value>, ApiError> {
    let model = Arc::clone(&app.model);
    // The engine takes commands between steps; with many waiting, sending one blocks.
    let sent = tokio::task::spawn_blocking(move || model.engine.reset_prefix_cache()).await;
    sent.map_err(|_| ApiError::Internal)?.map_err(|e| ApiError::from_submit(e, "prompt"))?;
    Ok(Json(json!({"status": "ok"})))
}
