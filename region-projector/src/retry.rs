//! Pauses between attempts that never end.

use std::time::Duration;

use process::config::Period;

/// A pause that doubles with each failure, with jitter so that those who failed together do not come
/// back together.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    /// From the shortest to the longest pause.
    pub fn new(min: Period, max: Period) -> Self {
        Self { min: min.get(), max: max.get(), next: min.get() }
    }

    /// After a success the next pause is the shortest again.
    pub fn reset(&mut self) {
        self.next = self.min;
    }

    /// The next pause. `chance` is from 0 to 1: half of the pause is left to it.
    pub fn next(&mut self, chance: f64) -> Duration {
        let whole = self.next;
        self.next = (whole * 2).min(self.max);
        whole.mul_f64(0.5 + chance.clamp(0.0, 1.0) / 2.0)
    }

    /// Waits for the next pause.
    pub async fn pause(&mut self) {
        tokio::time::sleep(self.next(rand::random())).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_start_again_after_a_success() {
        let mut backoff = Backoff::new(Period::from_millis(100), Period::from_millis(300));
        let pauses = [backoff.next(1.0), backoff.next(1.0), backoff.next(1.0), backoff.next(0.0)];
        assert_eq!(pauses.map(|pause| pause.as_millis()), [100, 200, 300, 150]);
        backoff.reset();
        assert_eq!(backoff.next(1.0).as_millis(), 100);
    }
}
