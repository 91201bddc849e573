//! Rows that the database refuses, and sums that leave their bounds: what is parked does not depend on
//! what happened to be applied together.

use consistency::PartitionCount;

use crate::tally::{domain, domain_with_totals};
use crate::world::{World, eventually, stop};

async fn parked(world: &World, projection: &str) -> Vec<(String, i64)> {
    let parked =
        "select aggregate_id, position from parked where projection = $1 order by position";
    sqlx::query_as(parked).bind(projection).fetch_all(&world.pool).await.unwrap()
}

#[tokio::test]
async fn a_refused_row_parks_the_event_that_makes_it_however_events_are_batched() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.stored(world.add("z", 1).await).await;
    let check = "alter table tallies_v1_tally add constraint small
                 check ((data->>'sum')::bigint between 0 and 100)";
    sqlx::query(check).execute(&world.pool).await.unwrap();
    // One by one.
    for n in [2, 3] {
        world.stored(world.add("a", n).await).await;
    }
    let alone = world.add("a", 1000).await;
    world.stored(world.add("a", 4).await).await;
    assert_eq!(parked(&world, "tallies").await, [("a".to_owned(), alone.as_i64())]);
    assert_eq!(world.tally("a").await, Some((5, 2)));
    stop(projector).await;
    // All at once.
    world.add("b", 2).await;
    world.add("b", 3).await;
    let together = world.add("b", 1000).await;
    let last = world.add("b", 4).await;
    let projector = world.projector(domain()).await;
    world.stored(last).await;
    let expected = [("a".to_owned(), alone.as_i64()), ("b".to_owned(), together.as_i64())];
    assert_eq!(parked(&world, "tallies").await, expected);
    assert_eq!(world.tally("b").await, Some((5, 2)), "what came before is applied");
    stop(projector).await;
}

#[tokio::test]
async fn a_sum_that_overflows_parks_the_one_event_and_no_bystander() {
    let world = World::start().await;
    let partition = |id: &str| PartitionCount::new(8).unwrap().partition_of(id);
    let beside = (0..).map(|n| format!("b{n}")).find(|id| partition(id) == partition("a")).unwrap();
    world.add("a", i64::MAX).await;
    world.add(&beside, -7).await;
    world.add("a", 3).await;
    let too_large = world.add("a", 500).await;
    world.add(&beside, -1).await;
    // All of it is there at once, so that it is most likely one batch.
    let projector = world.projector(domain_with_totals()).await;
    eventually("the tables are there", async || projector.readiness().is_ready()).await;
    let accounted_for = "select (select coalesce(sum(version), 0)::bigint from totals_v1_state)
                             + (select count(*) from dead_letter where projection = 'totals')";
    eventually("every event is somewhere", async || world.count(accounted_for).await == 5).await;
    assert_eq!(parked(&world, "totals").await, [("a".to_owned(), too_large.as_i64())]);
    let total = "select total from totals_v1_total";
    assert_eq!(world.count(total).await, i64::MAX - 7 + 3 - 1);
    stop(projector).await;
}
