//! What an operator asks of the log, from the command line of the primary's gateway. None of it needs a
//! running gateway.

use std::{fmt::Write as _, path::Path, time::Duration};

use clap::Subcommand;
use consistency::{LogId, LogPosition, Position};
use event_store::{
    Above, CompareError, Head, NewEpoch, NewEpochError, OpenedEpoch, ReadError, last_common,
    list_epochs, open_epoch,
};
use process::{
    nats::{self, NatsConfig},
    postgres,
};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::config::GatewayConfig;

const NAME: &str = "tidemark-operator";
/// Renumbering what is carried may touch much of the log.
const STATEMENT_TIMEOUT_MS: &str = "3600000";
/// Appends that run hold the log for moments only.
const LOCK_TIMEOUT_MS: &str = "60000";
/// A NATS server that does not answer within this is not asked.
const CONNECTION_WAIT_MAX: Duration = Duration::from_secs(5);
/// Bound on comparing log and streams: a few dozen questions.
const COMPARE_WAIT_MAX: Duration = Duration::from_secs(60);

/// Epochs of the log.
#[derive(Debug, Clone, Subcommand)]
pub enum EpochCommand {
    /// The epochs, the log's end, whether it takes appends, and where a new epoch would begin.
    List {
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
    /// Opens a new epoch, so that a log that lost its tail takes appends again.
    Open {
        /// The last position of the past that is kept.
        #[arg(long)]
        after: u64,
        /// Takes the events above it over into the new epoch: they were written after the loss and
        /// before it was noticed.
        #[arg(long)]
        carry: bool,
        /// Opens it although appends are taken, or although the regions were told other events below.
        #[arg(long)]
        force: bool,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Why an operator is told no. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// The log is not here.
    #[error("the log is at the primary: run this with the configuration of its gateway")]
    NotPrimary,
    /// The database holds no log.
    #[error("the database holds no log yet: the first gateway makes it when it starts")]
    NoLog,
    /// A database's URL is not understood.
    #[error("the log's database cannot be connected to")]
    Database(#[from] sqlx::Error),
    /// The log cannot be read.
    #[error("the log cannot be read")]
    Read(#[from] ReadError),
    /// A position beyond every log.
    #[error("{0} is no position")]
    Position(u64),
    /// It would begin after events that the regions were not told.
    #[error(
        "the regions were told other events after position {common} than the log has: an epoch after \
         {after} would keep what nobody was told. Run\n    {command}"
    )]
    TooLate {
        /// Where it was to begin.
        after: Position,
        /// The last position that log and streams share.
        common: Position,
        /// What would be right.
        command: String,
    },
    /// It cannot be opened as it was asked for.
    #[error("{advice}")]
    Refused {
        /// What is wrong with it, and what to run instead.
        advice: String,
        /// Why.
        source: NewEpochError,
    },
}

/// Does a command on epochs, and answers what to print. `config_path` is for the commands that are printed.
pub async fn epoch(
    config: &GatewayConfig,
    config_path: &Path,
    command: EpochCommand,
) -> Result<String, OperatorError> {
    let database = config.log_database.as_ref().ok_or(OperatorError::NotPrimary)?;
    let pool = postgres::connect_with(database, NAME, |options| {
        options.options([
            ("statement_timeout", STATEMENT_TIMEOUT_MS),
            ("lock_timeout", LOCK_TIMEOUT_MS),
        ])
    })?;
    let operator = Operator { config, config_path, pool: &pool };
    let printed = match command {
        EpochCommand::List { json } => operator.list(json).await,
        EpochCommand::Open { after, carry, force, json } => {
            operator.open(after, carry, force, json).await
        }
    };
    pool.close().await;
    printed
}

struct Operator<'a> {
    config: &'a GatewayConfig,
    config_path: &'a Path,
    pool: &'a PgPool,
}

/// Where log and streams part; `Err` says why nobody can tell.
type Common = Result<Position, String>;

impl Operator<'_> {
    async fn list(&self, json: bool) -> Result<String, OperatorError> {
        let (head, epochs) = list_epochs(self.pool).await?.ok_or(OperatorError::NoLog)?;
        let common = self.common().await;
        if json {
            return Ok(format!("{:#}\n", listed_json(&head, &epochs, &common)));
        }
        let mut text = String::new();
        line(&mut text, format_args!("{:<7} {:<20} OPENED", "EPOCH", "AFTER"));
        for opened in &epochs {
            let OpenedEpoch { epoch, starts_after, opened_at } = opened;
            line(&mut text, format_args!("{epoch:<7} {starts_after:<20} {opened_at}"));
        }
        line(&mut text, format_args!("\nthe log ends at position {}", head.at.position));
        match &common {
            Ok(common) => line(
                &mut text,
                format_args!("log and streams have the same events up to position {common}"),
            ),
            Err(error) => line(&mut text, format_args!("the streams cannot be looked at: {error}")),
        }
        match (&head.refused_because, common) {
            (None, _) => line(&mut text, format_args!("appends are taken")),
            (Some(reason), common) => {
                line(&mut text, format_args!("appends are refused: {reason}"));
                if let Ok(common) = common {
                    let command = self.right_command(common, head.at);
                    line(&mut text, format_args!("to go on in a new epoch:\n    {command}"));
                }
            }
        }
        Ok(text)
    }

    async fn open(
        &self,
        after: u64,
        carry: bool,
        force: bool,
        json: bool,
    ) -> Result<String, OperatorError> {
        let after = Position::new(after).ok_or(OperatorError::Position(after))?;
        let common = self.common().await;
        let (head, _) = list_epochs(self.pool).await?.ok_or(OperatorError::NoLog)?;
        if let Ok(common) = common
            && common < after
            && after <= head.at.position
            && !force
        {
            let command = self.right_command(common, head.at);
            return Err(OperatorError::TooLate { after, common, command });
        }
        let above = if carry { Above::Carry } else { Above::Refuse };
        let new = NewEpoch { after, force, above };
        let opened = open_epoch(self.pool, LogId::new(self.config.log.id), new).await;
        let opened = opened.map_err(|source| {
            let advice = self.advice(&source, &common, head.at);
            OperatorError::Refused { advice, source }
        })?;
        Ok(if json {
            let opened = json!({
                "epoch": opened.epoch, "after": after, "carried_to": opened.position,
            });
            format!("{opened:#}\n")
        } else {
            done(after, opened, &common)
        })
    }

    /// How far log and streams are the same.
    async fn common(&self) -> Common {
        let relay = self.config.relay.as_ref().ok_or("there is no relay in the configuration")?;
        let user = NatsConfig {
            user: relay.user.clone(),
            password: relay.password.clone(),
            ..self.config.nats.clone()
        };
        let nats = nats::connect(&user, NAME).await.map_err(|error| error.to_string())?;
        let mut link = nats.link.clone();
        let connected = link.wait_for(|link| link.connected);
        match tokio::time::timeout(CONNECTION_WAIT_MAX, connected).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return Err("no connection to nats".to_owned()),
        }
        let comparing = last_common(self.pool, &nats.client);
        match tokio::time::timeout(COMPARE_WAIT_MAX, comparing).await {
            Ok(Ok(common)) => Ok(common),
            Ok(Err(error @ (CompareError::Log(_) | CompareError::Stream(_)))) => {
                Err(causes(&error))
            }
            Err(_) => Err("it takes too long".to_owned()),
        }
    }

    /// The command that opens an epoch where log and streams part.
    fn right_command(&self, common: Position, head: LogPosition) -> String {
        let carry = if common < head.position { " --carry" } else { "" };
        format!(
            "gateway --config {} epoch open --after {common}{carry}",
            self.config_path.display()
        )
    }

    fn advice(&self, refused: &NewEpochError, common: &Common, head: LogPosition) -> String {
        let at = common.clone().unwrap_or(head.position);
        let right = self.right_command(at, head);
        match refused {
            NewEpochError::NotRefused => format!(
                "the log takes appends up to {head} and beyond: nothing calls for a new epoch. To open \
                 one all the same, add --force"
            ),
            NewEpochError::GoesOn { after, head } => {
                let (first, last) = (after.next(), head.position);
                format!(
                    "the log goes on after {after}, up to {head}. If events {first} to {last} were \
                     written after the loss, take them over into the new epoch. Run\n    {right}"
                )
            }
            NewEpochError::EndsBefore { after, head } => format!(
                "the log ends at {head}, before {after}, and positions have no holes. Run\n    {right}"
            ),
            NewEpochError::OtherLog { found, wanted } => format!(
                "the database holds log {found}, the configuration names {wanted}: look at log.id and \
                 log_database.url"
            ),
            NewEpochError::Database(_) => "no epoch was opened; run it again".to_owned(),
        }
    }
}

fn listed_json(head: &Head, epochs: &[OpenedEpoch], common: &Common) -> Value {
    let epochs = epochs.iter().map(|opened| {
        let OpenedEpoch { epoch, starts_after, opened_at } = opened;
        json!({ "epoch": epoch, "after": starts_after, "opened_at": opened_at })
    });
    json!({
        "epochs": epochs.collect::<Vec<_>>(),
        "head": head.at.position,
        "common": common.as_ref().ok(),
        "refused_because": head.refused_because,
        "refused_kind": head.refused_kind.map(event_store::RefusalKind::as_str),
    })
}

fn done(after: Position, opened: LogPosition, common: &Common) -> String {
    let LogPosition { epoch, position } = opened;
    let mut text = format!("epoch {epoch} is open after position {after}; appends are taken\n");
    if after < position {
        let first = after.next();
        line(&mut text, format_args!("events {first} to {position} were taken over into it"));
    }
    if let Err(error) = common {
        line(&mut text, format_args!("the streams could not be looked at: {error}"));
        line(&mut text, format_args!("the relay compares them before it publishes; see /readyz"));
    }
    let next = [
        format!(
            "the relay begins the stream EVENTS-{epoch}; gateways and projectors follow within seconds"
        ),
        format!(
            "tokens of older epochs for anything above {after} are answered with 409 write-lost, once"
        ),
        "a projector that has applied more says so on /readyz: empty its region's database and start \
         it again (docs/operating.md)"
            .to_owned(),
    ];
    for next in next {
        line(&mut text, format_args!("- {next}"));
    }
    text
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(text, "{line}").expect("a string takes every line");
}

fn causes(error: &dyn std::error::Error) -> String {
    let chain = std::iter::successors(Some(error), |error| error.source());
    chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
