//! The way to the primary: slow, broken, or leading to the wrong place.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use reqwest::Method;
use serde_json::json;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::Notify,
};

use crate::world::{CREDENTIAL, Gateway, PRIMARY, REGION, Reply, World, eventually, region_config};

const ROW: &str = "/v1/views/order-detail/o-1";
const LIST: &str = "/v1/views/orders-by-customer/c-1";

/// A line whose connections can be broken while it takes new ones.
struct Line {
    url: String,
    cut: Arc<Notify>,
    count: Arc<AtomicUsize>,
}

impl Line {
    async fn to(address: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (cut, count) = (Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
        let (cuts, counted, address) = (Arc::clone(&cut), Arc::clone(&count), address.to_owned());
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::Relaxed);
                let mut far = TcpStream::connect(&address).await.unwrap();
                let cuts = Arc::clone(&cuts);
                tokio::spawn(async move {
                    tokio::select! {
                        biased;
                        () = cuts.notified() => {}
                        _ = copy_bidirectional(&mut near, &mut far) => {}
                    }
                });
            }
        });
        Self { url, cut, count }
    }
}

/// Asks for a list at the primary, which waits there for its projector.
fn forwarded(gateway: &Gateway, token: &str) -> tokio::task::JoinHandle<Reply> {
    let request = gateway.request(Method::GET, LIST).header("consistency-token", token);
    let request = request.header("consistency-policy", "forward");
    tokio::spawn(Reply::of(request))
}

#[tokio::test]
async fn a_primary_that_hangs_does_not_keep_local_reads_from_being_answered() {
    let more = "read.wait_max = \"30s\"\nlisten.request_timeout = \"30s\"";
    let mut world = World::with_both(more, more).await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    let mut config = region_config(&world.postgres, &world.nats, &world.primary.base);
    config = config.replace(
        "primary_region.name",
        "primary_region.forwards_max = 8\n\
         primary_region.forwarded_reads_max = 2\nprimary_region.name",
    );
    let region = Gateway::start(&format!("{more}\n{config}")).await;
    region.ready().await;
    let hanging = [forwarded(&region, &token), forwarded(&region, &token)];
    world.primary.waiters(2).await;
    // As many forwards hang as may: one more is not even tried.
    let read = region.read(LIST, &token, "forward, pending").await;
    assert_eq!(read.came_to(), (202, "pending"));
    let local = (0..100).map(|_| region.read(ROW, "", "wait, forward"));
    for read in futures::future::join_all(local).await {
        assert_eq!(read.came_to(), (404, "local"));
    }
    // Writes have a part of the budget that reads cannot take.
    let written = region.command("CancelOrder", json!({"order_id": "o-1"})).await;
    assert_eq!(written.status, 200);
    assert!(hanging.iter().all(|forward| !forward.is_finished()), "they hang all the while");
    world.catch_up_primary().await;
    for forward in hanging {
        assert_eq!(forward.await.unwrap().came_to(), (200, "forwarded"));
    }
}

#[tokio::test]
async fn a_read_is_asked_for_once_more_when_its_connection_breaks() {
    let more = "read.wait_max = \"30s\"\nlisten.request_timeout = \"30s\"";
    let mut world = World::with_both(more, more).await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    let line = Line::to(world.primary.base.trim_start_matches("http://")).await;
    let config = region_config(&world.postgres, &world.nats, &line.url);
    let region = Gateway::start(&format!("{more}\n{config}")).await;
    region.ready().await;
    let read = forwarded(&region, &token);
    world.primary.waiters(1).await;
    line.cut.notify_waiters();
    eventually("there is another connection", async || 1 < line.count.load(Ordering::Relaxed))
        .await;
    world.catch_up_primary().await;
    assert_eq!(read.await.unwrap().came_to(), (200, "forwarded"));
}

#[tokio::test]
async fn a_forward_to_somebody_who_is_not_the_primary_ends_there_with_a_clear_error() {
    let world = World::start().await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    let to = |url: &str| region_config(&world.postgres, &world.nats, url);
    let named = |name: &str| format!("region = \"{name}\"");
    // Taken for the primary: a region, a primary of another name, and one of the same name.
    let lost = [
        to(&world.region.base).replace(&named(REGION), &named("ap-south")),
        to(&world.primary.base).replace(&format!("name = \"{PRIMARY}\""), "name = \"ap-south\""),
        to(&world.primary.base)
            .replace(&named(REGION), &named(PRIMARY))
            .replace(&format!("name = \"{PRIMARY}\""), "name = \"ap-south\""),
    ];
    for config in lost {
        let gateway = Gateway::start(&config).await;
        let written = gateway.command("CancelOrder", json!({"order_id": "o-1"})).await;
        assert_eq!(written.came_to(), (421, "not-primary"), "{config}");
        let read = gateway.read(ROW, &token, "forward").await;
        assert_eq!(read.came_to(), (503, "replication-pending"), "{config}");
        eventually("those who run it are told", async || {
            let ready = reqwest::get(format!("{}/readyz", gateway.admin)).await.unwrap();
            ready.text().await.unwrap().contains("is not the primary")
        })
        .await;
    }
    assert_eq!(world.log().await.len(), 3, "nothing was written anywhere");
}

#[tokio::test]
async fn a_primary_takes_no_forward_from_a_region_of_its_own_name() {
    let world = World::start().await;
    let request = world.primary.request(Method::POST, "/v1/commands/CancelOrder");
    let request = request.header("tidemark-credential", CREDENTIAL).header("tidemark-hop", PRIMARY);
    let refused = Reply::of(request.json(&json!({"order_id": "o-1"}))).await;
    assert_eq!(refused.came_to(), (421, "not-primary"));
}
