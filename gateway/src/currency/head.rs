//! The largest position that the log is known to have reached.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use consistency::LogPosition;

/// Every request says how far it knows the log, and nearly none has news: those only read what is shared.
#[derive(Debug)]
pub struct Head {
    known: Mutex<LogPosition>,
    /// The same, to be read without the lock: an epoch, and a position that the log has reached in it or in a
    /// later one.
    epoch: AtomicU32,
    position: AtomicU64,
}

impl Head {
    /// Nothing is known.
    pub fn new() -> Self {
        let known = LogPosition::ORIGIN;
        Self {
            known: Mutex::new(known),
            epoch: AtomicU32::new(known.epoch.get()),
            position: AtomicU64::new(known.position.get()),
        }
    }

    /// What is known.
    pub fn get(&self) -> LogPosition {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The log has reached `at`. Whether that is news.
    pub fn raise(&self, at: LogPosition) -> bool {
        if self.is_known(at) {
            return false;
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let is_news = *known < at;
        if is_news {
            *known = at;
            // The position first: who sees the epoch sees no position of an earlier one.
            self.position.store(at.position.get(), Ordering::Release);
            self.epoch.store(at.epoch.get(), Ordering::Release);
        }
        is_news
    }

    /// Without the lock. Not knowing it is no mistake: then the lock is taken.
    fn is_known(&self, at: LogPosition) -> bool {
        let epoch = self.epoch.load(Ordering::Acquire);
        epoch == at.epoch.get() && at.position.get() <= self.position.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use consistency::{Epoch, Position};

    use super::*;

    fn at(epoch: u32, position: u64) -> LogPosition {
        LogPosition::new(Epoch::new(epoch).unwrap(), Position::new(position).unwrap())
    }

    #[test]
    fn only_what_is_further_is_news() {
        let head = Head::new();
        for (said, is_news) in [
            (at(1, 0), false),
            (at(1, 7), true),
            (at(1, 7), false),
            (at(1, 6), false),
            (at(2, 3), true),
            (at(1, 9), false),
            (at(2, 5), true),
            (at(2, 4), false),
        ] {
            assert_eq!(head.raise(said), is_news, "{said}");
        }
        assert_eq!(head.get(), at(2, 5));
    }
}
