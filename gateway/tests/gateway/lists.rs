//! Reads of lists: pages, cursors, and what they show.

use consistency::Position;

use crate::world::{World, position};

const LIST: &str = "/v1/views/orders-by-customer/c-1";

#[tokio::test]
async fn a_list_is_read_page_by_page_in_the_order_of_creation() {
    let mut world = World::start().await;
    world.stock().await;
    let ids = ["o-5", "o-3", "o-4", "o-1", "o-2"];
    for id in ids {
        world.place(id).await;
    }
    let head = world.catch_up().await;
    let mut path = format!("{LIST}?limit=2");
    let mut seen = Vec::new();
    let token = world.region.token_at(head.get());
    loop {
        let page = world.region.read(&path, &token, "wait;ms=5000").await;
        assert_eq!(page.status, 200, "{page:?}");
        assert_eq!(world.region.open(&page.token()).read_position(), head);
        let items = page.body["items"].as_array().unwrap();
        seen.extend(items.iter().map(|item| item["key"].as_str().unwrap().to_owned()));
        let Some(cursor) = page.body["next_cursor"].as_str() else { break };
        assert_eq!(items.len(), 2);
        path = format!("{LIST}?limit=2&cursor={cursor}");
    }
    assert_eq!(seen, ids);
}

#[tokio::test]
async fn a_list_shows_the_largest_checkpoint_and_waits_for_the_smallest() {
    let mut world = World::start().await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    world.catch_up().await;
    assert_eq!(world.region.read(LIST, &token, "wait;ms=5000").await.status, 200);
    let ahead = "update checkpoint set position = 9 where partition = 3";
    sqlx::query(ahead).execute(&world.projector.pool).await.unwrap();
    let read = world.region.read(LIST, "", "").await;
    assert_eq!(world.region.open(&read.token()).read_position(), position(9));
    let read = world.region.read(LIST, &read.token(), "wait;ms=10").await;
    assert_eq!(read.came_to(), (503, "replication-pending"));
}

#[tokio::test]
async fn a_cursor_carries_what_its_page_showed_even_without_a_token() {
    let mut world = World::start().await;
    world.stock().await;
    for id in ["o-1", "o-2"] {
        world.place(id).await;
    }
    world.catch_up().await;
    let page = world
        .region
        .read(&format!("{LIST}?limit=1"), &world.region.token_at(4), "wait;ms=5000")
        .await;
    let cursor = page.body["next_cursor"].as_str().unwrap().to_owned();
    world.projector.go_back_to_nothing().await;
    let next = format!("{LIST}?limit=1&cursor={cursor}");
    let read = world.region.read(&next, "", "wait;ms=10").await;
    assert_eq!(read.came_to(), (503, "replication-pending"));
    for forged in ["x", "e30", &cursor[..cursor.len() - 4]] {
        let read = world.region.read(&format!("{LIST}?cursor={forged}"), "", "").await;
        assert_eq!(read.came_to(), (400, "bad-request"), "{forged}");
    }
    assert_eq!(world.region.open(&read.token()).largest_position(), Position::ZERO);
}
