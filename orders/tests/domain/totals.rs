//! What the rollups come to.

use std::collections::BTreeMap;

use consistency::Event;
use projection::{ProjectionKind, RollupDefinition, StoredState, ViewKind};
use serde_json::{Value, json};

use crate::world::{World, aggregate};

fn rollup(world: &World, view: &str) -> RollupDefinition {
    let (definition, view) = world.domain.view(view).unwrap();
    assert_eq!(view.kind(), ViewKind::Rollup);
    match definition.kind() {
        ProjectionKind::Rollup(rollup) => rollup.clone(),
        ProjectionKind::Document(_) | ProjectionKind::Custom(_) => panic!("a rollup"),
    }
}

/// The rows of a rollup view after the whole log.
pub fn rows(world: &World, view: &str) -> BTreeMap<String, Value> {
    let rollup = rollup(world, view);
    let names: Vec<_> = rollup.column_names().collect();
    let mut deltas = Vec::new();
    let mut ids: Vec<&str> = Vec::new();
    for event in world.log.iter().filter(|event| event.aggregate.kind().as_str() == "order") {
        if !ids.contains(&event.aggregate.id()) {
            ids.push(event.aggregate.id());
        }
    }
    for id in ids {
        let history = world.history(&aggregate("order", id));
        let events: Vec<&Event> = history.iter().collect();
        let counted = rollup.count(&StoredState::NOTHING, &events);
        assert!(counted.error.is_none(), "{:?}", counted.error);
        deltas.extend(counted.deltas);
    }
    let changes = rollup.gather(0, deltas.iter().map(|(at, delta)| (*at, delta))).unwrap();
    let row = |at: usize| -> Value {
        let column =
            |(name, values): (&&str, &Vec<Option<i64>>)| ((*name).to_owned(), json!(values[at]));
        Value::Object(names.iter().zip(&changes.columns).map(column).collect())
    };
    changes.keys.iter().cloned().enumerate().map(|(at, key)| (key, row(at))).collect()
}

/// Two orders of `ada` and one of `bob`, none of them as it was placed.
fn busy() -> World {
    let mut world = World::with_order();
    world.does("RegisterCustomer", json!({"customer_id": "bob", "name": "Bob"}));
    let place = |id: &str, customer: &str, product: &str, quantity: i64| {
        let items = json!([{"product_id": product, "quantity": quantity}]);
        json!({"order_id": id, "customer_id": customer, "items": items})
    };
    let item = |id: &str, product: &str, quantity: i64| json!({"order_id": id, "product_id": product, "quantity": quantity});
    world.does("PlaceOrder", place("o-2", "ada", "desk", 1));
    world.does("PlaceOrder", place("o-3", "bob", "pen", 10));
    world.does("RemoveItem", item("o-1", "pen", 1));
    world.does("AddItem", item("o-3", "desk", 1));
    world.does("CancelOrder", json!({"order_id": "o-2"}));
    world.does("ShipOrder", json!({"order_id": "o-1"}));
    world
}

#[test]
fn a_customer_has_spent_what_the_orders_cost_that_stand() {
    let rows = rows(&busy(), "customer-summary");
    let summary = |order_count: i64, total_spent_cents: i64| {
        json!({
            "order_count": order_count,
            "total_spent_cents": total_spent_cents,
            "last_order_placed_at_unix_us": crate::world::PLACED_AT,
        })
    };
    assert_eq!(rows["ada"], summary(1, 18_750));
    assert_eq!(rows["bob"], summary(1, 20_500));
    assert_eq!(rows.len(), 2);
}

#[test]
fn a_product_is_counted_as_often_as_it_is_in_an_order_that_stands() {
    let rows = rows(&busy(), "product-stats");
    let stats = |order_count: i64, quantity: i64, revenue_cents: i64| {
        json!({
            "order_count": order_count, "quantity": quantity, "revenue_cents": revenue_cents
        })
    };
    assert_eq!(rows["pen"], stats(2, 13, 3_250));
    assert_eq!(rows["desk"], stats(2, 2, 36_000));
}

#[test]
fn a_day_sells_what_was_placed_on_it() {
    let mut world = busy();
    let microseconds_a_day = 86_400_000_000;
    let at = |world: &mut World, id: &str, offset: i64| {
        for event in world.log.iter_mut().filter(|event| event.aggregate.id() == id) {
            let placed_at = crate::world::PLACED_AT + offset;
            event.committed_at = consistency::CommittedAt::from_unix_micros(placed_at);
        }
    };
    at(&mut world, "o-3", 106 * microseconds_a_day);
    let rows = rows(&world, "sales-by-day");
    assert_eq!(rows["2023-11-14"], json!({"order_count": 1, "revenue_cents": 18_750}));
    assert_eq!(rows["2024-02-28"], json!({"order_count": 1, "revenue_cents": 20_500}));
    at(&mut world, "o-3", 107 * microseconds_a_day);
    assert!(self::rows(&world, "sales-by-day").contains_key("2024-02-29"));
    at(&mut world, "o-3", -1_700_000_000_000_001);
    assert!(self::rows(&world, "sales-by-day").contains_key("1969-12-31"));
}
