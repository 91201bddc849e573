//! The handle that appends and reads, and the task behind it that commits.

use std::sync::{Arc, PoisonError, RwLock};

use async_nats::Client;
use consistency::{
    AggregateId, Epoch, EpochHistory, Event, EventId, FoldName, LogPosition, Position, Version,
};
use sqlx::PgPool;
use sqlx::migrate::MigrateError;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::append::{Append, Appended, Command};
use crate::gather::{Gatherer, Queued, Reply};
use crate::idempotency::{self, Idempotency, Once, Repeat};
use crate::log::{self, AggregateHead, Head, Limit};
use crate::recent::{Follower, Recent};
use crate::refusal::Refusal;
use crate::seen::Seen;
use crate::snapshot::{self, Keep, SNAPSHOTS_WAITING_MAX, Tail};
use crate::{AppendError, OpenError, ReadError, StoreConfig, bounds};

/// Brings the database's schema up to what this crate needs. Newer migrations than it knows are left
/// alone, so that the release before runs beside its successor.
pub async fn migrate(pool: &PgPool) -> Result<(), MigrateError> {
    sqlx::migrate!("../migrations/primary").set_ignore_missing(true).run(pool).await
}

/// The log of the primary region. Clones share one queue and one committer. Who appends does so on a runtime of
/// tokio's, which commits when nobody else does.
#[derive(Debug, Clone)]
pub struct EventStore {
    shared: Arc<Shared>,
    judged: Option<Epoch>,
}

#[derive(Debug)]
struct Shared {
    pool: PgPool,
    config: StoreConfig,
    gatherer: Arc<Gatherer>,
    queue_bytes: Arc<Semaphore>,
    stop: CancellationToken,
    seen: Seen,
    recent: Arc<Recent>,
    snapshots: mpsc::Sender<Keep>,
    /// Where events are published, which says how large they may be.
    publisher: RwLock<Option<Client>>,
}

/// Without a handle nobody appends, nor uses keys.
impl Drop for Shared {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// The task that commits what was appended, the one that prunes idempotency keys and the one that keeps
/// snapshots. Owned by whoever opened the store.
#[derive(Debug)]
pub struct Committer {
    stop: CancellationToken,
    task: JoinHandle<()>,
    pruner: JoinHandle<()>,
    keeper: JoinHandle<()>,
}

impl Committer {
    /// Takes no more appends, commits those that wait, and ends.
    pub async fn stop(self) {
        self.stop.cancel();
        let (committed, pruned, kept) = tokio::join!(self.task, self.pruner, self.keeper);
        if let Err(error) = committed {
            tracing::error!(%error, "the committer ended abnormally");
        }
        if let Err(error) = pruned {
            tracing::error!(%error, "the pruner ended abnormally");
        }
        if let Err(error) = kept {
            tracing::error!(%error, "the keeper of snapshots ended abnormally");
        }
    }
}

impl EventStore {
    /// Opens the log in a migrated database, makes it the log of `config.log_id` if it is none yet, and
    /// starts the committer. The pool's connections are best bounded by [`crate::Timeouts`]; the
    /// committer keeps one of them, other runtimes that append one each, three of them and a quarter of the pool
    /// at most, pruning takes one now and then, and the relay uses up to three.
    pub async fn open(pool: PgPool, config: StoreConfig) -> Result<(Self, Committer), OpenError> {
        if let Some(contradiction) = config.contradiction() {
            return Err(OpenError::Config(contradiction));
        }
        let head = log::open(&pool, config.log_id).await?;
        if head.log_id != config.log_id {
            return Err(OpenError::OtherLog { found: head.log_id, configured: config.log_id });
        }
        let seen = Seen::new(head.at);
        let stop = CancellationToken::new();
        let recent = Arc::new(Recent::default());
        let gatherer =
            Gatherer::new(pool.clone(), config.clone(), seen.clone(), Arc::clone(&recent));
        let gatherer = Arc::new(gatherer);
        let task = tokio::spawn(Arc::clone(&gatherer).run(stop.clone()));
        let pruner = idempotency::prune(pool.clone(), config.clone(), stop.clone());
        let pruner = tokio::spawn(pruner);
        let (snapshots, keeping) = mpsc::channel(SNAPSHOTS_WAITING_MAX);
        let keeper = snapshot::keep(pool.clone(), keeping, config.statement_wait_max, stop.clone());
        let keeper = tokio::spawn(keeper);
        let queue_bytes = Arc::new(Semaphore::new(config.queue_bytes_max));
        let shared = Arc::new(Shared {
            pool,
            config,
            gatherer,
            queue_bytes,
            stop: stop.clone(),
            seen,
            recent,
            snapshots,
            publisher: RwLock::default(),
        });
        Ok((Self { shared, judged: None }, Committer { stop, task, pruner, keeper }))
    }

    /// The same log for a caller that was judged in `epoch`: what it has written and seen is in the log of
    /// that epoch, and may not be in that of the next. In any other epoch nothing is appended for it.
    pub fn judged_in(&self, epoch: Epoch) -> Self {
        Self { shared: Arc::clone(&self.shared), judged: Some(epoch) }
    }

    /// Appends the events of one aggregate, together or not at all. Answers after the commit, which may run on
    /// the caller's runtime and be others' as well: that has to be run until it ends. When the caller stops waiting, the append is dropped if it is still queued, and may be committed if not.
    pub async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        match self.commit(append, None).await? {
            Once::Appended(appended) => Ok(appended),
            Once::Repeated(_) => unreachable!("only a key makes a repeat"),
        }
    }

    /// As [`append`](Self::append), unless the key was used before: then nothing is appended, whatever
    /// has become of the aggregate, and the answer is the first one. Errors are not remembered: a repeat
    /// of what failed is tried again. After [`AppendError::OutcomeUnknown`] a repeat finds out, and the
    /// lost call, should it still arrive, finds the repeat.
    pub async fn append_once(
        &self,
        append: Append,
        idempotency: Idempotency,
    ) -> Result<Once, AppendError> {
        self.commit(append, Some(idempotency)).await
    }

    /// What the key says to the request, if it was used before. For a command, whose rules would refuse
    /// their own repeat: ask before they run, and again before their refusal is answered, since the
    /// first request may have been committed in between. Then [`append_once`](Self::append_once) what
    /// they made.
    pub async fn find_repeat(
        &self,
        idempotency: &Idempotency,
    ) -> Result<Option<Repeat>, ReadError> {
        self.bounded(idempotency::find(self.pool(), idempotency)).await
    }

    async fn commit(
        &self,
        append: Append,
        idempotency: Option<Idempotency>,
    ) -> Result<Once, AppendError> {
        let shared = &self.shared;
        let command = Command { append, idempotency, judged: self.judged };
        if shared.stop.is_cancelled() {
            return Err(AppendError::Stopping);
        }
        let bytes = bounds::check(&command.append, &shared.config, self.payload_bytes_max())?;
        let bytes_wanted = u32::try_from(bytes).map_err(|_| AppendError::Overloaded)?;
        let room = Arc::clone(&shared.queue_bytes)
            .try_acquire_many_owned(bytes_wanted)
            .map_err(|_| AppendError::Overloaded)?;
        let (reply, answer) = oneshot::channel();
        shared.gatherer.push(Queued { command, bytes, reply: Reply::here(reply, room) })?;
        // Whoever commits drops a reply only by dying in the middle.
        answer.await.unwrap_or(Err(AppendError::OutcomeUnknown))
    }

    /// The end of the log, as the database has it now.
    pub async fn head(&self) -> Result<Head, ReadError> {
        let head = self.bounded(log::head(self.pool())).await?.ok_or_else(log::no_head)?;
        self.shared.seen.raise(head.at);
        Ok(head)
    }

    /// The newest end of the log that this process has seen; other processes may have appended since.
    pub fn head_seen(&self) -> LogPosition {
        self.shared.seen.head()
    }

    /// Tells of each newer end of the log that this process sees.
    pub(crate) fn watch_head(&self) -> watch::Receiver<LogPosition> {
        self.shared.seen.watch_head()
    }

    /// Tells of each newer epoch of the log that this process sees.
    pub fn watch_epoch(&self) -> watch::Receiver<Epoch> {
        self.shared.seen.watch_epoch()
    }

    /// Has what this process commits kept for whoever follows it, which is the relay.
    pub(crate) fn follow(&self) -> Follower {
        self.shared.recent.follow()
    }

    /// The last version and position of an aggregate.
    pub async fn aggregate_head(
        &self,
        aggregate: &AggregateId,
    ) -> Result<AggregateHead, ReadError> {
        self.bounded(log::aggregate_head(self.pool(), aggregate)).await
    }

    /// At most `limit` events of an aggregate from a version on, in order. Fewer when they are large;
    /// none only at the aggregate's end.
    pub async fn read_aggregate(
        &self,
        aggregate: &AggregateId,
        from: Version,
        limit: u32,
    ) -> Result<Vec<Event>, ReadError> {
        let limit = self.limit(limit);
        self.bounded(log::read_aggregate(self.pool(), aggregate, from, limit)).await
    }

    /// What an aggregate's state is folded from by the rules of `fold`: the snapshot they made, if one is
    /// kept and the log still has its event, and at most about `limit` events after it.
    pub async fn read_tail(
        &self,
        aggregate: &AggregateId,
        fold: &FoldName,
        limit: u32,
    ) -> Result<Tail, ReadError> {
        let limit = self.limit(limit);
        self.bounded(snapshot::read_tail(self.pool(), aggregate, fold, limit)).await
    }

    /// The same without a snapshot, from a version on.
    pub async fn read_on(
        &self,
        aggregate: &AggregateId,
        from: Version,
        limit: u32,
    ) -> Result<Tail, ReadError> {
        let limit = self.limit(limit);
        self.bounded(snapshot::read_on(self.pool(), aggregate, from, limit)).await
    }

    /// Keeps a snapshot in the background. Left undone when too many wait: a later fold makes it again.
    pub fn keep_snapshot(&self, keep: Keep) {
        if self.shared.snapshots.try_send(keep).is_err() {
            tracing::debug!("no room for a snapshot");
        }
    }

    /// At most `limit` events of the log after a position, in order. Fewer when they are large; none
    /// only at the log's end.
    pub async fn read_range(&self, after: Position, limit: u32) -> Result<Vec<Event>, ReadError> {
        self.bounded(log::read_range(self.pool(), after, self.limit(limit))).await
    }

    /// Whether more events may follow than these, which [`Self::read_range`] found.
    pub(crate) fn may_have_cut(&self, found: &[Event], limit: u32) -> bool {
        self.limit(limit).may_have_cut(found)
    }

    /// The epochs of the log.
    pub async fn epochs(&self) -> Result<EpochHistory, ReadError> {
        self.bounded(log::epochs(self.pool())).await
    }

    /// The bounds it was opened with.
    pub fn config(&self) -> &StoreConfig {
        &self.shared.config
    }

    /// Largest event with its headers that is taken now: what could not be published must not be
    /// committed. The server's own bound, as it was when it was last connected to, may be the smaller one.
    pub fn payload_bytes_max(&self) -> usize {
        let publisher = self.shared.publisher.read().unwrap_or_else(PoisonError::into_inner);
        let configured = self.shared.config.payload_bytes_max;
        publisher.as_ref().map_or(configured, |client| configured.min(client.max_payload()))
    }

    /// From now on events are published through this client.
    pub(crate) fn set_publisher(&self, client: Client) {
        let mut publisher = self.shared.publisher.write().unwrap_or_else(PoisonError::into_inner);
        *publisher = Some(client);
    }

    pub(crate) fn pool(&self) -> &PgPool {
        &self.shared.pool
    }

    /// The id of the event at a position; nil at zero, `None` past the end.
    pub(crate) async fn event_id_at(&self, at: Position) -> Result<Option<EventId>, ReadError> {
        self.bounded(log::event_id_at(self.pool(), at)).await
    }

    /// Has appends refused until an operator has looked at the reason.
    pub(crate) async fn refuse(&self, epoch: Epoch, refusal: &Refusal) -> Result<(), ReadError> {
        self.bounded(log::refuse(self.pool(), epoch, refusal)).await
    }

    fn limit(&self, events: u32) -> Limit {
        Limit {
            events,
            bytes: i64::try_from(self.shared.config.read_bytes_max).unwrap_or(i64::MAX),
        }
    }

    async fn bounded<T>(
        &self,
        read: impl Future<Output = Result<T, ReadError>>,
    ) -> Result<T, ReadError> {
        timeout(self.shared.config.statement_wait_max, read).await.unwrap_or_else(|_| {
            let late = std::io::Error::from(std::io::ErrorKind::TimedOut);
            Err(ReadError::Unavailable(sqlx::Error::Io(late)))
        })
    }
}
