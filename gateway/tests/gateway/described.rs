//! `GET /openapi.json`: what is answered is what it says.

use jsonschema::Validator;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use crate::world::{CREDENTIAL, Gateway, Reply, World, order};

/// The description of a gateway.
struct Described(Value);

impl Described {
    async fn of(gateway: &Gateway) -> Self {
        let reply = gateway.get("/openapi.json").await;
        assert_eq!((reply.status, reply.header("content-type")), (200, "application/json"));
        Self(reply.body)
    }

    /// The operation that a path is of; of several the one without parameters.
    fn operation(&self, method: &str, path: &str) -> &Value {
        let path = path.split('?').next().unwrap();
        let fits = |pattern: &&String| {
            let (mut wanted, mut given) = (pattern.split('/'), path.split('/'));
            let all = wanted.by_ref().zip(given.by_ref());
            let all = all.into_iter().all(|(part, is)| part.starts_with('{') || part == is);
            all && pattern.split('/').count() == path.split('/').count()
        };
        let paths = self.0["paths"].as_object().unwrap();
        let found = paths.keys().filter(fits).min_by_key(|pattern| pattern.matches('{').count());
        &paths[found.unwrap_or_else(|| panic!("{path} is not described"))][method]
    }

    fn check(&self, method: &str, path: &str, reply: &Reply) {
        let said = format!("{method} {path}: {} {}", reply.status, reply.text);
        let operation = self.operation(method, path);
        let response = &operation["responses"][reply.status.to_string()];
        assert!(response.is_object(), "undocumented: {said}");
        for (name, reference) in response["headers"].as_object().unwrap() {
            let pointer = reference["$ref"].as_str().unwrap().trim_start_matches('#');
            let header = self.0.pointer(pointer).unwrap();
            let there = reply.headers.contains_key(name.as_str());
            assert!(there || header["required"] != true, "{name} is missing: {said}");
        }
        let Some(content) = response["content"].as_object().filter(|content| !content.is_empty())
        else {
            return assert!(reply.text.is_empty(), "{said}");
        };
        let schema = &content[reply.header("content-type")]["schema"];
        let schema = json!({ "allOf": [schema], "components": self.0["components"] });
        let kinds = ["application/json", "application/problem+json"];
        let is_json = kinds.contains(&reply.header("content-type")) && !reply.body.is_null();
        let is = if is_json { reply.body.clone() } else { json!(reply.text) };
        if let Err(error) = Validator::new(&schema).unwrap().validate(&is) {
            panic!("{error} at {}: {said}", error.instance_path());
        }
    }
}

/// Asks, and holds the answer to the description.
async fn ask(gateway: &Gateway, described: &Described, request: RequestBuilder) -> Reply {
    let built = request.try_clone().unwrap().build().unwrap();
    let method = built.method().as_str().to_lowercase();
    let path = built.url().as_str().trim_start_matches(&gateway.base).to_owned();
    let reply = Reply::of(request).await;
    described.check(&method, &path, &reply);
    reply
}

#[tokio::test]
async fn answers_are_as_they_are_described() {
    let mut world = World::start().await;
    let described = Described::of(&world.region).await;
    let get = |path: &str| world.region.request(Method::GET, path);
    let post = |path: &str, body: Value| world.region.request(Method::POST, path).json(&body);
    let done = async |request: RequestBuilder, status: u16| {
        let reply = ask(&world.region, &described, request).await;
        assert_eq!(reply.status, status, "{reply:?}");
        reply
    };
    let command = |name: &str, body| post(&format!("/v1/commands/{name}"), body);
    let product = json!({"product_id": "p-1", "name": "Lamp", "price_cents": 2500});
    done(command("CreateProduct", product.clone()), 201).await;
    done(command("CreateProduct", product), 422).await;
    done(command("RegisterCustomer", json!({"customer_id": "c-1", "name": "Ada"})), 201).await;
    let placed =
        done(command("PlaceOrder", order("o-1")).header("idempotency-key", "k"), 201).await;
    done(command("PlaceOrder", order("o-1")).header("idempotency-key", "k"), 201).await;
    done(command("PlaceOrder", order("o-2")).header("idempotency-key", "k"), 422).await;
    done(command("ShipOrder", json!({"order_id": "o-1"})).header("if-match", "\"1.7\""), 412).await;
    done(command("ShipOrder", json!({"order": "o-1"})), 400).await;
    let plain = world.region.request(Method::POST, "/v1/commands/ShipOrder");
    done(plain.header("content-type", "text/plain").body("{}"), 415).await;
    let appended = json!({"events": [{"type": "PriceChanged", "data": {"price_cents": 9}}]});
    done(post("/v1/aggregates/product/p-1/events", appended.clone()), 200).await;
    done(post("/v1/aggregates/note/n-1/events", appended), 201).await;
    done(post("/v1/aggregates/note/n-1/events", json!({"events": []})), 400).await;
    let state = done(get("/v1/aggregates/order/o-1"), 200).await;
    done(get("/v1/aggregates/order/o-1").header("if-none-match", state.header("etag")), 304).await;
    done(get("/v1/aggregates/order/o-none"), 404).await;
    done(get("/v1/aggregates/order/o-1/events?limit=1"), 200).await;
    done(get("/v1/aggregates/order/o-1/events?limit=0"), 400).await;
    let token = placed.token();
    let view = |path: &str| get(&format!("/v1/views/{path}")).header("consistency-token", &token);
    done(view("order-detail/o-1").header("prefer", "respond-async"), 202).await;
    done(view("order-detail/o-1").header("consistency-policy", "wait;ms=1"), 503).await;
    done(view("order-detail/o-1").header("consistency-policy", "hope"), 400).await;
    done(view("order-detail/o-1"), 200).await;
    done(view("order-history/o-1"), 200).await;
    done(get("/v1/views/order-detail/o-1").header("consistency-token", "none"), 400).await;
    done(get("/v1/currency"), 200).await;
    done(get("/v1/currency?x=1"), 400).await;
    done(get("/v1/currency/events?view=none"), 404).await;
    done(get("/internal/log"), 401).await;
    done(get("/internal/epochs").header("tidemark-credential", CREDENTIAL), 421).await;
    world.catch_up().await;
    let get =
        |path: &str| world.region.request(Method::GET, path).header("consistency-token", &token);
    let ask = async |path: &str, status: u16| {
        let reply = ask(&world.region, &described, get(path)).await;
        assert_eq!(reply.status, status, "{reply:?}");
        reply
    };
    let row = ask("/v1/views/order-detail/o-1", 200).await;
    let again = get("/v1/views/order-detail/o-1").header("if-none-match", row.header("etag"));
    let again = Reply::of(again).await;
    assert_eq!(again.status, 304);
    described.check("get", "/v1/views/order-detail/o-1", &again);
    for found in
        ["orders-by-customer/c-1", "orders-by-status/placed?limit=1", "product-search?q=lamp"]
    {
        let page = ask(&format!("/v1/views/{found}"), 200).await;
        assert_eq!(page.body["items"].as_array().unwrap().len(), 1, "{page:?}");
    }
    ask("/v1/views/customer-summary/nobody", 404).await;
    ask("/v1/views/order-detail/o-none", 404).await;
}

#[tokio::test]
async fn what_the_primary_tells_regions_is_as_it_is_described() {
    let world = World::start().await;
    world.stock().await;
    let described = Described::of(&world.primary).await;
    for path in ["/internal/log", "/internal/log/product/p-1", "/internal/epochs"] {
        let request = world.primary.request(Method::GET, path);
        let request = request.header("tidemark-credential", CREDENTIAL);
        assert_eq!(ask(&world.primary, &described, request).await.status, 200);
    }
}

#[tokio::test]
async fn a_path_takes_the_methods_that_are_described_and_no_others() {
    let world = World::start().await;
    let described = Described::of(&world.region).await;
    for (pattern, operations) in described.0["paths"].as_object().unwrap() {
        let path = pattern.replace("{id}", "x").replace("{key}", "x").replace("{type}", "x");
        let known: Vec<String> =
            operations.as_object().unwrap().keys().map(|key| key.to_uppercase()).collect();
        for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
            if pattern.ends_with("/events") && method == "GET" {
                continue; // It would go on for an hour.
            }
            let request = world.region.request(method.parse().unwrap(), &path);
            let reply = Reply::of(request).await;
            let is_taken = reply.status != 405;
            assert_eq!(is_taken, known.iter().any(|known| known == method), "{method} {path}");
            if !is_taken {
                assert_eq!(reply.header("allow"), known.join(", "), "{method} {path}");
            }
        }
    }
}
