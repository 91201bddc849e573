//! Who is let in, and as whom.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use http_body_util::Full;
use process::server::{self, ServerLimits};
use reqwest::Method;
use serde_json::json;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{
    issuer::{AUDIENCE, ISSUER, Issuer, claims},
    world::{CREDENTIAL, Gateway, Reply, World, eventually, order, primary_config, region_config},
};

const OPEN: &str = "auth.mode = \"none\"";
const ROW: &str = "/v1/views/order-detail/o-1";
const CURRENCY: &str = "/v1/currency";

/// A further gateway of the region, with its doors as `doors` says.
async fn region(world: &World, doors: &str) -> Gateway {
    let toml = region_config(&world.postgres, &world.nats, &world.primary.base);
    Gateway::start(&toml.replace(OPEN, doors)).await
}

/// A further gateway of the primary region.
async fn primary(world: &World, doors: &str) -> Gateway {
    Gateway::start(&primary_config(&world.postgres, &world.nats).replace(OPEN, doors)).await
}

fn jwt(keys: &str) -> String {
    format!(
        "auth = {{ mode = \"jwt\", jwt = {{ issuer = \"{ISSUER}\", audiences = [\"{AUDIENCE}\"], \
         keys_interval = \"1h\", {keys} }} }}"
    )
}

/// Keys in a file that can be replaced.
struct KeysFile {
    folder: tempfile::TempDir,
}

impl KeysFile {
    fn of(issuers: &[&Issuer]) -> Self {
        let file = Self { folder: tempfile::tempdir().unwrap() };
        file.replace(issuers);
        file
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("keys.json")
    }

    fn replace(&self, issuers: &[&Issuer]) {
        let new = self.folder.path().join("new.json");
        std::fs::write(&new, Issuer::set(issuers)).unwrap();
        std::fs::rename(new, self.path()).unwrap();
    }

    fn doors(&self) -> String {
        jwt(&format!("keys_file = \"{}\", keys_interval_min = \"1ms\"", self.path().display()))
    }
}

async fn with_bearer(gateway: &Gateway, path: &str, token: &str) -> Reply {
    Reply::of(gateway.request(Method::GET, path).bearer_auth(token)).await
}

#[tokio::test]
async fn every_door_is_shut_to_who_has_no_key() {
    let world = World::start().await;
    let issuer = Issuer::new("one");
    let keys = KeysFile::of(&[&issuer]);
    let guarded = format!("{}\nadmin.credential = \"operators only\"", keys.doors());
    let no_admin = |toml: String| toml.replace(OPEN, &guarded);
    let region = region_config(&world.postgres, &world.nats, &world.primary.base);
    let region = Gateway::start(&no_admin(region)).await;
    let primary = Gateway::start(&no_admin(primary_config(&world.postgres, &world.nats))).await;
    let bearer = issuer.token(claims("ada"));
    for gateway in [&region, &primary] {
        for (method, path) in [
            (Method::GET, ROW),
            (Method::GET, "/v1/views/product-search?q=lamp"),
            (Method::GET, "/v1/aggregates/order/o-1"),
            (Method::GET, "/v1/aggregates/order/o-1/events"),
            (Method::POST, "/v1/aggregates/note/n-1/events"),
            (Method::POST, "/v1/commands/PlaceOrder"),
            (Method::GET, CURRENCY),
            (Method::GET, "/v1/currency/events"),
            (Method::GET, "/internal/log"),
            (Method::GET, "/internal/epochs"),
            (Method::GET, "/nowhere"),
            (Method::OPTIONS, ROW),
        ] {
            let request = || gateway.request(method.clone(), path).json(&order("o-1"));
            let hopping = request().header("tidemark-hop", "eu-west");
            let lying = hopping.header("tidemark-caller", "ada");
            let guessing = request().header("tidemark-credential", "between regions");
            for request in [request(), lying, guessing] {
                let reply = Reply::of(request).await;
                assert_eq!(reply.came_to(), (401, "unauthorized"), "{method} {path}");
                assert!(reply.header("www-authenticate").starts_with("Bearer"), "{reply:?}");
                assert_eq!(reply.token(), "", "a stranger learns no position");
            }
        }
        // What is for regions is not for callers, however well they are known.
        for path in ["/internal/log", "/internal/epochs"] {
            let reply = with_bearer(gateway, path, &bearer).await;
            assert_eq!(reply.came_to(), (401, "unauthorized"), "{path}");
        }
        assert_eq!(with_bearer(gateway, CURRENCY, &bearer).await.status, 200);
        let client = reqwest::Client::new();
        for path in ["/metrics", "/status", "/operations"] {
            let get = || client.get(format!("{}{path}", gateway.admin));
            assert_eq!(get().send().await.unwrap().status(), 401, "{path}");
            assert_eq!(get().bearer_auth(&bearer).send().await.unwrap().status(), 401, "{path}");
            let known = get().bearer_auth("operators only").send().await.unwrap().status();
            assert_ne!(known, 401, "{path}");
        }
    }
    let by_region = primary.request(Method::GET, "/internal/epochs");
    let by_region = Reply::of(by_region.header("tidemark-credential", CREDENTIAL)).await;
    assert_eq!(by_region.status, 200, "{by_region:?}");
    assert!(!by_region.header("tidemark-head").is_empty());
    assert_eq!(with_bearer(&primary, CURRENCY, &bearer).await.header("tidemark-head"), "");
}

#[tokio::test]
async fn a_bearer_token_is_taken_when_everything_about_it_is_right() {
    let world = World::start().await;
    let (issuer, stranger) = (Issuer::new("one"), Issuer::new("one"));
    let keys = KeysFile::of(&[&issuer]);
    let gateway = region(&world, &keys.doors()).await;
    let with = |key: &str, value: serde_json::Value| {
        let mut claims = claims("ada");
        claims[key] = value;
        issuer.token(claims)
    };
    assert_eq!(with_bearer(&gateway, CURRENCY, &issuer.token(claims("ada"))).await.status, 200);
    let several = with("aud", json!(["others", AUDIENCE]));
    assert_eq!(with_bearer(&gateway, CURRENCY, &several).await.status, 200);
    for (wrong, token) in [
        ("signature", stranger.token(claims("ada"))),
        ("expired", with("exp", json!(1_000_000))),
        ("not yet valid", with("nbf", json!(9_999_999_999_u64))),
        ("issuer", with("iss", json!("https://other.example"))),
        ("no issuer", with("iss", json!(null))),
        ("audience", with("aud", json!("others"))),
        ("no audience", with("aud", json!(null))),
        ("no end", with("exp", json!(null))),
        ("nobody", with("sub", json!(""))),
        ("subject is no text", with("sub", json!(7))),
        ("a shared secret", issuer.signed_with_its_public_key(claims("ada"))),
        ("unsigned", issuer.unsigned(claims("ada"))),
        ("no token", "x.y.z".to_owned()),
        ("empty", String::new()),
    ] {
        let reply = with_bearer(&gateway, CURRENCY, &token).await;
        assert_eq!(reply.came_to(), (401, "unauthorized"), "{wrong}");
        assert!(reply.header("www-authenticate").contains("invalid_token"), "{wrong}: {reply:?}");
    }
    let good = issuer.token(claims("ada"));
    let two = gateway.request(Method::GET, CURRENCY).bearer_auth(&good).bearer_auth(&good);
    assert_eq!(Reply::of(two).await.status, 401, "two may be of two callers");
}

#[tokio::test]
async fn keys_of_an_issuer_are_rotated_without_an_error() {
    let world = World::start().await;
    let (old, new) = (Issuer::new("old"), Issuer::new("new"));
    let keys = KeysFile::of(&[&old]);
    let gateway = region(&world, &keys.doors()).await;
    let came_to = async |issuer: &Issuer| {
        with_bearer(&gateway, CURRENCY, &issuer.token(claims("ada"))).await.status
    };
    assert_eq!((came_to(&old).await, came_to(&new).await), (200, 401));
    keys.replace(&[&old, &new]);
    assert_eq!((came_to(&new).await, came_to(&old).await), (200, 200), "read anew at once");
    keys.replace(&[&new]);
    // Who names a key that is not there makes the keys be read.
    assert_eq!(came_to(&Issuer::new("none")).await, 401);
    assert_eq!((came_to(&new).await, came_to(&old).await), (200, 401));
    // A file that is broken off does not take away what is known.
    std::fs::write(keys.path(), "{\"keys\":[").unwrap();
    assert_eq!((came_to(&Issuer::new("none")).await, came_to(&new).await), (401, 200));
}

/// Serves a set of keys, and counts who asks.
struct KeysServer {
    address: SocketAddr,
    asked: Arc<AtomicUsize>,
    set: Arc<Mutex<String>>,
    stop: CancellationToken,
    task: JoinHandle<bool>,
}

impl KeysServer {
    async fn start(address: SocketAddr, set: String) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (asked, set) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(set)));
        let (count, body) = (Arc::clone(&asked), Arc::clone(&set));
        let stop = CancellationToken::new();
        let answer = move |_, _| {
            count.fetch_add(1, Ordering::SeqCst);
            let body = Bytes::from(body.lock().unwrap().clone());
            async { http::Response::new(Full::new(body)) }
        };
        let limits = ServerLimits::default();
        let task = tokio::spawn(server::serve(listener, limits, answer, stop.clone()));
        Self { address, asked, set, stop, task }
    }

    async fn end(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

#[tokio::test]
async fn keys_behind_a_url_are_kept_and_asked_for_no_oftener_than_bounded() {
    let world = World::start().await;
    let (old, new) = (Issuer::new("old"), Issuer::new("new"));
    let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
    let server = KeysServer::start(anywhere, Issuer::set(&[&old])).await;
    let doors = |minimum| {
        let url = format!("http://{}/keys.json", server.address);
        jwt(&format!("keys_url = \"{url}\", keys_interval_min = \"{minimum}\""))
    };
    let strict = region(&world, &doors("1h")).await;
    strict.ready().await;
    let by_old = old.token(claims("ada"));
    assert_eq!(with_bearer(&strict, CURRENCY, &by_old).await.status, 200);
    server.set.lock().unwrap().clone_from(&Issuer::set(&[&old, &new]));
    let by_new = new.token(claims("ada"));
    let flood = (0..50).map(|_| with_bearer(&strict, CURRENCY, &by_new));
    let flood = futures::future::join_all(flood).await;
    assert!(flood.iter().all(|reply| reply.status == 401));
    assert_eq!(server.asked.load(Ordering::SeqCst), 1, "made-up keys must not flood the issuer");
    let quick = region(&world, &doors("1ms")).await;
    assert_eq!(with_bearer(&quick, CURRENCY, &by_new).await.status, 200);
    // While the issuer is away, what was known holds.
    server.end().await;
    assert_eq!(
        with_bearer(&quick, CURRENCY, &Issuer::new("x").token(claims("x"))).await.status,
        401
    );
    assert_eq!(with_bearer(&quick, CURRENCY, &by_new).await.status, 200);
}

#[tokio::test]
async fn without_any_key_nobody_is_called_a_stranger() {
    let world = World::start().await;
    let issuer = Issuer::new("one");
    // An address that nobody listens on, until somebody does.
    let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
    let reserved = std::net::TcpListener::bind(anywhere).unwrap();
    let address = reserved.local_addr().unwrap();
    drop(reserved);
    let keys = format!("keys_url = \"http://{address}/keys.json\", keys_interval_min = \"20ms\"");
    let gateway = region(&world, &jwt(&keys)).await;
    let bearer = issuer.token(claims("ada"));
    let reply = with_bearer(&gateway, CURRENCY, &bearer).await;
    assert_eq!(reply.came_to(), (503, "auth-unavailable"));
    assert_eq!(reply.header("retry-after"), "1");
    let readiness = reqwest::get(format!("{}/readyz", gateway.admin)).await.unwrap();
    assert_eq!(readiness.status(), 503);
    let _server = KeysServer::start(address, Issuer::set(&[&issuer])).await;
    gateway.ready().await;
    eventually("the bearer is let in", async || {
        with_bearer(&gateway, CURRENCY, &bearer).await.status == 200
    })
    .await;
}

#[tokio::test]
async fn each_caller_has_its_own_idempotency_keys_in_every_region() {
    let world = World::start().await;
    world.stock().await;
    let issuer = Issuer::new("one");
    let keys = KeysFile::of(&[&issuer]);
    let (near, far) = (primary(&world, &keys.doors()).await, region(&world, &keys.doors()).await);
    let write = async |gateway: &Gateway, caller: &str, order_id: &str| {
        let request = gateway.request(Method::POST, "/v1/commands/PlaceOrder");
        let request = request.bearer_auth(issuer.token(claims(caller)));
        Reply::of(request.header("idempotency-key", "k").json(&order(order_id))).await
    };
    let first = write(&far, "ada", "o-1").await;
    assert_eq!(first.status, 201, "{first:?}");
    for gateway in [&near, &far] {
        let again = write(gateway, "ada", "o-1").await;
        assert_eq!((again.status, again.header("idempotency-replayed")), (201, "true"));
        assert_eq!(again.body, first.body);
        let other = write(gateway, "ada", "o-2").await;
        assert_eq!(other.came_to(), (422, "idempotency-mismatch"));
    }
    let others = write(&far, "bob", "o-3").await;
    assert_eq!((others.status, others.header("idempotency-replayed")), (201, ""));
    let others = write(&near, "J\u{fc}rgen", "o-4").await;
    assert_eq!((others.status, others.header("idempotency-replayed")), (201, ""));
    let again = write(&far, "J\u{fc}rgen", "o-4").await;
    assert_eq!((again.status, again.header("idempotency-replayed")), (201, "true"));
}

#[tokio::test]
async fn the_word_of_a_balancer_is_taken_from_its_addresses_only() {
    let world = World::start().await;
    let doors = |addresses: &str| {
        format!(
            "auth = {{ mode = \"trusted-header\", \
             trusted_header = {{ name = \"X-User\", addresses = [\"{addresses}\"] }} }}"
        )
    };
    let named = |gateway: &Gateway| gateway.request(Method::GET, CURRENCY).header("x-user", "ada");
    let behind = region(&world, &doors("127.0.0.0/8")).await;
    assert_eq!(Reply::of(named(&behind)).await.status, 200);
    assert_eq!(behind.get(CURRENCY).await.came_to(), (401, "unauthorized"));
    let elsewhere = region(&world, &doors("10.0.0.0/8")).await;
    assert_eq!(Reply::of(named(&elsewhere)).await.came_to(), (401, "unauthorized"));
}

#[tokio::test]
async fn who_asks_too_often_is_told_when_to_come_again_and_nobody_else_suffers() {
    let world = World::start().await;
    let issuer = Issuer::new("one");
    let keys = KeysFile::of(&[&issuer]);
    let limit = "rate_limit = { requests_per_second = 1, burst = 3 }";
    let near = primary(&world, &format!("{limit}\n{OPEN}")).await;
    let toml = region_config(&world.postgres, &world.nats, &near.base);
    let far = Gateway::start(&toml.replace(OPEN, &format!("{limit}\n{}", keys.doors()))).await;
    let ada = issuer.token(claims("ada"));
    let asked = async |token: &str| with_bearer(&far, "/v1/aggregates/order/o-1", token).await;
    let mut refused = Vec::new();
    for _ in 0..20 {
        let reply = asked(&ada).await;
        match reply.status {
            // Forwarded, and the primary does not count what regions send.
            404 => {}
            _ => refused.push(reply),
        }
    }
    assert!(!refused.is_empty(), "twenty at once are more than three and one a second");
    for reply in &refused {
        assert_eq!(reply.came_to(), (429, "rate-limited"));
        assert_eq!(reply.header("retry-after"), "1");
        assert!(reply.body["retry_after_ms"].as_u64().unwrap() <= 1000, "{reply:?}");
    }
    for caller in ["bob", "eve", "mallory", "trent", "walter"] {
        assert_eq!(asked(&issuer.token(claims(caller))).await.status, 404, "{caller}");
    }
}

#[tokio::test]
async fn pages_of_named_origins_may_ask_and_see_the_token_and_no_others() {
    let world = World::start().await;
    let issuer = Issuer::new("one");
    let keys = KeysFile::of(&[&issuer]);
    let origins = "cors = { origins = [\"https://app.example.com\"] }";
    let gateway = region(&world, &format!("{origins}\n{}", keys.doors())).await;
    let path = "/v1/commands/PlaceOrder";
    let preflight = async |origin: &str| {
        let asking = gateway.request(Method::OPTIONS, path).header("origin", origin);
        let asking = asking.header("access-control-request-method", "POST");
        let headers = "authorization,consistency-token,content-type,idempotency-key";
        Reply::of(asking.header("access-control-request-headers", headers)).await
    };
    let allowed = preflight("https://app.example.com").await;
    assert_eq!(allowed.status, 200, "a browser asks without saying who it is: {allowed:?}");
    assert_eq!(allowed.header("access-control-allow-origin"), "https://app.example.com");
    assert_eq!(allowed.header("access-control-allow-credentials"), "true");
    assert!(allowed.header("access-control-allow-methods").contains("POST"));
    assert!(allowed.header("access-control-allow-headers").contains("consistency-token"));
    for other in ["https://app.example.com.evil.example", "http://app.example.com", "null"] {
        let refused = preflight(other).await;
        assert_eq!(refused.header("access-control-allow-origin"), "", "{other}");
    }
    let ask = async |bearer: &str| {
        let asking = gateway.request(Method::GET, CURRENCY).bearer_auth(bearer);
        Reply::of(asking.header("origin", "https://app.example.com")).await
    };
    let good = issuer.token(claims("ada"));
    // A page has to see why it was refused, too.
    for (bearer, status) in [(good.as_str(), 200), ("none", 401)] {
        let reply = ask(bearer).await;
        assert_eq!(reply.status, status);
        assert_eq!(reply.header("access-control-allow-origin"), "https://app.example.com");
        assert!(reply.header("access-control-expose-headers").contains("consistency-token"));
        let varies = reply.headers.get_all("vary").iter();
        assert!(varies.into_iter().any(|value| value.to_str().unwrap().contains("origin")));
    }
}
