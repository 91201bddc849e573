//! Versions that are missing, and messages that are not what the log says.

use consistency::Version;
use process::admin::Condition;
use process::config::Period;
use region_projector::Projector;

use crate::tally::domain;
use crate::world::{World, eventually, stop};

/// The state and the rows of `a` are lost, and its checkpoint is not.
async fn lose_a(world: &World) {
    for table in ["tallies_v1_state", "tallies_v1_tally", "tallies_v1_by_list"] {
        let delete = format!("delete from {table} where aggregate_id = 'a'");
        sqlx::query(sqlx::AssertSqlSafe(delete)).execute(&world.pool).await.unwrap();
    }
}

async fn parked(world: &World) -> Vec<(String, i64, String)> {
    sqlx::query_as("select aggregate_id, position, reason from parked order by position")
        .fetch_all(&world.pool)
        .await
        .unwrap()
}

fn fetched_for_gaps(projector: &Projector) -> bool {
    let metrics = projector.metrics().render();
    metrics.lines().any(|line| {
        line.starts_with("tidemark_log_fetched_events_total")
            && line.contains(r#"reason="gap""#)
            && !line.ends_with(" 0")
    })
}

#[tokio::test]
async fn versions_that_are_missing_are_fetched_from_the_log_and_nothing_is_parked() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    for n in 1..=5 {
        world.add("a", n).await;
        world.add("b", n).await;
    }
    world.stored(world.happen("a", "Moved", r#"{"to":"old"}"#).await).await;
    stop(projector).await;
    lose_a(&world).await;
    let projector = world.projector(domain()).await;
    world.add("b", 1).await;
    world.stored(world.add("a", 6).await).await;
    assert_eq!(world.tally("a").await, Some((21, 7)));
    assert_eq!(world.list("old").await, ["a"]);
    assert_eq!(world.tally("b").await, Some((16, 6)));
    assert_eq!(parked(&world).await, []);
    assert!(fetched_for_gaps(&projector));
    world.stored(world.add("a", 1).await).await;
    assert_eq!(world.tally("a").await, Some((22, 8)));
    stop(projector).await;
}

/// As whoever keeps to the fence never makes it.
#[tokio::test]
async fn a_state_that_is_not_as_it_is_remembered_is_looked_up() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    for n in 1..=3 {
        world.stored(world.add("a", n).await).await;
    }
    lose_a(&world).await;
    world.stored(world.add("a", 4).await).await;
    assert_eq!(world.tally("a").await, Some((10, 4)));
    sqlx::query(
        "update tallies_v1_state set version = 2, state = '{\"sum\":-1,\"list\":\"new\"}'
         where aggregate_id = 'a'",
    )
    .execute(&world.pool)
    .await
    .unwrap();
    // In batches that are folded while the one before is written, too.
    let mut last = world.lowest_checkpoint().await.unwrap();
    for _ in 5..=100 {
        last = world.add("a", 1).await;
    }
    world.stored(last).await;
    assert_eq!(world.tally("a").await, Some((-1 + 3 + 4 + 96, 100)));
    assert_eq!(parked(&world).await, []);
    stop(projector).await;
}

#[tokio::test]
async fn a_message_that_lies_about_its_version_is_applied_as_the_log_has_it() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.stored(world.add("a", 1).await).await;
    let mut forged = world.log.append("a", "Added", r#"{"n":2}"#);
    forged.version = Version::new(9).unwrap();
    forged.data = r#"{"n":1000}"#.to_owned();
    world.publish(&forged).await;
    world.stored(world.add("a", 4).await).await;
    assert_eq!(world.tally("a").await, Some((7, 3)));
    assert_eq!(parked(&world).await, []);
    stop(projector).await;
}

#[tokio::test]
async fn a_gap_waits_for_a_log_that_cannot_be_reached_and_says_so() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.stored(world.add("a", 1).await).await;
    stop(projector).await;
    lose_a(&world).await;
    let mut config = world.config();
    config.apply.gap_wait_max = Period::from_secs(3600);
    let projector = world.try_projector(config, domain()).await.unwrap();
    // Its epochs are read.
    eventually("the log is well", async || {
        projector.readiness().report(None).conditions.get("log") == Some(&Condition::Ready)
    })
    .await;
    world.log.set_cut(true);
    let last = world.add("a", 2).await;
    eventually("the missing log is reported", async || {
        let conditions = projector.readiness().report(None).conditions;
        matches!(conditions.get("log"), Some(Condition::Degraded(why)) if why.contains("partition"))
    })
    .await;
    assert_eq!(parked(&world).await, []);
    world.log.set_cut(false);
    world.stored(last).await;
    assert_eq!(world.tally("a").await, Some((3, 2)));
    eventually("the log is well again", async || {
        let conditions = projector.readiness().report(None).conditions;
        matches!(conditions.get("log"), None | Some(Condition::Ready))
    })
    .await;
    stop(projector).await;
}

#[tokio::test]
async fn a_gap_that_nobody_can_fill_in_time_parks_its_aggregate_only() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    let first = world.add("a", 1).await;
    world.stored(first).await;
    stop(projector).await;
    lose_a(&world).await;
    // The log answers, and has no such event either.
    world.log.withhold(Some(first));
    let projector = world.projector(domain()).await;
    world.add("b", 5).await;
    let second = world.add("a", 2).await;
    world.stored(second).await;
    assert_eq!(parked(&world).await, [("a".to_owned(), second.as_i64(), "gap".to_owned())]);
    assert_eq!(world.tally("b").await, Some((5, 1)));
    stop(projector).await;

    // The log does not answer for longer than it is waited for.
    world.log.withhold(None);
    sqlx::query("delete from parked").execute(&world.pool).await.unwrap();
    let mut config = world.config();
    config.apply.gap_wait_max = Period::from_millis(300);
    let projector = world.try_projector(config, domain()).await.unwrap();
    world.log.set_cut(true);
    let third = world.add("a", 3).await;
    world.stored(third).await;
    assert_eq!(parked(&world).await, [("a".to_owned(), third.as_i64(), "gap".to_owned())]);
    stop(projector).await;
}

#[tokio::test]
async fn a_gap_of_more_events_than_the_bound_is_not_filled() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    for n in 1..=5 {
        world.stored(world.add("a", n).await).await;
    }
    stop(projector).await;
    lose_a(&world).await;
    let mut config = world.config();
    config.apply.gap_events_max = 5;
    let projector = world.try_projector(config, domain()).await.unwrap();
    let last = world.add("a", 6).await;
    world.stored(last).await;
    assert_eq!(parked(&world).await, [("a".to_owned(), last.as_i64(), "gap".to_owned())]);
    stop(projector).await;
}
