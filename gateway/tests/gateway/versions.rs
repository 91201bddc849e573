//! Gateways that do not know yet which version of a projection is read.

use consistency::PartitionCount;
use projection::ProjectionDefinition;
use sqlx::AssertSqlSafe;

use crate::world::{World, eventually};

const ROW: &str = "/v1/views/order-detail/o-1";
const LIST: &str = "/v1/views/orders-by-customer/c-1";
/// What is known is what reads have shown.
const UNTOLD: &str = "read.refresh_interval = \"1h\"\nread.hints_silence_max = \"1h\"";

fn second(partition_count: u16) -> ProjectionDefinition {
    let domain = orders::domain().unwrap();
    let declared = domain.projection("orders", 1).unwrap();
    declared.instance(2, PartitionCount::new(partition_count).unwrap()).unwrap()
}

/// The region reads a second version from one moment to the next, and the first is gone.
async fn replace(world: &World, partition_count: u16, definition: i32) {
    let (first, second) = (second(1), second(partition_count));
    let mut transaction = world.projector.pool.begin().await.unwrap();
    let mut statements: Vec<String> =
        second.statements().create.iter().map(ToString::to_string).collect();
    for table in first.statements().tables() {
        let old = table.replace("_v2_", "_v1_");
        statements.push(format!("insert into \"{table}\" select * from \"{old}\""));
        statements.push(format!("drop table \"{old}\""));
    }
    statements.push(format!(
        "insert into checkpoint (projection, version, partition, epoch, position, event_id, fence)
         select 'orders', 2, n, 1, (select max(position) from checkpoint), gen_random_uuid(), 0
         from generate_series(0, {partition_count} - 1) as n"
    ));
    statements.push("delete from checkpoint where projection = 'orders' and version = 1".into());
    statements.push(
        "update projection_version set active = false, state = 'dropped'
         where projection = 'orders' and version = 1"
            .into(),
    );
    // The foreign key wants the version before its checkpoints.
    statements.insert(
        0,
        format!(
            "insert into projection_version
                 (projection, version, partition_count, active, definition)
             values ('orders', 2, {partition_count}, false, {definition})"
        ),
    );
    statements.push(
        "update projection_version set active = true where projection = 'orders' and version = 2"
            .into(),
    );
    for statement in statements {
        sqlx::query(AssertSqlSafe(statement)).execute(&mut *transaction).await.unwrap();
    }
    transaction.commit().await.unwrap();
}

#[tokio::test]
async fn a_version_that_is_gone_sends_its_readers_to_the_one_that_is_read() {
    for more in ["read.memory_bytes_max = 0", "read.memory_bytes_max = 0\nread.gather = false"] {
        let mut world = World::with(&format!("{UNTOLD}\n{more}")).await;
        world.stock().await;
        let token = world.place("o-1").await.token();
        world.catch_up().await;
        let before = world.region.read(ROW, &token, "wait;ms=5000").await;
        assert!(before.header("etag").starts_with("\"1-"), "{before:?}");
        assert_eq!(world.region.read(LIST, &token, "wait;ms=5000").await.status, 200);
        replace(&world, 5, 1).await;
        for path in [ROW, LIST] {
            let read = world.region.read(path, &token, "wait;ms=1").await;
            assert_eq!(read.came_to(), (200, "local"), "{read:?}");
        }
        let row = world.region.read(ROW, &token, "").await;
        assert!(row.header("etag").starts_with("\"2-"), "{row:?}");
        let list = world.region.read(LIST, "", "").await;
        assert_eq!(list.body["items"][0]["key"], "o-1", "{list:?}");
    }
}

#[tokio::test]
async fn a_version_that_is_behind_is_not_believed_though_the_one_before_was_current() {
    let mut world = World::with(UNTOLD).await;
    world.stock().await;
    world.place("o-1").await;
    let token =
        world.primary.command("CancelOrder", serde_json::json!({"order_id": "o-1"})).await.token();
    world.catch_up().await;
    world.catch_up_primary().await;
    assert_eq!(world.region.read(LIST, &token, "wait;ms=5000").await.status, 200);
    replace(&world, 8, 1).await;
    // Nobody is let past the gate like that; readers would be safe all the same.
    sqlx::query("update checkpoint set position = 1 where projection = 'orders' and version = 2")
        .execute(&world.projector.pool)
        .await
        .unwrap();
    let list = world.region.read(LIST, &token, "forward").await;
    assert_eq!(list.came_to(), (200, "forwarded"), "{list:?}");
    let refused = world.region.read(LIST, &token, "wait;ms=10").await;
    assert_eq!(refused.status, 503, "{refused:?}");
}

#[tokio::test]
async fn rules_that_a_gateway_lacks_are_read_elsewhere_and_said() {
    let mut world = World::with("read.memory_bytes_max = 0").await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    world.catch_up().await;
    replace(&world, 8, 9).await;
    let read = world.region.read(ROW, &token, "").await;
    assert_eq!(read.came_to(), (200, "forwarded"), "{read:?}");
    eventually("the gateway says what it lacks", async || {
        let said = world.region.readiness().await;
        said.status == 503 && said.text.contains("the rules of orders v2 are not in this binary")
    })
    .await;
}
