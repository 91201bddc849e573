//! The relay: the stream is the log, number for number, whatever happens on the way.

use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::connection::State;
use compose::nats::User;
use consistency::{Epoch, Name, SchemaVersion, Traceparent, stream_name};
use event_store::{
    AppendError, EventStore, Expected, RefusalKind, RelayConfig, RelayState, StoreConfig,
};
use futures::future::join_all;

use crate::region::{Message, Region, config, polling, until_stream_ends_at};
use crate::support::{
    LOG_ID, append, assert_log_is_whole, event, eventually, fill, order, pool, position,
};

#[tokio::test]
async fn each_event_is_published_once_under_the_sequence_that_is_its_position() {
    let region = Region::start().await;
    fill(&region.store, 30).await;
    let running = region.relay().await;
    running.until_published(30).await;
    let aggregate = order("many");
    region.store.append(append(&aggregate, Expected::Any, 500)).await.unwrap();
    fill(&region.store, 20).await;
    let messages = region.published().await;
    assert_eq!(messages.len(), 550);
    running.stop().await;
}

/// It is published from memory, and a relay that takes over would publish it from the log.
#[tokio::test]
async fn what_is_published_at_once_says_all_that_the_row_says() {
    let region = Region::start().await;
    let running = region.relay().await;
    fill(&region.store, 1).await;
    running.until_published(1).await;
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let full = |id: &str| {
        let mut full = append(&order(id), Expected::Any, 2);
        full.idempotency_key_hash = Some([7; 32]);
        full.traceparent = Traceparent::parse(parent);
        full.events[1].schema_version = SchemaVersion::new(2).unwrap();
        full.events[1].event_type = Name::new("OrderNoted").unwrap();
        full
    };
    // By itself, and gathered with others.
    region.store.append(full("a")).await.unwrap();
    let more = ["a", "b", "c"].map(|id| region.store.append(full(id)));
    assert!(join_all(more).await.iter().all(Result::is_ok));
    let messages = region.published().await;
    let said = |name: &str, value: &str| {
        messages.iter().filter(|said| said.headers.get(name).is_some_and(|it| it == value)).count()
    };
    assert_eq!((said("traceparent", parent), said("Tidemark-Schema-Version", "2")), (8, 4));
    running.stop().await;
}

#[tokio::test]
async fn an_append_of_another_process_wakes_the_relay() {
    let region = Region::start().await;
    let first = region.relay().await;
    first.until_active().await;
    let (store, _committer) = region.database.store().await;
    let second = region.relay_of(&store, config()).await;
    second.until("the second stands by", |status| status.state == RelayState::Standby).await;
    // Told by the second until the first has heard: a wake-up may be lost.
    eventually("the first was woken", async || {
        fill(&store, 1).await;
        let head = store.head_seen().position;
        let published = first.relay.status().borrow().published;
        published.filter(|at| at.position.get() > 0 && at.position <= head)
    })
    .await;
    first.stop().await;
    second.stop().await;
}

#[tokio::test]
async fn polling_finds_what_no_wake_up_told_of() {
    let region = Region::start().await;
    let running = region.relay_of(&region.store, polling()).await;
    running.until_active().await;
    // A store without a relay, so that nobody is told.
    let (silent, _committer) = region.database.store().await;
    fill(&silent, 3).await;
    assert_eq!(region.published().await.len(), 3);
    running.stop().await;
}

#[tokio::test]
async fn another_relay_takes_over_when_the_first_stops() {
    let region = Region::start().await;
    // A lease that is not released outlasts the test.
    let lasting = RelayConfig { lease_duration: Duration::from_secs(600), ..polling() };
    let first = region.relay_of(&region.store, lasting.clone()).await;
    first.until_active().await;
    let (store, _committer) = region.database.store().await;
    let second = region.relay_of(&store, lasting).await;
    fill(&region.store, 5).await;
    first.until_published(5).await;
    first.stop().await;
    second.until_active().await;
    fill(&store, 5).await;
    assert_eq!(region.published().await.len(), 10);
    second.stop().await;
}

#[tokio::test]
async fn another_relay_takes_over_when_the_lease_of_a_dead_one_expires() {
    let region = Region::start().await;
    sqlx::query(
        "insert into lease (name, holder, expires_at)
         values ('relay', gen_random_uuid(), clock_timestamp() + interval '1 second')",
    )
    .execute(&region.database.pool())
    .await
    .unwrap();
    let running = region.relay_of(&region.store, polling()).await;
    fill(&region.store, 5).await;
    running.until_published(5).await;
    running.stop().await;
}

#[tokio::test]
async fn two_relays_at_once_keep_the_stream_dense() {
    let region = Region::start().await;
    let (store, _committer) = region.database.store().await;
    let first = region.relay_of(&region.store, polling()).await;
    let second = region.relay_of(&store, polling()).await;
    let pool = region.database.pool();
    for _ in 0..15 {
        // The holder publishes on until it looks at its lease again; the other begins.
        sqlx::query("delete from lease").execute(&pool).await.unwrap();
        region.store.append(append(&order("a"), Expected::Any, 200)).await.unwrap();
        fill(&store, 3).await;
    }
    assert_eq!(region.published().await.len(), 15 * 203);
    first.stop().await;
    second.stop().await;
}

#[tokio::test]
async fn appends_go_on_without_nats_and_are_published_when_it_is_back() {
    let mut region = Region::start().await;
    let running = region.relay().await;
    fill(&region.store, 5).await;
    running.until_published(5).await;
    region.nats.stop().await.unwrap();
    fill(&region.store, 40).await;
    region.nats.start_again().await.unwrap();
    running.until_published(45).await;
    assert_eq!(region.published().await.len(), 45);
    running.stop().await;
}

#[tokio::test]
async fn acknowledgements_lost_with_a_killed_server_neither_lose_nor_double_events() {
    let mut region = Region::start().await;
    let running = region.relay_of(&region.store, polling()).await;
    running.until_active().await;
    for _ in 0..4 {
        let store = region.store.clone();
        let appending = tokio::spawn(async move {
            for nth in 0..10 {
                store
                    .append(append(&order(&format!("a-{nth}")), Expected::Any, 100))
                    .await
                    .unwrap();
            }
        });
        let before = running.relay.status().borrow().published.map_or(0, |at| at.position.get());
        running.until_published(before + 1).await;
        region.nats.kill().await.unwrap();
        appending.await.unwrap();
        region.nats.start_again().await.unwrap();
    }
    assert_eq!(region.published().await.len(), 4000);
    running.stop().await;
}

#[tokio::test]
async fn a_wiped_stream_is_rebuilt_number_for_number() {
    let mut region = Region::start().await;
    let running = region.relay_of(&region.store, polling()).await;
    fill(&region.store, 60).await;
    let before = region.published().await;
    region.nats.kill().await.unwrap();
    region.nats.wipe().await.unwrap();
    region.nats.start_again().await.unwrap();
    let after = region.published().await;
    assert_eq!(after, before);
    fill(&region.store, 1).await;
    assert_eq!(region.published().await.len(), 61);
    running.stop().await;
}

#[tokio::test]
async fn a_stream_deleted_under_an_idle_relay_is_rebuilt_number_for_number() {
    let region = Region::start().await;
    let running = region.relay_of(&region.store, polling()).await;
    fill(&region.store, 25).await;
    let before = region.published().await;
    region.operate().await.delete_stream(stream_name(Epoch::FIRST)).await.unwrap();
    assert_eq!(region.published().await, before);
    running.stop().await;
}

#[tokio::test]
async fn a_stream_that_lost_its_tail_gets_it_again() {
    let mut region = Region::start().await;
    let running = region.relay_of(&region.store, polling()).await;
    fill(&region.store, 20).await;
    region.published().await;
    region.nats.stop().await.unwrap();
    let store_dir = region.nats.config().store.clone();
    let older = tempfile::tempdir().unwrap();
    copy(&store_dir, older.path());
    region.nats.start_again().await.unwrap();
    fill(&region.store, 20).await;
    let before = region.published().await;
    region.nats.stop().await.unwrap();
    region.nats.wipe().await.unwrap();
    copy(older.path(), &store_dir);
    region.nats.start_again().await.unwrap();
    assert_eq!(region.published().await, before);
    running.stop().await;
}

#[tokio::test]
async fn a_log_that_lost_its_tail_refuses_appends_instead_of_skipping_them() {
    let region = Region::start().await;
    let running = region.relay().await;
    fill(&region.store, 10).await;
    running.until_published(10).await;
    running.stop().await;
    region.cut_log_back_to(8).await;
    let running = region.relay().await;
    let reason = running.until_refused().await;
    assert!(reason.contains("ahead of the log"), "{reason}");
    let answer = region.store.append(append(&order("a"), Expected::Any, 1)).await;
    let Err(AppendError::Refused { reason: told }) = answer else { panic!("{answer:?}") };
    assert_eq!(told, reason);
    assert_eq!(region.store.head().await.unwrap().refused_because, Some(reason));
    running.stop().await;
}

#[tokio::test]
async fn a_log_that_grew_past_its_lost_tail_is_told_by_the_event_ids() {
    let region = Region::start().await;
    let running = region.relay().await;
    fill(&region.store, 10).await;
    running.until_published(10).await;
    running.stop().await;
    region.cut_log_back_to(8).await;
    // A process that began after the loss: nobody has told it of the tail.
    let (store, _committer) = region.database.store().await;
    fill(&store, 5).await;
    let running = region.relay().await;
    let reason = running.until_refused().await;
    assert!(reason.contains("has event"), "{reason}");
    let context = region.operate().await;
    until_stream_ends_at(&context, 10).await;
    running.stop().await;
}

#[tokio::test]
async fn a_log_restored_under_a_running_relay_is_noticed_before_anything_is_published() {
    let region = Region::start().await;
    let running = region.relay().await;
    fill(&region.store, 10).await;
    running.until_published(10).await;
    region.cut_log_back_to(8).await;
    // A process that began after the loss, and whose appends are the first that the relay is told of.
    let (store, _committer) = region.database.store().await;
    fill(&store, 3).await;
    let waking = region.client(User::Relay).await;
    waking.publish(config().wake_subject, "".into()).await.unwrap();
    waking.flush().await.unwrap();
    running.until_refused().await;
    let context = region.operate().await;
    until_stream_ends_at(&context, 10).await;
    let answer = store.append(append(&order("a"), Expected::Any, 1)).await;
    assert!(matches!(answer, Err(AppendError::Refused { .. })), "{answer:?}");
    running.stop().await;
}

#[tokio::test]
async fn a_process_that_has_seen_the_tail_that_the_log_lost_appends_nothing_after_it() {
    let region = Region::start().await;
    fill(&region.store, 10).await;
    region.cut_log_back_to(8).await;
    let (other, _committer) = region.database.store().await;
    let appending = async |store: &EventStore| {
        let answer = store.append(append(&order("a"), Expected::Any, 1)).await;
        let Err(AppendError::Refused { reason }) = answer else { panic!("{answer:?}") };
        assert!(reason.contains("lost its tail"), "{reason}");
    };
    appending(&region.store).await;
    appending(&other).await;
    let head = other.head().await.unwrap();
    assert_eq!((head.at.position, head.refused_kind), (position(8), Some(RefusalKind::TailLost)));
    assert_log_is_whole(&region.database.pool()).await;
}

#[tokio::test]
async fn a_stray_message_on_the_stream_is_a_contradiction() {
    let region = Region::start().await;
    let running = region.relay().await;
    fill(&region.store, 3).await;
    running.until_published(3).await;
    let context = region.operate().await;
    context.publish("events.order.1", "stray".into()).await.unwrap().await.unwrap();
    // In flight together: the first finds its place taken, those after it fit.
    region.store.append(append(&order("a"), Expected::Any, 20)).await.unwrap();
    let reason = running.until_refused().await;
    assert!(reason.contains("at 4,"), "{reason}");
    running.stop().await;
}

/// A log that lost its tail and grew again as far, by another hand: nothing shows but in what follows what.
#[tokio::test]
async fn what_follows_another_event_than_was_published_is_not() {
    let region = Region::start().await;
    let running = region.relay().await;
    fill(&region.store, 5).await;
    running.until_published(5).await;
    region.cut_log_back_to(3).await;
    // A store that is opened now has not seen more, and nobody hears of what it appends.
    let (other, _committer) = region.database.store().await;
    fill(&other, 2).await;
    let appended = region.store.append(append(&order("a"), Expected::Any, 1)).await.unwrap();
    assert_eq!(appended.first_position, position(6));
    let reason = running.until_refused().await;
    assert!(reason.contains("at 5,"), "{reason}");
    until_stream_ends_at(&region.operate().await, 5).await;
    running.stop().await;
}

#[tokio::test]
async fn a_log_exchanged_for_one_as_long_is_noticed_before_it_grows() {
    let region = Region::start().await;
    let running = region.relay_of(&region.store, polling()).await;
    fill(&region.store, 5).await;
    running.until_published(5).await;
    // Both at once, as a restore is: the relay looks now and then.
    let other = "with other as (
                     update event set id = gen_random_uuid() where position = 5 returning id
                 )
                 update log_head set event_id = other.id from other";
    sqlx::query(other).execute(&region.database.pool()).await.unwrap();
    let reason = running.until_refused().await;
    assert!(reason.contains("at 5,"), "{reason}");
    running.stop().await;
}

#[tokio::test]
async fn a_stream_exchanged_for_one_as_long_is_noticed_on_reconnect() {
    let mut region = Region::start().await;
    let running = region.relay().await;
    fill(&region.store, 3).await;
    running.until_published(3).await;
    let context = region.operate().await;
    let name = stream_name(Epoch::FIRST);
    let config = context.get_stream(&name).await.unwrap().cached_info().config.clone();
    context.delete_stream(&name).await.unwrap();
    context.create_stream(config).await.unwrap();
    for _ in 0..3 {
        context.publish("events.order.1", "stray".into()).await.unwrap().await.unwrap();
    }
    region.nats.stop().await.unwrap();
    region.nats.start_again().await.unwrap();
    eventually("the relay is connected again", async || {
        let connects = running.client.statistics().connects.load(Ordering::Relaxed);
        let connected = running.client.connection_state() == State::Connected;
        (connected && connects == 2).then_some(())
    })
    .await;
    fill(&region.store, 1).await;
    let reason = running.until_refused().await;
    assert!(reason.contains("at 3,"), "{reason}");
    let context = region.operate().await;
    until_stream_ends_at(&context, 3).await;
    running.stop().await;
}

#[tokio::test]
async fn the_largest_event_that_is_taken_is_published() {
    let region = Region::start().await;
    let payload_bytes_max = region.client(User::Relay).await.server_info().max_payload;
    let config = StoreConfig { payload_bytes_max, ..StoreConfig::new(LOG_ID) };
    let (store, _committer) = EventStore::open(pool(&region.database.url), config).await.unwrap();
    let running = region.relay_of(&store, polling()).await;
    let of_length = |length: usize| {
        let mut append = append(&order("large"), Expected::Any, 0);
        append.events = vec![event(&format!("\"{}\"", "x".repeat(length)))];
        append
    };
    let answer = store.append(of_length(payload_bytes_max)).await;
    let Err(AppendError::Invalid(event_store::InvalidAppend::TooLarge { bytes, .. })) = answer
    else {
        panic!("{answer:?}")
    };
    let excess = bytes - payload_bytes_max;
    assert!(store.append(of_length(payload_bytes_max - excess + 1)).await.is_err());
    store.append(of_length(payload_bytes_max - excess)).await.unwrap();
    running.until_published(1).await;
    assert_eq!(region.published().await.len(), 1);
    running.stop().await;
}

#[tokio::test]
async fn the_stream_of_a_later_epoch_starts_after_its_boundary() {
    let region = Region::start().await;
    let running = region.relay().await;
    fill(&region.store, 7).await;
    running.until_published(7).await;
    running.stop().await;
    let pool = region.database.pool();
    region.cut_log_back_to(5).await;
    sqlx::query("insert into epoch (epoch, starts_after) values (2, 5)")
        .execute(&pool)
        .await
        .unwrap();
    sqlx::query("update log_head set epoch = 2").execute(&pool).await.unwrap();
    let context = region.operate().await;
    context.delete_stream(stream_name(Epoch::FIRST)).await.unwrap();

    let running = region.relay().await;
    fill(&region.store, 4).await;
    running.until_published(9).await;
    let second = Epoch::new(2).unwrap();
    let stream = context.get_stream(stream_name(second)).await.unwrap();
    let state = &stream.cached_info().state;
    assert_eq!((state.first_sequence, state.last_sequence), (6, 9));
    let events = region.store.read_range(position(5), 10).await.unwrap();
    for event in events {
        assert_eq!(event.at.epoch, second);
        Message::read(&stream, event.at.position.get()).await.assert_is_of(&event);
    }
    running.stop().await;
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}
