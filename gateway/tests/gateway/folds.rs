//! Aggregates with a long past: read from a snapshot and what came after it, to the same state.

use consistency::{Event, FoldKind, FoldName};
use projection::Folded;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::world::{Gateway, Reply, World, eventually};

const ORDER: &str = "/v1/aggregates/order/o-1";
/// As shipped.
const SNAPSHOT_EVENTS: u64 = 500;

/// An order with so many events.
async fn long_order(world: &World, event_count: usize) {
    let line = |nth: usize| {
        json!({"product_id": format!("p-{}", nth % 5), "product_name": "Lamp",
               "unit_price_cents": 100, "quantity": 1})
    };
    let placed = json!({"customer_id": "c-1", "customer_name": "Ada", "currency": "EUR",
                        "total_cents": 100, "items": [line(0)]});
    let mut events = vec![json!({"type": "OrderPlaced", "schema_version": 3, "data": placed})];
    events.extend((1..event_count).map(|nth| json!({"type": "ItemAdded", "data": line(nth)})));
    for page in events.chunks(500) {
        let done = world.primary.post(&format!("{ORDER}/events"), json!({"events": page})).await;
        assert!(done.status < 300, "{done:?}");
    }
}

async fn add(world: &World) {
    let data = json!({"product_id": "p-9", "product_name": "Desk", "unit_price_cents": 7,
                      "quantity": 1});
    let body = json!({"events": [{"type": "ItemAdded", "data": data}]});
    assert_eq!(world.primary.post(&format!("{ORDER}/events"), body).await.status, 200);
}

/// The sum of a counter's values under labels that contain `label`.
async fn counted(gateway: &Gateway, name: &str, label: &str) -> u64 {
    let metrics = reqwest::get(format!("{}/metrics", gateway.admin)).await.unwrap();
    let text = metrics.text().await.unwrap();
    let lines = text.lines().filter(|line| line.starts_with(name) && line.contains(label));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64).sum()
}

/// The events that were read for it, and the answer.
async fn read(gateway: &Gateway, path: &str) -> (u64, Reply) {
    let before = counted(gateway, "tidemark_fold_events", "").await;
    // Of who has seen all of the log: the projector has applied none of it.
    let head = gateway.get("/v1/currency").await.body["head"].as_u64().unwrap();
    let reply = gateway.read(path, &gateway.token_at(head), "").await;
    assert_eq!(reply.status, 200, "{reply:?}");
    (counted(gateway, "tidemark_fold_events", "").await - before, reply)
}

/// Reads until no more events are read for it than there are between snapshots.
async fn read_shortly(gateway: &Gateway, path: &str) -> Reply {
    let mut last = None;
    eventually("a snapshot is used", async || {
        let (events_read, reply) = read(gateway, path).await;
        last = Some(reply);
        events_read <= SNAPSHOT_EVENTS
    })
    .await;
    last.unwrap()
}

/// The order's state as all of its events make it.
async fn folded_from_the_first(events: &[Event]) -> Value {
    let domain = orders::domain().unwrap();
    let definition = domain.aggregate("order").unwrap();
    let mut folded = Folded::nothing();
    for event in events.iter().filter(|event| event.aggregate.id() == "o-1") {
        folded = definition.fold(folded, event).unwrap();
    }
    let state = definition.state_json(&folded).unwrap().unwrap();
    serde_json::from_str(state.get()).unwrap()
}

fn log_database(world: &World) -> PgPool {
    PgPool::connect_lazy(&world.postgres.url("tidemark_log")).unwrap()
}

#[tokio::test]
async fn an_aggregate_of_thousands_of_events_is_read_from_its_snapshot() {
    let world = World::start().await;
    long_order(&world, 4_900).await;
    let (events_read, first) = read(&world.primary, ORDER).await;
    assert_eq!((events_read, &first.body["version"]), (4_900, &json!(4_900)));
    let second = read_shortly(&world.primary, ORDER).await;
    assert_eq!((&second.text, second.header("etag")), (&first.text, first.header("etag")));
    add(&world).await;
    let third = read_shortly(&world.primary, ORDER).await;
    assert_eq!(third.body["version"], 4_901);
    assert_eq!(third.body["state"], folded_from_the_first(&world.log().await).await);

    // A projection's rules make other states, which are kept beside those of the aggregate.
    let detail = "/v1/views/order-detail/o-1";
    let (events_read, row) = read(&world.primary, detail).await;
    assert_eq!((events_read, &row.body["version"]), (4_901, &json!(4_901)));
    assert_eq!(read_shortly(&world.primary, detail).await.text, row.text);

    // Commands are decided on it.
    let before = counted(&world.primary, "tidemark_fold_events", "").await;
    let cancelled = world.primary.command("CancelOrder", json!({"order_id": "o-1"})).await;
    assert_eq!((cancelled.status, &cancelled.body["version"]), (200, &json!(4_902)));
    let events_read = counted(&world.primary, "tidemark_fold_events", "").await - before;
    assert!(events_read <= SNAPSHOT_EVENTS, "{events_read}");
    let state = read_shortly(&world.primary, ORDER).await;
    assert_eq!(state.body["state"], folded_from_the_first(&world.log().await).await);
}

#[tokio::test]
async fn a_snapshot_that_was_tampered_with_or_is_of_other_rules_is_not_used_and_is_replaced() {
    let world = World::start().await;
    long_order(&world, 600).await;
    let (_, truth) = read(&world.primary, ORDER).await;
    assert_eq!(truth.body["version"], 600);
    read_shortly(&world.primary, ORDER).await;
    let pool = log_database(&world);
    let name = FoldName {
        kind: FoldKind::Aggregate,
        name: consistency::Name::new("order").unwrap(),
        version: 1,
    };
    for damage in [
        "update fold_snapshot set state = replace(state, 'Ada', 'Eve')",
        "update fold_snapshot set state = '{'",
        "update fold_snapshot set state = null",
        "update fold_snapshot set version = 599",
        "update fold_snapshot set position = position - 1",
        "update fold_snapshot set epoch = 2",
        "update fold_snapshot set event_id = gen_random_uuid()",
        "update fold_snapshot set version = 700",
        "update fold_snapshot set fold_version = 2",
        "update fold_snapshot set fold = 'projection orders'",
    ] {
        let damaged = sqlx::query(damage).execute(&pool).await.unwrap();
        assert_eq!(damaged.rows_affected(), 1, "{damage}");
        let (events_read, answer) = read(&world.primary, ORDER).await;
        assert!(600 <= events_read, "{damage}: {events_read}");
        assert_eq!(answer.text, truth.text, "{damage}");
        assert_eq!(read_shortly(&world.primary, ORDER).await.text, truth.text, "{damage}");
        sqlx::query("delete from fold_snapshot where fold <> $1 or fold_version <> 1")
            .bind(name.text())
            .execute(&pool)
            .await
            .unwrap();
    }
    assert!(0 < counted(&world.primary, "tidemark_fold_count", "unusable").await);
}
