//! What a projector tells its region's gateways after a commit, and after reading past events that
//! are not its own.

use serde::{Deserialize, Serialize};

use crate::{Epoch, IdleProof, LogPosition, Name, Position};

/// One step of one partition's watermark. A hint: it may be lost, late or double, and no answer
/// rests on it alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Announcement {
    /// The region that it speaks for.
    pub region: String,
    /// The epoch that its positions count in.
    pub epoch: Epoch,
    /// The projection.
    pub projection: Name,
    /// The version of the projection.
    pub version: u32,
    /// The partition.
    pub partition: u16,
    /// The watermark before the step.
    pub from: Position,
    /// The watermark after it.
    pub to: Position,
    /// The checkpoint that is stored; below `to` when the rest is an idle proof.
    pub stored: Position,
    /// The log's head as the projector knows it.
    pub head: Position,
    /// Every row key that any event of `(from, to]` touched, before or after it, and every aggregate
    /// that was parked, retried or discarded, as [`crate::AggregateKey::hint`]s. `None` when they are
    /// too many to list: then every key counts as touched.
    pub keys: Option<Vec<u64>>,
}

impl Announcement {
    /// The watermark that the step leads to.
    pub fn reached(&self) -> LogPosition {
        LogPosition::new(self.epoch, self.to)
    }

    /// The step as a proof to be laid on a stored checkpoint.
    pub fn proof(&self) -> IdleProof {
        IdleProof { stored: LogPosition::new(self.epoch, self.stored), proven: self.reached() }
    }

    /// Whether its positions are in the order that they must be in.
    pub fn is_coherent(&self) -> bool {
        self.from <= self.to && self.stored <= self.to && self.to <= self.head
    }
}
