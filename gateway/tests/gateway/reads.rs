//! Reads of rows: waits, the second check, forwards, validators.

use std::time::Duration;

use reqwest::Method;
use serde_json::json;

use crate::world::{CREDENTIAL, Gateway, Reply, World, eventually, position, region_config};

const ROW: &str = "/v1/views/order-detail/o-1";

#[tokio::test]
async fn a_commit_wakes_who_waits_for_it_and_nobody_is_left_waiting() {
    let mut world = World::start().await;
    world.stock().await;
    let placed = world.place("o-1").await;
    let (base, token) = (world.region.base.clone(), placed.token());
    let waiting = tokio::spawn(async move {
        let request = reqwest::Client::new().get(format!("{base}{ROW}"));
        let request = request.header("consistency-policy", "wait;ms=5000");
        Reply::of(request.header("consistency-token", token)).await
    });
    world.region.waiters(1).await;
    world.catch_up().await;
    let read = waiting.await.unwrap();
    assert_eq!(read.came_to(), (200, "waited"));
    assert_eq!(read.body["data"]["order_id"], "o-1");
    assert_eq!(read.body["version"], 1);
    let at = placed.body["position"].as_u64().unwrap();
    assert!(read.header("consistency-status").ends_with(&format!(";position={at}")));
    assert!(read.header("server-timing").contains("wait;dur="));
    assert_eq!(world.region.waiter_count().await, 0);
}

#[tokio::test]
async fn who_times_out_or_hangs_up_leaves_no_waiter() {
    let world = World::start().await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    let read = world.region.read(ROW, &token, "wait;ms=20").await;
    assert_eq!(read.came_to(), (503, "replication-pending"));
    assert_eq!(read.body["demand"], 3);
    assert_eq!(world.region.waiter_count().await, 0);
    let (base, sent) = (world.region.base.clone(), token.clone());
    let waiting = tokio::spawn(async move {
        let request = reqwest::Client::new().get(format!("{base}{ROW}"));
        let request = request.header("consistency-policy", "wait;ms=5000");
        request.header("consistency-token", sent).send().await
    });
    world.region.waiters(1).await;
    waiting.abort();
    world.region.waiters(0).await;
}

#[tokio::test]
async fn reads_beyond_the_cap_of_waiters_are_refused() {
    let world = World::with("read.waiters_max = 1").await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    let (base, sent) = (world.region.base.clone(), token.clone());
    let waiting = tokio::spawn(async move {
        let request = reqwest::Client::new().get(format!("{base}{ROW}"));
        let request = request.header("consistency-policy", "wait;ms=5000");
        request.header("consistency-token", sent).send().await
    });
    world.region.waiters(1).await;
    let read = world.region.read(ROW, &token, "wait;ms=5000, forward").await;
    assert_eq!(read.came_to(), (503, "waiters-full"));
    waiting.abort();
}

#[tokio::test]
async fn a_hint_ahead_of_the_database_changes_no_answer() {
    let mut world = World::start().await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    world.projector.announce(position(99)).await;
    eventually("the lie is heard", async || {
        world.region.get("/v1/currency").await.body["head"] == 99
    })
    .await;
    let read = world.region.read(ROW, &token, "wait;ms=20").await;
    assert_eq!(read.came_to(), (503, "replication-pending"));
    let read = world.region.read(ROW, &token, "forward").await;
    assert_eq!(read.came_to(), (200, "forwarded"));
    // And once it is true, it is believed.
    world.catch_up().await;
    let read = world.region.read(ROW, &token, "wait;ms=5000").await;
    assert_eq!(read.status, 200);
}

#[tokio::test]
async fn a_database_that_went_back_is_noticed_and_waited_for() {
    let mut world = World::with("read.memory_bytes_max = 0").await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    world.catch_up().await;
    assert_eq!(world.region.read(ROW, &token, "wait;ms=5000").await.status, 200);
    world.projector.go_back_to_nothing().await;
    let read = world.region.read(ROW, &token, "wait;ms=20").await;
    assert_eq!(read.came_to(), (503, "replication-pending"));
    world.catch_up().await;
    let read = world.region.read(ROW, &token, "wait;ms=5000").await;
    assert_eq!(read.status, 200);
}

#[tokio::test]
async fn without_hints_checkpoints_are_polled_for_those_who_wait() {
    // Nobody else looks at the database in time.
    let mut world = World::with("read.refresh_interval = \"1h\"").await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    let (base, sent) = (world.region.base.clone(), token.clone());
    let waiting = tokio::spawn(async move {
        let request = reqwest::Client::new().get(format!("{base}{ROW}"));
        let request = request.header("consistency-policy", "wait;ms=5000");
        Reply::of(request.header("consistency-token", sent)).await
    });
    world.region.waiters(1).await;
    world.catch_up_silently().await;
    assert_eq!(waiting.await.unwrap().came_to(), (200, "waited"));
}

#[tokio::test]
async fn whoever_asks_after_a_silence_is_answered_by_the_database() {
    // Nobody else looks at it.
    let mut world = World::with("read.refresh_interval = \"1h\"").await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    world.catch_up().await;
    assert_eq!(world.region.read(ROW, &token, "wait;ms=5000").await.status, 200);
    let token = world.primary.command("CancelOrder", json!({"order_id": "o-1"})).await.token();
    world.catch_up_silently().await;
    // Longer than a region believes that it would have heard.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let read = world.region.read(ROW, &token, "pending").await;
    assert_eq!(read.came_to(), (200, "local"), "{read:?}");
}

#[tokio::test]
async fn a_row_of_a_region_is_the_row_that_the_primary_folds() {
    let mut world = World::start().await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    let folded = world.region.read(ROW, &token, "forward").await;
    assert_eq!(folded.came_to(), (200, "forwarded"));
    assert!(folded.header("consistency-status").contains("region=us-east"));
    world.catch_up().await;
    let local = world.region.read(ROW, &token, "wait;ms=5000").await;
    assert_eq!(
        (local.text, local.headers["etag"].clone()),
        (folded.text, folded.headers["etag"].clone())
    );
}

#[tokio::test]
async fn a_row_that_is_unchanged_is_304_with_a_token_after_the_check() {
    let mut world = World::start().await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    world.catch_up().await;
    let read = world.region.read(ROW, &token, "wait;ms=5000").await;
    assert_eq!(read.header("etag"), "\"1-1.3\"");
    assert_eq!(read.header("cache-control"), "private, no-cache");
    assert_eq!(read.header("vary"), "Consistency-Token, Cookie, Consistency-Policy, Prefer");
    let again = world.region.request(Method::GET, ROW).header("if-none-match", "\"1-1.3\"");
    let again = Reply::of(again.header("consistency-token", &token)).await;
    assert_eq!((again.status, again.text.as_str()), (304, ""));
    assert_eq!(again.word(), "local");
    assert_eq!(world.region.open(&again.token()).largest_position(), position(3));
    // A tag is no excuse for being behind.
    let newer = world.primary.command("CancelOrder", json!({"order_id": "o-1"})).await;
    let again = world.region.request(Method::GET, ROW).header("if-none-match", "\"1-1.3\"");
    let again = again.header("consistency-token", newer.token());
    let again = Reply::of(again.header("consistency-policy", "wait;ms=10")).await;
    assert_eq!(again.came_to(), (503, "replication-pending"));
}

#[tokio::test]
async fn a_version_asked_for_by_hand_is_met_by_the_version_only() {
    let mut world = World::start().await;
    world.stock().await;
    world.place("o-1").await;
    world.catch_up().await;
    let path = |version| format!("{ROW}?min_version={version}");
    assert_eq!(world.region.read(&path(1), "", "wait;ms=5000").await.status, 200);
    let read = world.region.read(&path(2), "", "wait;ms=10").await;
    assert_eq!(read.came_to(), (503, "replication-pending"));
    world.primary.command("CancelOrder", json!({"order_id": "o-1"})).await;
    let read = world.region.read(&path(2), "", "forward").await;
    assert_eq!(read.came_to(), (200, "forwarded"));
    let read = world.region.read(&path(3), "", "forward").await;
    assert_eq!(read.came_to(), (412, "version-conflict"), "there is no such version anywhere");
}

#[tokio::test]
async fn an_absent_row_shows_the_checkpoint_it_is_absent_at() {
    let mut world = World::start().await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    let head = world.catch_up().await;
    let read = world.region.read("/v1/views/order-detail/o-2", &token, "wait;ms=5000").await;
    assert_eq!((read.came_to(), read.problem()), ((404, read.word()), "not-found"));
    assert_eq!(world.region.open(&read.token()).read_position(), head);
    // Folded from the log, it shows the head.
    let read = world
        .primary
        .read("/v1/views/order-detail/o-2", &world.region.token_at(3), "forward")
        .await;
    assert_eq!(read.status, 404);
    assert_eq!(world.region.open(&read.token()).read_position(), head);
}

#[tokio::test]
async fn a_forwarded_request_is_never_forwarded_again() {
    let world = World::start().await;
    let request = world.region.request(Method::GET, ROW).header("tidemark-hop", "ap-south");
    let refused = Reply::of(request.header("tidemark-credential", CREDENTIAL)).await;
    assert_eq!(refused.came_to(), (421, "not-primary"));
    // A stranger's mark is not believed.
    let request = world.region.request(Method::GET, ROW).header("tidemark-hop", "ap-south");
    assert_eq!(Reply::of(request).await.status, 404);
    for path in ["/internal/log", "/internal/epochs"] {
        assert_eq!(world.primary.get(path).await.came_to(), (401, "unauthorized"));
    }
}

#[tokio::test]
async fn a_region_that_is_cut_off_says_so_and_still_reads() {
    let mut world = World::start().await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    let nobody = format!("http://127.0.0.1:{}", compose::ports::free().unwrap());
    let alone = Gateway::start(&region_config(&world.postgres, &world.nats, &nobody)).await;
    alone.ready().await;
    let read = alone.read(ROW, &token, "forward, pending").await;
    assert_eq!(read.came_to(), (202, "pending"));
    let read = alone.read(ROW, &token, "forward").await;
    assert_eq!(read.came_to(), (503, "replication-pending"));
    let read = alone.read(ROW, &token, "primary").await;
    assert_eq!(read.came_to(), (503, "primary-unreachable"));
    let written = alone.command("CancelOrder", json!({"order_id": "o-1"})).await;
    assert_eq!(written.came_to(), (503, "primary-unreachable"));
    assert_eq!(written.header("retry-after"), "1");
    world.catch_up().await;
    let read = alone.read(ROW, &token, "wait;ms=5000").await;
    assert_eq!(read.status, 200);
}
