//! The write side of one gateway as a process of its own: it appends to ten orders as fast as it is let,
//! and relays. The tests run several of it against one log, and kill, stop and continue them.
//!
//! It says on its standard output, a line each, what was acknowledged and what its relay is:
//! `appended <key> <position>` and `relay <state>`. It is this test program once more, started with
//! [`ARGUMENTS`] in its environment, so that nobody has to build another one first.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use async_nats::ConnectOptions;
use compose::process::Program;
use consistency::{AggregateId, EventId, LogId, Name, SchemaVersion, Version};
use event_store::{
    AnswerFormat, Append, AppendError, EventStore, Expected, Idempotency, NewEvent, Once, Relay,
    RelayConfig, RelayState, Repeat, StoreConfig, Timeouts,
};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

const ORDER_COUNT: u128 = 10;
/// How many appends it has under way at a time.
const LANE_COUNT: usize = 2;
/// Keeps the log short enough to be compared with its stream.
const PAUSE: Duration = Duration::from_millis(5);

/// What a writer is told, a line each: log id, database URL, NATS URL, user, password.
const ARGUMENTS: &str = "TIDEMARK_TEST_WRITER";

/// The writer as a program.
pub fn program(name: &str, log: &Path, arguments: [&str; 5]) -> Program {
    // More than one thread, or the name of the test would be printed on our first line.
    Program::new(name, std::env::current_exe().unwrap(), log)
        .args(["--exact", "writer::writes_until_it_is_killed", "--ignored", "--nocapture"])
        .args(["--test-threads", "2"])
        .env(ARGUMENTS, arguments.join("\n"))
}

#[tokio::test]
#[ignore = "a process that other tests start and kill"]
async fn writes_until_it_is_killed() {
    if let Ok(arguments) = std::env::var(ARGUMENTS) {
        write(arguments.lines().collect()).await.unwrap();
    }
}

async fn write(arguments: Vec<&str>) -> anyhow::Result<()> {
    let [log_id, database_url, nats_url, user, password] = arguments.as_slice() else {
        anyhow::bail!("a writer is told five things, not {}", arguments.len());
    };
    let options: PgConnectOptions = database_url.parse()?;
    let pool = PgPoolOptions::new()
        .acquire_timeout(Duration::from_secs(3))
        .connect_lazy_with(Timeouts::default().apply(options));
    let config = StoreConfig::new(LogId::new(log_id.parse()?));
    let (store, _committer) = EventStore::open(pool, config).await?;
    let options = ConnectOptions::with_user_and_password((*user).into(), (*password).into());
    let client = options.connect(*nats_url).await?;
    let config = RelayConfig {
        poll_interval: Duration::from_millis(100),
        lease_duration: Duration::from_millis(900),
        ack_wait_max: Duration::from_secs(2),
        ..RelayConfig::new("us-east")
    };
    let relay = Relay::spawn(store.clone(), client, config, CancellationToken::new());
    let mut tasks = JoinSet::new();
    tasks.spawn(tell(relay));
    for _ in 0..LANE_COUNT {
        tasks.spawn(append_on_and_on(store.clone()));
    }
    let ended = tasks.join_next().await.context("there are tasks")?;
    ended?.context("a task ended")
}

/// Tells of each change of the relay's state.
async fn tell(relay: Relay) -> anyhow::Result<()> {
    let mut status = relay.status();
    let mut told = "";
    loop {
        let state = match status.borrow_and_update().state {
            RelayState::Standby => "standby",
            RelayState::Active => "active",
            RelayState::Failing(_) => "failing",
            RelayState::Refused(_) => "refused",
        };
        if state != told {
            println!("relay {state}");
            told = state;
        }
        status.changed().await?;
    }
}

async fn append_on_and_on(store: EventStore) -> anyhow::Result<()> {
    loop {
        let key = Uuid::new_v4();
        let order =
            AggregateId::new(Name::new("order")?, format!("o-{}", key.as_u128() % ORDER_COUNT))?;
        // Tried until there is an answer, as a client would with its key.
        let position = loop {
            match append_once(&store, &order, key).await {
                Ok(position) => break position,
                Err(error) if is_conflict(&error) => {}
                Err(error) => {
                    eprintln!("{error:#}");
                    sleep(10 * PAUSE).await;
                }
            }
        };
        println!("appended {key} {position}");
        sleep(PAUSE).await;
    }
}

fn is_conflict(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(AppendError::Conflict { .. }))
}

/// Appends one event to what the order is now; answers the first answer's position.
async fn append_once(store: &EventStore, order: &AggregateId, key: Uuid) -> anyhow::Result<u64> {
    let head = store.aggregate_head(order).await?;
    let expected = if head.version == Version::ZERO {
        Expected::MustNotExist
    } else {
        Expected::Last { epoch: head.at.epoch, version: head.version }
    };
    let mut key_hash = [0; 32];
    key_hash[..16].copy_from_slice(key.as_bytes());
    let event = NewEvent {
        id: EventId::new(Uuid::now_v7()),
        event_type: Name::new("OrderPlaced")?,
        schema_version: SchemaVersion::FIRST,
        data: "{}".to_owned(),
    };
    let append = Append {
        aggregate: order.clone(),
        expected,
        events: vec![event],
        correlation_id: key,
        causation_id: key,
        idempotency_key_hash: Some(key_hash),
        traceparent: None,
    };
    let idempotency = Idempotency {
        scope: [0; 32],
        key: key_hash,
        request: [0; 32],
        answer_format: AnswerFormat::FIRST,
    };
    let appended = match store.append_once(append, idempotency).await? {
        Once::Appended(appended) => appended,
        Once::Repeated(Repeat::Replayed(first)) => first.appended,
        Once::Repeated(Repeat::Mismatched) => anyhow::bail!("the request is always the same"),
    };
    Ok(appended.first_position.get())
}
