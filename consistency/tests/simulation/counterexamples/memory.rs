//! Rows kept in memory. `tests/memory.rs` searches the same rules exhaustively, each store and load
//! of writer and reader apart.

use super::*;

#[test]
fn an_announcement_names_keys_that_its_batch_nets_to_nothing() {
    let rule = Rule::AnnouncementNamesEveryKey;
    let mut actions = vec![write(X, A), delete(X, A), arrive(EU)];
    actions.extend(apply(EU, A));
    actions.push(hear(EU));
    actions.push(Action::Read(Read { late: true, ..asked(Y, EU, What::Row(A)) }));
    actions.push(Action::FailOver { region: EU, copies_back: 1 });
    actions.push(Action::TakeOver { region: EU, worker: worker(A) });
    actions.push(arrive(EU));
    actions.extend(apply(EU, A));
    actions.extend([hear(EU), Action::InsertLate { region: EU, index: 0 }]);
    actions.push(read(X, EU, What::Row(A)));
    needed(rule, Promise::G1, &actions);
    needed_by_chance(rule, Promise::G1, &Shape::EVERYTHING);
}

#[test]
fn an_announcement_names_what_its_batch_parked() {
    let rule = Rule::AnnouncementNamesParked;
    let mut actions = vec![read(Y, EU, What::Row(A)), poison(X, A), arrive(EU)];
    actions.extend(apply(EU, A));
    actions.extend([hear(EU), read(X, EU, What::Row(A))]);
    needed(rule, Promise::G1, &actions);
    needed_by_chance(rule, Promise::G1, &Shape::EVERYTHING);
}

#[test]
fn an_answer_with_something_parked_is_not_kept() {
    let rule = Rule::ParkedAnswerIsNotKept;
    let mut actions = vec![write(X, A), poison(X, A), arrive(EU), arrive(EU)];
    actions.extend(apply(EU, A));
    actions.extend([hear(EU), read(Y, EU, What::Row(A)), read(X, EU, What::Row(A))]);
    needed(rule, Promise::G7, &actions);
    needed_by_chance(rule, Promise::G7, &Shape::EVERYTHING);
}

#[test]
fn a_chain_that_a_poll_moves_raises_the_floor_first() {
    let rule = Rule::JumpRaisesFloor;
    let mut actions = vec![read(Y, EU, What::Row(A)), write(X, A), arrive(EU)];
    actions.extend(apply(EU, A));
    actions.push(Action::LoseHint { region: EU, index: 0 });
    actions.extend([Action::Poll { region: EU }, read(X, EU, What::Row(A))]);
    needed(rule, Promise::G1, &actions);
    needed_by_chance(rule, Promise::G1, &Shape::SMALL);
}
