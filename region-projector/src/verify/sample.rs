//! A few aggregates, each folded from its own events.

use std::collections::BTreeSet;

use consistency::{AggregateId, Event, Position, Version};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use projection::sql::ParityStatements;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use super::scratch::Scratch;
use super::{Extents, Verified, Verify, VerifyError, position};

/// Requests to the log at once.
const REQUEST_COUNT: usize = 8;
/// Rows without a state of a view that are looked at.
const STRAY_COUNT_MAX: i64 = 20;

impl Verify<'_> {
    /// Whatever comes of the view's aggregates, of its rows that have none, and of the log: what the view
    /// lacks is found there only.
    pub(super) async fn sample(
        &self,
        connection: &mut PgConnection,
        mut scratch: Scratch,
        count: u32,
    ) -> Result<Verified, VerifyError> {
        let mut transaction = connection.begin().await?;
        sqlx::query("set transaction isolation level repeatable read")
            .execute(&mut *transaction)
            .await?;
        let at = Extents::read(&mut transaction, self.definition).await?;
        let mut aggregates = self.of_view(&mut transaction, count).await?;
        aggregates.extend(self.of_log(&at, count).await?);
        let ids: Vec<String> = aggregates.iter().map(|one| one.id().to_owned()).collect();
        // The first pages are on their way while others are folded.
        let mut firsts = stream::iter(aggregates)
            .map(|aggregate| async {
                let page =
                    self.log.read_aggregate(at.epoch, &aggregate, Version::ZERO.next()).await?;
                Ok::<_, VerifyError>((aggregate, page))
            })
            .buffered(REQUEST_COUNT);
        while let Some((aggregate, mut page)) = firsts.try_next().await? {
            while let Some(last) = page.last() {
                let next = last.version.next();
                let is_all = last.at.position > position(at.end());
                page.retain(|event: &Event| at.hold(self.definition, event));
                scratch.fold(&mut transaction, &page, &at.discarded).await?;
                page = match is_all {
                    false => self.log.read_aggregate(at.epoch, &aggregate, next).await?,
                    true => Vec::new(),
                };
            }
        }
        drop(firsts);
        let verified = self.compare(&mut transaction, scratch, &at, Some(ids)).await?;
        transaction.rollback().await?;
        Ok(verified)
    }

    async fn of_view(
        &self,
        connection: &mut PgConnection,
        count: u32,
    ) -> Result<BTreeSet<AggregateId>, VerifyError> {
        let statements = ParityStatements::of(self.definition);
        let sample = sqlx::query_scalar(AssertSqlSafe(statements.sample.clone()));
        let mut ids: Vec<String> =
            sample.bind(i64::from(count)).fetch_all(&mut *connection).await?;
        for strays in statements.tables.iter().filter_map(|table| table.strays.clone()) {
            let strays = sqlx::query_scalar::<_, String>(AssertSqlSafe(strays));
            ids.extend(strays.bind(STRAY_COUNT_MAX).fetch_all(&mut *connection).await?);
        }
        let kind = self.definition.aggregate_type();
        // An id that breaks its bounds was never in the log; the whole view names it.
        let aggregates = ids.into_iter().filter_map(|id| AggregateId::new(kind.clone(), id).ok());
        Ok(aggregates.collect())
    }

    async fn of_log(&self, at: &Extents, count: u32) -> Result<BTreeSet<AggregateId>, VerifyError> {
        let end = usize::try_from(at.end()).unwrap_or(usize::MAX);
        let count = usize::try_from(count).unwrap_or(usize::MAX).min(end);
        let places = rand::seq::index::sample(&mut rand::rng(), end, count);
        let found = stream::iter(places.into_iter().map(|place| Position::new(place as u64)))
            .map(|after| self.log.read(at.epoch, after.unwrap_or(Position::ZERO), 1))
            .buffer_unordered(REQUEST_COUNT)
            .map_ok(|page| page.events.into_iter().map(|event| event.aggregate));
        let mut aggregates = BTreeSet::new();
        let mut found = found;
        while let Some(page) = found.try_next().await? {
            aggregates.extend(page.filter(|one| self.definition.partition_of(one).is_some()));
        }
        Ok(aggregates)
    }
}
