//! How the stream is kept, and how large its messages may be.

use std::time::Duration;

use async_nats::jetstream::stream::{Compression, Config, DiscardPolicy, RetentionPolicy};
use compose::nats::User;
use consistency::{Epoch, stream_name};
use event_store::{
    Append, AppendError, EventStore, Expected, InvalidAppend, RelayConfig, StoreConfig,
};

use crate::region::{Region, config, polling};
use crate::support::{LOG_ID, append, event, eventually, fill, order, pool};

const HOUR: Duration = Duration::from_secs(3600);

async fn found(region: &Region) -> Config {
    let context = region.operate().await;
    let stream = context.get_stream(stream_name(Epoch::FIRST)).await.unwrap();
    stream.cached_info().config.clone()
}

#[tokio::test]
async fn the_stream_cannot_be_thinned_and_is_kept_as_configured_from_the_next_start_on() {
    let region = Region::start().await;
    let first =
        RelayConfig { stream_age_max: HOUR, stream_bytes_max: Some(100_000_000), ..config() };
    let running = region.relay_of(&region.store, first.clone()).await;
    fill(&region.store, 3).await;
    running.until_published(3).await;
    running.stop().await;
    let created = found(&region).await;
    assert_eq!((created.max_age, created.max_bytes), (HOUR, 100_000_000));
    assert_eq!((created.retention, created.discard), (RetentionPolicy::Limits, DiscardPolicy::Old));
    assert_eq!((created.compression.clone(), created.num_replicas), (Some(Compression::S2), 1));
    assert!(created.deny_delete && created.deny_purge);
    let context = region.operate().await;
    let stream = context.get_stream(stream_name(Epoch::FIRST)).await.unwrap();
    assert!(stream.delete_message(2).await.is_err());
    assert!(stream.purge().await.is_err());

    let unbounded = RelayConfig { stream_age_max: Duration::ZERO, stream_bytes_max: None, ..first };
    let running = region.relay_of(&region.store, unbounded).await;
    running.until_active().await;
    let changed = found(&region).await;
    assert_eq!((changed.max_age, changed.max_bytes), (Duration::ZERO, -1));
    assert_eq!(Config { max_age: HOUR, max_bytes: 100_000_000, ..changed }, created);
    assert_eq!(region.published().await.len(), 3);
    running.stop().await;
}

#[tokio::test]
async fn a_stream_that_somebody_created_otherwise_is_kept_as_configured_as_well() {
    let region = Region::start().await;
    let context = region.operate().await;
    let bare = Config {
        name: stream_name(Epoch::FIRST),
        subjects: vec!["events.>".to_owned()],
        ..Config::default()
    };
    context.create_stream(bare).await.unwrap();
    let running = region.relay().await;
    running.until_active().await;
    let changed = found(&region).await;
    assert!(changed.deny_delete && changed.deny_purge);
    assert_eq!(changed.compression, Some(Compression::S2));
    running.stop().await;
}

#[tokio::test]
async fn more_copies_than_there_are_servers_are_refused_and_the_stream_goes_on() {
    let region = Region::start().await;
    let running = region.relay().await;
    fill(&region.store, 1).await;
    running.until_published(1).await;
    running.stop().await;
    let running =
        region.relay_of(&region.store, RelayConfig { stream_replica_count: 3, ..config() }).await;
    fill(&region.store, 1).await;
    running.until_published(2).await;
    assert_eq!(found(&region).await.num_replicas, 1);
    running.stop().await;
}

#[tokio::test]
async fn only_the_oldest_events_leave_a_full_stream_and_the_log_keeps_them() {
    let region = Region::start().await;
    let small = RelayConfig { stream_bytes_max: Some(20_000), ..config() };
    let running = region.relay_of(&region.store, small).await;
    fill(&region.store, 100).await;
    running.until_published(100).await;
    let context = region.operate().await;
    let stream = context.get_stream(stream_name(Epoch::FIRST)).await.unwrap();
    let state = &stream.cached_info().state;
    assert_eq!(state.last_sequence, 100);
    assert!(1 < state.first_sequence && 0 < state.messages, "{state:?}");
    assert_eq!(state.messages, 101 - state.first_sequence, "without holes");
    assert_eq!(region.store.read_range(consistency::Position::ZERO, 200).await.unwrap().len(), 100);
    running.stop().await;
}

/// An event of about so many bytes.
fn of_length(length: usize) -> Append {
    let mut append = append(&order("large"), Expected::Any, 0);
    append.events = vec![event(&format!("\"{}\"", "x".repeat(length)))];
    append
}

async fn bound(store: &EventStore, length: usize) -> Option<usize> {
    match store.append(of_length(length)).await {
        Ok(_) => None,
        Err(AppendError::Invalid(InvalidAppend::TooLarge { max, .. })) => Some(max),
        Err(error) => panic!("{error:?}"),
    }
}

#[tokio::test]
async fn a_server_that_takes_less_than_is_configured_bounds_what_is_appended() {
    let region = Region::start().await;
    let server = region.client(User::Relay).await.max_payload();
    let config = StoreConfig { payload_bytes_max: 2 * server, ..StoreConfig::new(LOG_ID) };
    let (store, _committer) = EventStore::open(pool(&region.database.url), config).await.unwrap();
    let running = region.relay_of(&store, polling()).await;
    assert_eq!(bound(&store, server).await, Some(server));
    assert_eq!(bound(&store, 10).await, None);
    running.until_published(1).await;
    running.stop().await;
}

#[tokio::test]
async fn a_bound_that_the_server_lowers_while_we_run_holds_from_the_reconnect_on() {
    const LOWERED: usize = 64 * 1024;
    let mut region = Region::start().await;
    let running = region.relay_of(&region.store, polling()).await;
    assert_eq!(bound(&region.store, 2 * LOWERED).await, None);
    running.until_published(1).await;
    for (limit, expected) in [(LOWERED, Some(LOWERED)), (8 * LOWERED, None)] {
        region.nats.stop().await.unwrap();
        region.nats.limit_payload(limit);
        region.nats.start_again().await.unwrap();
        eventually("the relay's client is connected again", async || {
            (running.client.max_payload() == limit).then_some(())
        })
        .await;
        assert_eq!(bound(&region.store, 2 * LOWERED).await, expected);
        assert_eq!(bound(&region.store, LOWERED / 2).await, None);
    }
    running.until_published(4).await;
    assert_eq!(region.published().await.len(), 4);
    running.stop().await;
}
