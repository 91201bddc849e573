//! How fast a region catches up, from what was seen lately.

use consistency::Position;
use tokio::time::Instant;

/// Below this many events a backlog says less than how long others waited.
const BACKLOG_EVENTS_MIN: u64 = 256;
/// How much the newest sample counts.
const WEIGHT: f64 = 0.25;

/// Moving averages of one projection. An expectation, never a proof.
#[derive(Debug, Default)]
pub struct Pace {
    newest: Option<(Instant, Position)>,
    events_per_second: Option<f64>,
    waited_ms: Option<f64>,
}

impl Pace {
    /// A watermark was raised to `to` while the log's head was known to be at `head`.
    pub fn advanced(&mut self, now: Instant, to: Position, head: Position) {
        match self.newest {
            Some((_, newest)) if to <= newest => {}
            Some((then, newest)) => {
                let seconds = now.duration_since(then).as_secs_f64().max(0.001);
                let rate = to.since(newest) as f64 / seconds;
                self.events_per_second = Some(averaged(self.events_per_second, rate));
                self.newest = Some((now, to));
            }
            None => self.newest = Some((now, to)),
        }
        if head <= to {
            // Caught up: how long others waited during a backlog or a cut says nothing now.
            self.waited_ms = None;
        }
    }

    /// A wait came to its end, satisfied or not.
    pub fn waited(&mut self, ms: u32, satisfied: bool) {
        // Who was not satisfied would have waited longer, nobody knows how much.
        let sample = if satisfied { f64::from(ms) } else { f64::from(ms) * 4.0 };
        self.waited_ms = Some(averaged(self.waited_ms, sample));
    }

    /// How long until `backlog_events` more are applied, in milliseconds. `None` when nothing is
    /// known that would tell.
    pub fn catch_up_ms(&self, backlog_events: u64) -> Option<u32> {
        let backlog = self
            .events_per_second
            .filter(|_| BACKLOG_EVENTS_MIN <= backlog_events)
            .map(|rate| backlog_events as f64 / rate.max(0.001) * 1000.0);
        let expected = match (backlog, self.waited_ms) {
            (None, None) => return None,
            (backlog, waited) => backlog.unwrap_or(0.0).max(waited.unwrap_or(0.0)),
        };
        Some(expected.min(f64::from(u32::MAX)) as u32)
    }
}

fn averaged(before: Option<f64>, sample: f64) -> f64 {
    before.map_or(sample, |before| before + WEIGHT * (sample - before))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn position(value: u64) -> Position {
        Position::new(value).unwrap()
    }

    #[test]
    fn a_backlog_is_judged_by_the_rate_and_a_small_one_by_those_who_waited() {
        let mut pace = Pace::default();
        let start = Instant::now();
        assert_eq!(pace.catch_up_ms(10_000), None);
        pace.advanced(start, position(1000), position(90_000));
        pace.advanced(start + Duration::from_secs(1), position(2000), position(90_000));
        assert_eq!(pace.catch_up_ms(10_000), Some(10_000));
        assert_eq!(pace.catch_up_ms(3), None);
        pace.waited(40, true);
        assert_eq!(pace.catch_up_ms(3), Some(40));
        pace.waited(40, false);
        assert_eq!(pace.catch_up_ms(3), Some(70));
        pace.advanced(start + Duration::from_secs(2), position(90_000), position(90_000));
        assert_eq!(pace.catch_up_ms(3), None, "caught up");
    }
}
