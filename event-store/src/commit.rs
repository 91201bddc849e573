//! One gathered commit: the call, its answers, and what to do when the answer does not arrive.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use consistency::{CommittedAt, Epoch, EventId};
use sqlx::pool::PoolConnection;
use sqlx::{PgConnection, PgPool, Postgres};
use tokio::runtime::{self, Handle};
use tokio::time::error::Elapsed;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use uuid::Uuid;

use crate::alone::append_alone;
use crate::append::{Append, Command};
use crate::call::{
    Called, Guard, append_events, appended, blames_the_append, failure, is_epoch_over, tail_lost,
    was_rolled_back,
};
use crate::each_alone::{append_each_alone, is_each_alone};
use crate::recent::Recent;
use crate::refusal::Refusal;
use crate::seen::Seen;
use crate::{AppendError, Once, ReadError, StoreConfig, idempotency, log};

/// Most connections that are kept beside the committer's own.
const OTHERS_MAX: usize = 3;
const SETTLE_PAUSE: Duration = Duration::from_millis(100);
/// Calls of the function in a row before which nobody else appended, until that is counted on again.
const QUIET_CALLS: u8 = 8;

/// What one command is told.
pub(crate) type Answer = Result<Once, AppendError>;

/// Appends that are committed by one call.
#[derive(Debug, Clone, Default)]
pub(crate) struct Batch {
    commands: Vec<Arc<Command>>,
    event_count: usize,
    /// The oldest epoch that one of them was judged in.
    judged: Option<Epoch>,
    /// It is committed by itself since it was not committed with others.
    is_second_try: bool,
}

impl Batch {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    fn one_of_many() -> Self {
        Self { is_second_try: true, ..Self::default() }
    }

    pub(crate) fn push(&mut self, command: Arc<Command>) {
        self.event_count += command.append.events.len();
        self.judged = self.judged.into_iter().chain(command.judged).min();
        self.commands.push(command);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.commands.is_empty()
    }

    pub(crate) fn command_count(&self) -> usize {
        self.commands.len()
    }

    pub(crate) fn event_count(&self) -> usize {
        self.event_count
    }

    /// The same answer for every command.
    fn all(&self, error: &AppendError) -> Vec<Answer> {
        self.commands.iter().map(|_| Err(error.clone())).collect()
    }
}

/// What is known after a call of the append function.
enum Outcome {
    /// It ran, and answered each append.
    Answered(Vec<Answer>),
    /// The database said that it did not commit.
    Failed(sqlx::Error),
    /// It may have committed, may still be running, or may still be on its way.
    Unknown(sqlx::Error),
}

/// What settling found.
enum Settled {
    Committed(Vec<Answer>),
    NotCommitted,
    Unknown,
}

/// Connections that are kept between commits: one round trip a commit.
#[derive(Debug)]
pub(crate) struct Session {
    pool: PgPool,
    config: StoreConfig,
    /// One for each runtime that commits: whose it is, is told what arrives on it, and would have to wake another.
    connections: Vec<(runtime::Id, PoolConnection<Postgres>)>,
    /// Where the committer runs.
    committer: runtime::Id,
    seen: Seen,
    recent: Arc<Recent>,
    /// What the log ended with after the last commit.
    last_event: Option<EventId>,
    /// So many more quiet calls until it is counted on that nobody else appends at the same time: a statement
    /// that waits then and does nothing costs all of them a place in the queue.
    wary_for: u8,
}

impl Session {
    /// For a committer that runs here.
    pub(crate) fn new(pool: PgPool, config: StoreConfig, seen: Seen, recent: Arc<Recent>) -> Self {
        let (connections, last_event, wary_for) = (Vec::new(), None, 0);
        let committer = Handle::current().id();
        Self { pool, config, connections, committer, seen, recent, last_event, wary_for }
    }

    /// Whether this runtime has a connection of its own, or may have one at once. The committer always may.
    pub(crate) fn is_at_home(&self) -> bool {
        let home = Handle::current().id();
        if self.connections.iter().any(|(own, _)| *own == home) {
            return true;
        }
        let others = self.connections.iter().filter(|(own, _)| *own != self.committer).count();
        let places = self.pool.options().get_max_connections();
        let others_max = OTHERS_MAX.min(places as usize / 4);
        others < others_max && (self.pool.size() < places || self.pool.num_idle() > 0)
    }

    /// This runtime's connection.
    async fn connection(&mut self) -> Result<PoolConnection<Postgres>, sqlx::Error> {
        let home = Handle::current().id();
        if let Some(own) = self.connections.iter().position(|(own, _)| *own == home) {
            return Ok(self.connections.swap_remove(own).1);
        }
        // What the pool has left may be another runtime's: only its place is wanted.
        while let Some(unused) = self.pool.try_acquire() {
            discard(unused);
        }
        self.pool.acquire().await
    }

    fn keep(&mut self, connection: PoolConnection<Postgres>) {
        self.connections.push((Handle::current().id(), connection));
    }

    /// Closes its connections. To go back to the pool they would be asked by their runtimes, which may have ended.
    pub(crate) fn release(&mut self) {
        self.connections.drain(..).for_each(|(_, connection)| discard(connection));
    }

    /// Commits the batch and answers each of its appends, in order.
    pub(crate) async fn commit(&mut self, batch: Batch) -> Vec<Answer> {
        match self.commit_settled(&batch).await {
            Ok(answers) => answers,
            Err(error) if batch.command_count() > 1 && blames_some(&error) => {
                // One of them is at fault; the others are not made to pay for it.
                let mut answers = Vec::with_capacity(batch.command_count());
                for command in batch.commands {
                    let mut alone = Batch::one_of_many();
                    alone.push(command);
                    match self.commit_settled(&alone).await {
                        Ok(answer) => answers.extend(answer),
                        Err(error) => answers.extend(alone.all(&failure(error))),
                    }
                }
                answers
            }
            Err(error) => batch.all(&failure(error)),
        }
    }

    /// Calls, and settles what is unknown. `Err` means that nothing was committed, nor will be.
    async fn commit_settled(&mut self, batch: &Batch) -> Result<Vec<Answer>, sqlx::Error> {
        let mut lost = None;
        // A connection that died while it was idle is only noticed by using it: hence a second call.
        for _ in 0..2 {
            let batch_id = Uuid::new_v4();
            match self.call(batch_id, batch).await {
                Outcome::Answered(answers) => return Ok(answers),
                Outcome::Failed(error) => return Err(error),
                Outcome::Unknown(error) => {
                    tracing::warn!(%error, "lost the answer to a commit, looking it up");
                    match self.settle(batch_id, batch).await {
                        Settled::Committed(answers) => return Ok(answers),
                        Settled::NotCommitted => lost = Some(error),
                        Settled::Unknown => return Ok(batch.all(&AppendError::OutcomeUnknown)),
                    }
                }
            }
        }
        Err(lost.unwrap_or(sqlx::Error::PoolTimedOut))
    }

    async fn call(&mut self, batch_id: Uuid, batch: &Batch) -> Outcome {
        let mut connection = match self.connection().await {
            Ok(connection) => connection,
            // Nothing was sent.
            Err(error) => return Outcome::Failed(error),
        };
        match self.append(&mut connection, batch_id, batch).await {
            Ok(Called { answers, before }) => {
                self.keep(connection);
                self.last_event = Some(last_event(&answers).unwrap_or(before));
                self.recent.keep(before, &batch.commands, &answers);
                Outcome::Answered(answers)
            }
            Err(error) if was_rolled_back(&error) => {
                // Of the rest, some are the connection's fault: its server may have become a standby.
                if blames_some(&error) {
                    self.keep(connection);
                } else {
                    discard(connection);
                }
                if let Some(refusal) = tail_lost(&error) {
                    self.refuse(&refusal).await;
                }
                Outcome::Failed(error)
            }
            Err(error) => {
                discard(connection);
                Outcome::Unknown(error)
            }
        }
    }

    /// Each statement has its own time: the server gives up before we do, and says so.
    async fn append(
        &mut self,
        connection: &mut PgConnection,
        batch_id: Uuid,
        batch: &Batch,
    ) -> Result<Called, sqlx::Error> {
        let log_id = self.config.log_id.get();
        let expected = Guard { seen: self.seen.head(), judged: batch.judged };
        let commands = batch.commands.as_slice();
        let in_time = self.config.statement_wait_max;
        let is_each_alone = is_each_alone(commands);
        if let [command] = commands
            && self.wary_for == 0
            && !batch.is_second_try
            && is_each_alone
        {
            let call = append_alone(connection, log_id, batch_id, expected, command);
            if let Some(called) = timeout(in_time, call).await.unwrap_or_else(late)? {
                return Ok(called);
            }
        }
        let called = if is_each_alone {
            let call = append_each_alone(connection, log_id, batch_id, expected, commands);
            timeout(in_time, call).await
        } else {
            let call = append_events(connection, log_id, batch_id, expected, commands);
            timeout(in_time, call).await
        };
        let called = called.unwrap_or_else(late)?;
        self.wary_for = match self.last_event {
            Some(last) if last != called.before => QUIET_CALLS,
            Some(_) | None => self.wary_for.saturating_sub(1),
        };
        Ok(called)
    }

    /// The log lost its tail behind our back. Whoever has not seen it that long would go on appending.
    async fn refuse(&self, refusal: &Refusal) {
        tracing::error!(reason = refusal.because, "the log lost its tail");
        let refusing = async {
            let head = log::head(&self.pool).await?.ok_or_else(log::no_head)?;
            log::refuse(&self.pool, head.at.epoch, refusal).await
        };
        match timeout(self.config.statement_wait_max, refusing).await {
            Ok(Ok(())) => {}
            // The next append says it again.
            Ok(Err(error)) => tracing::warn!(%error, "could not have appends refused"),
            Err(_) => tracing::warn!("could not have appends refused in time"),
        }
    }

    /// Looks a commit of unknown outcome up on another connection, again and again within its bound.
    async fn settle(&self, batch_id: Uuid, batch: &Batch) -> Settled {
        let end = Instant::now() + self.config.settle_wait_max;
        loop {
            match timeout_at(end, self.look_up(batch_id, batch)).await {
                Ok(Ok(settled)) => return settled,
                Ok(Err(error)) => {
                    tracing::warn!(%error, "could not look a commit up")
                }
                Err(_) => return Settled::Unknown,
            }
            if Instant::now() + SETTLE_PAUSE >= end {
                return Settled::Unknown;
            }
            sleep(SETTLE_PAUSE).await;
        }
    }

    async fn look_up(&self, batch_id: Uuid, batch: &Batch) -> Result<Settled, ReadError> {
        let events = batch.commands.iter().flat_map(|command| &command.append.events);
        let ids: Vec<Uuid> = events.map(|event| event.id.get()).collect();
        let log_id = self.config.log_id.get();
        let rows = sqlx::query!(
            r#"select event_id as "event_id!", at_epoch as "epoch!", at_version as "version!",
                      at_position as "position!", committed_at_micros as "committed_at_micros!"
               from settle_append($1, $2, $3)"#,
            log_id,
            batch_id,
            &ids,
        )
        .fetch_all(&self.pool)
        .await?;
        if rows.is_empty() {
            return Ok(Settled::NotCommitted);
        }
        let mut found = HashMap::with_capacity(rows.len());
        for row in rows {
            let at = log::log_position(row.epoch, row.position)?;
            let version = log::version(row.position, row.version)?;
            let committed_at = CommittedAt::from_unix_micros(row.committed_at_micros);
            found.insert(EventId::new(row.event_id), (at, version, committed_at));
        }
        let mut answers = Vec::with_capacity(batch.command_count());
        for command in &batch.commands {
            let append = &command.append;
            let first = append.events.first().and_then(|event| found.get(&event.id));
            answers.push(match first {
                Some((at, version, committed_at)) => {
                    Ok(Once::Appended(appended(append, *at, *version, *committed_at)))
                }
                None => self.not_appended(command).await?,
            });
        }
        Ok(Settled::Committed(answers))
    }

    /// The answer to a command without events whose call ran: it was a repeat or it lost. Its aggregate
    /// can only have moved further since, and what is under its key by now is its first answer.
    async fn not_appended(&self, command: &Command) -> Result<Answer, ReadError> {
        if let Some(key) = &command.idempotency
            && let Some(repeat) = idempotency::find(&self.pool, key).await?
        {
            return Ok(Ok(Once::Repeated(repeat)));
        }
        Ok(Err(self.conflict(&command.append).await?))
    }

    async fn conflict(&self, append: &Append) -> Result<AppendError, ReadError> {
        let head = log::aggregate_head(&self.pool, &append.aggregate).await?;
        Ok(AppendError::Conflict { current: head.version, at: head.at })
    }
}

/// Whether commands are to be tried one by one, since not all of them need be at fault.
fn blames_some(error: &sqlx::Error) -> bool {
    blames_the_append(error) || is_epoch_over(error)
}

fn late<T>(_: Elapsed) -> Result<T, sqlx::Error> {
    Err(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()))
}

/// The newest event of those appended.
fn last_event(answers: &[Answer]) -> Option<EventId> {
    answers.iter().rev().find_map(|answer| match answer {
        Ok(Once::Appended(appended)) => appended.event_ids.last().copied(),
        Ok(Once::Repeated(_)) | Err(_) => None,
    })
}

/// Closes a connection instead of giving it back: a statement may still run on it.
fn discard(connection: PoolConnection<Postgres>) {
    drop(connection.detach());
}
