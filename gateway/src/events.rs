//! `GET /v1/currency/events`: where this region stands, as server-sent events, whenever that changes.
//! Who brings a token is told the moment the region has caught up with it, and the stream ends.

use std::sync::Arc;

use bytes::Bytes;
use consistency::{
    Demand, Evidence, Judged, LogPosition, Name, Scope, Token, TokenStatus, Verdict, judge,
};
use futures::stream;
use http::StatusCode;
use http_body_util::StreamBody;
use hyper::body::Frame;
use process::config::Period;
use serde::Deserialize;
use serde_json::json;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    answer::Answer,
    body::{Body, BodyError},
    currency::{Expecting, Partitions},
    error::Error,
    gateway::Gateway,
    overview::{self, Standing},
    request::{self, Call},
    token_carrier::{CONSISTENCY_TOKEN, Presented},
};

/// The path, as a 202 links to it.
pub const PATH: &str = "/v1/currency/events";

/// How soon a browser comes again when the stream has ended, in milliseconds.
const RETRY_MS: u32 = 2_000;

/// Bounds of the listeners to events.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct EventsConfig {
    /// Listeners at once; further ones are refused as `waiters-full`.
    pub listeners_max: usize,
    /// The least time between two events of one listener.
    pub interval: Period,
    /// How often a quiet stream shows that it is alive.
    pub heartbeat: Period,
    /// After this a stream ends. Its listener may come again.
    pub duration_max: Period,
}

impl Default for EventsConfig {
    fn default() -> Self {
        Self {
            listeners_max: 1_000,
            interval: Period::from_millis(250),
            heartbeat: Period::from_secs(15),
            duration_max: Period::from_secs(60 * 60),
        }
    }
}

impl EventsConfig {
    /// What is wrong with it.
    pub fn mistakes(&self) -> Vec<String> {
        let bounds = [
            (self.listeners_max, "events.listeners_max"),
            (self.heartbeat.millis() as usize, "events.heartbeat"),
            (self.duration_max.millis() as usize, "events.duration_max"),
        ];
        let zero = bounds.iter().filter(|(bound, _)| *bound == 0);
        zero.map(|(_, key)| format!("{key}: must be above zero")).collect()
    }
}

/// Who listens.
#[derive(Debug)]
pub struct Listeners {
    places: Arc<Semaphore>,
    places_max: usize,
    ending: CancellationToken,
}

impl Listeners {
    /// At most so many.
    pub fn new(listeners_max: usize) -> Self {
        let places_max = listeners_max.min(Semaphore::MAX_PERMITS);
        let places = Arc::new(Semaphore::new(places_max));
        Self { places, places_max, ending: CancellationToken::new() }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.places_max - self.places.available_permits()
    }

    /// Ends all streams: a stream without an end must not hold up the end of the process.
    pub fn end(&self) {
        self.ending.cancel();
    }
}

/// Begins a stream.
pub fn listen(gateway: &Arc<Gateway>, call: &Call) -> Result<Answer, Error> {
    call.only_parameters(&["token", "view"])?;
    let goal = Goal::of(gateway, call)?;
    let place = Arc::clone(&gateway.listeners.places).try_acquire_owned();
    let place = place.map_err(|_| Error::WaitersFull)?;
    let now = Instant::now();
    let listener = Listener {
        changes: gateway.currency.changes(),
        expecting: goal.is_some().then(|| gateway.currency.expecting()),
        gateway: Arc::clone(gateway),
        goal,
        told: None,
        due: now,
        ends: now + gateway.config.events.duration_max.get(),
        is_over: false,
        _place: place,
    };
    let events = stream::unfold(listener, async |mut listener| {
        let event = listener.next().await?;
        Some((Ok::<_, BodyError>(Frame::data(event)), listener))
    });
    let answer = Answer::typed(StatusCode::OK, "text/event-stream", Bytes::new());
    Ok(Answer { body: Body::stream(StreamBody::new(events)), ..answer })
}

/// What a listener waits for: a token, in one projection or in all.
struct Goal {
    token: Token,
    projections: Vec<Name>,
}

/// How a goal stands.
enum Progress {
    Unmet,
    Met(LogPosition),
    /// An epoch was opened meanwhile that does not have what the token names.
    Lost,
}

impl Goal {
    /// Of the token in the query, or in the header. A cookie is no goal: a browser sends it with
    /// every request, whether or not the page waits for anything.
    fn of(gateway: &Gateway, call: &Call) -> Result<Option<Self>, Error> {
        let projections = match call.parameter("view")? {
            None => gateway.currency.projections().cloned().collect(),
            Some(view) => {
                let found = gateway.domain.view(&view).map(|(definition, _)| definition.name());
                vec![found.ok_or(Error::UnknownView(view))?.clone()]
            }
        };
        let token = match call.parameter("token")? {
            Some(sealed) => {
                let history = gateway.history();
                let status = gateway.carrier.open_one(&sealed, &history);
                // One that could not be read is refused, as it is in the header.
                let absent = matches!(status, TokenStatus::Absent);
                let presented = Presented { status, by_cookie_only: false, wants_cookie: false };
                let (token, _) = request::token_of(presented, &history)?;
                (!absent).then(|| token.merge(call.token.clone()))
            }
            None if call.headers.contains_key(CONSISTENCY_TOKEN) => Some(call.token.clone()),
            None => None,
        };
        Ok(token.map(|token| Self { token, projections }))
    }

    fn progress(&self, gateway: &Gateway) -> Progress {
        let token = match gateway.history().judge(self.token.clone()) {
            Judged::Current(token) | Judged::Carried(token) | Judged::Newer(token) => token,
            Judged::Lost(_) => return Progress::Lost,
        };
        let demand = Demand::of(&token, Scope::Everything);
        let is_met = |projection| {
            let standing = gateway.currency.standing(projection, Partitions::All);
            let watermark = standing.watermark;
            let evidence = Evidence { watermark, row_version: None, parked: Vec::new() };
            judge(&demand, Scope::Everything, &evidence) == Verdict::Current
        };
        let all_met = self.projections.iter().all(is_met);
        if all_met { Progress::Met(demand.at()) } else { Progress::Unmet }
    }
}

/// One who listens. Dropped with the body of its answer, wherever it stands.
struct Listener {
    gateway: Arc<Gateway>,
    goal: Option<Goal>,
    changes: watch::Receiver<()>,
    /// Checkpoints are polled while hints are silent and this is held.
    expecting: Option<Expecting>,
    /// What it was told last.
    told: Option<Standing>,
    /// When it may be told again.
    due: Instant,
    ends: Instant,
    is_over: bool,
    _place: OwnedSemaphorePermit,
}

impl Listener {
    /// The bytes that come next, as soon as there is something to be told; `None` at the end.
    async fn next(&mut self) -> Option<Bytes> {
        if self.is_over {
            return None;
        }
        let ending = self.gateway.listeners.ending.clone();
        let heartbeat = Instant::now() + self.gateway.config.events.heartbeat.get();
        loop {
            // Marked as seen before it is looked at, so that no change is missed in between.
            self.changes.mark_unchanged();
            if let Some(event) = self.event() {
                return Some(event);
            }
            let due = self.due;
            tokio::select! {
                biased;
                // A drain waits for answers, and this is none.
                () = ending.cancelled() => return None,
                () = tokio::time::sleep_until(self.ends) => return None,
                // Never refused: the sender lives as long as the gateway that is held here.
                _ = self.changes.changed() => {}
                () = tokio::time::sleep_until(due), if Instant::now() < due => {}
                () = tokio::time::sleep_until(heartbeat) => return Some(Bytes::from_static(b":\n\n")),
            }
        }
    }

    /// What is to be told now.
    fn event(&mut self) -> Option<Bytes> {
        match self.goal.as_ref().map(|goal| goal.progress(&self.gateway)) {
            Some(Progress::Met(at)) => return Some(self.last("caught-up", Some(at))),
            Some(Progress::Lost) => return Some(self.last("write-lost", None)),
            Some(Progress::Unmet) | None => {}
        }
        let now = Instant::now();
        if now < self.due {
            return None;
        }
        let stands = overview::standing(&self.gateway);
        if self.told.as_ref() == Some(&stands) {
            return None;
        }
        self.due = now + self.gateway.config.events.interval.get();
        let retry =
            if self.told.is_none() { format!("retry: {RETRY_MS}\n") } else { String::new() };
        let data =
            serde_json::to_string(&stands).expect("where a region stands has text keys only");
        let event = Bytes::from(format!("{retry}event: currency\ndata: {data}\n\n"));
        self.told = Some(stands);
        Some(event)
    }

    fn last(&mut self, name: &'static str, at: Option<LogPosition>) -> Bytes {
        self.is_over = true;
        self.expecting = None;
        let data = json!({
            "region": self.gateway.config.region,
            "epoch": at.map(|at| at.epoch),
            "position": at.map(|at| at.position),
        });
        Bytes::from(format!("event: {name}\ndata: {data}\n\n"))
    }
}
