//! Tokens: on every answer, merged, and refused when they are not ours.

use consistency::{Epoch, Key, KeyId, KeyRing, LogId, Token};
use reqwest::Method;
use serde_json::json;
use uuid::Uuid;

use crate::world::{Reply, World, order, position};

const ROW: &str = "/v1/views/order-detail/o-1";

fn ring(log: u128, key: u16, byte: u8) -> KeyRing {
    let key_id = KeyId(key);
    let key = Key::new(key_id, &[byte; 32]).unwrap();
    KeyRing::new(LogId::new(Uuid::from_u128(log)), vec![key], key_id).unwrap()
}

#[tokio::test]
async fn every_answer_carries_the_token_that_was_sent_or_more() {
    let world = World::start().await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    let known = world.region.open(&token);
    let paths = [
        (Method::GET, ROW, 200),
        (Method::GET, "/v1/views/order-detail/o-2", 404),
        (Method::GET, "/v1/views/nothing/x", 404),
        (Method::GET, "/nowhere", 404),
        (Method::GET, "/v1/currency", 200),
        (Method::GET, "/v1/aggregates/order/o-1", 200),
        (Method::DELETE, ROW, 405),
        (Method::POST, "/v1/commands/PlaceOrder", 415),
    ];
    for gateway in [&world.primary, &world.region] {
        for (method, path, status) in &paths {
            let request = gateway.request(method.clone(), path);
            let reply = Reply::of(request.header("consistency-token", &token)).await;
            assert_eq!(reply.status, *status, "{path}: {reply:?}");
            let carried = gateway.open(&reply.token());
            assert!(known.largest_position() <= carried.largest_position(), "{path}: {reply:?}");
            assert_eq!(carried.claims(), known.claims(), "{path}");
            let bare = Reply::of(gateway.request(method.clone(), path)).await;
            gateway.open(&bare.token());
            assert!(!bare.header("x-request-id").is_empty());
        }
    }
}

#[tokio::test]
async fn tokens_that_are_not_ours_are_refused_and_not_replaced() {
    let world = World::start().await;
    let token = Token::new(Epoch::FIRST).with_read(position(1));
    let ours = world.region.ring().seal(&token);
    let forged = ring(7, 1, 9).seal(&token);
    let cases = [
        ("%%%".to_owned(), "invalid-token"),
        (forged, "invalid-token"),
        (ring(8, 1, b'0').seal(&token), "invalid-token"),
        (ring(7, 2, b'0').seal(&token), "token-unknown-key"),
        ("CQAA".to_owned(), "token-unknown-key"),
        (format!("{ours}, %%%"), "invalid-token"),
    ];
    for (sent, problem) in cases {
        for (method, path) in [(Method::GET, ROW), (Method::POST, "/v1/commands/PlaceOrder")] {
            let request = world.region.request(method, path).header("consistency-token", &sent);
            let reply = Reply::of(request.json(&order("o-1"))).await;
            assert_eq!(reply.came_to(), (400, problem), "{sent}");
            assert_eq!(reply.token(), sent, "a fresh token would lose what the caller wrote");
        }
    }
}

#[tokio::test]
async fn what_two_callers_know_is_merged() {
    let world = World::start().await;
    world.stock().await;
    let (first, second) = (world.place("o-1").await.token(), world.place("o-2").await.token());
    let request = world.region.request(Method::GET, "/v1/currency");
    let request = request.header("consistency-token", first).header("consistency-token", second);
    let merged = world.region.open(&Reply::of(request).await.token());
    assert_eq!((merged.claims().len(), merged.largest_position()), (2, position(4)));
}

#[tokio::test]
async fn a_browser_carries_its_token_in_a_cookie() {
    let world = World::start().await;
    world.stock().await;
    let placed = world.region.command("PlaceOrder", order("o-1")).await;
    let cookie = placed.header("set-cookie").split(';').next().unwrap().to_owned();
    assert!(cookie.starts_with("tidemark="), "{placed:?}");
    let request = world.region.request(Method::GET, ROW).header("cookie", &cookie);
    let read = Reply::of(request.header("consistency-policy", "pending")).await;
    assert_eq!(read.came_to(), (202, "pending"), "the cookie demands the write");
    // A cookie of a key that is gone cannot be mended by a browser: the primary is read, and the
    // cookie is made anew.
    let gone = ring(7, 2, b'0').seal(&Token::new(Epoch::FIRST).with_read(position(9)));
    let request =
        world.region.request(Method::GET, ROW).header("cookie", format!("tidemark={gone}"));
    let read = Reply::of(request).await;
    assert_eq!(read.came_to(), (200, "primary"), "{read:?}");
    assert!(read.header("set-cookie").starts_with("tidemark="));
    // It stands for all that the lost one may have stood for: the head, and writes that are forgotten.
    let fresh = world.region.open(&read.token());
    let head = position(placed.body["position"].as_u64().unwrap());
    assert!(head <= fresh.read_position() && fresh.claims_dropped(), "{fresh:?}");
    // An answer that shows nothing of the primary's newest state makes no new cookie.
    for path in ["/v1/currency", "/v1/nothing"] {
        let request = world.region.request(Method::GET, path);
        let reply = Reply::of(request.header("cookie", format!("tidemark={gone}"))).await;
        assert_eq!((reply.header("set-cookie"), reply.token().as_str()), ("", ""), "{path}");
    }
    // Who uses the header gets no cookie.
    let read = world.region.read(ROW, &placed.token(), "pending").await;
    assert_eq!(read.header("set-cookie"), "");
}

#[tokio::test]
async fn a_token_of_an_epoch_that_is_not_known_here_is_not_judged_by_its_position() {
    let mut world = World::start().await;
    world.stock().await;
    world.place("o-1").await;
    world.catch_up().await;
    let newer = Token::new(Epoch::new(2).unwrap()).with_read(position(1));
    let sealed = world.region.ring().seal(&newer);
    let read = world.region.read(ROW, &sealed, "wait;ms=10, pending").await;
    assert_eq!(read.came_to(), (202, "pending"));
    let read = world.region.read(ROW, &sealed, "forward").await;
    assert_eq!(read.came_to(), (503, "replication-pending"), "the primary does not know it either");
    let request = world.primary.request(Method::POST, "/v1/commands/CancelOrder");
    let request = request.header("consistency-token", &sealed).json(&json!({"order_id": "o-1"}));
    assert_eq!(Reply::of(request).await.came_to(), (421, "not-primary"), "a deposed primary");
}
