//! How far the log and what was published of it are the same: where a new epoch is to begin.

use std::error::Error;

use async_nats::Client;
use async_nats::jetstream::{self, Context};
use consistency::{Epoch, Position};
use sqlx::PgPool;

use super::session::SessionError;
use super::stream;
use crate::{ReadError, log};

/// Why log and streams cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// The log.
    #[error("the log cannot be read")]
    Log(#[from] ReadError),
    /// A stream.
    #[error("the streams cannot be read")]
    Stream(#[source] Box<dyn Error + Send + Sync>),
}

impl From<SessionError> for CompareError {
    fn from(error: SessionError) -> Self {
        Self::Stream(Box::new(error))
    }
}

/// The last position at which the log has the event that the regions were told, in every epoch: what
/// comes after it in the log, if anything, was never told, or something else was told in its place.
///
/// Both are chains, so they are the same up to one place and nowhere after it. What has aged out of a
/// stream counts as the same, since it was compared when it was published.
pub async fn last_common(pool: &PgPool, client: &Client) -> Result<Position, CompareError> {
    let head = log::head(pool).await?.ok_or_else(log::no_head)?.at;
    let epochs = log::epochs(pool).await?;
    let context = jetstream::new(client.clone());
    let mut common = head.position;
    for epoch in (1..=epochs.current().get()).filter_map(Epoch::new) {
        let told = Told { pool, context: &context, epoch };
        // What later epochs did not keep of it is given up already.
        common = told.same_up_to(common, epochs.kept_of(epoch)).await?;
    }
    Ok(common)
}

/// What the stream of one epoch told.
struct Told<'a> {
    pool: &'a PgPool,
    context: &'a Context,
    epoch: Epoch,
}

impl Told<'_> {
    /// `bound`, or the last position before it that stream and log have the same event at. The stream is
    /// looked at up to `kept`.
    async fn same_up_to(&self, bound: Position, kept: Position) -> Result<Position, CompareError> {
        let Some(found) = stream::find(self.context, self.epoch).await? else { return Ok(bound) };
        let end = Position::new(stream::end(&found).await?.sequence).unwrap_or(Position::MAX);
        let mut other = end.min(kept).min(bound);
        if self.is_same(&found, other).await? {
            return Ok(bound);
        }
        let first = found.cached_info().state.first_sequence;
        let mut same = Position::new(first).unwrap_or_default().previous().min(other);
        // Same at `same`, another at `other`.
        while same.next() < other {
            let middle = same.plus(other.since(same) / 2);
            if self.is_same(&found, middle).await? { same = middle } else { other = middle }
        }
        Ok(same)
    }

    async fn is_same(
        &self,
        stream: &jetstream::stream::Stream,
        at: Position,
    ) -> Result<bool, CompareError> {
        let in_log = log::event_id_at(self.pool, at).await?;
        let on_stream = stream::id_at(stream, at.get()).await?;
        Ok(at == Position::ZERO || on_stream.is_none() || on_stream == in_log)
    }
}
