//! The relay: publishes the log to the epoch's stream, in order, once.
//!
//! Each message demands that the stream's last sequence be its position minus one, so the server
//! refuses what is out of order, double, or from a relay that lost its turn. The stream's last sequence
//! is the only cursor. A lease keeps one process at it; the others wake the holder and wait.

mod acks;
mod agreement;
mod pipeline;
mod session;
mod stream;

use std::time::Duration;

use async_nats::Client;
use async_nats::connection::State;
use bytes::Bytes;
use consistency::LogPosition;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::lease::Lease;
use crate::{EventStore, RelayConfig};
use session::{Session, SessionError};

pub use agreement::{CompareError, last_common};

const LEASE: &str = "relay";
/// After the relay lost its place: long enough not to spin, short enough not to be felt.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// After something it needs was not there.
const FAILURE_PAUSE: Duration = Duration::from_millis(500);

/// The relay's task, owned by whoever spawned it. Ends when the token given to [`Relay::spawn`] is
/// cancelled.
#[derive(Debug)]
pub struct Relay {
    status: watch::Receiver<RelayStatus>,
    task: JoinHandle<()>,
}

/// What the relay is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayStatus {
    /// Its part at the moment.
    pub state: RelayState,
    /// The last event that it knows to be on the stream; `None` until it has looked.
    pub published: Option<LogPosition>,
}

/// The relay's part at the moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RelayState {
    /// Another process holds the lease, or nobody yet; this one only wakes it.
    Standby,
    /// It holds the lease and publishes.
    Active,
    /// It cannot do its work now and tries again; the text says why.
    Failing(String),
    /// Appends are refused, because log and stream contradict each other or an operator said so.
    /// Nothing is published until an operator has looked at it.
    Refused(String),
}

impl Relay {
    /// Starts the relay. `client` connects as a NATS user of its own, the only one that may publish
    /// events; the server need not be there yet.
    pub fn spawn(
        store: EventStore,
        client: Client,
        config: RelayConfig,
        shutdown: CancellationToken,
    ) -> Self {
        let initial = RelayStatus { state: RelayState::Standby, published: None };
        let (report, status) = watch::channel(initial);
        store.set_publisher(client.clone());
        let lease = Lease::new(store.pool().clone(), LEASE, Uuid::new_v4(), config.lease_duration);
        let worker = Worker { store, client, config, lease, report: Report(report), shutdown };
        Self { status, task: tokio::spawn(worker.run()) }
    }

    /// Its status, now and as it changes.
    pub fn status(&self) -> watch::Receiver<RelayStatus> {
        self.status.clone()
    }

    /// Waits for the end, after the shutdown was called for.
    pub async fn stopped(self) {
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the relay ended abnormally");
        }
    }
}

/// The writing side of the status. Changes of state are logged, each once.
#[derive(Debug)]
struct Report(watch::Sender<RelayStatus>);

impl Report {
    fn state(&self, state: RelayState) {
        self.0.send_if_modified(|status| {
            let changed = status.state != state;
            if changed {
                match &state {
                    RelayState::Standby => tracing::info!("the relay stands by"),
                    RelayState::Active => tracing::info!("the relay is active"),
                    RelayState::Failing(reason) => {
                        tracing::warn!(reason, "the relay cannot publish");
                    }
                    RelayState::Refused(reason) => {
                        tracing::error!(reason, "the log refuses appends");
                    }
                }
                status.state = state;
            }
            changed
        });
    }

    fn last_published(&self) -> Option<LogPosition> {
        self.0.borrow().published
    }

    fn published(&self, at: LogPosition) {
        self.0.send_if_modified(|status| {
            let changed = status.published != Some(at);
            status.published = Some(at);
            changed
        });
    }
}

#[derive(Debug)]
struct Worker {
    store: EventStore,
    client: Client,
    config: RelayConfig,
    lease: Lease,
    report: Report,
    shutdown: CancellationToken,
}

impl Worker {
    async fn run(self) {
        while !self.shutdown.is_cancelled() {
            match self.lease.hold().await {
                Ok(true) => self.lead().await,
                Ok(false) => {
                    self.report.state(RelayState::Standby);
                    self.stand_by().await;
                }
                Err(error) => {
                    self.report.state(failing(&error));
                    self.pause(FAILURE_PAUSE).await;
                }
            }
        }
        self.report.state(RelayState::Standby);
        match timeout(self.config.lease_duration, self.lease.release()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "could not release the relay's lease"),
            Err(_) => tracing::warn!("the relay's lease is left to expire"),
        }
    }

    /// Publishes while the lease lasts.
    async fn lead(&self) {
        let publish = async {
            loop {
                let session = Session::new(
                    &self.store,
                    &self.client,
                    &self.config,
                    &self.report,
                    &self.shutdown,
                );
                let Err(error) = Box::pin(session.run()).await else { return };
                let pause = match &error {
                    SessionError::LostPlace(reason) => {
                        tracing::info!(reason, "the relay finds its place again");
                        RETRY_PAUSE
                    }
                    SessionError::Refused(reason) => {
                        self.report.state(RelayState::Refused(reason.clone()));
                        FAILURE_PAUSE
                    }
                    SessionError::Disconnected
                    | SessionError::Read(_)
                    | SessionError::Stream(_)
                    | SessionError::TooLarge(_) => {
                        self.report.state(failing(&error));
                        FAILURE_PAUSE
                    }
                };
                self.pause(pause).await;
                if self.shutdown.is_cancelled() {
                    return;
                }
            }
        };
        tokio::select! {
            biased;
            // The session sees the shutdown itself and finishes what is in flight.
            () = publish => {}
            () = self.lease.keep() => tracing::info!("the relay lost its lease"),
        }
    }

    /// Wakes the holder of the lease for what is appended here, until it is time to try for the lease.
    async fn stand_by(&self) {
        let mut head = self.store.watch_head();
        let try_interval = self.lease.renewal_interval().min(self.config.poll_interval);
        let end = Instant::now() + try_interval;
        loop {
            tokio::select! {
                biased;
                () = self.shutdown.cancelled() => return,
                () = sleep_until(end) => return,
                // The store outlives this loop, so the watch cannot be closed.
                _ = head.changed() => self.wake_holder().await,
            }
        }
    }

    /// A lost wake-up costs the holder's polling interval, no more.
    async fn wake_holder(&self) {
        if self.client.connection_state() != State::Connected {
            return;
        }
        let subject = self.config.wake_subject.clone();
        let sent = timeout(RETRY_PAUSE, self.client.publish(subject, Bytes::new())).await;
        if let Ok(Err(error)) = sent {
            tracing::debug!(%error, "could not wake the relay");
        }
    }

    async fn pause(&self, duration: Duration) {
        tokio::select! {
            biased;
            () = self.shutdown.cancelled() => {}
            () = sleep(duration) => {}
        }
    }
}

/// The error with what caused it, for the status and the log.
fn failing(error: &dyn std::error::Error) -> RelayState {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    RelayState::Failing(text)
}
