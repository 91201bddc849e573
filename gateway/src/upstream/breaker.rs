//! Leaves somebody alone who does not answer, and finds out with one request at a time whether he
//! answers again.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// Opens after so many failures in a row. While it is open nobody passes; after that one at a time
/// may try, until one succeeds.
#[derive(Debug)]
pub struct Breaker {
    failures_max: u32,
    open_for: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    failures: u32,
    /// How often there was an answer.
    answers: u64,
    open_until: Option<Instant>,
    probing: bool,
}

/// The leave to try. Who drops it unused has found out nothing.
#[derive(Debug)]
pub struct Pass<'a> {
    breaker: &'a Breaker,
    is_probe: bool,
    /// How many answers there had been.
    answers: u64,
}

/// What an attempt changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turned {
    /// Nothing.
    Unchanged,
    /// It opened.
    Opened,
    /// It closed.
    Closed,
}

impl Breaker {
    /// Closed.
    pub fn new(failures_max: u32, open_for: Duration) -> Self {
        Self { failures_max: failures_max.max(1), open_for, state: Mutex::default() }
    }

    /// Whether somebody would pass now.
    pub fn is_passable(&self, now: Instant) -> bool {
        self.state().is_passable(now)
    }

    /// Leave to try now, if there is one.
    pub fn pass(&self, now: Instant) -> Option<Pass<'_>> {
        let mut state = self.state();
        if !state.is_passable(now) {
            return None;
        }
        let is_probe = state.open_until.is_some();
        state.probing |= is_probe;
        Some(Pass { breaker: self, is_probe, answers: state.answers })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_passable(&self, now: Instant) -> bool {
        self.open_until.is_none_or(|until| until <= now && !self.probing)
    }
}

impl Pass<'_> {
    /// There was an answer.
    pub fn succeeded(self) -> Turned {
        let mut state = self.breaker.state();
        let was_open = state.open_until.is_some();
        // One that was sent before it opened proves as much as a probe; the probe's slot is its own.
        (state.failures, state.open_until) = (0, None);
        state.answers += 1;
        if was_open { Turned::Closed } else { Turned::Unchanged }
    }

    /// There was none in time. Whoever answered others meanwhile is there: this question takes longer.
    pub fn late(self, now: Instant) -> Turned {
        let answers = self.breaker.state().answers;
        if answers == self.answers { self.failed(now) } else { Turned::Unchanged }
    }

    /// There was none.
    pub fn failed(self, now: Instant) -> Turned {
        let mut state = self.breaker.state();
        state.failures = state.failures.saturating_add(1);
        if state.failures < self.breaker.failures_max {
            return Turned::Unchanged;
        }
        let was_open = state.open_until.replace(now + self.breaker.open_for).is_some();
        if was_open { Turned::Unchanged } else { Turned::Opened }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if self.is_probe {
            self.breaker.state().probing = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN_FOR: Duration = Duration::from_secs(1);

    fn opened(now: Instant) -> Breaker {
        let breaker = Breaker::new(2, OPEN_FOR);
        assert_eq!(breaker.pass(now).unwrap().failed(now), Turned::Unchanged);
        assert_eq!(breaker.pass(now).unwrap().failed(now), Turned::Opened);
        breaker
    }

    #[test]
    fn it_opens_after_failures_in_a_row_and_not_after_scattered_ones() {
        let now = Instant::now();
        let breaker = Breaker::new(2, OPEN_FOR);
        for _ in 0..3 {
            breaker.pass(now).unwrap().failed(now);
            breaker.pass(now).unwrap().succeeded();
        }
        assert!(breaker.is_passable(now));
        let breaker = opened(now);
        assert!(!breaker.is_passable(now) && breaker.pass(now).is_none());
    }

    #[test]
    fn who_answers_others_is_only_slow() {
        let now = Instant::now();
        let breaker = Breaker::new(2, OPEN_FOR);
        let slow: Vec<_> = (0..9).map(|_| breaker.pass(now).unwrap()).collect();
        breaker.pass(now).unwrap().succeeded();
        for slow in slow {
            assert_eq!(slow.late(now), Turned::Unchanged);
        }
        assert!(breaker.is_passable(now));
        // Nobody has been answered since these were sent.
        assert_eq!(breaker.pass(now).unwrap().late(now), Turned::Unchanged);
        assert_eq!(breaker.pass(now).unwrap().late(now), Turned::Opened);
    }

    #[test]
    fn one_at_a_time_tries_whether_it_answers_again() {
        let now = Instant::now();
        let breaker = opened(now);
        let later = now + OPEN_FOR;
        let probe = breaker.pass(later).unwrap();
        assert!(breaker.pass(later).is_none(), "one is trying already");
        // Who gave up before the answer came leaves the place to the next.
        drop(probe);
        let probe = breaker.pass(later).unwrap();
        assert_eq!(probe.failed(later), Turned::Unchanged);
        assert!(breaker.pass(later).is_none(), "open again");
        let last = later + OPEN_FOR;
        assert_eq!(breaker.pass(last).unwrap().succeeded(), Turned::Closed);
        assert!(breaker.pass(last).is_some() && breaker.pass(last).is_some());
    }
}
