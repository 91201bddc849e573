//! What each chain makes of each state of the region.

use std::time::Duration;

use compose::proxy::{Proxies, Stream, Toxic};

use crate::world::{Gateway, World, eventually, position, region_config};

const ROW: &str = "/v1/views/order-detail/o-1";
const LIST: &str = "/v1/views/orders-by-customer/c-1";

#[tokio::test]
async fn every_chain_answers_or_says_why_not() {
    let mut world = World::start().await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    let behind = [
        ("forward", (200, "forwarded"), (503, "replication-pending")),
        ("wait;ms=1, forward", (200, "forwarded"), (503, "replication-pending")),
        ("wait;ms=1, pending", (202, "pending"), (202, "pending")),
        ("wait;ms=1", (503, "replication-pending"), (503, "replication-pending")),
        ("pending", (202, "pending"), (202, "pending")),
        ("eventual", (404, "stale"), (200, "stale")),
        ("primary", (200, "primary"), (503, "primary-unreachable")),
    ];
    // The primary's own projector has not applied anything either: rows are folded there, lists are
    // not to be had.
    for (policy, row, list) in behind {
        let deadline = "tidemark-deadline-ms";
        let read = world.region.read(ROW, &token, policy).await;
        assert_eq!(read.came_to(), row, "row behind, {policy}: {read:?}");
        let request = world.region.request(reqwest::Method::GET, LIST);
        let request = request
            .header("consistency-token", &token)
            .header("consistency-policy", policy)
            .header("tidemark-credential", crate::world::CREDENTIAL)
            .header(deadline, "400");
        let read = crate::world::Reply::of(request).await;
        assert_eq!(read.came_to(), list, "list behind, {policy}: {read:?}");
    }
    world.catch_up().await;
    world.catch_up_primary().await;
    for policy in ["", "forward", "wait;ms=1", "pending", "eventual", "wait, forward"] {
        for path in [ROW, LIST] {
            // The hint may be on its way still; what was read once stays read.
            let read = world.region.read(path, &token, "wait;ms=5000").await;
            assert_eq!(read.status, 200, "{read:?}");
            let read = world.region.read(path, &token, policy).await;
            assert_eq!(read.came_to(), (200, "local"), "current, {policy}: {read:?}");
        }
    }
    for path in [ROW, LIST] {
        let read = world.region.read(path, &token, "primary").await;
        assert_eq!(read.came_to(), (200, "primary"), "{read:?}");
    }
}

#[tokio::test]
async fn a_parked_aggregate_is_never_passed_over_for_its_writer() {
    let mut world = World::start().await;
    world.stock().await;
    let placed = world.place("o-1").await;
    let head = world.catch_up().await;
    world.projector.park("o-1", head).await;
    let writer = placed.token();
    // The primary folds it from the log.
    let read = world.region.read(ROW, &writer, "wait;ms=5000, forward").await;
    assert_eq!(read.came_to(), (200, "forwarded"));
    let read = world.region.read(ROW, &writer, "wait;ms=5000").await;
    assert_eq!(read.came_to(), (503, "parked"));
    let read = world.region.read(LIST, &writer, "wait;ms=5000").await;
    assert_eq!(read.came_to(), (503, "parked"));
    // Who did not write it is served, and told.
    let reader = world.region.token_at(head.get());
    let read = world.region.read(LIST, &reader, "wait;ms=5000").await;
    assert_eq!(read.came_to(), (200, "stale"));
    assert!(read.header("consistency-status").contains("reason=parked"));
    // Who has seen nothing is served the row as it is, and its own position, and told as well.
    let read = world.region.read(ROW, "", "").await;
    assert_eq!(read.came_to(), (200, "stale"));
    assert_eq!(world.region.open(&read.token()).read_position(), head);
}

#[tokio::test]
async fn a_parked_aggregate_without_a_row_is_not_a_404_to_its_writer() {
    let mut world = World::start().await;
    world.stock().await;
    let placed = world.place("o-1").await;
    let at = position(placed.body["position"].as_u64().unwrap());
    // Everything before it is applied, and its first event is poison here.
    let log = world.log().await;
    world.projector.apply(&log[..log.len() - 1], at).await;
    world.projector.park("o-1", at).await;
    world.projector.announce(at).await;
    let read = world.region.read(ROW, &placed.token(), "wait;ms=5000").await;
    assert_eq!(read.came_to(), (503, "parked"));
    let read = world.region.read(ROW, "", "").await;
    assert_eq!(read.came_to(), (404, "stale"), "nobody else was promised anything");
}

#[tokio::test]
async fn a_poison_event_that_the_primary_cannot_fold_either_is_parked() {
    let world = World::start().await;
    let events = serde_json::json!({"events": [{"type": "Nonsense", "data": {}}]});
    let written = world.primary.post("/v1/aggregates/order/o-1/events", events).await;
    assert_eq!(written.status, 201);
    // No projector has come to it yet: the fold at the primary is the first to find out.
    for gateway in [&world.primary, &world.region] {
        let read = gateway.read(ROW, &written.token(), "forward").await;
        assert_eq!(read.came_to(), (503, "parked"), "{read:?}");
    }
    let at = position(1);
    world.projector.park("o-1", at).await;
    sqlx::query("update checkpoint set position = 1").execute(&world.projector.pool).await.unwrap();
    world.projector.announce(at).await;
    let read = world.region.read(ROW, &written.token(), "wait;ms=5000, forward").await;
    assert_eq!(read.came_to(), (503, "parked"));
}

#[tokio::test]
async fn prefer_bends_the_chain_of_the_view() {
    let world = World::start().await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    let request = world.region.request(reqwest::Method::GET, ROW);
    let request = request.header("consistency-token", &token).header("prefer", "respond-async");
    let read = crate::world::Reply::of(request).await;
    assert_eq!(read.came_to(), (202, "pending"));
    assert_eq!(read.header("preference-applied"), "respond-async");
    assert_eq!(read.header("cache-control"), "no-store");
    assert_eq!(read.header("retry-after"), "1");
    assert_eq!(read.token(), token, "a 202 shows nothing");
    assert_eq!(read.body["demand"], 3);
    assert_eq!(read.body["applied"], 0);
    assert_eq!(read.body["lag_events"], 3);
    assert_eq!(read.body["region"], "eu-west");
}

#[tokio::test]
async fn the_chain_of_a_view_is_configured() {
    let world = World::with("views.order-detail.policy = \"pending\"").await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    assert_eq!(world.region.read(ROW, &token, "").await.came_to(), (202, "pending"));
}

/// A gateway whose trips to the primary take as long as the toxic says.
async fn behind_a_link(world: &World, proxies: &Proxies, name: &str, latency_ms: u64) -> Gateway {
    let primary = world.primary.base.trim_start_matches("http://");
    let listen = format!("127.0.0.1:{}", compose::ports::free().unwrap());
    proxies.create(name, &listen, primary).await.unwrap();
    for stream in [Stream::Upstream, Stream::Downstream] {
        let toxic = Toxic::latency(&format!("{stream:?}"), stream, latency_ms / 2);
        proxies.add_toxic(name, toxic).unwrap();
    }
    let url = format!("http://{listen}");
    // A heartbeat may take as long as its interval, and the first takes two trips.
    let config = region_config(&world.postgres, &world.nats, &url);
    let config = format!("primary_region.heartbeat_interval = \"15s\"\n{config}");
    let gateway = Gateway::start(&config).await;
    gateway.ready().await;
    eventually("a trip was measured", async || {
        gateway.readiness().await.body["conditions"]["primary"]["state"] == "ready"
    })
    .await;
    gateway
}

#[tokio::test]
async fn a_wait_of_our_own_choice_is_taken_where_the_primary_is_far_and_not_where_it_is_near() {
    const LAG: Duration = Duration::from_millis(250);
    let mut world = World::start().await;
    world.stock().await;
    let proxies = Proxies::start(0).await.unwrap();
    let far = behind_a_link(&world, &proxies, "far", 2400).await;
    let near = behind_a_link(&world, &proxies, "near", 0).await;
    world.catch_up().await;
    let mut waited = 0;
    for round in 0..6 {
        let token = world.place(&format!("o-{round}")).await.token();
        let path = format!("/v1/views/order-detail/o-{round}");
        let late = async {
            // What is emulated is that the event is on its way for so long.
            tokio::time::sleep(LAG).await;
            world.catch_up().await;
        };
        let (from_far, from_near, ()) = tokio::join!(
            far.read(&path, &token, "wait, forward"),
            near.read(&path, &token, "wait, forward"),
            late
        );
        assert_eq!(from_far.status, 200, "{from_far:?}");
        waited += u32::from(from_far.came_to() == (200, "waited"));
        assert_eq!(from_near.came_to(), (200, "forwarded"), "{from_near:?}");
        // Nobody waits twice for what has never come in time.
        let timing = from_near.header("server-timing");
        assert_eq!(round == 0, timing.contains("wait;"), "{round}: {timing}");
    }
    // Where the machine is busy an event may come later than any before, and is not waited for then.
    assert!(4 <= waited, "{waited} of 6");
}
