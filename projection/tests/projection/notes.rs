//! A small domain: notes that people own, give away, pin and tear up.

use consistency::{
    AggregateId, CommittedAt, Epoch, Event, EventId, LogPosition, Name, Position, SchemaVersion,
    Version,
};
use projection::{
    Deltas, Document, Fold, FoldError, Projection, ProjectionDefinition, Rollup, Rows,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use uuid::Uuid;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Note {
    pub owner: String,
    pub pinned: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum NoteEvent {
    Written {
        owner: String,
    },
    Given {
        owner: String,
    },
    Pinned,
    Torn,
    /// A fold refuses it.
    Cursed,
    /// A fold panics on it.
    Burning,
    /// Its rows are at fault, not its fold.
    Nameless,
}

pub struct Notes;

impl Fold for Notes {
    type State = Note;
    type Event = NoteEvent;

    fn fold(
        &self,
        state: Option<Note>,
        event: NoteEvent,
        _: &Event,
    ) -> Result<Option<Note>, FoldError> {
        Ok(match (state, event) {
            (None, NoteEvent::Written { owner } | NoteEvent::Given { owner }) => {
                Some(Note { owner, pinned: false })
            }
            (Some(note), NoteEvent::Written { owner } | NoteEvent::Given { owner }) => {
                Some(Note { owner, ..note })
            }
            (note, NoteEvent::Pinned) => note.map(|note| Note { pinned: true, ..note }),
            (note, NoteEvent::Nameless) => note.map(|note| Note { owner: String::new(), ..note }),
            (_, NoteEvent::Torn) => None,
            (_, NoteEvent::Cursed) => return Err(FoldError::new("cursed")),
            (_, NoteEvent::Burning) => panic!("burning"),
        })
    }
}

impl Document for Notes {
    fn rows(&self, note: &Note, rows: &mut Rows<'_>) {
        rows.row("note", note);
        rows.item("notes-by-owner", &note.owner, &json!({ "owner": note.owner }));
        if note.pinned {
            rows.item("pinned", "all", &json!({ "owner": note.owner }));
        }
    }
}

pub fn notes_of(version: u32) -> ProjectionDefinition {
    declared(version).build().unwrap()
}

pub fn declared(version: u32) -> Projection {
    Projection::document("notes", version, "note", Notes)
        .row("note")
        .list("notes-by-owner")
        .list("pinned")
        .partitions(2)
}

pub fn notes() -> ProjectionDefinition {
    notes_of(1)
}

#[derive(Deserialize)]
pub enum Counted {
    Written {
        owner: String,
        length: i64,
    },
    #[serde(other)]
    Other,
}

pub struct NoteCount;

impl Rollup for NoteCount {
    type Event = Counted;

    fn deltas(&self, event: Counted, _: &Event, deltas: &mut Deltas<'_>) -> Result<(), FoldError> {
        match event {
            Counted::Written { owner, length } => {
                deltas.add(owner.as_str(), "written", 1);
                deltas.add(owner, "longest", length);
            }
            Counted::Other => {}
        }
        Ok(())
    }
}

pub fn note_count() -> ProjectionDefinition {
    Projection::rollup("note-count", 1, "note", "notes-written", NoteCount)
        .sum("written")
        .max("longest")
        .sum("never")
        .partitions(2)
        .build()
        .unwrap()
}

pub fn note(id: &str) -> AggregateId {
    AggregateId::new(Name::new("note").unwrap(), id).unwrap()
}

pub fn position(position: i64) -> Position {
    Position::from_i64(position).unwrap()
}

pub fn at(position: i64) -> LogPosition {
    epoch_at(1, position)
}

pub fn epoch_at(epoch: u32, position: i64) -> LogPosition {
    LogPosition::new(Epoch::new(epoch).unwrap(), self::position(position))
}

pub fn event(aggregate: &AggregateId, version: u64, at: u64, kind: &str, data: &str) -> Event {
    Event {
        at: LogPosition::new(Epoch::FIRST, Position::new(at).unwrap()),
        id: EventId::new(Uuid::from_u128(u128::from(at))),
        previous_id: EventId::new(Uuid::from_u128(u128::from(at) - 1)),
        aggregate: aggregate.clone(),
        version: Version::new(version).unwrap(),
        event_type: Name::new(kind).unwrap(),
        schema_version: SchemaVersion::FIRST,
        committed_at: CommittedAt::from_unix_micros(1_700_000_000_000_000),
        correlation_id: Uuid::nil(),
        causation_id: Uuid::nil(),
        idempotency_key_hash: None,
        traceparent: None,
        data: data.to_owned(),
    }
}
