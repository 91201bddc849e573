//! Every rule, and its name.

use orders::{
    ITEM_COUNT_MAX, NAME_BYTES_MAX, PRICE_CENTS_MAX, QUANTITY_MAX, REASON_BYTES_MAX, Status,
};
use serde_json::{Value, json};

use crate::world::{Refused, World};

fn place(items: Value) -> Value {
    json!({"order_id": "o-2", "customer_id": "ada", "items": items})
}

fn item(product_id: &str, quantity: i64) -> Value {
    json!({"order_id": "o-1", "product_id": product_id, "quantity": quantity})
}

fn order() -> Value {
    json!({"order_id": "o-1"})
}

#[test]
fn an_order_carries_names_and_prices_as_they_were() {
    let mut world = World::with_order();
    world.does("RenameCustomer", json!({"customer_id": "ada", "name": "Ada King"}));
    world.does("ChangePrice", json!({"product_id": "pen", "price_cents": 999}));
    let order = world.order();
    assert_eq!(order.customer_name, "Ada Lovelace");
    assert_eq!(order.line("pen").unwrap().unit_price_cents, 250);
    assert_eq!(order.line("desk").unwrap().product_name, "Desk");
    assert_eq!(order.total_cents(), Some(19_000));

    world.does("AddItem", item("pen", 2));
    let pens = world.order().line("pen").unwrap().clone();
    assert_eq!((pens.quantity, pens.unit_price_cents), (6, 250), "one price in one order");
    world.does("PlaceOrder", place(json!([{"product_id": "pen", "quantity": 2}])));
    let second: orders::Order = world.state("order", "o-2").unwrap();
    assert_eq!(second.customer_name, "Ada King");
    assert_eq!(second.total_cents(), Some(1_998));
}

#[test]
fn an_event_is_written_with_its_fields_in_order() {
    let world = World::with_order();
    let placed = world.log.last().unwrap();
    assert_eq!(placed.event_type.as_str(), "OrderPlaced");
    assert_eq!(
        placed.data,
        r#"{"customer_id":"ada","customer_name":"Ada Lovelace","currency":"EUR","total_cents":19000,"items":[{"product_id":"pen","product_name":"Pen","unit_price_cents":250,"quantity":4},{"product_id":"desk","product_name":"Desk","unit_price_cents":18000,"quantity":1}]}"#
    );
}

#[test]
fn an_order_has_at_least_one_item() {
    let mut world = World::furnished();
    assert_eq!(world.refuses("PlaceOrder", place(json!([]))), "order-has-items");
    world.does("PlaceOrder", place(json!([{"product_id": "desk", "quantity": 1}])));
    let last = json!({"order_id": "o-2", "product_id": "desk", "quantity": 1});
    assert_eq!(world.refuses("RemoveItem", last), "order-has-items");
}

#[test]
fn quantities_are_above_zero_and_bounded() {
    let mut world = World::with_order();
    for quantity in [0, -1, i64::MIN] {
        let items = json!([{"product_id": "desk", "quantity": quantity}]);
        assert_eq!(world.refuses("PlaceOrder", place(items)), "quantity-above-zero");
        assert_eq!(world.refuses("AddItem", item("desk", quantity)), "quantity-above-zero");
        assert_eq!(world.refuses("RemoveItem", item("desk", quantity)), "quantity-above-zero");
    }
    let most = i64::from(QUANTITY_MAX);
    for quantity in [most + 1, i64::MAX] {
        let items = json!([{"product_id": "clip", "quantity": quantity}]);
        assert_eq!(world.refuses("PlaceOrder", place(items)), "quantity-maximum");
        assert_eq!(world.refuses("AddItem", item("clip", quantity)), "quantity-maximum");
    }
    assert_eq!(world.refuses("AddItem", item("pen", most)), "quantity-maximum", "four are there");
    world.does("AddItem", item("pen", most - 4));
}

#[test]
fn the_total_is_at_least_ten() {
    let mut world = World::furnished();
    let of = |pens: i64, clips: i64| {
        place(
            json!([{"product_id": "pen", "quantity": pens}, {"product_id": "clip", "quantity": clips}]),
        )
    };
    assert_eq!(world.refuses("PlaceOrder", of(3, 249)), "order-total-minimum");
    world.does("PlaceOrder", of(3, 250));
    let one_less = json!({"order_id": "o-2", "product_id": "clip", "quantity": 1});
    assert_eq!(world.refuses("RemoveItem", one_less), "order-total-minimum");
}

#[test]
fn an_order_has_a_bounded_number_of_products() {
    let mut world = World::furnished();
    let mut items = Vec::new();
    for number in 0..=ITEM_COUNT_MAX {
        let product_id = format!("p-{number}");
        let product = json!({"product_id": product_id, "name": "Part", "price_cents": 5_000});
        world.does("CreateProduct", product);
        items.push(json!({"product_id": product_id, "quantity": 1}));
    }
    assert_eq!(world.refuses("PlaceOrder", place(json!(items))), "item-count-maximum");
    let last = items.pop().unwrap();
    world.does("PlaceOrder", place(json!(items)));
    let more = json!({"order_id": "o-2", "product_id": last["product_id"], "quantity": 1});
    assert_eq!(world.refuses("AddItem", more), "item-count-maximum");
    world.does("AddItem", json!({"order_id": "o-2", "product_id": "p-0", "quantity": 1}));
}

#[test]
fn the_same_product_twice_counts_together() {
    let mut world = World::furnished();
    let pens = json!({"product_id": "pen", "quantity": 2});
    world.does("PlaceOrder", place(json!([pens, pens])));
    let order: orders::Order = world.state("order", "o-2").unwrap();
    assert_eq!((order.items.len(), order.items[0].quantity), (1, 4));
}

#[test]
fn orders_customers_and_products_must_exist() {
    let mut world = World::with_order();
    let nobody = json!({"order_id": "o-2", "customer_id": "eve", "items": [{"product_id": "desk", "quantity": 1}]});
    assert_eq!(world.refuses("PlaceOrder", nobody), "customer-exists");
    let nothing = json!([{"product_id": "ufo", "quantity": 1}]);
    assert_eq!(world.refuses("PlaceOrder", place(nothing)), "product-exists");
    assert_eq!(world.refuses("AddItem", item("ufo", 1)), "product-exists");
    let renamed = json!({"customer_id": "eve", "name": "Eve"});
    assert_eq!(world.refuses("RenameCustomer", renamed), "customer-exists");
    let priced = json!({"product_id": "ufo", "price_cents": 5});
    assert_eq!(world.refuses("ChangePrice", priced), "product-exists");
    for command in ["ShipOrder", "DeliverOrder", "CancelOrder"] {
        assert_eq!(world.refuses(command, json!({"order_id": "o-9"})), "order-exists");
    }
    for command in ["AddItem", "RemoveItem"] {
        let input = json!({"order_id": "o-9", "product_id": "desk", "quantity": 1});
        assert_eq!(world.refuses(command, input), "order-exists");
    }
}

#[test]
fn nothing_is_made_twice() {
    let mut world = World::with_order();
    let again = json!({"order_id": "o-1", "customer_id": "ada", "items": [{"product_id": "desk", "quantity": 1}]});
    assert_eq!(world.refuses("PlaceOrder", again), "order-is-new");
    let ada = json!({"customer_id": "ada", "name": "Ada"});
    assert_eq!(world.refuses("RegisterCustomer", ada), "customer-is-new");
    let pen = json!({"product_id": "pen", "name": "Pen", "price_cents": 1});
    assert_eq!(world.refuses("CreateProduct", pen), "product-is-new");
}

#[test]
fn only_what_is_in_an_order_is_removed() {
    let mut world = World::with_order();
    assert_eq!(world.refuses("RemoveItem", item("clip", 1)), "item-in-order");
    assert_eq!(world.refuses("RemoveItem", item("pen", 5)), "item-in-order");
    world.does("RemoveItem", item("pen", 1));
    assert_eq!(world.order().line("pen").unwrap().quantity, 3);
    world.does("RemoveItem", item("pen", 3));
    assert_eq!(world.order().line("pen"), None);
}

/// A placed order brought further by `commands`.
fn brought(commands: &[&str]) -> World {
    let mut world = World::with_order();
    for command in commands {
        world.does(command, order());
    }
    world
}

#[test]
fn only_a_placed_order_is_changed_or_shipped() {
    let further: [&[&str]; 3] = [&["ShipOrder"], &["ShipOrder", "DeliverOrder"], &["CancelOrder"]];
    for commands in further {
        let mut world = brought(commands);
        assert_eq!(world.refuses("AddItem", item("desk", 1)), "order-is-placed", "{commands:?}");
        assert_eq!(world.refuses("RemoveItem", item("pen", 1)), "order-is-placed");
        assert_eq!(world.refuses("ShipOrder", order()), "order-is-placed");
    }
    assert_eq!(brought(&["ShipOrder"]).order().status, Status::Shipped);
}

#[test]
fn only_a_shipped_order_is_delivered() {
    for commands in [[].as_slice(), &["CancelOrder"], &["ShipOrder", "DeliverOrder"]] {
        let mut world = brought(commands);
        assert_eq!(world.refuses("DeliverOrder", order()), "order-is-shipped", "{commands:?}");
    }
    assert_eq!(brought(&["ShipOrder", "DeliverOrder"]).order().status, Status::Delivered);
}

#[test]
fn a_shipped_order_cannot_be_cancelled() {
    for commands in [["ShipOrder"].as_slice(), &["ShipOrder", "DeliverOrder"]] {
        let rule = brought(commands).refuses("CancelOrder", order());
        assert_eq!(rule, "shipped-order-cannot-be-cancelled");
    }
    let mut world = brought(&["CancelOrder"]);
    assert_eq!(world.order().status, Status::Cancelled);
    assert_eq!(world.refuses("CancelOrder", order()), "order-is-placed", "once is enough");
}

#[test]
fn prices_names_and_reasons_are_bounded() {
    let mut world = World::with_order();
    let most = i64::try_from(PRICE_CENTS_MAX).unwrap();
    for price_cents in [0, -5, most + 1] {
        let product = json!({"product_id": "p", "name": "P", "price_cents": price_cents});
        assert_eq!(world.refuses("CreateProduct", product), "price-bounds");
        let price = json!({"product_id": "pen", "price_cents": price_cents});
        assert_eq!(world.refuses("ChangePrice", price), "price-bounds");
    }
    for name in ["", "  ", "a\nb", &"x".repeat(NAME_BYTES_MAX + 1)] {
        let product = json!({"product_id": "p", "name": name, "price_cents": 5});
        assert_eq!(world.refuses("CreateProduct", product), "name-bounds");
        let customer = json!({"customer_id": "bob", "name": name});
        assert_eq!(world.refuses("RegisterCustomer", customer), "name-bounds");
        let renamed = json!({"customer_id": "ada", "name": name});
        assert_eq!(world.refuses("RenameCustomer", renamed), "name-bounds");
    }
    let long = json!({"order_id": "o-1", "reason": "x".repeat(REASON_BYTES_MAX + 1)});
    assert_eq!(world.refuses("CancelOrder", long), "reason-bounds");
    let fits = json!({"order_id": "o-1", "reason": "x".repeat(REASON_BYTES_MAX)});
    assert_eq!(world.does("CancelOrder", fits), ["OrderCancelled"]);
}

#[test]
fn malformed_input_is_refused_before_any_rule() {
    let mut world = World::with_order();
    let inputs = [
        ("ShipOrder", json!({})),
        ("ShipOrder", json!({"order_id": 7})),
        ("ShipOrder", json!({"order_id": ""})),
        ("ShipOrder", json!({"order_id": "a/b"})),
        ("ShipOrder", json!({"order_id": "x".repeat(129)})),
        ("ShipOrder", json!({"order_id": "o-1", "carrier": "dhl"})),
        ("AddItem", item("a b", 1)),
        ("AddItem", json!({"order_id": "o-1", "product_id": "pen", "quantity": 1.5})),
        ("PlaceOrder", place(json!([{"product_id": "pen", "quantity": 4, "price_cents": 1}]))),
        ("PlaceOrder", place(json!("pen"))),
        ("ChangePrice", json!({"product_id": "pen", "price_cents": "5"})),
    ];
    for (command, input) in inputs {
        assert_eq!(world.run(command, &input), Err(Refused::Malformed), "{command} {input}");
    }
}
