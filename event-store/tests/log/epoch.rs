//! A database restored from an older copy: appends are refused until an operator opens a new epoch.

use compose::nats::User;
use compose::postgres::DataCopy;
use consistency::{Epoch, LogId, LogPosition, stream_name};
use event_store::{
    Above, AnswerFormat, AppendError, Appended, Expected, Idempotency, NewEpoch, NewEpochError,
    Once, RefusalKind, RelayState, Repeat, last_common, list_epochs, open_epoch,
};
use uuid::Uuid;

use crate::region::{Message, Region, Running, polling};
use crate::support::{
    LOG_ID, append, assert_log_is_whole, eventually, fill, hold_head, order, position,
    until_blocked,
};

const KEY: Idempotency = Idempotency {
    scope: [0; 32],
    key: [1; 32],
    request: [1; 32],
    answer_format: AnswerFormat::FIRST,
};

fn second() -> Epoch {
    Epoch::new(2).unwrap()
}

fn after(last: u64) -> NewEpoch {
    NewEpoch { after: position(last), force: false, above: Above::Refuse }
}

/// A region with ten published events, the last under a key, and a copy of its database as of the sixth.
async fn region_with_a_backup() -> (Region, Running, DataCopy) {
    let mut region = Region::alone().await;
    let running = region.relay_of(&region.store, polling()).await;
    fill(&region.store, 6).await;
    running.until_published(6).await;
    let backup = region.database.cluster.copy_data().await.unwrap();
    fill(&region.store, 3).await;
    region.store.append_once(append(&order("lost"), Expected::Any, 1), KEY).await.unwrap();
    running.until_published(10).await;
    (region, running, backup)
}

/// The messages of the epoch's stream after the boundary are the log's events, one for one.
async fn assert_stream_is_log(region: &Region, epoch: Epoch, boundary: u64, last: u64) {
    let context = region.operate().await;
    let stream = eventually("the epoch's stream ends where the log does", async || {
        let stream = context.get_stream(stream_name(epoch)).await.ok()?;
        (stream.cached_info().state.last_sequence == last).then_some(stream)
    })
    .await;
    assert_eq!(stream.cached_info().state.first_sequence, boundary + 1);
    let events = region.store.read_range(position(boundary), 1000).await.unwrap();
    assert_eq!(events.len() as u64, last - boundary);
    for event in events {
        assert_eq!(event.at.epoch, epoch);
        Message::read(&stream, event.at.position.get()).await.assert_is_of(&event);
    }
}

#[tokio::test]
async fn a_restored_database_takes_appends_again_in_a_new_epoch() {
    let (mut region, running, backup) = region_with_a_backup().await;
    region.database.cluster.restore(&backup).await.unwrap();
    let reason = running.until_refused().await;
    assert!(reason.contains("ahead of the log"), "{reason}");
    let answer = region.store.append(append(&order("a"), Expected::Any, 1)).await;
    assert!(matches!(answer, Err(AppendError::Refused { .. })), "{answer:?}");

    let pool = region.database.pool();
    let head = region.store.head().await.unwrap();
    assert_eq!(head.refused_kind, Some(RefusalKind::StreamAhead));
    let relay = region.client(User::Relay).await;
    assert_eq!(last_common(&pool, &relay).await.unwrap(), position(6));
    let opened = open_epoch(&pool, LOG_ID, after(6)).await.unwrap();
    assert_eq!(opened, LogPosition::new(second(), position(6)));
    running.until_active().await;
    // What was lost is asked for again and done now.
    let again = append(&order("lost"), Expected::Any, 1);
    let answer = region.store.append_once(again, KEY).await;
    let Ok(Once::Appended(appended)) = answer else { panic!("{answer:?}") };
    assert_eq!(appended.last_position(), LogPosition::new(second(), position(7)));
    fill(&region.store, 20).await;
    assert_stream_is_log(&region, second(), 6, 27).await;
    assert_log_is_whole(&pool).await;
    let epochs = region.store.epochs().await.unwrap();
    assert_eq!(epochs.starts(), [(second(), position(6))]);

    // Whoever still reads the old stream finds it whole, and nobody adds to it.
    let context = region.operate().await;
    let old = context.get_stream(stream_name(Epoch::FIRST)).await.unwrap();
    let state = &old.cached_info().state;
    assert_eq!((state.first_sequence, state.last_sequence, state.messages), (1, 10, 10));
    let events = region.store.read_range(position(0), 6).await.unwrap();
    for event in events {
        Message::read(&old, event.at.position.get()).await.assert_is_of(&event);
    }
    let subject = format!("retired.{}.a", stream_name(Epoch::FIRST));
    let relay = async_nats::jetstream::new(region.client(User::Relay).await);
    let mut denied = relay;
    denied.set_timeout(std::time::Duration::from_millis(500));
    let published = denied.publish(subject, "stray".into()).await.unwrap().await;
    assert!(published.is_err(), "the relay's user may not publish there");
    let old = context.get_stream(stream_name(Epoch::FIRST)).await.unwrap();
    assert_eq!(old.cached_info().state.last_sequence, 10);
    running.stop().await;
}

#[tokio::test]
async fn a_relay_that_starts_after_the_epoch_was_opened_finds_its_place() {
    let (mut region, running, backup) = region_with_a_backup().await;
    running.stop().await;
    region.database.cluster.restore(&backup).await.unwrap();
    let forced = NewEpoch { force: true, ..after(6) };
    open_epoch(&region.database.pool(), LOG_ID, forced).await.unwrap();
    fill(&region.store, 3).await;
    let running = region.relay_of(&region.store, polling()).await;
    running.until_published(9).await;
    running.stop().await;
    // Once more, as after a second restore: two streams are behind it now.
    let forced = NewEpoch { force: true, ..after(9) };
    open_epoch(&region.database.pool(), LOG_ID, forced).await.unwrap();
    fill(&region.store, 2).await;
    let running = region.relay_of(&region.store, polling()).await;
    assert_stream_is_log(&region, Epoch::new(3).unwrap(), 9, 11).await;
    running.stop().await;
}

#[tokio::test]
async fn a_log_that_grew_past_its_lost_tail_goes_on_from_the_last_common_event() {
    let (mut region, running, backup) = region_with_a_backup().await;
    running.stop().await;
    region.database.cluster.restore(&backup).await.unwrap();
    // Positions 7 to 10 are used twice, by a process that has not seen their first use.
    let (store, _committer) = region.database.store().await;
    fill(&store, 5).await;
    let under_key = append(&order("again"), Expected::Any, 1);
    let first = store.append_once(under_key.clone(), KEY).await;
    let Ok(Once::Appended(first)) = first else { panic!("{first:?}") };
    let running = region.relay_of(&store, polling()).await;
    let reason = running.until_refused().await;
    assert!(reason.contains("has event"), "{reason}");
    let pool = region.database.pool();
    let client = region.client(User::Relay).await;
    let common = async || last_common(&pool, &client).await.unwrap();
    assert_eq!(common().await, position(6));

    let goes_on = open_epoch(&pool, LOG_ID, after(6)).await.unwrap_err();
    assert!(matches!(goes_on, NewEpochError::GoesOn { .. }), "{goes_on:?}");
    // The operator believes what the log says: the regions have read something else at 7 to 10.
    open_epoch(&pool, LOG_ID, after(12)).await.unwrap();
    eventually("the relay says that the epoch begins too late", async || {
        let RelayState::Refused(reason) = running.relay.status().borrow().state.clone() else {
            return None;
        };
        reason.contains("begins too late").then_some(())
    })
    .await;
    assert_eq!(common().await, position(6), "the regions were told no more since");
    let carried = NewEpoch { above: Above::Carry, ..after(6) };
    let opened = open_epoch(&pool, LOG_ID, carried).await.unwrap();
    let third = Epoch::new(3).unwrap();
    assert_eq!(opened, LogPosition::new(third, position(12)));
    running.until_published(12).await;
    // What was written between the loss and its discovery is claimed in the new epoch, as the log has it.
    let repeat = store.append_once(under_key, KEY).await;
    let Ok(Once::Repeated(Repeat::Replayed(repeat))) = repeat else { panic!("{repeat:?}") };
    assert_eq!(repeat.appended, Appended { epoch: third, ..first });
    fill(&store, 3).await;
    assert_eq!(common().await, position(15));
    assert_stream_is_log(&region, third, 6, 15).await;
    assert_log_is_whole(&pool).await;
    running.stop().await;
}

/// Whoever was judged before the epoch was opened may have written what it did not keep.
#[tokio::test]
async fn what_was_judged_in_an_epoch_that_is_over_is_not_appended() {
    let region = Region::start().await;
    let pool = region.database.pool();
    fill(&region.store, 5).await;
    let forced = NewEpoch { force: true, ..after(5) };
    open_epoch(&pool, LOG_ID, forced).await.unwrap();
    let judged = |epoch| region.store.judged_in(epoch);
    // They wait for the head together, so that one call has all of them.
    let head = hold_head(&pool).await;
    let waiting = ["first", "old", "new", "any"].map(|id| append(&order(id), Expected::Any, 1));
    let [first, old, new, any] = waiting;
    let store = region.store.clone();
    let first = tokio::spawn(async move { store.append(first).await });
    until_blocked(&pool, 1).await;
    let (judged_old, judged_new) = (judged(Epoch::FIRST), judged(second()));
    let others = async {
        tokio::join!(judged_old.append(old), judged_new.append(new), region.store.append(any))
    };
    let mut others = std::pin::pin!(others);
    assert!(futures::poll!(&mut others).is_pending());
    head.commit().await.unwrap();
    let (old, new, any) = others.await;
    first.await.unwrap().unwrap();
    assert!(matches!(old, Err(AppendError::EpochOver)), "{old:?}");
    assert_eq!((new.unwrap().epoch, any.unwrap().epoch), (second(), second()));
    let under_key =
        judged(Epoch::FIRST).append_once(append(&order("old"), Expected::Any, 1), KEY).await;
    assert!(matches!(under_key, Err(AppendError::EpochOver)), "{under_key:?}");
    assert_eq!(assert_log_is_whole(&pool).await, 8);
}

/// Nobody appends, and no answer tells the relay of the epoch.
#[tokio::test]
async fn a_relay_at_rest_moves_on_to_an_epoch_that_another_process_opened() {
    let region = Region::start().await;
    let running = region.relay_of(&region.store, polling()).await;
    fill(&region.store, 3).await;
    running.until_published(3).await;
    let forced = NewEpoch { force: true, ..after(3) };
    open_epoch(&region.database.pool(), LOG_ID, forced).await.unwrap();
    running
        .until("the relay is in the new epoch", |status| {
            status.published == Some(LogPosition::new(second(), position(3)))
        })
        .await;
    let stream = region.operate().await.get_stream(stream_name(second())).await.unwrap();
    let state = &stream.cached_info().state;
    assert_eq!((state.first_sequence, state.last_sequence), (4, 3));
    running.stop().await;
}

#[tokio::test]
async fn epochs_are_listed_with_what_they_kept() {
    let region = Region::start().await;
    fill(&region.store, 4).await;
    let pool = region.database.pool();
    let carried = NewEpoch { after: position(2), force: true, above: Above::Carry };
    open_epoch(&pool, LOG_ID, carried).await.unwrap();
    let (head, epochs) = list_epochs(&pool).await.unwrap().unwrap();
    assert_eq!(head.at, LogPosition::new(second(), position(4)));
    let starts = epochs.iter().map(|opened| (opened.epoch, opened.starts_after));
    assert_eq!(starts.collect::<Vec<_>>(), [(Epoch::FIRST, position(0)), (second(), position(2))]);
    assert!(epochs.iter().all(|opened| opened.opened_at.ends_with('Z')), "{epochs:?}");
}

#[tokio::test]
async fn an_epoch_is_not_opened_by_mistake() {
    let region = Region::start().await;
    fill(&region.store, 5).await;
    let pool = region.database.pool();
    let refused = async |log_id, new| open_epoch(&pool, log_id, new).await.unwrap_err();
    let error = refused(LOG_ID, after(5)).await;
    assert!(matches!(error, NewEpochError::NotRefused), "{error:?}");
    sqlx::query("update log_head set refused_because = 'under repair'")
        .execute(&pool)
        .await
        .unwrap();
    let error = refused(LOG_ID, after(4)).await;
    assert!(matches!(error, NewEpochError::GoesOn { .. }), "{error:?}");
    let error = refused(LOG_ID, after(6)).await;
    assert!(matches!(error, NewEpochError::EndsBefore { .. }), "{error:?}");
    let error = refused(LogId::new(Uuid::from_u128(9)), after(5)).await;
    assert!(matches!(error, NewEpochError::OtherLog { found, .. } if found == LOG_ID));
    let head = region.store.head().await.unwrap();
    assert_eq!(head.refused_because.as_deref(), Some("under repair"), "nothing was changed");
    assert_eq!(region.store.epochs().await.unwrap().current(), Epoch::FIRST);
    let opened = open_epoch(&pool, LOG_ID, after(5)).await.unwrap();
    assert_eq!(opened, LogPosition::new(second(), position(5)));
    fill(&region.store, 1).await;
}
