//! The spans of one request: its own, and one for each thing it waits for.

use consistency::Traceparent;
use http::{HeaderMap, HeaderName, HeaderValue};
use process::trace::{Span, SpanKind, Traces};

use crate::{gateway::Gateway, request::Call};

/// W3C Trace Context.
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The span of a request. What the request leads to, here and elsewhere, comes under it: it takes the place
/// of its sender's in the headers.
pub fn of_request(
    traces: &Traces,
    headers: &mut HeaderMap,
    route: &'static str,
    method: &'static str,
) -> Span {
    let mut span = traces.span(route, SpanKind::Server, parent(headers));
    span.set("http.request.method", method);
    continued(&span, headers);
    span
}

/// A span under that of the request.
pub fn within(gateway: &Gateway, call: &Call, name: &'static str, kind: SpanKind) -> Span {
    match parent(&call.headers) {
        Some(parent) => gateway.instruments.traces.span(name, kind, Some(parent)),
        None => Span::none(),
    }
}

/// Lets whoever gets the headers go on under `span`; without one they stay as they are.
pub fn continued(span: &Span, headers: &mut HeaderMap) {
    let own = span.traceparent().and_then(|own| HeaderValue::from_str(&own).ok());
    if let Some(own) = own {
        headers.insert(TRACEPARENT, own);
    }
}

/// What the events of an append come under: its span, or without one its caller's.
pub fn parent_of_events(span: &Span, headers: &HeaderMap) -> Option<Traceparent> {
    match span.traceparent() {
        Some(own) => Traceparent::parse(&own),
        None => parent(headers).and_then(Traceparent::parse),
    }
}

fn parent(headers: &HeaderMap) -> Option<&str> {
    headers.get(TRACEPARENT).and_then(|value| value.to_str().ok())
}
