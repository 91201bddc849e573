//! Requests that make no sense are refused with a problem that says so.

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::json;

use crate::world::{Gateway, Reply, World};

struct Case {
    method: Method,
    path: &'static str,
    headers: &'static [(&'static str, &'static str)],
    body: &'static str,
    status: StatusCode,
    problem: &'static str,
}

const JSON: (&str, &str) = ("content-type", "application/json");
const EVENTS: &str = "/v1/aggregates/note/n-1/events";
const ROW: &str = "/v1/views/order-detail/o-1";
const LIST: &str = "/v1/views/orders-by-customer/c-1";

fn get(path: &'static str, problem: &'static str, status: StatusCode) -> Case {
    Case { method: Method::GET, path, headers: &[], body: "", status, problem }
}

fn post(body: &'static str) -> Case {
    Case {
        method: Method::POST,
        path: EVENTS,
        headers: &[JSON],
        body,
        status: StatusCode::BAD_REQUEST,
        problem: "bad-request",
    }
}

fn headed(headers: &'static [(&'static str, &'static str)]) -> Case {
    Case {
        method: Method::GET,
        path: ROW,
        headers,
        body: "",
        status: StatusCode::BAD_REQUEST,
        problem: "bad-request",
    }
}

fn cases() -> Vec<Case> {
    vec![
        get("/", "not-found", StatusCode::NOT_FOUND),
        get("/v1/views/nothing/x", "unknown-view", StatusCode::NOT_FOUND),
        get("/v1/views/order-detail/a%20b", "bad-request", StatusCode::BAD_REQUEST),
        get("/v1/views/order-detail/%zz", "bad-request", StatusCode::BAD_REQUEST),
        get("/v1/views/order-detail/o-1?min_version=x", "bad-request", StatusCode::BAD_REQUEST),
        get("/v1/views/order-detail/o-1?minversion=1", "bad-request", StatusCode::BAD_REQUEST),
        get("/v1/views/orders-by-customer/c-1?limit=0", "bad-request", StatusCode::BAD_REQUEST),
        get("/v1/views/orders-by-customer/c-1?limit=501", "bad-request", StatusCode::BAD_REQUEST),
        get("/v1/views/orders-by-customer/c-1?cursor=!", "bad-request", StatusCode::BAD_REQUEST),
        get("/v1/views/orders-by-customer/c%001", "bad-request", StatusCode::BAD_REQUEST),
        get("/v1/aggregates/1order/o-1", "bad-request", StatusCode::BAD_REQUEST),
        get("/v1/aggregates/order/o-1/events?limit=999", "bad-request", StatusCode::BAD_REQUEST),
        get("/v1/commands/PlaceOrder", "method-not-allowed", StatusCode::METHOD_NOT_ALLOWED),
        Case {
            method: Method::PUT,
            ..get(LIST, "method-not-allowed", StatusCode::METHOD_NOT_ALLOWED)
        },
        Case {
            method: Method::POST,
            ..get(ROW, "method-not-allowed", StatusCode::METHOD_NOT_ALLOWED)
        },
        headed(&[("consistency-policy", "hope")]),
        headed(&[("consistency-policy", "wait;ms=-1")]),
        headed(&[("consistency-policy", "wait"), ("consistency-policy", ",")]),
        post(""),
        post("{"),
        post("[]"),
        post(r#"{"events":[]}"#),
        post(r#"{"events":[{"type":"1x","data":{}}]}"#),
        post(r#"{"events":[{"type":"X","data":{},"more":1}]}"#),
        post(r#"{"events":[{"type":"X","schema_version":0,"data":{}}]}"#),
        post(r#"{"events":[{"type":"X"}]}"#),
        Case {
            headers: &[JSON, ("if-match", "1")],
            ..post(r#"{"events":[{"type":"X","data":{}}]}"#)
        },
        Case {
            headers: &[JSON, ("if-match", "\"1.1\""), ("if-none-match", "*")],
            ..post(r#"{"events":[{"type":"X","data":{}}]}"#)
        },
        Case {
            headers: &[JSON, ("idempotency-key", "")],
            ..post(r#"{"events":[{"type":"X","data":{}}]}"#)
        },
        Case {
            headers: &[("content-type", "text/plain")],
            status: StatusCode::UNSUPPORTED_MEDIA_TYPE,
            problem: "unsupported-media-type",
            ..post("{}")
        },
    ]
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_with_a_problem() {
    let world = World::start().await;
    for gateway in [&world.primary, &world.region] {
        for case in &cases() {
            let mut request = gateway.request(case.method.clone(), case.path).body(case.body);
            for (name, value) in case.headers {
                request = request.header(*name, *value);
            }
            let reply = Reply::of(request).await;
            let said = format!("{} {} {} {reply:?}", case.method, case.path, case.body);
            assert_eq!(reply.status, case.status.as_u16(), "{said}");
            assert_eq!(reply.problem(), case.problem, "{said}");
            assert_eq!(reply.header("cache-control"), "no-store", "{said}");
            assert_eq!(reply.body["status"], case.status.as_u16(), "{said}");
            assert!(reply.body["request_id"].is_string() && reply.body["title"].is_string());
        }
        let allowed = Reply::of(gateway.request(Method::DELETE, EVENTS)).await;
        assert_eq!((allowed.status, allowed.header("allow")), (405, "GET, HEAD, POST"));
    }
}

#[tokio::test]
async fn what_is_too_large_is_refused() {
    let world = World::start().await;
    let event = |bytes: usize| {
        let text = "x".repeat(bytes);
        serde_json::json!({"events": [{"type": "Noted", "data": {"text": text}}]})
    };
    for gateway in [&world.primary, &world.region] {
        for bytes in [600 * 1024, 2 * 1024 * 1024] {
            let reply = gateway.post(EVENTS, event(bytes)).await;
            assert_eq!(reply.came_to(), (413, "too-large"), "{bytes}");
        }
        assert!(gateway.post(EVENTS, event(400 * 1024)).await.status < 300);
        let filled = gateway.request(Method::GET, ROW).header("x-filling", "x".repeat(40 * 1024));
        assert_eq!(Reply::of(filled).await.came_to(), (400, "bad-request"));
    }
}

fn with_headers(gateway: &Gateway, count: usize) -> RequestBuilder {
    let numbers = 0..count;
    numbers.fold(gateway.request(Method::GET, LIST), |request, nth| {
        request.header(format!("x-{nth}"), "1")
    })
}

#[tokio::test]
async fn as_many_headers_are_taken_as_configured_and_further_ones_refused_in_our_words() {
    let world = World::with("listen.limits.header_count_max = 200").await;
    // Clients add a few of their own.
    for (gateway, taken, refused) in [(&world.primary, 40, 80), (&world.region, 150, 250)] {
        assert_eq!(Reply::of(with_headers(gateway, taken)).await.status, 200, "{taken}");
        let reply = Reply::of(with_headers(gateway, refused)).await;
        assert_eq!(reply.came_to(), (400, "bad-request"), "{refused}");
    }
}

#[tokio::test]
async fn a_head_request_has_the_headers_of_a_get_and_no_body() {
    let world = World::start().await;
    let reply = Reply::of(world.region.request(Method::HEAD, "/v1/currency")).await;
    assert_eq!((reply.status, reply.text.as_str()), (200, ""));
    assert!(!reply.token().is_empty());
}

#[tokio::test]
async fn a_version_that_an_aggregate_does_not_have_is_a_conflict_and_nothing_to_wait_for() {
    let world = World::start().await;
    world.stock().await;
    world.place("o-1").await;
    for path in ["order-detail/o-1", "order-history/o-1"] {
        for gateway in [&world.region, &world.primary] {
            let reply = gateway.get(&format!("/v1/views/{path}?min_version=2")).await;
            assert_eq!((reply.status, reply.problem()), (412, "version-conflict"), "{path}");
            assert_eq!(reply.body["version"], 1, "{reply:?}");
        }
    }
}

#[tokio::test]
async fn an_aggregate_with_an_event_that_its_rules_refuse_is_parked_and_no_fault_of_ours() {
    let world = World::start().await;
    let event = json!({"events": [{"type": "PriceChanged", "data": {"price_cents": 9}}]});
    assert_eq!(world.region.post("/v1/aggregates/product/p-9/events", event).await.status, 201);
    let state = world.region.get("/v1/aggregates/product/p-9").await;
    assert_eq!((state.status, state.problem()), (503, "parked"), "{state:?}");
    let change = json!({"product_id": "p-9", "price_cents": 10});
    let changed = world.region.command("ChangePrice", change).await;
    assert_eq!((changed.status, changed.problem()), (503, "parked"), "{changed:?}");
}
