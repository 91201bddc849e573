//! How much is applied at once, so that a transaction ends in time.

use std::time::Duration;

/// Counts events of transactions by what earlier ones took.
#[derive(Debug, Clone, Copy)]
pub struct BatchSize {
    events_max: usize,
    took_max: Duration,
    events: usize,
}

impl BatchSize {
    /// At most so many, in at most so long.
    pub fn new(events_max: usize, ms_max: u32) -> Self {
        Self { events_max, took_max: Duration::from_millis(ms_max.into()), events: events_max }
    }

    /// As many events as the next transaction may have.
    pub fn get(&self) -> usize {
        self.events
    }

    /// A transaction of so many events took so long. One that took too long makes the next as much
    /// smaller; the others let it grow again.
    pub fn committed(&mut self, events: usize, took: Duration) {
        let grown = self.events.saturating_mul(2);
        let events = if took <= self.took_max {
            grown
        } else {
            (events as f64 * self.took_max.as_secs_f64() / took.as_secs_f64()) as usize
        };
        self.events = events.clamp(1, self.events_max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_that_takes_too_long_makes_the_next_smaller_until_there_is_time() {
        let mut size = BatchSize::new(1000, 100);
        assert_eq!(size.get(), 1000);
        size.committed(1000, Duration::from_millis(400));
        assert_eq!(size.get(), 250);
        size.committed(250, Duration::from_secs(3600));
        assert_eq!(size.get(), 1, "one event is always applied");
        size.committed(1, Duration::from_millis(100));
        assert_eq!(size.get(), 2);
        for _ in 0..20 {
            size.committed(2, Duration::from_millis(1));
        }
        assert_eq!(size.get(), 1000);
    }
}
