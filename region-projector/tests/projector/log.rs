//! A log in memory, served over HTTP as the primary would.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use consistency::{
    AggregateId, CommittedAt, Epoch, Event, EventId, LogPosition, Name, Position, SchemaVersion,
    Version,
};
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use process::server::{ServerLimits, serve_over};
use process::tls::ServerTls;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

pub const CREDENTIAL: &str = "between regions only";

#[derive(Default)]
struct Shared {
    events: Mutex<Vec<Event>>,
    epochs: Mutex<Vec<(Epoch, Position)>>,
    cut: AtomicBool,
    withheld: Mutex<Option<Position>>,
    /// Pages of more events never come.
    quick_events_max: Mutex<Option<usize>>,
}

pub struct TestLog {
    shared: Arc<Shared>,
    pub address: SocketAddr,
    _stop: DropGuard,
}

impl TestLog {
    pub async fn start() -> Self {
        Self::start_over(None).await
    }

    pub async fn start_over(tls: Option<ServerTls>) -> Self {
        let shared = Arc::new(Shared::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let answering = Arc::clone(&shared);
        let service = move |request: Request<Incoming>, _| {
            let (response, slow) = (answering.answer(&request), answering.is_slow(&request));
            async move {
                if slow {
                    std::future::pending::<()>().await;
                }
                response
            }
        };
        tokio::spawn(serve_over(
            tls,
            None,
            listener,
            ServerLimits::default(),
            service,
            stop.clone(),
        ));
        Self { shared, address, _stop: stop.drop_guard() }
    }

    /// Whether the link to it is cut: it answers nothing but errors.
    pub fn set_cut(&self, cut: bool) {
        self.shared.cut.store(cut, Ordering::SeqCst);
    }

    /// Has pages of more events than that never come.
    pub fn set_quick_events_max(&self, events: usize) {
        *self.shared.quick_events_max.lock().unwrap() = Some(events);
    }

    /// Leaves an event out of every page.
    pub fn withhold(&self, position: Option<Position>) {
        *self.shared.withheld.lock().unwrap() = position;
    }

    /// The whole log.
    pub fn events(&self) -> Vec<Event> {
        self.shared.events.lock().unwrap().clone()
    }

    /// Puts an event of another log at the end.
    pub fn restore(&self, event: Event) {
        self.shared.events.lock().unwrap().push(event);
    }

    /// Loses what comes after a position, and goes on in a new epoch.
    pub fn open_epoch(&self, after: Position) -> Epoch {
        let mut epochs = self.shared.epochs.lock().unwrap();
        let epoch = Epoch::new(epochs.len() as u32 + 2).unwrap();
        self.shared.events.lock().unwrap().truncate(after.get() as usize);
        epochs.push((epoch, after));
        epoch
    }

    /// Appends an event of an aggregate of type `tally`.
    pub fn append(&self, id: &str, event_type: &str, data: &str) -> Event {
        self.append_to("tally", id, event_type, data)
    }

    pub fn append_to(&self, kind: &str, id: &str, event_type: &str, data: &str) -> Event {
        let mut events = self.shared.events.lock().unwrap();
        let aggregate = AggregateId::new(Name::new(kind).unwrap(), id).unwrap();
        let versions = events.iter().filter(|event| event.aggregate == aggregate).count() as u64;
        let position = Position::new(events.len() as u64 + 1).unwrap();
        let event = Event {
            at: LogPosition::new(self.shared.epoch(), position),
            id: EventId::new(Uuid::new_v4()),
            previous_id: events.last().map_or(EventId::NIL, |event| event.id),
            aggregate,
            version: Version::new(versions + 1).unwrap(),
            event_type: Name::new(event_type).unwrap(),
            schema_version: SchemaVersion::FIRST,
            committed_at: CommittedAt::from_unix_micros(
                std::time::UNIX_EPOCH.elapsed().unwrap().as_micros() as i64,
            ),
            correlation_id: Uuid::new_v4(),
            causation_id: Uuid::new_v4(),
            idempotency_key_hash: None,
            traceparent: None,
            data: data.to_owned(),
        };
        events.push(event.clone());
        event
    }
}

impl Shared {
    fn is_slow(&self, request: &Request<Incoming>) -> bool {
        let limit = parameter(request.uri().query().unwrap_or_default(), "limit");
        self.quick_events_max.lock().unwrap().is_some_and(|max| max < limit)
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let credential = request.headers().get("tidemark-credential");
        if self.cut.load(Ordering::SeqCst) {
            return refused(StatusCode::BAD_GATEWAY);
        }
        if credential.is_none_or(|credential| credential != CREDENTIAL) {
            return refused(StatusCode::UNAUTHORIZED);
        }
        match request.uri().path() {
            "/internal/epochs" => {
                let epochs = self.epochs.lock().unwrap();
                Response::new(Full::new(serde_json::to_vec(&*epochs).unwrap().into()))
            }
            "/internal/log" => self.page(request.uri().query().unwrap_or_default()),
            path if path.starts_with("/internal/log/") => {
                let id = path.rsplit('/').next().unwrap();
                let id = percent_encoding::percent_decode_str(id).decode_utf8().unwrap();
                self.aggregate(&id, request.uri().query().unwrap_or_default())
            }
            _ => refused(StatusCode::NOT_FOUND),
        }
    }

    fn epoch(&self) -> Epoch {
        self.epochs.lock().unwrap().last().map_or(Epoch::FIRST, |(epoch, _)| *epoch)
    }

    fn page(&self, query: &str) -> Response<Full<Bytes>> {
        let epoch = Epoch::new(parameter(query, "epoch") as u32).unwrap();
        let events = self.events.lock().unwrap();
        let page = events.iter().skip(parameter(query, "after")).take(parameter(query, "limit"));
        let withheld = *self.withheld.lock().unwrap();
        let page = page.filter(|event| Some(event.at.position) != withheld);
        let page = page.filter(|event| event.at.epoch <= epoch);
        let mut response = compact(page);
        let head = format!("{}.{}", self.epoch(), events.len());
        response.headers_mut().insert("tidemark-head", head.parse().unwrap());
        response
    }

    /// Two events at a time, so that more are asked for.
    fn aggregate(&self, id: &str, query: &str) -> Response<Full<Bytes>> {
        let events = self.events.lock().unwrap();
        let withheld = *self.withheld.lock().unwrap();
        let from = parameter(query, "from_version") as u64;
        let ours = events.iter().filter(|event| event.aggregate.id() == id);
        let ours = ours.filter(|event| from <= event.version.get());
        lines(ours.filter(|event| Some(event.at.position) != withheld).take(2))
    }
}

fn parameter(query: &str, name: &str) -> usize {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs.filter(|(key, _)| *key == name).map(|(_, value)| value.parse::<usize>().unwrap()).sum()
}

/// The form that a projector asks for.
fn compact<'a>(events: impl Iterator<Item = &'a Event>) -> Response<Full<Bytes>> {
    let mut body = String::new();
    for event in events {
        let headers = event.headers();
        let names: Vec<_> = headers.iter().map(|(name, _)| name).collect();
        let values = headers.iter().map(|(_, value)| value).chain([&event.data]);
        body += &format!("{}\n{}\n", json!({"headers": names}), json!(values.collect::<Vec<_>>()));
    }
    let mut response = Response::new(Full::new(body.into()));
    let kind = "application/vnd.tidemark.log".parse().unwrap();
    response.headers_mut().insert("content-type", kind);
    response
}

fn lines<'a>(events: impl Iterator<Item = &'a Event>) -> Response<Full<Bytes>> {
    let lines = events.map(|event| {
        let headers: serde_json::Map<_, _> =
            event.headers().into_iter().map(|(name, text)| (name.into(), text.into())).collect();
        format!("{}\n", json!({ "headers": headers, "data": event.data }))
    });
    Response::new(Full::new(lines.collect::<String>().into()))
}

fn refused(status: StatusCode) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}
