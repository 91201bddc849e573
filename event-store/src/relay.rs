//! The relay: publishes the log to the epoch's stream, in order, once.

use async_nats::Client;
use consistency::LogPosition;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{EventStore, RelayConfig};

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
    /// Another process holds the lease; this one only wakes it.
    Standby,
    /// It holds the lease and publishes.
    Active,
    /// It cannot do its work now and tries again; the text says why.
    Failing(String),
    /// Log and stream contradict each other, so nothing is published and appends are refused until an
    /// operator has looked at it.
    Refused(String),
}

impl Relay {
    /// Starts the relay as NATS user of its own, the only one that may publish events. Needs NATS
    /// neither to start nor to stay.
    pub fn spawn(
        store: EventStore,
        client: Client,
        config: RelayConfig,
        shutdown: CancellationToken,
    ) -> Self {
        let (report, status) =
            watch::channel(RelayStatus { state: RelayState::Standby, published: None });
        let task = tokio::spawn(async move {
            let _ = (store, client, config, report);
            shutdown.cancelled().await;
        });
        Self { status, task }
    }

    /// Its status, now and as it changes.
    pub fn status(&self) -> watch::Receiver<RelayStatus> {
        self.status.clone()
    }

    /// Waits for the end after the shutdown was called for.
    pub async fn stopped(self) {
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the relay ended abnormally");
        }
    }
}
