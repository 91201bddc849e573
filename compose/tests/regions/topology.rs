//! The joined NATS servers: who may do what, what crosses the WAN, and what becomes of a mirror when it is cut.

use std::time::Duration;

use async_nats::jetstream::stream::{Config, External, Source};
use async_nats::jetstream::{self, Context};
use async_nats::{Client, ConnectOptions, Event, HeaderMap, ServerError};
use compose::nats::{Server, Topology, User, event_link};
use compose::proxy::{Proxies, Stream, Toxic};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::timeout;

const STREAM: &str = "EVENTS-1";
const PRIMARY: &str = "us-east";
const EUROPE: &str = "eu-west";
const ASIA: &str = "asia-south";
const PATIENCE: Duration = Duration::from_secs(30);

struct World {
    proxies: Proxies,
    nats: Topology,
    relay: Context,
}

impl World {
    /// Three regions and the stream, with nothing in it.
    async fn start(operator: bool) -> World {
        let proxies = Proxies::start(0).await.unwrap();
        let nats = Topology::start(&proxies, PRIMARY, &[EUROPE, ASIA], operator).await.unwrap();
        let relay = jetstream::new(connect(&nats.primary, User::Relay).await);
        let subjects = vec!["events.>".to_owned()];
        let config = Config { name: STREAM.into(), subjects, ..Default::default() };
        relay.create_stream(config).await.unwrap();
        World { proxies, nats, relay }
    }

    fn region(&self, name: &str) -> &Server {
        self.nats.server(name).unwrap()
    }

    async fn publish(&self, first: u64, last: u64) {
        for position in first..=last {
            let mut headers = HeaderMap::new();
            headers.insert("Nats-Expected-Last-Sequence", (position - 1).to_string());
            let payload = format!("event {position}").into();
            let subject = format!("events.order.{}", position % 64);
            let ack = self.relay.publish_with_headers(subject, headers, payload).await.unwrap();
            assert_eq!(ack.await.unwrap().sequence, position);
        }
    }
}

async fn connect(server: &Server, user: User) -> Client {
    let (name, password) = server.credentials(user);
    let options = ConnectOptions::with_user_and_password(name, password);
    options.connect(server.url()).await.unwrap()
}

fn mirror_config() -> Config {
    let external = External { api_prefix: format!("$JS.{PRIMARY}.API"), delivery_prefix: None };
    let origin = Source { name: STREAM.into(), external: Some(external), ..Default::default() };
    Config { name: STREAM.into(), mirror: Some(origin), ..Default::default() }
}

/// A mirror created before the leaf is up loses its first request, and is tried again only after a long time.
async fn mirror(server: &Server) -> Context {
    let client = connect(server, User::Projector).await;
    let origin = format!("$JS.{PRIMARY}.API.STREAM.INFO.{STREAM}");
    eventually("the origin is reached", async || {
        client.request(origin.clone(), "".into()).await.is_ok()
    })
    .await;
    let context = jetstream::new(client);
    context.create_stream(mirror_config()).await.unwrap();
    context
}

async fn last_sequence(context: &Context) -> u64 {
    context.get_stream(STREAM).await.unwrap().cached_info().state.last_sequence
}

pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let holds = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, holds).await.unwrap_or_else(|_| panic!("in vain: {what}"));
}

/// The leaf connections of a server, as its monitoring tells.
async fn leaves(server: &Server) -> Vec<Value> {
    let url = format!("{}/leafz", server.monitor_url());
    let answer: Value = reqwest::get(url).await.unwrap().json().await.unwrap();
    answer["leafs"].as_array().cloned().unwrap_or_default()
}

#[tokio::test]
async fn a_mirror_holds_every_event_at_its_own_position() {
    let world = World::start(false).await;
    world.publish(1, 50).await;
    for region in [EUROPE, ASIA] {
        let context = mirror(world.region(region)).await;
        eventually("the mirror is complete", async || last_sequence(&context).await == 50).await;
        let stream = context.get_stream(STREAM).await.unwrap();
        for position in [1, 17, 50] {
            let message = stream.get_raw_message(position).await.unwrap();
            assert_eq!(message.payload, format!("event {position}"));
            assert_eq!(message.sequence, position);
        }
        let (_, back) = world.proxies.bytes(&event_link(region)).unwrap();
        assert!(back > 50 * 8, "{back} bytes came through the proxy of {region}");
    }
}

/// More than the origin sends before it asks the mirror to confirm.
#[tokio::test]
async fn a_large_backlog_reaches_the_mirror() {
    const EVENTS: u64 = 4000;
    let world = World::start(false).await;
    let mut acks = Vec::new();
    for position in 1..=EVENTS {
        let subject = format!("events.order.{}", position % 64);
        acks.push(world.relay.publish(subject, vec![b'x'; 16 * 1024].into()).await.unwrap());
    }
    for ack in acks {
        ack.await.unwrap();
    }
    let europe = mirror(world.region(EUROPE)).await;
    eventually("the mirror is complete", async || last_sequence(&europe).await == EVENTS).await;
}

/// Without `ignore_discovered_servers` a leaf learns the primary's own port and goes there after the first cut.
#[tokio::test]
async fn a_healed_leaf_still_goes_through_the_proxy() {
    let world = World::start(false).await;
    let europe = mirror(world.region(EUROPE)).await;
    let link = event_link(EUROPE);
    world.publish(1, 10).await;
    eventually("the mirror is complete", async || last_sequence(&europe).await == 10).await;
    let port_of =
        async || leaves(world.region(EUROPE)).await.first().map(|leaf| leaf["port"].clone());
    let through_the_proxy = port_of().await;

    world.proxies.set_enabled(&link, false).await.unwrap();
    eventually("the leaf is gone", async || leaves(world.region(EUROPE)).await.is_empty()).await;
    world.proxies.set_enabled(&link, true).await.unwrap();
    eventually("the leaf is back", async || leaves(world.region(EUROPE)).await.len() == 1).await;

    assert_eq!(port_of().await, through_the_proxy);
    let (_, before) = world.proxies.bytes(&link).unwrap();
    world.publish(11, 30).await;
    eventually("the mirror is complete", async || last_sequence(&europe).await == 30).await;
    let (_, after) = world.proxies.bytes(&link).unwrap();
    assert!(after > before + 20 * 8, "{before} bytes before, {after} after");
}

/// What the mirror asked of the origin and lost in the cut is said again, word for word, with its own reply subject.
/// Left alone the region's server waits 30 s for the answer and then 10 s more; an update of the mirror's
/// configuration changes nothing.
async fn resumes_when_nudged(world: &World, cut: impl AsyncFnOnce(), heal: impl AsyncFnOnce()) {
    let region = world.region(EUROPE);
    let europe = mirror(region).await;
    world.publish(1, 10).await;
    eventually("the mirror is complete", async || last_sequence(&europe).await == 10).await;
    let nudger = connect(region, User::Projector).await;
    let requests = format!("$JS.{PRIMARY}.API.CONSUMER.CREATE.{STREAM}");
    let mut requests = nudger.subscribe(requests).await.unwrap();
    cut().await;
    world.publish(11, 20).await;
    // The length of the cut is the fault: after 10 s of silence the mirror asks for a new consumer.
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(last_sequence(&europe).await, 10);
    heal().await;
    eventually("the leaf is back", async || leaves(region).await.len() == 1).await;

    let lost = timeout(PATIENCE, next(&mut requests)).await.unwrap();
    let resumed = async {
        while last_sequence(&europe).await < 20 {
            let (subject, reply) = (lost.subject.clone(), lost.reply.clone().unwrap());
            let headers = lost.headers.clone().unwrap_or_default();
            let again = nudger.publish_with_reply_and_headers(
                subject,
                reply,
                headers,
                lost.payload.clone(),
            );
            again.await.unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    timeout(Duration::from_secs(10), resumed)
        .await
        .expect("a nudged mirror resumes within seconds");
}

#[tokio::test]
async fn a_nudged_mirror_resumes_within_seconds_of_a_20_s_cut() {
    let world = World::start(false).await;
    let link = event_link(EUROPE);
    let cut = async || world.proxies.set_enabled(&link, false).await.unwrap();
    let heal = async || world.proxies.set_enabled(&link, true).await.unwrap();
    resumes_when_nudged(&world, cut, heal).await;
}

#[tokio::test]
async fn a_nudged_mirror_resumes_within_seconds_of_a_20_s_silence() {
    let world = World::start(false).await;
    let link = event_link(EUROPE);
    let toxics = [("up", Stream::Upstream), ("down", Stream::Downstream)];
    let cut = async || {
        for (name, stream) in toxics {
            world.proxies.add_toxic(&link, Toxic::blackhole(name, stream)).unwrap();
        }
    };
    let heal = async || {
        for (name, _) in toxics {
            world.proxies.remove_toxic(&link, name).unwrap();
        }
    };
    resumes_when_nudged(&world, cut, heal).await;
}

/// A connection that notes the server's refusals.
struct Suspect {
    client: Client,
    refusals: mpsc::UnboundedReceiver<String>,
}

impl Suspect {
    async fn connect(server: &Server, user: User) -> Suspect {
        let (told, refusals) = mpsc::unbounded_channel();
        let (name, password) = server.credentials(user);
        let options = ConnectOptions::with_user_and_password(name, password);
        let options = options.event_callback(move |event| {
            let told = told.clone();
            async move {
                if let Event::ServerError(ServerError::Other(text)) = event {
                    // The test may have seen enough.
                    let _ = told.send(text);
                }
            }
        });
        Suspect { client: options.connect(server.url()).await.unwrap(), refusals }
    }

    /// Whether the server refuses a publish. A refusal comes before the answer to the ping that follows it.
    async fn is_refused(&mut self, subject: &str) -> bool {
        self.client.publish(subject.to_owned(), "{}".into()).await.unwrap();
        self.was_refused(subject).await
    }

    async fn is_refused_to_hear(&mut self, subject: &str) -> bool {
        let _subscription = self.client.subscribe(subject.to_owned()).await.unwrap();
        self.was_refused(subject).await
    }

    async fn was_refused(&mut self, subject: &str) -> bool {
        self.client.flush().await.unwrap();
        let refusal = timeout(Duration::from_millis(500), self.refusals.recv()).await;
        // A server reports a call to its own domain without the domain.
        let called = subject.replace(&format!("$JS.{PRIMARY}.API."), "$JS.API.");
        let names = |text: String| text.contains(subject) || text.contains(&called);
        refusal.is_ok_and(|text| text.is_some_and(names))
    }
}

fn api(call: &str) -> String {
    format!("$JS.API.{call}.{STREAM}")
}

#[tokio::test]
async fn only_the_relay_may_publish_events() {
    let world = World::start(false).await;
    world.publish(1, 3).await;
    let primary = &world.nats.primary;
    let leaf = |region: &str| User::Leaf(region.into());
    for user in [User::Projector, User::Gateway, leaf(EUROPE), leaf(ASIA)] {
        let mut suspect = Suspect::connect(primary, user.clone()).await;
        assert!(suspect.is_refused("events.order.1").await, "{user} at the primary");
    }
    for region in [EUROPE, ASIA] {
        for user in [User::Projector, User::Gateway] {
            let mut suspect = Suspect::connect(world.region(region), user.clone()).await;
            assert!(suspect.is_refused("events.order.1").await, "{user} in {region}");
        }
    }
    assert_eq!(last_sequence(&world.relay).await, 3);
    let mut relay = Suspect::connect(primary, User::Relay).await;
    assert!(!relay.is_refused("events.order.1").await);
}

#[tokio::test]
async fn nobody_may_delete_or_purge_the_stream() {
    let world = World::start(false).await;
    world.publish(1, 3).await;
    let leaf = User::Leaf(EUROPE.into());
    for user in [User::Relay, User::Projector, User::Gateway, leaf] {
        let mut suspect = Suspect::connect(&world.nats.primary, user.clone()).await;
        for call in ["STREAM.DELETE", "STREAM.PURGE", "STREAM.MSG.DELETE"] {
            let across = format!("$JS.{PRIMARY}.API.{call}.{STREAM}");
            assert!(suspect.is_refused(&api(call)).await, "{user}: {call}");
            assert!(suspect.is_refused(&across).await, "{user}: {across}");
        }
        let change = api("STREAM.UPDATE");
        assert_eq!(suspect.is_refused(&change).await, user != User::Relay, "{user}: {change}");
    }
    for user in [User::Projector, User::Gateway] {
        let mut suspect = Suspect::connect(world.region(EUROPE), user.clone()).await;
        for call in ["STREAM.DELETE", "STREAM.PURGE", "STREAM.UPDATE", "STREAM.MSG.DELETE"] {
            let across = format!("$JS.{PRIMARY}.API.{call}.{STREAM}");
            assert!(suspect.is_refused(&across).await, "{user} in {EUROPE}: {across}");
        }
    }
    assert_eq!(last_sequence(&world.relay).await, 3);
}

#[tokio::test]
async fn only_a_regions_projector_may_announce_there() {
    let world = World::start(false).await;
    for region in [PRIMARY, EUROPE, ASIA] {
        let own = format!("tidemark.{region}.currency");
        let server = world.region(region);
        let mut projector = Suspect::connect(server, User::Projector).await;
        assert!(!projector.is_refused(&own).await, "{region}");
        for other in [PRIMARY, EUROPE, ASIA].into_iter().filter(|other| *other != region) {
            let subject = format!("tidemark.{other}.currency");
            assert!(projector.is_refused(&subject).await, "projector of {region} in {other}");
        }
        let mut gateway = Suspect::connect(server, User::Gateway).await;
        assert!(gateway.is_refused(&own).await, "gateway of {region}");
        assert!(!gateway.is_refused_to_hear(&own).await, "gateway of {region}");
        assert!(gateway.is_refused_to_hear("events.>").await, "gateway of {region}");
    }
    for user in [User::Leaf(EUROPE.into()), User::Relay] {
        let mut suspect = Suspect::connect(&world.nats.primary, user.clone()).await;
        assert!(suspect.is_refused(&format!("tidemark.{PRIMARY}.currency")).await, "{user}");
    }
}

/// The leaf's rights are checked by the primary, whatever the region's server allows its own.
#[tokio::test]
async fn a_region_that_allows_everything_reaches_nothing_at_the_primary() {
    let world = World::start(true).await;
    world.publish(1, 3).await;
    eventually("the leaf is joined", async || leaves(world.region(EUROPE)).await.len() == 1).await;
    let primary = connect(&world.nats.primary, User::Operator).await;
    let mut heard = primary.subscribe(">").await.unwrap();
    primary.flush().await.unwrap();
    let europe = connect(world.region(EUROPE), User::Operator).await;
    let stray = [
        "events.order.1",
        "tidemark.us-east.currency",
        "tidemark.us-east.relay",
        "tidemark.eu-west.currency",
    ];
    for subject in stray {
        europe.publish(subject, "stray".into()).await.unwrap();
    }
    for call in ["STREAM.DELETE", "STREAM.PURGE", "STREAM.UPDATE", "STREAM.CREATE"] {
        for prefix in [format!("$JS.{PRIMARY}.API"), "$JS.API".to_owned()] {
            let subject = format!("{prefix}.{call}.{STREAM}");
            europe.publish(subject, json!({ "name": STREAM }).to_string().into()).await.unwrap();
        }
    }
    europe.flush().await.unwrap();
    // What is allowed goes the same way, so when it has arrived the rest would have.
    let allowed = format!("$JS.{PRIMARY}.API.STREAM.INFO.{STREAM}");
    let info =
        timeout(PATIENCE, europe.request(allowed.clone(), "".into())).await.unwrap().unwrap();
    let info: Value = serde_json::from_slice(&info.payload).unwrap();
    assert_eq!(info["state"]["last_seq"], 3);
    primary.publish("heard", "".into()).await.unwrap();
    loop {
        let message = timeout(PATIENCE, next(&mut heard)).await.unwrap();
        let subject = message.subject.to_string();
        if subject == "heard" {
            break;
        }
        assert!(!stray.contains(&subject.as_str()), "{subject} crossed the leaf");
        let changes = ["DELETE", "PURGE", "UPDATE", "CREATE"];
        assert!(
            !changes.iter().any(|change| subject.contains(&format!("STREAM.{change}"))),
            "{subject}"
        );
    }
    assert_eq!(last_sequence(&world.relay).await, 3);
}

#[tokio::test]
async fn announcements_stay_in_their_region() {
    let world = World::start(true).await;
    eventually("the leaf is joined", async || leaves(world.region(EUROPE)).await.len() == 1).await;
    let europe = connect(world.region(EUROPE), User::Operator).await;
    let mut heard = europe.subscribe("tidemark.>").await.unwrap();
    europe.flush().await.unwrap();
    let primary = connect(&world.nats.primary, User::Projector).await;
    primary.publish("tidemark.us-east.currency", "{}".into()).await.unwrap();
    // The same way as an answer from the primary, which therefore arrives after it.
    let info = format!("$JS.{PRIMARY}.API.STREAM.INFO.{STREAM}");
    primary.flush().await.unwrap();
    europe.request(info, "".into()).await.unwrap();
    let projector = connect(world.region(EUROPE), User::Projector).await;
    projector.publish("tidemark.eu-west.currency", "{}".into()).await.unwrap();
    let first = timeout(PATIENCE, next(&mut heard)).await.unwrap();
    assert_eq!(first.subject.as_str(), "tidemark.eu-west.currency");
}

async fn next(subscription: &mut async_nats::Subscriber) -> async_nats::Message {
    use futures::StreamExt;
    subscription.next().await.expect("the connection stays")
}
