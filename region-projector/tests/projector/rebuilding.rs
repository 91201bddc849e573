//! Projections that are built anew from the log, beside the version that is read.

use std::time::Duration;

use compose::process::{Child, Program, Signal};
use consistency::Position;
use futures::{FutureExt, StreamExt};
use process::config::Period;
use projection::Domain;
use region_projector::ProjectorConfig;
use region_projector::rebuild::begin::Request;
use region_projector::rebuild::progress::Progress;
use region_projector::rebuild::{RebuildError, Rebuilt, rebuild};
use region_projector::switch::{self, GateConfig, SwitchError, Switched, To};
use serde_json::json;
use sqlx::AssertSqlSafe;
use tokio_util::sync::CancellationToken;

use crate::tally::{domain, domain_with_totals};
use crate::world::{STREAM, World, eventually, stop};

const STRICT: GateConfig = GateConfig {
    catch_up_max: Period::from_secs(20),
    statement_timeout: Period::from_secs(60),
    accept_differences: false,
};
const BINARY: &str = env!("CARGO_BIN_EXE_region-projector");

/// Keeps one partition of a rebuild of `orders` from storing its states, and no other.
const KEEP_ONE: &str =
    "insert into orders_v2_state select * from orders_v1_state where partition = 3 limit 1";

fn of(projection: &str) -> Request {
    Request { projection: projection.to_owned(), definition: None, partitions: None }
}

impl World {
    async fn rebuilt(
        &self,
        domain: &Domain,
        request: &Request,
        adjust: impl FnOnce(&mut ProjectorConfig),
    ) -> Result<Rebuilt, RebuildError> {
        let mut config = self.config();
        adjust(&mut config);
        let (progress, stop) = (Progress::default(), CancellationToken::new());
        Box::pin(rebuild(&config, domain, request, &progress, &stop)).await
    }

    /// Takes over only if both hold the same, whatever they were built by.
    async fn switched(&self, domain: &Domain, projection: &str) -> Result<Switched, SwitchError> {
        Box::pin(switch::switch(&self.pool, domain, projection, To::Ready, &STRICT)).await
    }

    async fn one<T>(&self, statement: &str) -> T
    where
        T: Send + Unpin + sqlx::Type<sqlx::Postgres> + for<'r> sqlx::Decode<'r, sqlx::Postgres>,
    {
        let statement = AssertSqlSafe(statement.to_owned());
        sqlx::query_scalar(statement).fetch_one(&self.pool).await.unwrap()
    }
}

/// Tallies that are added to, moved and removed, one of them poisoned; the last event's position.
async fn tallied(world: &World) -> Position {
    for n in 0..40 {
        world.add(&format!("t-{n}"), n + 20).await;
        world.add(&format!("t-{}", n % 7), 5).await;
    }
    world.happen("t-4", "Removed", "{}").await;
    world.add("t-5", 13).await;
    world.add("t-5", 1).await;
    world.happen("t-8", "Moved", r#"{"to":"tab\t and \\ slash"}"#).await;
    world.happen("t-6", "Moved", r#"{"to":"(old, \"one\")"}"#).await
}

#[tokio::test]
async fn what_is_rebuilt_is_what_a_projector_would_have_made_and_follows_the_log() {
    let world = World::start().await;
    let projector = world.projector(domain_with_totals()).await;
    world.stored(tallied(&world).await).await;
    for projection in ["tallies", "totals"] {
        let built = world.rebuilt(&domain_with_totals(), &of(projection), |_| {}).await.unwrap();
        assert_eq!((built.key.version, built.definition), (2, 1));
        assert_eq!((built.parked_count, built.resumed_at), (1, None));
        // More happens, and the version that was built follows.
        let last = world.add("t-9", 7).await;
        let follows = format!(
            "select count(*) from checkpoint where projection = '{projection}' and version = 2
             and position >= {}",
            last.get()
        );
        eventually("it follows the log", async || 4 <= world.one::<i64>(&follows).await).await;
        world.switched(&domain_with_totals(), projection).await.unwrap();
    }
    let indexes = "select count(*) from pg_indexes where tablename like 'tallies\\_v2\\_%'";
    assert_eq!(world.one::<i64>(indexes).await, 3, "each table has its key");
    let letters = "select count(*) from dead_letter where projection = 'tallies' and version = 2";
    assert_eq!(world.one::<i64>(letters).await, 2);
    stop(projector).await;
}

#[tokio::test]
async fn states_that_have_no_place_in_memory_go_to_their_table_and_come_back() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.stored(tallied(&world).await).await;
    let partitions = Request { partitions: Some(3), ..of("tallies") };
    let small = |config: &mut ProjectorConfig| {
        config.rebuild.states_bytes_max = 600;
        config.rebuild.queue_bytes_max = 4096;
        // Or all of it would be folded at once.
        config.nats.pull_bytes_max = 2000;
    };
    world.rebuilt(&domain(), &partitions, small).await.unwrap();
    world.switched(&domain(), "tallies").await.unwrap();
    let count = "select partition_count from projection_version
                 where projection = 'tallies' and active";
    assert_eq!(world.one::<i32>(count).await, 3);
    stop(projector).await;
}

#[tokio::test]
async fn a_stream_that_has_lost_its_beginning_is_made_good_by_the_log() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.stored(tallied(&world).await).await;
    let stream = world.jetstream.get_stream(STREAM).await.unwrap();
    stream.purge().sequence(60).await.unwrap();
    world.rebuilt(&domain(), &of("tallies"), |_| {}).await.unwrap();
    world.switched(&domain(), "tallies").await.unwrap();
    stop(projector).await;
}

#[tokio::test]
async fn rows_that_the_database_refuses_park_their_aggregates_at_the_same_event() {
    let world = World::start().await;
    let domain = orders::domain().unwrap();
    let projector = world.projector(domain.clone()).await;
    let lamp = |price: u64| json!({"name": "Desk lamp", "price_cents": price}).to_string();
    for (product, event_type, data) in [
        ("p-1", "ProductCreated", lamp(2_500)),
        ("p-2", "ProductCreated", lamp(u64::MAX)),
        ("p-3", "ProductCreated", lamp(1_500)),
        ("p-3", "PriceChanged", json!({"price_cents": 1_600}).to_string()),
        ("p-3", "PriceChanged", json!({"price_cents": u64::MAX}).to_string()),
        ("p-3", "PriceChanged", json!({"price_cents": u64::MAX - 1}).to_string()),
        ("p-1", "PriceChanged", json!({"price_cents": 900}).to_string()),
    ] {
        let event = world.log.append_to("product", product, event_type, &data);
        world.publish(&event).await;
        let at = format!(
            "select coalesce(min(position), 0) from checkpoint where projection = 'products'
             and position >= {}",
            event.at.position.get()
        );
        // One by one, as it parks at the very event.
        eventually("it is applied", async || {
            let stored = sqlx::query_scalar::<_, i64>(AssertSqlSafe(at.clone()));
            stored.fetch_one(&world.pool).await.is_ok_and(|at| event.at.position.as_i64() <= at)
        })
        .await;
    }
    let built = world.rebuilt(&domain, &of("products"), |_| {}).await.unwrap();
    assert_eq!(built.parked_count, 2);
    let differ = "select count(*) from (
            select aggregate_id, position, reason from parked where version = 1
            except select aggregate_id, position, reason from parked where version = 2) as differ";
    assert_eq!(world.one::<i64>(differ).await, 0);
    world.switched(&domain, "products").await.unwrap();
    stop(projector).await;
}

#[tokio::test]
async fn a_projection_that_would_park_too_much_is_not_built() {
    let world = World::start().await;
    tallied(&world).await;
    let none = |config: &mut ProjectorConfig| config.apply.parked_aggregates_max = 0;
    let refused = world.rebuilt(&domain(), &of("tallies"), none).await;
    assert!(matches!(refused, Err(RebuildError::Tripped { .. })), "{refused:?}");
    let built = world.rebuilt(&domain(), &of("tallies"), |_| {}).await.unwrap();
    assert!(built.resumed_at.is_some(), "what was begun is gone on with");
}

#[tokio::test]
async fn rules_that_are_not_in_the_binary_and_partitions_that_cannot_be_are_refused() {
    let world = World::start().await;
    let other = Request { definition: Some(7), ..of("tallies") };
    let refused = world.rebuilt(&domain(), &other, |_| {}).await.unwrap_err();
    assert!(
        refused.to_string().contains("has no definition 7 in this binary; it has 1"),
        "{refused}"
    );
    let unknown = world.rebuilt(&domain(), &of("unheard-of"), |_| {}).await;
    assert!(matches!(unknown, Err(RebuildError::UnknownDefinition { .. })), "{unknown:?}");
    let none = Request { partitions: Some(0), ..of("tallies") };
    let refused = world.rebuilt(&domain(), &none, |_| {}).await;
    assert!(matches!(refused, Err(RebuildError::PartitionCount(0))), "{refused:?}");
}

impl World {
    /// A rebuild of `orders` as a process of its own.
    fn rebuilding(&self) -> Child {
        let config = self.configure("[rebuild]\ncheckpoint_interval = \"50ms\"");
        let log = config.with_extension("log");
        let program = Program::new("rebuild", BINARY, &log).arg("--config").arg(config);
        program.arg("rebuild").arg("orders").spawn().unwrap()
    }

    /// Has a rebuild come to where `statement` keeps it from going on, and kills it there.
    async fn killed_at(&self, statement: &str) {
        let blocking = self.hold(statement).await;
        let child = self.rebuilding();
        // Long enough that it is this lock and no other that is about to be given back.
        let waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'
                     and application_name = 'region-projector-rebuild'
                     and datname = current_database()
                     and clock_timestamp() - query_start > interval '500 milliseconds'";
        eventually("it waits", async || 0 < self.count(waits).await).await;
        child.kill().await;
        blocking.rollback().await.unwrap();
        // The server notices that its client is gone when it has something to say to it.
        let gone = "select count(*) from pg_stat_activity
                    where application_name = 'region-projector-rebuild'
                    and datname = current_database()";
        eventually("its connections are gone", async || self.count(gone).await == 0).await;
    }
}

#[tokio::test]
async fn a_rebuild_that_is_killed_in_any_phase_goes_on_where_it_was() {
    let world = World::start().await;
    let domain = orders::domain().unwrap();
    let projector = world.projector(domain.clone()).await;
    let last = world.place(200).await;
    world.orders_stored(last).await;
    let stored = "select count(*) from checkpoint where projection = 'orders' and version = 2
                  and position > 0";
    // A first one is killed before it has made anything but its tables, or even those: it may wait behind the
    // projector, which waits as well.
    world.killed_at("lock table dead_letter, parked").await;
    assert_eq!(world.one::<i64>(stored).await, 0);
    // All partitions but one have stored what they folded.
    world.killed_at(KEEP_ONE).await;
    assert_eq!(world.one::<i64>(stored).await, 7);
    // What comes next is read together with what most of the partitions have stored.
    let last = world.place(5).await;
    world.killed_at("lock table rebuild_range in exclusive mode").await;
    assert_eq!(world.one::<i64>("select count(*) from orders_v2_state").await, 205);
    assert_eq!(world.one::<i64>("select count(*) from orders_v2_order_detail").await, 0);
    world.killed_at("lock table orders_v2_orders_by_status in access share mode").await;
    assert_eq!(world.one::<i64>("select count(*) from orders_v2_order_detail").await, 205);
    let phase: String = world.one("select phase from rebuild").await;
    assert_eq!(phase, "indexing");
    let told = world.told_json(&["rebuild", "orders"]).await;
    assert_eq!((&told["version"], &told["resumed_at"]), (&json!(2), &json!(last)));
    world.switched(&domain, "orders").await.unwrap();
    stop(projector).await;
}

#[tokio::test]
async fn partitions_that_are_through_leave_the_others_their_reader() {
    let world = World::start().await;
    let domain = orders::domain().unwrap();
    let projector = world.projector(domain.clone()).await;
    world.orders_stored(world.place(200).await).await;
    stop(projector).await;
    world.killed_at("lock table dead_letter, parked").await;
    world.killed_at(KEEP_ONE).await;
    let through = "select count(*) from checkpoint where projection = 'orders' and version = 2
                   and position = (select max(position) from checkpoint)";
    assert_eq!(world.one::<i64>(through).await, 7);
    let mut created =
        world.client.subscribe("$JS.EVENT.ADVISORY.CONSUMER.CREATED.>").await.unwrap();
    world.client.flush().await.unwrap();
    world.rebuilt(&domain, &of("orders"), |_| {}).await.unwrap();
    world.client.flush().await.unwrap();
    let made = std::iter::from_fn(|| created.next().now_or_never().flatten()).count();
    assert_eq!(made, 1, "the stream is read once");
    assert_eq!(world.one::<i64>("select count(*) from orders_v2_order_detail").await, 200);
}

#[tokio::test]
async fn two_rebuilds_of_one_projection_do_not_run_at_once() {
    let world = World::start().await;
    let projector = world.projector(orders::domain().unwrap()).await;
    world.orders_stored(world.place(20).await).await;
    let blocking = world.hold("lock table rebuild_range in exclusive mode").await;
    let first = world.rebuilding();
    let building = "select count(*) from rebuild where phase = 'filling'";
    eventually("the first is at work", async || world.count(building).await == 1).await;
    let second = world.operate(&["rebuild", "orders"]).await;
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && said.contains("is being rebuilt by another"), "{said}");
    // Nor is what it builds dropped under its hands.
    let dropped = world.operate(&["drop", "orders", "2"]).await;
    let said = String::from_utf8_lossy(&dropped.stderr).into_owned();
    assert!(!dropped.status.success() && said.contains("is being rebuilt"), "{said}");
    blocking.rollback().await.unwrap();
    let state = "select count(*) from projection_version
                 where projection = 'orders' and version = 2 and state = 'ready'";
    eventually("the first ends well", async || world.count(state).await == 1).await;
    first.stop(Signal::TERM, Duration::from_secs(20)).await.unwrap();
    stop(projector).await;
}
