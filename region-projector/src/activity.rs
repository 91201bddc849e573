//! What a version of a projection has applied in the last minute, and of which aggregates most.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

/// What is remembered is forgotten in slices of this length.
const SLICE: Duration = Duration::from_secs(10);
/// Slices of a minute.
const SLICE_COUNT: usize = 6;
/// Aggregates that a slice counts. More take the place of the one with the fewest, and its count, so
/// that a large count is never too small ("Efficient Computation of Frequent and Top-k Elements in Data
/// Streams", Metwally et al.).
const KEY_COUNT_MAX: usize = 64;

/// An aggregate that much has happened to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HotKey {
    /// The aggregate's id.
    pub aggregate_id: String,
    /// Its events that were applied in the last minute. A few more when there were many aggregates.
    pub event_count: u64,
}

/// The last minute of one version.
#[derive(Debug, Default)]
pub struct Activity {
    slices: VecDeque<Slice>,
}

#[derive(Debug)]
struct Slice {
    began: Instant,
    event_count: u64,
    by_key: HashMap<String, u64>,
}

impl Slice {
    fn add(&mut self, id: &str, count: u64) {
        self.event_count += count;
        if let Some(held) = self.by_key.get_mut(id) {
            *held += count;
            return;
        }
        let mut inherited = 0;
        if self.by_key.len() == KEY_COUNT_MAX {
            let least = self.by_key.iter().min_by_key(|(_, held)| **held);
            let least = least.map(|(id, held)| (id.clone(), *held));
            if let Some((least, held)) = least {
                self.by_key.remove(&least);
                inherited = held;
            }
        }
        self.by_key.insert(id.to_owned(), inherited + count);
    }
}

impl Activity {
    /// One event of each of these aggregates was applied, as often as it is named.
    pub fn note<'i>(&mut self, now: Instant, ids: impl IntoIterator<Item = &'i str>) {
        let mut counts: HashMap<&str, u64> = HashMap::new();
        for id in ids {
            *counts.entry(id).or_default() += 1;
        }
        self.forget(now);
        if self.slices.back().is_none_or(|newest| newest.began + SLICE <= now) {
            let by_key = HashMap::new();
            self.slices.push_back(Slice { began: now, event_count: 0, by_key });
        }
        let newest = self.slices.back_mut().expect("one was pushed where there was none");
        for (id, count) in counts {
            newest.add(id, count);
        }
    }

    fn forget(&mut self, now: Instant) {
        let minute = SLICE * SLICE_COUNT as u32;
        while self.slices.front().is_some_and(|oldest| oldest.began + minute <= now) {
            self.slices.pop_front();
        }
    }

    /// Events that are applied in a second, over the last minute or since there are any.
    pub fn rate(&mut self, now: Instant) -> f64 {
        self.forget(now);
        let Some(oldest) = self.slices.front() else { return 0.0 };
        let event_count: u64 = self.slices.iter().map(|slice| slice.event_count).sum();
        let span = now.duration_since(oldest.began).max(Duration::from_secs(1));
        event_count as f64 / span.as_secs_f64()
    }

    /// The aggregates with the most events of the last minute, those with more first.
    pub fn hot_keys(&mut self, now: Instant, count_max: usize) -> Vec<HotKey> {
        self.forget(now);
        let mut counts: HashMap<&str, u64> = HashMap::new();
        for (id, count) in self.slices.iter().flat_map(|slice| &slice.by_key) {
            *counts.entry(id).or_default() += count;
        }
        let mut keys: Vec<(u64, &str)> =
            counts.into_iter().map(|(id, count)| (count, id)).collect();
        keys.sort_by(|(more, a), (less, b)| less.cmp(more).then(a.cmp(b)));
        let hottest = keys.into_iter().take(count_max);
        hottest
            .map(|(event_count, id)| HotKey { aggregate_id: id.to_owned(), event_count })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hottest(activity: &mut Activity, now: Instant) -> Option<(String, u64)> {
        let first = activity.hot_keys(now, 1).into_iter().next();
        first.map(|key| (key.aggregate_id, key.event_count))
    }

    #[test]
    fn the_aggregate_with_the_most_events_is_found_among_many() {
        let (mut activity, now) = (Activity::default(), Instant::now());
        for round in 0..1_000 {
            let cold = format!("cold-{round}");
            activity.note(now, ["hot", "hot", "warm", &cold]);
        }
        let keys = activity.hot_keys(now, 2);
        assert_eq!((keys[0].aggregate_id.as_str(), keys[0].event_count), ("hot", 2_000));
        assert_eq!((keys[1].aggregate_id.as_str(), keys[1].event_count), ("warm", 1_000));
        assert!(activity.slices[0].by_key.len() <= KEY_COUNT_MAX);
    }

    #[test]
    fn what_happened_more_than_a_minute_ago_is_forgotten() {
        let (mut activity, start) = (Activity::default(), Instant::now());
        activity.note(start, ["old"; 100]);
        let later = start + Duration::from_secs(30);
        activity.note(later, ["new"; 5]);
        assert_eq!(hottest(&mut activity, later), Some(("old".to_owned(), 100)));
        assert_eq!(activity.rate(later), 3.5);
        let past = start + Duration::from_secs(61);
        assert_eq!(hottest(&mut activity, past), Some(("new".to_owned(), 5)));
        assert_eq!(hottest(&mut activity, later + Duration::from_secs(60)), None);
        assert_eq!(activity.rate(later + Duration::from_secs(60)), 0.0);
    }
}
