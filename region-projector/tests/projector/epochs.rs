//! A log that goes on in a new epoch while its regions run.

use std::time::Duration;

use async_nats::jetstream::stream;
use consistency::{Epoch, Position, stream_name};
use process::config::Period;
use region_projector::Projector;

use crate::deploy::one_of_each;
use crate::tally::domain;
use crate::world::{STREAM, World, eventually, stop};

fn second() -> Epoch {
    Epoch::new(2).unwrap()
}

impl World {
    /// The log loses what comes after a position and goes on in a new epoch, as its relay would do it.
    async fn open_epoch(&self, after: Position) -> Epoch {
        let epoch = self.log.open_epoch(after);
        self.retire_stream().await;
        self.create_stream(epoch, after).await;
        epoch
    }

    async fn retire_stream(&self) {
        let old = self.jetstream.get_stream(STREAM).await.unwrap();
        let subjects = vec![format!("retired.{STREAM}.>")];
        let retired = stream::Config { subjects, ..old.cached_info().config.clone() };
        self.jetstream.update_stream(retired).await.unwrap();
    }

    async fn create_stream(&self, epoch: Epoch, after: Position) {
        let config = stream::Config {
            name: stream_name(epoch),
            subjects: vec!["events.>".into()],
            first_sequence: Some(after.next().get()),
            ..stream::Config::default()
        };
        self.jetstream.create_stream(config).await.unwrap();
    }

    /// An event that the log has and the stream does not tell.
    fn add_untold(&self, id: &str) -> Position {
        self.log.append(id, "Added", "{\"n\":1}").at.position
    }

    /// The epochs that checkpoints count in.
    async fn epochs(&self) -> Vec<i32> {
        let epochs = "select distinct epoch from checkpoint order by epoch";
        sqlx::query_scalar(epochs).fetch_all(&self.pool).await.unwrap()
    }

    async fn adopted(&self, epoch: Epoch) {
        eventually("the epoch is adopted", async || self.epochs().await == [epoch.as_i32()]).await;
    }
}

fn fetched(projector: &Projector, reason: &str) -> f64 {
    let metrics = projector.metrics().render();
    let labelled = metrics.lines().filter(|line| {
        line.starts_with("tidemark_log_fetched_events_total") && line.contains(reason)
    });
    labelled.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

fn troubles(projector: &Projector) -> String {
    serde_json::to_string(&projector.readiness().report(None)).unwrap()
}

#[tokio::test]
async fn a_region_that_applied_nothing_lost_goes_on_in_the_new_epoch_where_it_stands() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.add("a", 1).await;
    let told = world.add("a", 1).await;
    world.stored(told).await;
    let mut announcements = world.announcements().await;
    // It is behind: the log kept two events more, and lost a third, that it was not told of.
    let kept = [world.add_untold("a"), world.add_untold("b")][1];
    world.add_untold("lost");
    let epoch = world.open_epoch(kept).await;
    world.adopted(epoch).await;
    world.stored(kept).await;
    assert_eq!((world.tally("a").await, world.tally("b").await), (Some((3, 3)), Some((1, 1))));
    assert_eq!(fetched(&projector, "past-epoch"), 2.0);

    let next = world.add("a", 1).await;
    world.stored(next).await;
    assert_eq!(world.tally("a").await, Some((4, 4)));
    assert_eq!(world.tally("lost").await, None);
    announcements.find(|said| said.epoch == epoch && said.to == next).await;
    assert!(projector.readiness().is_ready(), "{}", troubles(&projector));
    stop(projector).await;
}

#[tokio::test]
async fn a_region_that_was_down_when_the_epoch_was_opened_reads_nothing_lost() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    let kept = world.add("a", 1).await;
    world.stored(kept).await;
    stop(projector).await;
    world.add("a", 1).await;
    world.add("lost", 1).await;
    world.open_epoch(kept).await;
    let projector = world.projector(domain()).await;
    let next = world.add("a", 5).await;
    world.stored(next).await;
    assert_eq!((world.tally("a").await, world.tally("lost").await), (Some((6, 2)), None));

    // Its database is set back to before the epoch; what it was then is good in the new one.
    let back = "update checkpoint set epoch = 1, position = 0, fence = fence + 1";
    sqlx::query(back).execute(&world.pool).await.unwrap();
    world.adopted(second()).await;
    assert_eq!(world.tally("a").await, Some((6, 2)), "what is applied is not applied again");
    stop(projector).await;
}

#[tokio::test]
async fn a_region_that_applied_what_was_lost_stops_and_says_what_to_do() {
    let mut world = World::start().await;
    let projector = world.projector(domain()).await;
    let kept = world.add("a", 1).await;
    let lost = world.add("a", 10).await;
    world.stored(lost).await;
    world.open_epoch(kept).await;
    eventually("it says that it holds what was lost", async || {
        let told = troubles(&projector);
        !projector.readiness().is_ready()
            && told.contains("events up to 1.2 are applied, but epoch 2 kept nothing above 1")
            && told.contains("Rebuild the projection, and switch to what is built")
    })
    .await;
    world.add("a", 1).await;
    let next = world.add("b", 1).await;
    assert_eq!((world.tally("a").await, world.epochs().await), (Some((11, 2)), vec![1]));
    stop(projector).await;

    // As it was told: everything is folded again, across the epochs.
    world.database_url = world.postgres.create_database("tidemark_region_again").await.unwrap();
    let database = process::postgres::PostgresConfig::new(&world.database_url);
    world.pool = process::postgres::connect(&database, "test").unwrap();
    let projector = world.projector(domain()).await;
    world.stored(next).await;
    assert_eq!((world.tally("a").await, world.tally("b").await), (Some((2, 2)), Some((1, 1))));
    assert_eq!(world.epochs().await, [2]);
    assert!(projector.readiness().is_ready(), "{}", troubles(&projector));
    stop(projector).await;
}

#[tokio::test]
async fn a_region_waits_for_the_stream_of_the_new_epoch_and_misses_nothing() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    let kept = world.add("a", 1).await;
    world.stored(kept).await;
    let epoch = world.log.open_epoch(kept);
    world.retire_stream().await;
    world.adopted(epoch).await;
    eventually("it waits for the stream", async || troubles(&projector).contains("stream")).await;
    world.create_stream(epoch, kept).await;
    let next = world.add("a", 1).await;
    world.stored(next).await;
    let second = world.log.open_epoch(next);
    let old = world.jetstream.get_stream(stream_name(epoch)).await.unwrap();
    let subjects = vec!["retired.again.>".to_owned()];
    let retired = stream::Config { subjects, ..old.cached_info().config.clone() };
    world.jetstream.update_stream(retired).await.unwrap();
    world.create_stream(second, next).await;
    let last = world.add("a", 1).await;
    world.stored(last).await;
    assert_eq!((world.tally("a").await, world.epochs().await), (Some((3, 3)), vec![3]));
    stop(projector).await;
}

/// The primary cannot be asked, and another process of the region has learnt the epoch.
#[tokio::test]
async fn an_epoch_that_another_process_learnt_is_known_without_the_primary() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    let kept = world.add("a", 1).await;
    world.stored(kept).await;
    world.log.set_cut(true);
    world.open_epoch(kept).await;
    let learnt = "insert into adopted_epoch (epoch, starts_after) values (2, $1)";
    sqlx::query(learnt).bind(kept.as_i64()).execute(&world.pool).await.unwrap();
    world.adopted(second()).await;
    let next = world.add("a", 1).await;
    world.stored(next).await;
    assert_eq!(world.tally("a").await, Some((2, 2)));
    tokio::time::timeout(Duration::from_secs(60), stop(projector)).await.unwrap();
}

/// Whoever is first brings the checkpoints of all into the epoch, and displaces the others by that.
#[tokio::test]
async fn processes_that_share_partitions_go_on_together_in_a_new_epoch() {
    let world = World::start().await;
    let config = |name| world.looking(name, Period::from_secs(3600));
    let first = world.try_projector(config("first"), domain()).await.unwrap();
    world.shares_are("first", 4).await;
    let second_one = world.try_projector(config("second"), domain()).await.unwrap();
    world.shares_are("second", 2).await;
    let ids = one_of_each();
    for id in &ids {
        world.add(id, 1).await;
    }
    world.stored(world.add(&ids[0], 0).await).await;
    let mut kept = Position::ZERO;
    for id in &ids {
        kept = world.add_untold(id);
    }
    for id in &ids {
        world.add_untold(id);
    }
    let epoch = world.open_epoch(kept).await;
    world.adopted(epoch).await;
    world.stored(kept).await;
    for _ in 0..5 {
        for id in &ids {
            world.add(id, 1).await;
        }
    }
    world.stored(world.add(&ids[0], 0).await).await;
    world.shares_are("second", 2).await;
    world.shares_are("first", 2).await;
    for id in &ids {
        let versions = if *id == ids[0] { 9 } else { 7 };
        assert_eq!(world.tally(id).await, Some((7, versions)), "{id}");
    }
    assert_eq!(world.count("select count(*) from parked").await, 0);
    for projector in [&first, &second_one] {
        assert!(projector.readiness().is_ready(), "{}", troubles(projector));
    }
    stop(first).await;
    world.shares_are("second", 4).await;
    world.stored(world.add(&ids[1], 1).await).await;
    assert_eq!(world.tally(&ids[1]).await, Some((8, 8)));
    stop(second_one).await;
}
