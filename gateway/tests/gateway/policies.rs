//! What each chain makes of each state of the region.

use std::time::Duration;

use compose::proxy::{Proxies, Stream, Toxic};
use tokio::task::JoinHandle;

use crate::world::{Gateway, Reply, World, eventually, position, region_config};

const ROW: &str = "/v1/views/order-detail/o-1";
const LIST: &str = "/v1/views/orders-by-customer/c-1";
/// A wait may be longer than a test.
const PATIENT: &str = "read.wait_max = \"5m\"\nlisten.request_timeout = \"5m\"";

/// Its chain begins with a wait of a millisecond or has none, and nobody moves.
fn assert_waited_if_asked(read: &Reply, policy: &str) {
    if read.status != 503 {
        let long_enough = read.waited_ms().map(|ms| 1.0 <= ms);
        assert_eq!(long_enough, policy.starts_with("wait").then_some(true), "{policy}: {read:?}");
    }
}

/// As a task, which goes on while others are asked.
fn reading(gateway: &Gateway, path: &str, token: &str, policy: &str) -> JoinHandle<Reply> {
    let request = gateway.request(reqwest::Method::GET, path).header("consistency-token", token);
    tokio::spawn(Reply::of(request.header("consistency-policy", policy)))
}

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
        assert_waited_if_asked(&read, policy);
        let request = world.region.request(reqwest::Method::GET, LIST);
        let request = request
            .header("consistency-token", &token)
            .header("consistency-policy", policy)
            .header("tidemark-credential", crate::world::CREDENTIAL)
            .header(deadline, "400");
        let read = Reply::of(request).await;
        assert_eq!(read.came_to(), list, "list behind, {policy}: {read:?}");
        assert_waited_if_asked(&read, policy);
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
            assert_eq!(read.waited_ms(), None, "current, {policy}: {read:?}");
        }
    }
    for path in [ROW, LIST] {
        let read = world.region.read(path, &token, "primary").await;
        assert_eq!(read.came_to(), (200, "primary"), "{read:?}");
    }
}

/// Who may wait for minutes waits until the event is here, and who may not is answered meanwhile.
#[tokio::test]
async fn a_wait_is_as_long_as_its_chain_says() {
    let mut world = World::with(PATIENT).await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    let mut patient = Vec::new();
    for path in [ROW, LIST] {
        for policy in ["wait;ms=240000, pending", "wait, pending"] {
            patient.push(reading(&world.region, path, &token, policy));
            world.region.waiters(patient.len() as u64).await;
        }
        for (ms, policy) in [(1.0, "wait;ms=1, pending"), (40.0, "wait;ms=40, pending")] {
            let hasty = world.region.read(path, &token, policy).await;
            assert_eq!(hasty.came_to(), (202, "pending"), "{hasty:?}");
            assert!(hasty.waited_ms().is_some_and(|waited_ms| ms <= waited_ms), "{hasty:?}");
        }
        let hasty = world.region.read(path, &token, "wait;ms=1").await;
        assert_eq!(hasty.came_to(), (503, "replication-pending"));
        assert_eq!(world.region.waiter_count().await, patient.len() as u64);
    }
    world.catch_up().await;
    for read in patient {
        let read = read.await.unwrap();
        assert_eq!(read.came_to(), (200, "waited"), "{read:?}");
        assert!(read.waited_ms().is_some(), "{read:?}");
    }
}

/// Its own projector is the only one who can help.
#[tokio::test]
async fn a_list_that_the_primary_has_not_applied_either_is_waited_for_there() {
    let mut world = World::with_both(PATIENT, PATIENT).await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    let cases = [("forward", "forwarded"), ("primary", "primary")];
    let reads = cases.map(|(policy, _)| reading(&world.region, LIST, &token, policy));
    world.primary.waiters(cases.len() as u64).await;
    world.catch_up_primary().await;
    for ((policy, word), read) in cases.into_iter().zip(reads) {
        let read = read.await.unwrap();
        assert_eq!(read.came_to(), (200, word), "{policy}: {read:?}");
        assert_eq!(read.body["items"].as_array().map(Vec::len), Some(1), "{policy}: {read:?}");
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
    let read = Reply::of(request).await;
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
