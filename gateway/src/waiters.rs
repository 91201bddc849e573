//! Reads that wait for a watermark, in the order of what they wait for.

use std::collections::BTreeMap;

use consistency::LogPosition;
use tokio::sync::oneshot;

use crate::turns::{Release, Turn};

/// Names one waiter; its position first, so that a range of waiters is a range of positions.
pub type WaiterKey = (LogPosition, u64);

/// The waiters of one projection: those for one partition each, and those for all of them.
#[derive(Debug, Default)]
pub struct Waiters {
    partitions: Vec<BTreeMap<WaiterKey, Release>>,
    everything: BTreeMap<WaiterKey, Release>,
    next_id: u64,
}

impl Waiters {
    /// Adds one for `at`. `partition` is `None` for who waits for all.
    pub fn add(
        &mut self,
        partition: Option<u16>,
        at: LogPosition,
    ) -> (WaiterKey, oneshot::Receiver<Turn>) {
        let (sender, receiver) = oneshot::channel();
        self.next_id += 1;
        let key = (at, self.next_id);
        self.set(partition).insert(key, sender);
        (key, receiver)
    }

    /// Takes one out that gave up. `false` when it was released already.
    pub fn remove(&mut self, partition: Option<u16>, key: WaiterKey) -> bool {
        self.set(partition).remove(&key).is_some()
    }

    /// Takes all of them out. They learn that nobody will release them.
    pub fn give_up(&mut self) {
        self.everything.clear();
        self.partitions.clear();
    }

    /// Takes out exactly those who are satisfied by a watermark.
    pub fn release(
        &mut self,
        partition: Option<u16>,
        mark: LogPosition,
    ) -> BTreeMap<WaiterKey, Release> {
        let set = self.set(partition);
        let unsatisfied = set.split_off(&(mark, u64::MAX));
        std::mem::replace(set, unsatisfied)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.everything.len() + self.partitions.iter().map(BTreeMap::len).sum::<usize>()
    }

    fn set(&mut self, partition: Option<u16>) -> &mut BTreeMap<WaiterKey, Release> {
        match partition {
            None => &mut self.everything,
            Some(partition) => {
                let partition = usize::from(partition);
                if self.partitions.len() <= partition {
                    self.partitions.resize_with(partition + 1, BTreeMap::new);
                }
                &mut self.partitions[partition]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use consistency::{Epoch, Position};

    use super::*;

    fn at(position: u64) -> LogPosition {
        LogPosition::new(Epoch::FIRST, Position::new(position).unwrap())
    }

    #[test]
    fn exactly_those_who_are_satisfied_are_released() {
        let mut waiters = Waiters::default();
        let mut receivers: Vec<_> =
            [3, 5, 5, 6].map(|position| waiters.add(Some(2), at(position)).1).into();
        let other = waiters.add(Some(1), at(1));
        let all = waiters.add(None, at(1));
        assert_eq!(waiters.release(Some(2), at(5)).len(), 3);
        assert_eq!(waiters.count(), 3);
        assert!(receivers.pop().is_some_and(|mut unsatisfied| matches!(
            unsatisfied.try_recv(),
            Err(oneshot::error::TryRecvError::Empty)
        )));
        waiters.remove(Some(1), other.0);
        waiters.remove(None, all.0);
        assert_eq!(waiters.count(), 1);
        assert!(waiters.release(Some(2), at(5)).is_empty());
    }
}
