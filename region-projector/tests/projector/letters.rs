//! Dead letters: retried, discarded, and counted against a bound.

use consistency::{AggregateId, Name, Position};
use projection::{Domain, ProjectionDefinition};
use region_projector::dead_letters::{self, Actor, DeadLetterError, Retried};

use crate::tally::{domain, domain_with_totals, newer_domain};
use crate::world::{World, eventually, stop, tallies};

pub fn aggregate(id: &str) -> AggregateId {
    AggregateId::new(Name::new("tally").unwrap(), id).unwrap()
}

fn of<'a>(domain: &'a Domain, projection: &str) -> &'a ProjectionDefinition {
    domain.projection(projection, 1).unwrap()
}

pub async fn retry(world: &World, domain: &Domain, id: &str) -> Result<Retried, DeadLetterError> {
    let (definition, config) = (of(domain, "tallies"), world.config().apply);
    dead_letters::retry(&world.pool, definition, &aggregate(id), &config, &Actor::new("ada")).await
}

async fn discard(
    world: &World,
    projection: &str,
    id: &str,
    position: Position,
) -> Result<dead_letters::Discarded, DeadLetterError> {
    let (domain, config) = (domain_with_totals(), world.config().apply);
    let definition = of(&domain, projection);
    dead_letters::discard(
        &world.pool,
        definition,
        &aggregate(id),
        position,
        &config,
        &Actor::new("ada"),
    )
    .await
}

pub async fn parked(world: &World) -> Vec<(String, i64, String)> {
    sqlx::query_as("select aggregate_id, position, reason from parked order by aggregate_id")
        .fetch_all(&world.pool)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_retry_applies_the_letters_in_order_and_the_running_projector_goes_on() {
    let world = World::start().await;
    let mut config = world.config();
    // Noticed by the commit itself, not by the look at the checkpoints now and then.
    config.apply.verify_interval = process::config::Period::from_secs(3600);
    let projector = world.try_projector(config, domain()).await.unwrap();
    world.add("a", 1).await;
    world.add("a", 13).await;
    world.happen("a", "Moved", r#"{"to":"old"}"#).await;
    world.stored(world.add("a", 2).await).await;
    let listed = dead_letters::list(&world.pool, Some("tallies"), 10).await.unwrap();
    assert_eq!((listed[0].aggregate_id.as_str(), listed[0].letter_count), ("a", 3));
    let shown = dead_letters::show(&world.pool, &tallies(), &aggregate("a"), 10).await.unwrap();
    assert_eq!(shown.iter().map(|letter| letter.position).collect::<Vec<_>>(), [2, 3, 4]);

    let retried = retry(&world, &newer_domain(), "a").await.unwrap();
    assert_eq!((retried.applied_count, retried.stopped), (3, None));
    assert_eq!(world.tally("a").await, Some((16, 4)));
    assert_eq!(world.list("old").await, ["a"]);
    assert!(world.list("new").await.is_empty());
    assert_eq!(parked(&world).await, []);
    assert_eq!(world.count("select count(*) from dead_letter").await, 0);
    world.stored(world.add("a", 4).await).await;
    assert_eq!(world.tally("a").await, Some((20, 5)), "its memory of the parked is not used");
    let decisions = dead_letters::decisions(&world.pool, Some("tallies"), 10).await.unwrap();
    let decided = |decision: &dead_letters::Decision| {
        (
            decision.actor.clone(),
            decision.decision.clone(),
            decision.position,
            decision.letter_count,
        )
    };
    let expected = ("ada".to_owned(), "retry".to_owned(), Some(2), 3);
    assert_eq!(decisions.iter().map(decided).collect::<Vec<_>>(), [expected]);
    let again = retry(&world, &newer_domain(), "a").await;
    assert!(matches!(again, Err(DeadLetterError::NotParked { .. })), "{again:?}");
    stop(projector).await;
}

#[tokio::test]
async fn a_retry_stops_at_the_first_letter_that_fails_again() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.add("a", 13).await;
    world.add("a", 1).await;
    let unheard = world.happen("a", "Unheard", "{}").await;
    world.stored(world.add("a", 1).await).await;
    let stopped = retry(&world, &newer_domain(), "a").await.unwrap();
    assert_eq!(stopped.applied_count, 2);
    assert_eq!(stopped.stopped.unwrap().position, unheard);
    assert_eq!(world.tally("a").await, Some((14, 2)));
    let expected = [("a".to_owned(), unheard.as_i64(), "unknown-event-type".to_owned())];
    assert_eq!(parked(&world).await, expected);
    world.stored(world.add("a", 1).await).await;
    assert_eq!(world.tally("a").await, Some((14, 2)));
    let shown = dead_letters::show(&world.pool, &tallies(), &aggregate("a"), 10).await.unwrap();
    assert_eq!(shown.len(), 3, "later ones wait behind it");
    assert!(shown[0].error.contains("Unheard"), "{}", shown[0].error);
    stop(projector).await;
}

#[tokio::test]
async fn a_retry_finds_the_letter_whose_row_the_database_refuses() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.stored(world.add("a", 1).await).await;
    stop(projector).await;
    let check = "alter table tallies_v1_tally add constraint small
                 check ((data->>'sum')::bigint between 0 and 100)";
    sqlx::query(check).execute(&world.pool).await.unwrap();
    world.add("a", 2).await;
    let large = world.add("a", 1000).await;
    let last = world.add("a", 3).await;
    let projector = world.projector(domain()).await;
    world.stored(last).await;
    let stopped = retry(&world, &domain(), "a").await.unwrap().stopped.unwrap();
    assert_eq!((stopped.position, stopped.reason), (large, "constraint"));
    assert_eq!(world.tally("a").await, Some((3, 2)));
    let drop = "alter table tallies_v1_tally drop constraint small";
    sqlx::query(drop).execute(&world.pool).await.unwrap();
    let retried = retry(&world, &domain(), "a").await.unwrap();
    assert_eq!((retried.applied_count, retried.stopped), (2, None));
    assert_eq!(world.tally("a").await, Some((1006, 4)));
    stop(projector).await;
}

#[tokio::test]
async fn more_letters_than_a_page_are_retried_in_one_transaction() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.add("a", 13).await;
    for _ in 0..6 {
        world.add("a", 1).await;
    }
    let unheard = world.happen("a", "Unheard", "{}").await;
    world.stored(unheard).await;
    let mut config = world.config().apply;
    config.batch_events_max = 2;
    let newer = newer_domain();
    let retried = dead_letters::retry(
        &world.pool,
        of(&newer, "tallies"),
        &aggregate("a"),
        &config,
        &Actor::new("ada"),
    )
    .await;
    let retried = retried.unwrap();
    assert_eq!((retried.applied_count, retried.stopped.unwrap().position), (7, unheard));
    assert_eq!(world.tally("a").await, Some((19, 7)));
    stop(projector).await;
}

#[tokio::test]
async fn a_discarded_event_leaves_no_gap_behind() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.add("a", 1).await;
    let poison = world.add("a", 13).await;
    let later = world.add("a", 5).await;
    world.stored(later).await;
    let wrong = discard(&world, "tallies", "a", later).await;
    assert!(matches!(wrong, Err(DeadLetterError::NotFirst { first, .. }) if first == poison));

    let discarded = discard(&world, "tallies", "a", poison).await.unwrap();
    assert_eq!(discarded.parked_at, Some(later));
    assert_eq!(discarded.letter.data, r#"{"n":13}"#);
    let decided = dead_letters::decisions(&world.pool, None, 1).await.unwrap().remove(0);
    assert_eq!((decided.actor.as_str(), decided.decision.as_str()), ("ada", "discard"));
    assert_eq!(decided.stopped_by.as_deref(), Some("waiting"));
    assert_eq!(decided.data.as_deref(), Some(r#"{"n":13}"#), "what was given up is not lost");
    assert_eq!(world.tally("a").await, Some((1, 2)), "counted as read, not folded");
    let row = "select position from tallies_v1_tally where aggregate_id = 'a'";
    assert_eq!(world.count(row).await, poison.as_i64());
    assert_eq!(parked(&world).await, [("a".to_owned(), later.as_i64(), "waiting".to_owned())]);
    let retried = retry(&world, &domain(), "a").await.unwrap();
    assert_eq!((retried.applied_count, retried.stopped), (1, None));
    world.stored(world.add("a", 1).await).await;
    assert_eq!(world.tally("a").await, Some((7, 4)));

    // Of an aggregate that never had a state.
    let first = world.add("b", 13).await;
    world.stored(first).await;
    let discarded = discard(&world, "tallies", "b", first).await.unwrap();
    assert_eq!(discarded.parked_at, None);
    assert_eq!(world.tally("b").await, None);
    world.stored(world.add("b", 2).await).await;
    assert_eq!(world.tally("b").await, Some((2, 2)));
    stop(projector).await;
}

#[tokio::test]
async fn a_rollup_goes_on_past_a_discarded_event() {
    let world = World::start().await;
    let projector = world.projector(domain_with_totals()).await;
    world.add("a", 1).await;
    let poison = world.add("a", 13).await;
    let later = world.add("a", 5).await;
    world.stored(later).await;
    let parked = "select count(*) from parked where projection = 'totals'";
    eventually("thirteen is parked", async || world.count(parked).await == 1).await;
    let letters = "select count(*) from dead_letter where projection = 'totals'";
    eventually("its letters are there", async || world.count(letters).await == 2).await;
    discard(&world, "totals", "a", poison).await.unwrap();
    let (domain, config) = (domain_with_totals(), world.config().apply);
    let totals = of(&domain, "totals");
    let retried =
        dead_letters::retry(&world.pool, totals, &aggregate("a"), &config, &Actor::new("ada"))
            .await;
    assert_eq!(retried.unwrap().stopped, None);
    assert_eq!(world.count("select sum(total)::bigint from totals_v1_total").await, 6);
    world.add("a", 4).await;
    let total = "select sum(total)::bigint from totals_v1_total";
    eventually("the next is no gap", async || world.count(total).await == 10).await;
    stop(projector).await;
}

#[tokio::test]
async fn a_sum_that_overflows_loses_nothing_of_an_aggregate_that_is_poison_as_well() {
    let world = World::start().await;
    world.add("a", i64::MAX).await;
    let second = world.add("a", 1).await;
    world.add("a", 13).await;
    // All of it is there at once, so that it is most likely one batch.
    let projector = world.projector(domain_with_totals()).await;
    eventually("the tables are there", async || projector.readiness().is_ready()).await;
    let accounted_for = "select (select coalesce(sum(version), 0)::bigint from totals_v1_state)
                             + (select count(*) from dead_letter where projection = 'totals')";
    eventually("every event is somewhere", async || world.count(accounted_for).await == 3).await;
    let (domain, config) = (domain_with_totals(), world.config().apply);
    let totals = of(&domain, "totals");
    let retried =
        dead_letters::retry(&world.pool, totals, &aggregate("a"), &config, &Actor::new("ada"))
            .await
            .unwrap();
    assert_eq!(retried.stopped.unwrap().position, second);
    let total = "select sum(total)::bigint from totals_v1_total";
    assert_eq!(world.count(total).await, i64::MAX);
    stop(projector).await;
}

#[tokio::test]
async fn a_retry_whose_sum_overflows_stops_at_the_event_that_is_too_much() {
    let world = World::start().await;
    let projector = world.projector(domain_with_totals()).await;
    eventually("the tables are there", async || projector.readiness().is_ready()).await;
    let first = world.add("a", 13).await;
    world.add("a", i64::MAX).await;
    let too_much = world.add("a", 1).await;
    world.add("a", 13).await;
    let letters = "select count(*) from dead_letter where projection = 'totals'";
    eventually("all of them wait", async || world.count(letters).await == 4).await;
    discard(&world, "totals", "a", first).await.unwrap();
    // What comes after the sum that is too large is poison as well.
    let (domain, config) = (domain_with_totals(), world.config().apply);
    let totals = of(&domain, "totals");
    let retried =
        dead_letters::retry(&world.pool, totals, &aggregate("a"), &config, &Actor::new("ada"))
            .await
            .unwrap();
    assert_eq!((retried.applied_count, retried.stopped.unwrap().position), (1, too_much));
    let total = "select sum(total)::bigint from totals_v1_total";
    assert_eq!(world.count(total).await, i64::MAX);
    stop(projector).await;
}

#[tokio::test]
async fn what_another_holder_parks_at_the_last_moment_is_seen() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.stored(world.add("a", 1).await).await;
    // A database that failed over to an older copy may have handed the same fence out again: then there is
    // another who moves the same checkpoints, and only the place that they stand at tells.
    let mut transaction = world.pool.begin().await.unwrap();
    sqlx::query("select 1 from checkpoint for update").execute(&mut *transaction).await.unwrap();
    let event = world.log.append("a", "Added", r#"{"n":1}"#);
    let at = event.at.position;
    world.publish(&event).await;
    let waiting = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'
                       and application_name = 'region-projector' and query like '%committed_at%'";
    eventually("all partitions wait", async || world.count(waiting).await == 4).await;
    sqlx::query(
        "insert into parked values ('tallies', 1, 'tally', 'a', $1, 1, $2, 'fold', default)",
    )
    .bind(i32::from(consistency::PartitionCount::new(4).unwrap().partition_of("a")))
    .bind(at.as_i64())
    .execute(&mut *transaction)
    .await
    .unwrap();
    sqlx::query("update checkpoint set position = $1, event_id = $2")
        .bind(at.as_i64())
        .bind(event.id.get())
        .execute(&mut *transaction)
        .await
        .unwrap();
    transaction.commit().await.unwrap();
    // Ours applies nothing of what it had read before.
    world.stored(world.add("a", 1).await).await;
    assert_eq!(world.tally("a").await, Some((1, 1)));
    assert_eq!(world.count("select count(*) from dead_letter").await, 1);
    stop(projector).await;
}

/// The `breaker` condition of a projector.
fn is_stopped(projector: &region_projector::Projector) -> bool {
    let conditions = projector.readiness().report(None).conditions;
    matches!(conditions.get("breaker"), Some(process::admin::Condition::NotReady(_)))
}

#[tokio::test]
async fn a_projection_stops_before_more_than_the_bound_is_parked() {
    let world = World::start().await;
    let mut config = world.config();
    config.apply.parked_aggregates_max = 2;
    let projector = world.try_projector(config.clone(), domain_with_totals()).await.unwrap();
    for id in ["a", "b"] {
        world.stored(world.add(id, 13).await).await;
    }
    // Another reason has a bound of its own.
    world.stored(world.happen("c", "Unheard", "{}").await).await;
    assert!(!is_stopped(&projector));
    let third = world.add("d", 13).await;
    let last = world.add("e", 1).await;
    eventually("it stops", async || is_stopped(&projector)).await;
    let tripped = "select count(*) from parking_breaker where accepted_count < parked_count";
    eventually("it says so to operators", async || world.count(tripped).await == 2).await;
    assert!(world.lowest_checkpoint().await.unwrap() < third);
    let fold = "select count(*) from parked where projection = 'tallies' and reason = 'fold'";
    assert_eq!(world.count(fold).await, 2, "nothing of the batch is committed");
    let text = projector.metrics().render();
    let stopped = |text: &str, value: &str| {
        text.lines().any(|line| {
            line.starts_with("tidemark_projection_stopped")
                && line.contains(r#"projection="tallies""#)
                && line.ends_with(value)
        })
    };
    assert!(stopped(&text, " 1"), "{text}");

    let resumed = region_projector::pause::resume(&world.pool, Some("tallies")).await.unwrap();
    assert_eq!((resumed[0].reason.as_str(), resumed[0].accepted_count), ("fold", Some(3)));
    world.stored(last).await;
    assert_eq!(world.count(fold).await, 3);
    assert_eq!(world.tally("e").await, Some((1, 1)));
    assert!(is_stopped(&projector), "the other projection was not resumed");
    assert!(stopped(&projector.metrics().render(), " 0"));
    stop(projector).await;

    // The one that was not resumed goes on with a higher bound.
    config.apply.parked_aggregates_max = 3;
    let projector = world.try_projector(config, domain_with_totals()).await.unwrap();
    let total = "select coalesce(sum(total), 0)::bigint from totals_v1_total";
    eventually("the rest is counted", async || world.count(total).await == 1).await;
    assert!(!is_stopped(&projector));
    stop(projector).await;
}
