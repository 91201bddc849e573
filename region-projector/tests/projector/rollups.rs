//! Rollups of the worked domain: each event counts once, whatever happens to the projector.

use consistency::{Event, Position};
use serde_json::{Value, json};

use crate::world::{World, eventually, stop};

/// What a customer's orders come to: their number and their sum.
async fn of_customer(world: &World, customer: &str) -> Option<(i64, i64)> {
    let sums = "select sum(order_count)::bigint, sum(total_spent_cents)::bigint
                from totals_by_customer_v1_customer_summary where key = $1";
    // The table is not there before the projector has made it.
    let sums: (Option<i64>, Option<i64>) =
        sqlx::query_as(sums).bind(customer).fetch_one(&world.pool).await.ok()?;
    sums.0.zip(sums.1)
}

async fn happen(world: &World, order: &str, event_type: &str, data: &Value) -> Position {
    let event: Event = world.log.append_to("order", order, event_type, &data.to_string());
    world.publish(&event).await;
    event.at.position
}

/// An order of `quantity` pens for 2.50 each, as the first schema has it.
async fn place(world: &World, order: &str, customer: &str, quantity: u32) -> Position {
    let items = json!([{
        "product_id": "pen", "product_name": "Pen", "unit_price_cents": 250, "quantity": quantity
    }]);
    let data = json!({"customer_id": customer, "customer_name": "Somebody", "items": items});
    happen(world, order, "OrderPlaced", &data).await
}

async fn comes_to(world: &World, customer: &str, sums: (i64, i64)) {
    let what = format!("{customer} comes to {sums:?}");
    eventually(&what, async || of_customer(world, customer).await == Some(sums)).await;
}

/// Waits until every partition of every projection has stored a position.
async fn stored(world: &World, position: Position) {
    eventually("the checkpoints are stored", async || {
        let lowest = "select min(position) from checkpoint";
        let lowest: Result<Option<i64>, _> =
            sqlx::query_scalar(lowest).fetch_one(&world.pool).await;
        lowest.ok().flatten() >= Some(position.as_i64())
    })
    .await;
}

#[tokio::test]
async fn orders_of_every_schema_are_summed_once_also_after_restarts() {
    let world = World::start().await;
    let projector = world.projector(orders::domain().unwrap()).await;
    place(&world, "o-1", "ada", 4).await;
    place(&world, "o-2", "ada", 10).await;
    let last = place(&world, "o-3", "bob", 4).await;
    comes_to(&world, "ada", (2, 3_500)).await;
    comes_to(&world, "bob", (1, 1_000)).await;
    stored(&world, last).await;
    stop(projector).await;

    // What the states were is known to the next one, so that it can tell the difference.
    let more = json!({
        "product_id": "pen", "product_name": "Pen", "unit_price_cents": 250, "quantity": 2
    });
    happen(&world, "o-1", "ItemAdded", &more).await;
    happen(&world, "o-2", "OrderCancelled", &json!({})).await;
    let projector = world.projector(orders::domain().unwrap()).await;
    comes_to(&world, "ada", (1, 1_500)).await;
    let last = happen(&world, "o-3", "OrderShipped", &json!({})).await;
    stored(&world, last).await;
    assert_eq!(of_customer(&world, "ada").await, Some((1, 1_500)));
    assert_eq!(of_customer(&world, "bob").await, Some((1, 1_000)));
    let pens = "select sum(quantity)::bigint from totals_by_product_v1_product_stats
                where key = 'pen'";
    assert_eq!(world.count(pens).await, 10);
    let days = "select sum(revenue_cents)::bigint from totals_by_day_v1_sales_by_day";
    assert_eq!(world.count(days).await, 2_500);
    assert_eq!(world.count("select count(*) from parked").await, 0);
    stop(projector).await;
}

#[tokio::test]
async fn an_order_that_does_not_fold_is_parked_and_leaves_the_sums_as_they_are() {
    let world = World::start().await;
    let projector = world.projector(orders::domain().unwrap()).await;
    place(&world, "o-1", "ada", 4).await;
    let too_many = json!({"product_id": "pen", "quantity": 9});
    happen(&world, "o-1", "ItemRemoved", &too_many).await;
    happen(&world, "o-1", "OrderCancelled", &json!({})).await;
    let last = place(&world, "o-2", "ada", 8).await;
    stored(&world, last).await;
    assert_eq!(of_customer(&world, "ada").await, Some((2, 3_000)));
    let parked = "select count(*) from parked where aggregate_id = 'o-1'";
    assert_eq!(world.count(parked).await, 4, "by each of the four projections");
    stop(projector).await;
}

/// When an order was placed.
fn placed_at(world: &World, order: &str) -> i64 {
    let events = world.log.events();
    let first = events.iter().find(|event| event.aggregate.id() == order);
    first.unwrap().committed_at.unix_micros()
}

/// Every sum of every rollup, and the versions that were counted.
async fn all_sums(world: &World) -> Vec<String> {
    let rows = "
        select row_to_json(customer)::text from (
            select key, sum(order_count) as orders, sum(total_spent_cents) as spent,
                max(last_order_placed_at_unix_us) as last
            from totals_by_customer_v1_customer_summary group by key order by key) as customer
        union all select row_to_json(product)::text from (
            select key, sum(order_count) as orders, sum(quantity) as pieces,
                sum(revenue_cents) as revenue
            from totals_by_product_v1_product_stats group by key order by key) as product
        union all select row_to_json(day)::text from (
            select sum(order_count) as orders, sum(revenue_cents) as revenue
            from totals_by_day_v1_sales_by_day) as day";
    sqlx::query_scalar(rows).fetch_all(&world.pool).await.unwrap()
}

#[tokio::test]
async fn orders_that_are_delivered_again_are_counted_once_in_every_rollup() {
    let world = World::start().await;
    let projector = world.projector(orders::domain().unwrap()).await;
    place(&world, "o-1", "ada", 4).await;
    place(&world, "o-2", "bob", 6).await;
    place(&world, "o-3", "ada", 8).await;
    happen(&world, "o-1", "OrderShipped", &json!({})).await;
    let last = happen(&world, "o-3", "OrderCancelled", &json!({})).await;
    stored(&world, last).await;
    let (bob, ada) = (placed_at(&world, "o-2"), placed_at(&world, "o-3"));
    // The last order counts as placed, whatever became of it.
    let expected = [
        json!({"key": "ada", "orders": 1, "spent": 1000, "last": ada}),
        json!({"key": "bob", "orders": 1, "spent": 1500, "last": bob}),
        json!({"key": "pen", "orders": 2, "pieces": 10, "revenue": 2500}),
        json!({"orders": 2, "revenue": 2500}),
    ];
    let sums = async || {
        let sums = all_sums(&world).await;
        sums.iter().map(|row| serde_json::from_str(row).unwrap()).collect::<Vec<Value>>()
    };
    assert_eq!(sums().await, expected);
    stop(projector).await;

    // All of the log comes again, on top of what was made of it.
    let again =
        "update checkpoint set position = 0, event_id = '00000000-0000-0000-0000-000000000000'";
    sqlx::query(again).execute(&world.pool).await.unwrap();
    let projector = world.projector(orders::domain().unwrap()).await;
    stored(&world, last).await;
    assert_eq!(sums().await, expected);
    let duplicates = projector.metrics().render();
    let counted = duplicates.lines().filter(|line| {
        line.starts_with("tidemark_projection_events")
            && line.contains(r#"projection="totals-by-customer""#)
            && line.contains(r#"outcome="duplicate""#)
    });
    let counted = counted.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    assert_eq!(counted.sum::<f64>(), 5.0);
    stop(projector).await;
}
