//! Writes: appends and commands, at the primary and through a region.

use reqwest::Method;
use serde_json::{Value, json};

use crate::world::{Reply, World, order, position};

const EVENTS: &str = "/v1/aggregates/note/n-1/events";

fn noted(text: &str) -> Value {
    json!({"events": [{"type": "Noted", "data": {"text": text}}]})
}

#[tokio::test]
async fn an_append_answers_with_its_place_from_any_region() {
    let world = World::start().await;
    let first = world.region.post(EVENTS, noted("a")).await;
    assert_eq!(first.status, 201, "{first:?}");
    assert_eq!(first.header("location"), "/v1/aggregates/note/n-1");
    assert_eq!(first.header("etag"), "\"1.1\"");
    assert_eq!((first.word(), first.header("cache-control")), ("forwarded", "no-store"));
    let second = world.primary.post(EVENTS, noted("b")).await;
    assert_eq!((second.status, second.header("location")), (200, ""));
    assert_eq!((second.word(), second.header("cache-control")), ("primary", "no-store"));
    assert_eq!(second.body["aggregate_type"], "note");
    assert_eq!(second.body["aggregate_id"], "n-1");
    assert_eq!((&second.body["version"], &second.body["position"]), (&json!(2), &json!(2)));
    let event = &second.body["events"][0];
    assert_eq!((&event["version"], &event["position"]), (&json!(2), &json!(2)));
    assert!(event["id"].as_str().is_some_and(|id| id.len() == 36));
    let token = world.region.open(&second.token());
    assert_eq!((token.claims().len(), token.largest_position()), (1, position(2)));
    let listed = world.region.get(&format!("{EVENTS}?limit=1")).await;
    assert_eq!(listed.came_to(), (200, "primary"));
    assert_eq!(listed.body["events"][0]["data"], json!({"text": "a"}));
    assert_eq!(listed.body["next_from_version"], 2);
    let rest = world.region.get(&format!("{EVENTS}?from_version=2")).await;
    assert_eq!(rest.body["events"].as_array().unwrap().len(), 1);
    assert_eq!(rest.body["next_from_version"], Value::Null);
}

#[tokio::test]
async fn an_expected_version_is_demanded_and_the_refusal_shows_where_the_aggregate_is() {
    let world = World::start().await;
    let send = async |header: &'static str, value: &'static str| {
        let request = world.region.request(Method::POST, EVENTS).header(header, value);
        Reply::of(request.json(&noted("x"))).await
    };
    assert_eq!(send("if-match", "\"1.1\"").await.came_to(), (412, "version-conflict"));
    assert_eq!(send("if-none-match", "*").await.status, 201);
    let refused = send("if-none-match", "*").await;
    assert_eq!(refused.came_to(), (412, "version-conflict"));
    assert_eq!(refused.body["version"], 1);
    assert_eq!(refused.header("etag"), "\"1.1\"");
    assert_eq!(world.region.open(&refused.token()).read_position(), position(1));
    assert_eq!(send("if-match", "\"1.1\"").await.status, 200);
    assert_eq!(send("if-match", "\"1.1\"").await.came_to(), (412, "version-conflict"));
    assert_eq!(send("if-match", "\"2.2\"").await.status, 412, "the version of another epoch");
    assert_eq!(send("if-match", "*").await.came_to(), (400, "bad-request"));
}

#[tokio::test]
async fn a_command_is_decided_by_the_rules_and_a_broken_one_is_named() {
    let world = World::start().await;
    let refused = world.region.command("PlaceOrder", order("o-1")).await;
    assert_eq!(refused.came_to(), (422, "rule-violated"));
    assert!(refused.body["rule"].is_string(), "{refused:?}");
    world.stock().await;
    let placed = world.region.command("PlaceOrder", order("o-1")).await;
    assert_eq!((placed.status, placed.header("etag")), (201, "\"1.1\""), "{placed:?}");
    let cancel = world.region.command("CancelOrder", json!({"order_id": "o-1"})).await;
    assert_eq!((cancel.status, cancel.header("etag")), (200, "\"1.2\""), "{cancel:?}");
    let refused = world.region.command("ShipOrder", json!({"order_id": "o-1"})).await;
    assert_eq!(refused.came_to(), (422, "rule-violated"));
    assert_eq!(world.region.open(&refused.token()).read_position(), position(4));
    let state = world.region.get("/v1/aggregates/order/o-1").await;
    assert_eq!(state.came_to(), (200, "primary"), "{state:?}");
    assert_eq!((state.header("etag"), &state.body["version"]), ("\"1.2\"", &json!(2)));
    let misspelt = world.region.command("ShipOrder", json!({"order": "o-1"})).await;
    assert_eq!(misspelt.came_to(), (400, "bad-request"));
    assert_eq!(world.region.command("Unknown", json!({})).await.came_to(), (404, "not-found"));
}

#[tokio::test]
async fn commands_on_one_aggregate_at_once_all_find_their_turn() {
    let world = World::start().await;
    world.stock().await;
    world.place("o-1").await;
    let add = json!({"order_id": "o-1", "product_id": "p-1", "quantity": 1});
    let adding = (0..6).map(|_| world.primary.command("AddItem", add.clone()));
    let added = futures::future::join_all(adding).await;
    let mut versions: Vec<u64> = added
        .iter()
        .map(|reply| {
            assert_eq!(reply.status, 200, "{reply:?}");
            reply.body["version"].as_u64().unwrap()
        })
        .collect();
    versions.sort_unstable();
    assert_eq!(versions, [2, 3, 4, 5, 6, 7]);
}

#[tokio::test]
async fn an_aggregate_without_events_is_404_as_of_the_head() {
    let world = World::start().await;
    world.stock().await;
    let absent = world.region.get("/v1/aggregates/order/o-9").await;
    assert_eq!((absent.status, absent.problem()), (404, "not-found"));
    assert_eq!(world.region.open(&absent.token()).read_position(), position(2));
}

#[tokio::test]
async fn writes_and_reads_go_over_http_2_as_well() {
    let mut world = World::start().await;
    world.stock().await;
    let client = reqwest::Client::builder().http2_prior_knowledge().build().unwrap();
    let url = format!("{}/v1/commands/PlaceOrder", world.region.base);
    let placed = client.post(url).json(&order("o-1")).send().await.unwrap();
    assert_eq!((placed.version(), placed.status().as_u16()), (reqwest::Version::HTTP_2, 201));
    let token = placed.headers()["consistency-token"].clone();
    world.catch_up().await;
    let url = format!("{}/v1/views/order-detail/o-1", world.region.base);
    let read = client.get(url).header("consistency-token", token).send().await.unwrap();
    assert_eq!((read.version(), read.status().as_u16()), (reqwest::Version::HTTP_2, 200));
}

#[tokio::test]
async fn a_write_does_not_wait_for_nats() {
    let mut world = World::start().await;
    world.nats.stop().await.unwrap();
    assert_eq!(world.region.post(EVENTS, noted("a")).await.status, 201);
}
