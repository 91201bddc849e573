//! Rows that are found by what is in them.

use serde_json::{Value, json};

use crate::world::{World, eventually, stop};

async fn happen(world: &World, product: &str, event_type: &str, data: &Value) {
    let event = world.log.append_to("product", product, event_type, &data.to_string());
    world.publish(&event).await;
}

/// Ids of what has all these words, by price.
async fn found(world: &World, words: &str) -> Vec<(String, i64)> {
    let found = "select aggregate_id, number from products_v1_product_search
                 where words @@ websearch_to_tsquery('simple', $1) order by number";
    // The table is not there before the projector has made it.
    sqlx::query_as(found).bind(words).fetch_all(&world.pool).await.unwrap_or_default()
}

#[tokio::test]
async fn a_row_is_found_by_its_words_and_a_number_no_column_holds_parks_it() {
    let world = World::start().await;
    let projector = world.projector(orders::domain().unwrap()).await;
    let lamp = |price: u64| json!({"name": "Desk lamp", "price_cents": price});
    happen(&world, "p-1", "ProductCreated", &lamp(2_500)).await;
    happen(&world, "p-2", "ProductCreated", &lamp(u64::MAX)).await;
    happen(&world, "p-3", "ProductCreated", &lamp(1_500)).await;
    let both = [("p-3".to_owned(), 1_500), ("p-1".to_owned(), 2_500)];
    eventually("both are found", async || found(&world, "lamp").await == both).await;
    happen(&world, "p-1", "PriceChanged", &json!({"price_cents": 900})).await;
    let turned = [("p-1".to_owned(), 900), ("p-3".to_owned(), 1_500)];
    eventually("the price has changed", async || found(&world, "DESK lamp").await == turned).await;
    assert!(found(&world, "sofa").await.is_empty());
    let parked = "select count(*) from parked where projection = 'products'
                  and aggregate_id = 'p-2'";
    eventually("the other is parked", async || world.count(parked).await == 1).await;
    stop(projector).await;
}
