//! `GET /v1/currency` and the body of `/status`: where this region stands.

use consistency::LogPosition;
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    answer::Answer,
    currency::Partitions,
    error::Error,
    gateway::{Gateway, Role},
    request::Call,
};

/// Answers with what this process knows; asks nobody.
pub fn answer(gateway: &Gateway, call: &Call) -> Result<Answer, Error> {
    call.only_parameters(&[])?;
    Ok(Answer::json(StatusCode::OK, &overview(gateway)))
}

/// Where the region stands, and who waits for it.
pub fn overview(gateway: &Gateway) -> Value {
    let mut overview = standing(gateway);
    overview["waiters"] = gateway.currency.waiter_count().into();
    overview["listeners"] = gateway.listeners.count().into();
    overview
}

/// Positions, lag and parked aggregates of every projection.
pub fn standing(gateway: &Gateway) -> Value {
    let head = gateway.head();
    let projections: Vec<Value> = gateway
        .currency
        .projections()
        .map(|name| {
            let standing = gateway.currency.standing(name, Partitions::All);
            let progress = gateway.seen.progress(name.as_str());
            let lag_events = standing.watermark.map(|at| lag_events(head, at));
            // Seconds are looked at now and then; that nothing is missing is known at once.
            let lag_ms = if lag_events == Some(0) { Some(0) } else { progress.lag_ms };
            json!({
                "name": name,
                "version": standing.version,
                "applied": standing.watermark.map(|at| at.position),
                "lag_events": lag_events,
                "lag_ms": lag_ms,
                "parked": progress.parked_count,
            })
        })
        .collect();
    json!({
        "region": gateway.config.region,
        "primary_region": gateway.config.primary_name(),
        "is_primary": matches!(gateway.role, Role::Primary(_)),
        "epoch": gateway.history().current(),
        "head": head.position,
        "projections": projections,
    })
}

/// How many events of the log lie after `at`.
pub fn lag_events(head: LogPosition, at: LogPosition) -> u64 {
    if head.epoch == at.epoch { head.position.since(at.position) } else { head.position.get() }
}
