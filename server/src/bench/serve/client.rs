//! A small HTTP client for load: kept-alive connections to one server, JSON calls and streamed answers.
//!
//! ```text
//!   post_stream --take--> idle connections --none left--> connect
//!       |                      ^      |
//!       |                      |      +-- closed by the server meanwhile: take the next
//!       +--> Answer --end of body--+      a connection goes back only after its answer was read to the end
//! ```

use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

/// Longest body read as a whole; streams have no limit.
const BODY_LIMIT: usize = 16 << 20;
/// Time to open a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a call failed. Each message is one sentence.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// A base URL that is none, or of a scheme that is not spoken.
    #[error("{url:?} is not a base URL this client can use: {hint}")]
    Url {
        /// As given.
        url: String,
        /// What would be right.
        hint: String,
    },
    /// No connection.
    #[error("cannot connect to {address}: {source}")]
    Connect {
        /// Host and port.
        address: String,
        /// Cause.
        source: std::io::Error,
    },
    /// An answer other than 200.
    #[error("the server answered {status}: {message}")]
    Status {
        /// The status.
        status: StatusCode,
        /// The server's message, shortened.
        message: String,
    },
    /// The connection broke.
    #[error("the connection broke while {doing}: {cause}")]
    Broken {
        /// What was under way.
        doing: &'static str,
        /// Cause.
        cause: String,
    },
    /// Nothing complete within the time limit.
    #[error("no complete answer within {0:?}")]
    Timeout(Duration),
    /// An answer that is not what the API promises.
    #[error("the server's answer makes no sense: {0}")]
    Nonsense(String),
}

impl ClientError {
    /// A short name to count failures by.
    pub(super) fn class(&self) -> String {
        match self {
            Self::Url { .. } => "bad url".to_owned(),
            Self::Connect { .. } => "cannot connect".to_owned(),
            Self::Status { status, .. } => format!("HTTP {}", status.as_u16()),
            Self::Broken { .. } => "connection broke".to_owned(),
            Self::Timeout(_) => "timeout".to_owned(),
            Self::Nonsense(_) => "invalid answer".to_owned(),
        }
    }
}

type Sender = SendRequest<Full<Bytes>>;

/// A client of one server.
#[derive(Debug)]
pub(super) struct Client {
    host: String,
    port: u16,
    /// What the base URL has after the authority, without a closing slash.
    path: String,
    authority: HeaderValue,
    bearer: Option<HeaderValue>,
    idle: Mutex<Vec<Sender>>,
}

impl Client {
    /// A client of the server at `base_url`, such as `http://127.0.0.1:8000`; `api_key` goes into every request.
    ///
    /// # Errors
    /// [`ClientError::Url`] for anything but an `http` URL.
    pub(super) fn new(base_url: &str, api_key: Option<&str>) -> Result<Self, ClientError> {
        let bad = |hint: &str| ClientError::Url { url: base_url.to_owned(), hint: hint.to_owned() };
        let uri: Uri = base_url.parse().map_err(|_| bad("expected something like http://127.0.0.1:8000"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => return Err(bad("TLS is not spoken here, measure the plain http port behind it")),
            _ => return Err(bad("it must begin with http://")),
        }
        let authority = uri.authority().ok_or_else(|| bad("it names no host"))?;
        let bearer = api_key
            .map(|key| {
                let mut value = HeaderValue::try_from(format!("Bearer {key}"))
                    .map_err(|_| bad("the API key has characters that no header can carry"))?;
                value.set_sensitive(true);
                Ok(value)
            })
            .transpose()?;
        let host = authority.host();
        Ok(Self {
            host: host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host).to_owned(),
            port: authority.port_u16().unwrap_or(80),
            path: uri.path().trim_end_matches('/').to_owned(),
            authority: HeaderValue::try_from(authority.as_str()).map_err(|_| bad("its host is not a host name"))?,
            bearer,
            idle: Mutex::new(Vec::new()),
        })
    }

    /// Host and port, for messages.
    pub(super) fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// `GET path`, the answer as JSON.
    ///
    /// # Errors
    /// Every [`ClientError`].
    pub(super) async fn get_json(&self, path: &str) -> Result<Value, ClientError> {
        let answer = self.send(Method::GET, path, Bytes::new()).await?;
        answer.json().await
    }

    /// `GET path`, whatever the answer's body is.
    ///
    /// # Errors
    /// Every [`ClientError`].
    pub(super) async fn get(&self, path: &str) -> Result<Bytes, ClientError> {
        self.send(Method::GET, path, Bytes::new()).await?.whole().await
    }

    /// `POST path` with a JSON body, the answer as JSON.
    ///
    /// # Errors
    /// Every [`ClientError`].
    pub(super) async fn post_json(&self, path: &str, body: &Value) -> Result<Value, ClientError> {
        let answer = self.send(Method::POST, path, Bytes::from(body.to_string())).await?;
        answer.json().await
    }

    /// `POST path` with a JSON body, the answer to be read piece by piece.
    ///
    /// # Errors
    /// Every [`ClientError`]; a status other than 200 is one.
    pub(super) async fn post_stream(&self, path: &str, body: Bytes) -> Result<Answer<'_>, ClientError> {
        self.send(Method::POST, path, body).await
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Answer<'_>, ClientError> {
        let request = || {
            let mut request = Request::builder()
                .method(method.clone())
                .uri(format!("{}{path}", self.path))
                .header(HOST, &self.authority)
                .header(CONTENT_TYPE, "application/json");
            if let Some(bearer) = &self.bearer {
                request = request.header(AUTHORIZATION, bearer);
            }
            request
                .body(Full::new(body.clone()))
                .map_err(|error| ClientError::Url { url: path.to_owned(), hint: error.to_string() })
        };
        loop {
            let idle = self.idle.lock().expect("no holder of this lock panics").pop();
            let reused = idle.is_some();
            let mut sender = match idle {
                Some(sender) => sender,
                None => self.connect().await?,
            };
            let sent = match sender.ready().await {
                Ok(()) => sender.send_request(request()?).await,
                Err(error) => Err(error),
            };
            match sent {
                Ok(response) => {
                    let answer = Answer { client: self, sender: Some(sender), response };
                    if answer.response.status() == StatusCode::OK {
                        return Ok(answer);
                    }
                    return Err(answer.refusal().await);
                }
                // Some servers close a kept-alive connection after an answer without saying so; the next request may
                // already be on its way into it. Nothing has been answered, so it goes out again over another one.
                Err(_) if reused => {}
                Err(error) => return Err(ClientError::Broken { doing: "sending", cause: cause(&error) }),
            }
        }
    }

    async fn connect(&self) -> Result<Sender, ClientError> {
        let failed = |source| ClientError::Connect { address: self.address(), source };
        let connecting = TcpStream::connect((self.host.as_str(), self.port));
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, connecting)
            .await
            .map_err(|_| failed(std::io::ErrorKind::TimedOut.into()))?
            .map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        let (sender, connection) = handshake(TokioIo::new(stream))
            .await
            .map_err(|error| ClientError::Broken { doing: "connecting", cause: cause(&error) })?;
        // Its errors reach the request that is under way through the sender.
        tokio::spawn(connection);
        Ok(sender)
    }
}

/// An answer whose body has not been read yet. Dropped before its end, it closes its connection.
#[derive(Debug)]
pub(super) struct Answer<'a> {
    client: &'a Client,
    sender: Option<Sender>,
    response: Response<Incoming>,
}

impl Answer<'_> {
    /// The next bytes of the body; `None` at its end.
    ///
    /// # Errors
    /// [`ClientError::Broken`] when the connection ends before the body does.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        while let Some(frame) = self.response.body_mut().frame().await {
            let frame =
                frame.map_err(|error| ClientError::Broken { doing: "reading the answer", cause: cause(&error) })?;
            if let Ok(bytes) = frame.into_data() {
                return Ok(Some(bytes));
            }
        }
        self.give_back();
        Ok(None)
    }

    fn give_back(&mut self) {
        if let Some(sender) = self.sender.take().filter(|sender| !sender.is_closed()) {
            self.client.idle.lock().expect("no holder of this lock panics").push(sender);
        }
    }

    async fn whole(&mut self) -> Result<Bytes, ClientError> {
        let collected = Limited::new(self.response.body_mut(), BODY_LIMIT)
            .collect()
            .await
            .map_err(|error| ClientError::Broken { doing: "reading the answer", cause: error.to_string() })?;
        self.give_back();
        Ok(collected.to_bytes())
    }

    async fn json(mut self) -> Result<Value, ClientError> {
        let body = self.whole().await?;
        serde_json::from_slice(&body).map_err(|error| ClientError::Nonsense(error.to_string()))
    }

    async fn refusal(mut self) -> ClientError {
        let status = self.response.status();
        match self.whole().await {
            Ok(body) => ClientError::Status { status, message: message_of(&body) },
            Err(error) => error,
        }
    }
}

/// The message inside an error body of any server: OpenAI's shape, a plain string, or the text itself.
fn message_of(body: &[u8]) -> String {
    let parsed: Option<Value> = serde_json::from_slice(body).ok();
    let text = parsed
        .as_ref()
        .and_then(|json| {
            let error = json.get("error").unwrap_or(json);
            error.get("message").unwrap_or(error).as_str().map(str::to_owned)
        })
        .unwrap_or_else(|| String::from_utf8_lossy(body).into_owned());
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.is_empty() { "no message".to_owned() } else { line.chars().take(300).collect() }
}

/// The innermost cause: hyper's own text hides it.
fn cause(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => cause(source),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_urls() {
        let client = Client::new("http://localhost:8000/prefix/", None).expect("valid");
        assert_eq!((client.address().as_str(), client.path.as_str()), ("localhost:8000", "/prefix"));
        assert_eq!(Client::new("http://[::1]:9", None).expect("valid").host, "::1");
        assert_eq!(Client::new("http://example", None).expect("valid").port, 80);
        for (url, hint) in
            [("https://example.com", "TLS"), ("localhost:8000", "http://"), ("ftp://x", "http://"), ("", "expected")]
        {
            let error = Client::new(url, None).expect_err(url).to_string();
            assert!(error.contains(hint), "{url}: {error}");
        }
        assert!(Client::new("http://x", Some("line\nbreak")).is_err());
    }

    #[test]
    fn error_bodies_of_every_shape() {
        assert_eq!(message_of(br#"{"error":{"message":"too  long\n now","code":null}}"#), "too long now");
        assert_eq!(message_of(br#"{"error":"Model is overloaded","error_type":"overloaded"}"#), "Model is overloaded");
        assert_eq!(message_of(br#"{"object":"error","message":"flat"}"#), "flat");
        assert_eq!(message_of(b"plain text"), "plain text");
        assert_eq!(message_of(b""), "no message");
        assert_eq!(message_of(&[b'x'; 5000]).len(), 300);
    }
}
