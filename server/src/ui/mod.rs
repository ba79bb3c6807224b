//! The chat page at `/`: a few static files compiled into the binary, served under a policy that lets them reach nothing else.
//!
//! ```text
//!  GET /                 index.html ──┬── /ui/style.css
//!                                     └── /ui/app.js ── api.js  dom.js  markdown.js  settings.js  turn.js
//!                                            │
//!                                            └── fetch ──> /v1/models, /v1/chat/completions, /v1/completions
//! ```
//!
//! The files hold no secret and no state, so they are public even where every other route asks for a key: the page asks its
//! reader for that key and sends it with each request.

use axum::Router;
use axum::http::{HeaderValue, header};
use axum::response::IntoResponse;
use axum::routing::get;

/// One file of the page.
struct Asset {
    path: &'static str,
    media_type: &'static str,
    text: &'static str,
}

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JAVASCRIPT: &str = "text/javascript; charset=utf-8";

const ASSETS: [Asset; 8] = [
    Asset { path: "/", media_type: HTML, text: include_str!("index.html") },
    Asset { path: "/ui/style.css", media_type: CSS, text: include_str!("style.css") },
    Asset { path: "/ui/app.js", media_type: JAVASCRIPT, text: include_str!("app.js") },
    Asset { path: "/ui/api.js", media_type: JAVASCRIPT, text: include_str!("api.js") },
    Asset { path: "/ui/dom.js", media_type: JAVASCRIPT, text: include_str!("dom.js") },
    Asset { path: "/ui/markdown.js", media_type: JAVASCRIPT, text: include_str!("markdown.js") },
    Asset { path: "/ui/settings.js", media_type: JAVASCRIPT, text: include_str!("settings.js") },
    Asset { path: "/ui/turn.js", media_type: JAVASCRIPT, text: include_str!("turn.js") },
];

/// What the page may load and do: its own files, its own origin, and no string that becomes markup or script, so that a
/// model's answer cannot run even if the page had a flaw. `img-src data:` is for the icon of the browser's tab.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
                      require-trusted-types-for 'script'; trusted-types 'none'";

/// The page's routes. They need no state and no key.
pub(crate) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    ASSETS.iter().fold(Router::new(), |router, asset| router.route(asset.path, get(async || asset.clone_response())))
}

/// Whether `path` is one of the page's files, which authentication lets through.
pub(crate) fn is_public(path: &str) -> bool {
    ASSETS.iter().any(|asset| asset.path == path)
}

impl Asset {
    fn clone_response(&'static self) -> impl IntoResponse {
        let headers = [
            (header::CONTENT_TYPE, self.media_type),
            (header::CONTENT_SECURITY_POLICY, POLICY),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (header::REFERRER_POLICY, "no-referrer"),
            // A new binary brings new files under the same names.
            (header::CACHE_CONTROL, "no-cache"),
        ];
        (headers.map(|(name, value)| (name, HeaderValue::from_static(value))), self.text)
    }
}
