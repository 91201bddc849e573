//! Server-sent events: a region tells those who listen where it stands.

use reqwest::{Method, RequestBuilder, Response};
use serde_json::Value;
use tokio::time::timeout;

use crate::world::{DEADLINE, Reply, World, eventually};

const ROW: &str = "/v1/views/order-detail/o-1";
const EVENTS: &str = "/v1/currency/events";

/// A stream under way.
struct Listening {
    response: Response,
    heard: String,
}

impl Listening {
    async fn to(request: RequestBuilder) -> Self {
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        assert_eq!(response.headers()["cache-control"], "no-store");
        Self { response, heard: String::new() }
    }

    /// Listens until `holds` of all that was heard; `false` when the stream ended before.
    async fn until(&mut self, holds: impl Fn(&str) -> bool) -> bool {
        while !holds(&self.heard) {
            let chunk = timeout(DEADLINE, self.response.chunk()).await;
            match chunk.expect("the stream stands still").unwrap() {
                Some(chunk) => self.heard.push_str(std::str::from_utf8(&chunk).unwrap()),
                None => return false,
            }
        }
        true
    }

    async fn ended(&mut self) {
        assert!(!self.until(|_| false).await);
    }

    /// The data of the events so far.
    fn events(&self) -> Vec<(&str, Value)> {
        let blocks = self.heard.split("\n\n").filter(|block| block.contains("event: "));
        let line = |block: &'_ str, name: &str| {
            let start = block.find(name).unwrap() + name.len();
            let end = block[start..].find('\n').map_or(block.len(), |end| start + end);
            start..end
        };
        blocks
            .map(|block| {
                let data = serde_json::from_str(&block[line(block, "data: ")]).unwrap();
                (&block[line(block, "event: ")], data)
            })
            .collect()
    }
}

async fn listeners(world: &World, count: u64) {
    let status = format!("{}/status", world.region.admin);
    eventually("so many listen", async || {
        let status = reqwest::get(&status).await.unwrap().json::<Value>().await.unwrap();
        status["listeners"] == count
    })
    .await;
}

#[tokio::test]
async fn a_202_leads_to_a_stream_that_ends_when_the_region_has_caught_up() {
    // Nothing but the change itself wakes who listens.
    let more = "events = { interval = \"1ms\", heartbeat = \"1h\" }";
    let mut world = World::with(more).await;
    world.stock().await;
    let placed = world.place("o-1").await;
    let pending = world.region.read(ROW, &placed.token(), "pending").await;
    assert_eq!(pending.came_to(), (202, "pending"));
    let link = pending.body["events"].as_str().unwrap();
    let mut listening = Listening::to(world.region.request(Method::GET, link)).await;
    assert!(listening.until(|heard| heard.contains("event: currency")).await);
    assert_eq!(listening.events()[0].1["projections"][0]["applied"], 0);
    let head = world.catch_up().await.get();
    listening.ended().await;
    let events = listening.events();
    let (name, data) = events.last().unwrap();
    assert_eq!((*name, &data["position"]), ("caught-up", &head.into()));
    let read = world.region.read(ROW, &placed.token(), "pending").await;
    assert_eq!(read.came_to(), (200, "local"), "what the stream said holds");
    // Whoever comes later is told at once.
    let mut listening = Listening::to(world.region.request(Method::GET, link)).await;
    listening.ended().await;
    assert_eq!(listening.events().len(), 1);
    listeners(&world, 0).await;
}

#[tokio::test]
async fn a_token_is_taken_from_the_header_and_is_met_without_hints_too() {
    // Nobody else looks at the database in time.
    let mut world = World::with("read.refresh_interval = \"1h\"").await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    let request = world.region.request(Method::GET, EVENTS).header("consistency-token", token);
    let mut listening = Listening::to(request).await;
    assert!(listening.until(|heard| heard.contains("event: currency")).await);
    world.catch_up_silently().await;
    listening.ended().await;
    assert_eq!(listening.events().last().unwrap().0, "caught-up");
}

#[tokio::test]
async fn who_brings_no_token_hears_of_every_change_and_of_silence() {
    let more = "events = { interval = \"1ms\", heartbeat = \"20ms\" }";
    let mut world = World::with(more).await;
    world.stock().await;
    world.place("o-1").await;
    let mut listening = Listening::to(world.region.request(Method::GET, EVENTS)).await;
    assert!(listening.until(|heard| heard.contains("event: currency")).await);
    let head = world.catch_up().await.get();
    let stands = format!("\"applied\":{head}");
    assert!(listening.until(|heard| heard.contains(&stands)).await);
    assert!(listening.until(|heard| heard.ends_with("\n\n:\n\n")).await, "it shows that it lives");
    assert!(listening.events().iter().all(|(name, _)| *name == "currency"));
    drop(listening);
    listeners(&world, 0).await;
}

#[tokio::test]
async fn who_listens_is_not_told_more_often_than_configured() {
    let more = "events = { interval = \"1h\", heartbeat = \"20ms\" }";
    let mut world = World::with(more).await;
    world.stock().await;
    let mut listening = Listening::to(world.region.request(Method::GET, EVENTS)).await;
    assert!(listening.until(|heard| heard.contains("event: currency")).await);
    let head = world.catch_up().await.get();
    eventually("the region stands at the head", async || {
        world.region.get("/v1/currency").await.body["projections"][0]["applied"] == head
    })
    .await;
    // One who comes now hears a few signs of life, and so did the other: what it was told is in its stream.
    let mut later = Listening::to(world.region.request(Method::GET, EVENTS)).await;
    assert!(later.until(|heard| heard.matches("\n\n:").count() == 3).await);
    world.region.stop.cancel();
    listening.ended().await;
    assert_eq!(listening.events().len(), 1, "{}", listening.heard);
}

#[tokio::test]
async fn listeners_are_bounded_and_hold_up_no_end() {
    let world = World::with("events.listeners_max = 1").await;
    let mut listening = Listening::to(world.region.request(Method::GET, EVENTS)).await;
    assert!(listening.until(|heard| heard.contains("event: currency")).await);
    let refused = world.region.get(EVENTS).await;
    assert_eq!((refused.status, refused.problem()), (503, "waiters-full"));
    assert!(world.region.end().await, "a stream without an end does not keep the gateway");
    listening.ended().await;
}

#[tokio::test]
async fn a_stream_for_a_token_that_is_none_is_refused() {
    let world = World::start().await;
    let cases = [
        ("?token=%25%25", 400, "invalid-token"),
        ("?view=nothing", 404, "unknown-view"),
        ("?tokens=x", 400, "bad-request"),
    ];
    for (query, status, problem) in cases {
        let refused: Reply = world.region.get(&format!("{EVENTS}{query}")).await;
        assert_eq!((refused.status, refused.problem()), (status, problem), "{query}");
    }
}
