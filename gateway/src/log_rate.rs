//! How fast each region is given the log: so that one that catches up does not take the primary's
//! database and its way out from everybody else.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// Regions that are told apart at most; all others share one rate.
const REGION_COUNT_MAX: usize = 64;
/// What may be given at once to a region that asked for nothing for a while, in time at its rate.
const BURST: Duration = Duration::from_secs(1);

/// The rate of each region.
#[derive(Debug)]
pub struct LogRate {
    bytes_per_second_max: u64,
    /// Until when each region has had its share.
    paid_until: Mutex<BTreeMap<String, Instant>>,
}

impl LogRate {
    /// So many bytes a second for each region.
    pub fn new(bytes_per_second_max: u64) -> Self {
        Self { bytes_per_second_max: bytes_per_second_max.max(1), paid_until: Mutex::default() }
    }

    /// Takes `bytes` of the region's share, and says when they may be sent; `None`, and takes nothing, when
    /// that is after the deadline. What is sent at once may be more than the share; what comes after it
    /// waits for as long as that lasts.
    pub fn take(
        &self,
        region: &str,
        bytes: usize,
        now: Instant,
        deadline: Instant,
    ) -> Option<Instant> {
        let mut paid_until = self.paid_until.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = paid_until.contains_key(region);
        let region = if is_known || paid_until.len() < REGION_COUNT_MAX { region } else { "" };
        let paid = paid_until.entry(region.to_owned()).or_insert(now);
        let from = (*paid).max(now);
        let ready = from.checked_sub(BURST).map_or(now, |ready| ready.max(now));
        if deadline < ready {
            return None;
        }
        *paid = from + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second_max as f64);
        Some(ready)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_that_took_its_share_waits_and_others_do_not_wait_for_it() {
        let (rate, now) = (LogRate::new(1000), Instant::now() + BURST);
        let after = |ms| now + Duration::from_millis(ms);
        let take = |region, bytes, now| rate.take(region, bytes, now, after(100_000)).unwrap();
        assert_eq!(take("eu", 5000, now), now, "what is left over from a pause");
        assert_eq!(take("eu", 1000, now), after(4000));
        assert_eq!(take("asia", 500, now), now);
        assert_eq!(take("asia", 500, now), now);
        assert_eq!(take("asia", 500, now), now, "a second's worth at once");
        assert_eq!(rate.take("asia", 500, now, after(499)), None, "too late, and not charged");
        assert_eq!(take("asia", 500, now), after(500));
        assert_eq!(take("eu", 1, after(60_000)), after(60_000), "a pause is not saved up");
        assert_eq!(take("eu", 2000, after(60_000)), after(60_000));
        assert_eq!(take("eu", 1, after(60_000)), after(61_001));
    }

    #[test]
    fn more_regions_than_there_are_share_what_one_gets() {
        let (rate, now) = (LogRate::new(1000), Instant::now() + BURST);
        let take = |region: &str, bytes| rate.take(region, bytes, now, now + 60 * BURST).unwrap();
        for nth in 0..REGION_COUNT_MAX - 1 {
            take(&format!("region-{nth}"), 1);
        }
        // The last place is that of all others.
        take("", 3000);
        assert!(now < take("one too many", 1));
        assert!(now < take("another", 1));
        assert_eq!(take("region-0", 1), now);
        assert_eq!(rate.paid_until.lock().unwrap().len(), REGION_COUNT_MAX);
    }
}
