//! Versions that take over from each other, and the gate that nothing slips past.

use consistency::{Name, Position};
use process::config::Period;
use projection::Domain;
use region_projector::checkpoint::VersionKey;
use region_projector::switch::{self, GateConfig, Refusal, SwitchError, Switched, To};
use region_projector::versions::discard::{self, DropError};
use sqlx::AssertSqlSafe;

use crate::tally::domain;
use crate::world::{World, eventually, stop};

const STRICT: GateConfig = GateConfig {
    catch_up_max: Period::from_millis(200),
    statement_timeout: Period::from_secs(30),
    accept_differences: false,
};

fn version(number: u32) -> VersionKey {
    VersionKey { projection: Name::new("tallies").unwrap(), version: number }
}

async fn switch_to(world: &World, to: To, gate: &GateConfig) -> Result<Switched, SwitchError> {
    Box::pin(switch::switch(&world.pool, &domain(), "tallies", to, gate)).await
}

async fn do_sql(world: &World, statement: &str) {
    sqlx::query(AssertSqlSafe(statement.to_owned())).execute(&world.pool).await.unwrap();
}

impl World {
    /// Waits until every partition of a version has stored a position.
    async fn version_stored(&self, number: u32, position: Position) {
        let lowest = format!(
            "select coalesce(min(position), -1) from checkpoint
             where projection = 'tallies' and version = {number}"
        );
        eventually("the checkpoints of the version are stored", async || {
            let lowest = sqlx::query_scalar::<_, i64>(AssertSqlSafe(lowest.clone()));
            position.as_i64() <= lowest.fetch_one(&self.pool).await.unwrap()
        })
        .await;
    }

    async fn active(&self) -> i32 {
        let active =
            "select version from projection_version where projection = 'tallies' and active";
        sqlx::query_scalar(active).fetch_one(&self.pool).await.unwrap()
    }

    async fn tables_of(&self, number: u32) -> i64 {
        let tables = format!(
            "select count(*) from pg_class where relkind = 'r' and relname like 'tallies\\_v{number}\\_%'"
        );
        sqlx::query_scalar(AssertSqlSafe(tables)).fetch_one(&self.pool).await.unwrap()
    }
}

/// A region with `tallies` twice: version 1 is read, version 2 was built by the same rules and has so
/// many partitions. Both have applied the same, and nobody applies more.
async fn twice(partition_count: u16) -> World {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.add("a", 1).await;
    world.stored(world.add("b", 2).await).await;
    stop(projector).await;
    do_sql(
        &world,
        &format!(
            "insert into projection_version (projection, version, partition_count, active, definition)
             values ('tallies', 2, {partition_count}, false, 1)"
        ),
    )
    .await;
    let projector = world.projector(domain()).await;
    for id in ["c", "d", "e"] {
        world.add(id, 3).await;
    }
    let last = world.add("a", 4).await;
    world.stored(last).await;
    world.version_stored(2, last).await;
    stop(projector).await;
    world
}

fn refusals(outcome: Result<Switched, SwitchError>) -> Vec<Refusal> {
    match outcome {
        Err(SwitchError::Refused { refusals, .. }) => refusals,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn a_version_takes_over_goes_back_and_both_go_on_until_one_is_dropped() {
    let world = twice(4).await;
    let projector = world.projector(domain()).await;
    let patient = GateConfig { catch_up_max: Period::from_secs(20), ..STRICT };
    // Events arrive all the while, so that neither stands still by itself.
    let adding = async {
        for n in 0..40 {
            world.add(&format!("more-{n}"), n).await;
        }
    };
    let (switched, ()) = tokio::join!(switch_to(&world, To::Ready, &patient), adding);
    let switched = switched.unwrap();
    assert_eq!((switched.from, switched.to), (version(1), version(2)));
    assert_eq!(world.active().await, 2);
    let last = world.add("a", 5).await;
    world.version_stored(1, last).await;
    world.version_stored(2, last).await;
    let back = switch_to(&world, To::Retired, &patient).await.unwrap();
    assert_eq!((back.from, back.to), (version(2), version(1)));
    let gone = discard::drop_version(&world.pool, &version(2), STRICT.statement_timeout).await;
    let gone: Vec<String> = gone.unwrap().into_iter().map(|table| table.name).collect();
    assert_eq!(gone, ["tallies_v2_by_list", "tallies_v2_state", "tallies_v2_tally"]);
    world.stored(world.add("a", 6).await).await;
    eventually("nothing ails the projector", async || projector.readiness().is_ready()).await;
    assert_eq!(world.count("select count(*) from checkpoint where version = 2").await, 0);
    stop(projector).await;
    let projector = world.projector(domain()).await;
    world.stored(world.add("a", 7).await).await;
    assert_eq!(world.tables_of(2).await, 0, "a start does not make it again");
    stop(projector).await;
}

#[tokio::test]
async fn a_version_that_is_behind_in_one_partition_does_not_take_over() {
    let world = twice(4).await;
    let back = "update checkpoint set position = position - 1 where version = 2 and partition = 2";
    do_sql(&world, back).await;
    let refused = refusals(switch_to(&world, To::Ready, &STRICT).await);
    assert!(matches!(&refused[..], [Refusal::Behind { partition: Some(2), .. }]), "{refused:?}");
    assert_eq!(world.active().await, 1);
}

#[tokio::test]
async fn with_other_partitions_the_last_must_have_come_to_where_the_first_is() {
    let world = twice(2).await;
    let ahead = "update checkpoint set position = position + 1 where version = 1 and partition = 3";
    do_sql(&world, ahead).await;
    let refused = refusals(switch_to(&world, To::Ready, &STRICT).await);
    assert!(matches!(&refused[..], [Refusal::Behind { partition: None, .. }]), "{refused:?}");
    let level = "update checkpoint set position = position - 1 where version = 1 and partition = 3";
    do_sql(&world, level).await;
    switch_to(&world, To::Ready, &STRICT).await.unwrap();
    // The other way round it is the same gate.
    let ahead = "update checkpoint set position = position + 1 where version = 2 and partition = 0";
    do_sql(&world, ahead).await;
    let refused = refusals(switch_to(&world, To::Retired, &STRICT).await);
    assert!(matches!(&refused[..], [Refusal::Behind { partition: None, .. }]), "{refused:?}");
}

#[tokio::test]
async fn a_version_without_one_of_its_checkpoints_does_not_take_over() {
    let world = twice(4).await;
    do_sql(&world, "delete from checkpoint where version = 2 and partition = 1").await;
    let refused = refusals(switch_to(&world, To::Ready, &STRICT).await);
    assert_eq!(refused, [Refusal::NoCheckpoint { partition: 1 }]);
}

#[tokio::test]
async fn a_version_that_has_parked_what_the_active_one_has_applied_does_not_take_over() {
    let world = twice(4).await;
    let park = |number: u32, at: i64| {
        format!(
            "insert into parked (projection, version, aggregate_type, aggregate_id, partition, epoch,
                                 position, reason)
             values ('tallies', {number}, 'tally', 'c', 0, 1, {at}, 'decode')"
        )
    };
    do_sql(&world, &park(2, 3)).await;
    // Differences are something else than what is missing.
    let lax = GateConfig { accept_differences: true, ..STRICT };
    for gate in [&STRICT, &lax] {
        let refused = refusals(switch_to(&world, To::Ready, gate).await);
        assert!(matches!(&refused[..], [Refusal::Parked { count: 1, .. }]), "{refused:?}");
    }
    // Parked later in the active one: it has applied more of the aggregate.
    do_sql(&world, &park(1, 4)).await;
    let refused = refusals(switch_to(&world, To::Ready, &STRICT).await);
    assert!(matches!(&refused[..], [Refusal::Parked { .. }]), "{refused:?}");
    do_sql(&world, "update parked set position = 3 where version = 1").await;
    switch_to(&world, To::Ready, &STRICT).await.unwrap();
}

#[tokio::test]
async fn a_version_of_an_epoch_that_the_log_has_left_does_not_take_over() {
    let world = twice(4).await;
    do_sql(&world, "insert into adopted_epoch values (2, 1000)").await;
    do_sql(&world, "update checkpoint set epoch = 2 where version = 1").await;
    let refused = refusals(switch_to(&world, To::Ready, &STRICT).await);
    assert!(matches!(&refused[..], [Refusal::Epoch { .. }]), "{refused:?}");
    do_sql(&world, "update checkpoint set epoch = 2 where version = 2").await;
    switch_to(&world, To::Ready, &STRICT).await.unwrap();
}

#[tokio::test]
async fn what_an_active_version_has_applied_of_what_the_log_lost_is_owed_to_nobody() {
    let world = twice(4).await;
    // The log kept the first five events, and version 1 has six: it can never follow any more.
    do_sql(&world, "insert into adopted_epoch values (2, 5)").await;
    do_sql(&world, "update checkpoint set epoch = 2, position = 5 where version = 2").await;
    do_sql(&world, "delete from tallies_v2_tally where aggregate_id = 'a'").await;
    let switched = switch_to(&world, To::Ready, &STRICT).await.unwrap();
    assert!(switched.not_compared[0].starts_with("all tables: "), "{switched:?}");
    // And back it never goes.
    let refused = refusals(switch_to(&world, To::Retired, &STRICT).await);
    assert!(matches!(refused[0], Refusal::Epoch { .. }), "{refused:?}");
}

#[tokio::test]
async fn versions_that_do_not_hold_the_same_are_told_apart_and_the_operator_decides() {
    for change in [
        "update tallies_v2_tally set data = '{\"sum\":9,\"list\":\"new\"}' where aggregate_id = 'c'",
        "delete from tallies_v2_by_list where aggregate_id = 'd'",
        "update tallies_v2_state set version = 7 where aggregate_id = 'e'",
        "delete from tallies_v2_state where aggregate_id = 'b'",
    ] {
        let world = twice(4).await;
        do_sql(&world, change).await;
        let refused = refusals(switch_to(&world, To::Ready, &STRICT).await);
        assert!(matches!(&refused[..], [Refusal::Differs { .. }]), "{change}: {refused:?}");
        assert_eq!(world.active().await, 1);
        let lax = GateConfig { accept_differences: true, ..STRICT };
        let switched = switch_to(&world, To::Ready, &lax).await.unwrap();
        assert_eq!(switched.accepted.len(), 1, "it is told");
        assert_eq!(switched.not_compared.len(), 0, "everything was compared");
    }
}

#[tokio::test]
async fn of_two_switches_at_once_the_second_sees_what_the_first_decided() {
    let world = twice(4).await;
    let (one, other) = tokio::join!(
        switch_to(&world, To::Version(2), &STRICT),
        switch_to(&world, To::Version(2), &STRICT)
    );
    let outcomes = [one, other];
    let done = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    assert_eq!(done, 1, "{outcomes:?}");
    let told = outcomes.iter().any(|outcome| matches!(outcome, Err(SwitchError::Active(_))));
    assert!(told, "{outcomes:?}");
    assert_eq!(world.active().await, 2);
}

#[tokio::test]
async fn a_writer_that_is_about_to_pass_the_gate_by_is_waited_for() {
    let world = twice(4).await;
    // The active version commits one event more, between the look and the flip if it could.
    let mut writer = world.pool.begin().await.unwrap();
    sqlx::query(
        "update checkpoint set position = position + 1 where version = 1 and partition = 0",
    )
    .execute(&mut *writer)
    .await
    .unwrap();
    let committing = async {
        eventually("the switch waits for the writer", async || {
            let waiting = "select count(*) from pg_stat_activity
                where wait_event_type = 'Lock' and datname = current_database()";
            world.count(waiting).await == 1
        })
        .await;
        writer.commit().await.unwrap();
    };
    let (outcome, ()) = tokio::join!(switch_to(&world, To::Ready, &STRICT), committing);
    let refused = refusals(outcome);
    assert!(matches!(&refused[..], [Refusal::Behind { partition: Some(0), .. }]), "{refused:?}");
}

#[tokio::test]
async fn what_is_read_is_never_dropped_and_a_switch_never_goes_to_what_is_gone() {
    let world = twice(4).await;
    let drop_it = async |number| {
        discard::drop_version(&world.pool, &version(number), STRICT.statement_timeout).await
    };
    assert!(matches!(drop_it(1).await, Err(DropError::Active(_))));
    assert!(matches!(drop_it(3).await, Err(DropError::UnknownVersion(_))));
    let (switched, dropped) = tokio::join!(switch_to(&world, To::Ready, &STRICT), drop_it(2));
    // Whoever came second saw what the first had done.
    match (&switched, &dropped) {
        (Ok(_), Err(DropError::Active(_))) => {}
        (Err(SwitchError::NothingReady(_)), Ok(_)) => {}
        other => panic!("{other:?}"),
    }
    let active = u32::try_from(world.active().await).unwrap();
    assert_eq!(world.tables_of(active).await, 3);
}

#[tokio::test]
async fn rules_that_a_binary_lacks_are_not_switched_to() {
    let world = twice(4).await;
    do_sql(&world, "update projection_version set definition = 9 where version = 2").await;
    let refused = switch_to(&world, To::Ready, &STRICT).await;
    assert!(
        matches!(refused, Err(SwitchError::UnknownDefinition { definition: 9, .. })),
        "{refused:?}"
    );
    let only_nine: Result<Switched, SwitchError> = Box::pin(switch::switch(
        &world.pool,
        &Domain::builder().build().unwrap(),
        "tallies",
        To::Ready,
        &STRICT,
    ))
    .await;
    assert!(only_nine.is_err());
}
