//! A log of orders, each with five events, as a function of the position.

use consistency::{
    AggregateId, CommittedAt, Epoch, Event, EventId, LogPosition, Name, Position, SchemaVersion,
    Version,
};
use uuid::Uuid;

/// Events of one order.
pub const EVENTS_PER_ORDER: u64 = 5;
/// Orders that are under way at once: an order's next event comes when so many others had theirs.
pub const OPEN_ORDER_COUNT: u64 = 10_000;

/// The event at a place of the log, counted from zero.
pub fn at(place: u64) -> anyhow::Result<Event> {
    let span = OPEN_ORDER_COUNT * EVENTS_PER_ORDER;
    let (block, within) = (place / span, place % span);
    let order = block * OPEN_ORDER_COUNT + within % OPEN_ORDER_COUNT;
    let nth = within / OPEN_ORDER_COUNT;
    let (event_type, data) = nth_of(order, nth)?;
    let position = Position::from_i64(i64::try_from(place)? + 1).unwrap_or(Position::MAX);
    let version = Version::from_i64(i64::try_from(nth)? + 1).unwrap_or(Version::ZERO);
    Ok(Event {
        at: LogPosition::new(Epoch::FIRST, position),
        id: id(place + 1),
        previous_id: id(place),
        aggregate: AggregateId::new(Name::new("order")?, order_id(order))?,
        version,
        event_type,
        schema_version: SchemaVersion::FIRST,
        committed_at: CommittedAt::from_unix_micros(i64::try_from(place)? * 100),
        correlation_id: Uuid::from_u128(u128::from(order)),
        causation_id: Uuid::from_u128(u128::from(order)),
        idempotency_key_hash: None,
        traceparent: None,
        data,
    })
}

/// Type and data of an order's event, counted from zero.
pub fn nth_of(order: u64, nth: u64) -> anyhow::Result<(Name, String)> {
    let (event_type, data) = happening(order, nth);
    Ok((Name::new(event_type)?, data))
}

/// The id of an order.
pub fn order_id(order: u64) -> String {
    format!("order-{order}")
}

fn id(position: u64) -> EventId {
    EventId::new(Uuid::from_u128(u128::from(position)))
}

fn happening(order: u64, nth: u64) -> (&'static str, String) {
    let line = |product: u64| {
        let product = product % 500;
        format!(
            r#"{{"product_id":"p-{product}","product_name":"Tide table no. {product}","unit_price_cents":2500,"quantity":2}}"#
        )
    };
    match nth {
        0 => {
            let (customer, lines) = (order % 2000, [line(order), line(order + 1)].join(","));
            let data = format!(
                r#"{{"customer_id":"c-{customer}","customer_name":"Customer no. {customer}","currency":"EUR","total_cents":10000,"items":[{lines}]}}"#
            );
            ("OrderPlaced", data)
        }
        1 => ("ItemAdded", line(order + 2)),
        2 => {
            let product = order % 500;
            ("ItemRemoved", format!(r#"{{"product_id":"p-{product}","quantity":1}}"#))
        }
        3 => ("OrderShipped", "{}".to_owned()),
        _ => ("OrderDelivered", "{}".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn every_order_gets_its_five_events_in_order() {
        let mut versions: HashMap<String, u64> = HashMap::new();
        let mut last = EventId::NIL;
        for place in 0..OPEN_ORDER_COUNT * EVENTS_PER_ORDER * 2 {
            let event = at(place).unwrap();
            let version = versions.entry(event.aggregate.id().to_owned()).or_default();
            *version += 1;
            assert_eq!(event.version.get(), *version);
            assert_eq!(event.previous_id, last);
            last = event.id;
        }
        assert_eq!(versions.len() as u64, OPEN_ORDER_COUNT * 2);
        assert!(versions.values().all(|version| *version == EVENTS_PER_ORDER));
    }
}
