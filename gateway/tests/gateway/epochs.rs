//! Epochs that are opened while gateways run, from the command line and behind their back.

use std::{path::PathBuf, process::Output};

use compose::nats::User;
use consistency::{Claim, Epoch, EpochHistory, LogId, Token, TokenStatus};
use event_store::{Above, NewEpoch};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;
use tempfile::TempDir;

use crate::shop::Shops;
use crate::world::{self, CREDENTIAL, Gateway, Reply, World, eventually, position};

fn second() -> Epoch {
    Epoch::new(2).unwrap()
}

fn path(id: &str) -> String {
    format!("/v1/aggregates/note/{id}/events")
}

fn noted() -> Value {
    json!({"events": [{"type": "Noted", "data": {}}]})
}

async fn note(gateway: &Gateway, id: &str, token: &str) -> Reply {
    let request = gateway.request(Method::POST, &path(id)).header("consistency-token", token);
    Reply::of(request.json(&noted())).await
}

fn log_database(world: &World) -> PgPool {
    PgPool::connect_lazy(&world.postgres.url("tidemark_log")).unwrap()
}

/// As a restore of an older backup would leave it.
async fn cut_log_back_to(world: &World, last: i64) {
    let pool = log_database(world);
    sqlx::query("delete from event where position > $1").bind(last).execute(&pool).await.unwrap();
    let head = "update log_head set position = $1,
                    event_id = (select id from event where position = $1)";
    sqlx::query(head).bind(last).execute(&pool).await.unwrap();
}

async fn open_behind_their_back(world: &World, after: u64, above: Above) {
    let log_id = LogId::new(world.primary.config.log.id);
    let new = NewEpoch { after: position(after), force: true, above };
    event_store::open_epoch(&log_database(world), log_id, new).await.unwrap();
}

/// The real binary with the primary's configuration.
struct CommandLine {
    config: PathBuf,
    _folder: TempDir,
}

impl CommandLine {
    fn new(world: &World) -> Self {
        let folder = TempDir::new().unwrap();
        let config = folder.path().join("gateway.toml");
        std::fs::write(&config, world::primary_config(&world.postgres, &world.nats)).unwrap();
        Self { config, _folder: folder }
    }

    async fn run(&self, arguments: &str) -> Output {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_gateway"));
        command.arg("--config").arg(&self.config).arg("epoch").args(arguments.split(' '));
        command.output().await.unwrap()
    }

    async fn prints(&self, arguments: &str) -> String {
        let output = self.run(arguments).await;
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    async fn is_refused(&self, arguments: &str) -> String {
        let output = self.run(arguments).await;
        assert!(!output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// As it is printed in advice.
    fn opens(&self, arguments: &str) -> String {
        format!("gateway --config {} epoch open {arguments}\n", self.config.display())
    }
}

async fn until_published(world: &World, last: u64) {
    let (user, password) = world.nats.credentials(User::Operator);
    let options = async_nats::ConnectOptions::with_user_and_password(user, password);
    let client = options.connect(world.nats.url()).await.unwrap();
    let context = async_nats::jetstream::new(client);
    eventually("everything is published", async || {
        let stream = context.get_stream("EVENTS-1").await;
        stream.is_ok_and(|stream| stream.cached_info().state.last_sequence == last)
    })
    .await;
}

async fn admin(gateway: &Gateway, path: &str) -> String {
    let answer = reqwest::get(format!("{}{path}", gateway.admin)).await.unwrap();
    answer.text().await.unwrap()
}

async fn epoch_of(gateway: &Gateway) -> Value {
    gateway.get("/v1/currency").await.body["epoch"].clone()
}

/// A gateway of the primary region that looks at its log by itself only when it starts.
async fn unobservant(world: &World) -> Gateway {
    let config = world::primary_config(&world.postgres, &world.nats);
    let gateway = Gateway::start(&format!("read.refresh_interval = \"1h\"\n{config}")).await;
    gateway.ready().await;
    gateway
}

#[tokio::test]
async fn a_log_that_lost_its_tail_takes_writes_again_in_an_epoch_opened_from_the_command_line() {
    let world = World::start().await;
    let mut lost = String::new();
    for nth in 1..=6 {
        let written = note(&world.region, &format!("n-{nth}"), "").await;
        assert_eq!(written.status, 201, "{written:?}");
        lost = written.token();
    }
    until_published(&world, 6).await;
    cut_log_back_to(&world, 4).await;
    let refused = note(&world.region, "n-7", "").await;
    assert_eq!(refused.came_to(), (503, "primary-unreachable"));
    eventually("the primary says why", async || {
        let ready = admin(&world.primary, "/readyz").await;
        ready.contains("appends are refused: the log ends at 1.4, but it was seen to end at 1.6")
    })
    .await;
    let metrics = admin(&world.primary, "/metrics").await;
    let measured = |line: &str| {
        metrics.lines().any(|it| it.starts_with("tidemark_log_refused") && it.contains(line))
    };
    assert!(
        measured("reason=\"tail-lost\"") && metrics.contains("tidemark_log_epoch"),
        "{metrics}"
    );

    let operator = CommandLine::new(&world);
    let listed = operator.prints("list").await;
    let right = operator.opens("--after 4");
    assert!(
        listed.contains("same events up to position 4") && listed.ends_with(&right),
        "{listed}"
    );
    let told = operator.is_refused("open --after 5").await;
    assert!(told.contains("ends at 1.4, before 5") && told.contains(&right), "{told}");
    let told = operator.is_refused("open --after 3").await;
    assert!(told.contains("events 4 to 4") && told.contains(&right), "{told}");
    let opened = operator.prints("open --after 4").await;
    assert!(opened.starts_with("epoch 2 is open after position 4"), "{opened}");
    let told = operator.is_refused("open --after 4").await;
    assert!(told.contains("takes appends") && told.contains("--force"), "{told}");

    let told = note(&world.region, "n-8", &lost).await;
    assert!([409, 503].contains(&told.status), "{told:?}");
    eventually("the lost write is confessed", async || {
        note(&world.region, "n-8", &lost).await.came_to() == (409, "write-lost")
    })
    .await;
    for gateway in [&world.primary, &world.region] {
        eventually("it knows the epoch", async || epoch_of(gateway).await == 2).await;
        let told = gateway.read("/v1/views/order-detail/o-1", &lost, "eventual").await;
        assert_eq!(told.came_to(), (409, "write-lost"), "never a 200");
        let written = note(gateway, "n-8", &told.token()).await;
        assert!([200, 201].contains(&written.status), "told once: {written:?}");
    }
    eventually("the primary has no more to say", async || {
        !admin(&world.primary, "/readyz").await.contains("refused")
    })
    .await;
    let events = world.log().await;
    let epochs: Vec<u32> = events.iter().map(|event| event.at.epoch.get()).collect();
    assert_eq!(epochs, [1, 1, 1, 1, 2, 2]);
}

#[tokio::test]
async fn an_epoch_that_begins_after_events_that_were_never_told_is_not_opened() {
    let world = World::start().await;
    for nth in 1..=6 {
        note(&world.primary, &format!("n-{nth}"), "").await;
    }
    until_published(&world, 6).await;
    cut_log_back_to(&world, 4).await;
    // Somebody who has not seen the tail grows it again.
    for nth in 0..3 {
        let append = "select append_events(
                 log_id, gen_random_uuid(), '{note}', array[$1], '{null}', '{null}',
                 '{1}', array[id], '{note}', array[$1], '{Noted}', '{1}', array[id], array[id],
                 array[null]::bytea[], array[null]::text[], '{\"{}\"}'
             )
             from log_head, gen_random_uuid() as id";
        let database = log_database(&world);
        sqlx::query(append).bind(format!("other-{nth}")).execute(&database).await.unwrap();
    }
    let operator = CommandLine::new(&world);
    let right = operator.opens("--after 4 --carry");
    let told = operator.is_refused("open --after 7").await;
    assert!(told.contains("told other events after position 4") && told.contains(&right), "{told}");
    let opened = operator.prints("open --after 4 --carry --force").await;
    assert!(opened.contains("events 5 to 7 were taken over"), "{opened}");
    let asked = async |epoch: u32| {
        let request = world.primary.request(Method::GET, &format!("/internal/log?epoch={epoch}"));
        Reply::of(request.header("tidemark-credential", CREDENTIAL)).await
    };
    let first = asked(1).await;
    assert_eq!((first.status, first.text.lines().count()), (200, 4), "what was kept of it");
    assert_eq!(asked(2).await.text.lines().count(), 7);
    assert_eq!(asked(3).await.came_to(), (400, "bad-request"));
}

/// Neither what its caller lost is passed over, nor what its caller still has.
#[tokio::test]
async fn a_write_is_judged_in_the_epoch_that_it_is_appended_in() {
    let world = World::start().await;
    let kept = note(&world.primary, "kept", "").await.token();
    let lost = note(&world.primary, "lost", "").await.token();
    let [first, other] = [unobservant(&world).await, unobservant(&world).await];
    cut_log_back_to(&world, 1).await;
    open_behind_their_back(&world, 1, Above::Refuse).await;

    let judged = note(&first, "a", &lost).await;
    assert!([409, 503].contains(&judged.status), "{judged:?}");
    assert_eq!(note(&first, "a", &lost).await.came_to(), (409, "write-lost"));
    let judged = note(&other, "b", &kept).await;
    let written = if judged.status == 503 { note(&other, "b", &kept).await } else { judged };
    assert_eq!(written.status, 201, "{written:?}");
    let history = EpochHistory::new(vec![(second(), position(1))]).unwrap();
    let status = world.primary.ring().open(&written.token(), &history);
    let TokenStatus::Valid(token) = status else { panic!("{status:?}") };
    assert_eq!((token.epoch(), token.claims().len()), (second(), 2), "its own, and what was kept");
    assert_eq!(world.log().await.len(), 2);
}

/// The key is looked up when the log is found in another epoch than the one that its caller was judged in.
#[tokio::test]
async fn the_repeat_of_what_was_kept_does_not_pass_over_what_was_lost() {
    let world = World::start().await;
    let note_once = async |gateway: &Gateway, token: &str| {
        let path = "/v1/aggregates/note/kept/events";
        let request = gateway.request(Method::POST, path).json(&noted());
        let request = request.header("idempotency-key", "k").header("consistency-token", token);
        Reply::of(request).await
    };
    let first = note_once(&world.primary, "").await;
    assert_eq!(first.status, 201);
    let lost = note(&world.primary, "lost", &first.token()).await.token();
    let gateway = unobservant(&world).await;
    cut_log_back_to(&world, 1).await;
    open_behind_their_back(&world, 1, Above::Refuse).await;

    let repeat = note_once(&gateway, &lost).await;
    assert_eq!(repeat.status, 503, "{repeat:?}");
    let told = note_once(&gateway, &lost).await;
    assert_eq!(told.came_to(), (409, "write-lost"));
    let repeat = note_once(&gateway, &told.token()).await;
    assert_eq!((repeat.status, &repeat.text), (201, &first.text), "told once");
    assert_eq!(world.log().await.len(), 1);
}

/// Its database is in the epoch before the gateway has heard of it. What was lost is not passed over by
/// a row, a list or a 404 that is newer, from the database or from memory, nor is what was kept forgotten.
#[tokio::test]
async fn a_read_is_judged_in_the_epoch_that_its_rows_are_in() {
    let mut world = World::start().await;
    world.stock().await;
    let kept = world.place("o-1").await.token();
    let lost = world.place("o-2").await.token();
    let log = world.log().await;
    world.projector.apply(&log, position(3)).await;
    let config = world::region_config(&world.postgres, &world.nats, &world.primary.base);
    // Whoever connects looks at the database once more.
    let nobody = format!("nats://127.0.0.1:{}", compose::ports::free().unwrap());
    let config = config.replace(&world.nats.url(), &nobody);
    let unobservant = async |memory: &str| {
        let silent = "refresh_interval = \"1h\", hints_silence_max = \"1h\"";
        let patient = "query_timeout = \"30s\"";
        let read = format!("read = {{ {silent}, {patient}, memory_bytes_max = {memory} }}");
        let config = format!("{read}\nlisten.request_timeout = \"30s\"\n{config}");
        let gateway = Gateway::start(&config).await;
        gateway.ready().await;
        gateway
    };
    let (row, list) = ("/v1/views/order-detail/o-2", "/v1/views/orders-by-customer/c-1");
    let cases = [
        ("0", row, &lost, (409, "write-lost")),
        ("0", list, &lost, (409, "write-lost")),
        ("0", list, &kept, (200, "local")),
        ("1000000", row, &lost, (409, "write-lost")),
        ("1000000", row, &kept, (404, "local")),
    ];
    let mut gateways = Vec::new();
    for (memory, ..) in cases {
        gateways.push(unobservant(memory).await);
    }
    let pool = &world.projector.pool;
    sqlx::query("insert into adopted_epoch values (2, 3)").execute(pool).await.unwrap();
    sqlx::query("update checkpoint set epoch = 2, position = 5").execute(pool).await.unwrap();
    for ((memory, path, token, then), gateway) in cases.into_iter().zip(&gateways) {
        let hit = memory != "0";
        eventually("who knows nothing is served", async || {
            let read = gateway.read(path, "", "eventual").await;
            assert!([200, 404].contains(&read.status), "{read:?}");
            !hit || read.header("cache-status") == "tidemark; hit"
        })
        .await;
        assert_eq!(epoch_of(gateway).await, 1, "it was not told");
        let read = gateway.read(path, token, "eventual").await;
        assert_eq!(read.came_to(), (503, "replication-pending"), "{path}: {read:?}");
        assert_eq!(epoch_of(gateway).await, 2, "it was found out");
        let read = gateway.read(path, token, "eventual").await;
        assert_eq!(read.came_to(), then, "{path}: {read:?}");
        if token == &kept {
            let history = EpochHistory::new(vec![(second(), position(3))]).unwrap();
            let status = gateway.ring().open(&read.token(), &history);
            let TokenStatus::Valid(token) = status else { panic!("{status:?}") };
            assert_eq!((token.epoch(), token.claims().len()), (second(), 1), "{path}");
        }
    }
}

/// Also of a region: the epoch is heard of while the service behind it reads. The answer's token would count in it.
#[tokio::test]
async fn a_read_of_a_service_is_judged_in_the_epoch_that_is_known_when_it_answers() {
    let shops = Shops::open("").await;
    let (world, service) = (&shops.world, &shops.region);
    let kept = note(&world.primary, "kept", "").await.token();
    let lost = note(&world.primary, "lost", &kept).await.token();
    for (token, then) in [(&lost, (409, "write-lost")), (&kept, (200, "stale"))] {
        let epoch = epoch_of(&world.region).await.as_u64().unwrap();
        service.stands_at(1);
        let (held, asked) = (service.state.held.write().await, service.asked());
        let request = world.region.request(Method::GET, "/shop/items");
        let request = request.header("consistency-token", token);
        let reading = Reply::of(request.header("consistency-policy", "eventual"));
        let reading = tokio::spawn(reading);
        eventually("the service is asked", async || asked < service.asked()).await;
        cut_log_back_to(world, 1).await;
        open_behind_their_back(world, 1, Above::Refuse).await;
        eventually("the region has heard of it", async || {
            epoch_of(&world.region).await.as_u64() == Some(epoch + 1)
        })
        .await;
        drop(held);
        let read = reading.await.unwrap();
        assert_eq!(read.came_to(), (503, "primary-unreachable"), "{read:?}");
        let read = world.region.read("/shop/items", token, "eventual").await;
        assert_eq!(read.came_to(), then, "{read:?}");
    }
}

/// A write by its path or by its method: a service appended in an epoch that its caller was not judged in.
#[tokio::test]
async fn what_came_of_a_service_s_write_is_unknown_to_who_was_judged_in_an_earlier_epoch() {
    let shops = Shops::open(", write_paths = [\"/shop/write\"]").await;
    let (world, service) = (&shops.world, &shops.primary);
    let writes = [(Method::GET, "/shop/write"), (Method::POST, "/shop/items")];
    for (next, (method, path)) in (2..).zip(writes) {
        let noted = note(&world.primary, "known", "").await;
        let (known, head) = (noted.token(), noted.body["position"].as_u64().unwrap());
        let (held, asked) = (service.state.held.write().await, service.asked());
        let request = world.primary.request(method, path).header("consistency-token", known);
        let writing = tokio::spawn(Reply::of(request));
        eventually("the service is asked", async || asked < service.asked()).await;
        open_behind_their_back(world, head, Above::Refuse).await;
        eventually("the gateway knows of it", async || {
            epoch_of(&world.primary).await.as_u64() == Some(next)
        })
        .await;
        drop(held);
        let written = writing.await.unwrap();
        assert_eq!(written.came_to(), (503, "outcome-unknown"), "{path}: {written:?}");
        let stands = world.primary.get("/v1/currency").await.body;
        assert_eq!((&stands["epoch"], &stands["head"]), (&next.into(), &(head + 1).into()));
    }
}

#[tokio::test]
async fn a_token_of_an_epoch_that_a_gateway_has_not_heard_of_makes_it_ask() {
    let world = World::start().await;
    note(&world.primary, "n-1", "").await;
    let primary = unobservant(&world).await;
    let config = world::region_config(&world.postgres, &world.nats, &primary.base);
    let config = config.replace("{ name =", "{ heartbeat_interval = \"1h\", name =");
    let region = Gateway::start(&format!("read.refresh_interval = \"1h\"\n{config}")).await;
    region.ready().await;
    eventually("its first question is answered", async || {
        !admin(&region, "/readyz").await.contains("does not answer")
    })
    .await;
    open_behind_their_back(&world, 1, Above::Refuse).await;
    let aggregate = Claim {
        aggregate: consistency::AggregateKey::from_bytes([1; 12]),
        version: consistency::Version::new(1).unwrap(),
        position: position(1),
    };
    let newer = world.primary.ring().seal(&Token::new(second()).with_claim(aggregate));
    assert_eq!((epoch_of(&region).await, epoch_of(&primary).await), (json!(1), json!(1)));
    let written = note(&region, "n-1", &newer).await;
    assert_eq!(written.status, 200, "{written:?}");
    assert_eq!((epoch_of(&region).await, epoch_of(&primary).await), (json!(2), json!(2)));

    // At the primary itself.
    let other = unobservant(&world).await;
    open_behind_their_back(&world, 2, Above::Refuse).await;
    let newest = Token::new(Epoch::new(3).unwrap()).with_claim(aggregate);
    assert_eq!(epoch_of(&other).await, 2);
    let written = note(&other, "n-1", &world.primary.ring().seal(&newest)).await;
    assert_eq!((written.status, epoch_of(&other).await), (200, json!(3)), "{written:?}");
}
