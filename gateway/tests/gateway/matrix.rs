//! Every state of the region, by every chain, by every way to carry a token.

use consistency::{Epoch, Key, KeyId, KeyRing, LogId, Position, Token};
use event_store::{Above, NewEpoch, open_epoch};
use reqwest::Method;
use serde_json::json;
use sqlx::PgPool;
use uuid::Uuid;

use crate::world::{CREDENTIAL, Reply, World, eventually, position};

const CHAINS: [&str; 12] = [
    "",
    "wait",
    "wait;ms=1",
    "forward",
    "pending",
    "primary",
    "eventual",
    "wait, forward",
    "wait;ms=1, pending",
    "forward, pending",
    "wait;ms=1, forward, pending",
    "forward, eventual",
];
const SHIPPED: &str = "wait, forward";
/// Waits are short here, since nobody moves; a machine that is busy has its time for all the rest.
const SETTINGS: &str = r#"
    read.wait_max = "20ms"
    read.refresh_interval = "100ms"
    read.query_timeout = "30s"
    listen.request_timeout = "30s"
    # What waits there in vain until its answer is due is no reason to leave the primary alone here.
    primary_region.breaker_failures_max = 1000
"#;
const LIST: &str = "/v1/views/orders-by-customer/c-1";

type CameTo = (u16, &'static str);

/// How a caller shows its token.
#[derive(Debug, Clone, Copy)]
enum Carrier {
    Header,
    Cookie,
    None,
}

/// What each step can come to in some state.
#[derive(Debug, Clone, Copy)]
struct State {
    /// At once, when there is nothing to be asked of anybody.
    served: Option<CameTo>,
    /// By the primary.
    forwarded: Option<CameTo>,
    /// By the primary, as of its head.
    primary: Option<CameTo>,
    /// Whatever is here.
    eventual: CameTo,
    /// When no step helps.
    refused: CameTo,
}

impl State {
    const CURRENT: Self = Self {
        served: Some((200, "local")),
        forwarded: None,
        primary: Some((200, "primary")),
        eventual: (200, "local"),
        refused: (0, "served before"),
    };
    const BEHIND: Self = Self {
        served: None,
        forwarded: Some((200, "forwarded")),
        primary: Some((200, "primary")),
        eventual: (200, "stale"),
        refused: (503, "replication-pending"),
    };
    const BEYOND: Self = Self { forwarded: None, primary: None, ..Self::BEHIND };
    const PARKED: Self = Self { refused: (503, "parked"), ..Self::BEHIND };

    /// What is refused for its token, whatever the chain.
    const fn not_taken(status: u16, problem: &'static str) -> Self {
        let refused = Some((status, problem));
        Self { served: refused, primary: refused, ..Self::CURRENT }
    }

    /// Whether it waits here for a millisecond before it is answered; `None` where how long is not the
    /// chain's to say, or the answer does not tell.
    fn waits(&self, chain: &str) -> Option<bool> {
        let is_behind = self.served.is_none() && self.refused == Self::BEHIND.refused;
        let first = chain.split(", ").next().unwrap_or_default();
        match first {
            _ if self.comes_to(chain).0 == 503 => None,
            _ if !is_behind => Some(false),
            "" | "wait" => None,
            first => Some(first == "wait;ms=1"),
        }
    }

    /// The chain, told as its documentation tells it.
    fn comes_to(&self, chain: &str) -> CameTo {
        let chain = if chain.is_empty() { SHIPPED } else { chain };
        for step in chain.split(", ") {
            if let (Some(served), false) = (self.served, step == "primary") {
                return served;
            }
            let answered = match step {
                "forward" => self.forwarded,
                "primary" => self.primary,
                "pending" => Some((202, "pending")),
                "eventual" => Some(self.eventual),
                wait => {
                    assert!(wait.starts_with("wait"), "{wait}");
                    None
                }
            };
            if let Some(answered) = answered {
                return answered;
            }
        }
        if chain.ends_with("primary") { (503, "primary-unreachable") } else { self.refused }
    }
}

/// Every chain over a row and a list, with the token carried in one way.
async fn check(world: &World, carrier: Carrier, (token, path): (&str, &str), state: State) {
    let asked = CHAINS.map(async |chain| {
        let mut request = world.region.request(Method::GET, path);
        request = match carrier {
            Carrier::Header => request.header("consistency-token", token),
            Carrier::Cookie => request.header("cookie", format!("tidemark={token}")),
            Carrier::None => request,
        };
        if !chain.is_empty() {
            request = request.header("consistency-policy", chain);
        }
        if state.forwarded.is_none() && state.served.is_none() {
            // A list that is nowhere is waited for at the primary until its answer is due.
            request = request.header("tidemark-credential", CREDENTIAL);
            request = request.header("tidemark-deadline-ms", "3000");
        }
        (chain, Reply::of(request).await)
    });
    for (chain, reply) in futures::future::join_all(asked).await {
        let expected = state.comes_to(chain);
        assert_eq!(reply.came_to(), expected, "{carrier:?} {chain:?} {path}: {reply:?}");
        if let Some(waits) = state.waits(chain) {
            let long_enough = reply.waited_ms().map(|ms| 1.0 <= ms);
            assert_eq!(long_enough, waits.then_some(true), "{chain:?} {path}: {reply:?}");
        }
        let shipped = reply.header("consistency-token");
        assert!(!shipped.is_empty() || expected.0 == 400, "{carrier:?} {chain:?}: {reply:?}");
    }
}

/// By header and by cookie alike, and without a token as `bare`.
async fn check_all(
    world: &World,
    token: &str,
    row: (&str, State),
    list: State,
    bare: (State, State),
) {
    for (path, state, bare) in [(row.0, row.1, bare.0), (LIST, list, bare.1)] {
        check(world, Carrier::Header, (token, path), state).await;
        check(world, Carrier::Cookie, (token, path), state).await;
        check(world, Carrier::None, ("", path), bare).await;
    }
}

fn row(order_id: &str) -> String {
    format!("/v1/views/order-detail/{order_id}")
}

/// The region has applied what the primary has, and knows it.
async fn settle(world: &mut World) -> Position {
    let head = world.catch_up().await;
    world.catch_up_primary().await;
    for gateway in [&world.region, &world.primary] {
        eventually("the hints are heard", async || {
            let stands = gateway.get("/v1/currency").await.body;
            stands["projections"][0]["applied"] == head.get()
        })
        .await;
    }
    head
}

#[tokio::test]
async fn a_region_that_is_current_behind_or_asked_too_much_follows_every_chain() {
    let mut world = World::with(SETTINGS).await;
    world.stock().await;
    let first = world.place("o-1").await.token();
    settle(&mut world).await;
    let (current, behind) = (State::CURRENT, State::BEHIND);
    let o_1 = row("o-1");
    check_all(&world, &first, (&o_1, current), current, (current, current)).await;

    // While another version is being built nothing changes: it is not the one that is read.
    for statement in [
        "insert into projection_version values ('orders', 2, 16, false)",
        "insert into checkpoint (projection, version, partition, epoch, position, event_id, fence)
         select 'orders', 2, n, 1, 0, gen_random_uuid(), 0 from generate_series(0, 15) as n",
    ] {
        sqlx::query(statement).execute(&world.projector.pool).await.unwrap();
    }
    check_all(&world, &first, (&o_1, current), current, (current, current)).await;

    // One event behind: a row that is not here yet, and a list that is.
    let second = world.place("o-2").await.token();
    world.catch_up_primary().await;
    let absent = State { eventual: (404, "stale"), ..behind };
    let unknown = State { served: Some((404, "local")), eventual: (404, "local"), ..current };
    check_all(&world, &second, (&row("o-2"), absent), behind, (unknown, current)).await;

    // Hundreds behind: a row that has not changed, for a caller who has seen all the rest.
    let events: Vec<_> = (0..300).map(|_| json!({"type": "Noted", "data": {}})).collect();
    let noted = world.primary.post("/v1/aggregates/note/n-1/events", json!({"events": events}));
    let head = noted.await.body["position"].as_u64().unwrap();
    world.catch_up_primary().await;
    let far = world.region.token_at(head);
    check_all(&world, &far, (&o_1, behind), behind, (current, current)).await;

    // A token of another log is no token, and a browser cannot help having it.
    let key = Key::new(KeyId(1), b"0123456789abcdef0123456789abcdef").unwrap();
    let other = KeyRing::new(LogId::new(Uuid::from_u128(8)), vec![key], KeyId(1)).unwrap();
    let other = other.seal(&Token::new(Epoch::FIRST).with_read(position(1)));
    let refused = State::not_taken(400, "invalid-token");
    let mended = State { served: Some((200, "primary")), ..current };
    for path in [o_1.as_str(), LIST] {
        check(&world, Carrier::Header, (&other, path), refused).await;
        check(&world, Carrier::Cookie, (&other, path), mended).await;
    }

    // An epoch that nobody knows, and a position that nobody has reached.
    let newer = Token::new(Epoch::new(2).unwrap()).with_read(position(1));
    let newer = world.region.ring().seal(&newer);
    let beyond = State::BEYOND;
    check_all(&world, &newer, (&o_1, beyond), beyond, (current, current)).await;
    let reached = world.region.token_at(head + 1000);
    check_all(&world, &reached, (&o_1, beyond), beyond, (current, current)).await;
}

#[tokio::test]
async fn a_region_with_a_parked_aggregate_follows_every_chain() {
    let mut world = World::with(SETTINGS).await;
    world.stock().await;
    let writer = world.place("o-1").await.token();
    let head = settle(&mut world).await;
    world.projector.park("o-1", head).await;
    let parked = State::PARKED;
    // Who was promised nothing is served what is here, and told.
    let told = State { served: Some((200, "stale")), eventual: (200, "stale"), ..State::CURRENT };
    check_all(&world, &writer, (&row("o-1"), parked), parked, (told, told)).await;
    // Who has only seen it is owed the row and not the list.
    let reader = world.region.token_at(head.get());
    check_all(&world, &reader, (&row("o-1"), parked), told, (told, told)).await;
}

#[tokio::test]
async fn a_region_in_a_newer_epoch_follows_every_chain() {
    let mut world = World::with(SETTINGS).await;
    world.stock().await;
    let kept = world.place("o-1").await.token();
    let head = settle(&mut world).await;
    let log = PgPool::connect(&world.postgres.url("tidemark_log")).await.unwrap();
    let log_id = LogId::new(world.primary.config.log.id);
    open_epoch(&log, log_id, NewEpoch { after: head, force: true, above: Above::Refuse })
        .await
        .unwrap();
    for pool in [&world.projector.pool, &world.primary_projector.pool] {
        sqlx::query("insert into adopted_epoch values (2, $1)")
            .bind(head.as_i64())
            .execute(pool)
            .await
            .unwrap();
        sqlx::query("update checkpoint set epoch = 2").execute(pool).await.unwrap();
    }
    let asking = world.primary.request(Method::GET, "/internal/epochs");
    Reply::of(asking.header("tidemark-credential", CREDENTIAL)).await;
    for gateway in [&world.region, &world.primary] {
        eventually("the epoch is known", async || {
            gateway.get("/v1/currency").await.body["epoch"] == 2
        })
        .await;
        eventually("the checkpoints are seen", async || {
            gateway.read(LIST, &kept, "wait;ms=1").await.status == 200
        })
        .await;
    }
    let current = State::CURRENT;
    check_all(&world, &kept, (&row("o-1"), current), current, (current, current)).await;
    // What the newer epoch did not keep is confessed, whatever was asked.
    let lost = world.region.token_at(head.get() + 1);
    let confessed = State::not_taken(409, "write-lost");
    check_all(&world, &lost, (&row("o-1"), confessed), confessed, (current, current)).await;
}
