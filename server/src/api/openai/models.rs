//! `GET /v1/models` and `GET /v1/models/{id}`.

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use crate::app::AppState;
use crate::error::ApiError;
use crate::local::LocalModel;

/// Every name of every model.
pub(crate) async fn list(State(app): State<AppState>) -> Json<Value> {
    let data: Vec<Value> = app.model.names.iter().map(|name| card(&app.model, name)).collect();
    Json(json!({"object": "list", "data": data}))
}

/// One model by name. Names contain slashes, so the route takes the rest of the path.
pub(crate) async fn one(State(app): State<AppState>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    app.model.check_name(Some(&id))?;
    Ok(Json(card(&app.model, &id)))
}

/// OpenAI's four fields, the two that vLLM's tools ask for, and what the file says.
fn card(model: &LocalModel, name: &str) -> Value {
    let info = &model.info;
    json!({
        "id": name,
        "object": "model",
        "created": model.created(),
        "owned_by": "cupola",
        "root": model.name(),
        "parent": null,
        "max_model_len": model.engine.max_model_len(),
        "meta": {
            "title": info.name,
            "architecture": info.architecture,
            "quantization": info.quantization,
            "n_params": info.parameters,
            "size": info.weight_bytes,
            "n_vocab": model.engine.vocab_size(),
            "chat": model.template.is_some(),
        },
    })
}
