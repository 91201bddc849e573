//! The projector, from an empty read model to the end of a backlog of orders, against a loop that does
//! nothing but write what the projector would have written: the same states and rows after the fold, the
//! same checkpoints, in full batches, a connection for each partition.
//!
//! Both run in this process, each in a database that is made anew, with the same statements. The
//! baseline reads no stream, no state and no clock: what it writes was folded beforehand.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use compose::local::settings::{NatsUser, ProjectorSettings, SharedSecrets};
use compose::nats::{Server, User};
use compose::postgres::Cluster;
use compose::{local::PRIMARY, ports};
use consistency::{Event, EventId, Position};
use futures::future::try_join_all;
use projection::{
    Changes, DocumentDefinition, Domain, Projection, ProjectionDefinition, StoredState,
};
use region_projector::config::ApplyConfig;
use region_projector::partition::write;
use region_projector::{Projector, ProjectorConfig, status};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::Plan;
use crate::events::{self, OPEN_ORDER_COUNT};
use crate::pairs::{Sample, Side, interleave};
use crate::report::{Goal, Line};
use crate::servers::{self, PATIENCE};
use crate::stream::{self, Message};

pub const NAME: &str = "project_documents";

const LOOK: Duration = Duration::from_millis(2);
const PARTITION_COUNT: u16 = 8;

/// Events a second.
pub async fn measure(plan: Plan) -> anyhow::Result<Vec<Line>> {
    let world = World::start(plan.project_events).await?;
    let pairs = interleave(plan.pairs, async |side| {
        let database = fresh_database(&world.postgres, &world.domain, &world.secrets).await?;
        let elapsed = match side {
            Side::Ours => {
                let settings = settings(&world.nats, &world.secrets, &database)?;
                project(&settings, &world.domain, world.head).await?
            }
            Side::Baseline => world.write(&database).await?,
        };
        drop_database(&world.postgres, &database).await?;
        Ok(Sample::plain(plan.project_events as f64 / elapsed.as_secs_f64()))
    });
    let line = pairs.await?.into_line(NAME, "events/s", Goal::RatioMin(0.7));
    let count = plan.project_events;
    let note = format!("{count} events, 5 an order, {OPEN_ORDER_COUNT} orders under way at once");
    Ok(vec![line.noting(note)])
}

/// Orders and their views, as in the worked example; its rollups are not part of this row.
pub(super) fn domain() -> anyhow::Result<Domain> {
    let orders = Projection::document("orders", 1, "order", orders::Orders)
        .row("order-detail")
        .list("orders-by-customer")
        .list("orders-by-status")
        .partitions(PARTITION_COUNT);
    Ok(Domain::builder().aggregate("order", orders::Orders).projection(orders).build()?)
}

/// The URL of an empty read model.
pub(super) async fn fresh_database(
    postgres: &Cluster,
    domain: &Domain,
    secrets: &SharedSecrets,
) -> anyhow::Result<String> {
    let name = format!("bench_{}", uuid::Uuid::new_v4().simple());
    let url = postgres.create_database(&name).await?;
    let pool = servers::pool(&url).await?;
    region_projector::start::prepare(&pool, domain, secrets.log_id).await?;
    // What the last run left to be written is not for this one to pay.
    sqlx::query("checkpoint").execute(&pool).await?;
    pool.close().await;
    Ok(url)
}

/// Makes room for the next.
pub(super) async fn drop_database(postgres: &Cluster, url: &str) -> anyhow::Result<()> {
    let (_, name) = url.rsplit_once('/').context("a url ends with its database")?;
    let mut connection = PgConnection::connect(&postgres.url("postgres")).await?;
    let drop = AssertSqlSafe(format!("drop database {name} with (force)"));
    sqlx::query(drop).execute(&mut connection).await?;
    Ok(())
}

/// The configuration of a projector over a read model.
pub(super) fn settings(
    nats: &Server,
    secrets: &SharedSecrets,
    database: &str,
) -> anyhow::Result<ProjectorSettings> {
    Ok(ProjectorSettings {
        region: PRIMARY.into(),
        primary: PRIMARY.into(),
        admin: format!("127.0.0.1:{}", ports::free()?),
        database_url: database.to_owned(),
        nats: NatsUser::new(nats.url(), nats.credentials(User::Projector)),
        // Asked for older epochs only, of which there are none.
        primary_url: "http://127.0.0.1:9".to_owned(),
        secrets: secrets.clone(),
    })
}

/// Runs a projector until it has applied everything up to `head`.
pub(super) async fn project(
    settings: &ProjectorSettings,
    domain: &Domain,
    head: Position,
) -> anyhow::Result<Duration> {
    let config: ProjectorConfig =
        process::config::load_from(settings.to_string().parse()?, "PROJECTOR", [])?;
    let began = Instant::now();
    let stop = CancellationToken::new();
    let projector = Projector::start(config, domain.clone(), stop).await?;
    // A slow disk does two thousand events a second.
    let patience = 10 * PATIENCE + Duration::from_millis(head.get() / 2);
    timeout(patience, caught_up(&projector, head)).await.context("takes too long")?;
    let elapsed = began.elapsed();
    projector.stop();
    projector.join().await?;
    Ok(elapsed)
}

/// Every partition has committed or read past everything.
async fn caught_up(projector: &Projector, head: Position) {
    loop {
        let lags = projector.status().lags(status::now());
        let there = lags.iter().filter(|lag| lag.reached.watermark == head).count();
        if there == usize::from(PARTITION_COUNT) {
            return;
        }
        sleep(LOOK).await;
    }
}

struct World {
    domain: Domain,
    secrets: SharedSecrets,
    head: Position,
    /// What the baseline writes, by partition.
    batches: BTreeMap<u16, Vec<Batch>>,
    postgres: Cluster,
    nats: Server,
}

impl World {
    async fn start(event_count: u64) -> anyhow::Result<Self> {
        let (postgres, nats) = tokio::try_join!(servers::durable_postgres(), async {
            Ok(Server::start_single().await?)
        })?;
        let operator = servers::operator(&nats).await?;
        stream::create(&operator).await?;
        let events = (0..event_count).map(events::at).collect::<anyhow::Result<Vec<Event>>>()?;
        let head = events.last().context("there are events")?.at.position;
        let domain = domain()?;
        let batches = fold(&domain.projections()[0], &events)?;
        stream::publish(&operator, events.into_iter().map(Message::of)).await?;
        Ok(Self { domain, secrets: servers::secrets(), head, batches, postgres, nats })
    }

    async fn write(&self, database: &str) -> anyhow::Result<Duration> {
        let mut connections = Vec::new();
        for _ in 0..PARTITION_COUNT {
            connections.push(PgConnection::connect(database).await?);
        }
        let definition = self.domain.projections()[0].clone();
        let began = Instant::now();
        let writing =
            self.batches.iter().zip(connections).map(|((partition, batches), connection)| {
                let (partition, definition) = (i32::from(*partition), definition.clone());
                // A task for each, as in the projector; they share what was folded.
                let batches = batches.clone();
                tokio::spawn(async move {
                    write_all(connection, &definition, partition, &batches).await
                })
            });
        for written in try_join_all(writing).await? {
            written?;
        }
        Ok(began.elapsed())
    }
}

/// What one transaction of the baseline writes.
#[derive(Debug, Clone)]
struct Batch {
    through: (Position, EventId),
    changes: std::sync::Arc<Changes>,
}

/// The batches of each partition, as full as the projector may make them.
fn fold(
    definition: &ProjectionDefinition,
    events: &[Event],
) -> anyhow::Result<BTreeMap<u16, Vec<Batch>>> {
    let document = definition.document().context("orders are documents")?;
    let mut partitions: BTreeMap<u16, Vec<&Event>> = BTreeMap::new();
    for event in events {
        let partition = definition.partition_of(&event.aggregate).context("all are orders")?;
        partitions.entry(partition).or_default().push(event);
    }
    let mut states = HashMap::new();
    let size = ApplyConfig::default().batch_events_max;
    let batches = partitions.into_iter().map(|(partition, events)| {
        let batches = events
            .chunks(size)
            .map(|events| fold_batch(definition, document, &mut states, events))
            .collect::<anyhow::Result<Vec<_>>>()?;
        Ok((partition, batches))
    });
    batches.collect()
}

fn fold_batch<'a>(
    definition: &ProjectionDefinition,
    document: &DocumentDefinition,
    states: &mut HashMap<&'a str, StoredState>,
    events: &[&'a Event],
) -> anyhow::Result<Batch> {
    let mut groups: BTreeMap<&'a str, Vec<&'a Event>> = BTreeMap::new();
    for event in events {
        groups.entry(event.aggregate.id()).or_default().push(event);
    }
    let mut applied = Vec::new();
    for (id, group) in groups {
        let before = states.remove(id).unwrap_or(StoredState::NOTHING);
        let done = document.apply(&group[0].aggregate, before, &group);
        ensure!(done.stop.is_none(), "{:?}", done.stop);
        states.insert(id, done.after.clone());
        applied.push(done);
    }
    let last = events.last().context("a batch has events")?;
    let changes = Changes::gather(definition, applied).into();
    Ok(Batch { through: (last.at.position, last.id), changes })
}

async fn write_all(
    mut connection: PgConnection,
    definition: &ProjectionDefinition,
    partition: i32,
    batches: &[Batch],
) -> anyhow::Result<()> {
    let mut from = Position::ZERO;
    for batch in batches {
        let mut transaction = connection.begin().await?;
        let moved = sqlx::query(
            "update checkpoint set position = $1, event_id = $2, committed_at = now()
             where projection = 'orders' and version = 1 and partition = $3 and position = $4",
        )
        .bind(batch.through.0.as_i64())
        .bind(batch.through.1.get())
        .bind(partition)
        .bind(from.as_i64())
        .execute(&mut *transaction)
        .await?;
        ensure!(moved.rows_affected() == 1, "the checkpoint is elsewhere");
        // The projector's own statements: what is left out is reading, folding and looking.
        let written = write::write_document(&mut transaction, definition, &batch.changes).await?;
        ensure!(written, "states are missing");
        transaction.commit().await?;
        from = batch.through.0;
    }
    Ok(())
}
