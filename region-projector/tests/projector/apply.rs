//! Rows, checkpoints and announcements of what is read.

use std::collections::BTreeSet;

use compose::nats::Server;
use compose::postgres::{Cluster, Options};
use consistency::{AggregateId, Name, PartitionCount};
use process::config::Period;
use region_projector::{Projector, StartError};
use tokio::time::timeout;

use crate::log::TestLog;
use crate::tally::{domain, domain_of, domain_with_totals};
use crate::world::{DEADLINE, World, eventually, stop, tallies};

fn hint(id: &str) -> u64 {
    AggregateId::new(Name::new("tally").unwrap(), id).unwrap().key().hint()
}

fn partition(id: &str) -> u16 {
    PartitionCount::new(4).unwrap().partition_of(id)
}

#[tokio::test]
async fn an_event_is_in_rows_and_checkpoint_and_is_announced_with_its_keys() {
    let world = World::start().await;
    let mut announcements = world.announcements().await;
    let projector = world.projector(domain()).await;
    let at = world.add("a", 5).await;
    let announced =
        announcements.find(|said| said.partition == partition("a") && said.to == at).await;
    assert_eq!(announced.keys, Some(vec![hint("a")]));
    assert_eq!((announced.stored, announced.head), (at, at));
    assert_eq!(world.tally("a").await, Some((5, 1)), "announced after the commit");
    assert_eq!(world.list("new").await, ["a"]);

    let moved = world.happen("a", "Moved", r#"{"to":"done"}"#).await;
    world.stored(moved).await;
    assert_eq!(world.tally("a").await, Some((5, 2)));
    assert!(world.list("new").await.is_empty());
    assert_eq!(world.list("done").await, ["a"]);

    let gone = world.happen("a", "Removed", "{}").await;
    world.stored(gone).await;
    assert_eq!(world.tally("a").await, None);
    assert!(world.list("done").await.is_empty());
    stop(projector).await;
}

/// One for all that is written, and before it one for what is read of aggregates that are neither new nor
/// remembered.
#[tokio::test]
async fn a_batch_takes_one_statement_or_two() {
    let settings = [("shared_preload_libraries", "pg_stat_statements")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let postgres = Cluster::start(Options { settings, ..Options::default() }).await.unwrap();
    let nats = Server::start_single().await.unwrap();
    let world = World::around(nats, postgres, TestLog::start().await).await;
    sqlx::query("create extension pg_stat_statements").execute(&world.pool).await.unwrap();
    let counts = async || -> (i64, i64, i64) {
        let calls = "select
                         coalesce(sum(calls) filter (where query like '%as moved, asked.id%'), 0)::bigint,
                         coalesce(sum(calls) filter (where query like '%when not exists (select from moved)%'), 0)::bigint,
                         coalesce(sum(calls) filter (where query like '%(aggregate_id, partition%'), 0)::bigint
                     from pg_stat_statements where query not like '%pg_stat_%'";
        sqlx::query_as(calls).fetch_one(&world.pool).await.unwrap()
    };
    let projector = world.projector(domain()).await;
    for nth in 1..=10 {
        world.stored(world.add(&format!("a-{nth}"), 1).await).await;
        assert_eq!(counts().await, (0, nth, nth), "nothing is read of what is new");
    }
    for nth in 1..=10 {
        world.stored(world.add(&format!("a-{nth}"), 1).await).await;
        assert_eq!(counts().await, (0, 10 + nth, 10 + nth), "nor of what was written lately");
    }
    stop(projector).await;
    let mut config = world.config();
    config.apply.remembered_bytes_max = 0;
    let projector = world.try_projector(config, domain()).await.unwrap();
    for nth in 1..=10 {
        world.stored(world.add("a-1", 1).await).await;
        assert_eq!(counts().await, (nth, 20 + nth, 20 + nth), "nothing is remembered");
    }
    stop(projector).await;
    let projector = world.projector(domain()).await;
    for nth in 1..=10 {
        world.stored(world.add("a-1", 1).await).await;
        assert_eq!(counts().await, (11, 30 + nth, 30 + nth), "read once, and remembered");
    }
    assert_eq!(world.tally("a-1").await, Some((22, 22)));
    stop(projector).await;
}

#[tokio::test]
async fn announcements_of_a_partition_join_and_name_everything_a_batch_touched() {
    let world = World::start().await;
    let mut last = world.log.append("a", "Added", r#"{"n":0}"#).at.position;
    for n in 1..200 {
        last =
            world.log.append(["a", "b", "c", "d", "e"][n % 5], "Added", r#"{"n":1}"#).at.position;
    }
    let mut announcements = world.announcements().await;
    let projector = world.projector(domain()).await;
    for event in world.log.events() {
        world.publish(&event).await;
    }
    let mut ends = [None; 4];
    let mut keys = BTreeSet::new();
    while ends.iter().any(|end| *end != Some(last)) {
        let said = announcements.find(|_| true).await;
        let end = &mut ends[usize::from(said.partition)];
        assert!(end.is_none_or(|end| end == said.from), "{said:?} does not follow {end:?}");
        *end = Some(said.to);
        keys.extend(said.keys.unwrap());
    }
    assert_eq!(keys, ["a", "b", "c", "d", "e"].map(hint).into());
    assert_eq!(world.tally("b").await, Some((40, 40)));
    stop(projector).await;
}

#[tokio::test]
async fn an_idle_partition_advances_by_reading_and_stores_it_once_an_interval_only() {
    let world = World::start().await;
    let mut announcements = world.announcements().await;
    let mut config = world.config();
    config.apply.idle_store_interval = Period::from_secs(3600);
    let projector = world.try_projector(config, domain()).await.unwrap();
    let idle = (0..4).find(|of| *of != partition("a")).unwrap();
    let first = world.add("a", 1).await;
    // The first store is due at once, the next in an hour.
    world.stored(first).await;
    let mut last = first;
    for _ in 0..50 {
        last = world.add("a", 1).await;
        let said = announcements.find(|said| said.partition == idle && said.to == last).await;
        assert_eq!((said.keys, said.stored), (Some(vec![]), first), "said, and not stored");
    }
    let (messages, steps) = (announcements.message_count, announcements.step_count);
    assert!(messages < steps, "{messages} messages for {steps} steps");
    assert_eq!(world.lowest_checkpoint().await, Some(first));
    eventually("every partition has read everything", async || {
        let lags = projector.status().lags(region_projector::status::now());
        lags.iter().all(|lag| lag.reached.watermark == last)
    })
    .await;
    stop(projector).await;
    assert_eq!(world.lowest_checkpoint().await, Some(last), "stored on the way out");
}

#[tokio::test]
async fn events_of_other_aggregate_types_only_move_the_partitions_on() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    let other = world.log.append_to("other", "a", "Whatever", "{}");
    world.publish(&other).await;
    world.stored(other.at.position).await;
    assert_eq!(world.tally("a").await, None);
    assert_eq!(world.count("select count(*) from parked").await, 0);
    stop(projector).await;
}

#[tokio::test]
async fn a_rollup_adds_every_event_once_also_after_a_restart() {
    let world = World::start().await;
    let projector = world.projector(domain_with_totals()).await;
    world.add("a", 5).await;
    world.add("b", 7).await;
    world.stored(world.add("c", 1).await).await;
    stop(projector).await;
    let projector = world.projector(domain_with_totals()).await;
    world.add("a", 2).await;
    world.stored(world.add("d", 13).await).await;
    let totals = async || {
        let totals = "select sum(total)::bigint, max(largest) from totals_v1_total";
        let totals: (Option<i64>, Option<i64>) =
            sqlx::query_as(totals).fetch_one(&world.pool).await.unwrap();
        totals
    };
    eventually("everything is added", async || totals().await == (Some(15), Some(7))).await;
    let parked = "select count(*) from parked where projection = 'totals' and aggregate_id = 'd'";
    eventually("thirteen is parked", async || world.count(parked).await == 1).await;
    stop(projector).await;
}

/// Why a projector ends by itself.
async fn refusal(projector: Projector) -> StartError {
    timeout(DEADLINE, projector.join()).await.expect("it ends in time").unwrap_err()
}

#[tokio::test]
async fn a_binary_without_an_active_version_does_not_start() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.stored(world.add("a", 1).await).await;
    stop(projector).await;
    let newer = world.projector(domain_of(2)).await;
    let error = refusal(newer).await;
    assert!(error.to_string().contains("tallies v1 is active"), "{error}");
}

#[tokio::test]
async fn read_models_are_never_continued_from_another_log() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.stored(world.add("a", 1).await).await;
    stop(projector).await;
    let mut config = world.config();
    config.log.id = uuid::Uuid::from_u128(8);
    let other = world.try_projector(config, domain()).await.unwrap();
    let error = refusal(other).await;
    assert!(error.to_string().contains("belongs to log"), "{error}");
}

#[tokio::test]
async fn status_tells_what_every_partition_has_reached() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    let last = world.add("a", 1).await;
    world.stored(last).await;
    let base = format!("http://{}", projector.admin_address());
    let status: serde_json::Value =
        reqwest::get(format!("{base}/status")).await.unwrap().json().await.unwrap();
    let partitions = status["projections"][0]["partitions"].as_array().unwrap();
    assert_eq!(partitions.len(), 4);
    for partition in partitions {
        assert_eq!(partition["watermark"], last.get(), "{partition}");
        assert_eq!(partition["lag_positions"], 0, "{partition}");
    }
    assert_eq!(projector.status().held(&tallies()).len(), 4);
    let metrics = reqwest::get(format!("{base}/metrics")).await.unwrap().text().await.unwrap();
    assert!(metrics.contains("tidemark_projection_watermark"), "{metrics}");
    let ready = reqwest::get(format!("{base}/readyz")).await.unwrap();
    assert!(ready.status().is_success());
    stop(projector).await;
}
