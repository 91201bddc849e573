//! Who commits: whoever comes while nobody does, and the committer.

use std::thread;

use event_store::{AppendError, EventStore, Expected, StoreConfig};
use futures::future::try_join_all;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::support::{
    DEADLINE, Database, LOG_ID, append, fill, hold_head, order, pool, pool_of, until_blocked,
};

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// A store whose committer does nothing while its runtime is not run.
fn opened_in(runtime: &Runtime, url: &str) -> EventStore {
    let url = url.to_owned();
    let (store, committer) = runtime.block_on(async move {
        let opened =
            EventStore::open(pool_of(&url, false), StoreConfig::new(LOG_ID)).await.unwrap();
        // What the pool keeps is this runtime's, and does not answer.
        opened.0.head().await.unwrap();
        opened
    });
    // Its tasks are the runtime's.
    drop(committer);
    store
}

#[tokio::test]
async fn an_append_by_itself_is_committed_where_it_was_made() {
    let database = Database::start().await;
    let url = database.url.clone();
    let appended = thread::spawn(move || {
        let (idle, own) = (runtime(), runtime());
        let store = opened_in(&idle, &url);
        own.block_on(async {
            for nth in 1..=20 {
                let append = store.append(append(&order("o-1"), Expected::Any, 1));
                let appended = timeout(DEADLINE, append)
                    .await
                    .unwrap_or_else(|_| panic!("{nth} needs somebody else"));
                assert_eq!(appended.unwrap().first_position.get(), nth);
            }
        });
        store.head_seen().position.get()
    });
    assert_eq!(appended.join().unwrap(), 20);
}

#[tokio::test]
async fn what_comes_during_a_commit_is_the_committer_s_also_when_who_led_is_gone() {
    let database = Database::start().await;
    let (store, committer) = database.store().await;
    let pool = database.pool();
    let lock = hold_head(&pool).await;
    let (end, ended) = oneshot::channel::<()>();
    let there = store.clone();
    let thread = thread::spawn(move || {
        let runtime = runtime();
        runtime.spawn(async move { there.append(append(&order("led"), Expected::Any, 1)).await });
        let _ = runtime.block_on(ended);
    });
    until_blocked(&pool, 1).await;
    let behind = [1, 2, 3].map(|nth| {
        let store = store.clone();
        let append = append(&order(&format!("o-{nth}")), Expected::Any, 1);
        tokio::spawn(async move { store.append(append).await })
    });
    // They are in the queue, and its runtime ends under who leads.
    tokio::task::yield_now().await;
    drop(end);
    thread.join().unwrap();
    until_blocked(&pool, 2).await;
    lock.rollback().await.unwrap();
    for append in behind {
        timeout(DEADLINE, append).await.expect("the committer leads").unwrap().unwrap();
    }
    // What was led is lost to who asked for it, and may be in the log.
    let head = store.head().await.unwrap().at.position.get();
    assert!(head == 3 || head == 4, "{head}");
    committer.stop().await;
}

#[tokio::test]
async fn each_is_answered_where_it_waits_also_when_others_who_waited_are_gone() {
    let database = Database::start().await;
    let (store, committer) = database.store().await;
    let pool = database.pool();
    let lock = hold_head(&pool).await;
    let there = store.clone();
    let led = tokio::spawn(async move {
        there.append(append(&order("led"), Expected::Any, 1)).await.unwrap()
    });
    until_blocked(&pool, 1).await;
    // Three for each of two runtimes, one of which ends before the commit.
    let (goes_on, ended) = (runtime(), runtime());
    let make = |lane, nth| {
        let store = store.clone();
        let append = append(&order(&format!("{lane}-{nth}")), Expected::Any, 1);
        async move { store.append(append).await.unwrap().first_position.get() }
    };
    let waiting = [1, 2, 3].map(|nth| goes_on.spawn(make("on", nth)));
    let gone = [1, 2, 3].map(|nth| ended.spawn(make("gone", nth)));
    let answered = thread::spawn(move || {
        goes_on.block_on(tokio::task::yield_now());
        ended.block_on(tokio::task::yield_now());
        drop(ended);
        goes_on.block_on(async { timeout(DEADLINE, try_join_all(waiting)).await })
    });
    for append in gone {
        assert!(append.await.unwrap_err().is_cancelled());
    }
    lock.rollback().await.unwrap();
    led.await.unwrap();
    let answered = tokio::task::spawn_blocking(|| answered.join()).await.unwrap().unwrap();
    let mut positions = answered.expect("they are answered").unwrap();
    positions.push(1);
    // Nobody waits for the others any more, so they were not sent.
    positions.sort_unstable();
    assert_eq!(positions, [1, 2, 3, 4]);
    assert_eq!(store.head().await.unwrap().at.position.get(), 4);
    committer.stop().await;
}

#[tokio::test]
async fn a_stopped_store_keeps_no_connection() {
    let database = Database::start().await;
    let pool = pool(&database.url);
    let (store, committer) =
        EventStore::open(pool.clone(), StoreConfig::new(LOG_ID)).await.unwrap();
    fill(&store, 3).await;
    committer.stop().await;
    timeout(DEADLINE, pool.close()).await.expect("all are given back");
    let late = store.append(append(&order("late"), Expected::Any, 1)).await;
    assert!(matches!(late, Err(AppendError::Stopping)), "{late:?}");
}

#[tokio::test]
async fn nobody_waits_for_a_committer_that_is_gone() {
    let database = Database::start().await;
    let (idle, own) = (runtime(), runtime());
    let there = thread::spawn(move || {
        let store = opened_in(&idle, &database.url);
        own.block_on(async {
            let pool = database.pool();
            let lock = hold_head(&pool).await;
            let make = |id| store.append(append(&order(id), Expected::Any, 1));
            let behind = async {
                until_blocked(&pool, 1).await;
                // The first is led here. This one waits for the committer, which goes.
                let gone = async { thread::spawn(move || drop(idle)).join().unwrap() };
                let (behind, ()) = tokio::join!(make("behind"), gone);
                lock.rollback().await.unwrap();
                behind
            };
            let (led, behind) = tokio::join!(timeout(DEADLINE, make("led")), behind);
            led.expect("it is led here").unwrap();
            assert!(matches!(behind, Err(AppendError::OutcomeUnknown)), "{behind:?}");
            let late = make("late").await;
            assert!(matches!(late, Err(AppendError::Stopping)), "{late:?}");
        });
    });
    tokio::task::spawn_blocking(|| there.join()).await.unwrap().unwrap();
}
