//! What a gathered commit costs: statements, counted by the server.

use std::time::Duration;

use async_nats::ConnectOptions;
use compose::nats::{Server, User};
use compose::postgres::{Cluster, Options};
use event_store::{
    AnswerFormat, AppendError, Committer, EventStore, Expected, Idempotency, Once, Relay,
    RelayConfig, StoreConfig,
};
use futures::future::join_all;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::region;
use crate::support::{
    DEADLINE, LOG_ID, append, assert_log_is_whole, hold_head, order, pool, until_blocked,
};

const COMMAND_COUNT: u8 = 60;

fn key(nth: u8) -> Idempotency {
    Idempotency {
        scope: [0; 32],
        key: [nth; 32],
        request: [nth; 32],
        answer_format: AnswerFormat::FIRST,
    }
}

/// How often the store called the server, whatever for.
async fn calls(pool: &PgPool) -> i64 {
    sqlx::query_scalar(
        "select coalesce(sum(calls), 0)::bigint from pg_stat_statements
         where query not like '%pg_stat_%' and query not like '%for update'
             and query not in ('BEGIN', 'ROLLBACK', 'COMMIT')
             and query not like '%delete from idempotency%'",
    )
    .fetch_one(pool)
    .await
    .unwrap()
}

/// Appends one command, and behind it, while that waits for the head, all others at once. Answers how
/// many statements it took.
async fn statements(store: &EventStore, observer: &PgPool, keyed: impl Fn(u8) -> bool) -> i64 {
    let lock = hold_head(observer).await;
    let one = async |nth: u8| {
        let append = append(&order(&format!("o-{nth}")), Expected::Any, 1);
        match keyed(nth) {
            true => store.append_once(append, key(nth)).await.unwrap(),
            false => Once::Appended(store.append(append).await.unwrap()),
        }
    };
    let rest = async {
        until_blocked(observer, 1).await;
        let before = calls(observer).await;
        let others = join_all((1..=COMMAND_COUNT).map(&one));
        let release = async { lock.rollback().await.unwrap() };
        // The others are in the queue before the lock is let go.
        (tokio::join!(others, release).0, before)
    };
    let (_, (answers, before)) = tokio::join!(one(0), rest);
    assert!(answers.iter().all(|answer| matches!(answer, Once::Appended(_))));
    calls(observer).await - before
}

/// A server that counts statements.
async fn counting() -> Cluster {
    let settings = [("shared_preload_libraries", "pg_stat_statements")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    Cluster::start(Options { settings, ..Options::default() }).await.unwrap()
}

/// A store, and a pool to look at its database with.
async fn open(cluster: &Cluster, name: &str) -> (EventStore, Committer, PgPool) {
    let url = cluster.create_database(name).await.unwrap();
    let observer = PgPoolOptions::new().connect_lazy(&url).unwrap();
    event_store::migrate(&observer).await.unwrap();
    sqlx::query("create extension pg_stat_statements").execute(&observer).await.unwrap();
    let (store, committer) = EventStore::open(pool(&url), StoreConfig::new(LOG_ID)).await.unwrap();
    (store, committer, observer)
}

#[tokio::test]
async fn a_gathered_commit_is_one_statement_with_keys_and_without() {
    let cluster = counting().await;
    for keyed in [|_| false, |_| true, |nth: u8| nth.is_multiple_of(2)] {
        let name = format!("log_{}_{}", u8::from(keyed(1)), u8::from(keyed(2)));
        let (store, _committer, observer) = open(&cluster, &name).await;
        // What runs in the background by itself has run.
        store.append(append(&order("warm"), Expected::Any, 1)).await.unwrap();
        // The first command's statement, which had begun, and that of all others.
        let count = statements(&store, &observer, keyed).await;
        assert_eq!(count, 2, "{name}");
        assert_eq!(assert_log_is_whole(&observer).await, i64::from(COMMAND_COUNT) + 2);
    }
}

#[tokio::test]
async fn an_append_by_itself_takes_the_short_way_unless_others_append_at_the_same_time() {
    let cluster = counting().await;
    let (store, _committer, observer) = open(&cluster, "log").await;
    let (other, _other_committer) =
        EventStore::open(pool(&cluster.url("log")), StoreConfig::new(LOG_ID)).await.unwrap();
    let counts = async || -> (i64, i64) {
        let count = "select
                         coalesce(sum(calls) filter (where query like '/* append_events%'), 0)::bigint,
                         coalesce(sum(calls) filter (where query like '%from append_events_each_alone(%'), 0)::bigint
                     from pg_stat_statements where query not like '%pg_stat_%'";
        sqlx::query_as(count).fetch_one(&observer).await.unwrap()
    };
    let one = append(&order("a"), Expected::Any, 1);
    let another = || append(&order("a"), Expected::Any, 1);
    store.append(one).await.unwrap();
    for _ in 0..10 {
        store.append(another()).await.unwrap();
    }
    assert_eq!(counts().await, (11, 0));
    // What is said of a conflict, the function says.
    let lost = store.append(append(&order("a"), Expected::MustNotExist, 1)).await;
    assert!(matches!(lost, Err(AppendError::Conflict { .. })), "{lost:?}");
    assert_eq!(counts().await, (12, 1));
    // In turn with another.
    for _ in 0..5 {
        other.append(another()).await.unwrap();
        store.append(another()).await.unwrap();
    }
    assert_eq!(counts().await, (22, 1));
    // At the same time: one of them finds the head moved.
    let head = hold_head(&observer).await;
    let release = async {
        until_blocked(&observer, 2).await;
        head.rollback().await.unwrap();
    };
    let (one, two, ()) = tokio::join!(store.append(another()), other.append(another()), release);
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(counts().await, (24, 2));
    let late = if one.first_position < two.first_position { &other } else { &store };
    for nth in 1..=8 {
        late.append(another()).await.unwrap();
        assert_eq!(counts().await, (24, 2 + nth), "it counts on more of that");
    }
    late.append(another()).await.unwrap();
    assert_eq!(counts().await, (25, 10));
    assert_eq!(assert_log_is_whole(&observer).await, 32);
}

/// The relay has at hand what its own process commits; what others do it must read.
#[tokio::test]
async fn what_this_process_commits_is_published_without_reading_it_back() {
    let (cluster, nats) = tokio::join!(counting(), Server::start_single());
    let (cluster, nats) = (cluster, nats.unwrap());
    let (store, _committer, observer) = open(&cluster, "log").await;
    let (name, password) = nats.credentials(User::Relay);
    let options = ConnectOptions::with_user_and_password(name, password);
    let client = options.connect(nats.url()).await.unwrap();
    let shutdown = CancellationToken::new();
    // A lease that is lost for a moment, or an acknowledgement that is late, begins anew, and reads.
    let lasting = RelayConfig {
        lease_duration: Duration::from_secs(600),
        ack_wait_max: DEADLINE,
        ..region::config()
    };
    let relay = Relay::spawn(store.clone(), client, lasting, shutdown.clone());
    let publish = async |store: &EventStore| {
        let appended = store.append(append(&order("a"), Expected::Any, 2)).await.unwrap();
        let mut status = relay.status();
        let last = appended.last_position();
        let published = status.wait_for(|status| status.published >= Some(last));
        timeout(DEADLINE, published).await.unwrap().unwrap();
    };
    let reads = async || -> i64 {
        let reads = "select coalesce(sum(calls), 0)::bigint from pg_stat_statements
                     where query like '%where position > %'";
        sqlx::query_scalar(reads).fetch_one(&observer).await.unwrap()
    };
    // What is appended while the relay begins is read or kept.
    publish(&store).await;
    publish(&store).await;
    let before = reads().await;
    assert!(0 < before, "it began with what is there");
    for _ in 0..20 {
        publish(&store).await;
    }
    assert_eq!(reads().await, before);

    let (other, _other_committer) =
        EventStore::open(pool(&cluster.url("log")), StoreConfig::new(LOG_ID)).await.unwrap();
    other.append(append(&order("a"), Expected::Any, 1)).await.unwrap();
    publish(&store).await;
    assert!(before < reads().await);
    assert_eq!(assert_log_is_whole(&observer).await, 47);
    shutdown.cancel();
    relay.stopped().await;
}
