//! Views compared with a fold of the log.

use consistency::Position;
use projection::{Domain, ProjectionDefinition};
use region_projector::Projector;
use region_projector::log::LogClient;
use region_projector::verify::{Extent, Verified, Verify, VerifyError};
use sqlx::AssertSqlSafe;

use crate::tally::domain_of_versions;
use crate::world::{World, eventually, stop};

fn domain() -> Domain {
    domain_of_versions(&[(1, 4)])
}

impl World {
    pub async fn verified(&self, projection: &str, extent: Extent) -> Verified {
        self.try_verified(projection, extent).await.unwrap()
    }

    async fn try_verified(
        &self,
        projection: &str,
        extent: Extent,
    ) -> Result<Verified, VerifyError> {
        self.verified_as(domain().projection(projection, 1).unwrap(), extent).await
    }

    pub async fn verified_as(
        &self,
        definition: &ProjectionDefinition,
        extent: Extent,
    ) -> Result<Verified, VerifyError> {
        let log = &LogClient::new(&self.config().primary_log).unwrap();
        let verify = Verify { pool: &self.pool, log, definition, page_events_max: 7 };
        verify.run(extent).await
    }

    async fn execute(&self, statement: &str) {
        let done = sqlx::query(AssertSqlSafe(statement.to_owned())).execute(&self.pool).await;
        assert_eq!(done.unwrap().rows_affected(), 1, "{statement}");
    }

    pub async fn all_positions(&self, position: Position) {
        eventually("everything is stored", async || {
            let lowest = sqlx::query_scalar("select min(position) from checkpoint");
            let lowest: Option<i64> = lowest.fetch_one(&self.pool).await.ok().flatten();
            lowest.is_some_and(|lowest| position.as_i64() <= lowest)
        })
        .await;
    }

    /// Tallies and totals with something of everything in them: lists, a removal, a parked aggregate, a
    /// discarded event, events of another type.
    pub async fn with_tallies() -> (Self, Projector) {
        let world = Self::start().await;
        let projector = world.projector(domain()).await;
        for n in 0..20 {
            world.add(&format!("t-{n}"), n + 20).await;
            world.add(&format!("t-{}", n % 3), 5).await;
        }
        world.happen("t-4", "Removed", "{}").await;
        world.happen("t-6", "Moved", r#"{"to":"old"}"#).await;
        world.add("t-5", 13).await;
        let poison = world.add("t-7", 13).await;
        let other = world.log.append_to("light", "l-1", "Lit", "{}");
        world.publish(&other).await;
        world.all_positions(other.at.position).await;
        for projection in ["tallies", "totals"] {
            let key = region_projector::checkpoint::VersionKey {
                projection: consistency::Name::new(projection).unwrap(),
                version: 1,
            };
            let definition = domain();
            let definition = definition.projection(key.projection.as_str(), 1).unwrap();
            region_projector::dead_letters::discard(
                &world.pool,
                definition,
                &crate::letters::aggregate("t-7"),
                poison,
                &world.config().apply,
                &region_projector::dead_letters::Actor::new("test"),
            )
            .await
            .unwrap();
        }
        let last = world.add("t-7", 1).await;
        world.all_positions(last).await;
        (world, projector)
    }
}

#[tokio::test]
async fn a_view_that_holds_what_the_log_says_is_sound() {
    let (world, projector) = World::with_tallies().await;
    for projection in ["tallies", "totals"] {
        let whole = world.verified(projection, Extent::Whole).await;
        assert!(whole.is_sound(), "{whole:?}");
        assert_eq!((whole.parity.compared_count, whole.parity.left_out_count), (20, 0));
        assert!(whole.parity.not_compared.is_empty(), "{whole:?}");
        assert_eq!(whole.event_count, 44, "all of the type but the one that is parked");
        let sample = world.verified(projection, Extent::Sample(1000)).await;
        assert!(sample.is_sound(), "{sample:?}");
        assert_eq!(sample.parity.compared_count, 20);
        let some = world.verified(projection, Extent::Sample(1)).await;
        assert!(some.is_sound() && (1..3).contains(&some.parity.compared_count), "{some:?}");
    }
    let sample = world.verified("totals", Extent::Sample(5)).await;
    assert_eq!(sample.parity.not_compared, ["total"], "sums are of all aggregates");
    stop(projector).await;
}

/// A projection; the table, key and field that differ once the first statement has run, with what is said
/// of it; and the statement that mends it.
type Case =
    (&'static str, &'static str, &'static str, &'static [&'static str], &'static str, &'static str);

const CASES: [Case; 8] = [
    (
        "tallies",
        "tally",
        "t-8",
        &["data.sum", "30", "28"],
        "update tallies_v1_tally set data = '{\"sum\":30,\"list\":\"new\"}' where aggregate_id = 't-8'",
        "update tallies_v1_tally set data = '{\"sum\":28,\"list\":\"new\"}' where aggregate_id = 't-8'",
    ),
    (
        "tallies",
        "tally",
        "t-8",
        &["version", "2", "1"],
        "update tallies_v1_tally set version = 2 where aggregate_id = 't-8'",
        "update tallies_v1_tally set version = 1 where aggregate_id = 't-8'",
    ),
    (
        "tallies",
        "tally",
        "t-9",
        &["", "nothing"],
        "delete from tallies_v1_tally where aggregate_id = 't-9'",
        "insert into tallies_v1_tally select aggregate_id, version, epoch, position,
         '{\"sum\":29,\"list\":\"new\"}' from tallies_v1_state where aggregate_id = 't-9'",
    ),
    (
        "tallies",
        "tally",
        "t-99",
        &[""],
        "insert into tallies_v1_tally select 't-99', version, epoch, position, data
         from tallies_v1_tally where aggregate_id = 't-8'",
        "delete from tallies_v1_tally where aggregate_id = 't-99'",
    ),
    (
        "tallies",
        "by-list",
        "[\"new\", ",
        &["", "nothing"],
        "delete from tallies_v1_by_list where aggregate_id = 't-10'",
        "insert into tallies_v1_by_list select 'new', created_position, aggregate_id, '30'
         from tallies_v1_state where aggregate_id = 't-10'",
    ),
    (
        "tallies",
        "state",
        "t-8",
        &["state.sum", "28", "1"],
        "update tallies_v1_state set state = '{\"sum\":1,\"list\":\"new\"}' where aggregate_id = 't-8'",
        "update tallies_v1_state set state = '{\"sum\":28,\"list\":\"new\"}' where aggregate_id = 't-8'",
    ),
    (
        "totals",
        "state",
        "t-11",
        &["version"],
        "update totals_v1_state set version = 7 where aggregate_id = 't-11'",
        "update totals_v1_state set version = 1 where aggregate_id = 't-11'",
    ),
    (
        "totals",
        "total",
        "all",
        &["total"],
        "update totals_v1_total set total = total + 1 where partition = 1",
        "update totals_v1_total set total = total - 1 where partition = 1",
    ),
];

#[tokio::test]
async fn whatever_a_view_holds_beyond_or_below_the_log_is_named() {
    let (world, projector) = World::with_tallies().await;
    stop(projector).await;
    for (projection, table, key, said, spoil, mend) in CASES {
        world.execute(spoil).await;
        for extent in [Extent::Whole, Extent::Sample(1000)] {
            let verified = world.verified(projection, extent).await;
            if table == "total" && extent != Extent::Whole {
                assert!(verified.is_sound(), "sums are of all aggregates: {verified:?}");
                continue;
            }
            let [difference] = &verified.parity.differences[..] else {
                panic!("{spoil}: {verified:?}");
            };
            assert_eq!(difference.table, table, "{spoil}");
            assert!(difference.key.starts_with(key), "{spoil}: {difference}");
            let [field] = &difference.fields()[..] else { panic!("{spoil}: {difference}") };
            assert_eq!(field.path, said[0], "{difference}");
            for said in &said[1..] {
                assert!(difference.to_string().contains(said), "{said}: {difference}");
            }
            assert!(!verified.is_sound());
        }
        world.execute(mend).await;
        let verified = world.verified(projection, Extent::Whole).await;
        assert!(verified.is_sound(), "{mend}: {verified:?}");
    }
}

#[tokio::test]
async fn an_aggregate_that_the_view_has_lost_is_found_through_the_log() {
    let (world, projector) = World::with_tallies().await;
    stop(projector).await;
    for table in ["state", "tally", "by_list"] {
        world.execute(&format!("delete from tallies_v1_{table} where aggregate_id = 't-8'")).await;
    }
    for extent in [Extent::Whole, Extent::Sample(1000)] {
        let verified = world.verified("tallies", extent).await;
        let tables: Vec<&str> =
            verified.parity.differences.iter().map(|one| one.table.as_str()).collect();
        assert_eq!(tables, ["state", "state", "tally", "by-list"], "{verified:?}");
    }
    world.log.withhold(Some(Position::new(3).unwrap()));
    let hole = world.try_verified("tallies", Extent::Whole).await;
    assert!(matches!(hole, Err(VerifyError::Hole { .. })), "{hole:?}");
}

#[tokio::test]
async fn a_view_is_verified_while_events_keep_arriving() {
    let (world, projector) = World::with_tallies().await;
    let extents = [Extent::Whole, Extent::Sample(10)];
    for n in 0..3 {
        for (projection, extent) in
            [("tallies", extents[0]), ("tallies", extents[1]), ("totals", extents[0])]
        {
            let arriving = async {
                let mut last = Position::ZERO;
                for id in 0..30 {
                    last = world.add(&format!("t-{}", 8 + id), n).await;
                }
                last
            };
            let (verified, last) = tokio::join!(world.verified(projection, extent), arriving);
            assert!(verified.is_sound(), "{projection} {extent:?}: {verified:?}");
            world.all_positions(last).await;
        }
    }
    stop(projector).await;
}

#[tokio::test]
async fn an_operator_verifies_a_view_from_the_command_line() {
    let world = World::start().await;
    let projector = world.projector(orders::domain().unwrap()).await;
    eventually("the tables are there", async || projector.readiness().is_ready()).await;
    let last = world.place(12).await;
    world.all_positions(last).await;
    stop(projector).await;
    let names = orders::domain().unwrap();
    for definition in names.stored() {
        for extent in [&["--whole"][..], &["--sample", "5"]] {
            let name = definition.name().as_str();
            let told = world.told(&[&["verify", name], extent].concat()).await;
            assert!(told.starts_with(&format!("{name} v1 holds what the log says")), "{told}");
        }
    }
    let id: String = sqlx::query_scalar("select max(aggregate_id) from orders_v1_state")
        .fetch_one(&world.pool)
        .await
        .unwrap();
    let spoil = "update orders_v1_order_detail set version = 9
                 where aggregate_id = (select max(aggregate_id) from orders_v1_state)";
    world.execute(spoil).await;
    let output = world.operate(&["verify", "orders", "--whole"]).await;
    assert!(!output.status.success());
    let said = String::from_utf8(output.stdout).unwrap();
    let row: Vec<&str> = said.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row, ["order-detail", &id, "version", "1", "9"], "{said}");
    let output = world.operate(&["verify", "orders", "--json"]).await;
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["differences"][0]["fields"][0]["expected"], "1", "{said:#}");
    let unknown = world.operate(&["verify", "nothing"]).await;
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("no version"), "it says why");
}
