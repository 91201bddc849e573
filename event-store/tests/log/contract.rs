//! The stream as an outside consumer reads it, compared with its public contract in `docs/stream.md`.

use std::collections::{BTreeMap, BTreeSet};

use async_nats::HeaderMap;
use async_nats::jetstream::consumer::DeliverPolicy;
use async_nats::jetstream::consumer::pull::OrderedConfig;
use compose::nats::User;
use consistency::{Event, Position, Traceparent};
use event_store::Expected;
use futures::StreamExt;
use tokio::time::timeout;

use crate::region::Region;
use crate::support::{DEADLINE, append, fill, order};

const CONTRACT: &str = include_str!("../../../docs/stream.md");

/// The contract's table of headers: whether each is always there.
fn documented_headers() -> BTreeMap<&'static str, bool> {
    let rows = CONTRACT.lines().filter_map(|line| line.strip_prefix("| `"));
    let headers = rows.map(|row| {
        let (name, rest) = row.split_once("` | ").unwrap();
        let (present, meaning) = rest.split_once(" | ").unwrap();
        assert!(meaning.len() > 2, "{name} has a meaning");
        match present {
            "always" => (name, true),
            "sometimes" => (name, false),
            other => panic!("{name} is present {other:?}"),
        }
    });
    headers.collect()
}

/// The headers that the relay adds to those of the event.
const CONDITIONS: [&str; 2] = ["Nats-Expected-Last-Sequence", "Nats-Expected-Stream"];

fn names(event: &Event) -> BTreeSet<&'static str> {
    event.headers().into_iter().map(|(name, _)| name).chain(CONDITIONS).collect()
}

/// As the contract describes it.
fn slot(aggregate_id: &str) -> u32 {
    let mut hash: u32 = 2_166_136_261;
    for byte in aggregate_id.bytes() {
        hash = (hash ^ u32::from(byte)).wrapping_mul(16_777_619);
    }
    hash % 64
}

fn one<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    assert_eq!(headers.get_all(name).count(), 1, "{name} occurs once");
    headers.get(name).unwrap().as_str()
}

/// Some events, the last with all that an event can have.
async fn region_with_events() -> Region {
    let region = Region::start().await;
    fill(&region.store, 20).await;
    let mut full = append(&order("a~full:id"), Expected::Any, 2);
    full.idempotency_key_hash = Some([0xab; 32]);
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    full.traceparent = Traceparent::parse(trace);
    region.store.append(full).await.unwrap();
    region
}

#[tokio::test]
async fn the_contract_lists_the_headers_of_an_event_and_no_others() {
    let region = region_with_events().await;
    let events = region.store.read_range(Position::ZERO, 100).await.unwrap();
    let (plain, full) = (names(&events[0]), names(events.last().unwrap()));
    let documented = documented_headers();
    let documented_always: BTreeSet<_> =
        documented.iter().filter(|(_, always)| **always).map(|(name, _)| *name).collect();
    assert_eq!(documented.into_keys().collect::<BTreeSet<_>>(), full);
    assert_eq!(documented_always, plain);
}

#[tokio::test]
async fn an_outside_consumer_finds_the_stream_as_the_contract_says() {
    let region = region_with_events().await;
    let running = region.relay().await;
    running.until_published(22).await;
    let documented = documented_headers();
    // Knows nothing but the contract, and may do no more than read.
    let context = async_nats::jetstream::new(region.client(User::Projector).await);
    let stream = context.get_stream_no_info("EVENTS-1").await.unwrap();
    let config = OrderedConfig {
        filter_subject: "events.order.>".to_owned(),
        deliver_policy: DeliverPolicy::All,
        ..OrderedConfig::default()
    };
    let consumer = stream.create_consumer(config).await.unwrap();
    let mut messages = consumer.messages().await.unwrap().take(22);
    let mut previous_id = "00000000-0000-0000-0000-000000000000".to_owned();
    let mut versions: BTreeMap<String, u64> = BTreeMap::new();
    let mut position = 0;
    while let Some(message) = timeout(DEADLINE, messages.next()).await.unwrap() {
        let message = message.unwrap();
        position += 1;
        let headers = message.headers.as_ref().unwrap();
        for (name, _) in headers.iter() {
            assert!(documented.contains_key(name.to_string().as_str()), "{name}");
        }
        for name in documented.iter().filter(|(_, always)| **always).map(|(name, _)| name) {
            one(headers, name);
        }
        assert_eq!(message.info().unwrap().stream_sequence, position);
        assert_eq!(one(headers, "Tidemark-Position"), position.to_string());
        assert_eq!(one(headers, "Tidemark-Epoch"), "1");
        assert_eq!(one(headers, "Tidemark-Previous-Id"), previous_id);
        previous_id = one(headers, "Nats-Msg-Id").to_owned();
        let kind = one(headers, "Tidemark-Aggregate-Type");
        let id = one(headers, "Tidemark-Aggregate-Id");
        assert_eq!(message.subject.as_str(), format!("events.{kind}.{}", slot(id)));
        let version = versions.entry(id.to_owned()).or_default();
        *version += 1;
        assert_eq!(one(headers, "Tidemark-Version"), version.to_string());
        serde_json::from_slice::<serde_json::Value>(&message.payload).unwrap();
    }
    assert_eq!(position, 22);
    running.stop().await;
}
