//! One partition of a rebuild: folds what comes in memory, and stores it with its checkpoint now and
//! then.

use std::collections::{BTreeSet, HashMap, HashSet};

use consistency::{CommittedAt, Event, LogPosition, Position, Version};
use projection::sql::bulk::BulkStatements;
use projection::sql::{StateColumns, ViewStatements};
use projection::{
    Delta, ProjectionDefinition, ProjectionKind, RollupChanges, StateWrites, StoredState,
};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, PgPool};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::copy::CopyRows;
use super::memory::States;
use super::{RebuildConfig, RebuildError};
use crate::breaker;
use crate::chain::Mark;
use crate::checkpoint::{self, Held, VersionKey};
use crate::partition::plan::{self, Known, Letter, Parking, Plan, Writes};
use crate::partition::{parking, write};
use crate::reader::{Chunk, bytes_of};

/// States of one statement.
const STATES_AT_ONCE: usize = 10_000;
/// Parts of sums are added up when there are so many more than the last time.
const PARTS_MAX: usize = 20_000;

/// A partition that is folded.
pub(super) struct Folding {
    pub(super) key: VersionKey,
    pub(super) definition: ProjectionDefinition,
    pub(super) held: Held,
    pub(super) pool: PgPool,
    pub(super) config: RebuildConfig,
    /// Bytes of states that are kept at most.
    pub(super) states_bytes_max: usize,
    /// Bytes of events that are folded at once.
    pub(super) batch_bytes_max: usize,
    pub(super) parked_aggregates_max: u64,
    /// What is folded in the end.
    pub(super) target: Position,
    pub(super) reached: tokio::sync::watch::Sender<Position>,
}

/// What is folded and not stored.
struct Unstored {
    through: Mark,
    committed_at: Option<CommittedAt>,
    parkings: Vec<Parking>,
    letters: Vec<Letter>,
    sums: Vec<(LogPosition, Delta)>,
    sums_before: usize,
}

struct Running {
    folding: Folding,
    bulk: BulkStatements,
    states: States,
    parked: HashSet<String>,
    unstored: Unstored,
}

impl Folding {
    /// Folds until the target is reached and stored.
    pub(super) async fn run(self, mut chunks: mpsc::Receiver<Chunk>) -> Result<(), RebuildError> {
        let mut running = self.begin().await?;
        let every = running.folding.config.checkpoint_interval.get();
        let mut due = Instant::now() + every;
        loop {
            let is_through = running.gather_and_fold(&mut chunks, due).await?;
            let is_full = running.folding.states_bytes_max < running.states.bytes();
            if is_through || is_full || due <= Instant::now() {
                Box::pin(running.store()).await?;
                due = Instant::now() + every;
            }
            if is_full {
                running.states.shrink(running.folding.states_bytes_max / 2);
            }
            if is_through {
                return Ok(());
            }
        }
    }

    async fn begin(self) -> Result<Running, RebuildError> {
        let bulk = BulkStatements::of(&self.definition);
        let parked = sqlx::query_scalar!(
            "select aggregate_id from parked
             where projection = $1 and version = $2 and partition = $3",
            self.key.projection.as_str(),
            self.key.version_column(),
            i32::from(self.held.partition),
        );
        let parked = parked.fetch_all(&self.pool).await?.into_iter().collect();
        let unstored = Unstored::at(self.held.mark);
        Ok(Running { folding: self, bulk, states: States::default(), parked, unstored })
    }
}

impl Unstored {
    fn at(through: Mark) -> Self {
        Self {
            through,
            committed_at: None,
            parkings: Vec::new(),
            letters: Vec::new(),
            sums: Vec::new(),
            sums_before: 0,
        }
    }
}

impl Running {
    /// Takes what comes until it is worth folding, and folds it. `true` when the target is reached.
    async fn gather_and_fold(
        &mut self,
        chunks: &mut mpsc::Receiver<Chunk>,
        due: Instant,
    ) -> Result<bool, RebuildError> {
        let (mut taken, mut bytes) = (Vec::new(), 0);
        let after = self.folding.held.mark.position;
        while bytes < self.folding.batch_bytes_max
            && self.unstored.through.position < self.folding.target
        {
            let next = tokio::time::timeout_at(due, chunks.recv()).await;
            let chunk = match next {
                Ok(Some(chunk)) => chunk,
                Ok(None) => return Err(RebuildError::ReaderEnded),
                // What is there is stored before more is waited for.
                Err(_) => break,
            };
            // The reader starts at the lowest checkpoint, and this one may be further.
            if chunk.through.position <= self.unstored.through.position {
                continue;
            }
            bytes += chunk.events.iter().map(bytes_of).sum::<usize>();
            (self.unstored.through, self.unstored.committed_at) =
                (chunk.through, Some(chunk.committed_at));
            taken.push(chunk);
        }
        let events = taken.iter().flat_map(|chunk| &chunk.events);
        let events: Vec<&Event> = events.filter(|event| after < event.at.position).collect();
        self.fold(&events).await?;
        // Only for display: nobody listens when the rebuild is over.
        self.folding.reached.send_replace(self.unstored.through.position);
        Ok(self.folding.target <= self.unstored.through.position)
    }

    async fn fold(&mut self, events: &[&Event]) -> Result<(), RebuildError> {
        if events.is_empty() {
            return Ok(());
        }
        self.states.begin_batch();
        let mut known = self.known(events).await?;
        let Folding { definition, held, .. } = &self.folding;
        let events = events.iter().copied();
        let Plan { writes, parkings, letters, overflowed, .. } =
            plan::plan_states(definition, held.partition, events, &mut known);
        if overflowed {
            return Err(RebuildError::Overflow(self.folding.key.clone()));
        }
        self.parked.extend(parkings.iter().map(|parking| parking.aggregate.id().to_owned()));
        self.unstored.parkings.extend(parkings);
        self.unstored.letters.extend(letters);
        match writes {
            Writes::Document(changes) => self.keep(changes.states),
            Writes::Rollup(states, sums) => {
                self.keep(states);
                self.add(sums)?;
            }
            // What a custom projection writes is not ours to write in bulk: see `begin`.
            Writes::Custom(states, _) => self.keep(states),
        }
        Ok(())
    }

    /// The states of the aggregates of these events, from memory or from the table.
    async fn known(&mut self, events: &[&Event]) -> Result<Known, RebuildError> {
        let mut known = Known::default();
        let mut missing = BTreeSet::new();
        for event in events {
            let id = event.aggregate.id();
            if self.parked.contains(id) {
                known.parked.insert(id.to_owned());
            } else if let Some(state) = self.states.get(id) {
                if !known.states.contains_key(id) {
                    known.states.insert(id.to_owned(), state.clone());
                }
            } else if event.version != Version::ZERO.next() && !known.states.contains_key(id) {
                missing.insert(id);
            }
        }
        // The first event of an aggregate follows nothing, wherever it is among these.
        let first = |event: &&&Event| event.version == Version::ZERO.next();
        for event in events.iter().filter(first) {
            missing.remove(event.aggregate.id());
        }
        if missing.is_empty() {
            return Ok(known);
        }
        let ids: Vec<String> = missing.into_iter().map(str::to_owned).collect();
        for (id, state) in self.load(&ids).await? {
            self.states.insert_stored(id.clone(), state.clone());
            known.states.insert(id, state);
        }
        Ok(known)
    }

    async fn load(&self, ids: &[String]) -> Result<HashMap<String, StoredState>, RebuildError> {
        let statement = &self.folding.definition.statements().load_states;
        let mut loaded = HashMap::new();
        for ids in ids.chunks(STATES_AT_ONCE) {
            let asked = sqlx::query_as(AssertSqlSafe(statement.clone())).bind(ids);
            let rows: Vec<StateColumns> = asked.fetch_all(&self.folding.pool).await?;
            for columns in rows {
                let (id, state) = StoredState::from_columns(columns)?;
                loaded.insert(id, state);
            }
        }
        Ok(loaded)
    }

    fn keep(&mut self, writes: StateWrites) {
        let StateWrites {
            aggregate_ids,
            versions,
            epochs,
            positions,
            created_positions,
            states,
            ..
        } = writes;
        let places =
            versions.into_iter().zip(epochs).zip(positions.into_iter().zip(created_positions));
        for ((id, state), ((version, epoch), (position, created))) in
            aggregate_ids.into_iter().zip(states).zip(places)
        {
            let columns = (id, version, epoch, position, created, state);
            // They were made of a state a moment ago.
            if let Ok((id, state)) = StoredState::from_columns(columns) {
                self.states.put(id, state);
            }
        }
    }

    fn add(&mut self, changes: RollupChanges) -> Result<(), RebuildError> {
        let sums = &mut self.unstored.sums;
        sums.extend(parts(changes));
        if sums.len() < self.unstored.sums_before + PARTS_MAX {
            return Ok(());
        }
        let together = self.gathered()?;
        self.unstored.sums = parts(together);
        self.unstored.sums_before = self.unstored.sums.len();
        Ok(())
    }

    fn gathered(&self) -> Result<RollupChanges, RebuildError> {
        let ProjectionKind::Rollup(rollup) = self.folding.definition.kind() else {
            return Ok(RollupChanges::default());
        };
        let sums = self.unstored.sums.iter().map(|(at, delta)| (*at, delta));
        let overflow = |_| RebuildError::Overflow(self.folding.key.clone());
        rollup.gather(self.folding.held.partition, sums).map_err(overflow)
    }

    /// Stores everything that is folded, with its checkpoint.
    async fn store(&mut self) -> Result<(), RebuildError> {
        let Unstored { through, committed_at, .. } = self.unstored;
        let Folding { key, held, pool, parked_aggregates_max, .. } = &self.folding;
        if through == held.mark {
            return Ok(());
        }
        let mut connection = pool.acquire().await?;
        let mut transaction = connection.begin().await?;
        if !checkpoint::advance(&mut transaction, key, held, through, committed_at).await? {
            return Err(RebuildError::Displaced(key.clone()));
        }
        let parkings = &self.unstored.parkings;
        if let Some(trip) =
            breaker::check(&mut transaction, key, parkings, *parked_aggregates_max).await?
        {
            return Err(RebuildError::Tripped { key: key.clone(), trip });
        }
        parking::park(&mut transaction, key, held.partition, parkings).await?;
        for letters in self.unstored.letters.chunks(STATES_AT_ONCE) {
            parking::bury(&mut transaction, key, letters).await?;
        }
        self.store_sums(&mut transaction).await?;
        self.store_states(&mut transaction).await?;
        transaction.commit().await?;
        self.states.stored();
        self.folding.held.mark = through;
        self.unstored = Unstored::at(through);
        Ok(())
    }

    async fn store_sums(&self, connection: &mut PgConnection) -> Result<(), RebuildError> {
        let sums = self.gathered()?;
        for view in &self.folding.definition.statements().views {
            match view {
                ViewStatements::Rollup(view) => write::add(connection, view, &sums).await?,
                ViewStatements::Row(_) | ViewStatements::List(_) | ViewStatements::Search(_) => {}
            }
        }
        Ok(())
    }

    async fn store_states(&self, connection: &mut PgConnection) -> Result<(), RebuildError> {
        let partition = self.folding.held.partition;
        let mut new = self.states.new_to_table().peekable();
        while new.peek().is_some() {
            let mut rows = CopyRows::default();
            for (id, state) in new.by_ref().take(STATES_AT_ONCE) {
                rows.row(7)
                    .text(id)
                    .integer(i32::from(partition))
                    .bigint(state.version().as_i64())
                    .integer(state.at().epoch.as_i32())
                    .bigint(state.at().position.as_i64())
                    .bigint(state.created().as_i64())
                    .text_or_null(state.state());
            }
            super::copy_in(connection, &self.bulk.copy_states, rows).await?;
        }
        let definition = &self.folding.definition;
        for newer in self.states.newer_than_table(partition, STATES_AT_ONCE) {
            if !write::write_states(connection, definition, &newer).await? {
                return Err(RebuildError::Displaced(self.folding.key.clone()));
            }
        }
        Ok(())
    }
}

/// The parts of sums one by one.
fn parts(changes: RollupChanges) -> Vec<(LogPosition, Delta)> {
    let RollupChanges { keys, epochs, positions, columns, .. } = changes;
    let places = epochs.into_iter().zip(positions);
    let part = |(at, (key, (epoch, position))): (usize, (String, (i32, i64)))| {
        let epoch = consistency::Epoch::from_i32(epoch)?;
        let place = LogPosition::new(epoch, Position::from_i64(position)?);
        Some((place, Delta { key, values: columns.iter().map(|column| column[at]).collect() }))
    };
    keys.into_iter().zip(places).enumerate().filter_map(part).collect()
}
