//! How events become rows, and how operators mend what failed.

use super::*;

const RIGHTFUL: usize = 0;
const SUCCESSOR: usize = 1;

fn take_over(worker: usize) -> Action {
    Action::TakeOver { region: EU, worker }
}

#[test]
fn a_worker_that_was_replaced_commits_nothing() {
    let actions = [
        write(X, A),
        arrive(EU),
        plan(EU, RIGHTFUL),
        take_over(SUCCESSOR),
        plan(EU, SUCCESSOR),
        commit(EU, SUCCESSOR, Outcome::Known),
        commit(EU, RIGHTFUL, Outcome::Known),
    ];
    let rule = Rule::CheckpointMovesUnderFence;
    needed(rule, Promise::G4, &actions);
    needed_by_chance(rule, Promise::G4, &Shape::FAULTY);
}

#[test]
fn a_commit_of_unknown_outcome_is_not_done_twice() {
    let mut actions = vec![write(X, A), arrive(EU), plan(EU, RIGHTFUL)];
    actions.push(commit(EU, RIGHTFUL, Outcome::Unknown));
    actions.push(commit(EU, RIGHTFUL, Outcome::Known));
    let rule = Rule::CheckpointMovesFromPosition;
    needed(rule, Promise::G4, &actions);
    needed_by_chance(rule, Promise::G4, &Shape::FAULTY);
}

#[test]
fn no_partition_proves_itself_idle_across_a_hole() {
    let lost = Action::Arrive { region: EU, lost: true };
    let actions = [write(X, B), lost, plan(EU, worker(B)), hear(EU), read(X, EU, What::Row(B))];
    let rule = Rule::HoleStopsEveryPartition;
    needed(rule, Promise::G1, &actions);
    needed_by_chance(rule, Promise::G1, &Shape::FAULTY);
}

#[test]
fn a_retry_leaves_no_letter_behind_that_came_meanwhile() {
    let retry = Action::Retry { region: EU, aggregate: A };
    let mut actions = vec![poison(X, A), arrive(EU)];
    actions.extend(apply(EU, A));
    actions.extend([Action::Cure { region: EU }, retry, write(X, A), arrive(EU)]);
    actions.extend(apply(EU, A));
    actions.push(retry);
    needed(Rule::RetryIsOneTransaction, Promise::G7, &actions);
}

#[test]
fn a_worker_that_remembers_what_was_parked_is_fenced_off_by_a_retry() {
    let mut actions = vec![poison(X, A), arrive(EU)];
    actions.extend(apply(EU, A));
    actions.extend([write(X, A), arrive(EU), plan(EU, RIGHTFUL), Action::Cure { region: EU }]);
    actions.push(Action::Retry { region: EU, aggregate: A });
    actions.push(commit(EU, RIGHTFUL, Outcome::Known));
    needed(Rule::RetryRaisesFence, Promise::G7, &actions);
}

/// The database falls back to before a take-over, and the operator's retry raises the fence to the
/// number that the worker who took over still holds.
#[test]
fn a_worker_whose_fence_came_back_asks_again_what_is_parked() {
    let mut actions = vec![poison(X, A), arrive(EU)];
    actions.extend(apply(EU, A));
    actions.push(take_over(SUCCESSOR));
    actions.push(Action::FailOver { region: EU, copies_back: 1 });
    actions.extend([Action::Cure { region: EU }, Action::Retry { region: EU, aggregate: A }]);
    actions.extend([write(X, A), arrive(EU), plan(EU, SUCCESSOR)]);
    actions.push(commit(EU, SUCCESSOR, Outcome::Known));
    needed(Rule::ParkedIsReadInTransaction, Promise::G7, &actions);
}

#[test]
fn a_discarded_event_counts_in_the_version() {
    let rule = Rule::DiscardAdvancesVersion;
    let mut actions = vec![poison(X, A), write(X, A), arrive(EU), arrive(EU)];
    actions.extend(apply(EU, A));
    actions.push(Action::Discard { region: EU, aggregate: A });
    needed(rule, Promise::Stuck, &actions);
    needed_by_chance(rule, Promise::Stuck, &Shape::SMALL);
}

#[test]
fn the_token_of_a_row_covers_what_was_discarded_in_it() {
    let mut actions = vec![write(Y, A), poison(Y, A)];
    for region in [EU, ASIA] {
        actions.extend([arrive(region); 2]);
        actions.extend(apply(region, A));
    }
    actions.push(Action::Discard { region: EU, aggregate: A });
    actions.extend([read(X, EU, What::Row(A)), read(X, ASIA, What::Row(A))]);
    needed(Rule::DiscardAdvancesPosition, Promise::G7, &actions);
}
