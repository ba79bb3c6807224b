//! Request bodies: read within limits of size and time, parsed with the JSON path of whatever is wrong.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;

use crate::app::AppState;
use crate::error::ApiError;

/// How much of an oversized body is read and thrown away, so that a client that sends first and reads later gets to see
/// the answer: this many times the limit, for at most [`DISCARD_TIME`].
const DISCARD_FACTOR: usize = 4;
const DISCARD_TIME: Duration = Duration::from_secs(3);

/// A JSON body as a `T`. Depth is limited by the parser (128 levels).
pub(crate) struct JsonBody<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<AppState> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &AppState) -> Result<Self, ApiError> {
        let (head, body) = request.into_parts();
        require_json(&head.headers)?;
        let limit = app.config.max_body_bytes;
        let timeout = app.config.body_timeout;
        let announced = content_length(&head.headers).unwrap_or(0);
        let bytes = tokio::time::timeout(timeout, read(body, limit, announced))
            .await
            .map_err(|_| ApiError::BodyTimeout { limit: timeout })??;
        parse(&bytes).map(Self)
    }
}

fn require_json(headers: &HeaderMap) -> Result<(), ApiError> {
    let given = headers.get(header::CONTENT_TYPE).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let essence = given.as_deref().and_then(|text| text.split(';').next()).map(str::trim).unwrap_or_default();
    let subtype = essence.strip_prefix("application/").unwrap_or_default();
    // Requiring it also keeps forms of other web sites out: a browser asks before it sends JSON across origins.
    if subtype.eq_ignore_ascii_case("json") || subtype.ends_with("+json") {
        return Ok(());
    }
    Err(ApiError::MediaType { got: given.map_or_else(|| "none".to_owned(), |text| format!("`{text}`")) })
}

fn content_length(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

async fn read(mut body: Body, limit: usize, announced: usize) -> Result<Bytes, ApiError> {
    if announced > limit {
        discard(body, limit).await;
        return Err(ApiError::BodyTooLarge { limit });
    }
    let mut bytes = BytesMut::with_capacity(announced);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| ApiError::BodyRead { reason: e.to_string() })?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > limit {
            discard(body, limit).await;
            return Err(ApiError::BodyTooLarge { limit });
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes.freeze())
}

async fn discard(mut body: Body, limit: usize) {
    let mut left = limit.saturating_mul(DISCARD_FACTOR);
    let reading = async {
        while let Some(Ok(frame)) = body.frame().await {
            let size = frame.data_ref().map_or(0, Bytes::len);
            match left.checked_sub(size) {
                Some(rest) => left = rest,
                None => break,
            }
        }
    };
    // Running out of time only means that the connection closes with the client still sending.
    let _ = tokio::time::timeout(DISCARD_TIME, reading).await;
}

/// Parses a body; what is wrong comes with its JSON path.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    use serde_json::error::Category;
    let mut parser = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut parser).map_err(|e| {
        let path = e.path().to_string();
        let error = e.into_inner();
        match error.classify() {
            Category::Data if path == "." => ApiError::Json { reason: error.to_string() },
            Category::Data => ApiError::field(&path, format!("`{path}`: {error}")),
            // A syntax error has a place too when it lies inside a field: NaN, for one, is no JSON.
            _ if path == "." || path.contains('?') => ApiError::Json { reason: error.to_string() },
            _ => ApiError::field(&path, format!("`{path}`: {error}; the request body is not valid JSON there")),
        }
    })?;
    parser.end().map_err(|e| ApiError::Json { reason: e.to_string() })?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Outer {
        #[serde(rename = "list")]
        _list: Option<Vec<Inner>>,
        #[serde(rename = "any")]
        _any: Option<serde_json::Value>,
    }
    #[derive(Debug, Deserialize)]
    struct Inner {
        #[serde(rename = "number")]
        _number: Option<u8>,
    }

    fn problem(text: &[u8]) -> (String, serde_json::Value) {
        let error = parse::<Outer>(text).expect_err("wrong");
        (error.to_string(), error.body()["error"]["param"].clone())
    }

    #[test]
    fn a_wrong_type_comes_with_its_path() {
        let (message, param) = problem(br#"{"list": [{"number": 1}, {"number": "x"}]}"#);
        assert_eq!(param, "list[1].number");
        assert!(message.contains("list[1].number") && message.contains("expected u8"), "{message}");
        assert_eq!(problem(br#"{"list": [{"number": -1}]}"#).1, "list[0].number");
        assert_eq!(problem(br#"{"list": [{"number": NaN}]}"#).1, "list[0].number");
    }

    #[test]
    fn what_is_no_json_is_said_to_be_none() {
        for text in [&b""[..], b"{", b"{\"list\" []}", b"nonsense", b"{} trailing", b"[]", b"\xff\xfe"] {
            let (message, param) = problem(text);
            assert!(message.contains("not valid JSON"), "{message}");
            assert!(param.is_null(), "{param}");
        }
        let (message, _) = problem(b"{\"list\": \"\xff\"}");
        assert!(message.contains("list"), "{message}");
    }

    #[test]
    fn depth_is_limited() {
        let deep = |field: &str| format!("{{\"{field}\": {}{}}}", "[".repeat(10_000), "]".repeat(10_000));
        let (message, _) = problem(deep("any").as_bytes());
        assert!(message.contains("recursion limit"), "{message}");
        // What is not read is skipped without recursion, so it may be as deep as it likes.
        assert!(parse::<Outer>(deep("unknown").as_bytes()).is_ok());
    }

    #[test]
    fn null_is_absent_and_unknown_fields_are_taken() {
        assert!(parse::<Outer>(br#"{"list": null, "later": {"a": [1]}}"#).is_ok());
        assert!(parse::<Outer>(b"{}").is_ok());
    }

    #[test]
    fn only_json_is_taken_for_json() {
        let with = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, text.parse().expect("a header value"));
            require_json(&headers)
        };
        for fine in ["application/json", "application/JSON; charset=utf-8", "application/problem+json"] {
            assert!(with(fine).is_ok(), "{fine}");
        }
        for wrong in ["text/plain", "application/x-www-form-urlencoded", "json"] {
            assert!(matches!(with(wrong), Err(ApiError::MediaType { .. })), "{wrong}");
        }
        assert!(require_json(&HeaderMap::new()).is_err());
    }
}
