//! Views that are stored nowhere, and the pages of the log that regions read.

use serde_json::{Value, json};

use crate::world::{CREDENTIAL, Reply, World};

fn happened(reply: &Reply) -> Vec<&str> {
    let entries = reply.body["data"]["entries"].as_array().unwrap();
    entries.iter().map(|entry| entry["what"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_view_on_demand_is_folded_at_the_primary_and_asked_for_there_by_a_region() {
    let world = World::start().await;
    world.stock().await;
    let placed = world.place("o-1").await;
    let path = "/v1/views/order-history/o-1";
    // No projector applies anything, and no chain keeps the region from asking.
    for policy in ["", "wait;ms=50", "eventual", "pending", "primary"] {
        let read = world.region.read(path, &placed.token(), policy).await;
        assert_eq!(read.status, 200, "{policy}: {read:?}");
        assert_eq!(read.word(), "primary", "{policy}: {read:?}");
        assert_eq!(happened(&read), ["OrderPlaced"]);
    }
    let cancelled = json!({"order_id": "o-1", "reason": "too dear"});
    let cancelled = world.region.command("CancelOrder", cancelled).await;
    assert_eq!(cancelled.status, 200, "{cancelled:?}");
    let read = world.region.read(path, &cancelled.token(), "").await;
    assert_eq!(happened(&read), ["OrderPlaced", "OrderCancelled"]);
    assert_eq!(read.body["data"]["entries"][1]["detail"], "too dear");
    assert_eq!(read.body["version"], 2);
    let here = world.primary.get(path).await;
    assert_eq!((here.came_to(), &here.body), ((200, "primary"), &read.body));
    // Its token is of what it shows.
    let shown = world.primary.open(&read.token()).largest_position();
    assert_eq!(shown, world.primary.open(&cancelled.token()).largest_position());

    let absent = world.region.get("/v1/views/order-history/nobody").await;
    assert_eq!(absent.status, 404, "{absent:?}");
    let tables = "select count(*) from pg_tables where tablename like 'order_history%'";
    let tables: i64 = sqlx::query_scalar(tables).fetch_one(&world.projector.pool).await.unwrap();
    assert_eq!(tables, 0);
}

#[tokio::test]
async fn a_view_on_demand_says_when_the_primary_cannot_be_asked() {
    let world = World::start().await;
    world.primary.end().await;
    let read = world.region.read("/v1/views/order-history/o-1", "", "eventual").await;
    assert_eq!(read.came_to(), (503, "primary-unreachable"), "{read:?}");
}

#[tokio::test]
async fn a_region_reads_the_events_of_one_aggregate_from_a_version_on() {
    let world = World::start().await;
    for id in ["a%25b", "other"] {
        let path = format!("/v1/aggregates/note/{id}/events");
        for _ in 0..3 {
            let events = json!({"events": [{"type": "Noted", "schema_version": 1, "data": {}}]});
            assert!(world.primary.post(&path, events).await.status < 300);
        }
    }
    let ask = async |path: &str, credential: &str| {
        let url = format!("{}/internal/log/{path}", world.primary.base);
        let request = reqwest::Client::new().get(url).header("tidemark-credential", credential);
        let reply = request.send().await.unwrap();
        (reply.status().as_u16(), reply.text().await.unwrap())
    };
    let (status, page) = ask("note/a%25b?epoch=1&from_version=2", CREDENTIAL).await;
    assert_eq!(status, 200, "{page}");
    let versions: Vec<(String, String)> = page
        .lines()
        .map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            let header = |name: &str| line["headers"][name].as_str().unwrap().to_owned();
            (header(consistency::header::AGGREGATE_ID), header(consistency::header::VERSION))
        })
        .collect();
    let expected = ["2", "3"].map(|version| (versions[0].0.clone(), version.to_owned()));
    assert_eq!(versions, expected);
    assert_eq!(ask("note/other?epoch=1&from_version=4", CREDENTIAL).await, (200, String::new()));
    assert_eq!(ask("note/other?epoch=2", CREDENTIAL).await.0, 400, "of another epoch");
    assert_eq!(ask("note/other", "guessed").await.0, 401);
}
