//! Keys of tokens are rotated while old and new gateways run side by side: added everywhere, then signed
//! with, then dropped.

use reqwest::Method;

use crate::world::{Gateway, Reply, World, order, primary_config, region_config};

const OLD: &str = "{ id = 1, secret = \"0123456789abcdef0123456789abcdef\" }";
const NEW: &str = "{ id = 2, secret = \"fedcba9876543210fedcba9876543210\" }";

/// A ring as a release has it in its configuration.
type Ring = (u8, &'static [&'static str]);

const BEFORE: Ring = (1, &[OLD]);
const ADDED: Ring = (1, &[OLD, NEW]);
const SIGNING: Ring = (2, &[OLD, NEW]);
const DROPPED: Ring = (2, &[NEW]);

fn with_ring(toml: &str, (signing, keys): Ring) -> String {
    let ring = toml.replace("signing_key = 1", &format!("signing_key = {signing}"));
    let changed =
        ring.replace(&format!("keys = [{OLD}]"), &format!("keys = [{}]", keys.join(", ")));
    assert!(changed.contains(keys[0]), "{changed}");
    changed
}

/// Both regions with gateways of two releases each, which forward to each other's release.
async fn side_by_side(world: &World, older: Ring, newer: Ring) -> Vec<Gateway> {
    let primary = primary_config(&world.postgres, &world.nats);
    let old = Gateway::start(&with_ring(&primary, older)).await;
    let new = Gateway::start(&with_ring(&primary, newer)).await;
    let region = |base: &str| region_config(&world.postgres, &world.nats, base);
    let old_to_new = Gateway::start(&with_ring(&region(&new.base), older)).await;
    let new_to_old = Gateway::start(&with_ring(&region(&old.base), newer)).await;
    vec![old, new, old_to_new, new_to_old]
}

/// Carries its token in the header, or in the cookie as a browser does.
struct Caller {
    by_cookie: bool,
    carried: String,
    order_count: u32,
    seen: u64,
}

impl Caller {
    fn new(by_cookie: bool) -> Self {
        Self { by_cookie, carried: String::new(), order_count: 0, seen: 0 }
    }

    async fn ask(
        &mut self,
        gateway: &Gateway,
        method: Method,
        path: &str,
        body: Option<String>,
    ) -> Reply {
        let mut request = gateway.request(method, path).header("consistency-policy", "forward");
        if !self.carried.is_empty() {
            let name = if self.by_cookie { "cookie" } else { "consistency-token" };
            request = request.header(name, &self.carried);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        let reply = Reply::of(request).await;
        assert!(reply.status < 300, "{path}: {reply:?}");
        self.carried = if self.by_cookie {
            let cookie = reply.header("set-cookie").split(';').next().unwrap().to_owned();
            assert!(cookie.starts_with("tidemark="), "{reply:?}");
            cookie
        } else {
            reply.token()
        };
        reply
    }

    /// Writes, and reads what it wrote.
    async fn visit(&mut self, gateway: &Gateway) {
        self.order_count += 1;
        let id = format!("o-{}-{}", self.by_cookie, self.order_count);
        let body = Some(order(&id).to_string());
        let placed = self.ask(gateway, Method::POST, "/v1/commands/PlaceOrder", body).await;
        let position = placed.body["position"].as_u64().unwrap();
        assert!(self.seen < position);
        self.seen = position;
        let row = format!("/v1/views/order-detail/{id}");
        let read = self.ask(gateway, Method::GET, &row, None).await;
        assert_eq!(read.body["version"], 1);
        self.ask(gateway, Method::GET, "/v1/currency", None).await;
    }
}

async fn visited(callers: &mut [Caller], gateways: Vec<Gateway>) {
    for caller in callers {
        // There and back, so that every release gets what every other one sealed.
        for gateway in gateways.iter().chain(gateways.iter().rev()) {
            caller.visit(gateway).await;
        }
    }
    for gateway in gateways {
        assert!(gateway.end().await);
    }
}

#[tokio::test]
async fn keys_are_rotated_and_no_caller_sees_an_error_by_header_or_by_cookie() {
    let world = World::start().await;
    world.stock().await;
    let mut callers = [Caller::new(false), Caller::new(true)];
    for (older, newer) in
        [(BEFORE, ADDED), (ADDED, SIGNING), (SIGNING, SIGNING), (SIGNING, DROPPED)]
    {
        let gateways = Box::pin(side_by_side(&world, older, newer)).await;
        visited(&mut callers, gateways).await;
    }
    let last = Box::pin(side_by_side(&world, DROPPED, DROPPED)).await;
    visited(&mut callers, last).await;
}
