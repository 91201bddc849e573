//! What the views of the projections `orders` and `products` show.

use orders::{OrderDetail, OrderSummary, ProductHit, Status};
use projection::{Applied, StoredState, ViewKind};
use serde_json::json;

use crate::world::{PLACED_AT, World, aggregate};

fn apply(world: &World, before: StoredState) -> Applied {
    let of = aggregate("order", "o-1");
    let history = world.history(&of);
    let document = world.domain.projection("orders", 1).unwrap().document().unwrap();
    document.apply(&of, before, &history.iter().collect::<Vec<_>>())
}

#[test]
fn an_order_is_in_three_views() {
    let world = World::with_order();
    let definition = world.domain.projection("orders", 1).unwrap();
    let views: Vec<_> =
        definition.views().iter().map(|view| (view.name().as_str(), view.kind())).collect();
    let expected = [
        ("order-detail", ViewKind::Row),
        ("orders-by-customer", ViewKind::List),
        ("orders-by-status", ViewKind::List),
    ];
    assert_eq!(views, expected);
    assert_eq!(definition.partition_count().get(), 8);

    let rows = apply(&world, StoredState::NOTHING).upserts;
    let keys: Vec<_> = rows.iter().map(|row| (row.key.view_index(), row.key.list_key())).collect();
    assert_eq!(keys, [(0, None), (1, Some("ada")), (2, Some("placed"))]);
    let detail: OrderDetail = serde_json::from_str(&rows[0].data).unwrap();
    assert_eq!((detail.order_id.as_str(), detail.total_cents), ("o-1", 19_000));
    assert_eq!((detail.items.len(), detail.placed_at_unix_us), (2, PLACED_AT));
    for row in &rows[1..] {
        let summary: OrderSummary = serde_json::from_str(&row.data).unwrap();
        assert_eq!((summary.item_count, summary.total_cents), (2, 19_000));
        assert_eq!(
            (summary.customer_name.as_str(), summary.status),
            ("Ada Lovelace", Status::Placed)
        );
    }
}

#[test]
fn a_product_is_found_at_its_newest_price() {
    let mut world = World::furnished();
    let lamp = json!({
        "product_id": "lamp", "name": "Lamp", "price_cents": 2_500, "category": "light"
    });
    world.does("CreateProduct", lamp);
    world.does("ChangePrice", json!({"product_id": "lamp", "price_cents": 3_000}));
    let products = world.domain.projection("products", 1).unwrap().document().unwrap();
    let hit = |id: &str| -> ProductHit {
        let of = aggregate("product", id);
        let history = world.history(&of);
        let applied =
            products.apply(&of, StoredState::NOTHING, &history.iter().collect::<Vec<_>>());
        serde_json::from_str(&applied.upserts[0].data).unwrap()
    };
    let expected = ProductHit {
        product_id: "lamp".to_owned(),
        name: "Lamp".to_owned(),
        price_cents: 3_000,
        category: Some("light".to_owned()),
    };
    assert_eq!(hit("lamp"), expected);
    assert_eq!(hit("pen").category, None, "as products were before there were categories");
    let blank = json!({"product_id": "x", "name": "X", "price_cents": 5, "category": " "});
    assert_eq!(world.refuses("CreateProduct", blank), "name-bounds");
}

#[test]
fn an_order_moves_to_the_list_of_its_status() {
    let mut world = World::with_order();
    let placed = apply(&world, StoredState::NOTHING).after;
    world.does("ShipOrder", json!({"order_id": "o-1"}));
    let shipped = apply(&world, placed);
    let deleted: Vec<_> =
        shipped.deletes.iter().map(|key| (key.view_index(), key.list_key())).collect();
    assert_eq!(deleted, [(2, Some("placed"))]);
    let written: Vec<_> =
        shipped.upserts.iter().map(|row| (row.key.view_index(), row.key.list_key())).collect();
    assert_eq!(written, [(0, None), (1, Some("ada")), (2, Some("shipped"))]);
    for status in [Status::Placed, Status::Shipped, Status::Delivered, Status::Cancelled] {
        assert_eq!(json!(status), json!(status.as_str()), "a list's key is the status in JSON");
    }
}
