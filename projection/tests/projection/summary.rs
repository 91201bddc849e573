//! What states add to rows that many aggregates share.

use std::collections::BTreeMap;

use projection::{
    Counted, Deltas, Projection, ProjectionKind, RollupDefinition, StoredState, Summary,
};

use crate::notes::{Note, Notes, event, note};

/// Notes by owner, and the longest name that ever owned one.
impl Summary for Notes {
    fn deltas(&self, note: &Note, deltas: &mut Deltas<'_>) {
        deltas.add(note.owner.as_str(), "held", 1);
        if note.pinned {
            deltas.add(note.owner.as_str(), "pinned", 1);
        }
        deltas.add("all", "longest", i64::try_from(note.owner.len()).unwrap());
    }
}

fn holders() -> RollupDefinition {
    let definition = Projection::summary("holders", 1, "note", "notes-held", Notes)
        .sum("held")
        .sum("pinned")
        .max("longest")
        .build()
        .unwrap();
    match definition.kind() {
        ProjectionKind::Rollup(rollup) => rollup.clone(),
        ProjectionKind::Document(_) | ProjectionKind::Custom(_) => panic!("a rollup"),
    }
}

/// Counts events `(version, type, data)` of one note.
fn count(before: &StoredState, events: &[(u64, &str, &str)]) -> Counted {
    let id = note("n-1");
    let events: Vec<_> = (events.iter())
        .map(|(version, kind, data)| event(&id, *version, *version + 10, kind, data))
        .collect();
    holders().count(before, &events.iter().collect::<Vec<_>>())
}

type Values = BTreeMap<String, Vec<Option<i64>>>;

fn added(counted: &Counted) -> Vec<(i64, String, Vec<Option<i64>>)> {
    let deltas = counted.deltas.iter();
    deltas
        .map(|(at, delta)| (at.position.as_i64(), delta.key.clone(), delta.values.clone()))
        .collect()
}

#[test]
fn an_event_adds_what_its_state_adds_more_than_the_one_before() {
    let events = [
        (1, "Written", r#"{"owner":"ada"}"#),
        (2, "Pinned", "{}"),
        (3, "Given", r#"{"owner":"bo"}"#),
        (4, "Torn", "{}"),
    ];
    let counted = count(&StoredState::NOTHING, &events);
    assert!(counted.error.is_none(), "{:?}", counted.error);
    let expected = [
        (11, "ada", vec![Some(1), None, None]),
        (11, "all", vec![None, None, Some(3)]),
        (12, "ada", vec![None, Some(1), None]),
        (13, "ada", vec![Some(-1), Some(-1), None]),
        (13, "all", vec![None, None, Some(2)]),
        (13, "bo", vec![Some(1), Some(1), None]),
        (14, "bo", vec![Some(-1), Some(-1), None]),
    ];
    let expected = expected.map(|(at, key, values)| (at, key.to_owned(), values));
    assert_eq!(added(&counted), expected);
    assert_eq!((counted.consumed, counted.state), (4, None), "nothing is left of it");
}

#[test]
fn a_batch_that_fails_adds_what_came_before_the_failure() {
    for (poison, data, kind) in
        [("Cursed", "{}", "fold"), ("Burning", "{}", "panic"), ("Nameless", "{}", "row")]
    {
        let written = (1, "Written", r#"{"owner":"ada"}"#);
        let counted =
            count(&StoredState::NOTHING, &[written, (2, poison, data), (3, "Torn", "{}")]);
        assert_eq!(counted.error.as_ref().map(|error| error.kind()), Some(kind));
        assert_eq!((counted.consumed, added(&counted).len()), (1, 2), "{poison}");
        assert_eq!(counted.state.as_deref(), Some(r#"{"owner":"ada","pinned":false}"#));
    }
}

#[test]
fn batches_of_any_size_add_up_to_the_same() {
    let events = [
        (1, "Written", r#"{"owner":"ada"}"#),
        (2, "Given", r#"{"owner":"bo"}"#),
        (3, "Pinned", "{}"),
        (4, "Given", r#"{"owner":"ada"}"#),
    ];
    let totals = |size: usize| {
        let mut totals = Values::new();
        let mut before = StoredState::NOTHING;
        for batch in events.chunks(size) {
            let counted = count(&before, batch);
            assert!(counted.error.is_none(), "{:?}", counted.error);
            for (_, key, values) in added(&counted) {
                let row = totals.entry(key).or_insert_with(|| vec![None; 3]);
                for (at, value) in values.into_iter().enumerate() {
                    let Some(value) = value else { continue };
                    let held = row[at].unwrap_or_default();
                    row[at] = Some(if at == 2 { held.max(value) } else { held + value });
                }
            }
            let version = batch.last().map_or(0, |(version, _, _)| *version).cast_signed();
            let columns = ("n-1".to_owned(), version, 1, version + 10, 11, counted.state);
            before = StoredState::from_columns(columns).unwrap().1;
        }
        totals
    };
    let at_once = totals(4);
    assert_eq!(at_once["ada"], [Some(1), Some(1), None]);
    assert_eq!(at_once["bo"], [Some(0), Some(0), None]);
    assert_eq!(at_once["all"], [None, None, Some(3)]);
    assert_eq!(totals(1), at_once);
    assert_eq!(totals(3), at_once);
}
