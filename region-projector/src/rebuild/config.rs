//! Bounds of a rebuild.

use process::config::Period;
use serde::Deserialize;

/// Bounds of a rebuild. Everything else is as for the projector.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(default)]
pub struct RebuildConfig {
    /// Bytes of states that are in memory at most. Beyond, those that were touched longest ago go to
    /// their table, and come back when they are needed.
    pub states_bytes_max: usize,
    /// Bytes of events that are read and not folded at most.
    pub queue_bytes_max: u32,
    /// States and checkpoints are stored this often at least: what a killed rebuild folds again.
    pub checkpoint_interval: Period,
    /// Ranges of states whose rows are made at the same time.
    pub workers_max: usize,
    /// The deadline of one statement; the making of an index is one.
    pub statement_timeout: Period,
}

impl Default for RebuildConfig {
    fn default() -> Self {
        Self {
            states_bytes_max: 320 * 1024 * 1024,
            queue_bytes_max: 96 * 1024 * 1024,
            checkpoint_interval: Period::from_secs(30),
            workers_max: 2,
            statement_timeout: Period::from_secs(3600),
        }
    }
}

impl RebuildConfig {
    pub(crate) fn mistakes(&self) -> Vec<String> {
        let positive =
            [("queue_bytes_max", self.queue_bytes_max as usize), ("workers_max", self.workers_max)];
        let zero = positive.into_iter().filter(|(_, value)| *value == 0);
        zero.map(|(key, _)| format!("rebuild.{key}: must not be zero")).collect()
    }
}
