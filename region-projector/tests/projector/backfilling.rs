//! A view that gets a field, read through a gateway before, while and after its rows are filled in.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, Ordering};

use compose::nats::User;
use consistency::Event;
use gateway::{GatewayConfig, Running};
use process::config::load_from;
use projection::{Document, Domain, Fold, FoldError, LaterValue, Projection, Rows};
use region_projector::backfill::{BackfillError, Filled, backfill};
use region_projector::config::ApplyConfig;
use region_projector::verify::Extent;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::log::CREDENTIAL;
use crate::tally::TallyEvent;
use crate::world::{LOG_ID, World, eventually, stop};

#[derive(Serialize, Deserialize)]
struct Gauge {
    sum: i64,
    count: i64,
}

/// What a row says of a gauge.
#[derive(Serialize)]
struct Row {
    sum: i64,
    count: i64,
    /// The field that came later.
    #[serde(skip_serializing_if = "Option::is_none")]
    mean: Option<i64>,
}

struct Gauges {
    has_mean: bool,
}

impl Fold for Gauges {
    type State = Gauge;
    type Event = TallyEvent;

    fn fold(
        &self,
        state: Option<Gauge>,
        event: TallyEvent,
        _: &Event,
    ) -> Result<Option<Gauge>, FoldError> {
        let mut gauge = state.unwrap_or(Gauge { sum: 0, count: 0 });
        match event {
            TallyEvent::Added { n } => {
                gauge.sum += n;
                gauge.count += 1;
            }
            TallyEvent::Moved { .. } => {}
            TallyEvent::Removed {} => return Ok(None),
        }
        Ok(Some(gauge))
    }
}

impl Document for Gauges {
    fn rows(&self, gauge: &Gauge, rows: &mut Rows<'_>) {
        let Gauge { sum, count } = *gauge;
        let row = Row { sum, count, mean: self.has_mean.then(|| sum / count) };
        rows.row("gauge", &row);
        rows.item("gauges", if sum < 1000 { "small" } else { "large" }, &row);
    }
}

fn before() -> Domain {
    let gauges = Projection::document("gauges", 1, "tally", Gauges { has_mean: false });
    Domain::builder().projection(gauges.row("gauge").list("gauges")).build().unwrap()
}

fn after_with(mean: LaterValue) -> Domain {
    let gauges = Projection::document("gauges", 1, "tally", Gauges { has_mean: true });
    let gauges = gauges.row("gauge").list("gauges");
    let gauges = gauges.later("gauge", "mean", mean).later("gauges", "mean", mean);
    Domain::builder().projection(gauges).build().unwrap()
}

fn after() -> Domain {
    after_with(|row| (row["sum"].as_i64().unwrap() / row["count"].as_i64().unwrap()).into())
}

/// A gateway of the region, of a later release.
struct Gateway {
    base: String,
    running: Running,
    stop: CancellationToken,
}

impl Gateway {
    async fn start(world: &World, domain: Domain) -> Self {
        let (user, password) = world.nats.credentials(User::Operator);
        let (nats, database, log) = (world.nats.url(), &world.database_url, world.log.address);
        let toml = format!(
            r#"
            region = "us-east"
            primary_region = {{ name = "elsewhere", url = "http://{log}" }}
            listen.address = "127.0.0.1:0"
            listen.scheme = "http"
            admin.address = "127.0.0.1:0"
            log.id = "{LOG_ID}"
            database.url = "{database}"
            nats = {{ url = "{nats}", user = "{user}", password = "{password}" }}
            regions.credential = "{CREDENTIAL}"
            auth.mode = "none"
            [token]
            signing_key = 1
            keys = [{{ id = 1, secret = "0123456789abcdef0123456789abcdef" }}]
            "#
        );
        let config: GatewayConfig = load_from(toml.parse().unwrap(), "GATEWAY", []).unwrap();
        let stop = CancellationToken::new();
        let running = Box::pin(gateway::start(config, domain, stop.clone())).await.unwrap();
        let base = format!("http://{}", running.address);
        Self { base, running, stop }
    }

    /// Status, entity tag, whether it came from memory, and text of what this region has.
    async fn get(&self, path: &str) -> (u16, String, String, String) {
        let request = reqwest::Client::new().get(format!("{}{path}", self.base));
        let answer = request.header("consistency-policy", "eventual").send().await.unwrap();
        let status = answer.status().as_u16();
        let header = |name| {
            let value = answer.headers().get(name).map(|value| value.to_str().unwrap());
            value.unwrap_or_default().to_owned()
        };
        let (tag, cache) = (header("etag"), header("cache-status"));
        (status, tag, cache, answer.text().await.unwrap())
    }

    /// The row of a gauge, and its tag.
    async fn row(&self, id: &str) -> (Value, String, String) {
        let (status, tag, _, text) = self.get(&format!("/v1/views/gauge/{id}")).await;
        assert_eq!(status, 200, "{text}");
        (serde_json::from_str(&text).unwrap(), tag, text)
    }

    async fn list(&self) -> String {
        let (status, _, _, text) = self.get("/v1/views/gauges/small?limit=100").await;
        assert_eq!(status, 200, "{text}");
        let items: Value = serde_json::from_str(&text).unwrap();
        for item in items["items"].as_array().unwrap() {
            assert!(item["data"]["mean"].is_i64(), "{item}");
        }
        text
    }

    async fn end(self) {
        self.stop.cancel();
        self.running.ended().await;
    }
}

const LACKING: &str = "select (select count(*) from gauges_v1_gauge where data->'mean' is null)
    + (select count(*) from gauges_v1_gauges where data->'mean' is null)";

impl World {
    /// Forty gauges whose rows have no mean.
    async fn with_gauges() -> Self {
        let world = Self::start().await;
        let projector = world.projector(before()).await;
        let mut last = world.add("g-0", 7).await;
        for n in 1..40 {
            world.add(&format!("g-{n}"), n).await;
            last = world.add(&format!("g-{n}"), 2 * n + 1).await;
        }
        world.all_positions(last).await;
        stop(projector).await;
        assert_eq!(world.count(LACKING).await, 80);
        world
    }

    async fn backfill(&self, domain: &Domain, rate: u32) -> Result<Filled, BackfillError> {
        let definition = domain.projection("gauges", 1).unwrap();
        let rate = NonZeroU32::new(rate).unwrap();
        backfill(&self.pool, definition, rate, &ApplyConfig::default()).await
    }
}

#[tokio::test]
async fn a_field_that_came_later_is_there_before_while_and_after_rows_are_filled_in() {
    let world = World::with_gauges().await;
    let projector = world.projector(after()).await;
    let gateway = Gateway::start(&world, after()).await;
    eventually("the gateway has the region's rows", async || {
        gateway.get("/v1/views/gauge/g-3").await.0 == 200
    })
    .await;
    let (row, tag, text) = gateway.row("g-3").await;
    assert_eq!(row["data"]["mean"], 5, "of 3 and 7: {row}");
    gateway.list().await;
    eventually("the row is kept in memory", async || {
        let (_, _, cache, kept) = gateway.get("/v1/views/gauge/g-3").await;
        assert_eq!(kept, text);
        cache.contains("hit")
    })
    .await;

    let is_done = AtomicBool::new(false);
    let domain = after();
    let filling = async {
        let filled = world.backfill(&domain, 40).await.unwrap();
        is_done.store(true, Ordering::Relaxed);
        filled
    };
    let going_on = async {
        let mut last = world.add("g-new", 1).await;
        while !is_done.load(Ordering::Relaxed) {
            last = world.add("g-0", 1).await;
            world.all_positions(last).await;
            let (row, _, _) = gateway.row("g-0").await;
            let said = |field: &str| row["data"][field].as_i64().unwrap();
            assert_eq!(said("mean"), said("sum") / said("count"), "{row}");
            assert_eq!(gateway.row("g-3").await.1, tag);
            assert_eq!(gateway.row("g-39").await.0["data"]["mean"], 59);
            gateway.list().await;
        }
        last
    };
    let (filled, last) = tokio::join!(filling, going_on);
    world.all_positions(last).await;
    assert!((70..=80).contains(&filled.row_count), "all but what events have mended: {filled:?}");
    assert_eq!(world.count(LACKING).await, 0);
    let kept = (row, tag, text);
    assert_eq!(gateway.row("g-3").await, kept, "from memory");
    gateway.end().await;
    let anew = Gateway::start(&world, after()).await;
    eventually("the gateway has the region's rows", async || {
        anew.get("/v1/views/gauge/g-3").await.0 == 200
    })
    .await;
    assert_eq!(anew.row("g-3").await, kept, "from the filled row, to the byte");
    anew.end().await;
    stop(projector).await;
}

#[tokio::test]
async fn filling_in_goes_on_where_it_ended_and_leaves_nothing_to_verify() {
    let world = World::with_gauges().await;
    let projector = world.projector(after()).await;
    eventually("the tables are there", async || projector.readiness().is_ready()).await;
    let domain = after();
    // Ended in the middle.
    let filling = world.backfill(&domain, 40);
    let begun =
        eventually("some are filled in", async || (1..80).contains(&world.count(LACKING).await));
    tokio::select! {
        filled = filling => panic!("too fast: {filled:?}"),
        () = begun => {}
    }
    let left = world.count(LACKING).await;
    let filled = world.backfill(&domain, 10_000).await.unwrap();
    assert!(0 < filled.row_count && filled.row_count <= left as u64, "{filled:?} of {left}");
    assert_eq!(world.count(LACKING).await, 0);
    assert_eq!(world.backfill(&domain, 1).await.unwrap(), Filled::default());
    let definition = domain.projection("gauges", 1).unwrap();
    let verified = world.verified_as(definition, Extent::Whole).await.unwrap();
    assert!(verified.is_sound(), "{verified:?}");
    stop(projector).await;
}

#[tokio::test]
async fn a_value_that_is_not_what_the_rules_make_is_not_written() {
    let world = World::with_gauges().await;
    let wrong = after_with(|row| row["sum"].clone());
    let error = world.backfill(&wrong, 10_000).await.unwrap_err();
    assert!(matches!(&error, BackfillError::Differs { view, .. } if view == "gauge"), "{error:?}");
    assert_eq!(world.count(LACKING).await, 80);
}
