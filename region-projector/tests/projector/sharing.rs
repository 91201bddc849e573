//! Partitions that several processes share.

use compose::process::Signal;
use consistency::{PartitionCount, Position};

use crate::processes::{PLACED, Process};
use crate::world::{WAITING, World, eventually};

/// Longer than any test waits: what happens before is not by expiry.
const FOR_EVER_S: u32 = 600;

#[tokio::test]
async fn partitions_are_split_evenly_as_processes_join_and_leave() {
    let world = World::start().await;
    let a = world.process("a", FOR_EVER_S, &[]);
    world.split_is(&[("a", 8)]).await;
    world.orders_stored(world.place(20).await).await;
    let b = world.process("b", FOR_EVER_S, &[]);
    world.split_is(&[("a", 4), ("b", 4)]).await;
    world.orders_stored(world.place(20).await).await;
    let c = world.process("c", FOR_EVER_S, &[]);
    eventually("three share", async || {
        let mut counts: Vec<i64> = world.split().await.iter().map(|(_, count)| *count).collect();
        counts.sort_unstable();
        counts == [2, 3, 3]
    })
    .await;
    world.orders_stored(world.place(20).await).await;
    a.leave().await;
    world.split_is(&[("b", 4), ("c", 4)]).await;
    world.orders_stored(world.place(20).await).await;
    b.leave().await;
    world.split_is(&[("c", 8)]).await;
    world.orders_stored(world.place(20).await).await;
    world.orders_are_exactly(100).await;
    for process in [&b, &c] {
        let applied = ["projection=\"orders\"", "outcome=\"applied\""];
        if process.child.is_running() {
            let applied = process.metric("tidemark_projection_events", &applied).await;
            assert!((20.0..100.0).contains(&applied), "{applied}: it has had its share only");
        }
    }
    c.leave().await;
    assert!(world.split().await.is_empty(), "what has left holds nothing");
}

#[tokio::test]
async fn partitions_move_while_events_arrive_and_nothing_is_lost_or_applied_twice() {
    let world = World::start().await;
    let a = world.process("a", FOR_EVER_S, &[]);
    world.split_is(&[("a", 8)]).await;
    let mut processes = vec![a];
    let mut last = Position::ZERO;
    for round in 0..4 {
        last = world.place(50).await;
        if round % 2 == 0 {
            processes.push(world.process(&format!("p-{round}"), FOR_EVER_S, &[]));
        } else {
            processes.remove(0).leave().await;
        }
    }
    world.orders_stored(last).await;
    world.orders_are_exactly(200).await;
}

#[tokio::test]
async fn the_partitions_of_a_killed_process_are_taken_when_its_lease_has_run_out() {
    let world = World::start().await;
    let a = world.process("a", 3, &[]);
    world.split_is(&[("a", 8)]).await;
    let b = world.process("b", 3, &[]);
    world.split_is(&[("a", 4), ("b", 4)]).await;
    world.place(100).await;
    a.child.kill().await;
    let last = world.place(100).await;
    world.split_is(&[("b", 8)]).await;
    world.orders_stored(last).await;
    world.orders_are_exactly(200).await;
    b.leave().await;
}

#[tokio::test]
async fn a_killed_process_that_starts_again_has_its_partitions_back_at_once() {
    let world = World::start().await;
    let a = world.process("a", FOR_EVER_S, &[]);
    world.split_is(&[("a", 8)]).await;
    world.orders_stored(world.place(10).await).await;
    a.child.kill().await;
    let again = world.process("a", FOR_EVER_S, &[]);
    world.orders_stored(world.place(10).await).await;
    world.orders_are_exactly(20).await;
    again.leave().await;
}

const APPLIED: [&str; 2] = ["projection=\"orders\"", "outcome=\"applied\""];
const DEAD_LETTERED: [&str; 2] = ["projection=\"orders\"", "outcome=\"dead-lettered\""];

/// A process counts what was committed when it hears of it.
async fn counts(process: &Process, outcome: &[&str], count: f64) {
    eventually("it has counted them", async || {
        process.metric("tidemark_projection_events", outcome).await == count
    })
    .await;
}

/// Stops the process as soon as it waits for a table, which is free then.
async fn freeze_at(world: &World, a: &Process, table: &str, event: impl AsyncFnOnce()) {
    let lock = world.hold(format!("lock table {table}")).await;
    event().await;
    eventually("it waits for the table", async || world.count(WAITING).await > 0).await;
    a.child.freeze().await.unwrap();
    lock.rollback().await.unwrap();
    eventually("the server has what it was sent", async || world.count(WAITING).await == 0).await;
}

/// Frozen while the server writes for it: what the server was sent is its own, and no more.
#[tokio::test]
async fn a_frozen_process_loses_its_partitions_and_commits_nothing_when_it_goes_on() {
    let world = World::start().await;
    let a = world.process("a", 3, &[]);
    world.split_is(&[("a", 8)]).await;
    world.orders_stored(world.place(40).await).await;
    counts(&a, &APPLIED, 40.0).await;

    freeze_at(&world, &a, "orders_v1_state", async || {
        world.place(40).await;
    })
    .await;
    let active = "select count(*) from pg_stat_activity
                  where datname = current_database() and state = 'active' and pid <> pg_backend_pid()";
    eventually("the server is done", async || world.count(active).await == 0).await;
    let done = world.count("select count(*) from orders_v1_state").await as f64;
    let fences = "select min(fence) from checkpoint where projection = 'orders'";
    let fence = world.count(fences).await;

    let b = world.process("b", 3, &[]);
    world.split_is(&[("b", 8)]).await;
    assert!(fence < world.count(fences).await, "whoever takes a partition raises its fence");
    let last = world.place(40).await;
    world.orders_stored(last).await;
    world.orders_are_exactly(120).await;
    a.child.signal(Signal::CONT);
    world.split_is(&[("a", 4), ("b", 4)]).await;
    // What others have applied it has not.
    counts(&a, &APPLIED, done).await;
    counts(&b, &APPLIED, 120.0 - done).await;
    world.orders_stored(world.place(40).await).await;
    world.orders_are_exactly(160).await;
    a.leave().await;
    b.leave().await;
}

/// Frozen in the middle of a transaction, which holds the lock of its checkpoint: an event of a parked
/// aggregate is buried step by step.
#[tokio::test]
async fn a_process_that_is_frozen_in_a_transaction_loses_what_it_was_about_to_commit() {
    let world = World::start().await;
    let a = world.process("a", 3, &[]);
    world.split_is(&[("a", 8)]).await;
    world.orders_stored(world.place(40).await).await;
    let park = "insert into parked
                    (projection, version, aggregate_type, aggregate_id, partition, epoch, position, reason)
                values ('orders', 1, 'order', 'o-parked', $1, 1, 1, 'fold')";
    let partition = PartitionCount::new(8).unwrap().partition_of("o-parked");
    sqlx::query(park).bind(i32::from(partition)).execute(&world.pool).await.unwrap();

    freeze_at(&world, &a, "dead_letter", async || {
        let event = world.log.append_to("order", "o-parked", "OrderPlaced", PLACED);
        world.publish(&event).await;
    })
    .await;
    let letters = "select count(*) from dead_letter where projection = 'orders'";
    assert_eq!(world.count(letters).await, 0, "it is not committed");

    let b = world.process("b", 3, &[]);
    world.split_is(&[("b", 8)]).await;
    world.orders_stored(world.place(40).await).await;
    assert_eq!(world.count(letters).await, 1);
    a.child.signal(Signal::CONT);
    world.split_is(&[("a", 4), ("b", 4)]).await;
    world.orders_stored(world.place(40).await).await;
    counts(&b, &DEAD_LETTERED, 1.0).await;
    assert_eq!(a.metric("tidemark_projection_events", &DEAD_LETTERED).await, 0.0);
    assert_eq!(world.count(letters).await, 1);
    a.leave().await;
    b.leave().await;
}

#[tokio::test]
async fn partitions_are_applied_by_hand_where_they_are_named() {
    let world = World::start().await;
    let a = world.process("a", FOR_EVER_S, &[("PARTITIONS", "0,1")]);
    world.split_is(&[("a", 2)]).await;
    let last = world.place(64).await;
    eventually("the named ones are applied", async || {
        let stored = world.orders_checkpoints().await;
        stored.len() == 8 && stored[..2].iter().all(|at| *at == last.as_i64())
    })
    .await;
    assert_eq!(world.orders_checkpoints().await[2..], [0; 6]);
    // The rest is shared by those for whom nothing is named.
    let b = world.process("b", FOR_EVER_S, &[]);
    let c = world.process("c", FOR_EVER_S, &[]);
    world.split_is(&[("a", 2), ("b", 3), ("c", 3)]).await;
    world.orders_stored(last).await;
    world.orders_are_exactly(64).await;
    // By hand is also taken from who has it.
    c.leave().await;
    let d = world.process("d", FOR_EVER_S, &[("PROJECTOR__APPLY__PARTITIONS", "[2, 3, 4]")]);
    world.split_is(&[("a", 2), ("b", 3), ("d", 3)]).await;
    world.orders_stored(world.place(64).await).await;
    world.orders_are_exactly(128).await;
    for process in [a, b, d] {
        process.leave().await;
    }
}
