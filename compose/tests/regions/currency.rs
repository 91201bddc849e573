//! Lists that nothing happens to, and a region whose database goes back.

use std::time::Duration;

use compose::local::REGION_DATABASE;
use sqlx::PgPool;
use tokio::time::Instant;

use crate::stack::{EUROPE, PATIENCE, add_item, assert_local, caller, place, settled, start};

/// Writes of every partition of a projection, counted by the database itself.
const COUNT_WRITES: &str = "
    create table checkpoint_write (projection text, partition integer);
    create function count_checkpoint_write() returns trigger language plpgsql as $$
        begin
            insert into checkpoint_write values (new.projection, new.partition);
            return new;
        end $$;
    create trigger count_checkpoint_write after update of position on checkpoint for each row
        when (old.position is distinct from new.position)
        execute function count_checkpoint_write()";

#[tokio::test]
async fn a_list_is_current_with_no_event_in_seven_of_its_eight_partitions() {
    let stack = start().await;
    let mut europe = caller(&stack, EUROPE);
    let path = place(&mut europe, "o-lone").await;
    assert_local(&settled(&mut europe, &path, PATIENCE).await, 1);
    let url = stack.region(EUROPE).unwrap().postgres.url(REGION_DATABASE);
    let pool = PgPool::connect(&url).await.unwrap();
    sqlx::raw_sql(COUNT_WRITES).execute(&pool).await.unwrap();
    let began = Instant::now();
    let list = "/v1/views/orders-by-customer/customer-of-o-lone";
    const ROUNDS: i64 = 20;
    for round in 0..ROUNDS {
        add_item(&mut europe, "o-lone").await;
        // All partitions matter to a list, and only one of them had an event.
        let read = europe.get(list, "wait;ms=10000").await.unwrap();
        assert_eq!(read.status, 200, "{read:?}");
        assert!(["local", "waited"].contains(&read.word()), "{read:?}");
        let items = read.body["items"].as_array().unwrap();
        assert_eq!((items.len(), items[0]["version"].as_i64()), (1, Some(round + 2)), "{read:?}");
    }
    let writes = "select partition, count(*) from checkpoint_write where projection = 'orders'
                  group by partition order by count(*)";
    let mut writes: Vec<(i32, i64)> = sqlx::query_as(writes).fetch_all(&pool).await.unwrap();
    // After the writes were counted, so that it is not too short.
    let seconds = began.elapsed().as_secs_f64();
    let (busy, count) = writes.pop().unwrap();
    assert!(ROUNDS <= count, "partition {busy} commits every event: {count} writes");
    // One write may fall on either end of every second.
    let bound = seconds.ceil() as i64 + 1;
    for (partition, count) in writes {
        assert!(count <= bound, "idle partition {partition}: {count} writes in {seconds} s");
    }
    stack.stop().await.unwrap();
}

#[tokio::test]
async fn a_region_whose_database_fails_over_to_an_older_copy_serves_nothing_it_cannot_prove() {
    let mut stack = start().await;
    let mut europe = caller(&stack, EUROPE);
    let path = place(&mut europe, "o-back").await;
    assert_local(&settled(&mut europe, &path, PATIENCE).await, 1);
    let list = "/v1/views/orders-by-customer/customer-of-o-back";
    let http = reqwest::Client::new();
    let region = stack.region_mut(EUROPE).unwrap();
    let older = region.postgres.copy_data().await.unwrap();
    region.gateway.wait_until_ready(&http, PATIENCE).await.unwrap();
    region.projector.wait_until_ready(&http, PATIENCE).await.unwrap();
    add_item(&mut europe, "o-back").await;
    assert_local(&settled(&mut europe, &path, PATIENCE).await, 2);
    assert_eq!(settled(&mut europe, list, PATIENCE).await.status, 200);

    // Nobody is there to notice but the gateway, whose memory says that all is current. The row that it
    // still has in memory is as new as what was written, and may be shown; the database's is not.
    region.projector.kill().await;
    region.postgres.restore(&older).await.unwrap();
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        let row = europe.get(&path, "wait;ms=100, pending").await.unwrap();
        let is_proven = row.status == 200 && row.version() == Some(2);
        // 202 once the database answers, 503 before.
        assert!(is_proven || [202, 503].contains(&row.status.as_u16()), "{row:?}");
        let page = europe.get(list, "wait;ms=100, pending").await.unwrap();
        assert!([202, 503].contains(&page.status.as_u16()), "{page:?}");
    }
    let stale = europe.get(list, "eventual").await.unwrap();
    assert_eq!((stale.status.as_u16(), stale.word()), (200, "stale"), "{stale:?}");
    assert_eq!(stale.body["items"][0]["version"], 1, "{stale:?}");
    let forwarded = europe.get(&path, "forward").await.unwrap();
    assert_eq!((forwarded.status.as_u16(), forwarded.version()), (200, Some(2)), "{forwarded:?}");
    region.projector.start_again().unwrap();
    assert_local(&settled(&mut europe, &path, PATIENCE).await, 2);

    // A projector that runs on notices by itself, and resumes from the checkpoints that are there.
    add_item(&mut europe, "o-back").await;
    assert_local(&settled(&mut europe, &path, PATIENCE).await, 3);
    region.postgres.restore(&older).await.unwrap();
    let end = Instant::now() + PATIENCE;
    loop {
        let read = europe.get(&path, "wait;ms=500, pending").await.unwrap();
        match read.status.as_u16() {
            200 => break assert_local(&read, 3),
            202 | 503 => assert!(Instant::now() < end, "{read:?}"),
            _ => panic!("{read:?}"),
        }
    }
    let read = settled(&mut europe, list, PATIENCE).await;
    assert_eq!(read.body["items"][0]["version"], 3, "{read:?}");
    stack.stop().await.unwrap();
}
