//! One aggregate that takes half of all events.

use consistency::PartitionCount;
use serde_json::Value;

use crate::tally::domain;
use crate::world::{World, eventually, stop};

const EVENT_COUNT: usize = 2_000;
const BATCH_EVENTS: usize = 100;

#[tokio::test]
async fn a_projector_keeps_up_with_an_aggregate_that_takes_half_of_all_events() {
    let world = World::start().await;
    let mut config = world.config();
    config.apply.batch_events_max = BATCH_EVENTS;
    let projector = world.try_projector(config, domain()).await.unwrap();
    let mut last = consistency::Position::ZERO;
    for n in 0..EVENT_COUNT {
        let cold = format!("cold-{n}");
        last = world.add(if n % 2 == 0 { "hot" } else { &cold }, 1).await;
    }
    world.stored(last).await;
    assert_eq!(world.tally("hot").await, Some((1_000, 1_000)));
    assert_eq!(world.count("select count(*) from tallies_v1_tally").await, 1_001);
    let lags = projector.status().lags(region_projector::status::now());
    assert!(lags.iter().all(|lag| lag.positions == 0 && lag.seconds == 0.0), "{lags:?}");

    let url = format!("http://{}/status", projector.admin_address());
    let status: Value = reqwest::get(url).await.unwrap().json().await.unwrap();
    let hottest = &status["projections"][0]["hot_keys"][0];
    assert_eq!(hottest["aggregate_id"], "hot", "{status}");
    assert!(1_000 <= hottest["events_last_minute"].as_u64().unwrap(), "{status}");
    assert!(0.0 < status["projections"][0]["rate"].as_f64().unwrap(), "{status}");
    stop(projector).await;
}

#[tokio::test]
async fn a_backlog_of_one_aggregate_is_applied_in_bounded_batches() {
    let world = World::start().await;
    for _ in 0..EVENT_COUNT {
        world.log.append("hot", "Added", r#"{"n":1}"#);
    }
    for event in world.log.events() {
        world.publish(&event).await;
    }
    let mut config = world.config();
    config.apply.batch_events_max = BATCH_EVENTS;
    let projector = world.try_projector(config, domain()).await.unwrap();
    let hot = PartitionCount::new(4).unwrap().partition_of("hot");
    // The transaction that wrote a state is known by the version that it left.
    let mut seen = Vec::new();
    eventually("all is applied", async || {
        let version = "select coalesce(max(version), 0) from tallies_v1_state";
        let version: Result<i64, _> = sqlx::query_scalar(version).fetch_one(&world.pool).await;
        seen.push(version.unwrap_or(0));
        seen.last() == Some(&(EVENT_COUNT as i64))
    })
    .await;
    let batches = projector.metrics().render();
    let batches = batches.lines().find_map(|line| {
        line.strip_prefix("tidemark_projection_batch_duration_seconds_count")?.rsplit(' ').next()
    });
    let batches: usize = batches.unwrap().parse().unwrap();
    // A batch takes what fits and the chunk that it began with: one page of a hundred more at most.
    assert!(EVENT_COUNT / (2 * BATCH_EVENTS) <= batches, "{batches} batches in partition {hot}");
    stop(projector).await;
}
