//! What a service answered, as ours.

use consistency::{LogPosition, Token};
use http::HeaderMap;

use super::{
    Route,
    backend::Served,
    headers::{self, CONSISTENCY_POSITION},
    passed,
};
use crate::{
    answer::{Answer, read_of},
    error::Error,
    gateway::Gateway,
    request,
};

/// The answer of a service in this region: what it shows is what it says it read, and the token that
/// our API gave it.
pub fn of_service(gateway: &Gateway, route: &Route, served: Served) -> Result<Answer, Error> {
    let shows = shown(gateway, &served.headers);
    let body = passed(served.body, served.status, route.answer_bounds(), served.held)?;
    let headers = headers::answered(gateway, served.headers, served.version);
    Ok(Answer { headers, body, shows, ..Answer::empty(served.status) })
}

/// How far the service's rows are, when it says so in a way that can be understood.
pub fn position(headers: &HeaderMap) -> Option<LogPosition> {
    let mut said = headers.get_all(CONSISTENCY_POSITION).iter();
    let position = request::log_position(said.next()?.to_str().ok()?)?;
    // Two are as good as none.
    said.next().is_none().then_some(position)
}

fn shown(gateway: &Gateway, headers: &HeaderMap) -> Option<Token> {
    let handed_back = gateway.carrier.open_answer(headers, &gateway.history());
    let read = position(headers).map(read_of);
    match (handed_back, read) {
        (Some(token), Some(read)) => Some(token.merge(read)),
        (token, read) => token.or(read),
    }
}
