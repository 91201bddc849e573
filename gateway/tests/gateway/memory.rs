//! Rows from memory, and many reads in few questions.

use reqwest::Method;
use serde_json::json;

use crate::world::{DEADLINE, Gateway, Reply, World, eventually, order};

const ROW: &str = "/v1/views/order-detail/o-1";
const WAIT: &str = "wait;ms=5000";

fn cache(reply: &Reply) -> &str {
    reply.header("cache-status")
}

/// Reads until the row comes from memory: hints take a while to be heard.
async fn remembered(gateway: &Gateway, path: &str, token: &str) -> Reply {
    let mut last = None;
    eventually("the row comes from memory", async || {
        let read = gateway.read(path, token, WAIT).await;
        let hit = cache(&read) == "tidemark; hit";
        last = Some(read);
        hit
    })
    .await;
    last.unwrap()
}

#[tokio::test]
async fn a_row_comes_from_memory_until_it_changes() {
    let mut world = World::start().await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    world.catch_up().await;
    let first = world.region.read(ROW, &token, WAIT).await;
    assert_eq!((first.status, cache(&first)), (200, "tidemark; fwd=miss; stored"));
    let again = remembered(&world.region, ROW, &token).await;
    assert_eq!((&again.text, again.word()), (&first.text, "local"));
    assert_eq!(again.header("etag"), first.header("etag"));
    assert_eq!(world.region.open(&again.token()), world.region.open(&first.token()));
    let known = world.region.request(Method::GET, ROW).header("if-none-match", "\"1-1.3\"");
    let known = Reply::of(known.header("consistency-token", &token)).await;
    assert_eq!((known.status, cache(&known), known.word()), (304, "tidemark; hit", "local"));
    // Who has written since is not shown what was kept.
    let token = world.primary.command("CancelOrder", json!({"order_id": "o-1"})).await.token();
    let pending = world.region.read(ROW, &token, "wait;ms=20, pending").await;
    assert_eq!(pending.came_to(), (202, "pending"));
    world.catch_up().await;
    let changed = world.region.read(ROW, &token, WAIT).await;
    assert_eq!((changed.status, changed.body["version"].as_u64()), (200, Some(2)));
    assert_eq!(cache(&changed), "tidemark; fwd=stale; stored");
    let again = remembered(&world.region, ROW, &token).await;
    assert_eq!(again.text, changed.text);
}

#[tokio::test]
async fn that_there_is_no_row_is_kept_until_there_is_one() {
    let mut world = World::start().await;
    world.stock().await;
    world.catch_up().await;
    let absent = remembered(&world.region, ROW, "").await;
    assert_eq!((absent.status, absent.word(), absent.problem()), (404, "local", "not-found"));
    let token = world.place("o-1").await.token();
    world.catch_up().await;
    let read = world.region.read(ROW, &token, WAIT).await;
    assert_eq!(read.status, 200, "{read:?}");
}

#[tokio::test]
async fn what_was_changed_without_a_word_is_not_answered_from_memory() {
    let mut world = World::start().await;
    world.stock().await;
    world.place("o-1").await;
    world.catch_up().await;
    remembered(&world.region, ROW, "").await;
    let token = world.primary.command("CancelOrder", json!({"order_id": "o-1"})).await.token();
    world.catch_up_silently().await;
    let read = world.region.read(ROW, &token, WAIT).await;
    assert_eq!((read.status, read.body["version"].as_u64()), (200, Some(2)));
    assert!(cache(&read).starts_with("tidemark; fwd=stale"), "{read:?}");
}

#[tokio::test]
async fn memory_stays_true_when_the_database_goes_back() {
    let mut world = World::start().await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    world.catch_up().await;
    let first = remembered(&world.region, ROW, &token).await;
    world.projector.go_back_to_nothing().await;
    let read = world.region.read(ROW, &token, "wait;ms=20").await;
    assert_eq!((&read.text, cache(&read)), (&first.text, "tidemark; hit"), "it is true still");
    let reader = world.region.token_at(3);
    let other = world.region.read("/v1/views/order-detail/o-2", &reader, "wait;ms=20").await;
    assert_eq!(other.came_to(), (503, "replication-pending"), "nothing was kept of it");
    world.catch_up().await;
    assert_eq!(world.region.read(ROW, &token, WAIT).await.text, first.text);
}

#[tokio::test]
async fn the_primarys_newest_is_never_from_memory() {
    let mut world = World::start().await;
    world.stock().await;
    world.place("o-1").await;
    world.catch_up_primary().await;
    remembered(&world.primary, ROW, "").await;
    let read = world.primary.read(ROW, "", "primary").await;
    assert_eq!((read.came_to(), cache(&read)), ((200, "primary"), "tidemark; fwd=bypass"));
    world.primary.command("CancelOrder", json!({"order_id": "o-1"})).await;
    let read = world.primary.read(ROW, "", "primary").await;
    assert_eq!((read.came_to(), read.body["version"].as_u64()), ((200, "primary"), Some(2)));
}

#[tokio::test]
async fn memory_and_gathering_can_be_switched_off() {
    let mut world = World::with("read = { memory_bytes_max = 0, gather = false }").await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    world.catch_up().await;
    for _ in 0..3 {
        let read = world.region.read(ROW, &token, WAIT).await;
        assert_eq!((read.status, cache(&read)), (200, "tidemark; fwd=bypass"));
    }
}

#[tokio::test]
async fn a_hundred_reads_at_once_are_a_few_questions() {
    let mut world = World::with("read.query_timeout = \"30s\"").await;
    world.stock().await;
    for order_id in (1..=10).map(|n| format!("o-{n}")) {
        let placed = world.primary.command("PlaceOrder", order(&order_id)).await;
        assert_eq!(placed.status, 201);
    }
    world.catch_up().await;
    let mut gate = world.projector.pool.begin().await.unwrap();
    sqlx::query("lock table orders_v1_order_detail in access exclusive mode")
        .execute(&mut *gate)
        .await
        .unwrap();
    let client = reqwest::Client::builder().http2_prior_knowledge().build().unwrap();
    let get = |path: String| client.get(format!("{}{path}", world.region.base)).timeout(DEADLINE);
    let reads: Vec<_> = (0..100)
        .map(|n| tokio::spawn(Reply::of(get(format!("/v1/views/order-detail/o-{}", n % 10 + 1)))))
        .collect();
    // They share a connection: when this is answered, they have been read off it.
    eventually("reads wait for the table", async || blocked(&world).await == 2).await;
    for _ in 0..3 {
        assert_eq!(Reply::of(get("/v1/currency".to_owned())).await.status, 200);
    }
    assert_eq!(blocked(&world).await, 2, "no more questions than may be asked at once");
    gate.rollback().await.unwrap();
    let mut replies = Vec::new();
    for read in reads {
        replies.push(read.await.unwrap());
    }
    assert!(replies.iter().all(|reply| reply.status == 200), "{replies:?}");
    let alone = |reply: &&Reply| cache(reply).starts_with("tidemark; fwd=miss; stored");
    assert!(replies.iter().any(|reply| cache(reply).ends_with("; collapsed")), "{replies:?}");
    assert!(replies.iter().filter(alone).count() < 100);
}

/// Questions that wait for a lock.
async fn blocked(world: &World) -> i64 {
    sqlx::query_scalar(
        "select count(*) from pg_stat_activity
         where datname = current_database() and wait_event_type = 'Lock'
             and backend_type = 'client backend'",
    )
    .fetch_one(&world.projector.pool)
    .await
    .unwrap()
}
