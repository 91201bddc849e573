//! Writes under an idempotency key, and writes that must name a version.

use consistency::{Epoch, EpochHistory, LogId, TokenStatus};
use event_store::{Above, NewEpoch};
use futures::future::join_all;
use orders::{Customer, CustomerEvent, Customers};
use projection::{Command, CommandError, Domain, Found};
use reqwest::Method;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};
use sqlx::{PgPool, Postgres, Transaction};

use crate::world::{self, CREDENTIAL, Gateway, Reply, World, eventually, order, position};

const EVENTS: &str = "/v1/aggregates/note/n-1/events";
const PLACE: &str = "/v1/commands/PlaceOrder";
const ADD: &str = "/v1/commands/AddItem";
const NAME: &str = "/v1/commands/NameCustomer";

fn noted(text: &str) -> Value {
    json!({"events": [{"type": "Noted", "data": {"text": text}}]})
}

async fn keyed(gateway: &Gateway, key: &str, path: &str, body: &Value) -> Reply {
    let request = gateway.request(Method::POST, path).header("idempotency-key", key);
    Reply::of(request.json(body)).await
}

fn is_replayed(reply: &Reply) -> bool {
    reply.header("idempotency-replayed") == "true"
}

/// What a repeat has in common with the first answer.
fn answer(reply: &Reply) -> (u16, &str, &str, &str) {
    (reply.status, &reply.text, reply.header("etag"), reply.header("location"))
}

fn assert_first(reply: &Reply, status: u16) {
    assert_eq!((reply.status, reply.header("idempotency-replayed")), (status, ""), "{reply:?}");
}

fn assert_repeats(repeat: &Reply, first: &Reply) {
    assert_eq!(answer(repeat), answer(first));
    assert!(is_replayed(repeat), "{repeat:?}");
}

/// Another gateway of the primary region, configured a little differently.
async fn beside(world: &World, more: &str) -> Gateway {
    let config = world::primary_config(&world.postgres, &world.nats);
    let gateway = Gateway::start(&format!("{more}\n{config}")).await;
    gateway.ready().await;
    gateway
}

fn log_database(world: &World) -> PgPool {
    PgPool::connect_lazy(&world.postgres.url("tidemark_log")).unwrap()
}

async fn hold_head(pool: &PgPool) -> Transaction<'static, Postgres> {
    let mut lock = pool.begin().await.unwrap();
    sqlx::query("select from log_head for update").execute(&mut *lock).await.unwrap();
    lock
}

/// Waits until a statement like `pattern` waits for a lock.
async fn until_blocked(pool: &PgPool, pattern: &str) {
    eventually("the statement waits for a lock", async || {
        let waiting: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity
             where datname = current_database() and wait_event_type = 'Lock' and query like $1",
        )
        .bind(pattern)
        .fetch_one(pool)
        .await
        .unwrap();
        0 < waiting
    })
    .await;
}

#[tokio::test]
async fn a_repeat_is_answered_like_the_first_in_any_region_whatever_came_after() {
    let world = World::start().await;
    let first = keyed(&world.region, "k", EVENTS, &noted("a")).await;
    assert_first(&first, 201);
    assert_eq!(world.primary.post(EVENTS, noted("b")).await.status, 200);
    for gateway in [&world.primary, &world.region] {
        let request = gateway.request(Method::POST, EVENTS).header("idempotency-key", "k");
        let request = request.header("consistency-token", gateway.token_at(2));
        let repeat = Reply::of(request.json(&noted("a"))).await;
        assert_repeats(&repeat, &first);
        let token = gateway.open(&repeat.token());
        assert_eq!(token.read_position(), position(2), "what was sent");
        assert_eq!(
            token.claims(),
            gateway.open(&first.token()).claims(),
            "what was answered first"
        );
    }
    // A precondition was met by the first request; who repeats it may know more by now.
    let request = world.region.request(Method::POST, EVENTS).header("idempotency-key", "k");
    let repeat = Reply::of(request.header("if-match", "\"1.2\"").json(&noted("a"))).await;
    assert_repeats(&repeat, &first);
    assert_eq!(world.log().await.len(), 2);
}

#[tokio::test]
async fn another_body_under_a_key_is_refused_and_another_path_has_other_keys() {
    let world = World::start().await;
    world.stock().await;
    assert_first(&keyed(&world.region, "k", EVENTS, &noted("a")).await, 201);
    assert_first(&keyed(&world.region, "k", PLACE, &order("o-1")).await, 201);
    for (path, body) in [(EVENTS, noted("b")), (PLACE, order("o-2"))] {
        for gateway in [&world.primary, &world.region] {
            let refused = keyed(gateway, "k", path, &body).await;
            assert_eq!(refused.came_to(), (422, "idempotency-mismatch"));
            assert!(!is_replayed(&refused));
        }
    }
    assert_first(
        &keyed(&world.region, "k", "/v1/aggregates/note/n-2/events", &noted("b")).await,
        201,
    );
    assert_first(&keyed(&world.region, "l", EVENTS, &noted("b")).await, 200);
    assert_eq!(world.log().await.len(), 6);
}

#[tokio::test]
async fn repeats_that_race_through_two_gateways_and_a_region_get_one_answer() {
    let world = World::start().await;
    world.stock().await;
    let other = beside(&world, "").await;
    for (path, body) in [(EVENTS, noted("a")), (PLACE, order("o-1"))] {
        let gateways = [&world.primary, &other, &world.region].into_iter().cycle().take(12);
        let replies = join_all(gateways.map(|gateway| keyed(gateway, "k", path, &body))).await;
        let firsts: Vec<_> = replies.iter().filter(|reply| !is_replayed(reply)).collect();
        assert_eq!(firsts.len(), 1, "{replies:?}");
        assert_first(firsts[0], 201);
        for reply in &replies {
            assert_eq!(answer(reply), answer(firsts[0]));
        }
    }
    assert_eq!(world.log().await.len(), 4);
}

#[tokio::test]
async fn a_command_is_not_refused_for_what_it_did_itself() {
    let world = World::start().await;
    world.stock().await;
    let placed = keyed(&world.region, "k", PLACE, &order("o-1")).await;
    assert_first(&placed, 201);
    assert_eq!(world.region.command("PlaceOrder", order("o-1")).await.status, 422, "no key");
    let cancelled = world.region.command("CancelOrder", json!({"order_id": "o-1"})).await;
    assert_eq!(cancelled.status, 200, "{cancelled:?}");
    assert_repeats(&keyed(&world.region, "k", PLACE, &order("o-1")).await, &placed);
    let token = world.region.open(&keyed(&world.region, "k", PLACE, &order("o-1")).await.token());
    assert_eq!(token.claims(), world.region.open(&placed.token()).claims());
}

/// Its answer is looked up before anything else is done, so what would stop a first request now does not
/// stop a repeat.
#[tokio::test]
async fn the_repeat_of_a_command_needs_no_append() {
    let world = World::start().await;
    world.stock().await;
    world.place("o-1").await;
    // One that its rules would allow again.
    let add = |quantity| json!({"order_id": "o-1", "product_id": "p-1", "quantity": quantity});
    let first = keyed(&world.region, "k", ADD, &add(1)).await;
    assert_first(&first, 200);
    let strict = beside(&world, "write.if_match_required = [\"order\"]").await;
    assert_eq!(strict.command("AddItem", add(1)).await.came_to(), (428, "precondition-required"));
    assert_repeats(&keyed(&strict, "k", ADD, &add(1)).await, &first);
    let repeated = async |why: &str| {
        for gateway in [&world.primary, &world.region] {
            let repeat = keyed(gateway, "k", ADD, &add(1)).await;
            assert_eq!(answer(&repeat), answer(&first), "{why}");
            assert!(is_replayed(&repeat), "{why}");
            let other = keyed(gateway, "k", ADD, &add(2)).await;
            assert_eq!(other.came_to(), (422, "idempotency-mismatch"), "{why}");
        }
    };
    let pool = log_database(&world);
    let head = hold_head(&pool).await;
    repeated("appends stand in line").await;
    head.rollback().await.unwrap();
    let refuse = "update log_head set refused_because = 'an operator said so'";
    sqlx::query(refuse).execute(&pool).await.unwrap();
    let refused = keyed(&world.region, "l", ADD, &add(1)).await;
    assert_eq!(refused.came_to(), (503, "primary-unreachable"));
    repeated("the log takes no appends").await;
}

/// Its key is looked up where it cannot be appended; where it can, the append itself finds it.
#[tokio::test]
async fn the_repeat_of_an_append_is_answered_where_nothing_can_be_appended() {
    let world = World::start().await;
    let first = keyed(&world.region, "k", EVENTS, &noted("one")).await;
    assert_first(&first, 201);
    let strict = beside(&world, "write.if_match_required = [\"note\"]").await;
    let unkeyed = strict.post(EVENTS, noted("two")).await;
    assert_eq!(unkeyed.came_to(), (428, "precondition-required"));
    assert_repeats(&keyed(&strict, "k", EVENTS, &noted("one")).await, &first);
    let other = keyed(&strict, "k", EVENTS, &noted("two")).await;
    assert_eq!(other.came_to(), (422, "idempotency-mismatch"));
    let refuse = "update log_head set refused_because = 'an operator said so'";
    sqlx::query(refuse).execute(&log_database(&world)).await.unwrap();
    for gateway in [&world.primary, &world.region] {
        let refused = keyed(gateway, "l", EVENTS, &noted("one")).await;
        assert_eq!(refused.came_to(), (503, "primary-unreachable"));
        let repeat = keyed(gateway, "k", EVENTS, &noted("one")).await;
        assert_eq!((answer(&repeat), is_replayed(&repeat)), (answer(&first), true));
        let other = keyed(gateway, "k", EVENTS, &noted("two")).await;
        assert_eq!(other.came_to(), (422, "idempotency-mismatch"));
    }
}

/// It may have been made by a release that is being deployed beside this one.
#[tokio::test]
async fn an_answer_by_rules_that_are_not_known_here_is_not_told_by_those_that_are() {
    let world = World::start().await;
    world.stock().await;
    let pool = log_database(&world);
    for (path, body) in [(EVENTS, noted("a")), (PLACE, order("o-1"))] {
        let first = keyed(&world.region, "k", path, &body).await;
        assert_first(&first, 201);
        let newer = "update idempotency set answer_format = answer_format + 1";
        sqlx::query(newer).execute(&pool).await.unwrap();
        for gateway in [&world.primary, &world.region] {
            let refused = keyed(gateway, "k", path, &body).await;
            assert_eq!(refused.came_to(), (503, "primary-unreachable"), "{refused:?}");
        }
        let ours = "update idempotency set answer_format = answer_format - 1";
        sqlx::query(ours).execute(&pool).await.unwrap();
        assert_repeats(&keyed(&world.region, "k", path, &body).await, &first);
    }
    assert_eq!(world.log().await.len(), 4);
}

#[tokio::test]
async fn a_refusal_is_not_remembered() {
    let world = World::start().await;
    let refused = keyed(&world.region, "k", PLACE, &order("o-1")).await;
    assert_eq!(refused.came_to(), (422, "rule-violated"));
    world.stock().await;
    assert_first(&keyed(&world.region, "k", PLACE, &order("o-1")).await, 201);
}

/// Gives a customer a name, and is content with one who has it already.
#[derive(Deserialize, JsonSchema)]
struct NameCustomer {
    customer_id: String,
    name: String,
}

impl Command for NameCustomer {
    const NAME: &'static str = "NameCustomer";
    const AGGREGATE_TYPE: &'static str = "customer";
    type Aggregate = Customers;

    fn aggregate_id(&self) -> &str {
        &self.customer_id
    }

    fn run(
        &self,
        state: Option<&Customer>,
        _: &Found<'_>,
    ) -> Result<Vec<CustomerEvent>, CommandError> {
        let has_it = state.is_some_and(|customer| customer.name == self.name);
        let renamed = || CustomerEvent::CustomerRenamed { name: self.name.clone() };
        Ok(if has_it { vec![] } else { vec![renamed()] })
    }
}

#[tokio::test]
async fn a_command_that_finds_nothing_to_be_done_shows_how_its_aggregate_stands() {
    let world = World::start().await;
    world.stock().await;
    let gateway = naming(&world).await;
    let named = json!({"customer_id": "c-1", "name": "Grace"});
    let done = gateway.command("NameCustomer", named.clone()).await;
    assert_eq!((done.status, &done.body["version"]), (200, &json!(2)));
    let again = gateway.command("NameCustomer", named).await;
    assert_eq!((again.came_to(), &again.body["version"]), ((200, "primary"), &json!(2)));
    assert_eq!((&again.body["events"], again.header("etag")), (&json!([]), "\"1.2\""));
    let head = world.log().await.len() as u64;
    assert_eq!(gateway.open(&again.token()).largest_position(), position(head));
}

/// Another gateway of the primary region, with a command more.
async fn naming(world: &World) -> Gateway {
    let domain = Domain::builder().aggregate("customer", Customers).command::<NameCustomer>();
    let config = world::primary_config(&world.postgres, &world.nats);
    Gateway::start_with(&config, domain.build().unwrap()).await
}

/// The first request is committed after the repeat asked for it and before the repeat's rules see the
/// aggregate.
#[tokio::test]
async fn a_command_that_its_first_request_overtook_is_answered_like_it() {
    let world = World::start().await;
    world.stock().await;
    let other = naming(&world).await;
    let grace = json!({"customer_id": "c-1", "name": "Grace"});
    let placed = keyed(&world.primary, "k", PLACE, &order("o-1")).await;
    let named = keyed(&other, "k", NAME, &grace).await;
    let pool = log_database(&world);
    for statement in ["create table kept as select * from idempotency", "delete from idempotency"] {
        sqlx::query(statement).execute(&pool).await.unwrap();
    }
    let request = |gateway: &Gateway, path, body: &Value| {
        gateway.request(Method::POST, path).header("idempotency-key", "k").json(body)
    };
    let place = || request(&world.primary, PLACE, &order("o-1"));
    let repeats = [
        (place(), &placed),
        (place().header("if-none-match", "*"), &placed),
        // Its rules find that there is nothing left to be done.
        (request(&other, NAME, &grace), &named),
    ];
    for (request, first) in repeats {
        let mut committing = pool.begin().await.unwrap();
        sqlx::query("lock table event").execute(&mut *committing).await.unwrap();
        let repeating = tokio::spawn(Reply::of(request));
        until_blocked(&pool, "%from fold_snapshot%").await;
        let commit = "insert into idempotency select * from kept";
        sqlx::query(commit).execute(&mut *committing).await.unwrap();
        committing.commit().await.unwrap();
        assert_repeats(&repeating.await.unwrap(), first);
        sqlx::query("delete from idempotency").execute(&pool).await.unwrap();
    }
}

#[tokio::test]
async fn the_retry_of_a_write_of_unknown_outcome_finds_out() {
    let world = World::start().await;
    let config = world::primary_config(&world.postgres, &world.nats);
    let hasty = "scheme = \"http\"\nlisten.request_timeout = \"2s\"";
    let hasty = Gateway::start(&config.replace("scheme = \"http\"", hasty)).await;
    hasty.ready().await;
    let pool = log_database(&world);
    let head = hold_head(&pool).await;
    let note = noted("a");
    let (unknown, ()) =
        tokio::join!(keyed(&hasty, "k", EVENTS, &note), until_blocked(&pool, "%append_events%"),);
    assert_eq!(unknown.came_to(), (503, "outcome-unknown"));
    assert!(!unknown.header("retry-after").is_empty());
    head.rollback().await.unwrap();
    // The one that waited is committed after all, though nobody waits for its answer.
    eventually("the write is in the log", async || !world.log().await.is_empty()).await;
    let retried = keyed(&world.region, "k", EVENTS, &note).await;
    assert_eq!((retried.status, is_replayed(&retried)), (201, true), "{retried:?}");
    assert_eq!(world.log().await.len(), 1);
}

#[tokio::test]
async fn a_key_out_of_bounds_is_refused_before_anything_is_written() {
    let world = World::start().await;
    world.stock().await;
    let longest = "k".repeat(255);
    for gateway in [&world.primary, &world.region] {
        for (path, body) in [(EVENTS, noted("a")), (PLACE, order("o-1"))] {
            for key in ["", "a b", &"k".repeat(256)] {
                let refused = keyed(gateway, key, path, &body).await;
                assert_eq!(refused.came_to(), (400, "bad-request"), "{key:?}");
            }
            let request = gateway.request(Method::POST, path).json(&body);
            let two = request.header("idempotency-key", "a").header("idempotency-key", "b");
            assert_eq!(Reply::of(two).await.came_to(), (400, "bad-request"));
        }
    }
    assert_eq!(world.log().await.len(), 2);
    assert_first(&keyed(&world.region, &longest, EVENTS, &noted("a")).await, 201);
}

#[tokio::test]
async fn the_token_of_a_repeat_counts_in_the_epoch_that_was_opened_since() {
    let world = World::start().await;
    let first = keyed(&world.region, "k", EVENTS, &noted("a")).await;
    let log_id = LogId::new(world.primary.config.log.id);
    let after = NewEpoch { after: position(1), force: true, above: Above::Refuse };
    event_store::open_epoch(&log_database(&world), log_id, after).await.unwrap();
    // A region that asks makes the primary look as well.
    let asking = world.primary.request(Method::GET, "/internal/epochs");
    let told = Reply::of(asking.header("tidemark-credential", CREDENTIAL)).await;
    assert_eq!(told.status, 200, "{told:?}");
    let repeat = keyed(&world.primary, "k", EVENTS, &noted("a")).await;
    assert_repeats(&repeat, &first);
    let second = Epoch::new(2).unwrap();
    let history = EpochHistory::new(vec![(second, position(1))]).unwrap();
    let status = world.primary.ring().open(&repeat.token(), &history);
    let TokenStatus::Valid(token) = status else { panic!("{status:?}") };
    assert_eq!((token.epoch(), token.claims().len()), (second, 1));
    assert_eq!(token.largest_position(), position(1));
}

#[tokio::test]
async fn a_key_is_forgotten_when_it_is_old() {
    let world = World::start().await;
    assert_first(&keyed(&world.region, "k", EVENTS, &noted("a")).await, 201);
    let _forgetful = beside(&world, "write.idempotency_age_max = \"1ms\"").await;
    let pool = log_database(&world);
    eventually("the key is forgotten", async || {
        let count = "select count(*) from idempotency";
        sqlx::query_scalar::<_, i64>(count).fetch_one(&pool).await.unwrap() == 0
    })
    .await;
    assert_first(&keyed(&world.region, "k", EVENTS, &noted("a")).await, 200);
}

#[tokio::test]
async fn callers_have_keys_of_their_own_when_a_region_that_proved_itself_names_them() {
    let world = World::start().await;
    let send = async |gateway: &Gateway, credential: &str, caller: &str| {
        let request = gateway.request(Method::POST, EVENTS).header("idempotency-key", "k");
        let request = request.header("tidemark-credential", credential);
        Reply::of(request.header("tidemark-caller", caller).json(&noted("a"))).await
    };
    let ada = send(&world.primary, CREDENTIAL, "ada").await;
    assert_first(&ada, 201);
    let nobody = send(&world.region, "guessed", "ada").await;
    assert_first(&nobody, 200);
    assert_repeats(&send(&world.primary, "guessed", "ada").await, &nobody);
    assert_repeats(&send(&world.primary, CREDENTIAL, "ada").await, &ada);
    assert_first(&send(&world.primary, CREDENTIAL, "bob").await, 200);
    assert_eq!(world.log().await.len(), 3);
}

#[tokio::test]
async fn where_a_version_is_demanded_a_write_without_one_is_refused() {
    let world = World::start().await;
    world.stock().await;
    let strict = beside(&world, "write.if_match_required = [\"order\"]").await;
    let through =
        Gateway::start(&world::region_config(&world.postgres, &world.nats, &strict.base)).await;
    through.ready().await;
    let orders = "/v1/aggregates/order/o-1/events";
    for gateway in [&strict, &through] {
        for (path, body) in [(orders, noted("a")), (PLACE, order("o-1"))] {
            let refused = gateway.post(path, body).await;
            assert_eq!(refused.came_to(), (428, "precondition-required"));
        }
    }
    assert_eq!(strict.post(EVENTS, noted("a")).await.status, 201, "another type");
    let send = async |path: &str, header: &'static str, value: &'static str, body: Value| {
        let request = through.request(Method::POST, path).header(header, value);
        Reply::of(request.json(&body)).await.status
    };
    assert_eq!(send(PLACE, "if-none-match", "*", order("o-1")).await, 201);
    let cancel = "/v1/commands/CancelOrder";
    assert_eq!(send(cancel, "if-match", "\"1.1\"", json!({"order_id": "o-1"})).await, 200);
}

/// Others are always quicker: they append while the command's own append waits for the head.
#[tokio::test]
async fn a_command_whose_attempts_run_out_is_told_to_come_again() {
    let world = World::start().await;
    world.stock().await;
    for id in ["o-1", "o-2"] {
        world.place(id).await;
    }
    let once = beside(&world, "write.command_attempts_max = 1").await;
    let pool = log_database(&world);
    let cases =
        [("o-1", None, 503, "overloaded"), ("o-2", Some("\"1.1\""), 412, "version-conflict")];
    for (id, if_match, status, problem) in cases {
        let add = json!({"order_id": id, "product_id": "p-1", "quantity": 1});
        let mut head = hold_head(&pool).await;
        let mut request = once.request(Method::POST, "/v1/commands/AddItem").json(&add);
        if let Some(tag) = if_match {
            request = request.header("if-match", tag);
        }
        let adding = tokio::spawn(Reply::of(request));
        until_blocked(&pool, "%append_events%").await;
        sqlx::query(
            "select append_events(
                 log_id, gen_random_uuid(), '{order}', array[$1], '{null}', '{null}',
                 '{1}', array[id], '{order}', array[$1], '{OrderNoted}', '{1}', array[id], array[id],
                 array[null]::bytea[], array[null]::text[], '{\"{}\"}'
             )
             from log_head, gen_random_uuid() as id",
        )
        .bind(id)
        .execute(&mut *head)
        .await
        .unwrap();
        head.commit().await.unwrap();
        let refused = adding.await.unwrap();
        assert_eq!(refused.came_to(), (status, problem));
        assert_eq!(refused.header("retry-after").is_empty(), if_match.is_some());
    }
}
