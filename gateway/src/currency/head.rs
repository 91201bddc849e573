//! The largest position that the log is known to have reached.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use consistency::LogPosition;

/// One of the stores that tell who asks without the lock, so that a test can let a reader in between.
#[derive(Debug, Clone, Copy)]
enum Store {
    Position(u64),
    Epoch(u32),
}

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
            Self::stores(at).into_iter().for_each(|store| self.store(store));
        }
        is_news
    }

    /// The position first: who sees the epoch sees no position of an earlier one.
    const fn stores(at: LogPosition) -> [Store; 2] {
        [Store::Position(at.position.get()), Store::Epoch(at.epoch.get())]
    }

    fn store(&self, store: Store) {
        match store {
            Store::Position(position) => self.position.store(position, Ordering::Release),
            Store::Epoch(epoch) => self.epoch.store(epoch, Ordering::Release),
        }
    }

    /// Without the lock. Not knowing it is no mistake: then the lock is taken.
    fn is_known(&self, at: LogPosition) -> bool {
        self.is_known_after(self.epoch.load(Ordering::Acquire), at)
    }

    /// The second half of [`Self::is_known`]: the epoch was loaded before.
    fn is_known_after(&self, epoch: u32, at: LogPosition) -> bool {
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
        assert!(head.is_known(at(2, 5)), "it is found out without the lock");
    }

    /// A reader loads the epoch after any step of those who raise it, and the position after any later one.
    #[test]
    fn what_is_taken_for_known_between_two_stores_is_known() {
        let raises = [at(1, 9), at(2, 3), at(2, 5), at(4, 1)];
        let steps: Vec<(LogPosition, Store)> =
            raises.into_iter().flat_map(|to| Head::stores(to).map(|store| (to, store))).collect();
        let follow = |head: &Head, steps: &[(LogPosition, Store)]| {
            for (to, store) in steps {
                *head.known.lock().unwrap() = *to;
                head.store(*store);
            }
        };
        let asked = (1..=4).flat_map(|epoch| (0..=10).map(move |position| at(epoch, position)));
        for begun in 0..=steps.len() {
            for ended in begun..=steps.len() {
                let head = Head::new();
                follow(&head, &steps[..begun]);
                let epoch = head.epoch.load(Ordering::Acquire);
                follow(&head, &steps[begun..ended]);
                for asked in asked.clone() {
                    let is_known = head.is_known_after(epoch, asked);
                    assert!(!is_known || asked <= head.get(), "{asked} from {begun} to {ended}");
                }
            }
        }
    }
}
