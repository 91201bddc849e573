//! Whatever is commanded, in whatever order.

use std::collections::BTreeMap;

use consistency::Event;
use orders::{Order, Status};
use projection::{Row, RowKey, StoredState};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::totals;
use crate::world::{World, aggregate};

fn any_order_id() -> impl Strategy<Value = &'static str> {
    prop_oneof![4 => Just("o-1"), 1 => Just("o-2")]
}

fn any_product_id() -> impl Strategy<Value = &'static str> {
    prop_oneof![Just("pen"), Just("desk"), Just("clip"), Just("ufo")]
}

fn any_quantity() -> impl Strategy<Value = i64> {
    prop_oneof![6 => 1_i64..6, 2 => 100_i64..2_000, 1 => -2_i64..1, 1 => 9_990_i64..10_002]
}

fn any_item() -> impl Strategy<Value = (&'static str, i64)> {
    (any_product_id(), any_quantity())
}

fn any_command() -> impl Strategy<Value = (&'static str, Value)> {
    let placed =
        (any_order_id(), prop::collection::vec(any_item(), 0..4)).prop_map(|(id, items)| {
            let item =
                |(product_id, quantity)| json!({"product_id": product_id, "quantity": quantity});
            let items: Vec<Value> = items.into_iter().map(item).collect();
            ("PlaceOrder", json!({"order_id": id, "customer_id": "ada", "items": items}))
        });
    let item = |command| {
        (any_order_id(), any_item()).prop_map(move |(id, (product_id, quantity))| {
            let input = json!({"order_id": id, "product_id": product_id, "quantity": quantity});
            (command, input)
        })
    };
    let plain = |command| any_order_id().prop_map(move |id| (command, json!({ "order_id": id })));
    let price = (any_product_id(), 1_i64..30_000).prop_map(|(product_id, price_cents)| {
        ("ChangePrice", json!({"product_id": product_id, "price_cents": price_cents}))
    });
    let name = any_quantity().prop_map(|number| {
        ("RenameCustomer", json!({"customer_id": "ada", "name": format!("Ada {number}")}))
    });
    prop_oneof![
        5 => placed,
        6 => item("AddItem"),
        6 => item("RemoveItem"),
        1 => plain("ShipOrder"),
        1 => plain("DeliverOrder"),
        1 => plain("CancelOrder"),
        2 => price,
        1 => name,
    ]
}

fn may_become(before: Option<Status>, after: Status) -> bool {
    let steps: &[Status] = match before {
        None => &[Status::Placed],
        Some(Status::Placed) => &[Status::Placed, Status::Shipped, Status::Cancelled],
        Some(Status::Shipped) => &[Status::Shipped, Status::Delivered],
        Some(Status::Delivered) => &[Status::Delivered],
        Some(Status::Cancelled) => &[Status::Cancelled],
    };
    steps.contains(&after)
}

fn check(before: Option<&Order>, after: &Order) {
    assert!(!after.items.is_empty());
    assert!(after.items.iter().all(|line| (1..=10_000).contains(&line.quantity)));
    assert!(after.total_cents().unwrap() >= 1_000);
    let mut products: Vec<_> = after.items.iter().map(|line| &line.product_id).collect();
    products.sort();
    products.dedup();
    assert_eq!(products.len(), after.items.len(), "one line for each product");
    assert!(may_become(before.map(|order| order.status), after.status));
    if let Some(before) = before.filter(|order| order.status != Status::Placed) {
        assert_eq!((&before.items, &before.customer_id), (&after.items, &after.customer_id));
    }
}

/// The rows of an order as a projector leaves them that takes `batch` events at a time.
fn projected(world: &World, history: &[Event], batch: usize) -> BTreeMap<RowKey, String> {
    let document = world.domain.projection("orders", 1).unwrap().document().unwrap();
    let mut rows = BTreeMap::new();
    let mut state = StoredState::NOTHING;
    for events in history.chunks(batch) {
        let events: Vec<&Event> = events.iter().collect();
        let applied = document.apply(&events[0].aggregate, state, &events);
        assert!(applied.stop.is_none(), "{:?}", applied.stop);
        for key in &applied.deletes {
            assert!(rows.remove(key).is_some());
        }
        rows.extend(applied.upserts.into_iter().map(|Row { key, data }| (key, data)));
        state = applied.after;
    }
    rows
}

proptest! {
    #[test]
    fn no_sequence_of_commands_breaks_an_order(
        commands in prop::collection::vec(any_command(), 1..60),
        batch in 1_usize..8,
    ) {
        let mut world = World::furnished();
        for (command, input) in &commands {
            let before: [Option<Order>; 2] = ["o-1", "o-2"].map(|id| world.state("order", id));
            let events = world.log.len();
            let ran = world.run(command, input);
            prop_assert_eq!(world.log.len() - events, ran.map_or(0, |types| types.len()));
            for (id, before) in ["o-1", "o-2"].into_iter().zip(before) {
                if let Some(after) = world.state::<Order>("order", id) {
                    check(before.as_ref(), &after);
                }
            }
        }
        for id in ["o-1", "o-2"] {
            let of = aggregate("order", id);
            let replayed = world.replayed(&of);
            let state = world.state::<Order>("order", id);
            prop_assert_eq!(replayed.state(), state.as_ref());
            let history = world.history(&of);
            let rows = projected(&world, &history, batch);
            prop_assert_eq!(&rows, &projected(&world, &history, history.len().max(1)));
            prop_assert_eq!(rows.len(), if replayed.exists() { 3 } else { 0 });
        }
        let customers = totals::rows(&world, "customer-summary");
        let orders = ["o-1", "o-2"].map(|id| world.state::<Order>("order", id));
        let stands = |order: &&Order| order.status != Status::Cancelled;
        let standing: Vec<&Order> = orders.iter().flatten().filter(stands).collect();
        let spent: u64 = standing.iter().map(|order| order.total_cents().unwrap()).sum();
        let ada = customers.get("ada").cloned().unwrap_or_default();
        prop_assert_eq!(ada["order_count"].as_u64().unwrap_or(0), standing.len() as u64);
        prop_assert_eq!(ada["total_spent_cents"].as_u64().unwrap_or(0), spent);
        let products = totals::rows(&world, "product-stats");
        for id in ["pen", "desk", "clip"] {
            let line = |order: &&Order| order.line(id).map(|line| u64::from(line.quantity));
            let sold: u64 = standing.iter().filter_map(line).sum();
            let counted = products.get(id).and_then(|row| row["quantity"].as_u64());
            prop_assert_eq!(counted.unwrap_or(0), sold);
        }
    }
}
