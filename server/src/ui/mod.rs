//! The chat page at `/`: a few static files compiled into the binary, under a policy that lets them reach nothing else.
//!
//! ```text
//!  GET /      index.html ──┬── /ui/style.css
//!                          └── /ui/app.js ── api.js  dom.js  markdown.js  settings.js  turn.js
//!                                  │
//!                                  └── fetch ──> /v1/models, /v1/chat/completions, /v1/completions
//! ```
//!
//! The files hold no secret and no state, so they are public even where every other route asks for a key: the page asks its
//! reader for that key, and sends it with each request.

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::header;

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JAVASCRIPT: &str = "text/javascript; charset=utf-8";

/// Path, media type and contents of each file.
static FILES: [(&str, &str, &str); 8] = [
    ("/", HTML, include_str!("index.html")),
    ("/ui/style.css", CSS, include_str!("style.css")),
    ("/ui/app.js", JAVASCRIPT, include_str!("app.js")),
    ("/ui/api.js", JAVASCRIPT, include_str!("api.js")),
    ("/ui/dom.js", JAVASCRIPT, include_str!("dom.js")),
    ("/ui/markdown.js", JAVASCRIPT, include_str!("markdown.js")),
    ("/ui/settings.js", JAVASCRIPT, include_str!("settings.js")),
    ("/ui/turn.js", JAVASCRIPT, include_str!("turn.js")),
];

/// The page may load its own files and talk to its own server. No string may become markup or script (trusted types), so a
/// model's answer could not run even if the page had a flaw. `img-src data:` is the icon of the browser's tab.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
                      require-trusted-types-for 'script'; trusted-types 'none'";

/// Whether `path` is one of the page's files, which need no key.
pub(crate) fn is_public(path: &str) -> bool {
    FILES.iter().any(|(file, ..)| *file == path)
}

/// The routes of the page, for a router with any state.
pub(crate) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES.iter().fold(Router::new(), |router, &(path, media_type, text)| {
        router.route(path, get(move || async move { file(media_type, text) }))
    })
}

fn file(media_type: &'static str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, media_type),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // A new build brings new files under the same names.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, text).into_response()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use axum::body::Body;
    use http::{Request, StatusCode};
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;

    async fn fetch(path: &str) -> Response {
        let request = Request::get(path).body(Body::empty()).unwrap();
        routes::<()>().oneshot(request).await.unwrap()
    }

    /// What follows each `mark` in `text`, up to the closing quote.
    fn quoted<'a>(text: &'a str, mark: &str) -> impl Iterator<Item = &'a str> {
        text.split(mark).skip(1).filter_map(|rest| rest.split('"').next())
    }

    #[tokio::test]
    async fn every_file_the_page_loads_is_served_and_no_other_exists() {
        let mut loaded = BTreeSet::from(["/".to_owned()]);
        for (_, _, text) in FILES {
            loaded.extend(quoted(text, "\"/ui/").map(|name| format!("/ui/{name}")));
            loaded.extend(quoted(text, "from \"./").map(|name| format!("/ui/{name}")));
        }
        assert_eq!(loaded, FILES.map(|(path, ..)| path.to_owned()).into());
        for path in &loaded {
            assert_eq!(fetch(path).await.status(), StatusCode::OK, "{path}");
        }
    }

    #[tokio::test]
    async fn the_page_is_html_under_the_policy() {
        let response = fetch("/").await;
        assert_eq!(response.headers()[header::CONTENT_TYPE], HTML);
        assert_eq!(response.headers()[header::CONTENT_SECURITY_POLICY], POLICY);
        assert_eq!(response.headers()[header::X_CONTENT_TYPE_OPTIONS], "nosniff");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert!(body.starts_with(b"<!doctype html>"));
    }

    #[test]
    fn the_page_names_no_other_origin_and_holds_nothing_inline() {
        for (path, _, text) in FILES {
            // The one address is the name of the SVG vocabulary, which nothing fetches.
            let addresses = text.matches("://").count() - text.matches("http://www.w3.org/2000/svg").count();
            assert_eq!(addresses, 0, "{path}");
            for banned in [" style=\"", " onclick=", "innerHTML", "insertAdjacentHTML", "eval("] {
                assert!(!text.contains(banned), "{path} contains {banned}");
            }
        }
    }
}
