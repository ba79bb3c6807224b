//! Server-sent events: frames, and a response body that stays alive while nothing happens.
//! Format: <https://html.spec.whatwg.org/multipage/server-sent-events.html>.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http::{HeaderValue, header};
use serde::Serialize;

use crate::error::ApiError;

const COMMENT: &[u8] = b": keep-alive\n\n";
const DONE: &[u8] = b"data: [DONE]\n\n";

/// Appends one event that holds `value` as JSON.
pub(crate) fn push_json(out: &mut Vec<u8>, value: &impl Serialize) {
    out.extend_from_slice(b"data: ");
    // JSON escapes line breaks, so one value is always one `data` line.
    serde_json::to_writer(&mut *out, value).expect("our own types always serialise to memory");
    out.extend_from_slice(b"\n\n");
}

/// Appends the event that ends a stream that went well.
pub(crate) fn push_done(out: &mut Vec<u8>) {
    out.extend_from_slice(DONE);
}

/// Appends the event that ends a stream that failed. No `[DONE]` follows, so nobody takes the answer for complete.
pub(crate) fn push_error(out: &mut Vec<u8>, error: &ApiError) {
    push_json(out, &error.body());
}

/// A streaming response of these frames; after `quiet` without one it sends a comment.
pub(crate) fn response(frames: impl Stream<Item = Bytes> + Send + 'static, quiet: Duration) -> Response {
    let frames = Box::pin(frames);
    let alive = stream::unfold(frames, move |mut frames| async move {
        // Dropping `next` at the timeout loses nothing: what it waited for stays inside the stream.
        let frame = match tokio::time::timeout(quiet, frames.next()).await {
            Ok(Some(frame)) => frame,
            Ok(None) => return None,
            Err(_) => Bytes::from_static(COMMENT),
        };
        Some((Ok::<_, Infallible>(frame), frames))
    });
    let mut response = Response::new(Body::from_stream(alive));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that would collect the whole answer are told not to.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use serde_json::json;

    use super::*;

    #[test]
    fn one_value_is_one_line() {
        let mut out = Vec::new();
        push_json(&mut out, &json!({"text": "a\n\nb\r"}));
        assert_eq!(out, b"data: {\"text\":\"a\\n\\nb\\r\"}\n\n");
    }

    #[test]
    fn an_error_is_the_last_event() {
        let mut out = Vec::new();
        push_error(&mut out, &ApiError::CutOff);
        let text = String::from_utf8(out).expect("JSON is text");
        assert!(text.starts_with("data: {\"error\":{") && text.ends_with("}\n\n"), "{text}");
        assert!(!text.contains("[DONE]"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_quiet_stream_sends_comments() {
        let slow = stream::unfold(0, |count| async move {
            tokio::time::sleep(Duration::from_secs(25)).await;
            (count < 2).then(|| (Bytes::from_static(b"data: x\n\n"), count + 1))
        });
        let body = response(slow, Duration::from_secs(10)).into_body().collect().await.expect("body").to_bytes();
        let text = std::str::from_utf8(&body).expect("text");
        assert_eq!(text.matches("data: x").count(), 2, "{text}");
        assert_eq!(text.matches(": keep-alive").count(), 6, "{text}");
    }
}
