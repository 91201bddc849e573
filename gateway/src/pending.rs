//! 202: the answer to who would rather be told than kept waiting.

use consistency::Name;
use http::StatusCode;

use crate::{answer::Answer, error::Lag, events, gateway::Gateway, problem, request::Call};

/// What is demanded, what is here, when it is expected, and where one is told. `view` is what was
/// read; a service's own data has none, and waits for every projection.
pub fn answer(gateway: &Gateway, call: &Call, lag: &Lag, view: Option<&Name>) -> Answer {
    let mut body = problem::lag_members(lag, &gateway.config.region);
    body.insert("status".into(), "pending".into());
    let view = view.map_or_else(String::new, |view| format!("view={view}&"));
    let sealed = gateway.carrier.seal(&call.token);
    body.insert("events".into(), format!("{}?{view}token={sealed}", events::PATH).into());
    let mut answer = Answer::json(StatusCode::ACCEPTED, &body);
    problem::retry_after(lag.retry_after_ms(), &mut answer.headers);
    answer
}
