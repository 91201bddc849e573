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

/// A browser cannot mend its cookie: an answer does, under the key that signs.
#[tokio::test]
async fn a_cookie_of_an_old_key_is_replaced_by_one_that_says_no_less() {
    let world = World::start().await;
    world.stock().await;
    let mut browser = Caller::new(true);
    browser.visit(&world.region).await;
    let old = browser.carried.clone();
    let before = world.region.open(old.trim_start_matches("tidemark="));
    assert_eq!(before.claims().len(), 1);
    let gateways = Box::pin(side_by_side(&world, SIGNING, DROPPED)).await;
    let [primary, primary_dropped, region, region_dropped] = &gateways[..] else {
        panic!("{} gateways", gateways.len())
    };
    let open = |cookie: &str| primary_dropped.open(cookie.trim_start_matches("tidemark="));

    // The key opens still: what the cookie says goes on, whether or not the answer says more.
    for gateway in [primary, region] {
        browser.carried.clone_from(&old);
        browser.ask(gateway, Method::GET, "/v1/currency", None).await;
        assert_eq!(open(&browser.carried), before);
    }

    // The key is gone, and with it what the cookie said: it may have been anything.
    let (row, place) = ("/v1/views/order-detail/o-true-1", "/v1/commands/PlaceOrder");
    for gateway in [primary_dropped, region_dropped] {
        browser.carried.clone_from(&old);
        let read = browser.ask(gateway, Method::GET, row, None).await;
        assert_eq!(read.came_to(), (200, "primary"), "{read:?}");
        let fresh = open(&browser.carried);
        assert!(browser.seen <= fresh.read_position().get() && fresh.claims_dropped(), "{fresh:?}");
        let read = browser.ask(gateway, Method::GET, row, None).await;
        assert_ne!(read.word(), "primary", "the new one is read: {read:?}");

        // What is refused shows its aggregate and no more.
        let request = gateway.request(Method::POST, place).header("cookie", &old);
        let refused = Reply::of(request.json(&order("o-true-1"))).await;
        assert_eq!(refused.came_to(), (422, "rule-violated"));
        assert_eq!((refused.header("set-cookie"), refused.token().as_str()), ("", ""));

        // A write stands for itself, and for all that was there.
        let head = browser.seen;
        browser.carried.clone_from(&old);
        browser.order_count += 1;
        let body = Some(order(&format!("o-true-{}", browser.order_count)).to_string());
        let placed = browser.ask(gateway, Method::POST, place, body).await;
        browser.seen = placed.body["position"].as_u64().unwrap();
        let fresh = open(&browser.carried);
        assert!(head <= fresh.read_position().get() && fresh.claims_dropped(), "{fresh:?}");
        assert_eq!(fresh.claims().last().map(|claim| claim.position.get()), Some(browser.seen));
        browser.visit(gateway).await;
    }
    for gateway in gateways {
        assert!(gateway.end().await);
    }
}
