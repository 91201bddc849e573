//! The newest end of the log that this process has seen, and who waits for a newer one.

use consistency::{Epoch, LogPosition};
use tokio::sync::watch;

/// Clones share it. It moves forward, never back.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    head: watch::Sender<LogPosition>,
    /// Told apart, so that who waits for an epoch is not woken by each append.
    epoch: watch::Sender<Epoch>,
}

impl Seen {
    pub fn new(head: LogPosition) -> Self {
        Self { head: watch::Sender::new(head), epoch: watch::Sender::new(head.epoch) }
    }

    pub fn head(&self) -> LogPosition {
        *self.head.borrow()
    }

    pub fn watch_head(&self) -> watch::Receiver<LogPosition> {
        self.head.subscribe()
    }

    pub fn watch_epoch(&self) -> watch::Receiver<Epoch> {
        self.epoch.subscribe()
    }

    /// Moves to a newer end, which wakes who waits for one.
    pub fn raise(&self, at: LogPosition) {
        raise(&self.head, at);
        raise(&self.epoch, at.epoch);
    }

    /// Moves to a newer end, which wakes nobody before [`tell`](Self::tell).
    pub fn raise_untold(&self, at: LogPosition) {
        self.head.send_if_modified(|seen| {
            *seen = at.max(*seen);
            false
        });
        raise(&self.epoch, at.epoch);
    }

    /// Wakes who waits for a newer end.
    pub fn tell(&self) {
        self.head.send_modify(|_| ());
    }
}

fn raise<T: Ord>(watched: &watch::Sender<T>, to: T) {
    watched.send_if_modified(|seen| {
        let is_newer = *seen < to;
        if is_newer {
            *seen = to;
        }
        is_newer
    });
}

#[cfg(test)]
mod tests {
    use consistency::Position;

    use super::*;

    fn at(epoch: u32, position: u64) -> LogPosition {
        LogPosition::new(Epoch::new(epoch).unwrap(), Position::new(position).unwrap())
    }

    #[test]
    fn a_newer_end_in_the_same_epoch_wakes_nobody_who_waits_for_an_epoch() {
        let seen = Seen::new(at(1, 5));
        let (head, epoch) = (seen.watch_head(), seen.watch_epoch());
        seen.raise(at(1, 5));
        assert!(!head.has_changed().unwrap());
        seen.raise(at(1, 6));
        assert_eq!(seen.head(), at(1, 6));
        assert!(head.has_changed().unwrap() && !epoch.has_changed().unwrap());
    }

    #[test]
    fn an_end_that_is_told_later_is_seen_at_once() {
        let seen = Seen::new(at(1, 5));
        let mut head = seen.watch_head();
        seen.raise_untold(at(1, 6));
        seen.raise_untold(at(1, 4));
        assert_eq!(seen.head(), at(1, 6));
        assert!(!head.has_changed().unwrap());
        seen.tell();
        assert!(head.has_changed().unwrap());
        assert_eq!(*head.borrow_and_update(), at(1, 6));
    }

    #[test]
    fn an_older_end_changes_nothing_and_a_newer_epoch_is_newer_wherever_it_ends() {
        let seen = Seen::new(at(2, 5));
        let (mut head, mut epoch) = (seen.watch_head(), seen.watch_epoch());
        seen.raise(at(1, 9));
        assert!(!head.has_changed().unwrap() && !epoch.has_changed().unwrap());
        seen.raise(at(3, 1));
        assert_eq!(
            (*head.borrow_and_update(), *epoch.borrow_and_update()),
            (at(3, 1), Epoch::new(3).unwrap())
        );
    }
}
