//! What a snapshot proves.

use consistency::{Evidence, LogPosition, Parked};
use projection::sql;

use super::{Read, Target};
use crate::{
    currency::{Observation, Partitions},
    read_models::{Found, Snapshot},
};

/// What the snapshot says about the read: the stored checkpoints, carried on by what is proven beyond
/// them, and everything parked that the read touches.
pub fn of(snapshot: &Snapshot, read: &Read<'_>) -> Evidence {
    let carried = |partition, checkpoint| {
        let version = snapshot.definition.version();
        let currency = &read.gateway.currency;
        currency.watermark(&read.target.projection, version, partition, checkpoint)
    };
    match &snapshot.found {
        Found::Row(row) => {
            let partitions = read.target.partitions(Some(&snapshot.definition));
            let parked = read.target.aggregate().zip(row.parked);
            Evidence {
                watermark: match partitions {
                    Partitions::One(partition) => carried(partition, row.checkpoint),
                    Partitions::All => None,
                },
                row_version: row.row.as_ref().map(|row| row.version),
                parked: parked
                    .map(|(aggregate, position)| Parked { aggregate: aggregate.key(), position })
                    .into_iter()
                    .collect(),
            }
        }
        Found::List(sql::ListAnswer { snapshot, .. })
        | Found::Rollup(sql::RollupAnswer { snapshot, .. }) => {
            let marks = (0..).zip(&snapshot.checkpoints);
            let marks = marks.map(|(partition, checkpoint)| carried(partition, *checkpoint));
            Evidence {
                watermark: marks.min().flatten(),
                row_version: None,
                parked: parked(snapshot, read),
            }
        }
    }
}

/// When there are too many to list, whatever the caller wrote may be among those left out.
fn parked(snapshot: &sql::Snapshot, read: &Read<'_>) -> Vec<Parked> {
    let mut parked = snapshot.parked.clone();
    let last = parked.last().map(|last| last.position);
    if let (false, Some(position)) = (snapshot.parked_complete, last) {
        let claims = read.call.token.claims().iter();
        parked.extend(claims.map(|claim| Parked { aggregate: claim.aggregate, position }));
    }
    parked
}

/// Whether something that the read touches is parked at or below what the answer shows.
pub fn holds_back(snapshot: &Snapshot, read: &Read<'_>, shown: Option<LogPosition>) -> bool {
    let parked = of(snapshot, read).parked;
    shown.is_some_and(|shown| parked.iter().any(|parked| parked.position <= shown.position))
}

/// What memory learns from the snapshot; `None` while no version is active.
pub fn observation(snapshot: &Snapshot, target: &Target) -> Option<Observation> {
    let definition = &snapshot.definition;
    let (active, checkpoints) = match &snapshot.found {
        Found::Row(row) => {
            let checkpoint = match target.partitions(Some(definition)) {
                Partitions::One(partition) => vec![(partition, row.checkpoint)],
                Partitions::All => Vec::new(),
            };
            (row.active_version, checkpoint)
        }
        Found::List(sql::ListAnswer { snapshot, .. })
        | Found::Rollup(sql::RollupAnswer { snapshot, .. }) => {
            let checkpoints = (0..).zip(snapshot.checkpoints.iter().copied());
            (snapshot.active_version, checkpoints.collect())
        }
    };
    active.map(|version| Observation {
        moment: snapshot.moment,
        version,
        partition_count: definition.partition_count().get(),
        checkpoints,
    })
}

/// What an answer from the snapshot shows: a row its own last position, anything else the largest
/// stored checkpoint, since the smallest would let the next region go back in time.
pub fn shown(snapshot: &Snapshot) -> Option<LogPosition> {
    match &snapshot.found {
        Found::Row(row) => row.row.as_ref().map(|row| row.at).or(row.checkpoint),
        Found::List(sql::ListAnswer { snapshot, .. })
        | Found::Rollup(sql::RollupAnswer { snapshot, .. }) => snapshot.largest_checkpoint(),
    }
}
