//! How events are applied: bounds that hold for every projection, and those of single ones.

use std::collections::BTreeSet;
use std::fmt;

use process::config::Period;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// How events are applied, unless a projection has its own way.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(default)]
pub struct ApplyConfig {
    /// Most events of one transaction.
    pub batch_events_max: usize,
    /// Bytes of events that are applied in one transaction at most; what arrived last may pass it.
    pub batch_bytes_max: usize,
    /// Bytes of events that wait for all partitions of a version together at most.
    pub queue_bytes_max: u32,
    /// A transaction that takes longer makes the next ones smaller.
    pub batch_ms_max: u32,
    /// Chunks of events that wait for a partition at most.
    pub queue_chunks_max: usize,
    /// Bytes of states that are remembered from earlier batches, for all partitions of a version together.
    pub remembered_bytes_max: usize,
    /// Partitions of one version that write at the same time at most.
    pub writers_max: usize,
    /// Partitions that are applied here by hand, as in `[0, 1]` or `"0,1"`: not shared with others.
    pub partitions: Option<PartitionSet>,
    /// An idle partition stores how far it has read this often at most.
    pub idle_store_interval: Period,
    /// Stored checkpoints are compared with memory this often, to notice a database that went back.
    pub verify_interval: Period,
    /// Letters of event types and schema versions that an older process parks in its partitions are
    /// applied this often by one that knows them. Those of its own it applies as it takes them over.
    pub letters_look_interval: Period,
    /// The first pause after an error; it doubles up to `retry_pause_max`.
    pub retry_pause_min: Period,
    /// The longest pause after an error.
    pub retry_pause_max: Period,
    /// The deadline of one transaction, and of one look at the checkpoints. A shutdown does not wait
    /// for it longer than half of `shutdown_grace`.
    pub attempt_timeout: Period,
    /// Aggregates of one version that may be parked for one reason; it stops before there are more.
    pub parked_aggregates_max: u64,
    /// Keys that an announcement names at most; beyond, every key counts as touched.
    pub announced_keys_max: usize,
    /// Events of one aggregate that are fetched from the log at most to fill a gap in its versions.
    pub gap_events_max: usize,
    /// How long the log is asked for them before the aggregate is parked.
    pub gap_wait_max: Period,
}

impl Default for ApplyConfig {
    fn default() -> Self {
        Self {
            batch_events_max: 1000,
            batch_bytes_max: 16 * 1024 * 1024,
            queue_bytes_max: 64 * 1024 * 1024,
            batch_ms_max: 500,
            queue_chunks_max: 256,
            remembered_bytes_max: 16 * 1024 * 1024,
            writers_max: 4,
            partitions: None,
            idle_store_interval: Period::from_secs(1),
            verify_interval: Period::from_secs(1),
            letters_look_interval: Period::from_secs(30),
            retry_pause_min: Period::from_millis(50),
            retry_pause_max: Period::from_secs(1),
            attempt_timeout: Period::from_secs(30),
            parked_aggregates_max: 100,
            announced_keys_max: 1000,
            gap_events_max: 10_000,
            gap_wait_max: Period::from_secs(10),
        }
    }
}

impl ApplyConfig {
    /// What is wrong with it, each with its key after `section`.
    pub(super) fn mistakes(&self, section: &str) -> Vec<String> {
        let positive = [
            ("batch_events_max", self.batch_events_max),
            ("batch_ms_max", self.batch_ms_max as usize),
            ("batch_bytes_max", self.batch_bytes_max),
            ("queue_bytes_max", self.queue_bytes_max as usize),
            ("queue_chunks_max", self.queue_chunks_max),
            ("writers_max", self.writers_max),
        ];
        let zero = positive.into_iter().filter(|(_, value)| *value == 0);
        zero.map(|(key, _)| format!("{section}.{key}: must not be zero")).collect()
    }
}

/// What one projection has otherwise than the rest: see [`ApplyConfig`] for each.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub struct LimitsConfig {
    /// Most events of one transaction.
    pub batch_events_max: Option<usize>,
    /// Bytes of events that are applied in one transaction at most.
    pub batch_bytes_max: Option<usize>,
    /// Bytes of events that wait for all partitions together at most.
    pub queue_bytes_max: Option<u32>,
    /// A transaction that takes longer makes the next ones smaller.
    pub batch_ms_max: Option<u32>,
    /// Chunks of events that wait for a partition at most.
    pub queue_chunks_max: Option<usize>,
    /// Bytes of states that are remembered from earlier batches, for all partitions together.
    pub remembered_bytes_max: Option<usize>,
    /// Partitions that write at the same time at most.
    pub writers_max: Option<usize>,
    /// Partitions that are applied here by hand.
    pub partitions: Option<PartitionSet>,
    /// An idle partition stores how far it has read this often at most.
    pub idle_store_interval: Option<Period>,
    /// The deadline of one transaction.
    pub attempt_timeout: Option<Period>,
    /// Aggregates that may be parked for one reason.
    pub parked_aggregates_max: Option<u64>,
}

impl LimitsConfig {
    /// What holds for the projection.
    pub fn over(&self, apply: &ApplyConfig) -> ApplyConfig {
        ApplyConfig {
            batch_events_max: self.batch_events_max.unwrap_or(apply.batch_events_max),
            batch_bytes_max: self.batch_bytes_max.unwrap_or(apply.batch_bytes_max),
            queue_bytes_max: self.queue_bytes_max.unwrap_or(apply.queue_bytes_max),
            batch_ms_max: self.batch_ms_max.unwrap_or(apply.batch_ms_max),
            queue_chunks_max: self.queue_chunks_max.unwrap_or(apply.queue_chunks_max),
            remembered_bytes_max: self.remembered_bytes_max.unwrap_or(apply.remembered_bytes_max),
            writers_max: self.writers_max.unwrap_or(apply.writers_max),
            partitions: self.partitions.or(apply.partitions),
            idle_store_interval: self.idle_store_interval.unwrap_or(apply.idle_store_interval),
            attempt_timeout: self.attempt_timeout.unwrap_or(apply.attempt_timeout),
            parked_aggregates_max: self
                .parked_aggregates_max
                .unwrap_or(apply.parked_aggregates_max),
            ..*apply
        }
    }
}

const PARTITIONS_MAX: usize = 1024;

/// A set of partitions, from 0 to 1023.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PartitionSet([u64; PARTITIONS_MAX / 64]);

impl PartitionSet {
    /// `None` when one is beyond every version's.
    pub fn new(partitions: impl IntoIterator<Item = u16>) -> Option<Self> {
        let mut set = Self([0; PARTITIONS_MAX / 64]);
        for partition in partitions {
            let word = set.0.get_mut(usize::from(partition) / 64)?;
            *word |= 1 << (partition % 64);
        }
        Some(set)
    }

    /// Those that a version with so many partitions has.
    pub fn below(&self, partition_count: u16) -> BTreeSet<u16> {
        let is_in = |one: &u16| {
            let word = self.0.get(usize::from(*one) / 64);
            word.is_some_and(|word| word >> (one % 64) & 1 == 1)
        };
        (0..partition_count).filter(is_in).collect()
    }
}

impl fmt::Debug for PartitionSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.below(PARTITIONS_MAX as u16)).finish()
    }
}

impl<'de> Deserialize<'de> for PartitionSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Numbers;

        impl<'de> Visitor<'de> for Numbers {
            type Value = PartitionSet;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("partitions from 0 to 1023, like [0, 1] or \"0,1\"")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<PartitionSet, E> {
                let numbers = text.split(',').map(|number| number.trim().parse());
                let numbers = numbers.collect::<Result<Vec<u16>, _>>();
                let set = numbers.ok().and_then(PartitionSet::new);
                set.ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(text), &self))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<PartitionSet, A::Error> {
                let mut numbers = Vec::new();
                while let Some(number) = seq.next_element::<u16>()? {
                    numbers.push(number);
                }
                let set = PartitionSet::new(numbers);
                set.ok_or_else(|| A::Error::custom("a partition is from 0 to 1023"))
            }
        }

        deserializer.deserialize_any(Numbers)
    }
}
