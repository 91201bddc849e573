//! The service of `docs/proxied-service`, as its README has it.

use std::path::Path;

use compose::{
    nats::User,
    ports,
    process::{Child, Program},
};
use reqwest::Method;
use serde_json::json;
use tempfile::TempDir;

use crate::world::{Reply, World, eventually};

const NOTE: &str = "/notes/n-1";

fn docs() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/proxied-service")
}

/// The route that the README shows, with the service's own address.
fn route(port: u16) -> String {
    let readme = std::fs::read_to_string(docs().join("README.md")).unwrap();
    let shown = readme.split("[[route]]\n").nth(1).unwrap().split("```").next().unwrap();
    let keys = shown.trim().replace(":9000", &format!(":{port}")).replace('\n', ", ");
    assert!(keys.contains(&port.to_string()), "{keys}");
    format!("route = [{{ {keys} }}]")
}

fn start(world: &World, gateway: &str, port: u16, folder: &TempDir) -> Child {
    let (user, password) = world.nats.credentials(User::Projector);
    let store = folder.path().join(format!("{port}.sqlite"));
    Program::new("notes", "python3", folder.path().join("notes.log"))
        .arg(docs().join("service.py"))
        .args(["--gateway", gateway, "--listen", &format!("127.0.0.1:{port}")])
        .args(["--nats", world.nats.url().trim_start_matches("nats://")])
        .args(["--nats-user", &user, "--nats-password", &password])
        .arg("--store")
        .arg(store)
        .spawn()
        .unwrap()
}

async fn up(world: &World, service: &Child) {
    eventually("the services answer for what they read", async || {
        assert!(service.is_running(), "{}", service.log_tail());
        world.region.read("/notes", "", "wait;ms=1").await.came_to() == (200, "local")
    })
    .await;
}

#[tokio::test]
async fn the_example_reads_its_own_writes_in_every_region_and_after_a_restart() {
    let folder = TempDir::new().unwrap();
    let [at_primary, in_region] = ports::free_many().unwrap();
    let mut world = World::with_both(&route(at_primary), &route(in_region)).await;
    let (primary, region) = (world.primary.base.clone(), world.region.base.clone());
    let over_there = start(&world, &primary, at_primary, &folder);
    let service = start(&world, &region, in_region, &folder);
    up(&world, &service).await;
    eventually("the primary's service listens", async || {
        assert!(over_there.is_running(), "{}", over_there.log_tail());
        world.primary.read("/notes", "", "wait;ms=1").await.status == 200
    })
    .await;

    let written = world.region.post(NOTE, json!({"text": "tide at six"})).await;
    assert_eq!(written.status, 201, "{written:?}");
    assert_eq!(world.region.open(&written.token()).claims().len(), 1);
    let head = world.catch_up().await;
    let read = world.region.read(NOTE, &written.token(), "wait;ms=5000").await;
    assert_eq!(
        (read.status, &read.body["text"]),
        (200, &json!("tide at six")),
        "{read:?} {}",
        service.log_tail()
    );
    assert!(["local", "waited"].contains(&read.word()), "it is vouched for: {read:?}");
    assert_eq!(world.region.open(&read.token()).read_position(), head);

    // A browser, whose cookie carries the token. Its service begins again where it was.
    service.kill().await;
    let again = world.region.post(NOTE, json!({"text": "tide at seven"})).await;
    assert_eq!(again.status, 200, "{again:?}");
    let cookie = again.header("set-cookie").split(';').next().unwrap();
    let service = start(&world, &region, in_region, &folder);
    world.catch_up().await;
    up(&world, &service).await;
    let request = world.region.request(Method::GET, NOTE).header("cookie", cookie);
    let read = Reply::of(request.header("consistency-policy", "wait;ms=5000")).await;
    assert_eq!((read.status, &read.body["text"]), (200, &json!("tide at seven")), "{read:?}");

    let refused = world.region.post("/notes", json!({})).await;
    assert_eq!(refused.status, 400, "what the service refuses is its answer");
}
