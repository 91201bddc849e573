//! Builds a version of a projection from the log, beside the one that is read.
//!
//! Three phases, each of which goes on where it stood when it was ended or killed. *Folding*: the log is
//! read once, and each partition folds its events in memory; states go to their table when memory is
//! full and every now and then, with the partition's checkpoint. *Filling*: rows follow from the last
//! states, and are copied into tables without indexes. *Indexing*. Then the region's projectors take
//! the version up where the rebuild left it.

pub mod begin;
pub mod config;
mod copy;
mod fill;
mod fold;
mod memory;
pub mod progress;
mod refused;
mod source;

use std::sync::Arc;

use async_nats::jetstream;
use consistency::{EpochHistory, LogPosition, Position, stream_name};
use process::nats::Nats;
use process::postgres::PostgresConfig;
use process::telemetry::{Metrics, TelemetryError};
use process::trace::Traces;
use process::{nats, postgres};
use projection::{ColumnError, Domain, DomainError};
use sqlx::{PgConnection, PgPool};
use tokio_util::sync::CancellationToken;

use crate::breaker::Trip;
use crate::chain::Broken;
use crate::checkpoint::{CheckpointError, VersionKey};
use crate::config::ProjectorConfig;
use crate::epochs::EpochError;
use crate::health::chain_of;
use crate::lease::Lease;
use crate::log::{LogClient, LogError};
use crate::mirror;
use crate::retry::Backoff;
use crate::start::StartError;
use crate::status::Status;
use crate::telemetry::Telemetry;
use crate::versions::discard::DropError;
use begin::{Job, Request, Stage};
use progress::Progress;

pub use config::RebuildConfig;

const NAME: &str = "region-projector-rebuild";
/// Partitions that store at the same time at most; the others wait for a connection.
const WRITERS_MAX: usize = 16;

/// Why nothing, or not everything, was built. What was built stays, and running it again goes on there.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// The database.
    #[error("the database refused")]
    Database(#[from] sqlx::Error),
    /// The region's database is not one to build in.
    #[error("the region's database is not ready")]
    Start(#[from] StartError),
    /// Checkpoints make no sense.
    #[error("the checkpoints cannot be read")]
    Checkpoint(#[from] CheckpointError),
    /// The log cannot be read.
    #[error("the primary's log cannot be read")]
    Log(#[from] LogError),
    /// The epochs make no sense.
    #[error("the epochs cannot be read")]
    Epochs(#[from] EpochError),
    /// The connection to NATS cannot be set up as configured.
    #[error("the connection to NATS cannot be set up")]
    Nats(#[from] async_nats::ConnectError),
    /// The instruments cannot be made.
    #[error("telemetry cannot be set up")]
    Telemetry(#[from] TelemetryError),
    /// A version cannot have tables.
    #[error("a version cannot have tables of its own")]
    Definition(#[from] DomainError),
    /// A column holds what it never may.
    #[error("the database holds what it never may")]
    Column(#[from] ColumnError),
    /// A version that was begun in an epoch that is gone cannot be dropped.
    #[error("what was begun before cannot be dropped")]
    Drop(#[from] DropError),
    /// Another process rebuilds the projection.
    #[error("{0} is being rebuilt by another process")]
    Busy(String),
    /// There is nothing to build it by.
    #[error("{projection} has no definition {definition} in this binary; it has {known}")]
    UnknownDefinition {
        /// The projection.
        projection: String,
        /// What was asked for.
        definition: String,
        /// What there is.
        known: String,
    },
    /// The tables of a custom projection are named in its code.
    #[error(
        "the tables of custom projection {0} bear the version that its code declares, and were made \
         before: declare another version, and rebuild that"
    )]
    CustomAgain(VersionKey),
    /// A table is in the way.
    #[error("table {0} is there already, and of no version: prune it first")]
    TableInTheWay(String),
    /// Partitions are from 1 to 1024.
    #[error("a projection cannot have {0} partitions")]
    PartitionCount(u16),
    /// Somebody else writes this version.
    #[error("the checkpoints of {0} are not as they were left")]
    Displaced(VersionKey),
    /// Too much would be parked.
    #[error("{key} would park too much: {trip}, or raise apply.parked_aggregates_max")]
    Tripped {
        /// Which version.
        key: VersionKey,
        /// What for.
        trip: Trip,
    },
    /// Sums that leave 64 bits when many events are added at once.
    #[error("sums of {0} leave 64 bits")]
    Overflow(VersionKey),
    /// The log is not the one that was folded.
    #[error("the log is not the one that was folded before: drop the version that is being built")]
    Broken(#[from] Broken),
    /// The reader has ended and nobody knows why.
    #[error("the log is not read any more")]
    ReaderEnded,
    /// It was asked to end.
    #[error("ended before it was done; run it again to go on")]
    Stopped,
    /// A task panicked.
    #[error("a task panicked")]
    Panicked(#[from] tokio::task::JoinError),
}

impl RebuildError {
    /// Whether going on at once may well succeed.
    fn is_transient(&self) -> bool {
        match self {
            Self::Database(error) => error.as_database_error().is_none(),
            Self::Log(_) | Self::ReaderEnded => true,
            Self::Start(_)
            | Self::Checkpoint(_)
            | Self::Epochs(_)
            | Self::Nats(_)
            | Self::Telemetry(_)
            | Self::Definition(_)
            | Self::Column(_)
            | Self::Drop(_)
            | Self::Busy(_)
            | Self::UnknownDefinition { .. }
            | Self::CustomAgain(_)
            | Self::TableInTheWay(_)
            | Self::PartitionCount(_)
            | Self::Displaced(_)
            | Self::Tripped { .. }
            | Self::Overflow(_)
            | Self::Broken(_)
            | Self::Stopped
            | Self::Panicked(_) => false,
        }
    }
}

/// What was built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rebuilt {
    /// The version.
    pub key: VersionKey,
    /// By these rules.
    pub definition: u32,
    /// From here on, when it was begun before.
    pub resumed_at: Option<Position>,
    /// Up to here.
    pub through: LogPosition,
    /// Aggregates that are parked in it.
    pub parked_count: i64,
    /// Whether the projectors are to build it, event by event.
    pub is_left_to_projectors: bool,
}

/// What every phase works with.
#[derive(Clone)]
struct Work {
    config: ProjectorConfig,
    pool: PgPool,
    log: LogClient,
    client: async_nats::Client,
    status: Status,
    telemetry: Arc<Telemetry>,
    progress: Progress,
}

/// Builds a version, or goes on with one that was begun before.
pub async fn rebuild(
    config: &ProjectorConfig,
    domain: &Domain,
    request: &Request,
    progress: &Progress,
    stop: &CancellationToken,
) -> Result<Rebuilt, RebuildError> {
    let limits = &config.rebuild;
    // Beside the workers, those who look and the one that holds the lease.
    let partition_count_max = domain.stored().map(|known| known.partition_count().get()).max();
    let writers =
        usize::from(partition_count_max.unwrap_or(1).max(request.partitions.unwrap_or(1)));
    let connections_max = 4 + writers.min(WRITERS_MAX).max(2 * limits.workers_max);
    let database = PostgresConfig {
        connections_max: u32::try_from(connections_max).unwrap_or(u32::MAX),
        statement_timeout: limits.statement_timeout,
        idle_in_transaction_timeout: limits.statement_timeout,
        acquire_timeout: limits.statement_timeout,
        ..config.database.clone()
    };
    let pool = postgres::connect(&database, NAME)?;
    let busy = || RebuildError::Busy(request.projection.clone());
    let mut lease = Lease::take(&pool, &request.projection).await?.ok_or_else(busy)?;
    let metrics = Metrics::new(NAME, &config.otlp)?;
    let traces = Traces::new(&config.otlp, NAME, &config.region)?;
    let Nats { client, .. } = nats::connect(&config.nats.server, NAME).await?;
    let status = Status::default();
    let work = Work {
        config: config.clone(),
        pool: pool.clone(),
        log: LogClient::new(&config.primary_log)?.of_region(&config.region),
        client,
        telemetry: Arc::new(Telemetry::new(&metrics, &status, traces)),
        status,
        progress: progress.clone(),
    };
    let outcome = tokio::select! {
        biased;
        () = stop.cancelled() => Err(RebuildError::Stopped),
        lost = lease.lost(config.sharing.renew_interval.get()) => Err(lost.into()),
        built = Box::pin(work.build(domain, request)) => built,
    };
    lease.release().await;
    pool.close().await;
    outcome
}

impl Work {
    async fn build(&self, domain: &Domain, request: &Request) -> Result<Rebuilt, RebuildError> {
        let apply = &self.config.apply;
        let mut backoff = Backoff::new(apply.retry_pause_min, apply.retry_pause_max);
        loop {
            let error = match Box::pin(self.try_build(domain, request)).await {
                Err(error) if error.is_transient() => error,
                outcome => return outcome,
            };
            tracing::warn!(error = chain_of(&error), "going on in a moment");
            backoff.pause().await;
        }
    }

    async fn try_build(&self, domain: &Domain, request: &Request) -> Result<Rebuilt, RebuildError> {
        let mut job = Box::pin(self.begin(domain, request)).await?;
        if !job.is_left_to_projectors {
            if job.stage == Stage::Folding {
                Box::pin(self.fold(&job)).await?;
                self.enter(&mut job, Stage::Filling).await?;
            }
            if job.stage == Stage::Filling {
                Box::pin(self.fill(&job)).await?;
                self.enter(&mut job, Stage::Indexing).await?;
            }
            Box::pin(self.index(&job)).await?;
            Box::pin(self.mend_refused(&job)).await?;
            self.hand_over(&job).await?;
        }
        self.told(&job).await
    }

    /// Where the log ends now, as its primary says; as far as the stream has come when that does not
    /// answer.
    async fn head(&self, history: &EpochHistory) -> Result<Position, RebuildError> {
        let epoch = history.current();
        let error = match self.log.read(epoch, Position::ZERO, 1).await {
            Ok(page) => return Ok(page.head.map(|head| head.position).unwrap_or_default()),
            Err(error) => error,
        };
        let context = jetstream::new(self.client.clone());
        let info = mirror::info(&context, &stream_name(epoch)).await.ok().flatten();
        let last = info.and_then(|info| Position::new(info.state.last_sequence));
        let last = last.filter(|last| history.current_starts_after() < *last);
        let reason = chain_of(&error);
        tracing::warn!(reason, "the primary does not say where the log ends");
        last.ok_or(RebuildError::Log(error))
    }

    async fn told(&self, job: &Job) -> Result<Rebuilt, RebuildError> {
        let parked_count = sqlx::query_scalar!(
            r#"select count(*) as "count!" from parked where projection = $1 and version = $2"#,
            job.key.projection.as_str(),
            job.key.version_column(),
        );
        Ok(Rebuilt {
            key: job.key.clone(),
            definition: job.definition.declared_version(),
            resumed_at: job.resumed_at,
            through: LogPosition::new(job.history.current(), job.target),
            parked_count: parked_count.fetch_one(&self.pool).await?,
            is_left_to_projectors: job.is_left_to_projectors,
        })
    }
}

async fn copy_in(
    connection: &mut PgConnection,
    statement: &str,
    rows: copy::CopyRows,
) -> Result<(), sqlx::Error> {
    if rows.is_empty() {
        return Ok(());
    }
    let mut copying = connection.copy_in_raw(statement).await?;
    // Whatever the server says to a row it says when all is sent.
    copying.send(rows.finish()).await?;
    copying.finish().await?;
    Ok(())
}
