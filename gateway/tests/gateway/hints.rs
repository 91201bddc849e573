//! What a region answers when what tells it about its currency fails: hints, NATS, the database.

use compose::postgres::Cluster;
use futures::future::join_all;
use sqlx::PgPool;

use crate::{
    projector::Projector,
    world::{Gateway, REGION, World, eventually, position, region_config},
};

const ROW: &str = "/v1/views/order-detail/o-1";
const LIST: &str = "/v1/views/orders-by-customer/c-1";

/// Ready, and degraded for this reason.
async fn degraded(gateway: &Gateway, part: &str) -> bool {
    let said = gateway.readiness().await;
    said.status == 200 && said.body["conditions"][part]["state"] == "degraded"
}

#[tokio::test]
async fn without_nats_a_region_says_so_and_proves_its_answers_by_the_database() {
    let mut world = World::start().await;
    world.stock().await;
    let old = world.place("o-1").await.token();
    world.catch_up().await;
    assert_eq!(world.region.read(ROW, &old, "wait;ms=5000").await.status, 200);
    world.nats.kill().await.unwrap();
    for gateway in [&world.region, &world.primary] {
        eventually("nats is missed", async || degraded(gateway, "nats").await).await;
    }
    let new = world.place("o-2").await;
    assert_eq!(new.status, 201, "writes do not wait for nats: {new:?}");
    let path = "/v1/views/order-detail/o-2";
    let behind = world.region.read(path, &new.token(), "wait;ms=10").await;
    assert_eq!(behind.came_to(), (503, "replication-pending"));
    assert_eq!(
        world.region.read(path, &new.token(), "forward").await.came_to(),
        (200, "forwarded")
    );
    assert_eq!(world.region.read(ROW, &old, "wait;ms=10").await.came_to(), (200, "local"));
    world.catch_up_silently().await;
    let read = world.region.read(path, &new.token(), "wait;ms=20000").await;
    assert_eq!(read.status, 200, "{read:?}");
    world.nats.start_again().await.unwrap();
    eventually("nats is back", async || !degraded(&world.region, "nats").await).await;
}

#[tokio::test]
async fn a_region_is_late_when_one_of_its_projections_is_and_not_when_nothing_happens() {
    let often = "read.degraded_lag = \"1ms\"\nread.refresh_interval = \"20ms\"";
    let mut world = World::with(often).await;
    world.stock().await;
    world.catch_up().await;
    let token = world.place("o-1").await.token();
    // From now on the region knows that there is more.
    assert_eq!(world.region.read(ROW, &token, "pending").await.came_to(), (202, "pending"));
    eventually("it is late", async || degraded(&world.region, "lag").await).await;
    world.catch_up().await;
    // What it has last is older than that, and is all that there is.
    eventually("it is not late", async || !degraded(&world.region, "lag").await).await;
    let lose = "update checkpoint set position = position - 1 where projection = 'products'";
    sqlx::query(lose).execute(&world.projector.pool).await.unwrap();
    eventually("one projection is late", async || degraded(&world.region, "lag").await).await;
}

#[tokio::test]
async fn a_region_without_its_database_is_not_ready_and_asks_the_primary() {
    let mut world = World::alone("read.memory_bytes_max = 0").await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    world.catch_up().await;
    assert_eq!(world.region.read(ROW, &token, "wait;ms=5000").await.status, 200);
    world.region_postgres().kill().await.unwrap();
    let read = world.region.read(ROW, &token, "").await;
    assert_eq!(read.came_to(), (200, "forwarded"), "{read:?}");
    let read = world.region.read(ROW, &token, "wait;ms=10").await;
    assert_eq!(read.status, 503, "{read:?}");
    eventually("it is not ready", async || world.region.readiness().await.status == 503).await;
    world.region_postgres().start_again().await.unwrap();
    world.region.ready().await;
    eventually("it reads at home again", async || {
        world.region.read(ROW, &token, "wait;ms=10").await.came_to() == (200, "local")
    })
    .await;
}

#[tokio::test]
async fn a_database_set_back_serves_nothing_it_has_lost() {
    let mut world = World::alone("read.memory_bytes_max = 0").await;
    world.stock().await;
    let old = world.place("o-1").await.token();
    let kept = world.catch_up().await;
    assert_eq!(world.region.read(ROW, &old, "wait;ms=5000").await.status, 200);
    let older = world.region_postgres().copy_data().await.unwrap();
    let new = world.primary.command("CancelOrder", serde_json::json!({"order_id": "o-1"})).await;
    let head = world.catch_up().await;
    assert_eq!(world.region.read(ROW, &new.token(), "wait;ms=5000").await.body["version"], 2);
    world.region_postgres().restore(&older).await.unwrap();
    // Memory vouches for the head; the rows' own snapshot does not.
    for policy in ["wait;ms=10", "pending"] {
        let read = world.region.read(ROW, &new.token(), policy).await;
        assert!(matches!(read.status, 202 | 503), "{policy}: {read:?}");
    }
    let read = world.region.read(ROW, &new.token(), "forward").await;
    assert_eq!((read.came_to(), &read.body["version"]), ((200, "forwarded"), &2.into()));
    let read = world.region.read(ROW, &new.token(), "eventual").await;
    assert_eq!((read.came_to(), &read.body["version"]), ((200, "stale"), &1.into()));
    // What an older token needs is there still, and is known to be there.
    eventually("what is there is read", async || {
        let read = world.region.read(ROW, &old, "wait;ms=1000").await;
        read.status == 200 && world.region.open(&read.token()).read_position() == kept
    })
    .await;
    assert!(kept < head);
    let stands = world.region.get("/v1/currency").await.body;
    assert_eq!(stands["projections"][0]["applied"], kept.get(), "{stands}");
}

#[tokio::test]
async fn a_database_that_restarts_between_reads_costs_none_of_them() {
    let mut world = World::alone("read.memory_bytes_max = 0").await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    world.catch_up().await;
    assert_eq!(world.region.read(LIST, &token, "wait;ms=5000").await.status, 200);
    // A connection for each, since all of them wait.
    let pool = PgPool::connect(&world.region_postgres().url("tidemark_eu_west")).await.unwrap();
    let mut lock = pool.begin().await.unwrap();
    sqlx::query("lock table orders_v1_orders_by_customer in access exclusive mode")
        .execute(&mut *lock)
        .await
        .unwrap();
    let reads = join_all((0..8).map(|_| world.region.read(LIST, &token, "wait;ms=1000")));
    let release = async {
        eventually("all wait for the table", async || {
            let waiting = "select count(*) from pg_stat_activity
                where datname = current_database() and wait_event_type = 'Lock'
                    and backend_type = 'client backend'";
            let waiting: i64 = sqlx::query_scalar(waiting).fetch_one(&pool).await.unwrap();
            waiting == 8
        })
        .await;
        lock.rollback().await.unwrap();
    };
    let (reads, ()) = tokio::join!(reads, release);
    assert!(reads.iter().all(|read| read.status == 200), "{reads:?}");
    world.region_postgres().kill().await.unwrap();
    world.region_postgres().start_again().await.unwrap();
    for path in [LIST, ROW, LIST] {
        let read = world.region.read(path, &token, "wait;ms=10").await;
        assert_eq!(read.came_to(), (200, "local"), "{read:?}");
    }
}

#[tokio::test]
async fn a_gateway_that_starts_before_its_projector_waits_for_the_tables() {
    let world = World::start().await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    let database = Cluster::shared().await.unwrap();
    database.create_database("tidemark_eu_west").await.unwrap();
    let early = Gateway::start(&region_config(&database, &world.nats, &world.primary.base)).await;
    assert_eq!(early.readiness().await.status, 503);
    assert_eq!(early.read(ROW, &token, "").await.came_to(), (200, "forwarded"));
    let refused = early.read(ROW, &token, "wait;ms=10").await;
    assert_eq!(refused.status, 503, "{refused:?}");
    let url = database.url("tidemark_eu_west");
    let mut projector = Projector::on(REGION, &url, &world.nats).await;
    early.ready().await;
    let log = world.log().await;
    projector.apply(&log, position(log.len() as u64)).await;
    eventually("it reads at home", async || {
        early.read(ROW, &token, "wait;ms=1000").await.status == 200
    })
    .await;
}
