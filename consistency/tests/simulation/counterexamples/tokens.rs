//! What a token holds, and what it asks.

use super::*;

#[test]
fn a_claim_made_before_something_newer_was_read_does_not_prove_a_row() {
    let rule = Rule::ShortcutOnlyWhenNothingNewerWasRead;
    let mut actions =
        vec![write(X, A), write(Y, A), write(Y, B), arrive(EU), arrive(EU), arrive(EU)];
    actions.extend(apply(EU, B));
    actions.push(Action::Plan { region: EU, worker: worker(A), event_count: 1, store: false });
    actions.push(commit(EU, worker(A), Outcome::Known));
    actions.extend([read(X, EU, What::Row(B)), read(X, EU, What::Row(A))]);
    needed(rule, Promise::G2, &actions);
    needed_by_chance(rule, Promise::G2, &Shape::CALM);
}

#[test]
fn claims_of_merged_tokens_do_not_hide_a_write_that_a_read_has_covered() {
    let rule = Rule::ShortcutOnlyWhenNothingNewerWasRead;
    let mut actions = vec![write(X, A), write(Y, A), Action::Share { from: X, to: Z }];
    actions.extend([read_at_primary(Z, What::Row(A)), arrive(EU)]);
    actions.extend(apply(EU, A));
    actions.push(read(Z, EU, What::Row(A)));
    needed(rule, Promise::G2, &actions);
}

#[test]
fn a_row_owes_what_was_read_and_not_only_its_claim() {
    let rule = Rule::RowOwesWhatWasRead;
    let mut actions = vec![write(X, A), write(Y, A), write(X, B)];
    for region in [EU, ASIA] {
        actions.push(arrive(region));
    }
    actions.extend(apply(ASIA, A));
    actions.push(arrive(EU));
    actions.extend(apply(EU, A));
    actions.extend([read(X, EU, What::Row(A)), read(X, ASIA, What::Row(A))]);
    needed(rule, Promise::G2, &actions);
    needed_by_chance(rule, Promise::G2, &Shape::CALM);
}

#[test]
fn a_fifth_write_does_not_forget_the_first() {
    let rule = Rule::DroppedClaimRaisesReadPosition;
    let mut actions: Vec<Action> = (0..5).map(|aggregate| write(X, aggregate)).collect();
    actions.push(read(X, EU, What::Row(A)));
    needed(rule, Promise::G1, &actions);
    needed_by_chance(rule, Promise::G1, &Shape::EVERYTHING);
}

#[test]
fn a_fifth_write_does_not_forget_that_the_first_may_be_parked() {
    let rule = Rule::DroppedClaimsAreRemembered;
    let mut actions = vec![poison(X, A)];
    actions.extend((1..6).map(|aggregate| write(X, aggregate)));
    actions.extend([arrive(EU); 6]);
    for aggregate in [A, B] {
        actions.extend(apply(EU, aggregate));
    }
    actions.push(read(X, EU, What::List));
    needed(rule, Promise::G7, &actions);
}

#[test]
fn the_token_of_a_list_covers_its_newest_partition() {
    let rule = Rule::ListTokenIsLargestCheckpoint;
    let mut actions = vec![write(Y, A), write(Y, B), arrive(EU), arrive(EU)];
    actions.extend(apply(EU, B));
    actions.extend([read(X, EU, What::List), read(X, ASIA, What::Row(B))]);
    needed(rule, Promise::G2, &actions);
    needed_by_chance(rule, Promise::G2, &Shape::CALM);
}

#[test]
fn the_token_of_a_rollup_covers_all_that_was_summed() {
    let rule = Rule::RollupTokenIsLargestCheckpoint;
    let mut actions = vec![write(Y, A), write(Y, B), arrive(EU), arrive(EU)];
    actions.extend(apply(EU, B));
    actions.extend(apply(EU, A));
    actions.extend([arrive(ASIA)]);
    actions.extend(apply(ASIA, A));
    actions.extend([plan(ASIA, worker(B)), hear(ASIA), hear(ASIA)]);
    actions.extend([read(X, EU, What::Rollup), read(X, ASIA, What::Rollup)]);
    needed(rule, Promise::G2, &actions);
    needed_by_chance(rule, Promise::G2, &Shape::EVERYTHING);
}

#[test]
fn the_404_of_a_fold_carries_the_position_of_the_deletion() {
    let rule = Rule::FoldTokenIsLogPosition;
    let mut actions = vec![write(Y, A), delete(Y, A), arrive(EU)];
    actions.extend(apply(EU, A));
    actions.extend([read_at_primary(X, What::Row(A)), read(X, EU, What::Row(A))]);
    needed(rule, Promise::G2, &actions);
    needed_by_chance(rule, Promise::G2, &Shape::CALM);
}

#[test]
fn an_error_that_shows_a_version_carries_its_position() {
    let rule = Rule::ErrorCarriesWhatItShows;
    let conflict = Action::Conflict { caller: X, aggregate: A };
    needed(rule, Promise::G2, &[write(Y, A), conflict, read(X, EU, What::Row(A))]);
    needed_by_chance(rule, Promise::G2, &Shape::CALM);
}

#[test]
fn a_repeated_write_does_not_replace_what_was_learned_since() {
    let rule = Rule::AnswerMergesWhatWasSent;
    let mut actions = vec![write(X, A), write(X, A), arrive(EU)];
    actions.extend(apply(EU, A));
    actions.extend([Action::Repeat { caller: X, write: 0 }, read(X, EU, What::Row(A))]);
    needed(rule, Promise::G1, &actions);
    needed_by_chance(rule, Promise::G1, &Shape::CALM);
}

#[test]
fn a_write_does_not_replace_what_was_read_before_it() {
    let mut actions = vec![write(Y, A), arrive(EU)];
    actions.extend(apply(EU, A));
    actions.extend([read(X, EU, What::Row(A)), write(X, B), read(X, ASIA, What::Row(A))]);
    needed(Rule::AnswerMergesWhatWasSent, Promise::G2, &actions);
}

#[test]
fn answers_that_cross_are_merged_and_not_replaced() {
    let rule = Rule::ParallelAnswersAreMerged;
    let change = Change::Into(0);
    let late = Action::Write { caller: X, aggregate: B, change, poison: false, late: true };
    let arrives = Action::Acknowledge { caller: X, index: 0 };
    needed(rule, Promise::G1, &[late, write(X, A), arrives, read(X, EU, What::Row(A))]);
    needed_by_chance(rule, Promise::G1, &Shape::CALM);
}
