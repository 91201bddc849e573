//! One connection through a proxy: two directions, each a reader and a writer with a bounded queue between them.
//!
//! Delay is a pipeline. The reader stamps each chunk with the moment it is due and reads on, so that a slow link is
//! late and not narrow. Memory is bounded in bytes; at the bound the sender is held up, as by a full window.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rand::RngExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::toxic::{Stream, Toxic, ToxicKind};
use super::{ACCEPT_PAUSE, Counters};

const CHUNK_BYTES: usize = 32 * 1024;
/// In flight in one direction of one connection: 200 ms at 40 MB/s.
const IN_FLIGHT_BYTES_MAX: usize = 8 * 1024 * 1024;
const IN_FLIGHT_CHUNKS_MAX: usize = 16 * 1024;
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// What the toxics of a proxy come to, for each direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Weather {
    upstream: Conditions,
    downstream: Conditions,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Conditions {
    latency_ms: u64,
    jitter_ms: u64,
    /// Swallows what is sent, and closes the connection after so many milliseconds; 0 for never.
    swallow_ms: Option<u64>,
}

impl Weather {
    pub(super) fn of(toxics: &[Toxic]) -> Self {
        let mut weather = Weather::default();
        for toxic in toxics {
            let conditions = match toxic.stream {
                Stream::Upstream => &mut weather.upstream,
                Stream::Downstream => &mut weather.downstream,
            };
            match toxic.kind {
                ToxicKind::Latency { latency, jitter } => {
                    conditions.latency_ms = conditions.latency_ms.saturating_add(latency);
                    conditions.jitter_ms = conditions.jitter_ms.saturating_add(jitter);
                }
                ToxicKind::Timeout { timeout } => conditions.swallow_ms = Some(timeout),
            }
        }
        weather
    }

    fn on(&self, stream: Stream) -> Conditions {
        match stream {
            Stream::Upstream => self.upstream,
            Stream::Downstream => self.downstream,
        }
    }
}

impl Conditions {
    fn delay(&self) -> Duration {
        let low = self.latency_ms.saturating_sub(self.jitter_ms);
        let high = self.latency_ms.saturating_add(self.jitter_ms);
        Duration::from_millis(rand::rng().random_range(low..=high))
    }
}

/// A link that is up: what each of its connections needs.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) upstream: String,
    pub(super) weather: watch::Receiver<Weather>,
    pub(super) counters: Arc<Counters>,
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
}

impl Line {
    /// Takes connections until the link is cut. The listener is closed then.
    pub(super) async fn accept(self, listener: TcpListener) {
        loop {
            let accepted = tokio::select! {
                biased;
                // A cut link takes nobody.
                () = self.stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((client, _)) => {
                    self.counters.connections.fetch_add(1, Ordering::Relaxed);
                    self.tasks.spawn(self.clone().carry(client));
                }
                Err(error) => {
                    tracing::warn!(error = %error, "could not take a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn carry(self, client: TcpStream) {
        let stop = self.stop.clone();
        tokio::select! {
            biased;
            // A cut link closes its connections, whatever is on the way.
            () = stop.cancelled() => {}
            () = self.carry_until_closed(client) => {}
        }
    }

    async fn carry_until_closed(self, client: TcpStream) {
        let connect = TcpStream::connect(&self.upstream);
        let Ok(Ok(upstream)) = tokio::time::timeout(CONNECT_DEADLINE, connect).await else {
            return;
        };
        // Both fail only on a connection that is gone, which the first read finds.
        let _ = (client.set_nodelay(true), upstream.set_nodelay(true));
        let (client_reader, client_writer) = client.into_split();
        let (upstream_reader, upstream_writer) = upstream.into_split();
        let out = Direction { stream: Stream::Upstream, weather: self.weather.clone() };
        let back = Direction { stream: Stream::Downstream, weather: self.weather };
        let out = out.run(client_reader, upstream_writer, &self.counters.to_upstream);
        let back = back.run(upstream_reader, client_writer, &self.counters.from_upstream);
        // One side may close its half and still read the other. A broken direction ends both.
        let _ = tokio::try_join!(out, back);
    }
}

struct Chunk {
    bytes: Bytes,
    due: Instant,
    _room: OwnedSemaphorePermit,
}

/// A direction has ended in a way that ends the connection.
struct Broken;

impl From<std::io::Error> for Broken {
    fn from(_: std::io::Error) -> Self {
        Broken
    }
}

struct Direction {
    stream: Stream,
    weather: watch::Receiver<Weather>,
}

impl Direction {
    async fn run(
        mut self,
        reader: OwnedReadHalf,
        writer: OwnedWriteHalf,
        bytes: &AtomicU64,
    ) -> Result<(), Broken> {
        let (queue, arrivals) = mpsc::channel(IN_FLIGHT_CHUNKS_MAX);
        tokio::try_join!(self.read(reader, queue), write(arrivals, writer, bytes)).map(|_| ())
    }

    async fn read(
        &mut self,
        mut reader: OwnedReadHalf,
        queue: mpsc::Sender<Chunk>,
    ) -> Result<(), Broken> {
        let room = Arc::new(Semaphore::new(IN_FLIGHT_BYTES_MAX));
        let mut buffer = BytesMut::new();
        let mut due = Instant::now();
        loop {
            let now = self.weather.borrow_and_update().on(self.stream);
            if let Some(timeout_ms) = now.swallow_ms {
                self.swallow(&mut reader, timeout_ms).await;
                return Err(Broken);
            }
            buffer.reserve(CHUNK_BYTES);
            let read = tokio::select! {
                biased;
                // New weather holds for what is read from now on.
                changed = self.weather.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return Err(Broken),
                },
                read = reader.read_buf(&mut buffer) => read?,
            };
            if read == 0 {
                return Ok(());
            }
            let size = u32::try_from(read).map_err(|_| Broken)?;
            let permit = Arc::clone(&room).acquire_many_owned(size).await.map_err(|_| Broken)?;
            // Never before what was sent earlier: jitter delays a stream, it does not reorder it.
            due = due.max(Instant::now() + now.delay());
            let chunk = Chunk { bytes: buffer.split().freeze(), due, _room: permit };
            queue.send(chunk).await.map_err(|_| Broken)?;
        }
    }

    /// Reads and forgets, until the toxic goes, its time is over, or the sender closes.
    async fn swallow(&mut self, reader: &mut OwnedReadHalf, timeout_ms: u64) {
        let timeout = async {
            match timeout_ms {
                0 => std::future::pending().await,
                some => tokio::time::sleep(Duration::from_millis(some)).await,
            }
        };
        let stream = self.stream;
        let gone = self.weather.wait_for(|weather| weather.on(stream).swallow_ms.is_none());
        let swallowing = async {
            let mut sink = [0; 4096];
            while matches!(reader.read(&mut sink).await, Ok(read) if read > 0) {}
            // The other side learns of a close no sooner than of anything else.
            std::future::pending().await
        };
        tokio::select! {
            biased;
            // The toxic's end and its time limit both close the connection; reading goes on till then.
            _ = gone => {}
            () = timeout => {}
            () = swallowing => {}
        }
    }
}

async fn write(
    mut arrivals: mpsc::Receiver<Chunk>,
    mut writer: OwnedWriteHalf,
    bytes: &AtomicU64,
) -> Result<(), Broken> {
    while let Some(chunk) = arrivals.recv().await {
        tokio::time::sleep_until(chunk.due).await;
        writer.write_all(&chunk.bytes).await?;
        bytes.fetch_add(chunk.bytes.len() as u64, Ordering::Relaxed);
    }
    // The sender closed its half; everything before that has arrived.
    writer.shutdown().await?;
    Ok(())
}
