//! Beginnings and ends: readiness, draining, what those who run it see.

use serde_json::Value;

use crate::world::{Gateway, Reply, World, eventually, region_config};

const ROW: &str = "/v1/views/order-detail/o-1";

#[tokio::test]
async fn a_read_under_way_is_answered_before_the_gateway_ends() {
    let world = World::start().await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    let base = world.region.base.clone();
    let waiting = tokio::spawn(async move {
        let request = reqwest::Client::new().get(format!("{base}{ROW}"));
        let request = request.header("consistency-policy", "wait;ms=5000, forward");
        Reply::of(request.header("consistency-token", token)).await
    });
    world.region.waiters(1).await;
    world.region.stop.cancel();
    let admin = world.region.admin.clone();
    eventually("the gateway drains, or has ended", async || {
        let ready = reqwest::get(format!("{admin}/readyz")).await;
        ready.map_or(true, |answer| answer.status() == 503)
    })
    .await;
    // Nobody waits for a gateway that ends; the chain goes on.
    assert_eq!(waiting.await.unwrap().came_to(), (200, "forwarded"));
    assert!(world.region.end().await, "everything was finished");
    assert!(world.primary.end().await);
}

#[tokio::test]
async fn a_gateway_is_not_ready_before_its_tables_are_there() {
    let world = World::start().await;
    world.postgres.create_database("tidemark_empty").await.unwrap();
    let config = region_config(&world.postgres, &world.nats, &world.primary.base);
    let config = config.replace("/tidemark_eu_west", "/tidemark_empty");
    let gateway = Gateway::start(&config).await;
    let ready = reqwest::get(format!("{}/readyz", gateway.admin)).await.unwrap();
    assert_eq!(ready.status(), 503);
    assert_eq!(reqwest::get(format!("{}/livez", gateway.admin)).await.unwrap().status(), 200);
    // It forwards what it cannot read.
    world.stock().await;
    let token = world.place("o-1").await.token();
    assert_eq!(gateway.read(ROW, &token, "").await.came_to(), (200, "forwarded"));
}

#[tokio::test]
async fn the_region_says_where_it_stands() {
    let mut world = World::start().await;
    world.stock().await;
    world.place("o-1").await;
    let head = world.catch_up().await.get();
    eventually("the region stands at the head", async || {
        world.region.get("/v1/currency").await.body["projections"][0]["applied"] == head
    })
    .await;
    let stands = world.region.get("/v1/currency").await.body;
    assert_eq!(
        (&stands["region"], &stands["primary_region"]),
        (&"eu-west".into(), &"us-east".into())
    );
    assert_eq!((&stands["epoch"], &stands["head"]), (&1.into(), &head.into()));
    let projection = &stands["projections"][0];
    assert_eq!((&projection["name"], &projection["version"]), (&"orders".into(), &1.into()));
    assert_eq!((&projection["lag_events"], &projection["parked"]), (&0.into(), &0.into()));
    let status: Value =
        reqwest::get(format!("{}/status", world.region.admin)).await.unwrap().json().await.unwrap();
    assert_eq!(status["projections"][0]["applied"], head);
    world.region.get(ROW).await;
    let metrics = reqwest::get(format!("{}/metrics", world.region.admin)).await.unwrap();
    let metrics = metrics.text().await.unwrap();
    let primary = reqwest::get(format!("{}/metrics", world.primary.admin)).await.unwrap();
    assert!(primary.text().await.unwrap().contains("tidemark_relay_active"));
    for name in ["tidemark_read_decisions_total", "http_server_request_duration_seconds_bucket"] {
        assert!(metrics.contains(name), "{name} is not in {metrics}");
    }
}
