//! `GET /openapi.json`: the description of these routes for tools that read one. The document is written by hand; tests
//! hold it to what the server does.

use axum::response::{IntoResponse, Response};
use http::header;

const DOCUMENT: &str = include_str!("openapi.json");

/// The route.
pub(crate) async fn document() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT).into_response()
}
