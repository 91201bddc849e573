//! Crashes, lost replies, poison, and a database that goes back.

use std::collections::BTreeSet;

use compose::nats::Server;
use compose::postgres::{Cluster, Options};
use consistency::{Epoch, EventId, Position};
use process::admin::Condition;
use process::config::Period;
use region_projector::chain::Mark;
use region_projector::checkpoint::{self, Held};

use crate::log::TestLog;
use crate::tally::domain;
use crate::world::{World, eventually, stop, tallies};

#[tokio::test]
async fn a_restart_applies_nothing_twice_and_leaves_nothing_out() {
    let world = World::start().await;
    for round in 0..5 {
        let projector = world.projector(domain()).await;
        let mut last = Position::ZERO;
        for _ in 0..20 {
            last = world.add("a", 1).await;
            world.add("b", 1).await;
        }
        // Stopped wherever it happens to be.
        if round % 2 == 0 {
            world.stored(last).await;
        }
        stop(projector).await;
    }
    let projector = world.projector(domain()).await;
    world.stored(world.add("a", 1).await).await;
    assert_eq!(world.tally("a").await, Some((101, 101)));
    assert_eq!(world.tally("b").await, Some((100, 100)));
    stop(projector).await;
}

#[tokio::test]
async fn a_crash_between_commit_and_announcement_is_made_good_by_the_next_start() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    let at = world.add("a", 1).await;
    world.stored(at).await;
    stop(projector).await;
    // Nobody heard of the commit. What is stored is announced again by whoever takes over.
    let mut announcements = world.announcements().await;
    let projector = world.projector(domain()).await;
    let mut silent = BTreeSet::from([0, 1, 2, 3]);
    while !silent.is_empty() {
        let said = announcements.find(|said| silent.contains(&said.partition)).await;
        assert_eq!((said.from, said.to, said.stored), (at, at, at));
        silent.remove(&said.partition);
    }
    assert_eq!(world.tally("a").await, Some((1, 1)));
    stop(projector).await;
}

#[tokio::test]
async fn a_killed_database_is_waited_for() {
    let mut world = World::alone().await;
    let projector = world.projector(domain()).await;
    world.stored(world.add("a", 1).await).await;
    world.postgres.kill().await.unwrap();
    world.add("a", 1).await;
    eventually("the missing database is reported", async || {
        let conditions = projector.readiness().report(None).conditions;
        matches!(conditions.get("database"), Some(Condition::NotReady(_)))
    })
    .await;
    world.postgres.start_again().await.unwrap();
    let last = world.add("a", 1).await;
    world.stored(last).await;
    assert_eq!(world.tally("a").await, Some((3, 3)));
    eventually("it is ready again", async || projector.readiness().is_ready()).await;
    stop(projector).await;
}

#[tokio::test]
async fn commits_that_a_crash_of_the_database_takes_back_are_made_again() {
    // What nobody waits for stays in the server's memory.
    let settings = vec![("wal_writer_delay".to_owned(), "10s".to_owned())];
    let postgres = Cluster::start(Options { settings, ..Options::default() }).await.unwrap();
    let nats = Server::start_single().await.unwrap();
    let mut world = World::around(nats, postgres, TestLog::start().await).await;
    let projector = world.projector(domain()).await;
    world.stored(world.add("a", 1).await).await;
    sqlx::query("checkpoint").execute(&world.pool).await.unwrap();
    let fences = "select sum(fence)::bigint from checkpoint";
    let taken = world.count(fences).await;
    let mut added = 1;
    // The server writes now and then all the same: then a round takes nothing back. When it does, the
    // partitions are taken anew, at where they stand.
    while world.count(fences).await == taken {
        assert!(added < 500, "nothing is ever taken back");
        let mut last = Position::ZERO;
        for _ in 0..50 {
            last = world.add("a", 1).await;
            added += 1;
        }
        world.stored(last).await;
        world.postgres.kill().await.unwrap();
        world.postgres.start_again().await.unwrap();
        world.stored(last).await;
    }
    assert_eq!(world.tally("a").await, Some((added, added)));
    assert_eq!(world.list("new").await, ["a"]);
    stop(projector).await;
}

#[tokio::test]
async fn rows_are_found_by_their_keys_however_few_there_were_at_first() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.stored(world.add("a-0", 1).await).await;
    // A table of one row is quicker read through than looked up in, as long as it has one row.
    sqlx::query("vacuum analyze tallies_v1_state").execute(&world.pool).await.unwrap();
    for n in 1..40 {
        let id = format!("a-{n}");
        world.add(&id, 1).await;
        eventually("it is applied", async || world.tally(&id).await.is_some()).await;
    }
    stop(projector).await;
    // Counted a moment after the connections that did it are gone.
    let found = "select idx_scan from pg_stat_user_tables where relname = 'tallies_v1_state'";
    eventually("it is counted", async || 40 <= world.count(found).await).await;
    let read_through =
        "select seq_scan from pg_stat_user_tables where relname = 'tallies_v1_state'";
    assert!(world.count(read_through).await < 10);
}

#[tokio::test]
async fn a_database_that_does_not_answer_is_reported_and_applied_to_once() {
    let world = World::start().await;
    let mut config = world.config();
    config.apply.attempt_timeout = Period::from_millis(300);
    config.database.statement_timeout = Period::from_secs(3600);
    let projector = world.try_projector(config, domain()).await.unwrap();
    world.stored(world.add("a", 1).await).await;
    let lock = world.hold("lock table checkpoint").await;
    let last = world.add("a", 1).await;
    eventually("the silent database is reported", async || {
        let conditions = projector.readiness().report(None).conditions;
        matches!(conditions.get("database"), Some(Condition::NotReady(_)))
    })
    .await;
    lock.rollback().await.unwrap();
    world.stored(last).await;
    assert_eq!(world.tally("a").await, Some((2, 2)));
    eventually("it is ready again", async || projector.readiness().is_ready()).await;
    stop(projector).await;
}

#[tokio::test]
async fn a_killed_nats_server_is_waited_for() {
    let mut world = World::start().await;
    let projector = world.projector(domain()).await;
    world.stored(world.add("a", 1).await).await;
    world.nats.kill().await.unwrap();
    eventually("the missing stream is reported", async || {
        let conditions = projector.readiness().report(None).conditions;
        matches!(conditions.get("stream"), Some(Condition::Degraded(_)))
    })
    .await;
    assert!(projector.readiness().is_ready(), "what is stored can still be read");
    world.nats.start_again().await.unwrap();
    eventually("the test is connected again", async || {
        world.jetstream.get_stream(crate::world::STREAM).await.is_ok()
    })
    .await;
    world.stored(world.add("a", 1).await).await;
    assert_eq!(world.tally("a").await, Some((2, 2)));
    eventually("nothing is reported any more", async || {
        !projector.readiness().report(None).degraded
    })
    .await;
    stop(projector).await;
}

#[tokio::test]
async fn a_quiet_projector_is_well_again_after_an_outage_without_a_new_event() {
    let mut world = World::start().await;
    let projector = world.projector(domain()).await;
    world.stored(world.add("a", 1).await).await;
    let stream = || projector.readiness().report(None).conditions.get("stream").cloned();
    world.nats.kill().await.unwrap();
    eventually("the missing stream is reported", async || {
        matches!(stream(), Some(Condition::Degraded(_)))
    })
    .await;
    world.nats.start_again().await.unwrap();
    eventually("the stream is well", async || stream() == Some(Condition::Ready)).await;
    stop(projector).await;
}

#[tokio::test]
async fn a_commit_whose_reply_is_lost_is_not_repeated() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.stored(world.add("a", 1).await).await;
    // Sessions end again and again, in the middle of whatever they do.
    let mut last = Position::ZERO;
    for _ in 0..40 {
        last = world.add("a", 1).await;
        sqlx::query(
            "select pg_terminate_backend(pid) from pg_stat_activity
             where datname = current_database() and application_name = 'region-projector'",
        )
        .execute(&world.pool)
        .await
        .unwrap();
    }
    world.stored(last).await;
    assert_eq!(world.tally("a").await, Some((41, 41)));
    stop(projector).await;
}

#[tokio::test]
async fn a_database_set_back_is_noticed_and_caught_up_without_a_new_event() {
    let mut world = World::alone().await;
    let projector = world.projector(domain()).await;
    world.stored(world.add("a", 1).await).await;
    stop(projector).await;
    let older = world.postgres.copy_data().await.unwrap();
    let projector = world.projector(domain()).await;
    let last = world.add("a", 10).await;
    world.stored(last).await;
    world.postgres.restore(&older).await.unwrap();
    eventually("the lost event is applied again", async || {
        world.lowest_checkpoint().await == Some(last)
    })
    .await;
    assert_eq!(world.tally("a").await, Some((11, 2)));
    stop(projector).await;
}

#[tokio::test]
async fn checkpoints_that_went_back_under_the_same_fence_are_noticed() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    let last = world.add("a", 10).await;
    world.stored(last).await;
    sqlx::raw_sql(
        "begin;
         update checkpoint set position = 0, event_id = '00000000-0000-0000-0000-000000000000';
         delete from tallies_v1_state;
         delete from tallies_v1_tally;
         delete from tallies_v1_by_list;
         commit;",
    )
    .execute(&world.pool)
    .await
    .unwrap();
    world.stored(last).await;
    assert_eq!(world.tally("a").await, Some((10, 1)));
    stop(projector).await;
}

#[tokio::test]
async fn an_old_fence_commits_nothing() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    let at = world.add("a", 1).await;
    world.stored(at).await;
    stop(projector).await;
    let mut connection = world.pool.acquire().await.unwrap();
    let old = checkpoint::take(&mut connection, &tallies(), &(0..4).collect()).await.unwrap();
    let new = checkpoint::take(&mut connection, &tallies(), &(0..4).collect()).await.unwrap();
    let to = Mark { position: at.next(), id: EventId::NIL };
    let mut moves = async |held: &Held| {
        checkpoint::advance(&mut connection, &tallies(), held, to, None).await.unwrap()
    };
    assert!(!moves(&old[0]).await, "its fence is old");
    let elsewhere = Held { mark: Mark { position: Position::ZERO, ..new[0].mark }, ..new[0] };
    assert!(!moves(&elsewhere).await, "its position is another");
    let later = Held { epoch: Epoch::new(2).unwrap(), ..new[0] };
    assert!(!moves(&later).await, "its epoch is another");
    assert!(moves(&new[0]).await);
    assert!(!moves(&new[0]).await, "once");
}

#[tokio::test]
async fn a_running_projector_whose_partitions_are_taken_takes_them_back() {
    let world = World::start().await;
    let mut config = world.config();
    // Noticed by the commit itself, not by the look at the checkpoints now and then.
    config.apply.verify_interval = Period::from_secs(3600);
    let projector = world.try_projector(config, domain()).await.unwrap();
    world.stored(world.add("a", 1).await).await;
    let mut connection = world.pool.acquire().await.unwrap();
    checkpoint::take(&mut connection, &tallies(), &(0..4).collect()).await.unwrap();
    world.stored(world.add("a", 1).await).await;
    assert_eq!(world.tally("a").await, Some((2, 2)));
    stop(projector).await;
}

#[tokio::test]
async fn poison_parks_its_aggregate_and_the_others_go_on() {
    let world = World::start().await;
    world.add("a", 1).await;
    let poison = world.add("a", 13).await;
    world.add("b", 2).await;
    world.add("a", 1).await;
    let unknown = world.happen("c", "Unheard", "{}").await;
    let last = world.add("b", 3).await;
    let mut announcements = world.announcements().await;
    let projector = world.projector(domain()).await;
    world.stored(last).await;
    assert_eq!(world.tally("a").await, Some((1, 1)), "as it was before");
    assert_eq!(world.tally("b").await, Some((5, 2)));
    let parked: Vec<(String, i64, String)> =
        sqlx::query_as("select aggregate_id, position, reason from parked order by aggregate_id")
            .fetch_all(&world.pool)
            .await
            .unwrap();
    let expected = [
        ("a".to_owned(), poison.as_i64(), "fold".to_owned()),
        ("c".to_owned(), unknown.as_i64(), "unknown-event-type".to_owned()),
    ];
    assert_eq!(parked, expected);
    let key = world.log.events()[0].aggregate.key().hint();
    announcements.find(|said| said.keys.as_ref().is_some_and(|keys| keys.contains(&key))).await;

    // Its later events wait behind it, also those that would fold.
    world.stored(world.add("a", 1).await).await;
    assert_eq!(world.tally("a").await, Some((1, 1)));
    let letters = "select count(*) from dead_letter where aggregate_id = 'a'";
    assert_eq!(world.count(letters).await, 3);
    let conditions = projector.readiness().report(None);
    assert!(conditions.ready && conditions.degraded);
    stop(projector).await;
}

#[tokio::test]
async fn rows_that_the_database_refuses_park_their_aggregate_only() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.stored(world.add("z", 1).await).await;
    stop(projector).await;
    sqlx::query(
        "alter table tallies_v1_tally add check ((data->>'sum')::bigint between 0 and 100)",
    )
    .execute(&world.pool)
    .await
    .unwrap();
    let mut last = Position::ZERO;
    for id in 0..20 {
        last = world.add(&format!("t-{id}"), if id % 7 == 3 { 1000 } else { 1 }).await;
    }
    let projector = world.projector(domain()).await;
    world.stored(last).await;
    assert_eq!(world.count("select count(*) from tallies_v1_tally").await, 1 + 17);
    let parked = "select count(*) from parked where reason = 'constraint'";
    assert_eq!(world.count(parked).await, 3);
    assert_eq!(world.count("select count(*) from dead_letter").await, 3);
    stop(projector).await;
}

/// Stands for a statement timeout: a statement that writes more rows than fit its time is ended.
const AT_MOST_FOUR_ROWS: &str = "
    create function at_most_four() returns trigger language plpgsql as $$
    begin
        if (select count(*) from written) > 4 then
            raise exception 'canceling statement' using errcode = '57014';
        end if;
        return null;
    end $$;
    create trigger at_most_four after insert on tallies_v1_tally
    referencing new table as written for each statement execute function at_most_four();
";

#[tokio::test]
async fn a_batch_that_is_too_much_for_one_statement_is_applied_in_parts() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.stored(world.add("z", 1).await).await;
    stop(projector).await;
    sqlx::raw_sql(AT_MOST_FOUR_ROWS).execute(&world.pool).await.unwrap();
    let mut last = Position::ZERO;
    for id in 0..100 {
        last = world.add(&format!("t-{id}"), 1).await;
    }
    let projector = world.projector(domain()).await;
    world.stored(last).await;
    assert_eq!(world.count("select count(*) from tallies_v1_tally").await, 101);
    assert_eq!(world.count("select count(*) from parked").await, 0);
    stop(projector).await;
}
