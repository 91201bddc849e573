//! 202: the answer to who would rather be told than kept waiting.

use consistency::Name;
use http::StatusCode;
use schemars::JsonSchema;
use serde::Serialize;

use crate::{
    answer::Answer,
    error::Lag,
    events,
    gateway::Gateway,
    problem::{self, LagMembers},
    request::Call,
};

/// Not answered yet.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Pending {
    status: PendingStatus,
    /// Where server-sent events tell the moment from which the answer can be had.
    events: String,
    #[serde(flatten)]
    lag: LagMembers,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
enum PendingStatus {
    Pending,
}

/// What is demanded, what is here, when it is expected, and where one is told. `view` is what was
/// read; a service's own data has none, and waits for every projection.
pub fn answer(gateway: &Gateway, call: &Call, lag: &Lag, view: Option<&Name>) -> Answer {
    let view = view.map_or_else(String::new, |view| format!("view={view}&"));
    let sealed = gateway.carrier.seal(&call.token);
    let body = Pending {
        status: PendingStatus::Pending,
        events: format!("{}?{view}token={sealed}", events::PATH),
        lag: LagMembers::of(lag, &gateway.config.region),
    };
    let mut answer = Answer::json(StatusCode::ACCEPTED, &body);
    problem::retry_after(lag.retry_after_ms(), &mut answer.headers);
    answer
}
