//! A service of a user's own, which keeps its own data, and the worlds that it is in.

use std::sync::{
    Arc, Mutex, OnceLock,
    atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use process::server::{ServerLimits, serve};
use serde_json::json;
use tokio::{net::TcpListener, sync::RwLock};
use tokio_util::sync::CancellationToken;

use crate::world::World;

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Answer = Response<UnsyncBoxBody<Bytes, BoxError>>;

/// The service of one region.
pub struct Shop {
    pub url: String,
    pub state: Arc<State>,
    stop: CancellationToken,
}

pub struct State {
    region: &'static str,
    /// What it says that it read.
    pub position: Mutex<Option<String>>,
    /// Where it appends.
    pub gateway: OnceLock<String>,
    /// How often it was asked.
    pub asked: AtomicUsize,
    /// What the last request said.
    pub heard: Mutex<HeaderMap>,
    /// Whoever holds it for writing keeps its answers back.
    pub held: RwLock<()>,
}

impl Shop {
    pub async fn start(region: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(State {
            region,
            position: Mutex::default(),
            gateway: OnceLock::new(),
            asked: AtomicUsize::new(0),
            heard: Mutex::default(),
            held: RwLock::default(),
        });
        let stop = CancellationToken::new();
        let answering = Arc::clone(&state);
        let answer = move |request, _| answer(Arc::clone(&answering), request);
        tokio::spawn(serve(listener, ServerLimits::default(), answer, stop.clone()));
        Self { url, state, stop }
    }

    /// From now on it says that it read so far.
    pub fn stands_at(&self, position: u64) {
        *self.state.position.lock().unwrap() = Some(format!("1.{position}"));
    }

    pub fn asked(&self) -> usize {
        self.state.asked.load(Ordering::Relaxed)
    }

    pub fn heard(&self, name: &str) -> Vec<String> {
        let heard = self.state.heard.lock().unwrap();
        heard.get_all(name).iter().map(|value| value.to_str().unwrap().to_owned()).collect()
    }

    pub fn route(&self) -> String {
        format!("{{ prefix = \"/shop\", upstream = \"{}\", projection = \"orders\" }}", self.url)
    }
}

impl Drop for Shop {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn answer(state: Arc<State>, request: Request<Incoming>) -> Answer {
    state.asked.fetch_add(1, Ordering::Relaxed);
    *state.heard.lock().unwrap() = request.headers().clone();
    let _free = state.held.read().await;
    let mut answer = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/shop/items") | (&Method::POST, "/shop/search") => {
            json(StatusCode::OK, json!({"region": state.region}))
        }
        (&Method::POST, "/shop/items") | (_, "/shop/write") => write(&state, request).await,
        (_, "/shop/echo") => {
            let body = request.into_body().map_err(|error| Box::new(error) as BoxError);
            Response::new(body.boxed_unsync())
        }
        (_, "/shop/flood") => {
            let pieces = futures::stream::repeat_with(|| {
                Ok::<_, BoxError>(Frame::data(Bytes::from_static(&[b'x'; 65_536])))
            });
            Response::new(StreamBody::new(pieces).boxed_unsync())
        }
        (_, "/shop/broken") => json(StatusCode::INTERNAL_SERVER_ERROR, json!({"broken": true})),
        _ => json(StatusCode::NOT_FOUND, json!({})),
    };
    let headers = answer.headers_mut();
    if let Some(position) = &*state.position.lock().unwrap() {
        headers.insert("consistency-position", HeaderValue::from_str(position).unwrap());
    }
    for (name, value) in [
        ("connection", "x-private"),
        ("x-private", "1"),
        ("x-public", "1"),
        ("tidemark-head", "9.9"),
        ("vary", "Accept"),
        ("set-cookie", "cart=1"),
    ] {
        headers.append(name, HeaderValue::from_static(value));
    }
    answer
}

/// Appends through the gateway with what its caller knew, and hands back the token.
async fn write(state: &State, request: Request<Incoming>) -> Answer {
    let gateway = state.gateway.get().unwrap();
    let token = request.headers()["consistency-token"].clone();
    let event = json!({"type": "Stocked", "data": {}});
    let appended = reqwest::Client::new()
        .post(format!("{gateway}/v1/aggregates/shop/i-1/events"))
        .header("consistency-token", token.to_str().unwrap())
        .json(&json!({"events": [event]}))
        .send()
        .await
        .unwrap();
    let token = appended.headers()["consistency-token"].to_str().unwrap();
    let token = HeaderValue::from_str(token).unwrap();
    let mut answer = json(StatusCode::CREATED, json!({"region": state.region}));
    answer.headers_mut().insert("consistency-token", token);
    answer
}

fn json(status: StatusCode, body: serde_json::Value) -> Answer {
    let body = Full::new(Bytes::from(body.to_string()));
    let body = body.map_err(|never| match never {}).boxed_unsync();
    let mut answer = Response::new(body);
    *answer.status_mut() = status;
    answer
}

/// Two regions with a service each.
pub struct Shops {
    pub world: World,
    pub primary: Shop,
    pub region: Shop,
}

impl Shops {
    /// `bounds` is added to both routes.
    pub async fn open(bounds: &str) -> Self {
        let (primary, region) = (Shop::start("us-east").await, Shop::start("eu-west").await);
        let route = |shop: &Shop| {
            let route = shop.route();
            format!("route = [{}{bounds} }}]", route.trim_end_matches('}'))
        };
        let world = World::with_both(&route(&primary), &route(&region)).await;
        for shop in [&primary, &region] {
            shop.state.gateway.set(world.primary.base.clone()).unwrap();
        }
        Self { world, primary, region }
    }
}
