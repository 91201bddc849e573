//! The tables that the log is folded into beside a view.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use consistency::{Event, PartitionCount};
use projection::ProjectionDefinition;
use projection::sql::{ParityStatements, ViewStatements};
use sqlx::{AssertSqlSafe, PgConnection};

use super::VerifyError;
use crate::dead_letters::pass_over;
use crate::partition::plan::{Condemned, Plan, Writes, plan};
use crate::partition::write;

/// No region ever gets that far.
const SCRATCH_VERSION: u32 = i32::MAX as u32;

/// Temporary tables, which nobody but their connection sees.
pub struct Scratch {
    /// The rules over those tables.
    definition: ProjectionDefinition,
    /// Aggregates that were parked at one look and not, or elsewhere, at another.
    pub moved: BTreeSet<String>,
    /// Aggregates whose events cannot be folded, and why.
    pub unfoldable: BTreeMap<String, String>,
    /// Events that were folded.
    pub event_count: u64,
}

impl Scratch {
    /// Makes the tables.
    pub async fn create(
        connection: &mut PgConnection,
        original: &ProjectionDefinition,
    ) -> Result<Self, VerifyError> {
        let one = PartitionCount::new(1).expect("one is a number of partitions");
        let definition = original.instance(SCRATCH_VERSION, one)?;
        for create in &definition.statements().create {
            let temporary = create.replacen("create table", "create temporary table", 1);
            sqlx::query(AssertSqlSafe(temporary)).execute(&mut *connection).await?;
        }
        let (moved, unfoldable) = (BTreeSet::new(), BTreeMap::new());
        Ok(Self { definition, moved, unfoldable, event_count: 0 })
    }

    /// The statements that compare them, the fold's first, with the original's.
    pub fn beside(&self, original: &ProjectionDefinition) -> [ParityStatements; 2] {
        [ParityStatements::of(&self.definition), ParityStatements::of(original)]
    }

    /// Folds events, in log order. Those at the positions in `discarded` only count.
    pub async fn fold(
        &mut self,
        connection: &mut PgConnection,
        events: &[Event],
        discarded: &HashSet<i64>,
    ) -> Result<(), VerifyError> {
        let is_discarded = |event: &Event| discarded.contains(&event.at.position.as_i64());
        for stretch in events.chunk_by(|_, next| !is_discarded(next)) {
            let passed = usize::from(stretch.first().is_some_and(is_discarded));
            for event in &stretch[..passed] {
                pass_over(connection, &self.definition, 0, event).await?;
            }
            self.apply(connection, &stretch[passed..]).await?;
        }
        self.event_count += events.len() as u64;
        Ok(())
    }

    async fn apply(
        &mut self,
        connection: &mut PgConnection,
        events: &[Event],
    ) -> Result<(), VerifyError> {
        let mut pending = vec![events];
        while let Some(events) = pending.pop() {
            let foldable: Vec<&Event> = events
                .iter()
                .filter(|event| !self.unfoldable.contains_key(event.aggregate.id()))
                .collect();
            if foldable.is_empty() {
                continue;
            }
            let mut known =
                write::load(connection, &self.definition, foldable.iter().copied()).await?;
            let plan = plan(&self.definition, 0, foldable, &mut known, &Condemned::default());
            if plan.overflowed && 1 < events.len() {
                // Together they leave the bounds of a sum; in the order in which they were applied they
                // may not.
                let (first, second) = events.split_at(events.len() / 2);
                pending.extend([second, first]);
                continue;
            }
            self.write(connection, &plan).await?;
            for letter in plan.letters {
                let id = letter.event.aggregate.id().to_owned();
                self.unfoldable.entry(id).or_insert(letter.error);
            }
        }
        Ok(())
    }

    async fn write(&self, connection: &mut PgConnection, plan: &Plan) -> Result<(), VerifyError> {
        let definition = &self.definition;
        let is_written = match &plan.writes {
            Writes::Document(changes) => {
                write::write_document(connection, definition, changes).await?
            }
            Writes::Rollup(states, changes) => {
                for view in &definition.statements().views {
                    match view {
                        ViewStatements::Rollup(view) => {
                            write::add(connection, view, changes).await?;
                        }
                        ViewStatements::Row(_)
                        | ViewStatements::List(_)
                        | ViewStatements::Search(_) => {}
                    }
                }
                write::write_states(connection, definition, states).await?
            }
            // Its tables bear their own names, so there is no such instance.
            Writes::Custom(states, _) => {
                write::write_states(connection, definition, states).await?
            }
        };
        if is_written { Ok(()) } else { Err(VerifyError::Lost) }
    }
}
