//! Events of every schema that was ever written are understood as the newest. The files in
//! `tests/golden` are what logs hold: they are added to and never changed.

use consistency::{Event, Name, SchemaVersion};
use projection::Folded;
use serde_json::{Value, json};

use crate::world::{World, aggregate};

const VERSIONS: [&str; 3] = [
    include_str!("../golden/order-placed-v1.json"),
    include_str!("../golden/order-placed-v2.json"),
    include_str!("../golden/order-placed-v3.json"),
];
const STATE: &str = include_str!("../golden/order-placed-state.json");

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// The first event of order `o-1`, as a log holds it.
fn stored(event_type: &str, schema_version: u64, data: &Value) -> Event {
    let mut event = World::with_order().history(&aggregate("order", "o-1")).remove(0);
    event.event_type = Name::new(event_type).unwrap();
    event.schema_version = SchemaVersion::new(u16::try_from(schema_version).unwrap()).unwrap();
    event.data = data.to_string();
    event
}

fn golden(text: &str) -> Event {
    let golden = parsed(text);
    let event_type = golden["type"].as_str().unwrap();
    stored(event_type, golden["schema_version"].as_u64().unwrap(), &golden["data"])
}

/// The state after one event, or why there is none.
fn folded(event: &Event) -> Result<Value, &'static str> {
    let domain = orders::domain().unwrap();
    let orders = domain.aggregate("order").unwrap();
    let folded = orders.fold(Folded::nothing(), event).map_err(|error| error.kind())?;
    Ok(parsed(orders.state_json(&folded).unwrap().unwrap().get()))
}

#[test]
fn every_schema_of_an_order_is_understood_as_the_newest() {
    let domain = orders::domain().unwrap();
    let newest = parsed(VERSIONS[2])["data"].clone();
    for (text, version) in VERSIONS.into_iter().zip(1_u16..) {
        let event = golden(text);
        assert_eq!(event.schema_version.get(), version);
        let understood = domain.upcasters().upcast(&event).unwrap();
        assert_eq!(understood.is_some(), version < 3, "the newest is left as it is");
        assert_eq!(understood.unwrap_or_else(|| newest.clone()), newest, "version {version}");
        assert_eq!(folded(&event), Ok(parsed(STATE)), "version {version}");
    }
}

#[test]
fn commands_write_the_newest_schema() {
    let world = World::with_order();
    let written = world.log.last().unwrap();
    assert_eq!(written.schema_version, world.domain.upcasters().current("OrderPlaced"));
    assert_eq!(written.schema_version.get(), 3);
    assert_eq!(parsed(&written.data), parsed(VERSIONS[2])["data"]);
}

#[test]
fn an_old_event_that_cannot_be_understood_says_at_which_step() {
    let line = |price: u64| json!({"product_id": "p", "product_name": "P", "unit_price_cents": price, "quantity": 2});
    let old = |items: Value| json!({"customer_id": "ada", "customer_name": "Ada", "items": items});
    for data in [json!("ada"), json!({}), old(json!("pens")), old(json!([line(u64::MAX)]))] {
        for version in [1, 2] {
            assert_eq!(folded(&stored("OrderPlaced", version, &data)), Err("upcast"), "{data}");
        }
    }
    let newest = parsed(VERSIONS[2])["data"].clone();
    assert_eq!(folded(&stored("OrderPlaced", 4, &newest)), Err("unknown-schema-version"));
    let mut other = newest.clone();
    other["currency"] = "USD".into();
    assert_eq!(folded(&stored("OrderPlaced", 3, &other)), Err("decode"), "one currency");
    let mut wrong = newest;
    wrong["total_cents"] = 1.into();
    assert_eq!(folded(&stored("OrderPlaced", 3, &wrong)), Err("fold"), "a total that is not so");
}
