//! The chain: holes, forgeries, other pasts.

use std::time::Duration;

use consistency::{EventId, Position};
use process::admin::Condition;
use region_projector::Projector;
use uuid::Uuid;

use crate::tally::domain;
use crate::world::{World, eventually, publish, stop};

fn condition(projector: &Projector, name: &str) -> Option<Condition> {
    projector.readiness().report(None).conditions.get(name).cloned()
}

async fn until_broken(projector: &Projector) {
    eventually("the broken chain is reported", async || {
        matches!(condition(projector, "chain"), Some(Condition::NotReady(_)))
    })
    .await;
}

#[tokio::test]
async fn a_hole_is_filled_from_the_log_and_nobody_passes_it_before() {
    let world = World::start().await;
    world.log.set_cut(true);
    let before = world.add("a", 1).await;
    let lost = world.add("b", 2).await;
    let last = world.add("c", 3).await;
    world.lose(lost).await;
    let mut announcements = world.announcements().await;
    let projector = world.projector(domain()).await;
    world.stored(before).await;
    eventually("the missing log is reported", async || {
        matches!(condition(&projector, "log"), Some(Condition::Degraded(_)))
    })
    .await;
    assert_eq!(world.tally("c").await, None);
    assert_eq!(world.lowest_checkpoint().await, Some(before));
    let highest = "select max(position) from checkpoint";
    assert_eq!(world.count(highest).await, before.as_i64(), "not even where nothing is missing");

    world.log.set_cut(false);
    let said = announcements.find(|said| before < said.to).await;
    assert!(said.from <= before, "{said:?}");
    world.stored(last).await;
    assert_eq!(world.tally("b").await, Some((2, 1)));
    assert_eq!(world.tally("c").await, Some((3, 1)));
    let counted = projector.metrics().render();
    let is_hole = |line: &&str| {
        line.starts_with("tidemark_log_fetched_events_total") && line.contains(r#"reason="hole""#)
    };
    let line = counted.lines().find(is_hole);
    assert!(line.is_some_and(|line| !line.ends_with(" 0")), "{line:?}");
    stop(projector).await;
}

#[tokio::test]
async fn a_stream_that_begins_after_the_checkpoint_is_completed_from_the_log() {
    let world = World::start().await;
    for n in 1..=250 {
        world.log.append("a", "Added", &format!("{{\"n\":{}}}", i64::from(n == 250)));
    }
    let events = world.log.events();
    world.jetstream.delete_stream(crate::world::STREAM).await.unwrap();
    let config = async_nats::jetstream::stream::Config {
        name: crate::world::STREAM.into(),
        subjects: vec!["events.>".into()],
        first_sequence: Some(250),
        ..Default::default()
    };
    world.jetstream.create_stream(config).await.unwrap();
    world.publish(&events[249]).await;
    let projector = world.projector(domain()).await;
    world.stored(Position::new(250).unwrap()).await;
    assert_eq!(world.tally("a").await, Some((1, 250)));
    stop(projector).await;
}

/// The stream has lost everything up to `begins` exclusively, and has nothing else.
async fn empty_from(world: &World, begins: u64) {
    world.jetstream.delete_stream(crate::world::STREAM).await.unwrap();
    let config = async_nats::jetstream::stream::Config {
        name: crate::world::STREAM.into(),
        subjects: vec!["events.>".into()],
        first_sequence: Some(begins),
        ..Default::default()
    };
    world.jetstream.create_stream(config).await.unwrap();
}

#[tokio::test]
async fn a_quiet_stream_that_has_lost_what_comes_next_is_completed_from_the_log() {
    let world = World::start().await;
    for n in 1..=250 {
        world.log.append("a", "Added", &format!("{{\"n\":{}}}", i64::from(n == 250)));
    }
    empty_from(&world, 251).await;
    let projector = world.projector(domain()).await;
    world.stored(Position::new(250).unwrap()).await;
    assert_eq!(world.tally("a").await, Some((1, 250)));
    // It also loses it while nobody expects that.
    world.log.append("a", "Added", r#"{"n":2}"#);
    empty_from(&world, 252).await;
    world.stored(Position::new(251).unwrap()).await;
    world.stored(world.add("a", 4).await).await;
    assert_eq!(world.tally("a").await, Some((7, 252)));
    stop(projector).await;
}

#[tokio::test]
async fn more_than_the_bound_is_not_read_from_the_log_and_said() {
    let world = World::start().await;
    for _ in 1..=20 {
        world.log.append("a", "Added", r#"{"n":1}"#);
    }
    empty_from(&world, 21).await;
    let mut config = world.config();
    config.primary_log.bridge_events_max = 19;
    let projector = world.try_projector(config.clone(), domain()).await.unwrap();
    eventually("what is missing is reported", async || {
        let said = condition(&projector, "log");
        matches!(said, Some(Condition::Degraded(why)) if why.contains("bridge_events_max"))
    })
    .await;
    assert_eq!(world.lowest_checkpoint().await, Some(Position::ZERO));
    stop(projector).await;
    config.primary_log.bridge_events_max = 20;
    let projector = world.try_projector(config, domain()).await.unwrap();
    world.stored(Position::new(20).unwrap()).await;
    stop(projector).await;
}

#[tokio::test]
async fn messages_larger_than_any_bound_in_bytes_are_applied_one_after_the_other() {
    let world = World::start().await;
    let add = |bytes: usize| format!(r#"{{"n":1,"padding":"{}"}}"#, "x".repeat(bytes));
    for n in 0..30 {
        let bytes = [200_000, 10, 600_000, 50_000, 400_000][n % 5];
        world.happen(["a", "b", "c"][n % 3], "Added", &add(bytes)).await;
    }
    let mut config = world.config();
    config.nats.pull_bytes_max = 300_000;
    config.apply.queue_bytes_max = 100_000;
    config.apply.batch_bytes_max = 1;
    let projector = world.try_projector(config, domain()).await.unwrap();
    world.stored(Position::new(30).unwrap()).await;
    for id in ["a", "b", "c"] {
        assert_eq!(world.tally(id).await, Some((10, 10)), "{id}");
    }
    let counted = projector.metrics().render();
    let batches = counted
        .lines()
        .find(|line| line.starts_with("tidemark_projection_batch_duration_seconds_count"));
    let batches: f64 = batches.unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    assert!(10.0 <= batches, "{batches} batches");
    assert_eq!(world.count("select count(*) from parked").await, 0);
    stop(projector).await;
}

#[tokio::test]
async fn a_page_of_the_log_with_a_hole_loses_nothing_that_came_before_it() {
    let world = World::start().await;
    world.add("a", 1).await;
    for n in 2..=4 {
        let position = world.add("a", n).await;
        world.lose(position).await;
    }
    let last = world.add("a", 5).await;
    world.log.withhold(Position::new(3));
    let projector = world.projector(domain()).await;
    world.stored(Position::new(2).unwrap()).await;
    eventually("the hole is reported", async || {
        matches!(condition(&projector, "log"), Some(Condition::Degraded(_)))
    })
    .await;
    assert_eq!(world.tally("a").await, Some((3, 2)));
    world.log.withhold(None);
    world.stored(last).await;
    assert_eq!(world.tally("a").await, Some((15, 5)));
    assert_eq!(world.count("select count(*) from parked").await, 0);
    stop(projector).await;
}

#[tokio::test]
async fn a_forged_predecessor_stops_the_projector_for_an_operator() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    let before = world.add("a", 1).await;
    world.stored(before).await;
    let sound = world.log.append("b", "Added", r#"{"n":1}"#);
    let mut forged = world.log.append("a", "Added", r#"{"n":1}"#);
    forged.previous_id = EventId::new(Uuid::new_v4());
    let both = [&sound, &forged].map(|event| world.publish(event));
    futures::future::join_all(both).await;
    until_broken(&projector).await;
    assert_eq!(world.tally("a").await, Some((1, 1)));
    assert_eq!(world.tally("b").await, Some((1, 1)), "what came before is sound");
    assert!(world.lowest_checkpoint().await <= Some(sound.at.position));
    assert!(!projector.readiness().is_ready());
    stop(projector).await;
}

#[tokio::test]
async fn a_forged_event_that_comes_alone_is_told_from_a_database_that_went_back() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    let before = world.add("a", 1).await;
    world.stored(before).await;
    let mut forged = world.log.append("a", "Added", r#"{"n":1}"#);
    forged.previous_id = EventId::new(Uuid::new_v4());
    world.publish(&forged).await;
    until_broken(&projector).await;
    assert_eq!(world.tally("a").await, Some((1, 1)));
    stop(projector).await;
}

#[tokio::test]
async fn a_past_that_was_rewritten_while_the_projector_was_away_stops_it() {
    let mut world = World::start().await;
    let projector = world.projector(domain()).await;
    world.add("a", 1).await;
    world.stored(world.add("a", 1).await).await;
    stop(projector).await;
    // The log lost its last event, and the stream was made again from what the log says now.
    world.jetstream.delete_stream(crate::world::STREAM).await.unwrap();
    crate::world::create_stream(&world.jetstream).await;
    let kept = world.log.events()[0].clone();
    world.log = crate::log::TestLog::start().await;
    world.log.restore(kept.clone());
    world.publish(&kept).await;
    for _ in 0..2 {
        let event = world.log.append("a", "Added", r#"{"n":100}"#);
        publish(&world.jetstream, &event).await;
    }
    let projector = world.projector(domain()).await;
    until_broken(&projector).await;
    assert_eq!(world.tally("a").await, Some((2, 2)));
    stop(projector).await;
}

#[tokio::test]
async fn a_message_that_is_no_event_is_read_from_the_log_instead() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.add("a", 1).await;
    world.log.append("a", "Added", r#"{"n":2}"#);
    let published = world.jetstream.publish("events.tally.1", "stray".into()).await.unwrap();
    published.await.unwrap();
    // Nothing has to come after it.
    world.stored(Position::new(2).unwrap()).await;
    let last = world.add("a", 4).await;
    world.stored(last).await;
    assert_eq!(world.tally("a").await, Some((7, 3)));
    stop(projector).await;
}

#[tokio::test]
async fn a_stream_that_is_wiped_and_rebuilt_number_for_number_is_read_on() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.add("a", 1).await;
    world.stored(world.add("b", 1).await).await;
    world.jetstream.delete_stream(crate::world::STREAM).await.unwrap();
    tokio::time::timeout(Duration::from_secs(30), async {
        crate::world::create_stream(&world.jetstream).await;
        for event in world.log.events() {
            world.publish(&event).await;
        }
    })
    .await
    .unwrap();
    world.stored(world.add("a", 1).await).await;
    assert_eq!(world.tally("a").await, Some((2, 2)));
    assert_eq!(world.tally("b").await, Some((1, 1)));
    stop(projector).await;
}
