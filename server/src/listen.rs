//! From a socket to the application and back: accepting, per-connection limits, signals, shutdown.
//!
//! ```text
//!   bind --> accept --(at most max_connections)--> connection task --> hyper (HTTP/1) --> router
//!
//!   1st signal: Draining -- requests done or timeout --> Stopping -- connections closed --> engine.shutdown()
//!   2nd signal: exit
//! ```

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, Sleep};

use crate::app::{AppState, build_router};
use crate::config::{ConfigError, ServerConfig};
use crate::lifecycle::Phase;
use crate::local::LocalModel;

/// Most headers of a request.
const MAX_HEADERS: usize = 128;
/// Time that connections get to send what is left after the last request ended.
const CLOSING_TIME: Duration = Duration::from_secs(2);
/// How often shutdown looks whether requests are done.
const DRAIN_POLL: Duration = Duration::from_millis(10);
/// Wait after a failed accept, which is nearly always a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why the server cannot serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// A setting that cannot work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The address is taken.
    #[error("{addr} is already in use; choose another port with --port, or --port 0 for any free one")]
    InUse {
        /// The address.
        addr: SocketAddr,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {addr}: {source}")]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// Threads or signal handlers could not be set up.
    #[error("cannot start the HTTP server: {0}")]
    Start(io::Error),
}

/// Checks the settings and takes the address, so that a taken port is known before a model is loaded.
///
/// # Errors
/// A setting that cannot work, or an address that cannot be had.
pub fn bind(config: &ServerConfig) -> Result<StdListener, ServeError> {
    let addr = config.validate()?;
    StdListener::bind(addr).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ServeError::InUse { addr },
        _ => ServeError::Bind { addr, source },
    })
}

/// Serves a model until a signal ends it, then shuts the engine down. `on_ready` is called once with the address.
///
/// # Errors
/// Threads, signal handlers or the listener could not be set up.
pub fn run(
    listener: StdListener,
    config: ServerConfig,
    model: LocalModel,
    on_ready: impl FnOnce(SocketAddr),
) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.http_threads)
        .thread_name("cupola-http")
        .enable_all()
        .build()
        .map_err(ServeError::Start)?;
    let served = runtime.block_on(async {
        let addr = listener.local_addr().map_err(ServeError::Start)?;
        listener.set_nonblocking(true).map_err(ServeError::Start)?;
        let listener = TcpListener::from_std(listener).map_err(ServeError::Start)?;
        let app = AppState::new(config, model, addr.ip().is_loopback());
        let mut signals = Signals::listen().map_err(ServeError::Start)?;
        let accepting = tokio::spawn(accept(listener, app.clone()));
        on_ready(addr);

        signals.next().await;
        tracing::info!(timeout_s = app.config.shutdown_timeout.as_secs(), "draining; a second signal exits at once");
        tokio::select! {
            () = drain(&app) => {}
            () = signals.next() => {
                tracing::warn!("second signal: exiting without waiting");
                std::process::exit(130);
            }
        }
        accepting.abort();
        Ok::<_, ServeError>(app)
    });
    let app = served?;
    app.model.engine.shutdown();
    // Connections that did not close in time are dropped with the runtime; there is nothing left to wait for.
    runtime.shutdown_background();
    Ok(())
}

/// Accepts connections until aborted. Also what tests use to serve on a real socket.
pub async fn accept(listener: TcpListener, app: AppState) {
    let router = build_router(app.clone());
    let places = Arc::new(Semaphore::new(app.config.max_connections));
    loop {
        let place = Arc::clone(&places).acquire_owned().await.expect("the semaphore is never closed");
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (app, router) = (app.clone(), router.clone());
        tokio::spawn(async move {
            let _place = place;
            app.meter.connection_opened();
            connection(stream, router, &app).await;
            app.meter.connection_closed();
        });
    }
}

async fn connection(stream: TcpStream, router: Router, app: &AppState) {
    // Tokens are small and must leave at once.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot turn Nagle's algorithm off");
    }
    let config = &app.config;
    let io = TokioIo::new(StallGuard::new(stream, config.write_stall_timeout));
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(config.header_timeout)
        .max_header_size(config.max_header_bytes)
        .max_headers(MAX_HEADERS)
        .serve_connection(io, TowerToHyperService::new(router));
    let mut serving = pin!(serving);
    let ended = tokio::select! {
        ended = serving.as_mut() => ended,
        () = app.lifecycle.reached(Phase::Stopping) => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = ended {
        // Clients come and go; only somebody who looks for it wants to know.
        tracing::debug!(%error, "connection ended");
    }
}

/// Takes nothing new, lets running requests finish within the timeout, ends the others, closes connections.
pub async fn drain(app: &AppState) {
    app.lifecycle.advance(Phase::Draining);
    let idle = until(|| app.meter.in_flight() == 0);
    if tokio::time::timeout(app.config.shutdown_timeout, idle).await.is_err() {
        tracing::warn!(requests = app.meter.in_flight(), "requests did not finish in time and are cut off");
    }
    app.model.engine.drain();
    app.lifecycle.advance(Phase::Stopping);
    let closed = until(|| app.meter.connections() == 0);
    if tokio::time::timeout(CLOSING_TIME, closed).await.is_err() {
        tracing::debug!(connections = app.meter.connections(), "connections did not close in time");
    }
}

async fn until(done: impl Fn() -> bool) {
    while !done() {
        tokio::time::sleep(DRAIN_POLL).await;
    }
}

/// SIGINT and SIGTERM; on other systems Ctrl-C.
pub(crate) struct Signals {
    #[cfg(unix)]
    kinds: [tokio::signal::unix::Signal; 2],
}

impl Signals {
    #[cfg(unix)]
    pub(crate) fn listen() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { kinds: [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?] })
    }

    #[cfg(unix)]
    pub(crate) async fn next(&mut self) {
        let [interrupt, terminate] = &mut self.kinds;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    }

    #[cfg(not(unix))]
    pub(crate) fn listen() -> io::Result<Self> {
        Ok(Self {})
    }

    #[cfg(not(unix))]
    pub(crate) async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// A connection that fails when its peer takes no byte for too long: a reader that never reads would otherwise keep its
/// request and its blocks for ever.
struct StallGuard<T> {
    inner: T,
    limit: Duration,
    /// Runs while a write waits.
    deadline: Pin<Box<Sleep>>,
    waiting: bool,
}

impl<T> StallGuard<T> {
    fn new(inner: T, limit: Duration) -> Self {
        Self { inner, limit, deadline: Box::pin(tokio::time::sleep(limit)), waiting: false }
    }

    fn watch<R>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<R>>) -> Poll<io::Result<R>> {
        if written.is_ready() {
            self.waiting = false;
            return written;
        }
        if !self.waiting {
            self.waiting = true;
            self.deadline.as_mut().reset(Instant::now() + self.limit);
        }
        match self.deadline.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client stopped reading"))),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for StallGuard<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for StallGuard<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.watch(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.watch(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.inner).poll_flush(cx);
        self.watch(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_never_reads_is_dropped() {
        let (ours, mut theirs) = tokio::io::duplex(16);
        let mut guarded = StallGuard::new(ours, Duration::from_secs(60));
        guarded.write_all(&[0; 16]).await.expect("there is room");
        let error = guarded.write_all(&[0; 16]).await.expect_err("nobody reads");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);

        let mut read = [0; 16];
        theirs.read_exact(&mut read).await.expect("what was sent");
        guarded.write_all(&[1; 16]).await.expect("a new wait begins with each write");
    }

    #[test]
    fn a_taken_port_is_told_apart() {
        let first = StdListener::bind("127.0.0.1:0").expect("any port");
        let port = first.local_addr().expect("bound").port();
        let config = ServerConfig { port, ..ServerConfig::default() };
        let error = bind(&config).expect_err("taken");
        assert!(matches!(error, ServeError::InUse { .. }), "{error}");
        assert!(error.to_string().contains("--port"));
    }
}
