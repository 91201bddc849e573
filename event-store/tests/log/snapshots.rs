//! States kept of long aggregates: used while the log has their event, and never otherwise.

use consistency::{FoldKind, FoldName, FoldSnapshot, Name};
use event_store::{EventStore, Expected, Keep, Tail};
use sqlx::PgPool;

use crate::support::{Database, append, eventually, order, version};

const LIMIT: u32 = 100;

fn rules(version: u32) -> FoldName {
    FoldName { kind: FoldKind::Projection, name: Name::new("orders").unwrap(), version }
}

/// Of the aggregate `o` with ten events: the state after the sixth, kept by rules of this version.
async fn keep(store: &EventStore, fold_version: u32) -> Keep {
    let sixth = store.read_aggregate(&order("o"), version(6), 1).await.unwrap().remove(0);
    let keep = |fold_version| Keep {
        aggregate: order("o"),
        fold: rules(fold_version),
        snapshot: FoldSnapshot {
            version: sixth.version,
            at: sixth.at,
            event_id: sixth.id,
            created: sixth.at.position,
            state: Some("{\"n\":6}".to_owned()),
        },
        replaces: None,
    };
    store.keep_snapshot(keep(fold_version));
    eventually("the snapshot is kept", async || {
        let tail = store.read_tail(&order("o"), &rules(fold_version), LIMIT).await.unwrap();
        tail.snapshot.is_some().then_some(())
    })
    .await;
    keep(fold_version)
}

async fn tail(store: &EventStore, fold_version: u32) -> (Option<FoldSnapshot>, Vec<u64>, u32) {
    let Tail { snapshot, events, events_read, is_cut, .. } =
        store.read_tail(&order("o"), &rules(fold_version), LIMIT).await.unwrap();
    assert!(!is_cut);
    (snapshot, events.iter().map(|event| event.version.get()).collect(), events_read)
}

async fn ten_events() -> (Database, EventStore, event_store::Committer, PgPool) {
    let database = Database::start().await;
    let (store, committer) = database.store().await;
    store.append(append(&order("o"), Expected::MustNotExist, 10)).await.unwrap();
    let pool = database.pool();
    (database, store, committer, pool)
}

#[tokio::test]
async fn a_snapshot_comes_with_the_events_after_it_and_only_to_the_rules_that_made_it() {
    let (_database, store, _committer, _) = ten_events().await;
    let kept = keep(&store, 2).await;
    assert_eq!(tail(&store, 2).await, (Some(kept.snapshot), vec![7, 8, 9, 10], 5));
    let all: Vec<u64> = (1..=10).collect();
    assert_eq!(tail(&store, 1).await, (None, all.clone(), 10));
    assert_eq!(tail(&store, 3).await, (None, all, 10));
}

#[tokio::test]
async fn a_newer_snapshot_replaces_an_older_one_and_those_of_rules_long_gone_are_forgotten() {
    let (_database, store, _committer, pool) = ten_events().await;
    for fold_version in [1, 2, 3] {
        keep(&store, fold_version).await;
    }
    let versions: Vec<i32> =
        sqlx::query_scalar("select fold_version from fold_snapshot order by fold_version")
            .fetch_all(&pool)
            .await
            .unwrap();
    assert_eq!(versions, [2, 3], "a release runs beside its predecessor");
    let ninth = store.read_aggregate(&order("o"), version(9), 1).await.unwrap().remove(0);
    let older = keep(&store, 3).await;
    let mut newer = keep(&store, 3).await;
    newer.snapshot =
        FoldSnapshot { version: ninth.version, at: ninth.at, event_id: ninth.id, ..newer.snapshot };
    store.keep_snapshot(newer);
    eventually("the newer one is kept", async || (tail(&store, 3).await.1 == [10]).then_some(()))
        .await;
    store.keep_snapshot(older);
    // One after the other: when this one is there, the older one was looked at.
    keep(&store, 4).await;
    assert_eq!(tail(&store, 3).await.1, [10]);
}

#[tokio::test]
async fn a_log_that_lost_the_snapshots_event_or_has_another_there_is_read_from_the_first() {
    for (what, cut) in [
        ("lost", "delete from event where position > 5"),
        ("took over into another epoch", "update event set epoch = 2 where position > 5"),
        ("replaced", "update event set id = gen_random_uuid() where position = 6"),
        ("moved", "update event set position = position + 100 where position = 6"),
    ] {
        let (_database, store, _committer, pool) = ten_events().await;
        keep(&store, 1).await;
        sqlx::query(cut).execute(&pool).await.unwrap();
        let left = store.read_aggregate(&order("o"), version(1), LIMIT).await.unwrap();
        let (snapshot, versions, _) = tail(&store, 1).await;
        assert_eq!(snapshot, None, "the log {what} the event");
        let left: Vec<u64> = left.iter().map(|event| event.version.get()).collect();
        assert_eq!(versions, left, "the log {what} the event");
    }
}

#[tokio::test]
async fn a_snapshot_that_could_not_be_used_makes_room_for_the_next_however_new_it_says_it_is() {
    let (_database, store, _committer, pool) = ten_events().await;
    let kept = keep(&store, 1).await;
    sqlx::query("update fold_snapshot set version = 70").execute(&pool).await.unwrap();
    let found = store.read_tail(&order("o"), &rules(1), LIMIT).await.unwrap();
    assert_eq!((found.snapshot.is_none(), found.events.len()), (true, 10));
    store.keep_snapshot(Keep { replaces: found.unusable, ..kept });
    eventually("it was replaced", async || {
        (tail(&store, 1).await.1 == [7, 8, 9, 10]).then_some(())
    })
    .await;
}
