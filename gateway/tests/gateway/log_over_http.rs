//! The log as regions read it from the primary: plain and compact, and no faster than each region may.

use consistency::Event;
use reqwest::header::HeaderMap;
use serde_json::{Value, json};

use crate::world::{CREDENTIAL, Gateway, World};

const COMPACT: &str = "application/vnd.tidemark.log";

/// So many notes, in aggregates of 500 events.
async fn fill(world: &World, count: usize) {
    let note = |nth: usize| json!({"type": "Noted", "data": {"nth": nth, "text": "x\n\"y\""}});
    let events: Vec<Value> = (0..count).map(note).collect();
    for (nth, page) in events.chunks(500).enumerate() {
        let path = format!("/v1/aggregates/note/n-{nth}/events");
        let traced = world
            .primary
            .request(reqwest::Method::POST, &path)
            .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        // Some have a header that others do not have.
        let request =
            if nth % 2 == 0 { traced } else { world.primary.request(reqwest::Method::POST, &path) };
        let done = request.json(&json!({"events": page})).send().await.unwrap();
        assert_eq!(done.status(), 201);
    }
}

struct Page {
    status: u16,
    headers: HeaderMap,
    text: String,
}

async fn page(gateway: &Gateway, query: &str, headers: &[(&'static str, &str)]) -> Page {
    let request = gateway.request(reqwest::Method::GET, &format!("/internal/log?{query}"));
    let mut request = request.header("tidemark-credential", CREDENTIAL);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let answer = request.send().await.unwrap();
    let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
    Page { status, headers, text: answer.text().await.unwrap() }
}

/// The events of a compact page, read as its description says.
fn events(page: &Page) -> Vec<Event> {
    assert_eq!((page.status, page.headers["content-type"].to_str().unwrap()), (200, COMPACT));
    let mut names: Vec<String> = Vec::new();
    let mut events = Vec::new();
    for line in page.text.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let Some(values) = line.as_array() else {
            names = serde_json::from_value(line["headers"].clone()).unwrap();
            continue;
        };
        assert_eq!(values.len(), names.len() + 1);
        let value = |at: usize| values[at].as_str().unwrap();
        let find = |name: &'static str| names.iter().position(|known| known == name).map(value);
        let data = value(names.len()).as_bytes().to_vec();
        events.push(Event::from_message(find, data).unwrap());
    }
    events
}

#[tokio::test]
async fn the_compact_form_has_the_same_events_in_fewer_bytes() {
    let world = World::start().await;
    fill(&world, 1_700).await;
    let plain = page(&world.primary, "after=0&limit=5000", &[]).await;
    let compact = page(&world.primary, "after=0&limit=5000", &[("accept", COMPACT)]).await;
    let read = events(&compact);
    assert_eq!(read, world.log().await);
    assert_eq!(read.len(), 1_700);
    assert_eq!(compact.headers["tidemark-head"], "1.1700");
    let (compact, plain) = (compact.text.len(), plain.text.len());
    assert!(compact * 4 < plain * 3, "{compact} of {plain} bytes");
    let some = events(&page(&world.primary, "after=690&limit=20", &[("accept", COMPACT)]).await);
    assert_eq!(some, read[690..710]);
    let none = page(&world.primary, "after=1700&limit=20", &[("accept", COMPACT)]).await;
    assert_eq!((none.status, none.text.as_str()), (200, ""));
    let unknown = page(&world.primary, "epoch=2&after=0", &[("accept", COMPACT)]).await;
    assert_eq!(unknown.status, 400);
    let request = world.primary.request(reqwest::Method::GET, "/internal/log?after=0");
    assert_eq!(request.header("accept", COMPACT).send().await.unwrap().status(), 401);
}

#[tokio::test]
async fn a_region_that_took_its_share_gets_less_and_no_other_region_pays_for_it() {
    let world = World::start().await;
    fill(&world, 1_500).await;
    // Another gateway of the primary, so slow that half a page takes minutes.
    let config = crate::world::primary_config(&world.postgres, &world.nats);
    let credential = format!("regions.credential = \"{CREDENTIAL}\"");
    let slow = format!("{credential}\nregions.log_bytes_per_second_max = 2000");
    let slow = Gateway::start(&config.replace(&credential, &slow)).await;
    slow.ready().await;
    let eager = [("accept", COMPACT), ("tidemark-region", "eu"), ("tidemark-deadline-ms", "500")];
    let first = events(&page(&slow, "after=0&limit=5000", &eager).await);
    assert_eq!(first, world.log().await[..500], "what is ready, and no more in this time");
    for accept in [COMPACT, "*/*"] {
        let again = [("accept", accept), eager[1], eager[2]];
        let refused = page(&slow, "after=500&limit=5000", &again).await;
        assert_eq!((refused.status, refused.headers["retry-after"].to_str().unwrap()), (503, "1"));
    }
    let other = [eager[0], ("tidemark-region", "asia"), eager[2]];
    assert_eq!(events(&page(&slow, "after=500&limit=10", &other).await).len(), 10);
    slow.end().await;
}
