//! The rules that the world obeys, each of which a test can take away.

/// One rule of the protocol. Taking one away puts the naive variant in its place, in this world only:
/// the crate under test has no switches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// A row may prove itself by its version only when nothing was read after the claim was made.
    ShortcutOnlyWhenNothingNewerWasRead,
    /// The demand on a row includes the newest thing read, not only the claim on it.
    RowOwesWhatWasRead,
    /// A claim that falls out of a token raises its read position.
    DroppedClaimRaisesReadPosition,
    /// An announcement names every key that any event of its range touched.
    AnnouncementNamesEveryKey,
    /// An announcement names the aggregates that were parked.
    AnnouncementNamesParked,
    /// An answer with something parked in it is not kept in memory.
    ParkedAnswerIsNotKept,
    /// A chain that is moved by a poll or a gap first raises the floor.
    JumpRaisesFloor,
    /// The token of a list is the largest stored checkpoint of its snapshot.
    ListTokenIsLargestCheckpoint,
    /// What is parked is looked up by aggregate, whether or not there is a row.
    ParkedIsFoundWithoutRow,
    /// Who dropped claims is refused a list while anything is parked.
    DroppedClaimsAreRemembered,
    /// Every partition matters to a rollup.
    EveryPartitionMattersToRollup,
    /// The token of a rollup covers everything that was summed.
    RollupTokenIsLargestCheckpoint,
    /// No partition's checkpoint or proof passes a hole.
    HoleStopsEveryPartition,
    /// A version asked for by hand is met by the version only.
    MinVersionIsMetByVersion,
    /// A fold's token is the aggregate's last position in the log, or the head read.
    FoldTokenIsLogPosition,
    /// An error that shows state carries that state's position.
    ErrorCarriesWhatItShows,
    /// Every answer's token is the merge of what was sent and what the answer shows.
    AnswerMergesWhatWasSent,
    /// The checkpoint moves by an update that names fence and position.
    CheckpointMovesUnderFence,
    /// The checkpoint moves from the position that the batch began at.
    CheckpointMovesFromPosition,
    /// A retry of dead letters is one transaction that locks the checkpoint.
    RetryIsOneTransaction,
    /// A retry raises the fence, so that a worker that remembers the parked set must read it again.
    RetryRaisesFence,
    /// A batch asks in its own transaction what is parked. A fence is not enough: it goes back with
    /// the database, and the next one who raises it gives an old number to somebody else.
    ParkedIsReadInTransaction,
    /// A missing checkpoint is not current.
    MissingCheckpointIsNotCurrent,
    /// A version is dropped together with its checkpoints.
    DropTakesCheckpointsAlong,
    /// A list that lacks a parked aggregate's events says so.
    ParkedListIsLabelled,
    /// A cursor carries the position of its page.
    CursorCarriesPosition,
    /// Lists are sorted by what never changes.
    SortKeyNeverChanges,
    /// A caller with requests in parallel keeps all the tokens it was given.
    ParallelAnswersAreMerged,
    /// The primary judges a forwarded list like any other.
    ForwardedListIsJudged,
    /// Discarding an event advances the aggregate's version.
    DiscardAdvancesVersion,
    /// And its position, else the token of a row that shows the new version does not cover it.
    DiscardAdvancesPosition,
    /// The position reported of a row is the row's own.
    ReportedPositionIsRows,
    /// A read is judged again by its own snapshot.
    SnapshotIsJudged,
    /// An idle proof counts only on the checkpoint that it extends.
    ProofNamesItsCheckpoint,
}

/// All rules but one, or all.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    removed: Option<Rule>,
}

impl Rules {
    pub fn all() -> Self {
        Self { removed: None }
    }

    pub fn without(rule: Rule) -> Self {
        Self { removed: Some(rule) }
    }

    pub fn hold(self, rule: Rule) -> bool {
        self.removed != Some(rule)
    }
}
