//! A projection that writes what it likes: once, whatever happens.

use consistency::Position;
use process::config::Period;
use projection::{Custom, CustomError, CustomTable, Domain, FoldError, Happened, Projection};
use region_projector::dead_letters::{self, Actor};
use sqlx::PgConnection;

use crate::tally::TallyEvent;
use crate::world::{World, eventually, stop};

/// Keeps a journal without any key, and a sum that it adds to: neither would hide an event that is
/// applied twice.
struct Journal;

const TABLES: [CustomTable; 2] = [
    CustomTable {
        name: "journal_v1_entry",
        create: "create table if not exists journal_v1_entry (aggregate_id text, position bigint)",
    },
    CustomTable {
        name: "journal_v1_sum",
        create: "create table if not exists journal_v1_sum (
                     aggregate_id text primary key, sum bigint not null)",
    },
];

impl Custom for Journal {
    type Event = TallyEvent;

    fn tables(&self) -> Vec<CustomTable> {
        TABLES.to_vec()
    }

    async fn apply(
        &self,
        transaction: &mut PgConnection,
        events: &[Happened<'_, TallyEvent>],
    ) -> Result<(), CustomError> {
        for Happened { event, envelope } in events {
            let id = envelope.aggregate.id();
            sqlx::query("insert into journal_v1_entry values ($1, $2)")
                .bind(id)
                .bind(envelope.at.position.as_i64())
                .execute(&mut *transaction)
                .await?;
            let n = match event {
                TallyEvent::Added { n: 13 } => {
                    return Err(CustomError::Refused(FoldError::new("thirteen is not added")));
                }
                TallyEvent::Added { n: 666 } => panic!("the beast"),
                TallyEvent::Added { n } => *n,
                TallyEvent::Moved { .. } | TallyEvent::Removed {} => 0,
            };
            sqlx::query(
                "insert into journal_v1_sum as held values ($1, $2)
                 on conflict (aggregate_id) do update set sum = held.sum + excluded.sum",
            )
            .bind(id)
            .bind(n)
            .execute(&mut *transaction)
            .await?;
        }
        Ok(())
    }
}

fn domain() -> Domain {
    let journal = Projection::custom("journal", 1, "tally", Journal).partitions(4);
    Domain::builder().projection(journal).build().unwrap()
}

async fn stored(world: &World, position: Position) {
    eventually("the checkpoints are stored", async || {
        let lowest = "select coalesce(min(position), 0) from checkpoint";
        position.as_i64() <= sqlx::query_scalar(lowest).fetch_one(&world.pool).await.unwrap_or(0)
    })
    .await;
}

async fn journal(world: &World, id: &str) -> (i64, Option<i64>) {
    let entries = "select (select count(*) from journal_v1_entry where aggregate_id = $1),
                          (select sum from journal_v1_sum where aggregate_id = $1)";
    sqlx::query_as(entries).bind(id).fetch_one(&world.pool).await.unwrap()
}

async fn parked(world: &World) -> Vec<(String, i64, String)> {
    sqlx::query_as("select aggregate_id, position, reason from parked order by position")
        .fetch_all(&world.pool)
        .await
        .unwrap()
}

#[tokio::test]
async fn effects_of_a_custom_projection_happen_once_through_crashes_and_redelivery() {
    let mut world = World::alone().await;
    let mut config = world.config();
    config.apply.verify_interval = Period::from_millis(100);
    let projector = world.try_projector(config, domain()).await.unwrap();
    stored(&world, world.add("a", 1).await).await;
    // Sessions end again and again, in the middle of whatever they do.
    for _ in 0..25 {
        world.add("a", 1).await;
        sqlx::query(
            "select pg_terminate_backend(pid) from pg_stat_activity
             where datname = current_database() and application_name = 'region-projector'",
        )
        .execute(&world.pool)
        .await
        .unwrap();
    }
    world.postgres.kill().await.unwrap();
    world.add("b", 5).await;
    world.postgres.start_again().await.unwrap();
    stored(&world, world.add("a", 1).await).await;
    stop(projector).await;
    // All of it comes again, to whoever is next, from a stream that was made anew.
    world.jetstream.delete_stream(crate::world::STREAM).await.unwrap();
    crate::world::create_stream(&world.jetstream).await;
    for event in world.log.events() {
        world.publish(&event).await;
    }
    let projector = world.projector(domain()).await;
    stored(&world, world.add("b", 1).await).await;
    assert_eq!(journal(&world, "a").await, (27, Some(27)));
    assert_eq!(journal(&world, "b").await, (2, Some(6)));
    assert_eq!(parked(&world).await, []);
    stop(projector).await;
}

#[tokio::test]
async fn what_a_custom_projection_refuses_parks_its_aggregate_and_leaves_nothing_behind() {
    let world = World::start().await;
    world.add("a", 1).await;
    world.add("b", 2).await;
    let refused = world.add("a", 13).await;
    world.add("a", 4).await;
    let panicked = world.add("c", 666).await;
    let undecodable = world.happen("d", "Added", r#"{"m":1}"#).await;
    world.add("b", 2).await;
    let last = world.add("e", 1).await;
    let projector = world.projector(domain()).await;
    stored(&world, last).await;
    let expected = [
        ("a".to_owned(), refused.as_i64(), "refused".to_owned()),
        ("c".to_owned(), panicked.as_i64(), "refused".to_owned()),
        ("d".to_owned(), undecodable.as_i64(), "decode".to_owned()),
    ];
    assert_eq!(parked(&world).await, expected);
    assert_eq!(
        journal(&world, "a").await,
        (1, Some(1)),
        "the entry before the error is taken back"
    );
    assert_eq!(journal(&world, "b").await, (2, Some(4)));
    assert_eq!(journal(&world, "c").await, (0, None));
    assert_eq!(journal(&world, "e").await, (1, Some(1)));
    // Given up, and gone on from there.
    let (domain, config) = (domain(), world.config().apply);
    let definition = domain.projection("journal", 1).unwrap();
    let kind = consistency::Name::new("tally").unwrap();
    let a = consistency::AggregateId::new(kind, "a").unwrap();
    let pool = &world.pool;
    dead_letters::discard(pool, definition, &a, refused, &config, &Actor::new("ada"))
        .await
        .unwrap();
    let retried =
        dead_letters::retry(pool, definition, &a, &config, &Actor::new("ada")).await.unwrap();
    assert_eq!((retried.applied_count, retried.stopped), (1, None));
    stored(&world, world.add("a", 5).await).await;
    assert_eq!(journal(&world, "a").await, (3, Some(10)));
    stop(projector).await;
}

#[test]
fn a_custom_projection_names_its_tables_after_its_version() {
    let misnamed = Projection::custom("journal", 2, "tally", Journal).build().unwrap_err();
    assert!(misnamed.to_string().contains("journal_v2_"), "{misnamed}");
    let definition = Projection::custom("journal", 1, "tally", Journal).build().unwrap();
    let tables: Vec<&str> = definition.statements().tables().collect();
    assert_eq!(tables, ["journal_v1_state", "journal_v1_entry", "journal_v1_sum"]);
}
