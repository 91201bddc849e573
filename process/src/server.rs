//! An HTTP/1.1 and HTTP/2 server with its bounds, and an end that finishes what was begun.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use http::{Request, Response};
use hyper::{
    body::{Body, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
};
use serde::Deserialize;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, Semaphore},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{config::Period, shutdown};

/// How many times [`ServerLimits::header_bytes_max`] is read off the wire at most.
pub const HEADER_BYTES_SPARE: u32 = 4;
/// Headers of one request that are read off the wire at most.
const HEADER_COUNT_MAX: usize = 1024;

/// What one listener takes on at most.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(default)]
pub struct ServerLimits {
    /// Connections at once; further ones wait in the kernel's queue.
    pub connections_max: usize,
    /// For a request's headers to arrive, and for an idle connection to stay.
    pub header_timeout: Period,
    /// Bytes of a request's headers. Up to [`HEADER_BYTES_SPARE`] times as many are read, so that
    /// whoever answers requests can refuse too many in his own words; beyond that the connection is.
    pub header_bytes_max: u32,
    /// Requests at once on one HTTP/2 connection.
    pub streams_max: u32,
    /// For requests under way to finish when the server ends.
    pub grace: Period,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            connections_max: 10_000,
            header_timeout: Period::from_secs(30),
            header_bytes_max: 32 * 1024,
            streams_max: 256,
            grace: Period::from_secs(10),
        }
    }
}

/// Who sent a request. Every request has one among its extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer(pub SocketAddr);

/// Serves until `stop` is cancelled, then takes no more connections, lets requests under way finish
/// and leaves within the grace period. `true` when everything finished.
pub async fn serve<F, R, B>(
    listener: TcpListener,
    limits: ServerLimits,
    answer: F,
    stop: CancellationToken,
) -> bool
where
    F: Fn(Request<Incoming>) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Response<B>> + Send + 'static,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let server = protocol(&limits);
    let graceful = GracefulShutdown::new();
    let permits = Arc::new(Semaphore::new(limits.connections_max));
    let mut connections = JoinSet::new();
    while let Some((stream, peer, permit)) = next_connection(&listener, &permits, &stop).await {
        let seen = Arc::new(Notify::new());
        let (noted, answer) = (Arc::clone(&seen), answer.clone());
        let served = service_fn(move |mut request: Request<Incoming>| {
            noted.notify_one();
            request.extensions_mut().insert(Peer(peer));
            let answered = answer(request);
            async move { Ok::<_, Infallible>(answered.await) }
        });
        let connection = server.serve_connection(TokioIo::new(stream), served).into_owned();
        let connection = graceful.watch(connection);
        connections.spawn(async move {
            let _permit = permit;
            let silent = tokio::time::timeout(limits.header_timeout.get(), seen.notified());
            let mut connection = std::pin::pin!(connection);
            let ended = tokio::select! {
                ended = &mut connection => Some(ended),
                // The protocol is chosen by the first bytes, and hyper gives them all the time in
                // the world: who has not brought a request by now is let go.
                silent = silent => if silent.is_ok() { Some(connection.await) } else { None },
            };
            if let Some(Err(error)) = ended {
                tracing::debug!(%error, %peer, "connection ended early");
            }
        });
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    let drained = shutdown::within(limits.grace.get(), "connections", graceful.shutdown()).await;
    connections.shutdown().await;
    drained.is_some()
}

fn protocol(limits: &ServerLimits) -> auto::Builder<TokioExecutor> {
    let header_bytes_max = limits.header_bytes_max.saturating_mul(HEADER_BYTES_SPARE);
    let mut server = auto::Builder::new(TokioExecutor::new());
    server
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout.get())
        .max_headers(HEADER_COUNT_MAX)
        .max_buf_size((header_bytes_max as usize).max(8 * 1024));
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
) -> Option<(TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
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
            Some((stream, peer, permit))
        }
    }
}
