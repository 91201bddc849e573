//! What is known of the region's stream.

use std::time::Duration;

use consistency::{CommittedAt, Position};
use serde_json::{Value, json};

use super::Status;

/// What the last look saw.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    first: Position,
    /// When its origin was last heard of, by our clock; `None` where it is the origin.
    heard_at: Option<CommittedAt>,
}

impl Status {
    /// The stream begins here. It is a mirror that has heard nothing of its origin for `silent`, or
    /// never has, or is the origin itself.
    pub fn see_stream(
        &self,
        first: Position,
        is_mirror: bool,
        silent: Option<Duration>,
        now: CommittedAt,
    ) {
        let mut inner = self.lock();
        let before = inner.stream.and_then(|seen| seen.heard_at);
        let heard_at = match silent {
            _ if !is_mirror => None,
            Some(silent) => Some(earlier(now, silent)),
            None => before.or(Some(now)),
        };
        inner.stream = Some(Seen { first, heard_at });
    }

    /// Where the stream begins.
    pub fn stream_first(&self) -> Option<Position> {
        self.lock().stream.map(|seen| seen.first)
    }

    /// Seconds since the mirror has heard of its origin; `None` where there is no mirror.
    pub fn silence_seconds(&self, now: CommittedAt) -> Option<f64> {
        let heard_at = self.lock().stream?.heard_at?;
        Some((now.unix_micros() - heard_at.unix_micros()).max(0) as f64 / 1e6)
    }

    /// Events that the stream holds before the first that a partition may need again; negative when
    /// what it needs is gone from the stream.
    pub fn margin(&self) -> Option<i64> {
        let inner = self.lock();
        let marks = inner.versions.values().flat_map(|partitions| partitions.values());
        let lowest = marks.map(|reached| reached.held.mark.position).min()?;
        // An empty stream may begin anywhere.
        let first = inner.stream?.first.max(Position::ZERO.next());
        Some(lowest.next().as_i64() - first.as_i64())
    }

    pub(super) fn stream(&self, now: CommittedAt) -> Value {
        json!({
            "first_position": self.stream_first(),
            "silence_seconds": self.silence_seconds(now),
            "margin_positions": self.margin(),
        })
    }
}

fn earlier(now: CommittedAt, by: Duration) -> CommittedAt {
    let by = i64::try_from(by.as_micros()).unwrap_or(i64::MAX);
    CommittedAt::from_unix_micros(now.unix_micros().saturating_sub(by))
}
