//! `GET /v1/currency` and the body of `/status`: where this region stands.

use consistency::{Epoch, LogPosition, Name, Position};
use http::StatusCode;
use schemars::JsonSchema;
use serde::Serialize;

use crate::{
    answer::Answer,
    currency::Partitions,
    error::Error,
    gateway::{Gateway, Role},
    openapi::terms,
    request::Call,
};

/// Where a region stands, and who waits for it.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Overview {
    #[serde(flatten)]
    standing: Standing,
    /// Reads that wait for the region to catch up.
    waiters: usize,
    /// Listeners to its events.
    listeners: usize,
}

/// Where a region stands.
#[derive(Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Standing {
    /// Which.
    #[schemars(with = "terms::Name")]
    region: Name,
    /// The region that takes writes.
    #[schemars(with = "terms::Name")]
    primary_region: Name,
    /// Whether it is this one.
    is_primary: bool,
    /// The newest epoch of the log that is known here.
    #[schemars(with = "terms::Epoch")]
    epoch: Epoch,
    /// The largest position that the log is known to have reached.
    #[schemars(with = "terms::Position")]
    head: Position,
    /// One for each projection that is stored.
    projections: Vec<ProjectionStanding>,
}

/// Where one projection stands.
#[derive(Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct ProjectionStanding {
    /// Its name.
    #[schemars(with = "terms::Name")]
    name: Name,
    /// The version that is read; unknown before the database was looked at.
    version: Option<u32>,
    /// The position up to which all of it is applied.
    #[schemars(with = "Option<terms::Position>")]
    applied: Option<Position>,
    /// Events of the log after that.
    lag_events: Option<u64>,
    /// How far it is behind, in milliseconds, as far as clocks tell.
    lag_ms: Option<u64>,
    /// Aggregates with an event that could not be applied.
    parked: u64,
}

/// Answers with what this process knows; asks nobody.
pub fn answer(gateway: &Gateway, call: &Call) -> Result<Answer, Error> {
    call.only_parameters(&[])?;
    Ok(Answer::json(StatusCode::OK, &overview(gateway)))
}

/// Where the region stands, and who waits for it.
pub fn overview(gateway: &Gateway) -> Overview {
    Overview {
        standing: standing(gateway),
        waiters: gateway.currency.waiter_count(),
        listeners: gateway.listeners.count(),
    }
}

/// Positions, lag and parked aggregates of every projection.
pub fn standing(gateway: &Gateway) -> Standing {
    let head = gateway.head();
    let projections = gateway.currency.projections().map(|name| {
        let standing = gateway.currency.standing(name, Partitions::All);
        let progress = gateway.seen.progress(name.as_str());
        let lag_events = standing.watermark.map(|at| lag_events(head, at));
        // Seconds are looked at now and then; that nothing is missing is known at once.
        let lag_ms = if lag_events == Some(0) { Some(0) } else { progress.lag_ms };
        ProjectionStanding {
            name: name.clone(),
            version: standing.version,
            applied: standing.watermark.map(|at| at.position),
            lag_events,
            lag_ms,
            parked: progress.parked_count,
        }
    });
    Standing {
        region: gateway.config.region.clone(),
        primary_region: gateway.config.primary_name().clone(),
        is_primary: matches!(gateway.role, Role::Primary(_)),
        epoch: gateway.history().current(),
        head: head.position,
        projections: projections.collect(),
    }
}

/// How many events of the log lie after `at`.
pub fn lag_events(head: LogPosition, at: LogPosition) -> u64 {
    if head.epoch == at.epoch { head.position.since(at.position) } else { head.position.get() }
}
