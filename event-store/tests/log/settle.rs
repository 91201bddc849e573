//! Commits whose answer is lost: never a false success, never a false failure.

use event_store::{AppendError, Expected};

use crate::support::{append, assert_log_is_whole, eventually, fill, order, version};
use crate::wire::{Broken, Fault, over_a_wire};

#[tokio::test]
async fn a_commit_whose_answer_is_lost_is_found_and_not_repeated() {
    for event_count in [1, 3] {
        let Broken { database, wire, store, .. } = over_a_wire().await;
        wire.break_connections(Fault::LoseAnswer);
        let append = append(&order("a"), Expected::MustNotExist, event_count);
        let appended = store.append(append).await.unwrap();
        assert_eq!((appended.first_version, appended.first_position.get()), (version(1), 2));
        assert_eq!(assert_log_is_whole(&database.pool()).await, 1 + event_count as i64);
        let events = store.read_aggregate(&order("a"), version(1), 10).await.unwrap();
        assert_eq!(events[0].committed_at, appended.committed_at);
    }
}

#[tokio::test]
async fn a_conflict_in_a_commit_whose_answer_is_lost_stays_a_conflict() {
    let Broken { database, wire, store, .. } = over_a_wire().await;
    store.append(append(&order("a"), Expected::MustNotExist, 1)).await.unwrap();
    wire.break_connections(Fault::LoseAnswer);
    let lost = store.append(append(&order("a"), Expected::MustNotExist, 1));
    let won = store.append(append(&order("b"), Expected::MustNotExist, 1));
    let (lost, won) = tokio::join!(lost, won);
    let Err(AppendError::Conflict { current, at }) = lost else { panic!("{lost:?}") };
    assert_eq!((current, at.position.get()), (version(1), 2));
    assert_eq!(won.unwrap().first_version, version(1));
    assert_eq!(assert_log_is_whole(&database.pool()).await, 3);
}

#[tokio::test]
async fn a_call_that_arrives_after_it_was_given_up_does_nothing() {
    for (event_count, turned_away) in [(1, "INSERT 0 0"), (2, "TM003")] {
        let Broken { database, wire, store, .. } = over_a_wire().await;
        wire.break_connections(Fault::Delay);
        // Given up, and made again on another connection.
        let append = append(&order("a"), Expected::Any, event_count);
        let appended = store.append(append).await.unwrap();
        assert_eq!(appended.first_position.get(), 2);
        wire.deliver();
        eventually("the late call is turned away", async || {
            wire.late_answer().contains(turned_away).then_some(())
        })
        .await;
        assert_eq!(assert_log_is_whole(&database.pool()).await, 1 + event_count as i64);
    }
}

#[tokio::test]
async fn a_session_that_is_terminated_before_its_commit_is_made_again() {
    let Broken { database, store, wire: _wire, .. } = over_a_wire().await;
    let pool = database.pool();
    let mut lock = pool.begin().await.unwrap();
    sqlx::query("select from log_head for update").execute(&mut *lock).await.unwrap();
    let append = store.append(append(&order("a"), Expected::MustNotExist, 1));
    let terminate = async {
        eventually("the waiting session is terminated", async || {
            let terminated: Option<bool> = sqlx::query_scalar(
                "select pg_terminate_backend(pid) from pg_stat_activity
                 where datname = current_database() and wait_event_type = 'Lock' and query like '%append_events%'",
            )
            .fetch_optional(&pool)
            .await
            .unwrap();
            terminated
        })
        .await;
        lock.rollback().await.unwrap();
    };
    let (appended, ()) = tokio::join!(append, terminate);
    assert_eq!(appended.unwrap().first_position.get(), 2);
    assert_eq!(assert_log_is_whole(&pool).await, 2);
}

#[tokio::test]
async fn a_commit_that_cannot_be_looked_up_has_an_unknown_outcome() {
    let Broken { database, wire, store, .. } = over_a_wire().await;
    wire.refuse(true);
    wire.break_connections(Fault::LoseAnswer);
    let answer = store.append(append(&order("a"), Expected::Any, 1)).await;
    assert!(matches!(answer, Err(AppendError::OutcomeUnknown)), "{answer:?}");
    wire.refuse(false);
    wire.break_connections(Fault::None);
    assert_eq!(assert_log_is_whole(&database.pool()).await, 2, "it was committed");
    fill(&store, 1).await;
    assert_eq!(assert_log_is_whole(&database.pool()).await, 3);
}

#[tokio::test]
async fn without_a_database_appends_fail_and_later_ones_succeed() {
    let Broken { mut database, store, wire: _wire, .. } = over_a_wire().await;
    database.cluster.stop().await.unwrap();
    let answer = store.append(append(&order("a"), Expected::Any, 1)).await;
    // The connection was open, so what became of the first is unknown until the database is back.
    assert!(matches!(answer, Err(AppendError::OutcomeUnknown)), "{answer:?}");
    let answer = store.append(append(&order("a"), Expected::Any, 1)).await;
    assert!(matches!(answer, Err(AppendError::Unavailable(_))), "{answer:?}");
    database.cluster.start_again().await.unwrap();
    fill(&store, 2).await;
    assert_eq!(assert_log_is_whole(&database.pool()).await, 3);
}

#[tokio::test]
async fn a_database_that_restarts_between_appends_costs_none_of_them() {
    let Broken { mut database, store, wire: _wire, .. } = over_a_wire().await;
    for _ in 0..3 {
        database.cluster.kill().await.unwrap();
        database.cluster.start_again().await.unwrap();
        fill(&store, 1).await;
    }
    assert_eq!(assert_log_is_whole(&database.pool()).await, 4);
}
