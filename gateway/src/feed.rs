//! How a gateway learns where its region stands: hints from the projector, checkpoints from the
//! database, and the head from the primary.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use consistency::{
    Announcement, AnnouncementSeal, Epoch, EpochHistory, LogPosition, Name, Position, SEAL_HEADER,
};
use futures::StreamExt as _;
use http::{HeaderMap, Method, StatusCode};
use process::{
    admin::{Condition, Readiness},
    nats::Nats,
};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    body::Body,
    currency::{Observation, Partitions},
    gateway::{Gateway, Role},
    memory::Source,
    overview::lag_events,
    read_models::{QueryError, StoredCheckpoint},
    telemetry,
    upstream::Outgoing,
};

const DATABASE: &str = "database";
const LAG: &str = "lag";
const PRIMARY: &str = "primary";
const NATS: &str = "nats";

/// What the last look at the database showed beyond positions.
#[derive(Debug, Default)]
pub struct Seen {
    progress: Mutex<BTreeMap<String, Progress>>,
}

/// Of one projection.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// How far it is behind, as far as clocks tell.
    pub lag_ms: Option<u64>,
    /// Parked aggregates.
    pub parked_count: u64,
}

impl Seen {
    /// Of one projection.
    pub fn progress(&self, projection: &str) -> Progress {
        let progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress.get(projection).copied().unwrap_or_default()
    }

    fn set(&self, projection: &str, progress: Progress) {
        let mut all = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(projection.to_owned(), progress);
    }
}

/// Listens to the projector's hints until `stop`. A hint is never proof, so a lost one costs time and
/// nothing else.
pub async fn listen(
    gateway: Arc<Gateway>,
    nats: Nats,
    readiness: Readiness,
    stop: CancellationToken,
) {
    let subject = format!("tidemark.{}.currency", gateway.config.region);
    let seal = AnnouncementSeal::new(gateway.config.regions.credential.expose().as_bytes());
    let mut link = nats.link.clone();
    loop {
        let subscribed = tokio::select! {
            biased;
            // Nothing that is learnt now would be used.
            () = stop.cancelled() => return,
            subscribed = nats.client.subscribe(subject.clone()) => subscribed,
        };
        let Ok(mut hints) = subscribed else {
            readiness.set(NATS, Condition::Degraded("hints cannot be subscribed to".to_owned()));
            tokio::time::sleep(Duration::from_secs(1)).await;
            continue;
        };
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                // Hints are lost while the connection is; those who run the gateway want to know.
                changed = link.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    readiness.set(NATS, condition(link.borrow_and_update().connected));
                }
                hint = hints.next() => match hint {
                    Some(hint) => hear(&gateway, &seal, &hint),
                    None => break,
                },
            }
        }
    }
}

fn condition(connected: bool) -> Condition {
    if connected {
        Condition::Ready
    } else {
        Condition::Degraded("no connection, checkpoints are polled".to_owned())
    }
}

fn hear(gateway: &Gateway, seal: &AnnouncementSeal, hint: &async_nats::Message) {
    let sealed = hint.headers.as_ref().and_then(|headers| headers.get(SEAL_HEADER));
    if !sealed.is_some_and(|sealed| seal.fits(&hint.payload, sealed.as_str())) {
        tracing::warn!("hint passed over: it is not sealed with the regions' credential");
        return;
    }
    let steps = match serde_json::from_slice::<Vec<Announcement>>(&hint.payload) {
        Ok(steps) => steps,
        Err(error) => return tracing::warn!(%error, "hint not understood"),
    };
    for said in steps {
        if said.region != gateway.config.region.as_str() {
            tracing::debug!(region = said.region, "hint of another region passed over");
            continue;
        }
        // Before anybody is woken: who reads then must not meet a row that was changed.
        gateway.memory.hear(&said);
        gateway.currency.heard(&said, Instant::now());
    }
}

/// Reads checkpoints until `stop`: at the start, now and then, and often while someone waits and hints
/// are silent.
pub async fn poll(
    gateway: Arc<Gateway>,
    readiness: Readiness,
    link: watch::Receiver<process::nats::Link>,
    stop: CancellationToken,
) {
    let bounds = gateway.config.read.clone();
    let mut ticks = tokio::time::interval(bounds.poll_interval.get());
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut due = Instant::now();
    let mut connect_count = 0;
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let now = Instant::now();
        let connects = link.borrow().connect_count;
        // A connection that was made anew may have missed hints.
        let reconnected = std::mem::replace(&mut connect_count, connects) != connects;
        let silence_max = bounds.hints_silence_max.get();
        if now < due && !reconnected && !gateway.currency.wants_poll(silence_max, now) {
            continue;
        }
        let looked = timeout(bounds.query_timeout.get(), refresh(&gateway, &readiness)).await;
        let reason = match looked {
            Ok(Ok(())) => {
                due = Instant::now() + bounds.refresh_interval.get();
                continue;
            }
            Ok(Err(error)) => format!("the read models cannot be read: {error}"),
            Err(_) => "the read models do not answer".to_owned(),
        };
        readiness.set(DATABASE, Condition::NotReady(reason));
    }
}

/// One look at all checkpoints.
pub async fn refresh(gateway: &Gateway, readiness: &Readiness) -> Result<(), QueryError> {
    let names: Vec<Name> = gateway.currency.projections().cloned().collect();
    let moments: BTreeMap<&Name, u64> =
        names.iter().map(|name| (name, gateway.currency.moment(name))).collect();
    let stored = gateway.read_models.checkpoints().await?;
    if let Some(history) = gateway.read_models.epochs().await? {
        gateway.learn_history(history);
    }
    let mut absent = Vec::new();
    for name in &names {
        let of: Vec<&StoredCheckpoint> =
            stored.iter().filter(|stored| stored.projection == name.as_str()).collect();
        match of.first() {
            Some(first) if gateway.read_models.learn(first) => {
                observe(gateway, name, moments[name], &of);
                measure(gateway, name, &of);
            }
            Some(first) => absent
                .push(format!("the rules of {name} v{} are not in this binary", first.version)),
            None => absent.push(format!("{name} has no active version yet")),
        }
    }
    readiness.set(
        DATABASE,
        if absent.is_empty() { Condition::Ready } else { Condition::NotReady(absent.join(", ")) },
    );
    report_lag(gateway, readiness, &names);
    gateway.currency.tell();
    Ok(())
}

fn observe(gateway: &Gateway, name: &Name, moment: u64, stored: &[&StoredCheckpoint]) {
    let Some(first) = stored.first() else { return };
    let seen = Observation {
        moment,
        version: first.version,
        partition_count: first.partition_count,
        checkpoints: stored.iter().map(|stored| (stored.partition, Some(stored.at))).collect(),
    };
    gateway.memory.observed(name, &seen, Source::Poll);
    gateway.currency.observed(name, &seen, Instant::now());
}

fn measure(gateway: &Gateway, name: &Name, stored: &[&StoredCheckpoint]) {
    let head = gateway.head();
    let standing = gateway.currency.standing(name, Partitions::All);
    let behind = standing.watermark.map(|at| lag_events(head, at));
    let age = stored.iter().filter_map(|stored| stored.age_ms).max();
    let age = age.and_then(|ms| u64::try_from(ms).ok());
    let lag_ms = if behind == Some(0) { Some(0) } else { age };
    let parked_count = stored.first().and_then(|stored| u64::try_from(stored.parked_count).ok());
    let parked_count = parked_count.unwrap_or(0);
    gateway.seen.set(name.as_str(), Progress { lag_ms, parked_count });
    let progress = telemetry::Progress {
        applied: standing.watermark.map_or(0, |at| at.position.get()),
        lag_events: behind.unwrap_or(0),
        lag: Duration::from_millis(lag_ms.unwrap_or(0)),
        parked: parked_count,
    };
    gateway.instruments.progressed(name.as_str(), progress);
    gateway.instruments.standing(gateway.currency.waiter_count(), head.position.get());
}

fn report_lag(gateway: &Gateway, readiness: &Readiness, names: &[Name]) {
    let lags = names.iter().map(|name| gateway.seen.progress(name.as_str()).lag_ms);
    let lag_ms = lags.collect::<Option<Vec<_>>>().and_then(|lags| lags.into_iter().max());
    readiness.set_lag_ms(lag_ms);
    let bound_ms = u64::from(gateway.config.read.degraded_lag.millis());
    let late = lag_ms.is_some_and(|lag_ms| bound_ms < lag_ms);
    readiness.set(
        LAG,
        if late {
            Condition::Degraded(format!("read models are more than {bound_ms} ms behind"))
        } else {
            Condition::Ready
        },
    );
}

/// Asks the primary for its head and epochs until `stop`, which also tells how long a trip takes and
/// notices when it answers again.
pub async fn heartbeat(gateway: Arc<Gateway>, readiness: Readiness, stop: CancellationToken) {
    let (Role::Region(upstream), Some(primary)) = (&gateway.role, &gateway.config.primary_region)
    else {
        return;
    };
    let interval = primary.heartbeat_interval.get();
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let outgoing = Outgoing {
            method: &Method::GET,
            path_and_query: "/internal/epochs".to_owned(),
            headers: HeaderMap::new(),
            body: Body::empty(),
            deadline: Instant::now() + interval.max(Duration::from_secs(1)),
            only_reads: true,
        };
        let replied = upstream.send(outgoing).await;
        let status = replied.as_ref().ok().map(|reply| reply.status);
        if let Some(reply) = replied.ok().filter(|reply| reply.status.is_success()) {
            upstream.saw_trip(reply.took);
            learn(&gateway, reply.head, &reply.body);
        }
        readiness.set(PRIMARY, primary_condition(status));
    }
}

fn primary_condition(answered: Option<StatusCode>) -> Condition {
    match answered {
        Some(status) if status.is_success() => Condition::Ready,
        Some(StatusCode::MISDIRECTED_REQUEST) => {
            Condition::Degraded("who answers as the primary is not the primary".to_owned())
        }
        Some(_) | None => Condition::Degraded("the primary does not answer".to_owned()),
    }
}

/// What an answer of the primary to `/internal/epochs` tells.
pub fn learn(gateway: &Gateway, head: Option<LogPosition>, body: &[u8]) {
    if let Some(head) = head {
        gateway.currency.saw_head(head);
    }
    let starts = serde_json::from_slice::<Vec<(Epoch, Position)>>(body).ok();
    if let Some(history) = starts.and_then(EpochHistory::new) {
        gateway.learn_history(history);
    }
}
