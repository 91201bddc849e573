//! Readers at the end of the stream, who read it together.

use std::collections::BTreeSet;

use async_nats::jetstream;
use compose::process::Signal;
use consistency::Position;
use futures::TryStreamExt;
use process::admin::Condition;
use region_projector::Projector;
use region_projector::reader::pull::{Bounds, Stream};
use region_projector::reader::tail::{self, Intake, Tail};
use sqlx::AssertSqlSafe;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::mirroring::measured;
use crate::tally::domain_with_totals_of;
use crate::world::{DEADLINE, STREAM, World, eventually, stop};

/// Five projections, each with a reader of its own.
const LETTERS: &str = "abcd";
/// Events that were read from the log since the stream could not tell.
const FETCHED: &str = "tidemark_log_fetched_events_total";

/// The stream's consumers, and how many requests wait at each.
async fn consumers(world: &World) -> Vec<(String, usize)> {
    let stream = world.jetstream.get_stream(STREAM).await.unwrap();
    let consumers = stream.consumers().map_ok(|info| (info.name, info.num_waiting));
    consumers.try_collect().await.unwrap()
}

/// The names of all consumers, also of those that the server has not forgotten yet.
async fn names(world: &World) -> BTreeSet<String> {
    consumers(world).await.into_iter().map(|(name, _)| name).collect()
}

/// The names of those that somebody asks for messages.
async fn asked(world: &World) -> BTreeSet<String> {
    let consumers = consumers(world).await.into_iter();
    consumers.filter(|(_, waiting)| 0 < *waiting).map(|(name, _)| name).collect()
}

async fn until_asked(world: &World, expected: usize) {
    eventually(&format!("{expected} consumers are asked"), async || {
        asked(world).await.len() == expected
    })
    .await;
}

/// What a rollup has added up.
async fn total(world: &World, letter: char) -> i64 {
    let sum = format!("select sum(total)::bigint from totals_{letter}_v1_total_{letter}");
    let sum: Result<Option<i64>, _> =
        sqlx::query_scalar(AssertSqlSafe(sum)).fetch_one(&world.pool).await;
    // The table is not there before the projector has made it.
    sum.ok().flatten().unwrap_or_default()
}

/// Waits until everybody has got this many events of one each, and each of them once.
async fn all_have(world: &World, count: i64) {
    for letter in LETTERS.chars() {
        let what = format!("{letter} has {count}");
        eventually(&what, async || total(world, letter).await == count).await;
    }
    tallies_have(world, count).await;
}

/// The same of the tallies alone, which count versions besides.
async fn tallies_have(world: &World, count: i64) {
    let row = "select version from tallies_v1_tally where aggregate_id = 'a'";
    eventually(&format!("the tally has {count}"), async || {
        let version: Result<i64, _> = sqlx::query_scalar(row).fetch_one(&world.pool).await;
        version.ok() == Some(count)
    })
    .await;
    assert_eq!(world.tally("a").await, Some((count, count)));
    assert_eq!(world.count("select count(*) from parked").await, 0);
}

/// Adds a number of events of one each.
async fn add(world: &World, count: usize) {
    for _ in 0..count {
        world.add("a", 1).await;
    }
}

fn stream_trouble(projector: &Projector) -> Option<String> {
    match projector.readiness().report(None).conditions.get("stream") {
        Some(Condition::Degraded(why)) => Some(why.clone()),
        _ => None,
    }
}

#[tokio::test]
async fn projections_at_the_end_of_the_stream_share_one_consumer_and_miss_nothing() {
    let world = World::start().await;
    let projector = world.projector(domain_with_totals_of(LETTERS)).await;
    for count in 1..=20 {
        add(&world, 1).await;
        all_have(&world, count).await;
    }
    until_asked(&world, 1).await;
    let before = asked(&world).await;
    add(&world, 50).await;
    all_have(&world, 70).await;
    assert!(names(&world).await.is_superset(&before), "the same one");
    stop(projector).await;
    until_asked(&world, 0).await;
}

#[tokio::test]
async fn projections_that_come_from_far_behind_share_one_consumer_in_the_end() {
    let world = World::start().await;
    let projector = world.projector(domain_with_totals_of("a")).await;
    add(&world, 20).await;
    tallies_have(&world, 20).await;
    stop(projector).await;
    let projector = world.projector(domain_with_totals_of(LETTERS)).await;
    all_have(&world, 20).await;
    add(&world, 1).await;
    all_have(&world, 21).await;
    until_asked(&world, 1).await;
    add(&world, 10).await;
    all_have(&world, 31).await;
    assert_eq!(measured(&projector, FETCHED), 0.0);
    stop(projector).await;
}

#[tokio::test]
async fn a_projection_that_falls_behind_holds_nobody_back_and_gets_everything() {
    let world = World::start().await;
    let mut config = world.config();
    // The last few events are kept, and next to none wait for a partition.
    config.nats.pull_bytes_max = 2_000;
    config.apply.queue_chunks_max = 1;
    config.apply.batch_events_max = 2;
    let domain = domain_with_totals_of(LETTERS);
    let projector = world.try_projector(config, domain).await.unwrap();
    add(&world, 1).await;
    all_have(&world, 1).await;
    until_asked(&world, 1).await;
    let held = world.hold("lock table totals_b_v1_total_b").await;
    for count in 2..=100 {
        add(&world, 1).await;
        tallies_have(&world, count).await;
    }
    eventually("the others have all", async || total(&world, 'd').await == 100).await;
    held.rollback().await.unwrap();
    all_have(&world, 100).await;
    until_asked(&world, 1).await;
    add(&world, 1).await;
    all_have(&world, 101).await;
    assert_eq!(measured(&projector, FETCHED), 0.0, "the stream has it all");
    stop(projector).await;
}

#[tokio::test]
async fn all_go_on_when_their_consumer_is_deleted() {
    let world = World::start().await;
    let projector = world.projector(domain_with_totals_of(LETTERS)).await;
    for count in [10, 20, 30] {
        add(&world, 5).await;
        let stream = world.jetstream.get_stream(STREAM).await.unwrap();
        for name in names(&world).await {
            stream.delete_consumer(&name).await.unwrap();
        }
        add(&world, 5).await;
        all_have(&world, count).await;
    }
    until_asked(&world, 1).await;
    eventually("all are well", async || stream_trouble(&projector).is_none()).await;
    stop(projector).await;
}

#[tokio::test]
async fn each_projection_reports_a_lost_server_and_goes_on_with_it() {
    let mut world = World::start().await;
    let projector = world.projector(domain_with_totals_of(LETTERS)).await;
    add(&world, 1).await;
    all_have(&world, 1).await;
    world.nats.kill().await.unwrap();
    let names = ["tallies", "totals-a", "totals-b", "totals-c", "totals-d"];
    eventually("the missing stream is reported by each", async || {
        let said = stream_trouble(&projector).unwrap_or_default();
        names.iter().all(|name| said.contains(name))
    })
    .await;
    world.nats.start_again().await.unwrap();
    eventually("all are well, without a new event", async || stream_trouble(&projector).is_none())
        .await;
    add(&world, 1).await;
    all_have(&world, 2).await;
    until_asked(&world, 1).await;
    stop(projector).await;
}

#[tokio::test]
async fn a_projection_that_begins_anew_gets_what_the_others_do_not_keep() {
    let world = World::start().await;
    let domain = || domain_with_totals_of(LETTERS);
    let projector = world.projector(domain()).await;
    add(&world, 10).await;
    all_have(&world, 10).await;
    let all_stored = "select min(position) from checkpoint";
    eventually("all stand at the end", async || world.count(all_stored).await == 10).await;
    stop(projector).await;
    // So none of them has what came before.
    let projector = world.projector(domain()).await;
    add(&world, 1).await;
    all_have(&world, 11).await;
    sqlx::raw_sql(
        "begin;
         update checkpoint set position = 0, event_id = '00000000-0000-0000-0000-000000000000'
         where projection = 'tallies';
         delete from tallies_v1_state;
         delete from tallies_v1_tally;
         delete from tallies_v1_by_list;
         commit;",
    )
    .execute(&world.pool)
    .await
    .unwrap();
    add(&world, 1).await;
    all_have(&world, 12).await;
    until_asked(&world, 1).await;
    add(&world, 1).await;
    all_have(&world, 13).await;
    assert_eq!(measured(&projector, FETCHED), 0.0, "the stream has it all");
    stop(projector).await;
}

/// A reader by itself, without a chain and partitions.
struct Reads {
    intake: Intake,
    end: Position,
}

impl Reads {
    fn new(tail: &Tail, end: u64) -> Self {
        Self { intake: tail.intake(), end: Position::new(end).unwrap() }
    }

    /// Reads up to a position, nothing twice and nothing left out.
    async fn up_to(&mut self, through: u64) {
        while self.end.get() < through {
            self.more().await.unwrap();
        }
    }

    /// What comes next, or why it does not.
    async fn more(&mut self) -> Result<(), String> {
        let next = timeout(DEADLINE, self.intake.next(self.end)).await.expect("in time");
        for read in next.map_err(|error| error.to_string())? {
            assert_eq!(read.position(), self.end.next());
            self.end = read.position();
        }
        Ok(())
    }
}

fn tail(world: &World, bytes_max: usize) -> (Tail, DropGuard) {
    let context = jetstream::new(world.client.clone());
    let bounds = Bounds { batch: 100, bytes_max };
    let (tail, reader) = tail::of(Stream { context, name: STREAM.into(), bounds });
    let over = CancellationToken::new();
    tokio::spawn(reader.run(over.clone()));
    (tail, over.drop_guard())
}

/// Adds events until all readers are told of them together.
async fn until_shared<const N: usize>(world: &World, mut readers: [&mut Reads; N]) -> u64 {
    // The first may still find the readers before the end.
    for _ in 0..3 {
        let through = world.add("a", 1).await.get();
        for reader in &mut readers {
            reader.up_to(through).await;
        }
    }
    until_asked(world, 1).await;
    readers[0].end.get()
}

#[tokio::test]
async fn who_reads_too_slowly_reads_by_itself_until_it_is_at_the_end_again() {
    let world = World::start().await;
    let (tail, _over) = tail(&world, 2_000);
    let (mut quick, mut slow) = (Reads::new(&tail, 0), Reads::new(&tail, 0));
    until_shared(&world, [&mut quick, &mut slow]).await;
    let before = names(&world).await;
    // More bytes than are kept, while nobody reads for the slow one.
    let mut through = 0;
    for _ in 0..100 {
        through = world.add("a", 1).await.get();
        quick.up_to(through).await;
    }
    assert!(names(&world).await.is_subset(&before));
    slow.up_to(through).await;
    assert!(!names(&world).await.is_subset(&before), "it has one of its own");
    until_shared(&world, [&mut quick, &mut slow]).await;
}

#[tokio::test]
async fn requests_that_were_met_end_nothing() {
    let world = World::start().await;
    add(&world, 350).await;
    let (tail, _over) = tail(&world, 1_000_000);
    let mut reader = Reads::new(&tail, 0);
    reader.up_to(350).await;
    let before = names(&world).await;
    assert_eq!(before.len(), 1, "three requests, of one consumer");
    until_shared(&world, [&mut reader]).await;
    for _ in 0..250 {
        let through = world.add("a", 1).await.get();
        reader.up_to(through).await;
    }
    assert_eq!(names(&world).await, before, "at the end of the stream as well");
}

#[tokio::test]
async fn who_followed_goes_on_from_its_own_place_when_the_consumer_is_lost() {
    let world = World::start().await;
    let (tail, _over) = tail(&world, 1_000_000);
    let (mut one, mut two) = (Reads::new(&tail, 0), Reads::new(&tail, 0));
    until_shared(&world, [&mut one, &mut two]).await;
    add(&world, 9).await;
    let through = world.add("a", 1).await.get();
    one.up_to(through).await;
    let stream = world.jetstream.get_stream(STREAM).await.unwrap();
    for name in names(&world).await {
        stream.delete_consumer(&name).await.unwrap();
    }
    while one.more().await.is_ok() {}
    // What one has read the other will, although their consumer is lost meanwhile.
    two.up_to(through).await;
    while two.more().await.is_ok() {}
    until_shared(&world, [&mut one, &mut two]).await;
    // Who comes later, and from further back, gets all of it as well.
    let mut late = Reads::new(&tail, 2);
    until_shared(&world, [&mut one, &mut late, &mut two]).await;
}

#[tokio::test]
async fn a_server_that_hangs_is_reported_to_all_who_wait_for_it_together() {
    let world = World::start().await;
    let (tail, _over) = tail(&world, 1_000_000);
    let mut readers: Vec<_> = (0..20).map(|_| Reads::new(&tail, 0)).collect();
    world.nats.signal(Signal::STOP);
    // One after the other they would wait far beyond the deadline.
    let told = futures::future::join_all(readers.iter_mut().map(Reads::more)).await;
    world.nats.signal(Signal::CONT);
    assert!(told.iter().all(Result::is_err), "{told:?}");
}

#[tokio::test]
async fn nothing_is_asked_for_when_nobody_follows_any_more() {
    let world = World::start().await;
    let (tail, _over) = tail(&world, 1_000_000);
    let mut readers: Vec<_> = (0..10).map(|_| Reads::new(&tail, 0)).collect();
    // All come at the same time.
    for through in 1..=3 {
        let reading = futures::future::join_all(readers.iter_mut().map(|it| it.up_to(through)));
        tokio::join!(reading, world.add("a", 1));
    }
    until_asked(&world, 1).await;
    readers.truncate(2);
    until_asked(&world, 1).await;
    readers[0].intake.leave();
    let through = world.add("a", 1).await.get();
    readers[1].up_to(through).await;
    until_asked(&world, 1).await;
    readers.remove(1);
    until_asked(&world, 0).await;
    // Whoever comes after that is not lost.
    readers[0].up_to(through).await;
    let through = world.add("a", 1).await.get();
    readers[0].up_to(through).await;
    until_asked(&world, 1).await;
}
