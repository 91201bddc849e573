//! What runs of events change: rows that are written, rows that go, and where a run stops.

use std::collections::BTreeMap;

use consistency::{Event, Version};
use projection::{
    Applied, Document, Fold, FoldError, Folded, LIST_KEY_BYTES_MAX, Projection, ProjectionError,
    ROW_COUNT_MAX, ROWS_BYTES_MAX, Row, RowKey, Rows, STATE_BYTES_MAX, Stop, StoredState,
};
use proptest::prelude::*;
use serde_json::json;

use crate::notes::{Note, NoteEvent, Notes, at, event, note, notes, position};

const ADA: &str = r#"{"owner":"ada"}"#;
const BOB: &str = r#"{"owner":"bob"}"#;

/// Events of `n-1` from version `first`, each at ten times its version.
fn events(first: u64, kinds: &[(&str, &str)]) -> Vec<Event> {
    let versions = first..;
    let numbered = versions.zip(kinds);
    numbered
        .map(|(version, (kind, data))| event(&note("n-1"), version, version * 10, kind, data))
        .collect()
}

fn apply(before: StoredState, events: &[Event]) -> Applied {
    let definition = notes();
    let events: Vec<&Event> = events.iter().collect();
    definition.document().unwrap().apply(&note("n-1"), before, &events)
}

fn after(kinds: &[(&str, &str)]) -> StoredState {
    let applied = apply(StoredState::NOTHING, &events(1, kinds));
    assert!(applied.stop.is_none(), "{:?}", applied.stop);
    applied.after
}

fn written(applied: &Applied) -> Vec<(usize, Option<&str>)> {
    applied.upserts.iter().map(|row| (row.key.view_index(), row.key.list_key())).collect()
}

fn deleted(applied: &Applied) -> Vec<(usize, Option<&str>)> {
    applied.deletes.iter().map(|key| (key.view_index(), key.list_key())).collect()
}

#[test]
fn the_first_event_writes_every_row() {
    let applied = apply(StoredState::NOTHING, &events(1, &[("Written", ADA)]));
    assert_eq!(written(&applied), [(0, None), (1, Some("ada"))]);
    assert!(applied.deletes.is_empty());
    assert_eq!((applied.after.version(), applied.after.at()), (Version::new(1).unwrap(), at(10)));
}

#[test]
fn an_item_that_stays_as_it_was_is_not_written_but_the_row_carries_its_version() {
    let applied = apply(after(&[("Written", ADA)]), &events(2, &[("Written", ADA)]));
    assert_eq!(written(&applied), [(0, None)]);
    assert!(applied.deletes.is_empty());
}

#[test]
fn an_item_that_moves_is_deleted_where_it_was() {
    let applied = apply(after(&[("Written", ADA)]), &events(2, &[("Given", BOB)]));
    assert_eq!(written(&applied), [(0, None), (1, Some("bob"))]);
    assert_eq!(deleted(&applied), [(1, Some("ada"))]);
    assert_eq!(applied.after.created(), position(10));
}

#[test]
fn an_item_that_moves_there_and_back_in_one_batch_nets_to_nothing() {
    let applied = apply(after(&[("Written", ADA)]), &events(2, &[("Given", BOB), ("Given", ADA)]));
    assert_eq!(written(&applied), [(0, None)]);
    assert!(applied.deletes.is_empty());
}

#[test]
fn an_aggregate_without_state_has_no_rows_and_keeps_its_version() {
    let applied =
        apply(after(&[("Written", ADA), ("Pinned", "{}")]), &events(3, &[("Torn", "{}")]));
    assert!(applied.upserts.is_empty());
    assert_eq!(deleted(&applied), [(0, None), (1, Some("ada")), (2, Some("all"))]);
    assert_eq!((applied.after.version().get(), applied.after.state()), (3, None));
    let again = apply(applied.after, &events(4, &[("Written", BOB)]));
    assert_eq!(again.after.created(), position(10), "its place in lists is that of its birth");
}

#[test]
fn events_that_are_in_the_state_already_change_nothing() {
    let before = after(&[("Written", ADA), ("Pinned", "{}")]);
    let applied = apply(before.clone(), &events(1, &[("Written", ADA), ("Pinned", "{}")]));
    assert_eq!((applied.consumed, &applied.after), (2, &before));
    assert!(applied.stop.is_none() && applied.upserts.is_empty() && applied.deletes.is_empty());
    let applied = apply(before, &events(2, &[("Pinned", "{}"), ("Given", BOB)]));
    assert_eq!((applied.consumed, applied.after.version().get()), (2, 3));
}

#[test]
fn a_gap_stops_the_run_where_it_is() {
    let mut given = events(1, &[("Written", ADA), ("Pinned", "{}"), ("Given", BOB)]);
    given.remove(1);
    let applied = apply(StoredState::NOTHING, &given);
    assert_eq!((applied.consumed, applied.after.version().get()), (1, 1));
    let Some(Stop::Gap { state, event }) = applied.stop else { panic!("a gap") };
    assert_eq!((state.get(), event.get()), (1, 3));
    assert_eq!(written(&apply(StoredState::NOTHING, &given)), [(0, None), (1, Some("ada"))]);
}

#[test]
fn poison_stops_the_run_and_keeps_what_came_before_it() {
    let poisons = [
        (("Cursed", "{}"), "fold"),
        (("Burning", "{}"), "panic"),
        (("Given", "{}"), "decode"),
        (("Given", r#"{"owner":"bob"} trailing"#), "decode"),
        (("Given", "not json"), "decode"),
        (("Unheard", "{}"), "unknown-event-type"),
    ];
    for (poison, kind) in poisons {
        let kinds = [("Written", ADA), ("Pinned", "{}"), poison, ("Given", BOB)];
        let applied = apply(StoredState::NOTHING, &events(1, &kinds));
        let Some(Stop::Poison(error)) = &applied.stop else { panic!("{poison:?} is poison") };
        assert_eq!(error.kind(), kind, "{poison:?}");
        assert_eq!(applied.consumed, 2, "{poison:?}");
        let healthy = after(&kinds[..2]);
        assert_eq!(applied.after, healthy, "{poison:?}");
        assert_eq!(written(&applied), [(0, None), (1, Some("ada")), (2, Some("all"))]);
        let later = apply(after(&kinds[..1]), &events(2, &kinds[1..]));
        assert_eq!((later.consumed, &later.after), (1, &healthy), "{poison:?}");
        assert_eq!(written(&later), [(0, None), (2, Some("all"))]);
    }
}

#[test]
fn an_event_whose_rows_are_unusable_is_poison_unless_a_later_one_of_the_run_mends_them() {
    let long = format!(r#"{{"owner":"{}"}}"#, "x".repeat(LIST_KEY_BYTES_MAX + 1));
    for bad in [("Nameless", "{}"), ("Given", long.as_str())] {
        let kinds = [("Written", ADA), ("Pinned", "{}"), bad, ("Pinned", "{}"), ("Given", BOB)];
        let applied = apply(StoredState::NOTHING, &events(1, &kinds[..4]));
        let Some(Stop::Poison(error)) = &applied.stop else { panic!("{bad:?} is poison") };
        assert_eq!((error.kind(), applied.consumed), ("row", 2));
        assert_eq!(applied.after, after(&kinds[..2]));
        let mended = apply(StoredState::NOTHING, &events(1, &kinds));
        assert!(mended.stop.is_none());
        assert_eq!(written(&mended), [(0, None), (1, Some("bob")), (2, Some("all"))]);
    }
}

#[test]
fn a_poison_first_event_leaves_nothing() {
    let applied = apply(StoredState::NOTHING, &events(1, &[("Cursed", "{}"), ("Written", ADA)]));
    assert_eq!((applied.consumed, &applied.after), (0, &StoredState::NOTHING));
    assert!(matches!(applied.stop, Some(Stop::Poison(ProjectionError::Fold(_)))));
}

#[test]
fn a_stored_state_of_another_shape_is_poison() {
    let columns = ("n-1".to_owned(), 1, 1, 10, 10, Some(r#"{"title":1}"#.to_owned()));
    let (_, before) = StoredState::from_columns(columns).unwrap();
    let applied = apply(before.clone(), &events(2, &[("Pinned", "{}")]));
    let Some(Stop::Poison(error)) = &applied.stop else { panic!("poison") };
    assert_eq!((error.kind(), &applied.after), ("state", &before));
}

#[test]
fn a_fold_from_the_log_gives_the_row_that_the_table_holds() {
    let definition = notes();
    let document = definition.document().unwrap();
    let history = events(1, &[("Written", ADA), ("Given", BOB), ("Pinned", "{}")]);
    let folded = history
        .iter()
        .try_fold(Folded::nothing(), |folded, event| document.fold(folded, event))
        .unwrap();
    assert_eq!((folded.version().get(), folded.at(), folded.created()), (3, at(30), position(10)));
    let view = definition.views()[0].name();
    let row = document.row(&note("n-1"), &folded, view).unwrap();
    assert_eq!(row.as_deref(), Some(r#"{"owner":"bob","pinned":true}"#));
    let skipped = document.fold(Folded::nothing(), &history[1]).unwrap_err();
    assert_eq!(skipped.kind(), "fold", "a fold from the log lets no event be left out");
}

type Table = BTreeMap<RowKey, String>;

fn write(table: &mut Table, applied: &Applied) {
    for key in &applied.deletes {
        assert!(table.remove(key).is_some(), "only what is there is deleted");
    }
    for Row { key, data } in &applied.upserts {
        table.insert(key.clone(), data.clone());
    }
}

fn any_kind() -> impl Strategy<Value = (&'static str, &'static str)> {
    prop_oneof![
        4 => Just(("Given", ADA)),
        4 => Just(("Given", BOB)),
        2 => Just(("Written", ADA)),
        3 => Just(("Pinned", "{}")),
        2 => Just(("Torn", "{}")),
        1 => Just(("Cursed", "{}")),
    ]
}

proptest! {
    /// Differences, applied batch after batch, however the events are cut into batches and however
    /// often some are delivered again, leave the rows of the final state and nothing else.
    #[test]
    fn differences_add_up_to_the_rows_of_the_final_state(
        kinds in prop::collection::vec(any_kind(), 1..40),
        cuts in prop::collection::vec((0_usize..6, 0_usize..4), 1..40),
    ) {
        let history = events(1, &kinds);
        let cursed = kinds.iter().position(|(kind, _)| *kind == "Cursed");
        let healthy = cursed.unwrap_or(kinds.len());

        let mut table = Table::new();
        let mut state = StoredState::NOTHING;
        let mut next = 0;
        for (take, again) in cuts {
            let from = next - again.min(next);
            let batch = &history[from..(next + take).min(history.len())];
            let applied = apply(state, batch);
            write(&mut table, &applied);
            next = from + applied.consumed;
            state = applied.after;
            if applied.stop.is_some() {
                prop_assert_eq!(next, healthy);
            }
        }
        let expected = apply(StoredState::NOTHING, &history[..next]);
        prop_assert_eq!(&expected.after, &state);
        let rows: Table = expected.upserts.into_iter().map(|row| (row.key, row.data)).collect();
        prop_assert_eq!(rows, table);
    }
}

/// Makes rows as its events' owners say.
struct Careless;

impl Fold for Careless {
    type State = Note;
    type Event = NoteEvent;

    fn fold(
        &self,
        state: Option<Note>,
        event: NoteEvent,
        envelope: &Event,
    ) -> Result<Option<Note>, FoldError> {
        Notes.fold(state, event, envelope)
    }
}

impl Document for Careless {
    fn rows(&self, note: &Note, rows: &mut Rows<'_>) {
        match note.owner.as_str() {
            "twice" => (0..2).for_each(|_| rows.item("list", "all", note)),
            "elsewhere" => rows.row("nowhere", note),
            "of another kind" => rows.row("list", note),
            "with a zero" => rows.item("list", "a\0b", note),
            "large" => rows.item("list", "all", &"x".repeat(ROWS_BYTES_MAX)),
            "many" => (0..=ROW_COUNT_MAX).for_each(|at| rows.item("list", at.to_string(), note)),
            _ => (0..ROW_COUNT_MAX).for_each(|at| rows.item("list", at.to_string(), note)),
        }
    }
}

#[test]
fn rows_keep_to_their_views_and_bounds() {
    let careless = Projection::document("careless", 1, "note", Careless).list("list");
    let definition = careless.build().unwrap();
    let apply = |owner: &str| {
        let data = json!({ "owner": owner }).to_string();
        let written = event(&note("n-1"), 1, 10, "Written", &data);
        let document = definition.document().unwrap();
        let applied = document.apply(&note("n-1"), StoredState::NOTHING, &[&written]);
        applied.stop.map(|stop| match stop {
            Stop::Poison(error) => error.kind(),
            Stop::Gap { .. } => panic!("there is no gap"),
        })
    };
    for owner in ["twice", "elsewhere", "of another kind", "with a zero", "large", "many"] {
        assert_eq!(apply(owner), Some("row"), "{owner}");
    }
    assert_eq!(apply("careful"), None);
    assert_eq!(apply(&"x".repeat(STATE_BYTES_MAX)), Some("state"));
}
