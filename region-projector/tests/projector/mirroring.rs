//! A region that is not the primary: its mirror, and the link that it comes through.

use std::time::Duration;

use async_nats::jetstream;
use compose::nats::{Topology, User, event_link};
use compose::proxy::Proxies;
use consistency::{Event, Position};
use region_projector::Projector;

use crate::tally::domain;
use crate::world::{PRIMARY, STREAM, World, create_stream, eventually, publish, stop};

const REGION: &str = "eu-west";
const DEADLINE: Duration = Duration::from_secs(20);

/// Primary and region, joined through a proxy.
struct Regions {
    proxies: Proxies,
    primary: jetstream::Context,
    eu: World,
    _topology: Topology,
}

impl Regions {
    async fn start() -> Self {
        let proxies = Proxies::start(0).await.unwrap();
        let mut topology = Topology::start(&proxies, PRIMARY, &[REGION], true).await.unwrap();
        let (user, password) = topology.primary.credentials(User::Operator);
        let options = async_nats::ConnectOptions::with_user_and_password(user, password);
        let client = options.connect(topology.primary.url()).await.unwrap();
        let primary = jetstream::new(client);
        create_stream(&primary).await;
        let eu = World::at(topology.regions.remove(0)).await;
        Self { proxies, primary, eu, _topology: topology }
    }

    async fn add(&self, id: &str, n: i64) -> Position {
        let event: Event = self.eu.log.append(id, "Added", &format!("{{\"n\":{n}}}"));
        publish(&self.primary, &event).await;
        event.at.position
    }

    async fn set_link(&self, up: bool) {
        self.proxies.set_enabled(&event_link(REGION), up).await.unwrap();
    }
}

/// What a metric comes to.
pub fn measured(projector: &Projector, name: &str) -> f64 {
    let metrics = projector.metrics().render();
    let lines = metrics.lines().filter(|line| line.starts_with(name));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

#[tokio::test]
async fn a_region_makes_its_mirror_and_follows_the_primary() {
    let regions = Regions::start().await;
    let first = regions.add("a", 1).await;
    let projector = regions.eu.projector(domain()).await;
    regions.eu.stored(first).await;
    let mut stream = regions.eu.jetstream.get_stream(STREAM).await.unwrap();
    let info = stream.info().await.unwrap();
    let mirror = info.config.mirror.as_ref().unwrap();
    assert_eq!(mirror.external.as_ref().unwrap().api_prefix, "$JS.us-east.API");
    assert_eq!(mirror.filter_subject, None);
    assert!(!info.config.allow_direct && !info.config.mirror_direct);
    let last = regions.add("a", 1).await;
    regions.eu.stored(last).await;
    assert_eq!(regions.eu.tally("a").await, Some((2, 2)));
    assert_eq!(measured(&projector, "tidemark_log_fetched_events_total"), 0.0);

    // Its mirror is deleted under it: made again, and read on.
    regions.eu.jetstream.delete_stream(STREAM).await.unwrap();
    let last = regions.add("a", 1).await;
    regions.eu.stored(last).await;
    assert_eq!(regions.eu.tally("a").await, Some((3, 3)));
    stop(projector).await;
}

#[tokio::test]
async fn a_cut_event_link_is_waited_for_and_followed_within_seconds_of_its_healing() {
    let regions = Regions::start().await;
    let projector = regions.eu.projector(domain()).await;
    let before = regions.add("a", 1).await;
    regions.eu.stored(before).await;
    regions.set_link(false).await;
    let missed = regions.add("a", 1).await;
    // Long enough that the server asked for a new consumer, and waits for an answer that was lost.
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(regions.eu.lowest_checkpoint().await, Some(before), "not around the cut link");
    assert_eq!(measured(&projector, "tidemark_log_fetched_events_total"), 0.0);
    assert!(projector.readiness().is_ready(), "lag does not take a region out");

    regions.set_link(true).await;
    tokio::time::timeout(DEADLINE, regions.eu.stored(missed)).await.expect("within seconds");
    // Whether the mirror moves again or still waits for an answer that was lost.
    let last = regions.add("a", 1).await;
    regions.eu.stored(last).await;
    assert_eq!(regions.eu.tally("a").await, Some((3, 3)));
    stop(projector).await;
}

#[tokio::test]
async fn a_nudge_leaves_the_limits_that_an_operator_gave_the_mirror() {
    let regions = Regions::start().await;
    let first = regions.add("a", 1).await;
    let projector = regions.eu.projector(domain()).await;
    regions.eu.stored(first).await;
    let stream = regions.eu.jetstream.get_stream(STREAM).await.unwrap();
    let mut config = stream.cached_info().config.clone();
    config.max_bytes = 1_000_000_000;
    config.max_age = Duration::from_secs(86_400);
    regions.eu.jetstream.update_stream(&config).await.unwrap();
    let mirror = region_projector::mirror::Mirror::new(&regions.eu.client, STREAM, PRIMARY);
    mirror.nudge().await.unwrap();
    let stream = regions.eu.jetstream.get_stream(STREAM).await.unwrap();
    let found = &stream.cached_info().config;
    assert_eq!((found.max_bytes, found.max_age), (config.max_bytes, config.max_age));
    stop(projector).await;
}

/// Every metric that the expression of a rule names.
fn metrics_of(expression: &str) -> impl Iterator<Item = &str> {
    let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("tidemark_"))
}

#[tokio::test]
async fn every_metric_that_an_alert_names_is_exported() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../compose/prometheus/projector.rules.yml");
    let rules: serde_json::Value =
        serde_saphyr::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let groups = rules["groups"].as_array().unwrap().iter();
    let rules: Vec<_> = groups.flat_map(|group| group["rules"].as_array().unwrap()).collect();
    assert!(5 < rules.len(), "{rules:?}");

    let regions = Regions::start().await;
    let projector = regions.eu.projector(domain()).await;
    regions.eu.stored(regions.add("a", 1).await).await;
    eventually("the mirror is looked at", async || {
        measured(&projector, "tidemark_stream_first_position") == 1.0
    })
    .await;
    let base = format!("http://{}", projector.admin_address());
    let scraped = reqwest::get(format!("{base}/metrics")).await.unwrap().text().await.unwrap();
    for rule in rules {
        let expression = rule["expr"].as_str().unwrap();
        assert!(metrics_of(expression).next().is_some(), "{expression} names no metric");
        for metric in metrics_of(expression) {
            let exported = |line: &str| {
                line.strip_prefix(metric).is_some_and(|rest| rest.starts_with([' ', '{']))
            };
            assert!(scraped.lines().any(exported), "{metric} of {rule} is not in {scraped}");
        }
    }
    let measured = |name| measured(&projector, name);
    assert_eq!(measured("tidemark_stream_margin_positions"), 1.0);
    assert!(measured("tidemark_mirror_silence_seconds") < 30.0);
    assert_eq!(measured("tidemark_projection_hot_key_events"), 1.0);
    stop(projector).await;
}
