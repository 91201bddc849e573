//! Connections that are kept at hand, on a real server.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test where it stands")]

use std::{sync::Arc, time::Duration};

use compose::postgres::{Cluster, Options};
use process::postgres::{AtHand, Taken};
use sqlx::postgres::{PgPool, PgPoolOptions};
use tokio::runtime::{Builder, Runtime};

const WAIT_MAX: Duration = Duration::from_secs(5);

fn pool(url: &str, connections_max: u32) -> PgPool {
    PgPoolOptions::new()
        .max_connections(connections_max)
        .acquire_timeout(WAIT_MAX)
        .test_before_acquire(false)
        .connect_lazy(url)
        .unwrap()
}

/// Which session of the server it is.
async fn session(taken: &mut Taken) -> Result<i32, sqlx::Error> {
    sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut **taken).await
}

#[tokio::test]
async fn what_is_kept_is_used_again_and_others_have_the_rest_of_the_pool() {
    let cluster = Cluster::shared().await.unwrap();
    let pool = pool(&cluster.create_database("tide").await.unwrap(), 3);
    let at_hand = AtHand::new(pool.clone(), 2);
    let mut first = at_hand.take().await.unwrap();
    let kept = session(&mut first).await.unwrap();
    first.keep();
    let mut again = at_hand.take().await.unwrap();
    assert_eq!(session(&mut again).await.unwrap(), kept);
    let mut second = at_hand.take().await.unwrap();
    assert_ne!(session(&mut second).await.unwrap(), kept);
    let third = tokio::time::timeout(Duration::from_millis(100), at_hand.take()).await;
    assert!(third.is_err(), "both are used");
    pool.acquire().await.unwrap();
    // Who gives up in the middle leaves it to the pool to find out what became of it.
    let slow = sqlx::query("select pg_sleep(0.2)").execute(&mut *second);
    assert!(tokio::time::timeout(Duration::from_millis(20), slow).await.is_err());
    drop(second);
    let mut another = at_hand.take().await.unwrap();
    session(&mut another).await.unwrap();
    // Who does not care to find out has its place free at once.
    let slow = sqlx::query("select pg_sleep(60)").execute(&mut *another);
    assert!(tokio::time::timeout(Duration::from_millis(20), slow).await.is_err());
    another.close();
    let mut another = at_hand.take().await.unwrap();
    session(&mut another).await.unwrap();
}

/// Takes one on a runtime of its own thread, and keeps it.
async fn session_elsewhere(at_hand: &AtHand, runtime: &Arc<Runtime>) -> i32 {
    let (at_hand, runtime) = (at_hand.clone(), Arc::clone(runtime));
    let asked = move || {
        runtime.block_on(async {
            let mut taken = at_hand.take().await.unwrap();
            let session = session(&mut taken).await.unwrap();
            taken.keep();
            session
        })
    };
    tokio::task::spawn_blocking(asked).await.unwrap()
}

#[tokio::test]
async fn each_runtime_uses_its_own_as_long_as_there_may_be_more() {
    let cluster = Cluster::shared().await.unwrap();
    let pool = pool(&cluster.create_database("tide").await.unwrap(), 2);
    let at_hand = AtHand::new(pool, 2);
    let runtimes =
        [(); 2].map(|()| Arc::new(Builder::new_current_thread().enable_all().build().unwrap()));
    let mut taken = at_hand.take().await.unwrap();
    let here = session(&mut taken).await.unwrap();
    taken.keep();
    let there = session_elsewhere(&at_hand, &runtimes[0]).await;
    assert_ne!(there, here);
    for _ in 0..2 {
        assert_eq!(session_elsewhere(&at_hand, &runtimes[0]).await, there);
        let mut taken = at_hand.take().await.unwrap();
        assert_eq!(session(&mut taken).await.unwrap(), here);
        taken.keep();
    }
    // Here and there are tended to by nobody meanwhile, but what they need has arrived.
    let elsewhere = session_elsewhere(&at_hand, &runtimes[1]).await;
    assert!([here, there].contains(&elsewhere), "there may be no third");
    for runtime in runtimes {
        Arc::into_inner(runtime).unwrap().shutdown_background();
    }
}

#[tokio::test]
async fn a_server_that_restarted_is_met_by_one_only() {
    let mut cluster = Cluster::start(Options::default()).await.unwrap();
    let url = cluster.create_database("tide").await.unwrap();
    let at_hand = AtHand::new(pool(&url, 4), 4);
    let mut taken = Vec::new();
    for _ in 0..4 {
        taken.push(at_hand.take().await.unwrap());
    }
    // Two are kept, and two are the pool's.
    for (nth, taken) in taken.into_iter().enumerate() {
        if nth < 2 {
            taken.keep();
        }
    }
    cluster.kill().await.unwrap();
    cluster.start_again().await.unwrap();
    let mut dead = at_hand.take().await.unwrap();
    session(&mut dead).await.unwrap_err();
    drop(dead);
    at_hand.forget();
    for _ in 0..4 {
        session(&mut at_hand.take().await.unwrap()).await.unwrap();
    }
}

#[test]
fn what_is_at_hand_may_outlive_its_runtime() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (at_hand, cluster) = runtime.block_on(async {
        let cluster = Cluster::shared().await.unwrap();
        let url = cluster.create_database("tide").await.unwrap();
        let at_hand = AtHand::new(pool(&url, 1), 1);
        at_hand.take().await.unwrap().keep();
        (at_hand, cluster)
    });
    drop(runtime);
    drop(at_hand);
    drop(cluster);
}

#[tokio::test]
async fn a_pool_is_closed_though_connections_of_it_are_at_hand() {
    let cluster = Cluster::shared().await.unwrap();
    let pool = pool(&cluster.create_database("tide").await.unwrap(), 2);
    let at_hand = AtHand::new(pool.clone(), 2);
    let (unused, used) = (at_hand.take().await.unwrap(), at_hand.take().await.unwrap());
    unused.keep();
    let finishes = async {
        tokio::task::yield_now().await;
        used.keep();
    };
    let closed = async { tokio::join!(at_hand.close(), finishes) };
    tokio::time::timeout(WAIT_MAX, closed).await.unwrap();
    assert_eq!(pool.size(), 0);
    assert!(matches!(at_hand.take().await, Err(sqlx::Error::PoolClosed)));
}
