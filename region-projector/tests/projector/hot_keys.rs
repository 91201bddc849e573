//! One aggregate that takes half of all events.

use process::config::Period;
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
    let hot_keys = &status["projections"][0]["hot_keys"];
    assert_eq!(hot_keys[0]["aggregate_id"], "hot", "{status}");
    let count = |at: usize| hot_keys[at]["events_last_minute"].as_u64().unwrap();
    assert!(10 * count(1) < count(0), "{status}");
    assert!(0.0 < status["projections"][0]["rate"].as_f64().unwrap(), "{status}");
    stop(projector).await;
}

/// Fails a statement that moves a state by more than a hundred versions.
const A_HUNDRED_AT_ONCE: &str = "
    create function a_hundred_at_once() returns trigger language plpgsql as $$
    begin
        if new.version - (case tg_op when 'UPDATE' then old.version else 0 end) > 100 then
            raise exception 'canceling statement' using errcode = '57014';
        end if;
        return null;
    end $$;
    create trigger a_hundred_at_once after insert or update on tallies_v1_state
    for each row execute function a_hundred_at_once();";

#[tokio::test]
async fn a_backlog_of_one_aggregate_is_applied_in_bounded_batches() {
    let world = World::start().await;
    let mut config = world.config();
    config.apply.batch_events_max = BATCH_EVENTS;
    config.apply.queue_chunks_max = EVENT_COUNT;
    // However long the backlog takes to come about, nothing but a batch that is too large is cancelled.
    config.database.statement_timeout = Period::from_secs(600);
    config.apply.attempt_timeout = Period::from_secs(600);
    let projector = world.try_projector(config, domain()).await.unwrap();
    world.stored(world.add("hot", 1).await).await;
    sqlx::raw_sql(A_HUNDRED_AT_ONCE).execute(&world.pool).await.unwrap();
    // All of it waits for one partition.
    let lock = world.hold("lock table tallies_v1_state").await;
    let mut last = consistency::Position::ZERO;
    for _ in 0..EVENT_COUNT {
        last = world.add("hot", 1).await;
    }
    eventually("the other partitions have read it all", async || {
        let lags = projector.status().lags(region_projector::status::now());
        lags.iter().filter(|lag| lag.reached.watermark == last).count() == 3
    })
    .await;
    lock.rollback().await.unwrap();
    world.stored(last).await;
    let all = EVENT_COUNT as i64 + 1;
    assert_eq!(world.tally("hot").await, Some((all, all)));
    let retries = projector.metrics().render();
    let retries = retries.lines().find(|line| line.starts_with("tidemark_projection_retries"));
    assert!(retries.is_none_or(|line| line.ends_with(" 0")), "{retries:?}: one was too large");
    stop(projector).await;
}
