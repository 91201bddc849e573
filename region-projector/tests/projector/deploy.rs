//! Releases beside each other: what an older projector does not know, and what a newer one leaves behind.

use process::admin::Condition;
use process::config::Period;
use region_projector::ProjectorConfig;

use crate::letters::{aggregate, parked, retry};
use crate::tally::{domain, newer_domain};
use crate::world::{World, eventually, stop};

#[tokio::test]
async fn a_newer_binary_applies_at_its_start_what_an_older_one_did_not_know() {
    let world = World::start().await;
    let projector = world.projector(domain()).await;
    world.add("a", 3).await;
    world.happen("a", "Doubled", "{}").await;
    world.add("a", 1).await;
    let poison = world.add("b", 13).await;
    let mut newer = world.log.append("c", "Added", r#"{"n":5,"times":2}"#);
    newer.schema_version = consistency::SchemaVersion::new(2).unwrap();
    world.publish(&newer).await;
    world.stored(newer.at.position).await;
    let reasons: Vec<_> = parked(&world).await.into_iter().map(|(_, _, reason)| reason).collect();
    assert_eq!(reasons, ["unknown-event-type", "fold", "unknown-schema-version"]);
    stop(projector).await;
    // The same binary again knows no more.
    let projector = world.projector(domain()).await;
    world.stored(world.add("z", 1).await).await;
    assert_eq!(parked(&world).await.len(), 3);
    stop(projector).await;

    let mut announcements = world.announcements().await;
    let projector = world.projector(newer_domain()).await;
    let key = aggregate("a").key().hint();
    announcements.find(|said| said.keys.as_ref().is_some_and(|keys| keys.contains(&key))).await;
    eventually("both are applied", async || parked(&world).await.len() == 1).await;
    assert_eq!(world.tally("a").await, Some((7, 3)));
    assert_eq!(world.tally("c").await, Some((10, 1)));
    let left = [("b".to_owned(), poison.as_i64(), "fold".to_owned())];
    assert_eq!(parked(&world).await, left, "thirteen was no lack of knowledge");
    world.stored(world.add("a", 1).await).await;
    assert_eq!(world.tally("a").await, Some((8, 4)));
    stop(projector).await;
}

impl World {
    /// With a lease that never runs out, and looks at letters this often.
    pub fn looking(&self, name: &str, every: Period) -> ProjectorConfig {
        let mut config = self.config();
        config.sharing.name = Some(name.to_owned());
        config.sharing.lease = Period::from_secs(600);
        config.apply.letters_look_interval = every;
        config.apply.idle_store_interval = Period::from_millis(50);
        config
    }

    /// An aggregate of every partition that a process holds.
    async fn held_by(&self, name: &str) -> Vec<String> {
        let held = "select partition from partition_lease join projector_process using (process)
                    where projection = 'tallies' and name = $1";
        // The table is not there before the first projector has made it.
        let held = sqlx::query_scalar(held).bind(name).fetch_all(&self.pool).await;
        let held: Vec<i32> = held.unwrap_or_default();
        one_of_each()
            .into_iter()
            .enumerate()
            .filter(|(of, _)| held.contains(&(*of as i32)))
            .map(|(_, id)| id)
            .collect()
    }

    pub async fn shares_are(&self, name: &str, count: usize) {
        eventually(&format!("{name} holds {count}"), async || {
            self.held_by(name).await.len() == count
        })
        .await;
    }

    /// Retries by a projector of its own accord.
    async fn retries(&self) -> i64 {
        self.count("select count(*) from letter_decision where actor like 'region-projector%'")
            .await
    }
}

/// One aggregate of each of the four partitions.
pub fn one_of_each() -> Vec<String> {
    let count = consistency::PartitionCount::new(4).unwrap();
    let ids = |of| (0..).map(|n| format!("t-{n}")).find(|id| count.partition_of(id) == of).unwrap();
    (0..4).map(ids).collect()
}

async fn ids_parked(world: &World) -> Vec<String> {
    let mut ids: Vec<String> = parked(world).await.into_iter().map(|(id, ..)| id).collect();
    ids.sort_unstable();
    ids
}

fn sorted(mut ids: Vec<String>) -> Vec<String> {
    ids.sort_unstable();
    ids
}

/// Fences tell how often partitions were taken over.
async fn takeovers(world: &World) -> i64 {
    world.count("select sum(fence)::bigint from checkpoint").await
}

#[tokio::test]
async fn a_newer_projector_applies_what_an_older_one_beside_it_parked_and_leaves_it_its_own() {
    let world = World::start().await;
    let hour = Period::from_secs(3600);
    let looks = Period::from_millis(50);
    let old = world.try_projector(world.looking("old", looks), domain()).await.unwrap();
    world.shares_are("old", 4).await;
    for id in one_of_each() {
        world.add(&id, 3).await;
        world.stored(world.happen(&id, "Doubled", "{}").await).await;
    }
    assert_eq!(ids_parked(&world).await, sorted(one_of_each()));

    // It applies what is in the partitions that it takes over, at once.
    let new = world.try_projector(world.looking("new", hour), newer_domain()).await.unwrap();
    world.shares_are("new", 2).await;
    let (olds, news) = (world.held_by("old").await, world.held_by("new").await);
    eventually("the letters of its share are applied", async || {
        ids_parked(&world).await == sorted(olds.clone())
    })
    .await;
    for id in &news {
        assert_eq!(world.tally(id).await, Some((6, 2)));
    }

    // An operator with the newer binary un-parks one of the older process's. It parks that again when
    // such an event comes again, and nobody quarrels with it.
    let theirs = olds[0].as_str();
    assert_eq!(retry(&world, &newer_domain(), theirs).await.unwrap().stopped, None);
    world.stored(world.add(theirs, 1).await).await;
    assert_eq!(world.tally(theirs).await, Some((7, 3)), "the older process goes on with it");
    let (retries, taken) = (world.retries().await, takeovers(&world).await);
    for id in one_of_each() {
        world.stored(world.happen(&id, "Doubled", "{}").await).await;
    }
    // More looks than it takes to start a quarrel.
    for _ in 0..20 {
        world.stored(world.add(&news[0], 1).await).await;
    }
    assert_eq!(ids_parked(&world).await, sorted(olds.clone()));
    assert_eq!(world.tally(theirs).await, Some((7, 3)));
    assert_eq!((world.retries().await, takeovers(&world).await), (retries, taken), "all is quiet");

    stop(old).await;
    world.shares_are("new", 4).await;
    eventually("nothing is parked", async || ids_parked(&world).await.is_empty()).await;
    assert_eq!(world.tally(theirs).await, Some((14, 4)));
    assert_eq!(world.tally(&olds[1]).await, Some((12, 3)));
    assert_eq!(world.tally(&news[1]).await, Some((12, 3)));
    assert_eq!(world.tally(&news[0]).await, Some((32, 23)));
    assert_eq!(world.count("select count(*) from dead_letter").await, 0);
    stop(new).await;
}

#[tokio::test]
async fn what_an_older_projector_parks_is_applied_at_the_next_look_of_a_newer_one_beside_it() {
    let world = World::start().await;
    let hour = Period::from_secs(3600);
    let old = world.try_projector(world.looking("old", hour), domain()).await.unwrap();
    world.shares_are("old", 4).await;
    let looks = Period::from_millis(200);
    let new = world.try_projector(world.looking("new", looks), newer_domain()).await.unwrap();
    world.shares_are("new", 2).await;
    let theirs = world.held_by("old").await.remove(0);
    world.add(&theirs, 3).await;
    for round in 1..=3_i64 {
        // It is the older one that reads it, and it cannot.
        world.stored(world.happen(&theirs, "Doubled", "{}").await).await;
        eventually("it is applied", async || world.retries().await == round).await;
        assert_eq!(ids_parked(&world).await, [""; 0]);
        world.stored(world.add(&theirs, 1).await).await;
        assert_eq!(world.tally(&theirs).await.unwrap().1, 1 + 2 * round, "it goes on");
    }
    assert_eq!(world.tally(&theirs).await, Some((31, 7)));
    let taken = takeovers(&world).await;
    for _ in 0..10 {
        world.stored(world.add(&theirs, 1).await).await;
    }
    assert_eq!((world.retries().await, takeovers(&world).await), (3, taken), "all is quiet");
    stop(old).await;
    stop(new).await;
}

/// What a later release adds to the schema is not in the way of this one.
#[tokio::test]
async fn a_projector_works_on_the_schema_of_a_later_release() {
    let world = World::start().await;
    let before = world.projector(domain()).await;
    world.stored(world.add("a", 1).await).await;
    stop(before).await;
    let tables = "select table_name::text from information_schema.tables
                  where table_schema = 'public' and table_type = 'BASE TABLE'
                      and table_name <> '_sqlx_migrations'";
    let tables: Vec<String> = sqlx::query_scalar(tables).fetch_all(&world.pool).await.unwrap();
    assert!(tables.len() > 10, "{tables:?}");
    for table in tables {
        // Where nobody writes it, and where everybody has to live with a default.
        let add = format!(
            "alter table \"{table}\" add later text, add later_still integer not null default 7"
        );
        sqlx::query(sqlx::AssertSqlSafe(add)).execute(&world.pool).await.unwrap();
    }
    sqlx::raw_sql(
        "create table later (id bigint primary key);
         insert into _sqlx_migrations (version, description, success, checksum, execution_time)
         values (99999999999999, 'a later release', true, 'x', 1)",
    )
    .execute(&world.pool)
    .await
    .unwrap();

    let projector = world.projector(domain()).await;
    world.add("a", 2).await;
    world.add("b", 13).await;
    world.stored(world.happen("a", "Moved", r#"{"to":"old"}"#).await).await;
    assert_eq!((world.tally("a").await, world.list("old").await), (Some((3, 3)), vec!["a".into()]));
    assert_eq!(ids_parked(&world).await, ["b"]);
    assert_eq!(retry(&world, &newer_domain(), "b").await.unwrap().stopped, None);
    region_projector::pause::pause(&world.pool, "tallies").await.unwrap();
    let last = world.add("b", 1).await;
    eventually("it is paused", async || {
        let conditions = projector.readiness().report(None).conditions;
        conditions.get("paused").is_some_and(|paused| *paused != Condition::Ready)
    })
    .await;
    region_projector::pause::resume(&world.pool, Some("tallies")).await.unwrap();
    world.stored(last).await;
    assert_eq!(world.tally("b").await, Some((14, 2)));
    stop(projector).await;
}
