//! How long requests took, each kind of them with its instrument at hand.

use std::{collections::HashMap, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use foldhash::fast::RandomState;
use opentelemetry::{
    KeyValue,
    metrics::{BoundHistogram, Histogram},
};

use super::{METHOD, ROUTE, STATUS_CODE};

/// What requests are told apart by. Each is of a closed set, so that there is a bound on the kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequestKind {
    /// The pattern of its route.
    pub route: &'static str,
    /// Its method.
    pub method: &'static str,
    /// The status of its answer.
    pub status: u16,
}

impl RequestKind {
    fn labels(self) -> [KeyValue; 3] {
        [
            KeyValue::new(ROUTE, self.route),
            KeyValue::new(METHOD, self.method),
            KeyValue::new(STATUS_CODE, i64::from(self.status)),
        ]
    }
}

type Bound = HashMap<RequestKind, BoundHistogram<f64>, RandomState>;

/// To find an instrument by its labels takes longer than to count, and a lock that all processors write to. So
/// it is done once for each kind of request.
#[derive(Debug)]
pub struct Durations {
    all: Histogram<f64>,
    bound: ArcSwap<Bound>,
}

impl Durations {
    /// Counts in `all`.
    pub fn new(all: Histogram<f64>) -> Self {
        Self { all, bound: ArcSwap::default() }
    }

    /// A request was answered.
    pub fn record(&self, kind: RequestKind, took: Duration) {
        let seconds = took.as_secs_f64();
        match self.bound.load().get(&kind) {
            Some(bound) => bound.record(seconds),
            None => self.bind(kind).record(seconds),
        }
    }

    fn bind(&self, kind: RequestKind) -> BoundHistogram<f64> {
        let made = self.all.bind(&kind.labels());
        self.bound.rcu(|known| {
            let mut more = Bound::clone(known);
            more.insert(kind, made.clone());
            Arc::new(more)
        });
        made
    }
}

#[cfg(test)]
mod tests {
    use process::{telemetry::Metrics, trace::OtlpConfig};

    use super::*;

    #[test]
    fn each_kind_of_request_is_counted_under_its_own_labels() {
        let metrics = Metrics::new("example", &OtlpConfig::default()).unwrap();
        let durations = Durations::new(metrics.meter("example").f64_histogram("took").build());
        let kind = RequestKind { route: "/v1/currency", method: "GET", status: 200 };
        let refused = RequestKind { status: 400, ..kind };
        let head = RequestKind { method: "HEAD", ..kind };
        let row = RequestKind { route: "/v1/views/{view}/{key}", ..kind };
        for kind in [kind, refused, head, row, kind, kind] {
            durations.record(kind, Duration::from_millis(1500));
        }
        let text = metrics.render();
        let said = |what: &str, kind: RequestKind| -> Vec<f64> {
            let RequestKind { route, method, status } = kind;
            let labels = [
                format!("http_route=\"{route}\""),
                format!("http_request_method=\"{method}\""),
                format!("http_response_status_code=\"{status}\""),
            ];
            let is_its = |line: &&str| {
                line.starts_with(what) && labels.iter().all(|label| line.contains(label))
            };
            let values = text.lines().filter(is_its).map(|line| line.rsplit(' ').next().unwrap());
            values.map(|value| value.parse().unwrap()).collect()
        };
        for (kind, count) in [(kind, 3.0), (refused, 1.0), (head, 1.0), (row, 1.0)] {
            assert_eq!(said("took_count", kind), [count], "{kind:?}: {text}");
            assert_eq!(said("took_sum", kind), [count * 1.5], "{kind:?}: {text}");
        }
        assert_eq!(durations.bound.load().len(), 4, "each has its instrument at hand");
    }
}
