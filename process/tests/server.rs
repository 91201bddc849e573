//! The server and the admin listener over real sockets.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test where it stands")]

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use process::{
    admin::{self, Admin, Condition, Readiness},
    config::{Period, Secret},
    server::{self, ServerLimits, Workers},
    telemetry::Metrics,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::Notify,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(20);

async fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

#[tokio::test]
async fn a_request_under_way_is_finished_when_the_server_ends() {
    let (listener, address) = listener().await;
    let (arrived, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (arriving, releasing) = (Arc::clone(&arrived), Arc::clone(&release));
    let stop = CancellationToken::new();
    let answer = move |_, _| {
        let (arriving, releasing) = (Arc::clone(&arriving), Arc::clone(&releasing));
        async move {
            arriving.notify_one();
            releasing.notified().await;
            Response::new(Full::new(Bytes::from_static(b"done")))
        }
    };
    let served =
        tokio::spawn(server::serve(listener, ServerLimits::default(), answer, stop.clone()));
    let asked = tokio::spawn(reqwest::get(format!("http://{address}/")));
    timeout(PATIENCE, arrived.notified()).await.unwrap();
    stop.cancel();
    release.notify_one();
    let answered = timeout(PATIENCE, asked).await.unwrap().unwrap().unwrap();
    assert_eq!(answered.text().await.unwrap(), "done");
    assert!(timeout(PATIENCE, served).await.unwrap().unwrap(), "everything finished");
    assert!(TcpStream::connect(&address).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn a_connection_stays_with_the_worker_that_it_was_given_to() {
    let (listener, address) = listener().await;
    let stop = CancellationToken::new();
    let answer = |_, _| async {
        let thread = std::thread::current().name().unwrap_or_default().to_owned();
        Response::new(Full::new(Bytes::from(thread)))
    };
    let workers = Workers::start(std::num::NonZeroUsize::new(2)).unwrap();
    let (limits, stopped) = (ServerLimits::default(), stop.clone());
    let served = tokio::spawn(async move {
        server::serve_over(None, Some(&workers), listener, limits, answer, stopped).await
    });
    // Each keeps one connection.
    let clients = [(); 2].map(|()| reqwest::Client::new());
    let url = format!("http://{address}/");
    let mut threads = [Vec::new(), Vec::new()];
    for _ in 0..3 {
        for (client, threads) in clients.iter().zip(&mut threads) {
            let answered = timeout(PATIENCE, client.get(&url).send()).await.unwrap().unwrap();
            threads.push(answered.text().await.unwrap());
        }
    }
    assert_eq!(threads, [vec!["worker 0"; 3], vec!["worker 1"; 3]]);
    stop.cancel();
    assert!(timeout(PATIENCE, served).await.unwrap().unwrap(), "everything finished");
}

#[tokio::test]
async fn a_client_that_never_sends_a_request_is_let_go() {
    let (listener, address) = listener().await;
    let limits =
        ServerLimits { header_timeout: Period::from_millis(50), ..ServerLimits::default() };
    let stop = CancellationToken::new();
    let answer = |_, _| async { Response::new(Full::new(Bytes::new())) };
    let served = tokio::spawn(server::serve(listener, limits, answer, stop.clone()));
    for start in ["", "P", "PRI * HT", "GET / HTTP/1.1\r\n"] {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(start.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        let read = timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
        assert!(read.is_ok(), "still connected after {start:?}");
    }
    stop.cancel();
    timeout(PATIENCE, served).await.unwrap().unwrap();
}

type Sender = hyper::client::conn::http2::SendRequest<Empty<Bytes>>;

/// A client that takes so many bytes of each answer before it reads them.
async fn http2(address: &str, window_bytes: u32) -> Sender {
    let stream = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let mut client = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    client.initial_stream_window_size(window_bytes);
    let (sender, connection) = client.handshake(stream).await.unwrap();
    tokio::spawn(connection);
    sender
}

async fn ask(sender: &mut Sender, path: &str) -> Result<Response<Incoming>, hyper::Error> {
    sender.ready().await?;
    sender
        .send_request(Request::get(format!("http://host{path}")).body(Empty::new()).unwrap())
        .await
}

/// Asks, reads nothing of the answer, and goes on asking for others until the connection ends.
async fn ask_and_read_nothing(address: &str, window_bytes: u32) {
    let mut sender = http2(address, window_bytes).await;
    let _unread = ask(&mut sender, "/large").await.unwrap();
    let lively = async { while ask(&mut sender, "/empty").await.is_ok() {} };
    assert!(timeout(PATIENCE, lively).await.is_ok(), "still connected with {window_bytes} bytes");
}

#[tokio::test]
async fn an_answer_on_http_2_that_is_not_read_ends_its_connection_and_a_slow_one_does_not() {
    let (listener, address) = listener().await;
    let limits =
        ServerLimits { answer_stall_max: Period::from_millis(100), ..ServerLimits::default() };
    let stop = CancellationToken::new();
    let release = Arc::new(Notify::new());
    let releasing = Arc::clone(&release);
    let answer = move |request: Request<Incoming>, _| {
        let releasing = Arc::clone(&releasing);
        let body = match request.uri().path() {
            "/large" => Full::new(Bytes::from(vec![0; 256 * 1024])).boxed(),
            "/slow" => StreamBody::new(futures::stream::once(async move {
                releasing.notified().await;
                Ok(Frame::data(Bytes::from_static(b"at last")))
            }))
            .boxed(),
            _ => Full::new(Bytes::new()).boxed(),
        };
        async { Response::new(body) }
    };
    let served = tokio::spawn(server::serve(listener, limits, answer, stop.clone()));
    let mut patient = http2(&address, 64 * 1024).await;
    let slow = ask(&mut patient, "/slow").await.unwrap();
    for window_bytes in [0, 1_000, 64 * 1024] {
        ask_and_read_nothing(&address, window_bytes).await;
    }
    // It has been quiet for longer than those were.
    release.notify_one();
    let read = timeout(PATIENCE, slow.into_body().collect()).await.unwrap().unwrap();
    assert_eq!(read.to_bytes(), "at last");
    stop.cancel();
    timeout(PATIENCE, served).await.unwrap().unwrap();
}

#[tokio::test]
async fn an_address_has_no_more_connections_than_it_may() {
    let (listener, address) = listener().await;
    let limits = ServerLimits { connections_per_address_max: 1, ..ServerLimits::default() };
    let stop = CancellationToken::new();
    let answer = |_, _| async { Response::new(Full::new(Bytes::new())) };
    let served = tokio::spawn(server::serve(listener, limits, answer, stop.clone()));
    let mut first = http2(&address, 1_000).await;
    ask(&mut first, "/").await.unwrap();
    let mut second = TcpStream::connect(&address).await.unwrap();
    let closed = timeout(PATIENCE, second.read(&mut [0; 1])).await.unwrap();
    assert!(closed.is_err() || matches!(closed, Ok(0)), "{closed:?}");
    ask(&mut first, "/").await.unwrap();
    stop.cancel();
    timeout(PATIENCE, served).await.unwrap().unwrap();
}

#[tokio::test]
async fn the_admin_listener_shows_probes_to_all_and_the_rest_to_who_has_the_credential() {
    let (listener, address) = listener().await;
    let readiness = Readiness::default();
    let admin = Admin {
        readiness: readiness.clone(),
        metrics: Metrics::new("example", &Default::default()).unwrap(),
        status: Arc::new(|| serde_json::json!({"region": "eu-west"})),
        operations: None,
    };
    let stop = CancellationToken::new();
    let served =
        tokio::spawn(admin::serve(listener, Some(Secret::new("hush")), admin, stop.clone()));
    let client = reqwest::Client::new();
    let get = |path: &str| client.get(format!("http://{address}{path}"));
    assert_eq!(get("/livez").send().await.unwrap().status(), 200);
    assert_eq!(get("/readyz").send().await.unwrap().status(), 200);
    readiness.set("database", Condition::NotReady("gone".to_owned()));
    let unready = get("/readyz").send().await.unwrap();
    assert_eq!(unready.status(), 503);
    assert!(unready.text().await.unwrap().contains("gone"));
    assert_eq!(get("/status").send().await.unwrap().status(), 401);
    assert_eq!(get("/metrics").bearer_auth("wrong").send().await.unwrap().status(), 401);
    let status = get("/status").bearer_auth("hush").send().await.unwrap();
    assert_eq!(status.text().await.unwrap(), r#"{"region":"eu-west"}"#);
    let unknown = get("/else").bearer_auth("hush").send().await.unwrap();
    assert_eq!(unknown.status(), 404);
    stop.cancel();
    timeout(PATIENCE, served).await.unwrap().unwrap();
}
