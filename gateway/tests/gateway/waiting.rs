//! Many who wait.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, client::conn::http2::SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{net::TcpStream, task::JoinSet};

use crate::world::{DEADLINE, World, eventually, position};

const CONNECTIONS: usize = 200;
const STREAMS: usize = 100;
/// One reader in so many hangs up before it is released.
const HANGS_UP: usize = 10;

type Sender = SendRequest<Empty<Bytes>>;

async fn connect(base: &str) -> Sender {
    let address = base.trim_start_matches("http://");
    let stream = TcpStream::connect(address).await.unwrap();
    let shaken = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (sender, connection) = shaken.await.unwrap();
    tokio::spawn(connection);
    sender
}

async fn read(mut sender: Sender, uri: String, token: String) -> (u16, String, String) {
    let request = Request::get(uri).header("consistency-token", token);
    let request = request.header("consistency-policy", "wait").body(Empty::new()).unwrap();
    let answer = sender.send_request(request).await.unwrap();
    let header = |name| answer.headers().get(name).unwrap().to_str().unwrap().to_owned();
    let (said, token) = (header("consistency-status"), header("consistency-token"));
    let status = answer.status().as_u16();
    answer.into_body().collect().await.unwrap();
    (status, said, token)
}

/// Each of another row, none of which is there: what they wait for is that this is certain.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_commit_releases_twenty_thousand_readers_none_lost_and_none_early() {
    let settings = "read = { wait_max = \"5m\", query_timeout = \"30s\" }\n\
         listen.request_timeout = \"5m\"";
    let mut world = World::with(settings).await;
    world.stock().await;
    world.catch_up().await;
    let placed = world.place("o-1").await.body["position"].as_u64().unwrap();
    let token = world.region.token_at(placed);
    let answered = Arc::new(AtomicUsize::new(0));
    let (mut reads, mut hanging) = (JoinSet::new(), JoinSet::new());
    for connection in 0..CONNECTIONS {
        let sender = connect(&world.region.base).await;
        for stream in 0..STREAMS {
            let number = connection * STREAMS + stream;
            let uri = format!("{}/v1/views/order-detail/w-{number}", world.region.base);
            let (read, answered) = (read(sender.clone(), uri, token.clone()), answered.clone());
            let counted = async move {
                let read = read.await;
                answered.fetch_add(1, Ordering::Relaxed);
                read
            };
            if number.is_multiple_of(HANGS_UP) {
                hanging.spawn(counted)
            } else {
                reads.spawn(counted)
            };
        }
    }
    let all = (CONNECTIONS * STREAMS) as u64;
    wait_for(&world, all).await;
    hanging.shutdown().await;
    let left = reads.len() as u64;
    wait_for(&world, left).await;
    assert_eq!(answered.load(Ordering::Relaxed), 0, "nobody is answered early");
    world.catch_up().await;
    while let Some(read) = reads.join_next().await {
        let (status, said, token) = read.unwrap();
        assert_eq!((status, said.split(';').next()), (404, Some("waited")), "{said}");
        assert!(position(placed) <= world.region.open(&token).read_position());
    }
    assert_eq!(answered.load(Ordering::Relaxed) as u64, left, "nobody is lost");
    assert_eq!(world.region.waiter_count().await, 0);
}

async fn wait_for(world: &World, count: u64) {
    let patience = Duration::from_secs(180);
    let waiting = async {
        while world.region.waiter_count().await != count {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(patience, waiting).await.unwrap_or_else(|_| panic!("{count} wait"));
}

#[tokio::test]
async fn a_gateway_that_ends_keeps_nobody_waiting() {
    let world = World::with("read.wait_max = \"5m\"\nlisten.request_timeout = \"5m\"").await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    let path = "/v1/views/order-detail/o-1";
    let request = world.region.request(reqwest::Method::GET, path).header("connection", "close");
    let request = request.header("consistency-token", token);
    let request = request.header("consistency-policy", "wait;ms=290000");
    let waiting = tokio::spawn(crate::world::Reply::of(request));
    world.region.waiters(1).await;
    let World { region, primary: _primary, .. } = world;
    assert!(region.end().await, "nothing was cut off");
    let refused = waiting.await.unwrap();
    assert_eq!(refused.came_to(), (503, "replication-pending"));
    assert!(refused.header("server-timing").starts_with("wait;dur="), "{refused:?}");
}

/// Many may be released at once, and the database may take its time over all of them.
#[tokio::test]
async fn who_was_released_is_answered_when_the_database_is_slow_to_answer() {
    // Nobody finds out before it is told.
    let settings = "read = { wait_max = \"1m\", query_timeout = \"200ms\", memory_bytes_max = 0, \
         hints_silence_max = \"1h\", refresh_interval = \"1h\" }\nlisten.request_timeout = \"1m\"";
    let mut world = World::with(settings).await;
    world.stock().await;
    let token = world.place("o-1").await.token();
    let reading = world.region.request(reqwest::Method::GET, "/v1/views/order-detail/o-1");
    let reading = reading.header("consistency-token", token);
    let reading = reading.header("consistency-policy", "wait;ms=60000");
    let mut reading = tokio::spawn(crate::world::Reply::of(reading));
    world.region.waiters(1).await;
    let head = world.catch_up_silently().await;
    let mut gate = world.projector.pool.begin().await.unwrap();
    sqlx::query("lock table orders_v1_order_detail in access exclusive mode")
        .execute(&mut *gate)
        .await
        .unwrap();
    world.projector.announce(head).await;
    // It looks, in vain, and looks again.
    let mut asked = std::collections::BTreeSet::new();
    tokio::select! {
        biased;
        ended = &mut reading => panic!("{:?}", ended.unwrap().came_to()),
        () = eventually("the database is asked twice", async || {
            asked.extend(blocked_since(&world).await);
            2 <= asked.len()
        }) => {}
    }
    gate.rollback().await.unwrap();
    let reply = tokio::time::timeout(DEADLINE, reading).await.unwrap().unwrap();
    assert_eq!(reply.came_to(), (200, "waited"));
}

/// When the questions that wait for a lock were asked. The server's own workers wait for locks, too, and ask none.
async fn blocked_since(world: &World) -> Vec<String> {
    sqlx::query_scalar(
        "select query_start::text from pg_stat_activity
         where datname = current_database() and wait_event_type = 'Lock'
             and backend_type = 'client backend' and query_start is not null",
    )
    .fetch_all(&world.projector.pool)
    .await
    .unwrap()
}
