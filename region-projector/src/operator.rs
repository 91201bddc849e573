//! What an operator asks of a region's database, from the command line.
//!
//! None of it needs a running projector, and none of it is in the way of one: what changes anything
//! takes the lock of a checkpoint and raises its fence.

mod backfill;
mod halt;
mod rebuild;
mod snapshot;
mod status;
mod table;
mod verify;
mod versions;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use clap::{Args, Subcommand};
use consistency::{AggregateId, Name, NameError, Position};
use process::{nats, postgres};
use projection::{Domain, DomainError, ProjectionDefinition};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::time::timeout;

use crate::announce::Announcer;
use crate::backfill::BackfillError;
use crate::checkpoint::{Held, VersionKey};
use crate::config::ProjectorConfig;
use crate::dead_letters::{self, Actor, DeadLetterError, Decision, ParkedAggregate, Retried};
use crate::log::{LogClient, LogError};
use crate::rebuild::RebuildError;
use crate::snapshot::SnapshotError;
use crate::start::key_of;
use crate::status::Status;
use crate::switch::SwitchError;
use crate::verify::VerifyError;
use crate::versions::discard::DropError;
pub use backfill::{BackfillCommand, backfill};
pub use halt::{PauseCommand, ResumeCommand, pause, resume};
pub use rebuild::{RebuildCommand, rebuild};
pub use snapshot::{SnapshotCommand, snapshot};
pub use status::{StatusCommand, status};
use table::Table;
pub use verify::{VerifyCommand, verify};
pub use versions::{
    DropCommand, PruneCommand, RollbackCommand, SwitchCommand, VersionsCommand, drop_version,
    prune, rollback, switch, versions,
};

const NAME: &str = "region-projector-operator";
/// How long an announcement waits for its connection. Without one the gateways find out by themselves.
const CONNECTION_WAIT_MAX: Duration = Duration::from_secs(2);

/// Events that could not be applied.
#[derive(Debug, Clone, Subcommand)]
pub enum DeadLettersCommand {
    /// The aggregates that are parked.
    List {
        /// Of this projection only.
        projection: Option<String>,
        /// At most so many.
        #[arg(long, default_value_t = 100)]
        limit: u32,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
    /// The letters of one aggregate, with their events.
    Show {
        /// Which aggregate.
        #[command(flatten)]
        target: Target,
        /// At most so many.
        #[arg(long, default_value_t = 100)]
        limit: u32,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
    /// Applies the letters of one aggregate in order, and un-parks it when all are applied.
    Retry {
        /// Which aggregate.
        #[command(flatten)]
        target: Target,
        /// Who retries, as the record of decisions names them.
        #[arg(long, env = "USER", default_value = "unknown")]
        actor: String,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
    /// Gives the first letter of one aggregate up; later ones stay for a retry.
    Discard {
        /// Which aggregate.
        #[command(flatten)]
        target: Target,
        /// The position of the letter, as `show` prints it: nothing else is discarded.
        #[arg(long)]
        position: u64,
        /// Who discards, as the record of decisions names them.
        #[arg(long, env = "USER", default_value = "unknown")]
        actor: String,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
    /// Who has retried and discarded what, the newest first.
    History {
        /// Of this projection only.
        projection: Option<String>,
        /// At most so many.
        #[arg(long, default_value_t = 100)]
        limit: u32,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
}

/// A parked aggregate as it is named on the command line.
#[derive(Debug, Clone, Args)]
pub struct Target {
    /// The projection.
    projection: String,
    /// The aggregate's type.
    aggregate_type: String,
    /// The aggregate's id.
    aggregate_id: String,
    /// The version of the projection; the active one unless set.
    #[arg(long)]
    projection_version: Option<u32>,
}

/// Why an operator is told no.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// The database.
    #[error("the database refused")]
    Database(#[from] sqlx::Error),
    /// Letters.
    #[error("the letters are as they were")]
    Letters(#[from] DeadLetterError),
    /// A name or id that breaks its bounds.
    #[error("a name on the command line breaks its bounds")]
    Name(#[from] NameError),
    /// A position beyond every log.
    #[error("{0} is no position")]
    Position(u64),
    /// Nothing is read of a projection.
    #[error("no version of projection {0} is active, name one")]
    NoActiveVersion(String),
    /// Nothing is known of a projection.
    #[error("there is no projection {0}")]
    UnknownProjection(String),
    /// Another binary may have it.
    #[error("{0} is not in this binary")]
    UnknownVersion(VersionKey),
    /// The way to the primary's log is not usable.
    #[error("the way to the primary's log is not usable")]
    Log(#[from] LogError),
    /// The tables of a version cannot be named.
    #[error("a version cannot have tables of its own")]
    Version(#[from] DomainError),
    /// Another version does not take over.
    #[error("gateways read what they read before")]
    Switch(#[from] SwitchError),
    /// Nothing takes the place of what is there.
    #[error("it is not rebuilt")]
    Rebuild(#[from] Box<RebuildError>),
    /// A version stays.
    #[error("it is not dropped")]
    Drop(#[from] DropError),
    /// Older rows.
    #[error("rows still lack what their view has got later")]
    Backfill(#[from] BackfillError),
    /// A snapshot.
    #[error("there is no snapshot")]
    Snapshot(#[from] SnapshotError),
    /// A view and the log could not be compared.
    #[error("the view could not be verified")]
    Verify(#[from] VerifyError),
    /// The connection to NATS cannot be set up as configured.
    #[error("the connection to NATS cannot be set up")]
    Nats(#[from] async_nats::ConnectError),
}

/// What is printed, and whether everything that was asked for is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Ends with a line break.
    pub text: String,
    /// `false` when letters failed again.
    pub is_done: bool,
}

impl Report {
    fn done(text: String) -> Self {
        Self { text, is_done: true }
    }

    fn json(value: &Value) -> Self {
        Self::done(format!("{value:#}\n"))
    }
}

/// Does a command on dead letters.
pub async fn dead_letters(
    config: &ProjectorConfig,
    domain: &Domain,
    command: DeadLettersCommand,
) -> Result<Report, OperatorError> {
    let pool = postgres::connect(&config.database, NAME)?;
    let operator = Operator { config, domain, pool: &pool };
    let report = match command {
        DeadLettersCommand::List { projection, limit, json } => {
            operator.list(projection.as_deref(), limit, json).await
        }
        DeadLettersCommand::Show { target, limit, json } => {
            operator.show(&target, limit, json).await
        }
        DeadLettersCommand::Retry { target, actor, json } => {
            operator.retry(&target, &Actor::new(&actor), json).await
        }
        DeadLettersCommand::Discard { target, position, actor, json } => {
            operator.discard(&target, position, &Actor::new(&actor), json).await
        }
        DeadLettersCommand::History { projection, limit, json } => {
            operator.history(projection.as_deref(), limit, json).await
        }
    };
    pool.close().await;
    report
}

struct Operator<'a> {
    config: &'a ProjectorConfig,
    domain: &'a Domain,
    pool: &'a PgPool,
}

impl Operator<'_> {
    async fn list(
        &self,
        projection: Option<&str>,
        limit: u32,
        json: bool,
    ) -> Result<Report, OperatorError> {
        let parked = dead_letters::list(self.pool, projection, limit.into()).await?;
        if json {
            return Ok(Report::json(&json!(parked)));
        }
        let mut table = Table::new([
            "projection",
            "version",
            "aggregate type",
            "aggregate id",
            "position",
            "reason",
            "letters",
            "parked at",
        ]);
        for parked in &parked {
            let ParkedAggregate { projection, aggregate_type, aggregate_id, .. } = parked;
            table.row([
                projection.as_str(),
                &parked.version.to_string(),
                aggregate_type,
                aggregate_id,
                &parked.position.to_string(),
                &parked.reason,
                &parked.letter_count.to_string(),
                &parked.parked_at,
            ]);
        }
        Ok(Report::done(table.or("nothing is parked")))
    }

    async fn show(&self, target: &Target, limit: u32, json: bool) -> Result<Report, OperatorError> {
        let key = self.key(target).await?;
        let aggregate = target.aggregate()?;
        let letters = dead_letters::show(self.pool, &key, &aggregate, limit.into()).await?;
        if json {
            return Ok(Report::json(&json!(letters)));
        }
        let mut table =
            Table::new(["position", "since", "event type", "schema", "version", "error", "data"]);
        for letter in &letters {
            table.row([
                letter.position.to_string().as_str(),
                &letter.created_at,
                letter.header(consistency::header::EVENT_TYPE),
                letter.header(consistency::header::SCHEMA_VERSION),
                letter.header(consistency::header::VERSION),
                &letter.error,
                &letter.data,
            ]);
        }
        Ok(Report::done(table.or("no letters")))
    }

    async fn history(
        &self,
        projection: Option<&str>,
        limit: u32,
        json: bool,
    ) -> Result<Report, OperatorError> {
        let decisions = dead_letters::decisions(self.pool, projection, limit.into()).await?;
        if json {
            return Ok(Report::json(&json!(decisions)));
        }
        let mut table = Table::new([
            "decided at",
            "actor",
            "decision",
            "projection",
            "version",
            "aggregate",
            "position",
            "letters",
            "stopped by",
        ]);
        for decision in &decisions {
            let Decision { aggregate_type, aggregate_id, .. } = decision;
            let position = decision.position.map(|position| position.to_string());
            table.row([
                decision.decided_at.as_str(),
                &decision.actor,
                &decision.decision,
                &decision.projection,
                &decision.version.to_string(),
                &format!("{aggregate_type}/{aggregate_id}"),
                &position.unwrap_or_default(),
                &decision.letter_count.to_string(),
                decision.stopped_by.as_deref().unwrap_or_default(),
            ]);
        }
        Ok(Report::done(table.or("nothing was decided")))
    }

    async fn retry(
        &self,
        target: &Target,
        actor: &Actor,
        json: bool,
    ) -> Result<Report, OperatorError> {
        let definition = self.definition(target).await?;
        let aggregate = target.aggregate()?;
        let apply = &self.config.apply;
        let log = LogClient::new(&self.config.primary_log)?.of_region(&self.config.region);
        Box::pin(dead_letters::fill_gap(self.pool, &definition, &aggregate, apply, &log)).await?;
        let retried = dead_letters::retry(self.pool, &definition, &aggregate, apply, actor).await?;
        let Retried { held, applied_count, stopped } = retried;
        self.announce(&definition, &held, &aggregate).await?;
        let is_done = stopped.is_none();
        if json {
            let said = json!({ "applied_count": applied_count, "stopped": stopped });
            return Ok(Report { is_done, ..Report::json(&said) });
        }
        let mut text = format!("{applied_count} letters of {aggregate} applied");
        // Writing to a text cannot fail.
        let _ = match stopped {
            None => writeln!(text, ", not parked any more"),
            Some(stopped) => {
                let (position, reason) = (stopped.position, stopped.reason);
                writeln!(text, ", parked at position {position} ({reason}): {}", stopped.error)
            }
        };
        Ok(Report { text, is_done })
    }

    async fn discard(
        &self,
        target: &Target,
        position: u64,
        actor: &Actor,
        json: bool,
    ) -> Result<Report, OperatorError> {
        let definition = self.definition(target).await?;
        let aggregate = target.aggregate()?;
        let at = Position::new(position).ok_or(OperatorError::Position(position))?;
        let apply = &self.config.apply;
        let discarded =
            dead_letters::discard(self.pool, &definition, &aggregate, at, apply, actor).await?;
        self.announce(&definition, &discarded.held, &aggregate).await?;
        let (letter, parked_at) = (discarded.letter, discarded.parked_at);
        if json {
            let said = json!({ "discarded": letter, "parked_at": parked_at });
            return Ok(Report::json(&said));
        }
        let event_type = letter.header(consistency::header::EVENT_TYPE);
        let version = letter.header(consistency::header::VERSION);
        let now = parked_at.map_or("not parked any more".to_owned(), |at| {
            format!("parked at position {at}, retry to go on")
        });
        Ok(Report::done(format!(
            "discarded {event_type} at position {at}, version {version} of {aggregate}: {}\n{now}\n",
            letter.data
        )))
    }

    /// The version that is meant. It need not be in this binary to be looked at.
    async fn key(&self, target: &Target) -> Result<VersionKey, OperatorError> {
        chosen_key(self.pool, &target.projection, target.projection_version).await
    }

    async fn definition(&self, target: &Target) -> Result<ProjectionDefinition, OperatorError> {
        let Target { projection, projection_version, .. } = target;
        chosen(self.pool, self.domain, projection, *projection_version).await
    }

    /// Tells the region's gateways that the aggregate's row has changed.
    async fn announce(
        &self,
        definition: &ProjectionDefinition,
        held: &Held,
        aggregate: &AggregateId,
    ) -> Result<(), OperatorError> {
        let mut nats = nats::connect(&self.config.nats.server, NAME).await?;
        let connected = nats.link.wait_for(|link| link.connected);
        if timeout(CONNECTION_WAIT_MAX, connected).await.is_err() {
            tracing::warn!("not announced, gateways find out by themselves");
            return Ok(());
        }
        let announcer = Announcer::new(self.config, nats.client.clone(), Status::default());
        let (at, touched) = (held.mark.position, BTreeSet::from([aggregate.key()]));
        announcer.announce(&key_of(definition), held, at, at, &touched).await;
        if timeout(CONNECTION_WAIT_MAX, nats.client.flush()).await.is_err() {
            tracing::warn!("announcement lost, gateways find out by themselves");
        }
        Ok(())
    }
}

/// A version as it is named on the command line; the active one unless its number is.
async fn chosen_key(
    pool: &PgPool,
    projection: &str,
    version: Option<u32>,
) -> Result<VersionKey, OperatorError> {
    let name = Name::new(projection)?;
    if let Some(version) = version {
        return Ok(VersionKey { projection: name, version });
    }
    let active = sqlx::query_scalar!(
        "select version from projection_version where projection = $1 and active",
        name.as_str(),
    );
    let active = active.fetch_optional(pool).await?;
    let version = active.and_then(|version| u32::try_from(version).ok());
    let version = version.ok_or_else(|| OperatorError::NoActiveVersion(projection.to_owned()))?;
    Ok(VersionKey { projection: name, version })
}

/// The rules of that version over its own tables.
async fn chosen(
    pool: &PgPool,
    domain: &Domain,
    projection: &str,
    version: Option<u32>,
) -> Result<ProjectionDefinition, OperatorError> {
    let key = chosen_key(pool, projection, version).await?;
    let mut connection = pool.acquire().await?;
    let versions = crate::versions::of_projection(&mut connection, projection).await?;
    let version = versions.into_iter().find(|version| version.key == key);
    let definition = version.map(|version| version.definition_in(domain)).transpose()?;
    definition.flatten().ok_or(OperatorError::UnknownVersion(key))
}

impl Target {
    fn aggregate(&self) -> Result<AggregateId, NameError> {
        AggregateId::new(Name::new(self.aggregate_type.as_str())?, self.aggregate_id.as_str())
    }
}
