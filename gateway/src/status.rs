//! What an answer says about how it came to be.

use std::time::Duration;

use consistency::{LogPosition, Name};
use http::{HeaderName, HeaderValue};

/// RFC 9211.
pub const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

/// The first word of `Consistency-Status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Current here at once.
    Local,
    /// Current here after a wait.
    Waited,
    /// Answered by the primary.
    Forwarded,
    /// Not answered: 202.
    Pending,
    /// From here, and older than was asked for.
    Stale,
    /// Read at the primary, as of the log's head on arrival.
    Primary,
    /// From a service that does not say what it read.
    Unverified,
}

impl Outcome {
    /// Every one.
    pub const ALL: [Self; 7] = [
        Self::Local,
        Self::Waited,
        Self::Forwarded,
        Self::Pending,
        Self::Stale,
        Self::Primary,
        Self::Unverified,
    ];

    /// The word; also a metric's label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Waited => "waited",
            Self::Forwarded => "forwarded",
            Self::Pending => "pending",
            Self::Stale => "stale",
            Self::Primary => "primary",
            Self::Unverified => "unverified",
        }
    }
}

/// `Consistency-Status`, one item of RFC 9651 with parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// What happened.
    pub outcome: Outcome,
    /// How long it took until the answer was current, in milliseconds.
    pub ms: u64,
    /// The region whose data it is.
    pub region: Name,
    /// What the answer shows.
    pub at: Option<LogPosition>,
    /// Why it is stale.
    pub reason: Option<&'static str>,
}

impl Said {
    /// The header's value. Every answer has one, so it is put together without the machinery of formats.
    pub fn header(&self) -> HeaderValue {
        let mut number = itoa::Buffer::new();
        let mut text = String::with_capacity(96);
        let mut say = |words: &[&str]| words.iter().for_each(|word| text.push_str(word));
        say(&[self.outcome.as_str()]);
        if let Some(reason) = self.reason {
            say(&[";reason=", reason]);
        }
        say(&[";ms=", number.format(self.ms), ";region=", self.region.as_str()]);
        if let Some(at) = self.at {
            say(&[";position=", number.format(at.position.get())]);
        }
        HeaderValue::try_from(text).expect("names, numbers and our words are visible ASCII")
    }
}

/// What the rows kept in memory were good for, as `Cache-Status` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheStatus {
    /// The answer was there.
    Hit,
    /// It was not.
    Miss(Forwarding),
    /// It was there, and it may have changed or is older than the caller.
    Stale(Forwarding),
    /// It was not looked for: nothing is kept, or the primary's newest was asked for.
    Bypass,
}

/// What came of a question to the database.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Forwarding {
    /// The answer is kept now.
    pub stored: bool,
    /// Another read had asked already.
    pub collapsed: bool,
}

impl CacheStatus {
    /// The header's value.
    pub const fn header(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            Self::Hit => "tidemark; hit",
            Self::Bypass => "tidemark; fwd=bypass",
            Self::Miss(Forwarding { stored: false, collapsed: false }) => "tidemark; fwd=miss",
            Self::Miss(Forwarding { stored: true, .. }) => "tidemark; fwd=miss; stored",
            Self::Miss(Forwarding { collapsed: true, .. }) => "tidemark; fwd=miss; collapsed",
            Self::Stale(Forwarding { stored: false, collapsed: false }) => "tidemark; fwd=stale",
            Self::Stale(Forwarding { stored: true, .. }) => "tidemark; fwd=stale; stored",
            Self::Stale(Forwarding { collapsed: true, .. }) => "tidemark; fwd=stale; collapsed",
        })
    }

    /// The same after a question to the database.
    pub const fn forwarded(self, forwarding: Forwarding) -> Self {
        match self {
            Self::Miss(_) => Self::Miss(forwarding),
            Self::Stale(_) => Self::Stale(forwarding),
            Self::Hit | Self::Bypass => self,
        }
    }
}

/// Where a request's time went, as `Server-Timing` shows it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timing {
    /// Waiting for the region to catch up.
    pub wait: Duration,
    /// Asking the database.
    pub read: Duration,
    /// Asking the primary.
    pub forward: Duration,
}

impl Timing {
    /// The header's value.
    pub fn header(&self, total: Duration) -> HeaderValue {
        let parts = [("wait", self.wait), ("read", self.read), ("forward", self.forward)];
        let mut text = String::with_capacity(64);
        for (name, duration) in parts.iter().filter(|(_, duration)| !duration.is_zero()) {
            push_timing(&mut text, name, *duration);
            text.push_str(", ");
        }
        push_timing(&mut text, "total", total);
        HeaderValue::try_from(text).expect("our words and numbers are visible ASCII")
    }
}

/// In milliseconds, to the tenth below.
fn push_timing(text: &mut String, name: &str, duration: Duration) {
    let tenths = duration.as_micros() / 100;
    let mut number = itoa::Buffer::new();
    text.push_str(name);
    text.push_str(";dur=");
    text.push_str(number.format(tenths / 10));
    text.push('.');
    text.push_str(number.format(tenths % 10));
}

#[cfg(test)]
mod tests {
    use super::*;
    use consistency::{Epoch, Position};

    #[test]
    fn the_status_is_one_item_with_parameters() {
        let said = Said {
            outcome: Outcome::Stale,
            ms: 38,
            region: Name::new("eu-west").unwrap(),
            at: Some(LogPosition::new(Epoch::FIRST, Position::new(12).unwrap())),
            reason: Some("parked"),
        };
        assert_eq!(said.header(), "stale;reason=parked;ms=38;region=eu-west;position=12");
    }

    #[test]
    fn timing_shows_what_took_time() {
        let timing = Timing { wait: Duration::from_millis(38), ..Timing::default() };
        assert_eq!(timing.header(Duration::from_millis(40)), "wait;dur=38.0, total;dur=40.0");
    }
}
