//! How long a region takes to have what is asked of it, and how long that makes waiting worth.
//!
//! An expectation, never a proof: it chooses between two ways to a current answer and cannot make an
//! answer stale. Nothing about a link or a projector is assumed. Some of the reads that find the region
//! behind are *watched*, whether they wait or go elsewhere, until it has caught up with them; how long
//! that took is the only sample there is. So a region whose readers all go to the primary still learns
//! that it has become quick again.
//!
//! From the samples, the wait is chosen that would have cost them least on average, where a wait that
//! ends in vain costs the trip on top. This is the rental of skis with a known past; without a past, the
//! wait lasts as long as a trip, which never costs more than twice what a prophet would have paid (Karlin
//! et al., "Competitive snoopy caching", 1988).

use std::collections::VecDeque;
use std::time::Duration;

use crate::{LogPosition, Position};

/// Samples that are remembered. Few, so that a change is learnt within so many reads.
const SAMPLE_COUNT_MAX: usize = 32;
/// Older samples say nothing.
const SAMPLE_AGE_MAX: Duration = Duration::from_secs(30);
/// Reads that are watched at once.
const WATCHED_COUNT_MAX: usize = 8;
/// Below this many events, how long others took says more than the rate of applying.
const BACKLOG_EVENTS_MIN: u64 = 256;
/// How much the newest rate counts.
const RATE_WEIGHT: f64 = 0.25;
/// What is waited beyond the longest sample that is worth waiting for, as a part of it: the next one may
/// take a little longer, and giving up just before costs the most.
const MARGIN: f64 = 0.25;

/// What was seen lately of one projection in one region. Moments are times since a start of the caller's
/// choice.
#[derive(Debug, Clone, Default)]
pub struct Pace {
    newest: Option<(Duration, Position)>,
    events_per_second: Option<f64>,
    /// Of reads that need one partition only.
    one: Lately,
    /// Of reads that need all.
    all: Lately,
}

#[derive(Debug, Clone, Default)]
struct Lately {
    /// When a sample was complete, and how long that read would have waited.
    samples: VecDeque<(Duration, u32)>,
    watched: Vec<Watched>,
}

#[derive(Debug, Clone, Copy)]
struct Watched {
    partition: Option<u16>,
    at: LogPosition,
    since: Duration,
}

impl Pace {
    /// A watermark was raised to `to`.
    pub fn advanced(&mut self, now: Duration, to: Position) {
        match self.newest {
            Some((_, newest)) if to <= newest => {}
            Some((then, newest)) => {
                let seconds = now.saturating_sub(then).as_secs_f64().max(0.001);
                let rate = to.since(newest) as f64 / seconds;
                let mixed = |before: f64| before + RATE_WEIGHT * (rate - before);
                self.events_per_second = Some(self.events_per_second.map_or(rate, mixed));
                self.newest = Some((now, to));
            }
            None => self.newest = Some((now, to)),
        }
    }

    /// A read found the partition, or one of all partitions, short of `at`. Watched if there is room.
    pub fn asked(&mut self, now: Duration, partition: Option<u16>, at: LogPosition) {
        let lately = self.lately_mut(partition);
        if lately.watched.len() < WATCHED_COUNT_MAX {
            lately.watched.push(Watched { partition, at, since: now });
        }
    }

    /// The partition, or all of them, have reached `mark`.
    pub fn reached(&mut self, now: Duration, partition: Option<u16>, mark: LogPosition) {
        let lately = self.lately_mut(partition);
        let Lately { samples, watched } = lately;
        watched.retain(|read| {
            let is_reached = read.partition == partition && read.at <= mark;
            if is_reached {
                samples.push_back((now, ms(now.saturating_sub(read.since))));
            }
            !is_reached
        });
        let excess = samples.len().saturating_sub(SAMPLE_COUNT_MAX);
        samples.drain(..excess);
    }

    /// Forgets who is watched: the tables that are read are others now.
    pub fn changed_tables(&mut self) {
        self.one.watched.clear();
        self.all.watched.clear();
    }

    /// How long a read that is `backlog_events` short is expected to take until it could be served, in
    /// milliseconds. `None` when nothing is known that would tell.
    pub fn catch_up_ms(
        &self,
        now: Duration,
        partition: Option<u16>,
        backlog_events: u64,
    ) -> Option<u32> {
        let samples = self.lately(partition).known(now);
        let median = samples.get(samples.len() / 2).copied();
        self.backlog_ms(backlog_events).max(median)
    }

    /// How long such a read does best to wait before it takes a trip of `trip_ms` to the primary. Zero: it
    /// goes at once.
    pub fn worth_waiting_ms(
        &self,
        now: Duration,
        partition: Option<u16>,
        backlog_events: u64,
        trip_ms: u32,
    ) -> u32 {
        if self.backlog_ms(backlog_events).is_some_and(|ms| trip_ms < ms) {
            return 0;
        }
        cheapest_ms(&self.lately(partition).known(now), trip_ms)
    }

    /// A backlog that is large enough, by the rate of applying.
    fn backlog_ms(&self, backlog_events: u64) -> Option<u32> {
        let rate = self.events_per_second.filter(|_| BACKLOG_EVENTS_MIN <= backlog_events)?;
        let ms = backlog_events as f64 / rate.max(0.001) * 1000.0;
        Some(ms.min(f64::from(u32::MAX)) as u32)
    }

    fn lately(&self, partition: Option<u16>) -> &Lately {
        match partition {
            Some(_) => &self.one,
            None => &self.all,
        }
    }

    fn lately_mut(&mut self, partition: Option<u16>) -> &mut Lately {
        match partition {
            Some(_) => &mut self.one,
            None => &mut self.all,
        }
    }
}

impl Lately {
    /// Samples in order of size. A read that is still watched would have waited so long at least, which
    /// counts once it is longer than others took.
    fn known(&self, now: Duration) -> Vec<u32> {
        let fresh = self.samples.iter().filter(|(at, _)| now.saturating_sub(*at) <= SAMPLE_AGE_MAX);
        let mut known: Vec<u32> = fresh.map(|(_, took)| *took).collect();
        known.sort_unstable();
        let usual = known.get(known.len() / 2).copied().unwrap_or(0);
        let open = self.watched.iter().map(|read| ms(now.saturating_sub(read.since)));
        known.extend(open.filter(|waited| usual < *waited));
        known.sort_unstable();
        known
    }
}

/// The wait that costs the samples least on average. Only lengths of samples come into question: a wait
/// between two of them is longer than the first needs and too short for the second.
fn cheapest_ms(sorted: &[u32], trip_ms: u32) -> u32 {
    if sorted.is_empty() {
        return trip_ms;
    }
    let count = sorted.len() as f64;
    let trip = f64::from(trip_ms);
    let mut served_ms = 0.0;
    let (mut best_cost, mut best_ms) = (trip, 0);
    for (nth, &took) in sorted.iter().enumerate() {
        served_ms += f64::from(took);
        let in_vain = count - (nth as f64 + 1.0);
        let cost = (served_ms + in_vain * (f64::from(took) + trip)) / count;
        if cost <= best_cost {
            (best_cost, best_ms) = (cost, took.max(1));
        }
    }
    if best_ms == 0 {
        return 0;
    }
    best_ms.saturating_add((f64::from(best_ms) * MARGIN) as u32 + 1)
}

fn ms(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Epoch;

    const TRIP_MS: u32 = 90;

    fn moment(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn position(value: u64) -> Position {
        Position::new(value).unwrap()
    }

    fn at(value: u64) -> LogPosition {
        LogPosition::new(Epoch::FIRST, position(value))
    }

    /// Reads that took so long, one after the other.
    fn after(took_ms: &[u64]) -> (Pace, Duration) {
        let mut pace = Pace::default();
        let mut now = 0;
        for (nth, took) in (1..).zip(took_ms) {
            pace.asked(moment(now), Some(3), at(nth));
            now += took;
            pace.reached(moment(now), Some(3), at(nth));
        }
        (pace, moment(now))
    }

    fn worth(pace: &Pace, now: Duration) -> u32 {
        pace.worth_waiting_ms(now, Some(3), 1, TRIP_MS)
    }

    #[test]
    fn without_a_past_the_wait_lasts_as_long_as_the_trip() {
        assert_eq!(worth(&Pace::default(), moment(0)), TRIP_MS);
        let (pace, now) = after(&[20; 5]);
        assert_eq!(worth(&pace, now + SAMPLE_AGE_MAX + moment(1)), TRIP_MS, "too long ago");
    }

    #[test]
    fn what_is_quick_is_waited_for_and_what_is_slow_is_not() {
        let (quick, now) = after(&[20; 5]);
        assert_eq!(worth(&quick, now), 26);
        let (slow, now) = after(&[400; 5]);
        assert_eq!(worth(&slow, now), 0);
        let (mixed, now) = after(&[10, 10, 10, 10, 900]);
        assert_eq!(worth(&mixed, now), 13, "not for the slow one");
        assert_eq!(mixed.catch_up_ms(now, Some(3), 1), Some(10));
    }

    #[test]
    fn one_partition_says_nothing_of_all() {
        let (pace, now) = after(&[400; 5]);
        assert_eq!(pace.worth_waiting_ms(now, None, 1, TRIP_MS), TRIP_MS);
        assert_eq!(pace.worth_waiting_ms(now, Some(9), 1, TRIP_MS), 0, "but of others like it");
    }

    #[test]
    fn a_read_that_is_not_served_yet_counts_before_it_is() {
        let (mut pace, now) = after(&[20, 20]);
        for nth in 0..4 {
            pace.asked(now, Some(1), at(100 + nth));
        }
        let later = now + moment(5_000);
        assert_eq!(worth(&pace, later), 26, "a short wait may be worth it still");
        let (mut pace, now) = after(&[80, 80]);
        (0..4).for_each(|nth| pace.asked(now, Some(1), at(100 + nth)));
        assert_eq!(worth(&pace, now + moment(5_000)), 0);
    }

    #[test]
    fn a_large_backlog_is_judged_by_the_rate() {
        let (mut pace, now) = after(&[20; 5]);
        pace.advanced(now, position(1000));
        pace.advanced(now + moment(1000), position(2000));
        let later = now + moment(1000);
        assert_eq!(pace.worth_waiting_ms(later, Some(3), 10_000, TRIP_MS), 0);
        assert_eq!(pace.catch_up_ms(later, Some(3), 10_000), Some(10_000));
        assert_eq!(pace.worth_waiting_ms(later, Some(3), 3, TRIP_MS), 26);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut pace = Pace::default();
        for nth in 0..1000 {
            pace.asked(moment(nth), None, at(nth + 1));
        }
        assert_eq!(pace.all.watched.len(), WATCHED_COUNT_MAX);
        for nth in 0..1000 {
            pace.reached(moment(2000), None, at(1000));
            pace.asked(moment(2000), None, at(nth + 1));
        }
        assert!(pace.all.samples.len() <= SAMPLE_COUNT_MAX);
    }
}
