//! The states of one partition that a rebuild has in memory.

use std::collections::HashMap;

use consistency::Version;
use projection::{StateWrites, StoredState};

/// What an entry takes beside its texts.
const OVERHEAD_BYTES: usize = 160;

/// States by aggregate id.
#[derive(Debug, Default)]
pub struct States {
    entries: HashMap<String, Entry>,
    bytes: usize,
    /// Counts batches, so that it is known what was touched last.
    batch: u64,
}

#[derive(Debug)]
struct Entry {
    state: StoredState,
    /// The version that the table has; zero for none.
    stored: Version,
    touched: u64,
}

impl Entry {
    fn bytes(&self, id: &str) -> usize {
        OVERHEAD_BYTES + id.len() + self.state.state().map_or(0, str::len)
    }

    fn is_stored(&self) -> bool {
        self.stored == self.state.version()
    }
}

impl States {
    /// About what they take.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A state, which is touched by that.
    pub fn get(&mut self, id: &str) -> Option<&StoredState> {
        let batch = self.batch;
        let entry = self.entries.get_mut(id)?;
        entry.touched = batch;
        Some(&entry.state)
    }

    /// A state as the table has it.
    pub fn insert_stored(&mut self, id: String, state: StoredState) {
        let stored = state.version();
        self.insert(id, state, stored);
    }

    /// A state that the table does not have yet.
    pub fn put(&mut self, id: String, state: StoredState) {
        let stored = self.entries.get(&id).map_or(Version::ZERO, |entry| entry.stored);
        self.insert(id, state, stored);
    }

    fn insert(&mut self, id: String, state: StoredState, stored: Version) {
        let entry = Entry { state, stored, touched: self.batch };
        self.bytes += entry.bytes(&id);
        let name_len = id.len();
        if let Some(before) = self.entries.insert(id, entry) {
            let texts = name_len + before.state.state().map_or(0, str::len);
            self.bytes = self.bytes.saturating_sub(OVERHEAD_BYTES + texts);
        }
    }

    /// Another batch begins.
    pub fn begin_batch(&mut self) {
        self.batch += 1;
    }

    /// Aggregates that the table does not have.
    pub fn new_to_table(&self) -> impl Iterator<Item = (&str, &StoredState)> {
        let entries = self.entries.iter();
        let new = entries.filter(|(_, entry)| !entry.is_stored() && entry.stored == Version::ZERO);
        new.map(|(id, entry)| (id.as_str(), &entry.state))
    }

    /// Aggregates that the table has an older state of, so many at once.
    pub fn newer_than_table(&self, partition: u16, count_max: usize) -> Vec<StateWrites> {
        let entries = self.entries.iter();
        let newer =
            entries.filter(|(_, entry)| !entry.is_stored() && entry.stored != Version::ZERO);
        let mut all = vec![StateWrites::default()];
        for (id, Entry { state, stored, .. }) in newer {
            if all.last().is_some_and(|last| count_max <= last.aggregate_ids.len()) {
                all.push(StateWrites::default());
            }
            let Some(writes) = all.last_mut() else { continue };
            writes.aggregate_ids.push(id.clone());
            writes.partitions.push(i32::from(partition));
            writes.previous_versions.push(stored.as_i64());
            writes.versions.push(state.version().as_i64());
            writes.epochs.push(state.at().epoch.as_i32());
            writes.positions.push(state.at().position.as_i64());
            writes.created_positions.push(state.created().as_i64());
            writes.states.push(state.state().map(str::to_owned));
        }
        all
    }

    /// The table has them all now.
    pub fn stored(&mut self) {
        for entry in self.entries.values_mut() {
            entry.stored = entry.state.version();
        }
    }

    /// Forgets what was touched longest ago, until at most so many bytes are left. Everything is
    /// stored by now.
    pub fn shrink(&mut self, bytes_max: usize) {
        let mut ages: Vec<(u64, usize)> =
            self.entries.iter().map(|(id, entry)| (entry.touched, entry.bytes(id))).collect();
        ages.sort_unstable();
        let mut kept = self.bytes;
        let mut oldest = 0;
        for (touched, bytes) in ages {
            if kept <= bytes_max {
                break;
            }
            (kept, oldest) = (kept.saturating_sub(bytes), touched);
        }
        self.entries.retain(|_, entry| oldest < entry.touched);
        self.bytes = self.entries.iter().map(|(id, entry)| entry.bytes(id)).sum();
        self.entries.shrink_to(self.entries.len() * 2);
    }
}

#[cfg(test)]
mod tests {
    use consistency::{Epoch, LogPosition, Position};

    use super::*;

    fn state(version: u64, text: &str) -> StoredState {
        let at = LogPosition::new(Epoch::FIRST, Position::new(version).unwrap());
        StoredState::new(Version::new(version).unwrap(), at, at.position, Some(text.to_owned()))
    }

    #[test]
    fn what_was_touched_last_is_kept_and_what_is_written_is_what_the_table_lacks() {
        let mut states = States::default();
        states.begin_batch();
        states.insert_stored("old".to_owned(), state(1, "1234567890"));
        states.put("new".to_owned(), state(1, "12345"));
        states.begin_batch();
        states.put("old".to_owned(), state(2, "12"));
        assert_eq!(states.new_to_table().map(|(id, _)| id).collect::<Vec<_>>(), ["new"]);
        let newer = &states.newer_than_table(3, 10)[0];
        assert_eq!(
            (&newer.aggregate_ids[..], &newer.previous_versions[..]),
            (&["old".to_owned()][..], &[1][..])
        );
        assert_eq!(states.bytes(), 2 * OVERHEAD_BYTES + 3 + 5 + 3 + 2);
        states.stored();
        states.shrink(OVERHEAD_BYTES + 10);
        assert!(states.get("new").is_none() && states.get("old").is_some());
        assert_eq!(states.bytes(), OVERHEAD_BYTES + 5);
    }
}
