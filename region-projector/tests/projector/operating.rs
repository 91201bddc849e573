//! The operator's command line, as the binary has it.

use consistency::{AggregateId, Name};
use serde_json::Value;

use crate::processes::PLACED;
use crate::world::{World, eventually, stop};

#[tokio::test]
async fn an_operator_lists_shows_retries_and_discards_from_the_command_line() {
    let world = World::start().await;
    let projector = world.projector(orders::domain().unwrap()).await;
    eventually("the tables are there", async || projector.readiness().is_ready()).await;
    let event = world.log.append_to("order", "o-1", "Unheard", r#"{"why":"newer"}"#);
    world.publish(&event).await;
    let parked = "select count(*) from parked where projection = 'orders'";
    eventually("it is parked", async || world.count(parked).await == 1).await;

    let table = world.told(&["dead-letters", "list", "orders"]).await;
    let rows: Vec<&str> = table.lines().collect();
    assert!(rows[0].starts_with("PROJECTION"), "{table}");
    assert!(rows[1].contains("o-1") && rows[1].contains("unknown-event-type"), "{table}");
    let listed = world.told_json(&["dead-letters", "list", "orders"]).await;
    assert_eq!(listed[0]["aggregate_id"], "o-1");
    let aggregate = ["orders", "order", "o-1"];
    let show = [&["dead-letters", "show"], &aggregate[..]].concat();
    let shown = world.told_json(&show).await;
    assert_eq!(shown[0]["data"], r#"{"why":"newer"}"#);
    assert!(world.told(&show).await.contains("Unheard"));

    let retry = [&["dead-letters", "retry"], &aggregate[..]].concat();
    let again = world.operate(&retry).await;
    assert!(!again.status.success(), "it failed again, and so did the command");
    let said = String::from_utf8(again.stdout).unwrap();
    assert!(said.contains("parked at position 1 (unknown-event-type)"), "{said}");

    let mut announcements = world.announcements().await;
    let discard = [&["dead-letters", "discard"], &aggregate[..], &["--position", "1"]].concat();
    let discarded = world.told_json(&discard).await;
    assert_eq!(discarded["discarded"]["data"], r#"{"why":"newer"}"#);
    assert_eq!(discarded["parked_at"], Value::Null);
    let key = AggregateId::new(Name::new("order").unwrap(), "o-1").unwrap().key().hint();
    announcements.find(|said| said.keys.as_ref().is_some_and(|keys| keys.contains(&key))).await;
    assert_eq!(world.count(parked).await, 0);
    let nothing = world.told(&["dead-letters", "list", "orders"]).await;
    assert_eq!(nothing, "nothing is parked\n");
    let gone = world.operate(&discard).await;
    let said = String::from_utf8_lossy(&gone.stderr).into_owned();
    assert!(!gone.status.success() && said.contains("is not parked"), "{said}");
    stop(projector).await;
}

#[tokio::test]
async fn an_operator_resumes_what_has_stopped() {
    let world = World::start().await;
    let mut config = world.config();
    config.apply.parked_aggregates_max = 0;
    let projector = world.try_projector(config, orders::domain().unwrap()).await.unwrap();
    eventually("the tables are there", async || projector.readiness().is_ready()).await;
    assert_eq!(world.told(&["resume"]).await, "nothing has stopped\n");
    let event = world.log.append_to("order", "o-1", "Unheard", "{}");
    world.publish(&event).await;
    let stopped = "select count(*) from parking_breaker where projection = 'orders'";
    eventually("it stops", async || world.count(stopped).await == 1).await;
    let resumed = world.told_json(&["resume", "orders"]).await;
    assert_eq!(resumed[0]["reason"], "unknown-event-type");
    let parked = "select count(*) from parked where projection = 'orders'";
    eventually("it goes on", async || world.count(parked).await == 1).await;
    stop(projector).await;
}

#[tokio::test]
async fn status_tells_an_operator_what_every_partition_has_reached_and_who_applies_it() {
    let world = World::start().await;
    let process = world.process("tide-1", 600, &[]);
    world.split_is(&[("tide-1", 8)]).await;
    let last = world.place(3).await;
    world.orders_stored(last).await;
    let unheard = world.log.append_to("order", "o-1", "Unheard", "{}");
    world.publish(&unheard).await;
    let last = unheard.at.position;
    world.orders_stored(last).await;

    let status = world.told_json(&["status", "orders", "--sample-ms", "10"]).await;
    let partitions = status["partitions"].as_array().unwrap();
    assert_eq!(partitions.len(), 8);
    for partition in partitions {
        assert_eq!(partition["owner"], "tide-1");
        assert_eq!(partition["position"], last.as_i64());
        assert_eq!(
            (&partition["lag_positions"], &partition["lag_seconds"]),
            (&0.into(), &0.0.into())
        );
        assert_eq!(partition["paused"], false);
    }
    let parked = partitions.iter().map(|partition| partition["parked_count"].as_i64().unwrap());
    assert_eq!(parked.sum::<i64>(), 1);
    assert_eq!(status["head"][1], last.as_i64());
    let table = world.told(&["status", "--sample-ms", "10"]).await;
    assert!(table.starts_with("PROJECTION"), "{table}");
    let rows = table.lines().filter(|line| line.starts_with("orders ")).count();
    assert_eq!(rows, 8, "{table}");
    assert!(table.lines().any(|line| line.starts_with("totals-by-day ")), "{table}");

    process.leave().await;
    let later = world.place(2).await;
    let idle = world.told_json(&["status", "orders", "--sample-ms", "10"]).await;
    assert_eq!(idle["partitions"][0]["owner"], Value::Null, "nobody is there");
    assert!(last < later);
}

#[tokio::test]
async fn status_shows_a_lag_while_a_projection_is_paused() {
    let world = World::start().await;
    let process = world.process("tide-1", 600, &[]);
    world.split_is(&[("tide-1", 8)]).await;
    let first = world.place(1).await;
    world.orders_stored(first).await;
    let unknown = world.operate(&["pause", "nothing"]).await;
    assert!(!unknown.status.success());
    assert!(world.told(&["pause", "orders"]).await.starts_with("orders is paused since 2"));
    // What arrives before it has heard of the pause is still applied.
    eventually("it has stopped", async || {
        process.readiness().await.contains("paused by an operator")
    })
    .await;
    let totals = "select min(position) from checkpoint where projection = 'totals-by-day'";
    let last = world.place(5).await;
    eventually("another projection goes on", async || world.count(totals).await == last.as_i64())
        .await;
    let partition = async || {
        let status = world.told_json(&["status", "orders", "--sample-ms", "10"]).await;
        status["partitions"][0].clone()
    };
    eventually("the head is known", async || partition().await["lag_positions"] == 5).await;
    let seen = partition().await;
    assert_eq!((&seen["paused"], &seen["position"]), (&true.into(), &first.as_i64().into()));
    assert!(world.told(&["status", "--sample-ms", "10"]).await.contains("  paused"));

    // It outlives the process.
    process.leave().await;
    let process = world.process("tide-1", 600, &[]);
    let last = world.place(5).await;
    eventually("another projection goes on", async || world.count(totals).await == last.as_i64())
        .await;
    assert_eq!(world.orders_checkpoints().await, [first.as_i64(); 8]);
    let resumed = world.told_json(&["resume", "orders"]).await;
    assert_eq!(resumed[0]["reason"], "paused");
    world.orders_stored(last).await;
    world.orders_are_exactly(11).await;
    process.leave().await;
}

#[tokio::test]
async fn a_partition_that_has_stored_nothing_does_not_know_how_late_it_is() {
    let world = World::start().await;
    let process = world.process("tide-1", 600, &[]);
    world.split_is(&[("tide-1", 8)]).await;
    world.told(&["pause", "products"]).await;
    eventually("it has stopped", async || {
        process.readiness().await.contains("paused by an operator")
    })
    .await;
    world.orders_stored(world.place(1).await).await;
    let status = world.told_json(&["status", "products", "--sample-ms", "10"]).await;
    let partition = &status["partitions"][0];
    assert_eq!((&partition["position"], &partition["lag_positions"]), (&0.into(), &1.into()));
    assert_eq!(partition["lag_seconds"], Value::Null);
    let table = world.told(&["status", "products", "--sample-ms", "10"]).await;
    let row: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row[4..7], ["0", "1", "-"], "{table}");
    process.leave().await;
}

/// What it held of the order is lost, and the log cannot be asked in time.
async fn park_for_a_gap(world: &World) {
    let mut config = world.config();
    config.apply.gap_wait_max = process::config::Period::from_millis(100);
    let projector = world.try_projector(config, orders::domain().unwrap()).await.unwrap();
    let placed = world.log.append_to("order", "o-1", "OrderPlaced", PLACED);
    world.publish(&placed).await;
    world.orders_stored(placed.at.position).await;
    for table in ["state", "order_detail", "orders_by_customer", "orders_by_status"] {
        let delete = format!("delete from orders_v1_{table}");
        sqlx::query(sqlx::AssertSqlSafe(delete)).execute(&world.pool).await.unwrap();
    }
    world.log.set_cut(true);
    let shipped = world.log.append_to("order", "o-1", "OrderShipped", "{}");
    world.publish(&shipped).await;
    world.orders_stored(shipped.at.position).await;
    assert_eq!(world.count("select count(*) from parked where reason = 'gap'").await, 1);
    stop(projector).await;
}

#[tokio::test]
async fn a_retry_asks_the_log_for_the_events_that_are_missing() {
    let world = World::start().await;
    park_for_a_gap(&world).await;
    let retry = ["dead-letters", "retry", "orders", "order", "o-1"];
    let in_vain = world.operate(&retry).await;
    let said = String::from_utf8_lossy(&in_vain.stderr).into_owned();
    assert!(
        !in_vain.status.success() && said.contains("cannot be asked for what is missing"),
        "{said}"
    );
    assert_eq!(world.count("select count(*) from dead_letter").await, 1, "all is as it was");

    // The log does not have it either.
    world.log.set_cut(false);
    world.log.withhold(consistency::Position::new(1));
    let in_vain = world.operate(&retry).await;
    let said = String::from_utf8_lossy(&in_vain.stdout).into_owned();
    assert!(!in_vain.status.success() && said.contains("parked at position 2 (gap)"), "{said}");

    world.log.withhold(None);
    let said = world.told(&retry).await;
    assert_eq!(said, "2 letters of order/o-1 applied, not parked any more\n");
    let row = "select version from orders_v1_order_detail
               where aggregate_id = 'o-1' and data->>'status' = 'shipped'";
    assert_eq!(world.count(row).await, 2);
    let left = "select (select count(*) from parked) + (select count(*) from dead_letter)";
    assert_eq!(world.count(left).await, 0);
    // The next start is not in its way.
    let projector = world.projector(orders::domain().unwrap()).await;
    let delivered = world.log.append_to("order", "o-1", "OrderDelivered", "{}");
    world.publish(&delivered).await;
    world.orders_stored(delivered.at.position).await;
    assert_eq!(world.count("select version from orders_v1_order_detail").await, 3);
    stop(projector).await;
}
