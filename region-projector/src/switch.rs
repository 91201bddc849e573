//! Which version of a projection gateways read, and the gate that one passes to take over.
//!
//! A version takes over in one transaction that looks at everything again with the checkpoints of both
//! locked: nothing that the older one has applied may be missing in the newer. Going back is the same
//! with the roles changed.

mod gate;

use std::time::Duration;

use consistency::EpochHistory;
use process::config::Period;
use projection::{Domain, DomainError, ProjectionDefinition};
use sqlx::{PgConnection, PgPool};
use tokio::time::{Instant, sleep};

use crate::checkpoint::{CheckpointError, VersionKey};
use crate::epochs::{self, EpochError};
use crate::parity::{self, Parity, ParityError, Scope};
use crate::sharing::rows;
use crate::versions::{self, Version, VersionState};
use gate::Gate;
pub use gate::{ParkedAt, Refusal, Side};

/// How often checkpoints of others are looked at, which nobody announces to this process.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Why nothing was switched.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// The database.
    #[error("the database refused")]
    Database(#[from] sqlx::Error),
    /// Checkpoints make no sense.
    #[error("the checkpoints cannot be read")]
    Checkpoint(#[from] CheckpointError),
    /// The tables cannot be compared.
    #[error("the versions cannot be compared")]
    Parity(#[from] ParityError),
    /// The epochs make no sense.
    #[error("the epochs cannot be read")]
    Epochs(#[from] EpochError),
    /// A version cannot have tables.
    #[error("a version cannot have tables of its own")]
    Definition(#[from] DomainError),
    /// There is no such projection.
    #[error("there is no projection {0}, or no version of it is active")]
    NoActiveVersion(String),
    /// Nothing was built that could take over.
    #[error("no version of {0} is ready, rebuild it first")]
    NothingReady(String),
    /// Nothing was read before.
    #[error("no version of {0} that was read before is still there")]
    NothingRetired(String),
    /// There is no such version.
    #[error("there is no {0}")]
    UnknownVersion(VersionKey),
    /// It is read already.
    #[error("{0} is what gateways read already")]
    Active(VersionKey),
    /// It does not follow the log.
    #[error("{key} is {state}, and does not follow the log")]
    NotFollowing {
        /// Which.
        key: VersionKey,
        /// What it is.
        state: VersionState,
    },
    /// A projector with this binary would not start any more.
    #[error("the rules of {key}, definition {definition}, are not in this binary")]
    UnknownDefinition {
        /// Which.
        key: VersionKey,
        /// Its rules.
        definition: u32,
    },
    /// The gate is closed.
    #[error("{} does not take over: {}", .key, shown(.refusals))]
    Refused {
        /// Which.
        key: VersionKey,
        /// Everything that speaks against it.
        refusals: Vec<Refusal>,
    },
}

fn shown(refusals: &[Refusal]) -> String {
    refusals.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Which version is to take over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum To {
    /// The newest that was never read.
    Ready,
    /// The one that was read last.
    Retired,
    /// This one.
    Version(u32),
}

/// How strict the gate is, and how patient.
#[derive(Debug, Clone, Copy)]
pub struct GateConfig {
    /// How long the older version stands still at most while the newer one comes to where it stands.
    pub catch_up_max: Period,
    /// The deadline of one statement; comparing large tables takes its time.
    pub statement_timeout: Period,
    /// What differs is told, and does not keep the newer version from taking over: the older one is
    /// known to be damaged.
    pub accept_differences: bool,
}

/// What was switched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Switched {
    /// What was read before; it goes on beside.
    pub from: VersionKey,
    /// What is read now.
    pub to: VersionKey,
    /// Differences that were accepted.
    pub accepted: Vec<Refusal>,
    /// What of the tables could not be compared, and why: nobody vouches for it.
    pub not_compared: Vec<String>,
}

/// Has gateways read another version of a projection, if nothing speaks against it.
pub async fn switch(
    pool: &PgPool,
    domain: &Domain,
    projection: &str,
    to: To,
    config: &GateConfig,
) -> Result<Switched, SwitchError> {
    let mut transaction = pool.begin().await?;
    prepare(&mut transaction, config.statement_timeout).await?;
    // Whoever else switches or drops waits here, and sees what was decided.
    lock_versions(&mut transaction, projection).await?;
    let all = versions::of_projection(&mut transaction, projection).await?;
    let (old, new) = chosen(&all, projection, to)?;
    let (refusals, not_compared) = pass(&mut transaction, domain, (old, new), config).await?;
    let (accepted, refusals): (Vec<_>, Vec<_>) = refusals
        .into_iter()
        .partition(|refusal| config.accept_differences && refusal.is_difference());
    if !refusals.is_empty() {
        return Err(SwitchError::Refused { key: new.key.clone(), refusals });
    }
    flip(&mut transaction, old, new).await?;
    rows::notify(&mut transaction).await?;
    transaction.commit().await?;
    Ok(Switched { from: old.key.clone(), to: new.key.clone(), accepted, not_compared })
}

/// Bounds of this transaction's own.
pub(crate) async fn prepare(
    connection: &mut PgConnection,
    statement_timeout: Period,
) -> Result<(), sqlx::Error> {
    let ms = statement_timeout.millis().to_string();
    sqlx::query!(r#"select set_config('statement_timeout', $1, true) as "set""#, ms)
        .fetch_one(connection)
        .await?;
    Ok(())
}

/// Until the transaction ends nobody else changes what becomes of the projection's versions.
pub(crate) async fn lock_versions(
    connection: &mut PgConnection,
    projection: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "select version from projection_version where projection = $1 order by version for update",
        projection,
    )
    .fetch_all(connection)
    .await?;
    Ok(())
}

fn chosen<'a>(
    all: &'a [Version],
    projection: &str,
    to: To,
) -> Result<(&'a Version, &'a Version), SwitchError> {
    let newest = |state| all.iter().rev().find(move |version| version.state == state);
    let name = || projection.to_owned();
    let old = newest(VersionState::Active).ok_or_else(|| SwitchError::NoActiveVersion(name()))?;
    let new = match to {
        To::Ready => {
            newest(VersionState::Ready).ok_or_else(|| SwitchError::NothingReady(name()))?
        }
        To::Retired => {
            newest(VersionState::Retired).ok_or_else(|| SwitchError::NothingRetired(name()))?
        }
        To::Version(number) => {
            let found = all.iter().find(|version| version.key.version == number);
            let key = VersionKey { projection: old.key.projection.clone(), version: number };
            found.ok_or(SwitchError::UnknownVersion(key))?
        }
    };
    let key = new.key.clone();
    match new.state {
        VersionState::Active => Err(SwitchError::Active(key)),
        VersionState::Building | VersionState::Dropped => {
            Err(SwitchError::NotFollowing { key, state: new.state })
        }
        VersionState::Ready | VersionState::Retired => Ok((old, new)),
    }
}

/// Everything that speaks against the newer version, and what could not be looked at, with both versions'
/// checkpoints locked from the moment that it is known on.
async fn pass(
    connection: &mut PgConnection,
    domain: &Domain,
    (old, new): (&Version, &Version),
    config: &GateConfig,
) -> Result<(Vec<Refusal>, Vec<String>), SwitchError> {
    let rules = new.definition_in(domain)?;
    let rules = rules.ok_or_else(|| SwitchError::UnknownDefinition {
        key: new.key.clone(),
        definition: new.definition,
    })?;
    let old_rules = old.definition_in(domain)?;
    let history = epochs::stored(connection).await?;
    // The older one stands still from here on, so the newer one can come to where it stands.
    let before = gate::lock(connection, old).await?;
    let until = Instant::now() + config.catch_up_max.get();
    loop {
        let now = gate::look(connection, new).await?;
        let gate = Gate { old: &before, new: &now, history: &history };
        if gate.is_caught_up() || until <= Instant::now() {
            break;
        }
        sleep(LOOK_INTERVAL).await;
    }
    let after = gate::lock(connection, new).await?;
    let gate = Gate { old: &before, new: &after, history: &history };
    let refusals = gate.refusals();
    if !refusals.is_empty() {
        return Ok((refusals, Vec::new()));
    }
    if !is_comparable(&before, &history) {
        let lost = format!("all tables: {} holds events that the log lost", old.key);
        return Ok((refusals, vec![lost]));
    }
    match old_rules {
        Some(old_rules) => differences(connection, &old_rules, &rules).await,
        None => {
            let gone = format!("all tables: the rules of {} are not in this binary", old.key);
            Ok((refusals, vec![gone]))
        }
    }
}

/// What holds events that the log lost differs from what does not, and that is all there is to say.
fn is_comparable(old: &Side, history: &EpochHistory) -> bool {
    old.checkpoints.iter().flatten().all(|at| at.epoch == history.current())
}

async fn differences(
    connection: &mut PgConnection,
    old: &ProjectionDefinition,
    new: &ProjectionDefinition,
) -> Result<(Vec<Refusal>, Vec<String>), SwitchError> {
    let is_same = old.declared_version() == new.declared_version();
    let scope = if is_same { Scope::Rows } else { Scope::Versions };
    let Parity { differences, not_compared, .. } =
        match parity::compare(connection, old, new, scope).await {
            Err(ParityError::TooFarApart) => return Ok((vec![Refusal::TooFarApart], Vec::new())),
            compared => compared?,
        };
    let apart = |table| format!("{table}: it does not hold the same events in both");
    let not_compared = not_compared.into_iter().map(apart).collect();
    let is_different = !differences.is_empty();
    let refusals = is_different.then_some(Refusal::Differs { differences });
    Ok((refusals.into_iter().collect(), not_compared))
}

async fn flip(
    connection: &mut PgConnection,
    old: &Version,
    new: &Version,
) -> Result<(), sqlx::Error> {
    // One after the other: at most one is active at any time.
    for (version, active, state) in [(old, false, "retired"), (new, true, "ready")] {
        sqlx::query!(
            "update projection_version
             set active = $3, state = $4, state_since = clock_timestamp()
             where projection = $1 and version = $2",
            version.key.projection.as_str(),
            version.key.version_column(),
            active,
            state,
        )
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}
