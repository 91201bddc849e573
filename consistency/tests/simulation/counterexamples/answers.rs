//! How a read is judged, and what its answer says.

use super::*;

#[test]
fn a_read_is_judged_by_its_own_snapshot() {
    let rule = Rule::SnapshotIsJudged;
    let mut actions = vec![write(X, A), arrive(EU)];
    actions.extend(apply(EU, A));
    actions.extend([hear(EU), Action::FailOver { region: EU, copies_back: 1 }]);
    actions.push(read(X, EU, What::Row(A)));
    needed(rule, Promise::G1, &actions);
    needed_by_chance(rule, Promise::G1, &Shape::FAULTY);
}

#[test]
fn an_idle_proof_is_worth_nothing_on_an_older_checkpoint() {
    let rule = Rule::ProofNamesItsCheckpoint;
    let mut actions = vec![write(X, A), write(X, B), arrive(EU), arrive(EU)];
    actions.push(Action::Plan { region: EU, worker: worker(A), event_count: 1, store: false });
    actions.push(commit(EU, worker(A), Outcome::Known));
    actions.extend([hear(EU), Action::FailOver { region: EU, copies_back: 1 }]);
    actions.push(read(X, EU, What::Row(A)));
    needed(rule, Promise::G1, &actions);
    needed_by_chance(rule, Promise::G1, &Shape::FAULTY);
}

#[test]
fn what_is_parked_is_found_without_a_row() {
    let rule = Rule::ParkedIsFoundWithoutRow;
    let mut actions = vec![poison(X, A), arrive(EU)];
    actions.extend(apply(EU, A));
    actions.push(read(X, EU, What::Row(A)));
    needed(rule, Promise::G7, &actions);
    needed_by_chance(rule, Promise::G7, &Shape::POISONED);
}

#[test]
fn a_list_that_lacks_parked_events_says_so() {
    let rule = Rule::ParkedListIsLabelled;
    let mut actions = vec![poison(Y, A), Action::Cure { region: PRIMARY }, arrive(EU)];
    actions.extend(apply(EU, A));
    actions.extend([plan(EU, worker(B)), hear(EU), hear(EU)]);
    actions.extend([read_at_primary(X, What::Row(A)), read(X, EU, What::List)]);
    needed(rule, Promise::G7, &actions);
    needed_by_chance(rule, Promise::G7, &Shape::SMALL);
}

#[test]
fn a_row_with_something_parked_reports_its_own_position() {
    let rule = Rule::ReportedPositionIsRows;
    let mut actions = vec![write(Y, A), poison(Y, A), arrive(EU), arrive(EU)];
    actions.extend(apply(EU, A));
    actions.push(read(X, EU, What::Row(A)));
    needed(rule, Promise::G7, &actions);
    needed_by_chance(rule, Promise::G7, &Shape::POISONED);
}

#[test]
fn every_partition_matters_to_a_rollup() {
    let rule = Rule::EveryPartitionMattersToRollup;
    let actions =
        [write(X, B), arrive(EU), plan(EU, worker(A)), hear(EU), read(X, EU, What::Rollup)];
    needed(rule, Promise::G1, &actions);
    needed_by_chance(rule, Promise::G1, &Shape::CALM);
}

#[test]
fn a_version_asked_for_by_hand_is_met_by_the_version_only() {
    let rule = Rule::MinVersionIsMetByVersion;
    let by_hand = Read { min_version: 1, ..asked(X, EU, What::Row(A)) };
    needed(rule, Promise::MinVersion, &[write(Y, A), Action::Read(by_hand)]);
    needed_by_chance(rule, Promise::MinVersion, &Shape::CALM);
}

#[test]
fn a_missing_checkpoint_is_not_current() {
    let rule = Rule::MissingCheckpointIsNotCurrent;
    let dropped = Action::Read(Read { dropped: true, ..asked(X, EU, What::Row(A)) });
    needed(rule, Promise::G1, &[write(X, A), dropped]);
    needed_by_chance(rule, Promise::G1, &Shape::CALM);
}

#[test]
fn a_version_is_dropped_together_with_its_checkpoints() {
    let rule = Rule::DropTakesCheckpointsAlong;
    let dropped = Action::Read(Read { dropped: true, ..asked(X, EU, What::Row(A)) });
    let mut actions = vec![write(X, A), arrive(EU)];
    actions.extend(apply(EU, A));
    actions.push(dropped);
    needed(rule, Promise::G1, &actions);
    needed_by_chance(rule, Promise::G1, &Shape::CALM);
}

#[test]
fn a_forwarded_list_is_judged_at_the_primary_like_any_other() {
    let rule = Rule::ForwardedListIsJudged;
    let wish = Wish::Shipped;
    let forwarded = Read { wish, alone: false, ..asked(X, EU, What::List) };
    needed(rule, Promise::G1, &[write(X, A), Action::Read(forwarded)]);
    needed_by_chance(rule, Promise::G1, &Shape::CALM);
}

#[test]
fn a_later_page_is_not_older_than_the_one_before() {
    let rule = Rule::CursorCarriesPosition;
    let mut actions = vec![write(Y, A), arrive(EU)];
    actions.extend(apply(EU, A));
    actions.extend([plan(EU, worker(B)), hear(EU), hear(EU)]);
    actions.push(Action::Turn { caller: X, region: EU, list: 0 });
    actions.push(Action::Turn { caller: X, region: ASIA, list: 0 });
    needed(rule, Promise::G2, &actions);
    needed_by_chance(rule, Promise::G2, &Shape::CALM);
}

#[test]
fn a_row_that_stays_in_a_list_is_on_one_of_its_pages() {
    let rule = Rule::SortKeyNeverChanges;
    let mut actions = vec![write(Y, A), write(Y, C), arrive(EU), arrive(EU)];
    actions.extend(apply(EU, A));
    actions.extend([plan(EU, worker(B)), hear(EU), hear(EU)]);
    actions.push(Action::Turn { caller: X, region: EU, list: 0 });
    actions.extend([write(Y, A), arrive(EU)]);
    actions.extend(apply(EU, A));
    actions.extend([Action::Turn { caller: X, region: EU, list: 0 }; 3]);
    needed(rule, Promise::Pages, &actions);
    needed_by_chance(rule, Promise::Pages, &Shape::CALM);
}

/// Not a promise that breaks, but one that is not made: without a token a list may show an effect
/// and not its cause. Its token then asks for the cause.
#[test]
fn one_list_is_no_causal_cut_but_the_next_answer_has_the_cause() {
    let mut actions = vec![write(Y, A), write(Y, B), arrive(EU), arrive(EU)];
    actions.extend(apply(EU, B));
    actions.push(read(X, EU, What::List));
    let seen = run(Rules::all(), &actions).unwrap();
    let list = seen.regions[EU].projector.database.documents;
    assert_eq!((list[A].version, list[B].version), (0, 1), "the list shows B without A");
    assert_eq!(seen.tally.current, 1);
    actions.push(read(X, EU, What::List));
    assert_eq!(run(Rules::all(), &actions).unwrap().tally.unanswered, 1);
    actions.extend(apply(EU, A));
    actions.push(read(X, EU, What::List));
    assert_eq!(run(Rules::all(), &actions).unwrap().tally.current, 2);
}
