//! Idempotency keys: a repeat is answered like the first, whenever and wherever it comes.

use event_store::{
    AnswerFormat, AppendError, Appended, EventStore, Expected, FirstAnswer, Idempotency, Once,
    Repeat, StoreConfig,
};
use futures::future::join_all;
use sqlx::PgPool;
use uuid::Uuid;

use crate::support::{
    Database, LOG_ID, append, assert_log_is_whole, eventually, fill, hold_head, order, pool,
    position, until_blocked, version,
};
use crate::wire::{Broken, Fault, over_a_wire};

fn key(key: u8, request: u8) -> Idempotency {
    Idempotency {
        scope: [0; 32],
        key: [key; 32],
        request: [request; 32],
        answer_format: AnswerFormat::FIRST,
    }
}

fn appended(answer: Result<Once, AppendError>) -> Appended {
    let Ok(Once::Appended(appended)) = answer else { panic!("{answer:?}") };
    appended
}

fn replayed(answer: Result<Once, AppendError>) -> FirstAnswer {
    let Ok(Once::Repeated(Repeat::Replayed(first))) = answer else { panic!("{answer:?}") };
    first
}

fn assert_mismatched(answer: Result<Once, AppendError>) {
    assert!(matches!(answer, Ok(Once::Repeated(Repeat::Mismatched))), "{answer:?}");
}

async fn key_count(pool: &PgPool) -> i64 {
    sqlx::query_scalar("select count(*) from idempotency").fetch_one(pool).await.unwrap()
}

#[tokio::test]
async fn a_repeat_is_answered_like_the_first_whatever_became_of_the_aggregate() {
    let database = Database::start().await;
    let (store, _committer) = database.store().await;
    fill(&store, 3).await;
    let (a, key) = (order("a"), key(1, 1));
    let place = |event_count| append(&a, Expected::MustNotExist, event_count);
    assert_eq!(store.find_repeat(&key).await.unwrap(), None);
    let second_format = AnswerFormat::new(2).unwrap();
    let first = Idempotency { answer_format: second_format, ..key };
    let first = appended(store.append_once(place(3), first).await);
    assert_eq!((first.first_version, first.first_position), (version(1), position(4)));

    store.append(append(&a, Expected::Any, 1)).await.unwrap();
    let (other, _other_committer) = database.store().await;
    for store in [&store, &other] {
        let again = replayed(store.append_once(place(2), key).await);
        assert_eq!(again.appended, first, "to the last member");
        assert_eq!((&again.aggregate, again.answer_format), (&a, second_format));
        let found = store.find_repeat(&key).await.unwrap();
        assert_eq!(found, Some(Repeat::Replayed(again)));
    }
    assert_eq!(assert_log_is_whole(&database.pool()).await, 7);
    let events = store.read_aggregate(&a, version(1), 3).await.unwrap();
    let ids: Vec<_> = events.iter().map(|event| event.id).collect();
    assert_eq!(ids, first.event_ids);
    assert_eq!(events[0].committed_at, first.committed_at);
}

#[tokio::test]
async fn another_request_under_the_key_is_refused_and_another_scope_is_another_key() {
    let database = Database::start().await;
    let (store, _committer) = database.store().await;
    let any = |id| append(&order(id), Expected::Any, 1);
    appended(store.append_once(any("a"), key(1, 1)).await);
    assert_mismatched(store.append_once(any("a"), key(1, 2)).await);
    let found = store.find_repeat(&key(1, 2)).await.unwrap();
    assert_eq!(found, Some(Repeat::Mismatched));
    assert_eq!(assert_log_is_whole(&database.pool()).await, 1);
    let elsewhere = Idempotency { scope: [9; 32], ..key(1, 2) };
    assert_eq!(store.find_repeat(&elsewhere).await.unwrap(), None);
    appended(store.append_once(any("a"), elsewhere).await);
    appended(store.append_once(any("b"), key(2, 2)).await);
    assert_eq!(assert_log_is_whole(&database.pool()).await, 3);
}

#[tokio::test]
async fn a_request_that_failed_is_tried_again_under_its_key() {
    let database = Database::start().await;
    let (store, _committer) = database.store().await;
    fill(&store, 1).await;
    let place = append(&order("o-0"), Expected::MustNotExist, 1);
    let answer = store.append_once(place, key(1, 1)).await;
    assert!(matches!(answer, Err(AppendError::Conflict { .. })), "{answer:?}");
    assert_eq!(store.find_repeat(&key(1, 1)).await.unwrap(), None);
    appended(store.append_once(append(&order("o-0"), Expected::Any, 1), key(1, 1)).await);
    assert_eq!(assert_log_is_whole(&database.pool()).await, 2);
}

#[tokio::test]
async fn repeats_in_one_gathered_commit_are_answered_like_the_first_of_them() {
    let database = Database::start().await;
    let (store, _committer) = database.store().await;
    let pool = database.pool();
    let lock = hold_head(&pool).await;
    let plug = store.append(append(&order("plug"), Expected::Any, 1));
    let (a, b) = (order("a"), order("b"));
    let without_key = store.append(append(&a, Expected::Any, 1));
    let gathered = join_all([
        store.append_once(append(&b, Expected::MustNotExist, 2), key(1, 1)),
        store.append_once(append(&b, Expected::MustNotExist, 2), key(1, 1)),
        store.append_once(append(&b, Expected::MustNotExist, 3), key(1, 2)),
        // Loses, so the next one under its key is the first.
        store.append_once(append(&b, Expected::MustNotExist, 1), key(2, 1)),
        store.append_once(append(&b, Expected::Any, 2), key(2, 1)),
        store.append_once(append(&b, Expected::Any, 3), key(2, 1)),
    ]);
    let release = async {
        until_blocked(&pool, 1).await;
        lock.rollback().await.unwrap();
    };
    let (plug, without_key, answers, ()) = tokio::join!(plug, without_key, gathered, release);
    plug.unwrap();
    let [first, again, mismatched, lost, second, second_again] = answers.try_into().unwrap();
    let (first, second) = (appended(first), appended(second));
    let without_key = without_key.unwrap();
    assert_eq!(first.committed_at, without_key.committed_at, "they were committed together");
    assert_eq!((first.first_version, first.first_position.get()), (version(1), 3));
    assert_eq!((second.first_version, second.first_position.get()), (version(3), 5));
    assert_eq!(replayed(again).appended, first);
    assert_mismatched(mismatched);
    assert!(matches!(lost, Err(AppendError::Conflict { current, .. }) if current == version(2)));
    assert_eq!(replayed(second_again).appended, second);
    assert_eq!(assert_log_is_whole(&pool).await, 6);
    assert_eq!(key_count(&pool).await, 2);
    let later = store.append_once(append(&b, Expected::MustNotExist, 2), key(1, 1)).await;
    assert_eq!(replayed(later).appended, first);
}

#[tokio::test]
async fn of_repeats_that_race_in_several_processes_one_is_appended() {
    let database = Database::start().await;
    let mut stores = Vec::new();
    for _ in 0..3 {
        stores.push(database.store().await);
    }
    for round in 0..20 {
        let racers = stores.iter().flat_map(|(store, _)| {
            let append = || append(&order(&format!("o-{round}")), Expected::MustNotExist, 2);
            (0..4).map(move |_| store.append_once(append(), key(round, 1)))
        });
        let answers = join_all(racers).await;
        let (first, repeats): (Vec<_>, Vec<_>) =
            answers.into_iter().partition(|answer| matches!(answer, Ok(Once::Appended(_))));
        assert_eq!((first.len(), repeats.len()), (1, 11), "round {round}: {repeats:?}");
        let first = first.into_iter().map(appended).next().unwrap();
        for repeat in repeats {
            assert_eq!(replayed(repeat).appended, first);
        }
    }
    assert_eq!(assert_log_is_whole(&database.pool()).await, 40);
}

#[tokio::test]
async fn keys_are_forgotten_in_small_batches_when_they_are_old_enough() {
    let database = Database::start().await;
    let (store, committer) = database.store().await;
    let any = || append(&order("a"), Expected::Any, 1);
    for number in 0..10 {
        appended(store.append_once(any(), key(number, 1)).await);
    }
    committer.stop().await;
    let pool = database.pool();
    // Two stay young; they are what shows that pruning stops.
    sqlx::query(
        "update idempotency set committed_at = committed_at - interval '25 hours'
         where get_byte(key_hash, 0) < 8",
    )
    .execute(&pool)
    .await
    .unwrap();
    let config = StoreConfig { prune_rows_max: 3, ..StoreConfig::new(LOG_ID) };
    let (store, committer) = EventStore::open(self::pool(&database.url), config).await.unwrap();
    eventually("the old keys are forgotten", async || (key_count(&pool).await <= 2).then_some(()))
        .await;
    committer.stop().await;
    assert_eq!(key_count(&pool).await, 2);
    assert_eq!(store.find_repeat(&key(7, 1)).await.unwrap(), None);
    assert!(store.find_repeat(&key(8, 1)).await.unwrap().is_some());
    assert_eq!(assert_log_is_whole(&pool).await, 10, "the events stay");
}

#[tokio::test]
async fn a_release_that_knows_no_keys_appends_beside_one_that_does() {
    let database = Database::start().await;
    let (store, _committer) = database.store().await;
    let pool = database.pool();
    appended(store.append_once(append(&order("a"), Expected::Any, 2), key(1, 1)).await);
    for version_before in [0_i64, 1] {
        let event_id = Uuid::now_v7();
        let (is_appended, at_position): (bool, i64) = sqlx::query_as(
            "select is_appended, at_position from append_events(
                 $1, $2, '{order}', '{old}', '{1}', array[$3], '{1}', array[$4], '{order}',
                 '{old}', '{OrderPlaced}', '{1}', array[$4], array[$4],
                 array[null]::bytea[], array[null]::text[], '{\"{}\"}'
             )",
        )
        .bind(LOG_ID.get())
        .bind(Uuid::new_v4())
        .bind(version_before)
        .bind(event_id)
        .fetch_one(&pool)
        .await
        .unwrap();
        assert!(is_appended);
        fill(&store, 1).await;
        assert_eq!(store.head().await.unwrap().at.position.get() as i64, at_position + 1);
    }
    assert_eq!(assert_log_is_whole(&pool).await, 6);
}

/// A store that reaches its database over a wire, with one event in the log.
#[tokio::test]
async fn a_repeat_whose_answer_is_lost_is_still_answered_like_the_first() {
    let Broken { database, wire, store, .. } = over_a_wire().await;
    let place = || append(&order("a"), Expected::MustNotExist, 2);
    let first = appended(store.append_once(place(), key(1, 1)).await);
    // Alone in its commit: nothing shows in the log that the call ran.
    wire.break_connections(Fault::LoseAnswer);
    assert_eq!(replayed(store.append_once(place(), key(1, 1)).await).appended, first);
    // Gathered with one whose events show that the call ran.
    wire.break_connections(Fault::LoseAnswer);
    let (again, other, changed) = tokio::join!(
        store.append_once(place(), key(1, 1)),
        store.append_once(append(&order("b"), Expected::Any, 1), key(2, 1)),
        store.append_once(place(), key(1, 2)),
    );
    assert_eq!(replayed(again).appended, first);
    assert_eq!(appended(other).first_position, position(4));
    assert_mismatched(changed);
    wire.break_connections(Fault::None);
    assert_eq!(assert_log_is_whole(&database.pool()).await, 4);
}

#[tokio::test]
async fn a_commit_of_unknown_outcome_that_happened_is_found_by_the_retry() {
    let Broken { database, wire, store, .. } = over_a_wire().await;
    let place = append(&order("a"), Expected::MustNotExist, 2);
    wire.refuse(true);
    wire.break_connections(Fault::LoseAnswer);
    let answer = store.append_once(place.clone(), key(1, 1)).await;
    assert!(matches!(answer, Err(AppendError::OutcomeUnknown)), "{answer:?}");
    wire.refuse(false);
    wire.break_connections(Fault::None);
    // The retry is another request to the gateway, with other event ids.
    let retry = append(&order("a"), Expected::MustNotExist, 2);
    let found = replayed(store.append_once(retry, key(1, 1)).await);
    let ids: Vec<_> = place.events.iter().map(|event| event.id).collect();
    assert_eq!((found.appended.event_ids, found.appended.first_position), (ids, position(2)));
    assert_eq!(assert_log_is_whole(&database.pool()).await, 3);
}

#[tokio::test]
async fn a_commit_of_unknown_outcome_that_arrives_after_its_retry_does_nothing() {
    let Broken { database, wire, store, .. } = over_a_wire().await;
    let place = || append(&order("a"), Expected::Any, 2);
    wire.refuse(true);
    wire.break_connections(Fault::Delay);
    let answer = store.append_once(place(), key(1, 1)).await;
    assert!(matches!(answer, Err(AppendError::OutcomeUnknown)), "{answer:?}");
    wire.refuse(false);
    let retried = appended(store.append_once(place(), key(1, 1)).await);
    assert_eq!(retried.first_position, position(2));
    wire.deliver();
    eventually("the late call is answered like its retry", async || {
        wire.late_answer().contains("replayed").then_some(())
    })
    .await;
    assert_eq!(assert_log_is_whole(&database.pool()).await, 3);
}
