//! States that were written lately, so that the next events of their aggregates need not read them.
//!
//! Nobody else writes a partition's states without raising its fence, so what was committed last is what is
//! stored, as long as nothing went wrong: after anything that did, all is forgotten. And a state is written only
//! over the version that it was folded from, so that a memory that is wrong nevertheless costs a second look.

use std::collections::HashMap;

use projection::StoredState;

/// States of one partition, the newest of them within a bound.
#[derive(Debug)]
pub struct Remembered {
    bytes_max: usize,
    /// What was kept since the last turn; when it takes half of the room, it is the older half.
    newer: Half,
    older: Half,
}

#[derive(Debug, Default)]
struct Half {
    states: HashMap<String, StoredState>,
    bytes: usize,
}

impl Remembered {
    /// Nothing yet, and never more than so many bytes, nearly.
    pub fn new(bytes_max: usize) -> Self {
        Self { bytes_max, newer: Half::default(), older: Half::default() }
    }

    /// The state of an aggregate.
    pub fn get(&self, id: &str) -> Option<&StoredState> {
        self.newer.states.get(id).or_else(|| self.older.states.get(id))
    }

    /// Keeps what was committed.
    pub fn keep(&mut self, id: String, state: StoredState) {
        if self.bytes_max / 2 < bytes_of(&id, &state) {
            return self.forget(&id);
        }
        self.newer.keep(id, state);
        if self.bytes_max / 2 < self.newer.bytes {
            self.older = std::mem::take(&mut self.newer);
        }
    }

    /// Forgets one.
    pub fn forget(&mut self, id: &str) {
        self.newer.forget(id);
        self.older.forget(id);
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        *self = Self::new(self.bytes_max);
    }
}

impl Half {
    fn keep(&mut self, id: String, state: StoredState) {
        self.forget(&id);
        self.bytes += bytes_of(&id, &state);
        self.states.insert(id, state);
    }

    fn forget(&mut self, id: &str) {
        if let Some(state) = self.states.remove(id) {
            self.bytes -= bytes_of(id, &state);
        }
    }
}

/// What an entry takes of memory, nearly.
fn bytes_of(id: &str, state: &StoredState) -> usize {
    size_of::<(String, StoredState)>() + id.len() + state.state().map_or(0, str::len)
}

#[cfg(test)]
mod tests {
    use consistency::{LogPosition, Position, Version};

    use super::*;

    fn state(version: u64, length: usize) -> StoredState {
        let version = Version::new(version).unwrap();
        StoredState::new(version, LogPosition::ORIGIN, Position::ZERO, Some("x".repeat(length)))
    }

    fn version(remembered: &Remembered, id: &str) -> Option<u64> {
        remembered.get(id).map(|state| state.version().get())
    }

    #[test]
    fn the_newest_state_is_remembered_until_it_is_forgotten() {
        let each = bytes_of("a", &state(1, 100));
        let mut remembered = Remembered::new(4 * each);
        remembered.keep("a".into(), state(1, 100));
        remembered.keep("b".into(), state(1, 100));
        // Both halves know it now, and the newer one counts.
        remembered.keep("c".into(), state(1, 100));
        remembered.keep("a".into(), state(2, 100));
        assert_eq!(version(&remembered, "a"), Some(2));
        assert_eq!(version(&remembered, "b"), Some(1));
        remembered.forget("a");
        assert_eq!(version(&remembered, "a"), None, "nor the older one");
        remembered.clear();
        assert_eq!(version(&remembered, "b"), None);
        assert_eq!((remembered.newer.bytes, remembered.older.bytes), (0, 0));
    }

    #[test]
    fn what_was_not_written_for_long_makes_room() {
        let each = bytes_of("00", &state(1, 100));
        let mut remembered = Remembered::new(20 * each);
        for nth in 0..100 {
            remembered.keep(format!("{nth:02}"), state(1, 100));
            // One that is written again and again stays.
            remembered.keep("00".into(), state(nth + 1, 100));
            let halves = [&remembered.newer, &remembered.older];
            let bytes = halves.map(|half| {
                let each = half.states.iter().map(|(id, state)| bytes_of(id, state));
                assert_eq!(half.bytes, each.sum::<usize>());
                half.bytes
            });
            assert!(bytes.iter().sum::<usize>() <= 21 * each, "{bytes:?} at {nth}");
        }
        assert_eq!(version(&remembered, "00"), Some(100));
        assert_eq!(version(&remembered, "99"), Some(1));
        assert_eq!(version(&remembered, "50"), None);
    }

    #[test]
    fn what_is_too_large_is_not_remembered_and_neither_is_what_it_replaces() {
        let mut remembered = Remembered::new(1000);
        remembered.keep("a".into(), state(1, 100));
        remembered.keep("a".into(), state(2, 1000));
        assert_eq!(version(&remembered, "a"), None);
        let mut none = Remembered::new(0);
        none.keep("a".into(), state(1, 1));
        assert_eq!(version(&none, "a"), None);
    }
}
