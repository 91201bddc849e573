//! An HTTP/1.1 and HTTP/2 server with its bounds, and an end that finishes what was begun.

mod addresses;
mod patience;
mod stalls;
mod workers;

use std::{
    convert::Infallible,
    io,
    net::{self, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http::{Request, Response, Version};
use hyper::{
    body::{Body, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{
        conn::auto,
        graceful::{GracefulShutdown, Watcher},
    },
};
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    runtime::Handle,
    sync::{Notify, Semaphore},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

pub use self::workers::Workers;
use self::{
    addresses::Addresses,
    patience::Patience,
    stalls::{Followed, Stalls},
};
use crate::{config::Period, shutdown, tls::ServerTls};

/// How many times [`ServerLimits::header_bytes_max`] is read off the wire at most.
pub const HEADER_BYTES_SPARE: u32 = 4;
/// Headers of one request that are read off the wire at most, where more are taken than
/// [`HEADER_COUNT_FREE`].
const HEADER_COUNT_MAX: usize = 1024;
/// Headers that HTTP/1 finds room for on its stack. For any more it clears tens of kilobytes, and does so for
/// every request.
const HEADER_COUNT_FREE: usize = 100;

/// What one listener takes on at most.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(default)]
pub struct ServerLimits {
    /// Connections at once; further ones wait in the kernel's queue.
    pub connections_max: usize,
    /// Of them those of one address; further ones are closed. Behind a balancer all have its address.
    pub connections_per_address_max: usize,
    /// For a request's headers to arrive, and for an idle connection to stay.
    pub header_timeout: Period,
    /// Bytes of a request's headers. Up to [`HEADER_BYTES_SPARE`] times as many are read, so that
    /// whoever answers requests can refuse too many in his own words; beyond that the connection is.
    pub header_bytes_max: u32,
    /// Headers of one request, refused like their bytes. From 100 on every request costs more.
    pub header_count_max: usize,
    /// For a client to take any of what it is sent, of each answer on HTTP/2. One that asks and does not
    /// read is let go.
    pub answer_stall_max: Period,
    /// Requests at once on one HTTP/2 connection.
    pub streams_max: u32,
    /// For requests under way to finish when the server ends.
    pub grace: Period,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            connections_max: 10_000,
            connections_per_address_max: 10_000,
            header_timeout: Period::from_secs(30),
            header_bytes_max: 32 * 1024,
            header_count_max: 64,
            answer_stall_max: Period::from_secs(30),
            streams_max: 256,
            grace: Period::from_secs(10),
        }
    }
}

/// Who sent a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer(pub SocketAddr);

/// Serves in the clear until `stop` is cancelled, then takes no more connections, lets requests under
/// way finish and leaves within the grace period. `true` when everything finished.
pub async fn serve<F, R, B>(
    listener: TcpListener,
    limits: ServerLimits,
    answer: F,
    stop: CancellationToken,
) -> bool
where
    F: Fn(Request<Incoming>, Peer) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Response<B>> + Send + 'static,
    B: Body + Unpin + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    serve_over(None, None, listener, limits, answer, stop).await
}

/// The same over `tls`, when nothing in the clear is answered, and with `workers` to answer; without, that is
/// done by the runtime that this runs on.
pub async fn serve_over<F, R, B>(
    tls: Option<ServerTls>,
    workers: Option<&Workers>,
    listener: TcpListener,
    limits: ServerLimits,
    answer: F,
    stop: CancellationToken,
) -> bool
where
    F: Fn(Request<Incoming>, Peer) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Response<B>> + Send + 'static,
    B: Body + Unpin + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let protocol = Arc::new(protocol(&limits));
    let graceful = GracefulShutdown::new();
    let permits = Arc::new(Semaphore::new(limits.connections_max));
    let addresses = Addresses::default();
    let mut connections = JoinSet::new();
    while let Some((stream, peer, permit)) = next_connection(&listener, &permits, &stop).await {
        let Some(place) = addresses.take(peer.ip(), limits.connections_per_address_max) else {
            tracing::debug!(%peer, "the address has as many connections as it may");
            continue;
        };
        let seat = workers.map(Workers::seat);
        let runtime = seat.as_ref().map_or_else(Handle::current, |seat| seat.runtime.clone());
        let visit = Visit { peer, limits, protocol: Arc::clone(&protocol) };
        let (tls, answer, watcher) = (tls.clone(), answer.clone(), graceful.watcher());
        let conversation = async move {
            let _held = (permit, place, seat);
            // Watched by the runtime that serves it.
            let stream = match stream.and_then(TcpStream::from_std) {
                Ok(stream) => Patience::new(stream, limits.answer_stall_max.get()),
                Err(error) => return tracing::warn!(%error, %peer, "connection not taken over"),
            };
            let Some(tls) = tls else { return visit.converse(stream, answer, watcher).await };
            let greeted = tls.acceptor.accept(stream);
            match tokio::time::timeout(limits.header_timeout.get(), greeted).await {
                Ok(Ok(stream)) => visit.converse(stream, answer, watcher).await,
                Ok(Err(error)) => tracing::debug!(%error, %peer, "tls not agreed on"),
                Err(_) => tracing::debug!(%peer, "tls not agreed on in time"),
            }
        };
        connections.spawn_on(conversation, &runtime);
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    let drained = shutdown::within(limits.grace.get(), "connections", graceful.shutdown()).await;
    connections.shutdown().await;
    drained.is_some()
}

/// One connection.
struct Visit {
    peer: SocketAddr,
    limits: ServerLimits,
    protocol: Arc<auto::Builder<TokioExecutor>>,
}

impl Visit {
    async fn converse<I, F, R, B>(self, stream: I, answer: F, watcher: Watcher)
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        F: Fn(Request<Incoming>, Peer) -> R + Send + 'static,
        R: Future<Output = Response<B>> + Send + 'static,
        B: Body + Unpin + Send + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let Self { peer, limits, protocol } = self;
        let seen = Arc::new(Notify::new());
        let noted = Arc::clone(&seen);
        let stalls = Arc::new(Stalls::default());
        let given = Arc::clone(&stalls);
        let served = service_fn(move |request: Request<Incoming>| {
            noted.notify_one();
            // Elsewhere an answer stalls with its connection.
            let stalls = (request.version() == Version::HTTP_2).then(|| Arc::clone(&given));
            let answered = answer(request, Peer(peer));
            let follow = |body| Followed::new(body, stalls);
            async move { Ok::<_, Infallible>(answered.await.map(follow)) }
        });
        let connection = protocol.serve_connection(TokioIo::new(stream), served);
        let mut connection = std::pin::pin!(watcher.watch(connection));
        let silent = tokio::time::timeout(limits.header_timeout.get(), seen.notified());
        let stall_max = limits.answer_stall_max.get();
        let conversing = async {
            tokio::select! {
                biased;
                // What moves does not stall.
                ended = &mut connection => Some(ended),
                () = stalls.met(stall_max) => None,
            }
        };
        let mut conversing = std::pin::pin!(conversing);
        let ended = tokio::select! {
            biased;
            // A request that has come is seen by this before time is up.
            ended = &mut conversing => ended,
            // The protocol is chosen by the first bytes, and hyper gives them all the time in the
            // world: who has not brought a request by now is let go.
            silent = silent => if silent.is_ok() { conversing.await } else { None },
        };
        if let Some(Err(error)) = ended {
            tracing::debug!(%error, %peer, "connection ended early");
        }
    }
}

fn protocol(limits: &ServerLimits) -> auto::Builder<TokioExecutor> {
    let header_bytes_max = limits.header_bytes_max.saturating_mul(HEADER_BYTES_SPARE);
    let mut server = auto::Builder::new(TokioExecutor::new());
    server
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout.get())
        .max_buf_size((header_bytes_max as usize).max(8 * 1024));
    if HEADER_COUNT_FREE <= limits.header_count_max {
        server.http1().max_headers(HEADER_COUNT_MAX);
    }
    server
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams_max)
        .max_header_list_size(header_bytes_max)
        .keep_alive_interval(limits.header_timeout.get())
        .keep_alive_timeout(limits.header_timeout.get());
    server
}

async fn next_connection(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
    stop: &CancellationToken,
) -> Option<(io::Result<net::TcpStream>, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
    let accepting = async {
        let permit = Arc::clone(permits).acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => return (stream, peer, permit),
                // The connection is gone already, or the process is out of descriptors: either
                // way the listener is sound, and a pause keeps the second from spinning.
                Err(error) => {
                    tracing::warn!(%error, "connection not accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    };
    tokio::select! {
        biased;
        // No new work once the end is near.
        () = stop.cancelled() => None,
        (stream, peer, permit) = accepting => {
            // Answers are small and whole; waiting to fill a packet only makes them late.
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "nagle's algorithm stays on");
            }
            Some((stream.into_std(), peer, permit))
        }
    }
}
