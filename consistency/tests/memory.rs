//! Rows kept in memory, searched exhaustively at small scope.
//!
//! One partition with two rows, a log of two events, a database that commits batches of any size
//! and falls back to any older state. What was announced once may be heard at any time, twice or
//! never; each store of a writer and each load of a reader is a step of its own. Whenever an entry is
//! usable for a position, it is the row as it is there or later, and nothing parked is left out of it.
//!
//! Every rule of the scheme is taken away in turn, and the search then finds the shortest way to
//! show somebody the past. `tests/simulation.rs` runs the same scheme among whole regions.
//!
//! With `MEMORY_SEARCH_LARGE` set the logs have three events, and two handlers work on two: up to
//! 3.5 million states each.

use std::collections::{HashMap, VecDeque};

use consistency::{
    AggregateKey, Announcement, Coherence, CoherenceScope, Epoch, LogPosition, Name, Position,
    Raise,
};

const SCOPE: CoherenceScope = CoherenceScope { epoch: Epoch::FIRST, version: 1, partition: 0 };
const ROW: AggregateKey = AggregateKey::from_bytes([0; 12]);
const OTHER_ROW: AggregateKey = AggregateKey::from_bytes([1; 12]);
const SLOT_COUNT: usize = 2;

/// One rule. Taking one away puts the naive variant in its place, in this test only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// A batch names what it touched, also when it nets to nothing.
    EveryKeyIsNamed,
    /// A batch names what it parked.
    ParkedIsNamed,
    /// An answer with something parked in it is not kept.
    ParkedIsNotKept,
    /// The writer raises the slots before the chain.
    SlotsBeforeChain,
    /// The writer raises the floor before the chain.
    FloorBeforeChain,
    /// The reader loads the chain before slot and floor.
    ReaderLoadsChainFirst,
    /// A poll that moves the chain raises the floor.
    PollRaisesFloor,
    /// So does an announcement that does not join the chain, the first one after a start too.
    GapRaisesFloor,
    /// Announcements of another version of the projection are passed over.
    OwnVersionOnly,
}

/// What happens to the row that is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Create,
    Update,
    Delete,
    /// Cannot be applied.
    Poison,
    /// Of the other row of the partition.
    OtherRow,
    /// Of another partition.
    Elsewhere,
}

use Event::{Create, Delete, Elsewhere, OtherRow, Poison, Update};

impl Event {
    fn touches_row(self) -> bool {
        match self {
            Create | Update | Delete | Poison => true,
            OtherRow | Elsewhere => false,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct State {
    checkpoint: u8,
    /// Ranges that were committed, each of which may be heard from then on.
    announced: Vec<(u8, u8)>,
    chain: u8,
    floor: u8,
    slots: [u8; SLOT_COUNT],
    /// What each handler has still to raise.
    raises: [Vec<Raise>; 2],
    /// Checkpoint of a snapshot that was read and is not inserted yet.
    snapshot: Option<u8>,
    entry: Option<u8>,
    reader: Reader,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
enum Reader {
    #[default]
    Idle,
    /// Has loaded the chain.
    HasChain(u8),
    /// Has found slot and floor low enough for the entry of this checkpoint.
    HasSlot(u8),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Commit(u8),
    FailOver(u8),
    Hear(usize, (u8, u8)),
    HearOtherVersion(usize, u8),
    Poll(usize),
    Raise(usize),
    Restart,
    Read,
    Insert,
    Load,
    Use,
}

struct World<'a> {
    removed: Option<Rule>,
    log: &'a [Event],
    handler_count: usize,
}

fn position(value: u8) -> Position {
    Position::new(value.into()).expect("small")
}

fn at(value: u8) -> LogPosition {
    LogPosition::new(Epoch::FIRST, position(value))
}

fn small(position: Position) -> u8 {
    u8::try_from(position.get()).expect("the log is short")
}

/// The scheme under test, standing where the state says.
fn coherence(state: &State) -> Coherence {
    let coherence = Coherence::new(SCOPE, SLOT_COUNT);
    coherence.raise(Raise::Floor(position(state.floor)));
    for (slot, value) in state.slots.iter().enumerate() {
        coherence.raise(Raise::Slot { slot, position: position(*value) });
    }
    coherence.raise(Raise::Chain(position(state.chain)));
    coherence
}

impl World<'_> {
    fn holds(&self, rule: Rule) -> bool {
        self.removed != Some(rule)
    }

    fn last(&self) -> u8 {
        self.log.len() as u8
    }

    fn range(&self, from: u8, to: u8) -> &[Event] {
        &self.log[from.into()..to.max(from).into()]
    }

    fn parked_at(&self) -> Option<u8> {
        self.log.iter().position(|event| *event == Poison).map(|index| index as u8 + 1)
    }

    /// The row's version at a checkpoint, when it exists.
    fn row_at(&self, checkpoint: u8) -> Option<usize> {
        let mut touching = self.range(0, checkpoint).iter().filter(|event| event.touches_row());
        let version = touching.clone().count();
        touching.next_back().filter(|event| **event != Delete).map(|_| version)
    }

    /// Whether what was read at a checkpoint is the row as it is at a position or later, and nothing
    /// that could not be applied was left out of it.
    fn shows(&self, read_at: u8, demand: u8) -> bool {
        let is_row = (demand..=self.last()).any(|later| self.row_at(later) == self.row_at(read_at));
        let left_out = self.parked_at().is_some_and(|first| first <= demand);
        is_row && !left_out
    }

    fn announcement(&self, (from, to): (u8, u8), own_version: bool) -> Announcement {
        let nets_to_nothing = self.row_at(from) == self.row_at(to);
        let named = |event: &Event| match event {
            Create | Update | Delete => self.holds(Rule::EveryKeyIsNamed) || !nets_to_nothing,
            Poison => self.holds(Rule::ParkedIsNamed),
            OtherRow | Elsewhere => false,
        };
        let range = self.range(from, to);
        let row = range.iter().any(named).then_some(ROW);
        let other = range.contains(&OtherRow).then_some(OTHER_ROW);
        let keys = row.into_iter().chain(other).map(|key| key.hint());
        Announcement {
            region: "eu-west".to_owned(),
            epoch: SCOPE.epoch,
            projection: Name::new("orders").expect("a name"),
            version: if own_version { SCOPE.version } else { SCOPE.version + 1 },
            partition: SCOPE.partition,
            from: position(from),
            to: position(to),
            stored: position(to),
            head: position(to),
            keys: Some(if own_version { keys.collect() } else { Vec::new() }),
        }
    }

    /// What a handler raises on hearing something, through the naive variants.
    fn heard(&self, state: &State, announcement: &Announcement) -> Vec<Raise> {
        let mut raises = coherence(state).raises(announcement).unwrap_or_default();
        if !self.holds(Rule::GapRaisesFloor) && position(state.chain) < announcement.from {
            let joined = State { chain: small(announcement.from), ..state.clone() };
            raises = coherence(&joined).raises(announcement).unwrap_or_default();
        }
        self.ordered(raises)
    }

    fn ordered(&self, mut raises: Vec<Raise>) -> Vec<Raise> {
        let slots = raises.iter().any(|raise| matches!(raise, Raise::Slot { .. }));
        let floor = raises.iter().any(|raise| matches!(raise, Raise::Floor(_)));
        let naive = slots && !self.holds(Rule::SlotsBeforeChain)
            || floor && !self.holds(Rule::FloorBeforeChain);
        if naive {
            raises.reverse();
        }
        raises
    }

    fn polled(&self, state: &State) -> Vec<Raise> {
        let mut raises = coherence(state).jump_raises(position(state.checkpoint));
        if !self.holds(Rule::PollRaisesFloor) {
            raises.retain(|raise| !matches!(raise, Raise::Floor(_)));
        }
        self.ordered(raises)
    }

    fn steps(&self, state: &State) -> Vec<Step> {
        let mut steps = vec![Step::Restart, Step::Read, Step::Insert, Step::Load, Step::Use];
        steps.extend((state.checkpoint + 1..=self.last()).map(Step::Commit));
        steps.extend((0..state.checkpoint).map(Step::FailOver));
        for handler in 0..self.handler_count {
            if !state.raises[handler].is_empty() {
                steps.push(Step::Raise(handler));
                continue;
            }
            steps.push(Step::Poll(handler));
            steps.extend(state.announced.iter().map(|range| Step::Hear(handler, *range)));
            steps.extend((1..=self.last()).map(|to| Step::HearOtherVersion(handler, to)));
        }
        steps
    }

    /// The state after a step; `None` when it shows somebody the past.
    fn after(&self, state: &State, step: &Step) -> Option<State> {
        let mut next = state.clone();
        match step {
            Step::Commit(to) => {
                let range = (state.checkpoint, *to);
                if let Err(index) = next.announced.binary_search(&range) {
                    next.announced.insert(index, range);
                }
                next.checkpoint = *to;
            }
            Step::FailOver(to) => next.checkpoint = *to,
            Step::Hear(handler, range) => {
                next.raises[*handler] = self.heard(state, &self.announcement(*range, true));
            }
            Step::HearOtherVersion(handler, to) => {
                let passed_over = self.holds(Rule::OwnVersionOnly);
                let strange = self.announcement((state.chain.min(*to), *to), false);
                let version = if passed_over { strange.version } else { SCOPE.version };
                next.raises[*handler] = self.heard(state, &Announcement { version, ..strange });
            }
            Step::Poll(handler) => next.raises[*handler] = self.polled(state),
            Step::Raise(handler) => {
                let coherence = coherence(state);
                coherence.raise(next.raises[*handler].remove(0));
                next.chain = small(coherence.chain());
                next.floor = small(coherence.floor());
                next.slots = std::array::from_fn(|slot| small(coherence.slot(slot)));
            }
            Step::Restart => {
                let State { checkpoint, announced, .. } = next;
                next = State { checkpoint, announced, ..State::default() };
            }
            Step::Read => {
                let parked = self.parked_at().is_some_and(|first| first <= state.checkpoint);
                let keeps = !parked || !self.holds(Rule::ParkedIsNotKept);
                next.snapshot = keeps.then_some(state.checkpoint);
            }
            Step::Insert => next.entry = next.snapshot.take().or(next.entry),
            Step::Load => next.reader = self.load(state),
            Step::Use => {
                next.reader = Reader::Idle;
                return self.is_honest(state).then_some(next);
            }
        }
        Some(next)
    }

    fn load(&self, state: &State) -> Reader {
        if self.holds(Rule::ReaderLoadsChainFirst) {
            return Reader::HasChain(state.chain);
        }
        let Some(entry) = state.entry else { return Reader::Idle };
        let usable = coherence(state).is_usable_after(Position::MAX, &ROW, at(entry), at(1));
        if usable { Reader::HasSlot(entry) } else { Reader::Idle }
    }

    /// Whatever the reader would take for usable is true.
    fn is_honest(&self, state: &State) -> bool {
        (1..=self.last()).all(|demand| match (state.reader, state.entry) {
            (Reader::HasChain(chain), Some(entry)) => {
                let chain = position(chain);
                let usable = coherence(state).is_usable_after(chain, &ROW, at(entry), at(demand));
                !usable || self.shows(entry, demand)
            }
            (Reader::HasSlot(entry), _) => state.chain < demand || self.shows(entry, demand),
            (Reader::Idle, _) | (Reader::HasChain(_), None) => true,
        })
    }
}

/// Visits every state that can be reached: their number, or the shortest way to show the past.
fn search(world: &World) -> Result<usize, Vec<Step>> {
    let mut from: HashMap<State, Option<(State, Step)>> = HashMap::new();
    let mut queue = VecDeque::from([State::default()]);
    from.insert(State::default(), None);
    while let Some(state) = queue.pop_front() {
        for step in world.steps(&state) {
            let Some(next) = world.after(&state, &step) else {
                return Err(way_to(&from, state, step));
            };
            if !from.contains_key(&next) {
                from.insert(next.clone(), Some((state.clone(), step)));
                queue.push_back(next);
            }
        }
    }
    Ok(from.len())
}

fn way_to(from: &HashMap<State, Option<(State, Step)>>, mut state: State, last: Step) -> Vec<Step> {
    let mut way = vec![last];
    while let Some(Some((before, step))) = from.get(&state) {
        way.push(step.clone());
        state = before.clone();
    }
    way.reverse();
    way
}

/// Whether to search for minutes.
fn large() -> bool {
    std::env::var_os("MEMORY_SEARCH_LARGE").is_some()
}

fn needed(rule: Rule, log: &[Event]) {
    let world = World { removed: Some(rule), log, handler_count: 1 };
    let way = search(&world).expect_err("without the rule somebody is shown the past");
    println!("without {rule:?} the past is shown in {} steps: {way:?}", way.len());
    holds(log, 1);
}

fn holds(log: &[Event], handler_count: usize) {
    let world = World { removed: None, log, handler_count };
    match search(&world) {
        Ok(states) => println!("{log:?} with {handler_count} handlers holds in {states} states"),
        Err(way) => panic!("{log:?} shows the past by {way:?}"),
    }
}

#[test]
fn nobody_is_shown_the_past_whatever_the_log() {
    for log in [[Create, OtherRow], [OtherRow, Create], [Create, Elsewhere], [Elsewhere, Poison]] {
        holds(&log, 1);
    }
    if large() {
        holds(&[Create, OtherRow, Update], 1);
        holds(&[OtherRow, Create, Delete], 1);
        holds(&[Create, Elsewhere, Poison], 1);
    }
}

#[test]
fn nobody_is_shown_the_past_by_two_handlers_at_once() {
    holds(&[Create], 2);
    holds(&[Poison], 2);
    if large() {
        for log in [[Create, Update], [Create, Delete], [Create, Poison], [OtherRow, Create]] {
            holds(&log, 2);
        }
    }
}

#[test]
fn a_batch_names_what_it_created_and_deleted() {
    needed(Rule::EveryKeyIsNamed, &[Create, Delete]);
}

#[test]
fn a_batch_names_what_it_parked() {
    needed(Rule::ParkedIsNamed, &[Create, Poison]);
}

#[test]
fn an_answer_with_something_parked_is_not_kept() {
    needed(Rule::ParkedIsNotKept, &[Create, Poison]);
}

#[test]
fn the_writer_raises_slots_before_the_chain() {
    needed(Rule::SlotsBeforeChain, &[Create, Update]);
}

#[test]
fn the_writer_raises_the_floor_before_the_chain() {
    needed(Rule::FloorBeforeChain, &[Create, Update]);
}

#[test]
fn the_reader_loads_the_chain_before_slot_and_floor() {
    needed(Rule::ReaderLoadsChainFirst, &[Create, Update]);
}

#[test]
fn a_poll_that_moves_the_chain_raises_the_floor() {
    needed(Rule::PollRaisesFloor, &[Create, Update]);
}

#[test]
fn an_announcement_after_a_gap_raises_the_floor() {
    needed(Rule::GapRaisesFloor, &[Create, Elsewhere]);
}

#[test]
fn announcements_of_another_version_are_passed_over() {
    needed(Rule::OwnVersionOnly, &[Create, Update]);
}
