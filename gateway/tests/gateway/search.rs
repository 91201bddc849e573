//! Searches: what is found, page by page, and never an older world than the caller's.

use serde_json::{Value, json};

use crate::world::World;

/// Five products, the last of them without a category. The token of the last.
async fn stock(world: &World) -> String {
    let mut token = String::new();
    for (id, name, price_cents, category) in [
        ("p-1", "Desk lamp, green", 2_500, Some("light")),
        ("p-2", "Floor lamp", 9_000, Some("light")),
        ("p-3", "Standing desk", 40_000, Some("furniture")),
        ("p-4", "Lamp oil", 900, Some("supplies")),
        ("p-5", "Candle & holder", 700, None),
    ] {
        let mut product = json!({"product_id": id, "name": name, "price_cents": price_cents});
        if let Some(category) = category {
            product["category"] = category.into();
        }
        let done = world.primary.command("CreateProduct", product).await;
        assert_eq!(done.status, 201, "{done:?}");
        token = done.token();
    }
    token
}

fn keys(body: &Value) -> Vec<&str> {
    let items = body["items"].as_array().unwrap();
    items.iter().map(|item| item["key"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn products_are_found_by_words_price_and_category() {
    let mut world = World::start().await;
    let token = stock(&world).await;
    world.catch_up().await;
    let cases: [(&str, &[&str]); 11] = [
        ("", &["p-1", "p-2", "p-3", "p-4", "p-5"]),
        ("?q=lamp", &["p-1", "p-2", "p-4"]),
        ("?q=LAMP+green", &["p-1"]),
        ("?q=lamp+-floor", &["p-1", "p-4"]),
        ("?q=desk+or+candle", &["p-1", "p-3", "p-5"]),
        ("?q=light", &["p-1", "p-2"]),
        ("?category=light&price_cents_max=5000", &["p-1"]),
        ("?price_cents_min=2500&price_cents_max=9000", &["p-1", "p-2"]),
        ("?q=lamp&price_cents_min=2501", &["p-2"]),
        ("?q=sofa", &[]),
        ("?q=%27%29%3B+drop+table+checkpoint%3B--", &[]),
    ];
    for (query, found) in cases {
        let path = format!("/v1/views/product-search{query}");
        let read = world.region.read(&path, &token, "wait;ms=5000").await;
        assert_eq!(read.status, 200, "{query}: {read:?}");
        assert_eq!(keys(&read.body), found, "{query}");
    }
    let read = world.region.get("/v1/views/product-search?q=oil").await;
    let hit = json!({
        "product_id": "p-4", "name": "Lamp oil", "price_cents": 900, "category": "supplies"
    });
    assert_eq!(read.body["items"][0], json!({"key": "p-4", "version": 1, "data": hit}));
}

#[tokio::test]
async fn pages_of_a_search_follow_each_other() {
    let mut world = World::start().await;
    stock(&world).await;
    world.catch_up().await;
    let first = world.region.get("/v1/views/product-search?q=lamp&limit=2").await;
    assert_eq!(keys(&first.body), ["p-1", "p-2"]);
    let cursor = first.body["next_cursor"].as_str().unwrap();
    let path = format!("/v1/views/product-search?q=lamp&limit=2&cursor={cursor}");
    let second = world.region.get(&path).await;
    assert_eq!((keys(&second.body), &second.body["next_cursor"]), (vec!["p-4"], &Value::Null));
}

#[tokio::test]
async fn a_search_shows_what_its_caller_has_written_or_asks_the_primary() {
    let mut world = World::start().await;
    stock(&world).await;
    world.catch_up().await;
    let price = json!({"product_id": "p-4", "price_cents": 1_900});
    let token = world.primary.command("ChangePrice", price).await.token();
    world.catch_up_primary().await;
    const CHEAP: &str = "/v1/views/product-search?q=lamp&price_cents_max=2000";
    let old = world.region.read(CHEAP, &token, "eventual").await;
    assert_eq!(old.came_to(), (200, "stale"));
    assert_eq!(old.body["items"][0]["data"]["price_cents"], 900);
    let refused = world.region.read(CHEAP, &token, "wait;ms=20").await;
    assert_eq!(refused.came_to(), (503, "replication-pending"));
    let forwarded = world.region.read(CHEAP, &token, "forward").await;
    assert_eq!(forwarded.came_to(), (200, "forwarded"));
    assert_eq!(forwarded.body["items"][0]["data"]["price_cents"], 1_900);
    assert_eq!(forwarded.body["items"][0]["version"], 2);
    world.catch_up().await;
    let read = world.region.read(CHEAP, &token, "wait;ms=5000").await;
    assert_eq!(read.body["items"], forwarded.body["items"]);
}

#[tokio::test]
async fn what_cannot_be_searched_for_is_refused() {
    let world = World::start().await;
    let long = format!("/v1/views/product-search?q={}", "x".repeat(257));
    for path in [
        "/v1/views/product-search/p-1",
        "/v1/views/order-detail",
        "/v1/views/orders-by-customer",
        "/v1/views/customer-summary",
        "/v1/views/product-search?colour=red",
        "/v1/views/product-search?price_cents_min=cheap",
        "/v1/views/product-search?price_cents_max=99999999999999999999",
        "/v1/views/product-search?q=%00",
        "/v1/views/product-search?cursor=zzz",
        "/v1/views/product-search?limit=0",
        long.as_str(),
    ] {
        assert_eq!(world.region.get(path).await.came_to(), (400, "bad-request"), "{path}");
    }
    assert_eq!(world.region.get("/v1/views/sofas?q=x").await.came_to(), (404, "unknown-view"));
}
