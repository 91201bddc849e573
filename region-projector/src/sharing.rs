//! One process among those that share the partitions of a region.
//!
//! The database is the only place where they meet. Every process keeps one row alive there; what it
//! holds hangs on that row, and goes with it. The row is renewed now and then, and looked at together
//! with everyone else's at once when anything has changed. Correctness never rests on it: whoever takes
//! a partition raises its fence, and with an old fence nothing is committed. A process that was taken
//! for dead and goes on may still say what it reads, which is as true as before.

pub mod rows;
pub mod split;

use std::sync::Arc;

use process::postgres::AtHand;
use sqlx::PgPool;
use sqlx::postgres::PgListener;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::attempt::{Attempt, bounded};
use crate::config::SharingConfig;
use crate::health::{Health, Part, chain_of};
use crate::status::Status;
use crate::versions::{self, Version};
use rows::{Share, Snapshot};

const WHO: &str = "sharing";

/// What the keeper tells, and how to hurry it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Sharing {
    process: Uuid,
    seen: watch::Receiver<Option<Arc<Snapshot>>>,
    wake: Arc<Notify>,
}

impl Sharing {
    /// Who we are.
    pub fn process(&self) -> Uuid {
        self.process
    }

    /// What the database showed last; nothing before the first look.
    pub fn seen(&self) -> watch::Receiver<Option<Arc<Snapshot>>> {
        self.seen.clone()
    }

    /// Has the keeper look again.
    pub fn look(&self) {
        self.wake.notify_one();
    }
}

/// Which versions a process can apply, of those that there are.
pub type Shareable = Box<dyn Fn(&[Version]) -> Vec<Share> + Send + Sync>;

/// Keeps the process in, and looks at the others.
pub struct Keeper {
    connections: AtHand,
    process: Uuid,
    name: String,
    config: SharingConfig,
    shareable: Shareable,
    status: Status,
    health: Health,
    seen: watch::Sender<Option<Arc<Snapshot>>>,
    wake: Arc<Notify>,
}

impl Keeper {
    /// `pool` is its own, so that busy partitions cannot keep it from renewing. `name` is where the
    /// process runs, and `shareable` says what it can apply.
    pub fn new(
        pool: PgPool,
        name: String,
        config: SharingConfig,
        shareable: Shareable,
        (status, health): (Status, Health),
    ) -> (Self, Sharing) {
        let process = Uuid::new_v4();
        let (seen, seen_by) = watch::channel(None);
        let wake = Arc::new(Notify::new());
        let sharing = Sharing { process, seen: seen_by, wake: Arc::clone(&wake) };
        // One listens.
        let connections_max = pool.options().get_max_connections().saturating_sub(1);
        let connections = AtHand::new(pool, connections_max);
        let keeper =
            Self { connections, process, name, config, shareable, status, health, seen, wake };
        (keeper, sharing)
    }

    /// Keeps on until it is stopped, and then frees at once what is held: whoever stops it has seen
    /// the partitions come to rest.
    pub async fn run(self, stop: CancellationToken) {
        let ears = Ears(tokio::spawn(listen(
            self.connections.pool().clone(),
            Arc::clone(&self.wake),
            self.config.renew_interval.get(),
        )));
        loop {
            let looked = Box::pin(bounded(self.config.lease, self.look()));
            match stop.run_until_cancelled(looked).await {
                Some(Ok(snapshot)) => self.tell(snapshot),
                Some(Err(error)) => self.health.unwell(Part::Database, WHO, chain_of(&error)),
                None => break,
            }
            tokio::select! {
                biased;
                // What is held must be freed before others take us for dead.
                () = stop.cancelled() => break,
                // Someone came, went, gave up or was stopped.
                () = self.wake.notified() => {}
                () = sleep(self.config.renew_interval.get()) => {}
            }
        }
        drop(ears);
        match bounded(self.config.lease, self.leave()).await {
            Ok(()) => tracing::info!(name = self.name, "partitions released"),
            Err(error) => {
                tracing::warn!(error = chain_of(&error), "leases are left to run out");
            }
        }
    }

    fn tell(&self, snapshot: Snapshot) {
        self.health.well(Part::Database, WHO);
        self.seen.send_if_modified(|seen| {
            let is_news = seen.as_deref() != Some(&snapshot);
            if is_news {
                *seen = Some(Arc::new(snapshot));
            }
            is_news
        });
    }

    async fn look(&self) -> Result<Snapshot, sqlx::Error> {
        let mut attempt = Attempt::begin(&self.connections).await?;
        let lease_ms = self.config.lease.millis();
        let head = self.status.newest_head();
        if !rows::renew(&mut attempt, self.process, lease_ms, head).await? {
            self.join(&mut attempt).await?;
        }
        let buried = rows::bury(&mut attempt, self.process).await?;
        if !buried.is_empty() {
            tracing::warn!(processes = buried.join(", "), "taken for dead, their leases are free");
            rows::notify(&mut attempt).await?;
        }
        let mut snapshot = rows::look(&mut attempt, self.process).await?;
        if self.takes_part_in_more(&snapshot) {
            let mut transaction = sqlx::Connection::begin(&mut *attempt).await?;
            let shares = (self.shareable)(&snapshot.versions);
            rows::share(&mut transaction, self.process, &shares).await?;
            rows::notify(&mut transaction).await?;
            transaction.commit().await?;
            snapshot = rows::look(&mut attempt, self.process).await?;
        }
        attempt.finish();
        Ok(snapshot)
    }

    /// Whether there is a version that it can apply and did not know of.
    fn takes_part_in_more(&self, snapshot: &Snapshot) -> bool {
        let is_new = |share: &Share| {
            let name = (share.key.projection.to_string(), share.key.version_column());
            let split = snapshot.splits.get(&name);
            !share.is_by_hand && split.is_none_or(|split| !split.members.contains(&self.process))
        };
        (self.shareable)(&snapshot.versions).iter().any(is_new)
    }

    async fn join(&self, attempt: &mut Attempt) -> Result<(), sqlx::Error> {
        let mut transaction = sqlx::Connection::begin(&mut **attempt).await?;
        let lease_ms = self.config.lease.millis();
        let shares = (self.shareable)(&versions::all(&mut transaction).await?);
        rows::join(&mut transaction, self.process, &self.name, lease_ms, &shares).await?;
        transaction.commit().await?;
        if self.seen.borrow().is_some() {
            tracing::warn!(name = self.name, "was taken for dead, joining again");
        } else {
            tracing::info!(name = self.name, process = %self.process, "joined");
        }
        Ok(())
    }

    async fn leave(&self) -> Result<(), sqlx::Error> {
        let mut attempt = Attempt::begin(&self.connections).await?;
        let mut transaction = sqlx::Connection::begin(&mut *attempt).await?;
        rows::leave(&mut transaction, self.process).await?;
        transaction.commit().await?;
        attempt.finish();
        Ok(())
    }
}

/// A listening task that ends with its owner.
struct Ears(JoinHandle<()>);

impl Drop for Ears {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Wakes the keeper at every notification. Without a connection the keeper looks when it renews.
async fn listen(pool: PgPool, wake: Arc<Notify>, pause: std::time::Duration) {
    loop {
        if let Ok(mut listener) = PgListener::connect_with(&pool).await
            && listener.listen(rows::CHANNEL).await.is_ok()
        {
            // What happened while nobody listened.
            wake.notify_one();
            // A connection that was lost and made anew may have missed something as well.
            while listener.try_recv().await.is_ok() {
                wake.notify_one();
            }
        }
        sleep(pause).await;
    }
}
