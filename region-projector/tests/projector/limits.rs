//! What one transaction holds, what is folded before it, and what one projection takes from another.

use consistency::Position;
use process::config::Period;
use region_projector::Projector;
use region_projector::config::LimitsConfig;

use crate::tally::{domain, domain_with_totals};
use crate::world::{WAITING, World, eventually, stop};

/// The value of a metric of the projection `tallies`, over all its labels.
fn metric(projector: &Projector, name: &str) -> f64 {
    let text = projector.metrics().render();
    let lines = text
        .lines()
        .filter(|line| line.starts_with(name) && line.contains(r#"projection="tallies""#));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Adds one to each of ten tallies, again and again.
async fn backlog(world: &World, rounds: usize) -> Position {
    let mut last = Position::ZERO;
    for _ in 0..rounds {
        for n in 0..10 {
            last = world.add(&format!("t-{n}"), 1).await;
        }
    }
    last
}

/// Fails a statement that writes more than three states.
const AT_MOST_THREE_STATES: &str = "
    create function at_most_three() returns trigger language plpgsql as $$
    begin
        if (select count(*) from written) > 3 then
            raise exception 'canceling statement' using errcode = '57014';
        end if;
        return null;
    end $$;
    create trigger at_most_three after insert on tallies_v1_state
    referencing new table as written for each statement execute function at_most_three();
";

#[tokio::test]
async fn a_projection_takes_no_more_events_at_once_than_it_may() {
    let world = World::start().await;
    stop(ready(&world).await).await;
    sqlx::raw_sql(AT_MOST_THREE_STATES).execute(&world.pool).await.unwrap();
    let mut last = Position::ZERO;
    for n in 0..200 {
        last = world.add(&format!("t-{n}"), 1).await;
    }
    let mut config = world.config();
    let limits = LimitsConfig { batch_events_max: Some(3), ..LimitsConfig::default() };
    config.projection.insert("tallies".to_owned(), limits);
    let projector = world.try_projector(config, domain()).await.unwrap();
    world.stored(last).await;
    assert_eq!(world.count("select count(*) from tallies_v1_tally").await, 201);
    assert_eq!(metric(&projector, "tidemark_projection_retries"), 0.0, "none was too large");
    stop(projector).await;
}

#[tokio::test]
async fn limits_of_a_projection_that_is_not_there_are_a_mistake() {
    let world = World::start().await;
    let mut config = world.config();
    config.projection.insert("tallys".to_owned(), LimitsConfig::default());
    let error = world.try_projector(config, domain()).await.err().expect("it does not start");
    assert!(error.to_string().contains("tallys"), "{error}");
}

/// In batches that are written with one statement, and in larger ones.
#[tokio::test]
async fn a_backlog_is_folded_ahead_and_applied_once() {
    for (rounds, events_max) in [(60, 10), (600, 150)] {
        let world = World::start().await;
        let mut config = world.config();
        config.apply.batch_events_max = events_max;
        config.database.statement_timeout = Period::from_secs(3600);
        let projector = world.try_projector(config, domain()).await.unwrap();
        world.stored(world.add("t-0", 0).await).await;
        // Something is always there when the next one is written, however long that takes to be there.
        let lock = world.hold("lock table tallies_v1_state").await;
        let last = backlog(&world, rounds).await;
        eventually("a batch waits", async || world.count(WAITING).await > 0).await;
        lock.rollback().await.unwrap();
        world.stored(last).await;
        let count = i64::try_from(rounds).unwrap();
        for n in 1..10 {
            assert_eq!(world.tally(&format!("t-{n}")).await, Some((count, count)));
        }
        assert_eq!(world.tally("t-0").await, Some((count, count + 1)));
        assert!(metric(&projector, "tidemark_projection_folded_ahead") > 0.0);
        stop(projector).await;
    }
}

#[tokio::test]
async fn what_was_folded_ahead_is_thrown_away_when_what_it_rests_on_fails() {
    let world = World::start().await;
    stop(ready(&world).await).await;
    // Half of the commits of one tally fail, and another is refused from its thirtieth event on.
    let failing = "
        create sequence attempts;
        create function every_other() returns trigger language plpgsql as $$
        begin
            if nextval('attempts') % 2 = 0 then
                raise exception 'again' using errcode = '40001';
            end if;
            return null;
        end $$;
        create constraint trigger every_other after insert or update on tallies_v1_tally
        deferrable initially deferred for each row when (new.aggregate_id = 't-1')
        execute function every_other();
        alter table tallies_v1_tally
            add check (aggregate_id <> 't-3' or (data->>'sum')::bigint < 30);";
    sqlx::raw_sql(failing).execute(&world.pool).await.unwrap();
    let last = backlog(&world, 60).await;
    let mut config = world.config();
    config.apply.batch_events_max = 10;
    config.apply.retry_pause_max = Period::from_millis(50);
    let projector = world.try_projector(config, domain()).await.unwrap();
    world.stored(last).await;
    for n in 0..10 {
        let expected = if n == 3 { 29 } else { 60 };
        assert_eq!(world.tally(&format!("t-{n}")).await, Some((expected, expected)), "t-{n}");
    }
    let letters = "select count(*) from dead_letter where aggregate_id = 't-3'";
    assert_eq!(world.count(letters).await, 31);
    assert!(metric(&projector, "tidemark_projection_retries") > 0.0);
    assert!(metric(&projector, "tidemark_projection_folded_ahead") > 0.0);
    stop(projector).await;
}

#[tokio::test]
async fn a_projection_that_is_stuck_does_not_hold_up_another() {
    let world = World::start().await;
    let mut config = world.config();
    // For what they share: less than the partitions that are stuck.
    config.database.connections_max = 2;
    config.database.statement_timeout = Period::from_secs(3600);
    let projector = world.try_projector(config, domain_with_totals()).await.unwrap();
    world.stored(world.add("a", 1).await).await;
    let lock = world.hold("lock table tallies_v1_state").await;
    let before = world.lowest_checkpoint().await;
    let last = backlog(&world, 5).await;
    let totals = "select min(position) from checkpoint where projection = 'totals'";
    eventually("the other one is current", async || world.count(totals).await == last.as_i64())
        .await;
    assert!(
        before <= world.lowest_checkpoint().await && world.lowest_checkpoint().await < Some(last)
    );
    assert!(metric(&projector, "tidemark_projection_checkpoint") < 4.0 * last.as_i64() as f64);
    lock.rollback().await.unwrap();
    world.stored(last).await;
    stop(projector).await;
}

/// With its tables made.
async fn ready(world: &World) -> Projector {
    let projector = world.projector(domain()).await;
    world.stored(world.add("z", 1).await).await;
    projector
}
