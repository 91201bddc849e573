//! Two versions beside each other, compared.

use consistency::Position;
use projection::Domain;
use projection::sql::ParityOf;
use region_projector::parity::{Digest, Parity, ParityError, Scope, checksums, compare};

use crate::tally::domain_of_versions;
use crate::world::{World, eventually, stop};

const VERSIONS: [(u32, u16); 2] = [(1, 4), (2, 3)];

impl World {
    async fn parity(&self, domain: &Domain, projection: &str, scope: Scope) -> Parity {
        self.try_parity(domain, projection, scope).await.unwrap()
    }

    async fn try_parity(
        &self,
        domain: &Domain,
        projection: &str,
        scope: Scope,
    ) -> Result<Parity, ParityError> {
        let version = |version| domain.projection(projection, version).unwrap();
        let mut connection = self.pool.acquire().await.unwrap();
        compare(&mut connection, version(1), version(2), scope).await
    }

    /// Waits until all partitions of all versions have stored a position.
    async fn all_stored(&self, position: Position) {
        eventually("everything is stored", async || {
            let lowest = sqlx::query_scalar("select min(position) from checkpoint");
            // The tables are not there at once.
            let lowest: Option<i64> = lowest.fetch_one(&self.pool).await.ok().flatten();
            lowest.is_some_and(|lowest| position.as_i64() <= lowest)
        })
        .await;
    }

    /// Changes what nobody but a projector may change.
    async fn tamper(&self, statement: &'static str) {
        let done = sqlx::query(statement).execute(&self.pool).await.unwrap();
        assert_eq!(done.rows_affected(), 1, "{statement}");
    }

    /// A region where both versions of the tallies and of the totals have applied the same.
    async fn with_two_versions(domain: &Domain) -> Self {
        let world = Self::start().await;
        // A new region has the newest version only.
        let projector = world.projector(domain_of_versions(&VERSIONS[..1])).await;
        eventually("the tables are there", async || projector.readiness().is_ready()).await;
        stop(projector).await;
        let second = "insert into projection_version
                          (projection, version, partition_count, active, definition)
                      select projection, 2, 3, false, 2 from projection_version";
        sqlx::query(second).execute(&world.pool).await.unwrap();
        let projector = world.projector(domain.clone()).await;
        eventually("the tables are there", async || projector.readiness().is_ready()).await;
        for n in 0..20 {
            world.add(&format!("t-{n}"), n + 20).await;
            world.add(&format!("t-{}", n % 3), 5).await;
        }
        world.happen("t-4", "Removed", "{}").await;
        // Parked in both.
        world.add("t-5", 13).await;
        let last = world.happen("t-6", "Moved", r#"{"to":"(old, \"one\")"}"#).await;
        world.all_stored(last).await;
        stop(projector).await;
        world
    }
}

#[tokio::test]
async fn versions_that_applied_the_same_are_equal_in_whatever_partitions() {
    let domain = domain_of_versions(&VERSIONS);
    let world = World::with_two_versions(&domain).await;
    let tallies = world.parity(&domain, "tallies", Scope::Rows).await;
    let parity = Parity { compared_count: 19, left_out_count: 1, ..Parity::default() };
    assert_eq!(tallies, parity, "the parked one is left out");
    assert_eq!(world.parity(&domain, "totals", Scope::Rows).await, parity);

    let mut connection = world.pool.acquire().await.unwrap();
    for projection in ["tallies", "totals"] {
        let mut digests = Vec::new();
        for version in [1, 2] {
            let definition = domain.projection(projection, version).unwrap();
            let tables = checksums(&mut connection, definition).await.unwrap();
            assert_eq!(tables[0].of, ParityOf::Versions);
            let partitions = usize::from(definition.partition_count().get());
            assert_eq!(tables[0].partitions.len(), partitions, "each has some of twenty");
            digests.push(tables.iter().map(|table| table.whole()).collect::<Vec<Digest>>());
        }
        assert_eq!(digests[0], digests[1], "{projection}");
        assert_eq!(digests[0][0].line_count(), 20);
    }
}

/// A projection, the table and key that differ once the first statement has run, and the statement that
/// mends it.
const CASES: [(&str, &str, &str, &str, &str); 8] = [
    (
        "tallies",
        "tally",
        "t-7",
        "update tallies_v2_tally set data = '{\"sum\":0,\"list\":\"new\"}' where aggregate_id = 't-7'",
        "update tallies_v2_tally as two set data = one.data from tallies_v1_tally as one
         where two.aggregate_id = 't-7' and one.aggregate_id = 't-7'",
    ),
    (
        "tallies",
        "tally",
        "t-8",
        "delete from tallies_v2_tally where aggregate_id = 't-8'",
        "insert into tallies_v2_tally select * from tallies_v1_tally where aggregate_id = 't-8'",
    ),
    (
        "tallies",
        "tally",
        "t-99",
        "insert into tallies_v2_tally select 't-99', version, epoch, position, data
         from tallies_v1_tally where aggregate_id = 't-8'",
        "delete from tallies_v2_tally where aggregate_id = 't-99'",
    ),
    (
        "tallies",
        "by-list",
        "[\"new\", ",
        "update tallies_v2_by_list set data = '1' where aggregate_id = 't-9'",
        "update tallies_v2_by_list set data = '29' where aggregate_id = 't-9'",
    ),
    (
        "tallies",
        "state",
        "t-10",
        "update tallies_v2_state set version = version + 1 where aggregate_id = 't-10'",
        "update tallies_v2_state set version = version - 1 where aggregate_id = 't-10'",
    ),
    (
        "tallies",
        "state",
        "t-10",
        "update tallies_v2_state set state = '{}' where aggregate_id = 't-10'",
        "update tallies_v2_state as two set state = one.state from tallies_v1_state as one
         where two.aggregate_id = 't-10' and one.aggregate_id = 't-10'",
    ),
    (
        "totals",
        "total",
        "all",
        "update totals_v2_total set total = total + 1 where partition = 1",
        "update totals_v2_total set total = total - 1 where partition = 1",
    ),
    // The sum with its sign turned, which hashes of numbers pass over, and turned again.
    ("totals", "total", "all", TURN, TURN),
];
const TURN: &str = "update totals_v2_total set total = total - 2 * (
    select sum(total) from totals_v2_total) where partition = 1";

#[tokio::test]
async fn whatever_differs_between_two_versions_is_named() {
    let domain = domain_of_versions(&VERSIONS);
    let world = World::with_two_versions(&domain).await;
    for (projection, table, key, spoil, mend) in CASES {
        world.tamper(spoil).await;
        let parity = world.parity(&domain, projection, Scope::Rows).await;
        let [difference] = &parity.differences[..] else {
            panic!("{spoil}: {parity:?}");
        };
        assert_eq!(difference.table, table, "{spoil}");
        assert!(difference.key.starts_with(key), "{spoil}: {difference}");
        let versions = world.parity(&domain, projection, Scope::Versions).await;
        assert_eq!(versions.is_equal(), !spoil.contains("set version"), "rows are not looked at");
        world.tamper(mend).await;
        assert!(world.parity(&domain, projection, Scope::Rows).await.is_equal(), "{mend}");
    }
}

/// What is added up must tell which key has which value.
#[tokio::test]
async fn values_that_changed_places_are_named() {
    let domain = domain_of_versions(&VERSIONS);
    let world = World::with_two_versions(&domain).await;
    let swaps = [
        (
            "tally",
            "update tallies_v2_tally as two set data = one.data from tallies_v1_tally as one",
        ),
        (
            "state",
            "update tallies_v2_state as two set state = one.state from tallies_v1_state as one",
        ),
    ];
    for (nth, (table, swap)) in (1..).zip(swaps) {
        let places =
            "where (two.aggregate_id, one.aggregate_id) in (('t-7', 't-8'), ('t-8', 't-7'))";
        let swap = sqlx::AssertSqlSafe(format!("{swap} {places}"));
        let done = sqlx::query(swap).execute(&world.pool).await.unwrap();
        assert_eq!(done.rows_affected(), 2);
        let parity = world.parity(&domain, "tallies", Scope::Rows).await;
        let of_table = parity.differences.iter().filter(|it| it.table == table);
        let keys: Vec<&str> = of_table.map(|difference| difference.key.as_str()).collect();
        assert_eq!(keys, ["t-7", "t-8"], "{table}");
        assert_eq!(parity.differences.len(), 2 * nth, "{parity:?}");
    }
}

#[tokio::test]
async fn a_version_that_is_ahead_is_compared_as_far_as_the_other_has_come() {
    let domain = domain_of_versions(&VERSIONS);
    let world = World::with_two_versions(&domain).await;
    // Only the first version of each goes on.
    let projector = world.projector(domain_of_versions(&VERSIONS[..1])).await;
    world.add("t-0", 1).await;
    world.add("t-new", 1).await;
    let last = world.add("t-1", 1).await;
    eventually("the first versions are ahead", async || {
        let behind = "select count(*) from checkpoint
                      where version = 1 and position < (select max(position) from checkpoint)";
        world.stored(last).await;
        world.count(behind).await == 0
    })
    .await;
    stop(projector).await;

    let tallies = world.parity(&domain, "tallies", Scope::Rows).await;
    assert!(tallies.is_equal(), "{tallies:?}");
    assert_eq!((tallies.left_out_count, tallies.compared_count), (4, 17));
    let totals = world.parity(&domain, "totals", Scope::Rows).await;
    assert!(totals.is_equal(), "{totals:?}");
    assert_eq!(totals.not_compared, ["total"], "other events are in them");

    world.tamper("update tallies_v1_tally set data = '{}' where aggregate_id = 't-7'").await;
    let tallies = world.parity(&domain, "tallies", Scope::Rows).await;
    assert_eq!(tallies.differences.len(), 1, "{tallies:?}");
    sqlx::query("delete from checkpoint where version = 2 and partition = 2")
        .execute(&world.pool)
        .await
        .unwrap();
    let nowhere = world.try_parity(&domain, "tallies", Scope::Rows).await;
    assert!(matches!(nowhere, Err(ParityError::NoCheckpoint(_))), "{nowhere:?}");
}
