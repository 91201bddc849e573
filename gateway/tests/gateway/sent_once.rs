//! Connections that are lost when a request has been read to its end: what writes has been sent once then,
//! whatever its method, and what reads is sent once more and no more.

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use reqwest::{Method, RequestBuilder};
use tokio::{net::TcpListener, sync::Notify};

use crate::world::{Gateway, Reply, World, region_config};

const WARM: &str = "/shop/warm";

/// A service that reads each request to its end, and then answers it or is gone with its connection.
struct Fickle {
    url: String,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    answers: AtomicBool,
    came: Mutex<Vec<Came>>,
}

/// A request that has come to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Came {
    connection: usize,
    method: Method,
    path: String,
}

impl Fickle {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(State::default());
        let serving = Arc::clone(&state);
        tokio::spawn(async move {
            for connection in 0.. {
                let (stream, _) = listener.accept().await.unwrap();
                let (state, gone) = (Arc::clone(&serving), Arc::new(Notify::new()));
                let is_gone = Arc::clone(&gone);
                let react = service_fn(move |request| {
                    react(Arc::clone(&state), connection, request, Arc::clone(&gone))
                });
                tokio::spawn(async move {
                    let protocol = auto::Builder::new(TokioExecutor::new());
                    tokio::select! {
                        biased;
                        () = is_gone.notified() => {}
                        _ = protocol.serve_connection(TokioIo::new(stream), react) => {}
                    }
                });
            }
        });
        Self { url, state }
    }

    fn route(&self) -> String {
        let url = &self.url;
        let paths = "write_paths = [\"/shop/write\"], read_paths = [\"/shop/search\"]";
        // On one thread, all use the same connection to it.
        format!(
            "listen.threads = 1
            route = [{{ prefix = \"/shop\", upstream = \"{url}\", projection = \"orders\", {paths} }}]"
        )
    }

    fn answers(&self, whether: bool) {
        self.state.answers.store(whether, Ordering::SeqCst);
    }

    /// What came since this was asked last.
    fn came(&self) -> Vec<Came> {
        std::mem::take(&mut self.state.came.lock().unwrap())
    }
}

async fn react(
    state: Arc<State>,
    connection: usize,
    request: Request<Incoming>,
    gone: Arc<Notify>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    request.into_body().collect().await.unwrap();
    let mut answer = Response::new(Full::default());
    // What gateways ask of their own accord.
    if path.starts_with("/internal/") {
        *answer.status_mut() = StatusCode::NOT_FOUND;
        return Ok(answer);
    }
    state.came.lock().unwrap().push(Came { connection, method, path });
    if !state.answers.load(Ordering::SeqCst) {
        gone.notify_one();
        std::future::pending::<()>().await;
    }
    Ok(answer)
}

/// How often a request comes whose connection is lost then, and what its caller is told: on a connection that
/// `warm` was answered on, and on a new one.
async fn lost(
    service: &Fickle,
    warm: RequestBuilder,
    request: RequestBuilder,
) -> [(usize, Reply); 2] {
    service.answers(true);
    service.came();
    let warmed = Reply::of(warm).await;
    assert_eq!(warmed.status, 200, "{warmed:?}");
    let used = service.came().remove(0).connection;
    service.answers(false);
    let on_used = Reply::of(request.try_clone().unwrap()).await;
    let came_on_used = service.came();
    assert_eq!(came_on_used[0].connection, used, "the connection is kept");
    let on_new = Reply::of(request).await;
    let came_on_new = service.came();
    let known =
        |came: &Came| came_on_used.iter().any(|before| before.connection == came.connection);
    assert!(!came_on_new.iter().any(known), "{came_on_new:?} after {came_on_used:?}");
    [(came_on_used.len(), on_used), (came_on_new.len(), on_new)]
}

/// Methods and paths below a route that write.
fn writes() -> Vec<(Method, &'static str)> {
    let by_method = [Method::POST, Method::PUT, Method::PATCH, Method::DELETE];
    let by_method = by_method.into_iter().map(|method| (method, "/shop/items"));
    // Methods that would read anywhere else.
    let by_path = [Method::GET, Method::HEAD, Method::OPTIONS];
    by_method.chain(by_path.into_iter().map(|method| (method, "/shop/write/log"))).collect()
}

fn assert_lost_write(came_to: &[(usize, Reply); 2], what: &str) {
    for (count, told) in came_to {
        assert_eq!((*count, told.status), (1, 503), "{what}: {told:?}");
        let is_head = what.starts_with("HEAD");
        assert!(is_head || told.problem() == "outcome-unknown", "{what}: {told:?}");
    }
}

#[tokio::test]
async fn a_service_that_is_lost_with_a_request_gets_a_write_once_and_a_read_once_more() {
    let service = Fickle::start().await;
    let world = World::with_both(&service.route(), "").await;
    let gateway = &world.primary;
    let warm = || gateway.request(Method::GET, WARM);
    for (method, path) in writes() {
        let what = format!("{method} {path}");
        for body in ["", "{}"] {
            let request = gateway.request(method.clone(), path).body(body);
            assert_lost_write(&lost(&service, warm(), request).await, &what);
        }
    }
    let reads = [
        (Method::GET, "/shop/items", 2),
        (Method::HEAD, "/shop/items", 2),
        (Method::OPTIONS, "/shop/items", 2),
        // What it reads is told by its path. That it changes nothing its method does not say.
        (Method::POST, "/shop/search", 1),
    ];
    for (method, path, times) in reads {
        let what = format!("{method} {path}");
        let request = gateway.request(method, path).body("{}");
        // Else it would be asked again until it has caught up.
        let request = request.header("consistency-policy", "pending");
        for (count, told) in lost(&service, warm(), request).await {
            assert_eq!((count, told.status), (times, 202), "{what}: {told:?}");
        }
    }
}

/// A gateway of a region that takes this one for its primary.
async fn region_of(world: &World, primary: &Fickle, more: &str) -> Gateway {
    let config = region_config(&world.postgres, &world.nats, &primary.url);
    // Nobody but the requests of the test connects, and nobody is left alone.
    let bounds = "primary_region.heartbeat_interval = \"1h\"\n\
                  primary_region.breaker_failures_max = 1000\nprimary_region.name";
    let config = config.replace("primary_region.name", bounds);
    let gateway = Gateway::start(&format!("{more}\n{config}")).await;
    gateway.ready().await;
    gateway
}

#[tokio::test]
async fn a_primary_that_is_lost_with_a_request_of_a_route_gets_a_write_once_and_a_read_once_more() {
    let (world, service, primary) = tokio::join!(World::start(), Fickle::start(), Fickle::start());
    let region = region_of(&world, &primary, &service.route()).await;
    let warm = || region.request(Method::POST, WARM);
    for (method, path) in writes() {
        let what = format!("{method} {path}");
        for body in ["", "{}"] {
            let request = region.request(method.clone(), path).body(body);
            assert_lost_write(&lost(&primary, warm(), request).await, &what);
        }
    }
    assert_eq!(service.came(), [], "the region's own service writes nothing");
    for (method, path, times) in
        [(Method::GET, "/shop/items", 2), (Method::POST, "/shop/search", 1)]
    {
        let what = format!("{method} {path}");
        let request = region.request(method, path).header("consistency-policy", "primary");
        for (count, told) in lost(&primary, warm(), request).await {
            assert_eq!((count, told.status), (times, 503), "{what}: {told:?}");
        }
        assert_eq!(service.came(), [], "{what}");
    }
}

#[tokio::test]
async fn a_primary_that_is_lost_with_a_request_of_ours_gets_a_write_once_and_a_read_once_more() {
    let (world, primary) = tokio::join!(World::start(), Fickle::start());
    let region = region_of(&world, &primary, "").await;
    let warm = || region.request(Method::POST, "/v1/commands/CancelOrder").json(&"warm");
    let command = region.request(Method::POST, "/v1/commands/CancelOrder").json(&"lost");
    let append = region.request(Method::POST, "/v1/aggregates/note/n-1/events").json(&"lost");
    let keyed = append.try_clone().unwrap().header("idempotency-key", "k");
    for (what, write) in [("command", command), ("append", append), ("append with a key", keyed)] {
        assert_lost_write(&lost(&primary, warm(), write).await, what);
    }
    let state = region.request(Method::GET, "/v1/aggregates/note/n-1");
    let row = region.request(Method::GET, "/v1/views/order-detail/o-1");
    for read in [state, row.header("consistency-policy", "primary")] {
        for (count, told) in lost(&primary, warm(), read).await {
            assert_eq!((count, told.status), (2, 503), "{told:?}");
        }
    }
}
