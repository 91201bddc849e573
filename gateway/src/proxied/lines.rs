//! Connections to a service, each driven by the request that uses it.
//!
//! HTTP/1.1 has one exchange at a time on a connection. One with a task of its own would be woken by every
//! request and wake it in turn, often on another processor; here who waits for the answer reads it. Nobody
//! drives an idle connection, so whether its service has closed it is found out before it is used again. It is
//! used by requests of one runtime: that of its first is told what arrives on it, and would have to wake others.

use std::{
    fmt, mem,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use futures::future::poll_fn;
use http::{Request, Response, Uri};
use hyper::{
    body::{Body as HttpBody, Frame, Incoming, SizeHint},
    client::conn::http1::{self, Connection, SendRequest},
};
use hyper_util::{client::legacy::connect::HttpConnector, rt::TokioIo};
use tokio::{
    net::TcpStream,
    runtime::{self, Handle},
    sync::oneshot,
    time::Instant,
};
use tower::{Service as _, ServiceExt as _};

use crate::body::Body;

/// Idle connections that are kept for the next requests.
const IDLE_COUNT_MAX: usize = 128;
/// Shorter than services usually keep theirs, so that few requests meet one that is being closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// For what is left of a request whose answer is over.
const REST_TIMEOUT: Duration = Duration::from_secs(300);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// No connection; nothing was sent.
    #[error("no connection")]
    Connect(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The connection was lost after something may have been sent.
    #[error("lost connection")]
    Lost(#[source] hyper::Error),
}

/// The connections to one service. Cheap to clone.
#[derive(Clone)]
pub struct Lines {
    address: Uri,
    connector: HttpConnector,
    idle: Arc<Mutex<Idle>>,
}

/// Those that nobody uses, the last used one last.
#[derive(Default)]
struct Idle {
    lines: Vec<(Instant, Line)>,
    /// Somebody closes those that nobody has used for long.
    is_swept: bool,
}

impl Idle {
    fn pop(&mut self, home: runtime::Id) -> Option<(Instant, Line)> {
        let place = self.lines.iter().rposition(|(_, line)| line.home == home)?;
        Some(self.lines.remove(place))
    }
}

/// A connection, in the hands of who drives it.
struct Line {
    /// The runtime that watches it.
    home: runtime::Id,
    requests: SendRequest<Body>,
    /// `None` once it is closed.
    connection: Option<Box<Connection<TokioIo<TcpStream>, Body>>>,
}

impl Lines {
    /// To the host of `address`.
    pub fn new(address: Uri, connect_timeout: Duration) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(connect_timeout));
        Self { address, connector, idle: Arc::default() }
    }

    /// Sends a request, whose URI is a path and which names its host, and waits for the head of its answer.
    /// A connection that turns out to be closed before anything was sent on it is not spoken of.
    pub async fn send(&self, mut request: Request<Body>) -> Result<Response<Answered>, LineError> {
        while let Some(line) = self.used_before().await {
            match self.send_on(line, request).await {
                Ok(response) => return Ok(response),
                Err((_, Some(unsent))) => request = *unsent,
                Err((error, None)) => return Err(LineError::Lost(error)),
            }
        }
        let line = self.connect().await?;
        self.send_on(line, request).await.map_err(|(error, unsent)| match unsent {
            Some(_) => LineError::Connect(error.into()),
            None => LineError::Lost(error),
        })
    }

    /// The error comes with the request if nothing of it was sent.
    async fn send_on(
        &self,
        mut line: Line,
        request: Request<Body>,
    ) -> Result<Response<Answered>, (hyper::Error, Option<Box<Request<Body>>>)> {
        let is_streamed = request.body().whole().is_none();
        let mut answer = std::pin::pin!(line.requests.try_send_request(request));
        let answer = poll_fn(|context| {
            // What the answer is made of comes by the connection.
            line.drive(context);
            answer.as_mut().poll(context)
        });
        match answer.await {
            Ok(response) => {
                let driver = if is_streamed { self.tended(line) } else { Driver::Reader(line) };
                let lines = self.clone();
                Ok(response.map(|body| Answered { body, driver, lines }))
            }
            Err(mut error) => {
                let unsent = error.take_message().map(Box::new);
                Err((error.into_error(), unsent))
            }
        }
    }

    async fn connect(&self) -> Result<Line, LineError> {
        let mut connector = self.connector.clone();
        let connecting = async { connector.ready().await?.call(self.address.clone()).await };
        let stream = connecting.await.map_err(|error| LineError::Connect(error.into()))?;
        let opened = http1::handshake(stream).await;
        let (requests, connection) = opened.map_err(|error| LineError::Connect(Box::new(error)))?;
        let home = Handle::current().id();
        Ok(Line { home, requests, connection: Some(Box::new(connection)) })
    }

    /// One of this runtime's that nobody uses and that its service has not closed.
    async fn used_before(&self) -> Option<Line> {
        let home = Handle::current().id();
        loop {
            let (idle_since, mut line) = self.idle().pop(home)?;
            let is_usable = poll_fn(|context| Poll::Ready(line.is_ready(context)));
            if idle_since.elapsed() < IDLE_TIMEOUT && is_usable.await {
                return Some(line);
            }
        }
    }

    /// Has a task drive the connection. A caller may read nothing before it has sent everything, and what it
    /// sends must go on then.
    fn tended(&self, line: Line) -> Driver {
        let (over, is_over) = oneshot::channel();
        // Without a runtime everything ends.
        let Ok(runtime) = Handle::try_current() else { return Driver::Nobody };
        let lines = self.clone();
        runtime.spawn(async move {
            let mut finished = std::pin::pin!(line.finished());
            let line = tokio::select! {
                line = &mut finished => line,
                // Some answer before they have read everything, and read on.
                _ = is_over => tokio::time::timeout(REST_TIMEOUT, finished).await.ok().flatten(),
            };
            if let Some(line) = line {
                lines.keep(line);
            }
        });
        Driver::Task { _over: over }
    }

    /// Keeps a connection that can take a request.
    fn keep(&self, line: Line) {
        // Without a runtime everything ends.
        let Ok(runtime) = Handle::try_current() else { return };
        let mut idle = self.idle();
        if idle.lines.len() < IDLE_COUNT_MAX {
            idle.lines.push((Instant::now(), line));
        }
        if !mem::replace(&mut idle.is_swept, true) {
            runtime.spawn(sweep(Arc::downgrade(&self.idle)));
        }
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let idle_count = self.idle().lines.len();
        f.debug_struct("Lines").field("to", &self.address).field("idle", &idle_count).finish()
    }
}

/// Closes connections that nobody has used for long, until there are none.
async fn sweep(idle: std::sync::Weak<Mutex<Idle>>) {
    loop {
        tokio::time::sleep(IDLE_TIMEOUT).await;
        let Some(idle) = idle.upgrade() else { return };
        let mut idle = idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.lines.retain(|(since, _)| since.elapsed() < IDLE_TIMEOUT);
        if idle.lines.is_empty() {
            idle.is_swept = false;
            return;
        }
    }
}

impl Line {
    /// Reads and writes what can be read and written now.
    fn drive(&mut self, context: &mut Context<'_>) {
        let Some(open) = &mut self.connection else { return };
        if Pin::new(&mut **open).poll(context).is_ready() {
            // How it ended is told to what was sent on it, now that it is gone.
            self.connection = None;
        }
    }

    /// Once it can take a request; `None` if it is closed before.
    async fn finished(mut self) -> Option<Self> {
        poll_fn(|context| {
            self.drive(context);
            let is_closed = self.connection.is_none();
            if is_closed { Poll::Ready(()) } else { self.requests.poll_ready(context).map(drop) }
        })
        .await;
        self.connection.is_some().then_some(self)
    }

    /// Whether it can take a request.
    fn is_ready(&mut self, context: &mut Context<'_>) -> bool {
        self.drive(context);
        self.connection.is_some() && self.requests.is_ready()
    }
}

/// Who drives the connection of an answer.
enum Driver {
    /// Who reads the answer.
    Reader(Line),
    /// A task, which is told when the answer is over.
    Task { _over: oneshot::Sender<()> },
    /// Nobody: it is over.
    Nobody,
}

/// The body of an answer. It drives its connection, and gives it back when it is over.
pub struct Answered {
    body: Incoming,
    driver: Driver,
    lines: Lines,
}

impl fmt::Debug for Answered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.body.fmt(f)
    }
}

impl Answered {
    fn give_back(&mut self, context: &mut Context<'_>) {
        let driver = mem::replace(&mut self.driver, Driver::Nobody);
        let Driver::Reader(mut line) = driver else { return };
        if line.is_ready(context) {
            self.lines.keep(line);
        } else if line.connection.is_some() && self.body.is_end_stream() {
            // Part of its request may be on its way still.
            drop(self.lines.tended(line));
        }
    }
}

impl HttpBody for Answered {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        let mut next = Pin::new(&mut this.body).poll_frame(context);
        if let (Poll::Pending, Driver::Reader(line)) = (&next, &mut this.driver) {
            // Now that the frame was asked for.
            line.drive(context);
            next = Pin::new(&mut this.body).poll_frame(context);
        }
        let next = ready!(next);
        match &next {
            Some(Err(_)) => this.driver = Driver::Nobody,
            Some(Ok(frame)) if !frame.is_trailers() && !this.body.is_end_stream() => {}
            Some(Ok(_)) | None => this.give_back(context),
        }
        Poll::Ready(next)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Answered {
    /// One that nobody reads to its end ends its connection, unless all of it has arrived.
    fn drop(&mut self) {
        self.give_back(&mut Context::from_waker(Waker::noop()));
    }
}

#[cfg(test)]
mod tests;
