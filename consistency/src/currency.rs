//! Whether what a region has applied answers a demand.

use crate::{AggregateKey, Demand, LogPosition, Position, Version};

/// A proof by reading: a partition read past `stored` up to `proven` and met no event of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdleProof {
    /// The stored checkpoint that the proof extends.
    pub stored: LogPosition,
    /// How far it extends it.
    pub proven: LogPosition,
}

/// The watermark of one partition: its stored checkpoint, carried further by an idle proof. A proof
/// counts only on top of a checkpoint at least as new as the one it extends: a database that lost
/// its last commits must win those events back first. A missing checkpoint is no watermark at all.
pub fn watermark(checkpoint: Option<LogPosition>, proof: Option<IdleProof>) -> Option<LogPosition> {
    let checkpoint = checkpoint?;
    match proof {
        Some(proof) if proof.stored <= checkpoint && proof.stored.epoch == checkpoint.epoch => {
            Some(checkpoint.max(proof.proven))
        }
        Some(_) | None => Some(checkpoint),
    }
}

/// An aggregate whose event at `position` could not be applied, nor any later one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parked {
    /// Which.
    pub aggregate: AggregateKey,
    /// Its first event that is not applied.
    pub position: Position,
}

/// What one snapshot of a region's read model says about a read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evidence {
    /// The smallest watermark of the partitions that matter; `None` when one has no checkpoint.
    pub watermark: Option<LogPosition>,
    /// The version of the row, when the read is of one row keyed by its aggregate and it exists.
    pub row_version: Option<Version>,
    /// Everything parked that the read touches: the row's aggregate, or all of them for a list.
    pub parked: Vec<Parked>,
}

/// The judgement of one read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It shows everything that is demanded.
    Current,
    /// Events that are demanded may be missing.
    Behind,
    /// It is caught up but for a parked aggregate, and the caller wrote that one or may have:
    /// waiting here does not help.
    Parked,
    /// It is caught up but for parked aggregates that the caller did not write: may be served with
    /// the label `stale;reason=parked`.
    CurrentButParked,
}

/// Judges a read. Run on what memory knows in order to choose what to do, and again on what the
/// rows' own snapshot says before the answer leaves.
///
/// A watermark of a newer epoch says nothing about a position of an older one: that epoch may not
/// have kept it. The token must first be judged and carried by who knows the newer epoch
/// ([`crate::EpochHistory::judge`]); until then the read is behind.
pub fn judge(demand: &Demand, scope: crate::Scope, evidence: &Evidence) -> Verdict {
    let demanded = demand.at();
    let same_epoch = evidence.watermark.is_some_and(|mark| mark.epoch == demanded.epoch);
    let stands_at_demand = evidence.watermark.is_some_and(|mark| {
        let asks_for_nothing = demanded.position == Position::ZERO && demanded.epoch <= mark.epoch;
        asks_for_nothing || same_epoch && demanded.position <= mark.position
    });
    let row_proves_itself = same_epoch
        && matches!((demand.shortcut(), evidence.row_version), (Some(asked), Some(has)) if asked <= has);
    let version_met = demand
        .min_version()
        .is_none_or(|asked| evidence.row_version.is_some_and(|has| asked <= has));
    if !(stands_at_demand || row_proves_itself) || !version_met {
        return Verdict::Behind;
    }
    let mut held_back =
        evidence.parked.iter().filter(|parked| parked.position <= demand.position()).peekable();
    if held_back.peek().is_none() {
        return Verdict::Current;
    }
    match scope {
        crate::Scope::Row(_) => Verdict::Parked,
        crate::Scope::Everything if held_back.any(|parked| demand.names(&parked.aggregate)) => {
            Verdict::Parked
        }
        crate::Scope::Everything => Verdict::CurrentButParked,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Claim, Epoch, Scope, Token};

    fn position(value: u64) -> Position {
        Position::new(value).unwrap()
    }

    fn at(epoch: u32, value: u64) -> LogPosition {
        LogPosition::new(Epoch::new(epoch).unwrap(), position(value))
    }

    fn key(id: u8) -> AggregateKey {
        AggregateKey::from_bytes([id; 12])
    }

    fn wrote(id: u8, version: u64, at: u64) -> Token {
        let claim = Claim {
            aggregate: key(id),
            version: Version::new(version).unwrap(),
            position: position(at),
        };
        Token::new(Epoch::FIRST).with_claim(claim)
    }

    fn evidence(mark: Option<LogPosition>, version: Option<u64>, parked: &[(u8, u64)]) -> Evidence {
        Evidence {
            watermark: mark,
            row_version: version.and_then(Version::new),
            parked: parked
                .iter()
                .map(|(id, at)| Parked { aggregate: key(*id), position: position(*at) })
                .collect(),
        }
    }

    #[test]
    fn a_missing_checkpoint_is_never_current() {
        assert_eq!(
            judge(&Demand::none(), Scope::Everything, &evidence(None, None, &[])),
            Verdict::Behind
        );
        assert_eq!(watermark(None, Some(IdleProof { stored: at(1, 0), proven: at(1, 9) })), None);
    }

    #[test]
    fn an_idle_proof_needs_the_checkpoint_it_was_made_on() {
        let proof = Some(IdleProof { stored: at(1, 5), proven: at(1, 9) });
        assert_eq!(watermark(Some(at(1, 5)), proof), Some(at(1, 9)));
        assert_eq!(watermark(Some(at(1, 4)), proof), Some(at(1, 4)), "the database lost commits");
        assert_eq!(watermark(Some(at(1, 11)), proof), Some(at(1, 11)));
        assert_eq!(
            watermark(Some(at(2, 6)), proof),
            Some(at(2, 6)),
            "the proof is of an older epoch"
        );
    }

    #[test]
    fn a_row_that_holds_the_write_is_current_wherever_the_watermark_stands() {
        let scope = Scope::Row(key(1));
        let demand = Demand::of(&wrote(1, 2, 7), scope);
        assert_eq!(
            judge(&demand, scope, &evidence(Some(at(1, 3)), Some(2), &[])),
            Verdict::Current
        );
        assert_eq!(judge(&demand, scope, &evidence(Some(at(1, 3)), Some(1), &[])), Verdict::Behind);
        assert_eq!(judge(&demand, scope, &evidence(Some(at(1, 3)), None, &[])), Verdict::Behind);
    }

    #[test]
    fn a_version_of_another_epoch_proves_nothing() {
        let scope = Scope::Row(key(1));
        let token = wrote(1, 2, 7).carried_to(Epoch::new(2).unwrap());
        let demand = Demand::of(&token, scope);
        assert_eq!(judge(&demand, scope, &evidence(Some(at(1, 9)), Some(2), &[])), Verdict::Behind);
    }

    #[test]
    fn a_watermark_of_a_newer_epoch_does_not_prove_a_position_of_an_older_one() {
        let judged = |read, mark| {
            let token = Token::new(Epoch::FIRST).with_read(position(read));
            let evidence = evidence(Some(mark), None, &[]);
            judge(&Demand::of(&token, Scope::Everything), Scope::Everything, &evidence)
        };
        assert_eq!(judged(7, at(2, 0)), Verdict::Behind, "cut off, or not read yet");
        assert_eq!(judged(7, at(2, 9)), Verdict::Behind, "its position 7 may be another event");
        assert_eq!(judged(0, at(2, 0)), Verdict::Current, "nothing is asked");
        assert_eq!(judged(7, at(1, 9)), Verdict::Current);
    }

    #[test]
    fn a_parked_aggregate_is_not_current_past_its_event_even_without_a_row() {
        let scope = Scope::Row(key(1));
        let demand = Demand::of(&wrote(1, 1, 7), scope);
        assert_eq!(
            judge(&demand, scope, &evidence(Some(at(1, 9)), None, &[(1, 7)])),
            Verdict::Parked
        );
        let before = Demand::of(&Token::new(Epoch::FIRST).with_read(position(6)), scope);
        assert_eq!(
            judge(&before, scope, &evidence(Some(at(1, 9)), None, &[(1, 7)])),
            Verdict::Current
        );
    }

    #[test]
    fn a_list_is_refused_to_the_writer_of_what_is_parked_and_labelled_for_others() {
        let parked = evidence(Some(at(1, 9)), None, &[(1, 7)]);
        let judged = |token: &Token| {
            judge(&Demand::of(token, Scope::Everything), Scope::Everything, &parked)
        };
        assert_eq!(judged(&wrote(1, 1, 7)), Verdict::Parked);
        assert_eq!(judged(&wrote(2, 1, 8)), Verdict::CurrentButParked);
        assert_eq!(judged(&wrote(2, 1, 6)), Verdict::Current);
    }

    #[test]
    fn a_version_asked_for_by_hand_is_met_by_the_version_only() {
        let scope = Scope::Row(key(1));
        let demand = Demand::none().with_min_version(Version::new(2).unwrap());
        assert_eq!(judge(&demand, scope, &evidence(Some(at(1, 99)), None, &[])), Verdict::Behind);
        assert_eq!(
            judge(&demand, scope, &evidence(Some(at(1, 99)), Some(1), &[])),
            Verdict::Behind
        );
        assert_eq!(
            judge(&demand, scope, &evidence(Some(at(1, 99)), Some(2), &[])),
            Verdict::Current
        );
    }
}
