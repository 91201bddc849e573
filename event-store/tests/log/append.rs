//! Appending: order, versions, gathering, bounds.

use consistency::{Epoch, LogPosition, Position, Traceparent, Version};
use event_store::{AppendError, EventStore, Expected, InvalidAppend, OpenError, StoreConfig};
use futures::future::join_all;

use crate::support::{
    Database, LOG_ID, append, assert_log_is_whole, event, eventually, fill, hold_head, is_conflict,
    order, pool, position, until_blocked, version,
};

fn last(version: Version) -> Expected {
    Expected::Last { epoch: Epoch::FIRST, version }
}

#[tokio::test]
async fn positions_are_dense_and_versions_gapless_under_concurrent_appends() {
    let database = Database::start().await;
    let mut stores = Vec::new();
    for _ in 0..3 {
        stores.push(database.store().await);
    }
    let writers = stores.iter().flat_map(|(store, _)| {
        (0..8).map(async |writer: usize| {
            for nth in 0..25 {
                let order = order(&format!("o-{}", (writer + nth) % 5));
                let events = 1 + nth % 3;
                let appended = store.append(append(&order, Expected::Any, events)).await.unwrap();
                assert_eq!(appended.event_ids.len(), events);
            }
        })
    });
    join_all(writers).await;
    let written: usize = (0..25).map(|nth| 1 + nth % 3).sum();
    let count = assert_log_is_whole(&database.pool()).await;
    assert_eq!(count, 3 * 8 * written as i64);
    for (_, committer) in stores {
        committer.stop().await;
    }
}

#[tokio::test]
async fn of_concurrent_appends_that_expect_the_same_version_one_wins() {
    let database = Database::start().await;
    let (first, _first) = database.store().await;
    let (second, _second) = database.store().await;
    let order = order("o-1");
    for round in 0..20 {
        let expected = if round == 0 { Expected::MustNotExist } else { last(version(round)) };
        let attempts = [&first, &second].into_iter().flat_map(|store| {
            let order = &order;
            (0..4).map(move |_| store.append(append(order, expected, 1)))
        });
        let answers = join_all(attempts).await;
        let winners: Vec<_> = answers.iter().flatten().collect();
        assert_eq!(winners.len(), 1, "round {round}");
        assert_eq!(winners[0].first_version, version(round + 1));
        assert_eq!(answers.iter().filter(|answer| is_conflict(answer)).count(), 7);
    }
    assert_eq!(assert_log_is_whole(&database.pool()).await, 20);
}

#[tokio::test]
async fn a_conflict_tells_where_the_aggregate_stands() {
    let database = Database::start().await;
    let (store, _committer) = database.store().await;
    let (known, unknown) = (order("known"), order("unknown"));
    fill(&store, 3).await;
    let appended = store.append(append(&known, Expected::MustNotExist, 2)).await.unwrap();
    assert_eq!((appended.first_version, appended.first_position), (version(1), position(4)));
    assert_eq!((appended.last_version(), appended.last_position().position.get()), (version(2), 5));

    let conflict = |answer| match answer {
        Err(AppendError::Conflict { current, at }) => (current, at),
        other => panic!("{other:?}"),
    };
    let at_five = LogPosition::new(Epoch::FIRST, position(5));
    let answer = store.append(append(&known, Expected::MustNotExist, 1)).await;
    assert_eq!(conflict(answer), (version(2), at_five));
    let answer = store.append(append(&known, last(version(1)), 1)).await;
    assert_eq!(conflict(answer), (version(2), at_five));
    let answer = store.append(append(&unknown, last(version(1)), 1)).await;
    assert_eq!(conflict(answer), (Version::ZERO, LogPosition::ORIGIN));
    let lost = Expected::Last { epoch: Epoch::new(2).unwrap(), version: version(2) };
    let answer = store.append(append(&known, lost, 1)).await;
    assert_eq!(conflict(answer), (version(2), at_five), "the version of another epoch is another");

    let head = store.aggregate_head(&known).await.unwrap();
    assert_eq!((head.version, head.at), (version(2), at_five));
    store.append(append(&known, last(version(2)), 1)).await.unwrap();
    assert_eq!(assert_log_is_whole(&database.pool()).await, 6);
}

#[tokio::test]
async fn a_loser_of_a_gathered_commit_leaves_the_others_alone() {
    let database = Database::start().await;
    let (store, _committer) = database.store().await;
    let pool = database.pool();
    let lock = hold_head(&pool).await;
    let plug = store.append(append(&order("plug"), Expected::Any, 1));
    let a = order("a");
    let gathered = join_all([
        store.append(append(&a, Expected::MustNotExist, 2)),
        store.append(append(&a, Expected::MustNotExist, 1)),
        store.append(append(&order("b"), last(version(1)), 1)),
        store.append(append(&a, last(version(2)), 3)),
        store.append(append(&order("c"), Expected::Any, 1)),
    ]);
    let release = async {
        until_blocked(&pool, 1).await;
        lock.rollback().await.unwrap();
    };
    let (plug, answers, ()) = tokio::join!(plug, gathered, release);
    plug.unwrap();
    let [first, again, missing, next, other] = answers.try_into().unwrap();
    let (first, next, other) = (first.unwrap(), next.unwrap(), other.unwrap());
    assert_eq!(first.committed_at, other.committed_at, "they were committed together");
    assert_eq!((first.first_version, first.first_position.get()), (version(1), 2));
    assert_eq!((next.first_version, next.first_position.get()), (version(3), 4));
    assert_eq!((other.first_version, other.first_position.get()), (version(1), 7));
    // Lost against an append of the same commit.
    let AppendError::Conflict { current, at } = again.unwrap_err() else { panic!() };
    assert_eq!((current, at.position.get()), (version(2), 3));
    let AppendError::Conflict { current, at } = missing.unwrap_err() else { panic!() };
    assert_eq!((current, at), (Version::ZERO, LogPosition::ORIGIN));
    assert_eq!(assert_log_is_whole(&pool).await, 7);
}

#[tokio::test]
async fn an_append_at_fault_does_not_fail_those_gathered_with_it() {
    let database = Database::start().await;
    let (store, _committer) = database.store().await;
    let used = append(&order("used"), Expected::Any, 1);
    store.append(used.clone()).await.unwrap();
    let pool = database.pool();
    let lock = hold_head(&pool).await;
    let plug = store.append(append(&order("plug"), Expected::Any, 1));
    let gathered = join_all([
        store.append(append(&order("a"), Expected::Any, 1)),
        store.append(used),
        store.append(append(&order("b"), Expected::Any, 1)),
    ]);
    let release = async {
        until_blocked(&pool, 1).await;
        lock.rollback().await.unwrap();
    };
    let (plug, answers, ()) = tokio::join!(plug, gathered, release);
    plug.unwrap();
    assert!(answers[0].is_ok() && answers[2].is_ok());
    assert!(matches!(answers[1], Err(AppendError::Rejected(_))), "its id was used before");
    assert_eq!(assert_log_is_whole(&pool).await, 4);
}

#[tokio::test]
async fn a_gathered_commit_keeps_its_bounds_and_the_order() {
    let database = Database::start().await;
    let config = StoreConfig {
        append_events_max: 4,
        gather_events_max: 4,
        gather_commands_max: 3,
        ..StoreConfig::new(LOG_ID)
    };
    let (store, _committer) = EventStore::open(pool(&database.url), config).await.unwrap();
    let pool = database.pool();
    let lock = hold_head(&pool).await;
    let plug = store.append(append(&order("plug"), Expected::Any, 1));
    let release = async {
        until_blocked(&pool, 1).await;
        let waiting = [2, 2, 1, 1, 1, 1, 4]
            .map(|event_count| store.append(append(&order("a"), Expected::Any, event_count)));
        // All are in the queue before the lock is released: each is polled once, in order.
        tokio::join!(join_all(waiting), async { lock.rollback().await.unwrap() }).0
    };
    let (plug, answers) = tokio::join!(plug, release);
    plug.unwrap();
    let appended: Vec<_> = answers.into_iter().map(Result::unwrap).collect();
    let gathered = appended.chunk_by(|one, next| one.committed_at == next.committed_at);
    let event_counts: Vec<Vec<usize>> =
        gathered.map(|batch| batch.iter().map(|one| one.event_ids.len()).collect()).collect();
    assert_eq!(event_counts, [vec![2, 2], vec![1, 1, 1], vec![1], vec![4]]);
    let positions: Vec<u64> = appended.iter().map(|one| one.first_position.get()).collect();
    assert_eq!(positions, [2, 4, 6, 7, 8, 9, 10]);
}

#[tokio::test]
async fn a_full_queue_refuses_at_once_and_a_stopped_store_finishes_what_it_took() {
    let database = Database::start().await;
    let config = StoreConfig { queue_commands_max: 2, ..StoreConfig::new(LOG_ID) };
    let (store, committer) = EventStore::open(pool(&database.url), config).await.unwrap();
    let pool = database.pool();
    let lock = hold_head(&pool).await;
    let plug = store.append(append(&order("plug"), Expected::Any, 1));
    let rest = async {
        until_blocked(&pool, 1).await;
        let waiting = join_all((0..3).map(|_| store.append(append(&order("a"), Expected::Any, 1))));
        let release = async {
            // Polled after those above: the two that fit are in the queue.
            let stop = tokio::spawn(committer.stop());
            eventually("the store is stopping", async || {
                let answer = store.append(append(&order("late"), Expected::Any, 1)).await;
                matches!(answer, Err(AppendError::Stopping)).then_some(())
            })
            .await;
            lock.rollback().await.unwrap();
            stop.await.unwrap();
        };
        tokio::join!(waiting, release).0
    };
    let (plug, answers) = tokio::join!(plug, rest);
    plug.unwrap();
    assert!(answers[0].is_ok() && answers[1].is_ok());
    assert!(matches!(answers[2], Err(AppendError::Overloaded)));
    assert_eq!(assert_log_is_whole(&pool).await, 3);
}

#[tokio::test]
async fn what_could_not_be_published_or_read_is_not_appended() {
    let database = Database::start().await;
    let config = StoreConfig {
        payload_bytes_max: 2000,
        append_events_max: 3,
        gather_bytes_max: 4000,
        ..StoreConfig::new(LOG_ID)
    };
    let (store, _committer) = EventStore::open(pool(&database.url), config).await.unwrap();
    let with = |data: &[&str]| {
        let mut append = append(&order("o-1"), Expected::Any, 0);
        append.events = data.iter().map(|data| event(data)).collect();
        append
    };
    let refused = async |append| match store.append(append).await {
        Err(AppendError::Invalid(invalid)) => invalid,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(with(&[])).await, InvalidAppend::NoEvents);
    let many = refused(with(&["1", "2", "3", "4"])).await;
    assert_eq!(many, InvalidAppend::TooManyEvents { count: 4, max: 3 });
    let too_deep = "[".repeat(200) + &"]".repeat(200);
    for bad in ["", "{", "{} {}", "nul", "'a'", "1e999", r#""\ud800""#, "\"\u{1}\"", &too_deep] {
        let invalid = refused(with(&["{}", bad])).await;
        assert!(matches!(invalid, InvalidAppend::Data { index: 1, .. }), "{bad:?}: {invalid:?}");
    }
    let text = |length| format!("\"{}\"", "x".repeat(length));
    let invalid = refused(with(&["{}", &text(2000)])).await;
    assert!(matches!(invalid, InvalidAppend::TooLarge { index: 1, max: 2000, .. }), "{invalid:?}");
    let large = text(900);
    let invalid = refused(with(&[&large, &large, &large])).await;
    assert!(matches!(invalid, InvalidAppend::TooLargeTogether { max: 4000, .. }), "{invalid:?}");
    let mut twice = with(&["1", "2"]);
    twice.events[1].id = twice.events[0].id;
    assert_eq!(refused(twice).await, InvalidAppend::RepeatedId { index: 1 });

    let whole = r#" {"a": [1, -2.5e3, null, true, "é\u0000\n"], "a": 18446744073709551615} "#;
    store.append(with(&[whole])).await.unwrap();
    let events = store.read_range(Position::ZERO, 10).await.unwrap();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].data, whole, "kept to the byte");
}

#[tokio::test]
async fn what_was_appended_is_read_back_whole() {
    let database = Database::start().await;
    let (store, _committer) = database.store().await;
    fill(&store, 5).await;
    let aggregate = order("whole");
    let mut given = append(&aggregate, Expected::MustNotExist, 3);
    given.idempotency_key_hash = Some([0xab; 32]);
    given.traceparent =
        Traceparent::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    let appended = store.append(given.clone()).await.unwrap();
    let events = store.read_aggregate(&aggregate, version(1), 10).await.unwrap();
    assert_eq!(events.len(), 3);
    for (nth, (event, new)) in events.iter().zip(&given.events).enumerate() {
        assert_eq!(event.at.position.get(), 6 + nth as u64);
        assert_eq!((event.version.get(), event.id), (1 + nth as u64, new.id));
        assert_eq!((&event.data, &event.event_type), (&new.data, &new.event_type));
        assert_eq!(
            (event.correlation_id, event.causation_id),
            (given.correlation_id, given.causation_id)
        );
        assert_eq!(event.idempotency_key_hash, given.idempotency_key_hash);
        assert_eq!(event.traceparent, given.traceparent);
        assert_eq!(event.committed_at, appended.committed_at);
    }
    let later = store.read_aggregate(&aggregate, version(2), 1).await.unwrap();
    assert_eq!(later, events[1..2]);
    let range = store.read_range(position(5), 2).await.unwrap();
    assert_eq!(range, events[..2]);
    assert!(store.read_range(position(8), 2).await.unwrap().is_empty());
    let head = store.head().await.unwrap();
    assert_eq!((head.at, head.event_id), (events[2].at, events[2].id));
    assert_eq!(store.head_seen(), head.at);
    assert_eq!(store.epochs().await.unwrap().current(), Epoch::FIRST);
}

#[tokio::test]
async fn a_read_of_large_events_answers_with_fewer() {
    let database = Database::start().await;
    let config = StoreConfig { read_bytes_max: 25, ..StoreConfig::new(LOG_ID) };
    let (store, _committer) = EventStore::open(pool(&database.url), config).await.unwrap();
    let aggregate = order("o-1");
    let mut given = append(&aggregate, Expected::Any, 0);
    given.events = [10, 10, 10, 40].map(|length| event(&"1".repeat(length))).to_vec();
    store.append(given).await.unwrap();
    let range = async |after| store.read_range(position(after), 10).await.unwrap().len();
    assert_eq!((range(0).await, range(2).await, range(3).await, range(4).await), (2, 1, 1, 0));
    let from =
        async |from| store.read_aggregate(&aggregate, version(from), 10).await.unwrap().len();
    assert_eq!((from(1).await, from(4).await), (2, 1));
}

#[tokio::test]
async fn a_database_that_holds_another_log_is_refused() {
    let database = Database::start().await;
    let (store, _committer) = database.store().await;
    fill(&store, 1).await;
    let other = StoreConfig::new(consistency::LogId::new(uuid::Uuid::from_u128(9)));
    let error = EventStore::open(pool(&database.url), other).await.unwrap_err();
    assert!(matches!(error, OpenError::OtherLog { found, .. } if found == LOG_ID));
    // The one under a running store is exchanged.
    sqlx::query("update log_head set log_id = gen_random_uuid()")
        .execute(&database.pool())
        .await
        .unwrap();
    let answer = store.append(append(&order("o-1"), Expected::Any, 1)).await;
    assert!(matches!(answer, Err(AppendError::Refused { .. })), "{answer:?}");
}

#[tokio::test]
async fn a_refusing_log_takes_nothing_and_says_why() {
    let database = Database::start().await;
    let (store, _committer) = database.store().await;
    fill(&store, 1).await;
    let pool = database.pool();
    sqlx::query("update log_head set refused_because = 'under repair'")
        .execute(&pool)
        .await
        .unwrap();
    let answer = store.append(append(&order("o-1"), Expected::Any, 1)).await;
    assert!(matches!(answer, Err(AppendError::Refused { reason }) if reason == "under repair"));
    sqlx::query("update log_head set refused_because = null").execute(&pool).await.unwrap();
    fill(&store, 1).await;
    assert_eq!(assert_log_is_whole(&pool).await, 2);
}

#[tokio::test]
async fn a_configuration_that_contradicts_itself_is_refused() {
    let database = Database::start().await;
    let config = StoreConfig { gather_events_max: 10, ..StoreConfig::new(LOG_ID) };
    let error = EventStore::open(pool(&database.url), config).await.unwrap_err();
    assert!(matches!(error, OpenError::Config(_)));
}
