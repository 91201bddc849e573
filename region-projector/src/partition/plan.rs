//! What a batch will write, decided without any IO.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use consistency::{
    Admission, AggregateId, AggregateKey, Event, LogPosition, Position, Version, admit,
};
use projection::{
    Applied, Changes, CustomDefinition, CustomEvent, Delta, DocumentDefinition,
    ProjectionDefinition, ProjectionKind, RollupChanges, RollupDefinition, StateWrites, Stop,
    StoredState,
};

use super::remembered::Remembered;
use crate::health::chain_of;

/// Reason of an aggregate whose events leave a version out.
pub(crate) const REASON_GAP: &str = "gap";

/// What the database says about the aggregates of a batch, as of when the partition's checkpoint was moved.
#[derive(Debug, Default)]
pub struct Known {
    /// States by aggregate id.
    pub states: HashMap<String, StoredState>,
    /// Ids of aggregates that are parked.
    pub parked: HashSet<String>,
}

impl Known {
    /// Takes from memory what is there, and says of which events the aggregates are to be looked up. Of one whose
    /// first event is among them nothing is stored: if it was applied before, that is found out when it is
    /// written.
    pub(super) fn recall<'a>(
        &mut self,
        events: &'a [Event],
        remembered: &Remembered,
    ) -> Vec<&'a Event> {
        let mut first: HashSet<&str> = HashSet::new();
        let mut unknown = Vec::new();
        for event in events {
            let id = event.aggregate.id();
            if self.states.contains_key(id) || first.contains(id) {
                continue;
            }
            if let Some(state) = remembered.get(id) {
                self.states.insert(id.to_owned(), state.clone());
            } else if event.version == Version::ZERO.next() {
                first.insert(id);
            } else {
                unknown.push(event);
            }
        }
        unknown
    }

    /// Takes what the database knows about others.
    pub(super) fn extend(&mut self, others: Self) {
        self.states.extend(others.states);
        self.parked.extend(others.parked);
    }
}

/// Aggregates, by id, of which the database refuses what an event makes.
pub type Condemned = BTreeMap<String, Refusal>;

/// What the database says to an event of an aggregate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Where the event stands.
    pub at: Position,
    /// Out of a closed set.
    pub reason: &'static str,
    /// The database's words.
    pub error: String,
}

/// An aggregate of which events are missing before those that are there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// Which.
    pub aggregate: AggregateId,
    /// The last version before the gap.
    pub after: Version,
}

/// An aggregate to be parked.
#[derive(Debug)]
pub struct Parking {
    /// Which.
    pub aggregate: AggregateId,
    /// Its first event that is not applied.
    pub at: LogPosition,
    /// Out of a closed set.
    pub reason: &'static str,
}

/// An event that goes to the dead letters.
#[derive(Debug)]
pub struct Letter {
    /// The event; a copy, so that a plan outlives its batch.
    pub event: Event,
    /// Why, for operators.
    pub error: String,
}

/// What is written to the tables of the projection.
#[derive(Debug)]
pub enum Writes {
    /// Of a document.
    Document(Changes),
    /// Of a rollup.
    Rollup(StateWrites, RollupChanges),
    /// Of a custom projection: its events, in the order of the log.
    Custom(StateWrites, Vec<CustomEvent>),
}

/// Everything that a batch writes besides its checkpoint.
#[derive(Debug)]
pub struct Plan {
    /// States and rows.
    pub writes: Writes,
    /// Aggregates that stop here.
    pub parkings: Vec<Parking>,
    /// Their events, and those of aggregates that stopped before.
    pub letters: Vec<Letter>,
    /// Every aggregate that an event of the batch touched, in whatever way.
    pub touched: BTreeSet<AggregateKey>,
    /// Events that the states held already.
    pub duplicate_count: usize,
    /// Aggregates that are parked for events that are missing: the log may have them.
    pub gaps: Vec<Gap>,
    /// The events together leave the bounds of a sum, and all of them are parked for it. One by one
    /// they may not.
    pub overflowed: bool,
}

impl Plan {
    /// Whether every event is applied, or was before.
    pub fn parks_nothing(&self) -> bool {
        self.parkings.is_empty()
            && self.letters.is_empty()
            && self.gaps.is_empty()
            && !self.overflowed
    }

    /// The states that it writes, of aggregates whose ids are `wanted`. One that makes no sense is left out: it is
    /// found when it is read from the database.
    pub(super) fn states_of(
        &self,
        wanted: impl Fn(&str) -> bool,
    ) -> impl Iterator<Item = (String, StoredState)> {
        let states: &StateWrites = match &self.writes {
            Writes::Document(changes) => &changes.states,
            Writes::Rollup(states, _) | Writes::Custom(states, _) => states,
        };
        let rows = 0..states.aggregate_ids.len();
        rows.filter(move |row| wanted(&states.aggregate_ids[*row])).filter_map(|row| {
            let id = states.aggregate_ids[row].clone();
            let (version, epoch) = (states.versions[row], states.epochs[row]);
            let (at, created) = (states.positions[row], states.created_positions[row]);
            let state = states.states[row].clone();
            StoredState::from_columns((id, version, epoch, at, created, state)).ok()
        })
    }
}

/// How a document's events are applied: with the rows that its state makes, or without.
type Apply = fn(&DocumentDefinition, &AggregateId, StoredState, &[&Event]) -> Applied;

/// Decides what `events`, in log order, do.
pub fn plan<'a>(
    definition: &ProjectionDefinition,
    partition: u16,
    events: impl IntoIterator<Item = &'a Event>,
    known: &mut Known,
    condemned: &Condemned,
) -> Plan {
    plan_by(DocumentDefinition::apply, definition, partition, events, known, condemned)
}

/// The same without a document's rows, for who makes them of the last state of all.
pub fn plan_states<'a>(
    definition: &ProjectionDefinition,
    partition: u16,
    events: impl IntoIterator<Item = &'a Event>,
    known: &mut Known,
) -> Plan {
    let none = Condemned::new();
    plan_by(DocumentDefinition::apply_to_state, definition, partition, events, known, &none)
}

fn plan_by<'a>(
    apply: Apply,
    definition: &ProjectionDefinition,
    partition: u16,
    events: impl IntoIterator<Item = &'a Event>,
    known: &mut Known,
    condemned: &Condemned,
) -> Plan {
    let mut groups: BTreeMap<&str, Vec<&Event>> = BTreeMap::new();
    for event in events {
        groups.entry(event.aggregate.id()).or_default().push(event);
    }
    let mut sorted = Sorted::default();
    let mut open = Vec::new();
    let touched = groups.values().map(|group| group[0].aggregate.key()).collect();
    for (id, events) in groups {
        if known.parked.contains(id) {
            sorted.bury(&events, "an earlier event of the aggregate is parked");
        } else {
            open.push(Group::new(events, condemned.get(id)));
        }
    }
    let writes = match definition.kind() {
        ProjectionKind::Document(document) => {
            let rules = (definition, document, apply);
            Writes::Document(documents(rules, &open, known, &mut sorted))
        }
        ProjectionKind::Rollup(rollup) => {
            let (states, changes) = rollups(rollup, partition, &open, known, &mut sorted);
            Writes::Rollup(states, changes)
        }
        ProjectionKind::Custom(custom) => {
            let (states, events) = customs(custom, partition, &open, known, &mut sorted);
            Writes::Custom(states, events)
        }
    };
    let Sorted { parkings, letters, duplicate_count, gaps, overflowed } = sorted;
    Plan { writes, parkings, letters, touched, duplicate_count, gaps, overflowed }
}

/// The events of one aggregate.
struct Group<'a> {
    events: Vec<&'a Event>,
    /// How many of them come before one that the database refuses, and what it says to that one.
    refused: Option<(usize, Refusal)>,
}

impl<'a> Group<'a> {
    fn new(events: Vec<&'a Event>, refusal: Option<&Refusal>) -> Self {
        let refused = refusal.map(|refusal| {
            let before = |event: &&Event| event.at.position < refusal.at;
            (events.partition_point(before), refusal.clone())
        });
        Self { events, refused }
    }

    fn aggregate(&self) -> &'a AggregateId {
        &self.events[0].aggregate
    }

    /// The events that the database has nothing against.
    fn sound(&self) -> &[&'a Event] {
        let count = self.refused.as_ref().map_or(self.events.len(), |(count, _)| *count);
        &self.events[..count]
    }
}

/// The events that are not applied.
#[derive(Default)]
struct Sorted {
    parkings: Vec<Parking>,
    letters: Vec<Letter>,
    duplicate_count: usize,
    gaps: Vec<Gap>,
    overflowed: bool,
}

impl Sorted {
    fn bury(&mut self, events: &[&Event], error: &str) {
        let letters =
            events.iter().map(|event| Letter { event: (*event).clone(), error: error.to_owned() });
        self.letters.extend(letters);
    }

    /// The first of `events` failed; the later ones wait behind it.
    fn park(&mut self, events: &[&Event], reason: &'static str, error: &str) {
        let Some((first, later)) = events.split_first() else { return };
        self.parkings.push(Parking { aggregate: first.aggregate.clone(), at: first.at, reason });
        self.bury(&[first], error);
        self.bury(later, "an earlier event of the aggregate is parked");
    }

    /// The first of `events` does not follow the version that its aggregate has.
    fn park_gap(&mut self, events: &[&Event], after: Version) {
        let Some(first) = events.first() else { return };
        let error = format!("version {} cannot follow {after}", first.version);
        self.gaps.push(Gap { aggregate: first.aggregate.clone(), after });
        self.park(events, REASON_GAP, &error);
    }

    /// All that came before is applied, and the database has nothing to say to more than that.
    fn park_refused(&mut self, group: &Group<'_>) {
        if let Some((count, Refusal { reason, error, .. })) = &group.refused {
            self.park(&group.events[*count..], reason, error);
        }
    }
}

fn documents(
    (definition, document, apply): (&ProjectionDefinition, &DocumentDefinition, Apply),
    groups: &[Group<'_>],
    known: &mut Known,
    sorted: &mut Sorted,
) -> Changes {
    let applied = groups.iter().map(|group| {
        let aggregate = group.aggregate();
        let before = known.states.remove(aggregate.id()).unwrap_or(StoredState::NOTHING);
        let held = |event: &&&Event| event.version <= before.version();
        sorted.duplicate_count += group.sound().iter().filter(held).count();
        let applied = apply(document, aggregate, before, group.sound());
        let rest = &group.events[applied.consumed..];
        match &applied.stop {
            None => sorted.park_refused(group),
            Some(Stop::Gap { state, .. }) => sorted.park_gap(rest, *state),
            Some(Stop::Poison(error)) => sorted.park(rest, error.kind(), &chain_of(error)),
        }
        applied
    });
    Changes::gather(definition, applied.collect())
}

fn rollups(
    rollup: &RollupDefinition,
    partition: u16,
    groups: &[Group<'_>],
    known: &Known,
    sorted: &mut Sorted,
) -> (StateWrites, RollupChanges) {
    let (parking_count, letter_count) = (sorted.parkings.len(), sorted.letters.len());
    let mut states = StateWrites::default();
    let mut deltas: Vec<(LogPosition, Delta)> = Vec::new();
    for group in groups {
        let before = known.states.get(group.aggregate().id()).unwrap_or(&StoredState::NOTHING);
        let Admitted { run, gap, duplicate_count } = admitted(before.version(), group.sound());
        sorted.duplicate_count += duplicate_count;
        let events: Vec<&Event> = run.iter().map(|place| group.events[*place]).collect();
        let counted = rollup.count(before, &events);
        deltas.extend(counted.deltas);
        match (counted.error, gap) {
            (Some(error), _) => {
                let place = run.get(counted.consumed).copied().unwrap_or_default();
                sorted.park(&group.events[place..], error.kind(), &chain_of(&error));
            }
            (None, Some((place, after))) => sorted.park_gap(&group.events[place..], after),
            (None, None) => sorted.park_refused(group),
        }
        if let Some(newest) = events[..counted.consumed].last() {
            let ends = (group.events[0], *newest);
            note_counted(&mut states, partition, before, ends, counted.state);
        }
    }
    match rollup.gather(partition, deltas.iter().map(|(at, delta)| (*at, delta))) {
        Ok(changes) => (states, changes),
        Err(error) => {
            // A sum that leaves 64 bits within one batch: no single event is at fault, so all are, and
            // what an aggregate had counted before it stopped is not counted either.
            sorted.parkings.truncate(parking_count);
            sorted.letters.truncate(letter_count);
            sorted.overflowed = true;
            for group in groups {
                sorted.park(&group.events, error.kind(), &chain_of(&error));
            }
            (StateWrites::default(), RollupChanges::default())
        }
    }
}

fn customs(
    custom: &CustomDefinition,
    partition: u16,
    groups: &[Group<'_>],
    known: &Known,
    sorted: &mut Sorted,
) -> (StateWrites, Vec<CustomEvent>) {
    let mut states = StateWrites::default();
    let mut events: Vec<(Position, CustomEvent)> = Vec::new();
    for group in groups {
        let before = known.states.get(group.aggregate().id()).unwrap_or(&StoredState::NOTHING);
        let Admitted { run, gap, duplicate_count } = admitted(before.version(), group.sound());
        sorted.duplicate_count += duplicate_count;
        let mut newest = None;
        let mut poison = None;
        for place in run {
            let event = group.events[place];
            match custom.decode(event) {
                Ok(decoded) => events.push((event.at.position, decoded)),
                Err(error) => {
                    poison = Some((place, error));
                    break;
                }
            }
            newest = Some(event);
        }
        match (poison, gap) {
            (Some((place, error)), _) => {
                sorted.park(&group.events[place..], error.kind(), &chain_of(&error));
            }
            (None, Some((place, after))) => sorted.park_gap(&group.events[place..], after),
            (None, None) => sorted.park_refused(group),
        }
        if let Some(newest) = newest {
            note_counted(&mut states, partition, before, (group.events[0], newest), None);
        }
    }
    events.sort_by_key(|(position, _)| *position);
    (states, events.into_iter().map(|(_, event)| event).collect())
}

/// The places of the events of a group that follow what is counted, and of the first that leaves a
/// version out, with the version that it does not follow.
#[derive(Default)]
struct Admitted {
    run: Vec<usize>,
    gap: Option<(usize, Version)>,
    duplicate_count: usize,
}

fn admitted(counted: Version, group: &[&Event]) -> Admitted {
    let mut admitted = Admitted::default();
    let mut version = counted;
    for (place, event) in group.iter().enumerate() {
        match admit(version, event.version) {
            Admission::Apply => {
                version = event.version;
                admitted.run.push(place);
            }
            Admission::Duplicate => admitted.duplicate_count += 1,
            Admission::Gap => {
                admitted.gap = Some((place, version));
                break;
            }
        }
    }
    admitted
}

/// The state of a rollup says which versions it has counted, and what they came to where the rules
/// need that.
fn note_counted(
    states: &mut StateWrites,
    partition: u16,
    before: &StoredState,
    (first, newest): (&Event, &Event),
    state: Option<String>,
) {
    let is_new = before.version() == Version::ZERO;
    let created = if is_new { first.at.position } else { before.created() };
    states.aggregate_ids.push(newest.aggregate.id().to_owned());
    states.partitions.push(i32::from(partition));
    states.previous_versions.push(before.version().as_i64());
    states.versions.push(newest.version.as_i64());
    states.epochs.push(newest.at.epoch.as_i32());
    states.positions.push(newest.at.position.as_i64());
    states.created_positions.push(created.as_i64());
    states.states.push(state);
}
