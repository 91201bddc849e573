//! The whole: three regions with real gateways and projectors. Needs their binaries: `cargo build --workspace --bins`.

use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use compose::demo;
use compose::demo::caller::{Answer, Caller};
use compose::local::{Plan, Stack, http_link};
use compose::nats::{User, event_link};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

pub const EUROPE: &str = "eu-west";
pub const PATIENCE: Duration = Duration::from_secs(30);

pub async fn start() -> Stack {
    Box::pin(Stack::start(Plan::default())).await.unwrap()
}

pub fn caller(stack: &Stack, region: &str) -> Caller {
    Caller::new(stack.region(region).unwrap().url.clone()).unwrap()
}

/// Places an order through the region, and returns its path in the view of orders.
pub async fn place(caller: &mut Caller, order: &str) -> String {
    let customer = json!({"customer_id": format!("customer-of-{order}"), "name": "Ada"});
    let product = json!({"product_id": format!("product-of-{order}"), "name": "Tide table", "price_cents": 2500});
    assert!(caller.write("RegisterCustomer", &customer).await.unwrap().status.is_success());
    assert!(caller.write("CreateProduct", &product).await.unwrap().status.is_success());
    let items = json!([{"product_id": product["product_id"], "quantity": 1}]);
    let placed = json!({"order_id": order, "customer_id": customer["customer_id"], "items": items});
    let answer = caller.write("PlaceOrder", &placed).await.unwrap();
    assert_eq!(answer.status, 201, "{answer:?}");
    format!("/v1/views/order-detail/{order}")
}

pub async fn add_item(caller: &mut Caller, order: &str) -> Answer {
    let item =
        json!({"order_id": order, "product_id": format!("product-of-{order}"), "quantity": 1});
    let answer = caller.write("AddItem", &item).await.unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    answer
}

/// Reads until the answer is no longer "not yet".
pub async fn settled(caller: &mut Caller, path: &str, within: Duration) -> Answer {
    let end = Instant::now() + within;
    loop {
        let answer = caller.get(path, "wait;ms=500, pending").await.unwrap();
        if answer.status != 202 || Instant::now() > end {
            return answer;
        }
    }
}

pub fn assert_local(answer: &Answer, version: u64) {
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(["local", "waited"].contains(&answer.word()), "{answer:?}");
    assert_eq!(answer.version(), Some(version), "{answer:?}");
}

fn runs(pid: u32) -> bool {
    Command::new("kill").args(["-0", &pid.to_string()]).output().unwrap().status.success()
}

fn pids(stack: &Stack) -> Vec<u32> {
    let of_regions = stack
        .regions
        .iter()
        .flat_map(|region| [region.gateway.pid(), region.projector.pid(), region.postgres.pid()]);
    let servers = stack.nats.regions.iter().chain([&stack.nats.primary]);
    of_regions.chain(servers.map(|server| server.pid())).map(Option::unwrap).collect()
}

#[tokio::test]
async fn two_stacks_tell_the_story_side_by_side_and_leave_nothing_running() {
    let (first, second) = tokio::join!(start(), start());
    let all: Vec<u32> = [pids(&first), pids(&second)].concat();
    assert_eq!(all.len(), 24);
    assert!(all.iter().all(|pid| runs(*pid)));
    let (told, told_too) =
        tokio::join!(Box::pin(demo::tell(&first)), Box::pin(demo::tell(&second)));
    assert!(told.unwrap() && told_too.unwrap());
    let proxy = first.proxies.url().replace("http://", "");

    first.stop().await.unwrap();
    drop(second);
    assert!(!all.iter().any(|pid| runs(*pid)));
    assert!(TcpStream::connect(proxy).is_err());
}

#[tokio::test]
async fn a_region_is_current_within_seconds_of_a_20_s_cut_of_its_event_link() {
    let stack = start().await;
    let mut europe = caller(&stack, EUROPE);
    let path = place(&mut europe, "o-cut").await;
    assert_local(&settled(&mut europe, &path, PATIENCE).await, 1);

    stack.proxies.set_enabled(&event_link(EUROPE), false).await.unwrap();
    add_item(&mut europe, "o-cut").await;
    // The length of the cut is the fault: after 10 s of silence a mirror loses its consumer.
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(europe.get(&path, "wait;ms=50, pending").await.unwrap().status, 202);
    stack.proxies.set_enabled(&event_link(EUROPE), true).await.unwrap();
    assert_local(&settled(&mut europe, &path, Duration::from_secs(15)).await, 2);
    stack.stop().await.unwrap();
}

/// What a client does that was told to come again: in the end its write is there, and once.
#[tokio::test]
async fn a_write_refused_for_now_is_sent_again_and_done_once() {
    let stack = start().await;
    let mut europe = caller(&stack, EUROPE);
    let path = place(&mut europe, "o-refused").await;
    let link = http_link(EUROPE);
    stack.proxies.set_enabled(&link, false).await.unwrap();
    // Reads find out that the connection is gone; a write on it would have an unknown outcome.
    assert_eq!(europe.get(&path, "primary").await.unwrap().status, 503);
    let item =
        json!({"order_id": "o-refused", "product_id": "product-of-o-refused", "quantity": 1});
    assert_eq!(europe.command("AddItem", &item).await.unwrap().status, 503);

    let mut writer = europe.clone();
    let (written, ()) = tokio::join!(add_item(&mut writer, "o-refused"), async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        stack.proxies.set_enabled(&link, true).await.unwrap();
    });
    assert_eq!(written.version(), Some(2));
    assert_local(&settled(&mut writer, &path, PATIENCE).await, 2);
    stack.stop().await.unwrap();
}

/// The mirror of a region holds more than its origin for a while; positions are what joins them again.
#[tokio::test]
async fn a_stream_wiped_at_the_primary_is_rebuilt_and_every_region_goes_on() {
    let mut stack = start().await;
    let mut europe = caller(&stack, EUROPE);
    let path = place(&mut europe, "o-wiped").await;
    assert_local(&settled(&mut europe, &path, PATIENCE).await, 1);

    stack.nats.primary.kill().await.unwrap();
    stack.nats.primary.wipe().await.unwrap();
    stack.nats.primary.start_again().await.unwrap();
    let written = add_item(&mut europe, "o-wiped").await;
    assert_local(&settled(&mut europe, &path, PATIENCE).await, 2);
    let written = written.body["position"].as_u64().unwrap();

    let (name, password) = stack.nats.primary.credentials(User::Relay);
    let options = async_nats::ConnectOptions::with_user_and_password(name, password);
    let client = options.connect(stack.nats.primary.url()).await.unwrap();
    let jetstream = async_nats::jetstream::new(client);
    let end = Instant::now() + PATIENCE;
    let rebuilt = loop {
        let found = jetstream.get_stream("EVENTS-1").await.map(|it| it.cached_info().state.clone());
        match found {
            Ok(state) if state.last_sequence == written => break state,
            Ok(_) | Err(_) => assert!(Instant::now() < end, "the stream is not rebuilt"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!((rebuilt.first_sequence, rebuilt.messages), (1, written));
    stack.stop().await.unwrap();
}

/// Not even who holds the projector's password can fake currency: without the regions' credential he cannot seal what he
/// says. Neither a commit nor an idle proof on the checkpoint that is really stored, with or without the seal of a
/// genuine announcement.
#[tokio::test]
async fn a_forged_announcement_changes_nothing() {
    let stack = start().await;
    let server = stack.nats.server(EUROPE).unwrap();
    let connect = async |user| {
        let (name, password) = server.credentials(user);
        let options = async_nats::ConnectOptions::with_user_and_password(name, password);
        options.connect(server.url()).await.unwrap()
    };
    let listener = connect(User::Gateway).await;
    let mut announcements = listener.subscribe("tidemark.eu-west.currency").await.unwrap();
    listener.flush().await.unwrap();
    let mut europe = caller(&stack, EUROPE);
    let path = place(&mut europe, "o-forged").await;
    assert_local(&settled(&mut europe, &path, PATIENCE).await, 1);
    let genuine = timeout(PATIENCE, announcements.next()).await.unwrap().unwrap();
    let seals = [async_nats::HeaderMap::new(), genuine.headers.clone().unwrap()];
    let said: Value = serde_json::from_slice(&genuine.payload).unwrap();
    let genuine = said[0].clone();
    let stored = genuine["stored"].clone();

    stack.proxies.set_enabled(&event_link(EUROPE), false).await.unwrap();
    let written = add_item(&mut europe, "o-forged").await;
    let ahead = written.body["position"].as_u64().unwrap() + 1000;
    let forger = connect(User::Projector).await;
    for partition in 0..64 {
        let mut forged = genuine.clone();
        forged["partition"] = json!(partition);
        (forged["to"], forged["head"]) = (json!(ahead), json!(ahead));
        for (stored, from) in
            [(&json!(ahead), 0), (&stored, 0), (&json!(0), 0), (&stored, ahead - 1001)]
        {
            (forged["stored"], forged["from"]) = (stored.clone(), json!(from));
            for seal in &seals {
                let (subject, said) = ("tidemark.eu-west.currency", json!([forged]).to_string());
                forger.publish_with_headers(subject, seal.clone(), said.into()).await.unwrap();
            }
        }
    }
    forger.flush().await.unwrap();
    let answer = europe.get(&path, "wait;ms=300, pending").await.unwrap();
    assert_eq!(answer.status, 202, "{answer:?}");
    let answer = europe.get(&path, "wait;ms=50, forward").await.unwrap();
    assert_eq!((answer.word(), answer.version()), ("forwarded", Some(2)), "{answer:?}");

    stack.proxies.set_enabled(&event_link(EUROPE), true).await.unwrap();
    assert_local(&settled(&mut europe, &path, PATIENCE).await, 2);
    stack.stop().await.unwrap();
}

/// Every process of a region is killed in turn; what was acknowledged is there afterwards.
#[tokio::test]
async fn killed_services_come_back_with_everything_acknowledged() {
    let mut stack = start().await;
    let mut europe = caller(&stack, EUROPE);
    let path = place(&mut europe, "o-killed").await;
    assert_local(&settled(&mut europe, &path, PATIENCE).await, 1);
    let http = reqwest::Client::new();

    let region = stack.region_mut(EUROPE).unwrap();
    region.projector.kill().await;
    add_item(&mut europe, "o-killed").await;
    region.projector.start_again().unwrap();
    region.projector.wait_until_ready(&http, PATIENCE).await.unwrap();
    assert_local(&settled(&mut europe, &path, PATIENCE).await, 2);

    region.gateway.kill().await;
    region.gateway.start_again().unwrap();
    region.gateway.wait_until_ready(&http, PATIENCE).await.unwrap();
    assert_local(&settled(&mut europe, &path, PATIENCE).await, 2);

    region.postgres.kill().await.unwrap();
    region.postgres.start_again().await.unwrap();
    add_item(&mut europe, "o-killed").await;
    assert_local(&settled(&mut europe, &path, PATIENCE).await, 3);
    stack.stop().await.unwrap();
}
