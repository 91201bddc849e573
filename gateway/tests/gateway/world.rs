//! Two regions: the primary and one that reads over there when it must.

use std::{collections::HashMap, time::Duration};

use compose::{
    nats::{Server, User},
    postgres::{Cluster, Options},
};
use consistency::{Epoch, EpochHistory, Event, KeyRing, Position, Token, TokenStatus};
use gateway::{GatewayConfig, Running};
use process::config::load_from;
use projection::Domain;
use reqwest::{Method, RequestBuilder, header::HeaderMap};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::projector::Projector;

pub const DEADLINE: Duration = Duration::from_secs(30);
pub const CREDENTIAL: &str = "between regions only";
pub const PRIMARY: &str = "us-east";
pub const REGION: &str = "eu-west";

pub struct World {
    pub primary: Gateway,
    pub region: Gateway,
    pub primary_projector: Projector,
    pub projector: Projector,
    pub nats: Server,
    pub postgres: Cluster,
    region_postgres: Option<Cluster>,
}

/// A gateway that runs in this process.
pub struct Gateway {
    pub base: String,
    pub admin: String,
    pub config: GatewayConfig,
    pub running: Running,
    pub stop: CancellationToken,
}

/// An answer, taken apart.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Value,
    pub text: String,
}

impl World {
    pub async fn start() -> Self {
        Self::with("").await
    }

    /// `more` is added to the configuration of the region's gateway.
    pub async fn with(more: &str) -> Self {
        Self::with_both("", more).await
    }

    /// The same for the primary's and for the region's.
    pub async fn with_both(at_primary: &str, in_region: &str) -> Self {
        Box::pin(Self::begin(at_primary, in_region)).await
    }

    async fn begin(at_primary: &str, in_region: &str) -> Self {
        let (nats, postgres) = tokio::join!(Server::start_single(), Cluster::shared());
        let more = (at_primary, in_region);
        Box::pin(Self::of(nats.unwrap(), postgres.unwrap(), None, more)).await
    }

    /// With Postgres servers that may be stopped and set back, the primary's and the region's.
    pub async fn alone(more: &str) -> Self {
        let cluster = || Cluster::start(Options::default());
        let (nats, postgres, region) =
            tokio::join!(Server::start_single(), Box::pin(cluster()), Box::pin(cluster()));
        let region = Some(region.unwrap());
        Box::pin(Self::of(nats.unwrap(), postgres.unwrap(), region, ("", more))).await
    }

    async fn of(
        nats: Server,
        postgres: Cluster,
        apart: Option<Cluster>,
        (at_primary, in_region): (&str, &str),
    ) -> Self {
        let region_postgres = apart;
        let database = region_postgres.as_ref().unwrap_or(&postgres);
        postgres.create_database("tidemark_log").await.unwrap();
        let primary_projector = Projector::start(PRIMARY, &postgres, &nats).await;
        let projector = Projector::start(REGION, database, &nats).await;
        let primary = primary_config(&postgres, &nats);
        let primary = Gateway::start(&format!("{at_primary}\n{primary}")).await;
        let region = region_config(database, &nats, &primary.base);
        let region = Gateway::start(&format!("{in_region}\n{region}")).await;
        let world =
            Self { primary, region, primary_projector, projector, nats, postgres, region_postgres };
        world.primary.ready().await;
        world.region.ready().await;
        world
    }

    /// The Postgres server of the region, which is its own in a world [`alone`](Self::alone).
    pub fn region_postgres(&mut self) -> &mut Cluster {
        self.region_postgres.as_mut().unwrap_or(&mut self.postgres)
    }

    /// The whole log, as regions read it.
    pub async fn log(&self) -> Vec<Event> {
        let url = format!("{}/internal/log?after=0&limit=5000", self.primary.base);
        let request = reqwest::Client::new().get(url).header("tidemark-credential", CREDENTIAL);
        let text = request.send().await.unwrap().error_for_status().unwrap().text().await.unwrap();
        events_of(&text)
    }

    /// Applies the whole log in the region, and announces it. Answers the head.
    pub async fn catch_up(&mut self) -> Position {
        let log = self.log().await;
        let head = log.last().map_or(Position::ZERO, |last| last.at.position);
        self.projector.apply(&log, head).await;
        self.projector.announce(head).await;
        head
    }

    /// Applies the whole log in the region, and tells nobody.
    pub async fn catch_up_silently(&mut self) -> Position {
        let log = self.log().await;
        let head = log.last().map_or(Position::ZERO, |last| last.at.position);
        self.projector.apply(&log, head).await;
        head
    }

    /// The same at the primary.
    pub async fn catch_up_primary(&mut self) {
        let log = self.log().await;
        let head = log.last().map_or(Position::ZERO, |last| last.at.position);
        self.primary_projector.apply(&log, head).await;
        self.primary_projector.announce(head).await;
    }

    /// A product and a customer for orders to name.
    pub async fn stock(&self) {
        for (command, body) in [
            ("CreateProduct", json!({"product_id": "p-1", "name": "Lamp", "price_cents": 2500})),
            ("RegisterCustomer", json!({"customer_id": "c-1", "name": "Ada"})),
        ] {
            let done = self.primary.command(command, body).await;
            assert_eq!(done.status, 201, "{done:?}");
        }
    }

    /// Places an order at the primary.
    pub async fn place(&self, order_id: &str) -> Reply {
        let placed = self.primary.command("PlaceOrder", order(order_id)).await;
        assert_eq!(placed.status, 201, "{placed:?}");
        placed
    }
}

pub fn order(order_id: &str) -> Value {
    let items = json!([{"product_id": "p-1", "quantity": 1}]);
    json!({"order_id": order_id, "customer_id": "c-1", "items": items})
}

impl Gateway {
    pub async fn start(toml: &str) -> Self {
        Self::start_with(toml, orders::domain().unwrap()).await
    }

    /// With rules of another domain.
    pub async fn start_with(toml: &str, domain: Domain) -> Self {
        let config: GatewayConfig = load_from(toml.parse().expect(toml), "GATEWAY", []).unwrap();
        let stop = CancellationToken::new();
        let running = gateway::start(config.clone(), domain, stop.clone()).await.unwrap();
        let base = format!("http://{}", running.address);
        let admin = format!("http://{}", running.admin_address);
        Self { base, admin, config, running, stop }
    }

    pub async fn ready(&self) {
        eventually("the gateway is ready", async || {
            let url = format!("{}/readyz", self.admin);
            reqwest::get(url).await.is_ok_and(|answer| answer.status() == 200)
        })
        .await;
    }

    /// What `/readyz` says.
    pub async fn readiness(&self) -> Reply {
        Reply::of(reqwest::Client::new().get(format!("{}/readyz", self.admin))).await
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        reqwest::Client::new().request(method, format!("{}{path}", self.base)).timeout(DEADLINE)
    }

    pub async fn get(&self, path: &str) -> Reply {
        Reply::of(self.request(Method::GET, path)).await
    }

    /// Reads with a token and a chain.
    pub async fn read(&self, path: &str, token: &str, policy: &str) -> Reply {
        let mut request = self.request(Method::GET, path);
        if !token.is_empty() {
            request = request.header("consistency-token", token);
        }
        if !policy.is_empty() {
            request = request.header("consistency-policy", policy);
        }
        Reply::of(request).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Reply {
        Reply::of(self.request(Method::POST, path).json(&body)).await
    }

    pub async fn command(&self, name: &str, body: Value) -> Reply {
        self.post(&format!("/v1/commands/{name}"), body).await
    }

    /// How many reads wait.
    pub async fn waiter_count(&self) -> u64 {
        let status = reqwest::get(format!("{}/status", self.admin)).await.unwrap();
        status.json::<Value>().await.unwrap()["waiters"].as_u64().unwrap()
    }

    pub async fn waiters(&self, count: u64) {
        eventually("so many reads wait", async || self.waiter_count().await == count).await;
    }

    pub fn ring(&self) -> KeyRing {
        self.config.key_ring().unwrap()
    }

    /// What a sealed token says.
    pub fn open(&self, sealed: &str) -> Token {
        let status = self.ring().open(sealed, &EpochHistory::first());
        let TokenStatus::Valid(token) = status else { panic!("{sealed:?} is {status:?}") };
        token
    }

    /// A token of a reader of `position`.
    pub fn token_at(&self, at: u64) -> String {
        self.ring().seal(&Token::new(Epoch::FIRST).with_read(position(at)))
    }

    pub async fn end(self) -> bool {
        self.stop.cancel();
        timeout(DEADLINE, self.running.ended()).await.unwrap()
    }
}

impl Reply {
    pub async fn of(request: RequestBuilder) -> Self {
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await.unwrap();
        let body = serde_json::from_str(&text).unwrap_or(Value::Null);
        Self { status, headers, body, text }
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub fn token(&self) -> String {
        self.header("consistency-token").to_owned()
    }

    /// The first word of `Consistency-Status`.
    pub fn word(&self) -> &str {
        self.header("consistency-status").split(';').next().unwrap()
    }

    /// The last part of a problem's type.
    pub fn problem(&self) -> &str {
        assert_eq!(self.header("content-type"), "application/problem+json", "{self:?}");
        self.body["type"].as_str().unwrap().trim_start_matches("/problems/")
    }

    /// How long it says that it waited here, in milliseconds; `None` when it did not. Problems do not say.
    pub fn waited_ms(&self) -> Option<f64> {
        let mut parts = self.header("server-timing").split(", ");
        parts.find_map(|part| part.strip_prefix("wait;dur=")).map(|ms| ms.parse().unwrap())
    }

    /// Status and first word, or status and problem.
    pub fn came_to(&self) -> (u16, &str) {
        if self.word().is_empty() {
            (self.status, self.problem())
        } else {
            (self.status, self.word())
        }
    }
}

/// A page of the log, as regions read it.
pub fn events_of(page: &str) -> Vec<Event> {
    #[derive(serde::Deserialize)]
    struct Line {
        headers: HashMap<String, String>,
        data: String,
    }
    let event = |line| {
        let line: Line = serde_json::from_str(line).unwrap();
        let header = |name: &'static str| line.headers.get(name).map(String::as_str);
        Event::from_message(header, line.data.clone().into_bytes()).unwrap()
    };
    page.lines().map(event).collect()
}

pub fn position(value: u64) -> Position {
    Position::new(value).unwrap()
}

pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds().await {
        assert!(Instant::now() < deadline, "in {DEADLINE:?} it never came true that {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn shared(region: &str, postgres: &Cluster, nats: &Server) -> String {
    let database = postgres.url(&format!("tidemark_{}", region.replace('-', "_")));
    let (user, password) = nats.credentials(User::Operator);
    let nats = nats.url();
    format!(
        r#"
        region = "{region}"
        listen.address = "127.0.0.1:0"
        listen.scheme = "http"
        admin.address = "127.0.0.1:0"
        log.id = "00000000-0000-0000-0000-000000000007"
        database.url = "{database}"
        nats = {{ url = "{nats}", user = "{user}", password = "{password}" }}
        regions.credential = "{CREDENTIAL}"
        auth.mode = "none"
        [token]
        signing_key = 1
        cookie = true
        keys = [{{ id = 1, secret = "0123456789abcdef0123456789abcdef" }}]
        "#
    )
}

pub fn primary_config(postgres: &Cluster, nats: &Server) -> String {
    let shared = shared(PRIMARY, postgres, nats);
    let log = postgres.url("tidemark_log");
    let (user, password) = nats.credentials(User::Relay);
    format!(
        r#"
        primary = true
        log_database.url = "{log}"
        relay = {{ user = "{user}", password = "{password}" }}
        {shared}"#
    )
}

pub fn region_config(postgres: &Cluster, nats: &Server, primary: &str) -> String {
    let shared = shared(REGION, postgres, nats);
    format!("primary_region.name = \"{PRIMARY}\"\nprimary_region.url = \"{primary}\"\n{shared}")
}
