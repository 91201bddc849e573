//! Epochs: a log that lost its tail, regions that have not heard of it, and tokens from before.
//!
//! One aggregate, one partition. Each epoch's log keeps a beginning of the one before and goes its
//! own way after that, so the same position may name different events. Regions and gateways learn of
//! epochs late and not together. The oracle knows the events that each caller wrote or saw: an answer
//! has all of them, or the caller was told once that some are lost. `EPOCHS_SEED=17` replays a seed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::collections::BTreeSet;

use consistency::{
    AggregateKey, Claim, Demand, Epoch, EpochHistory, Evidence, Key, KeyId, KeyRing, LogId,
    LogPosition, Position, Scope, Token, TokenStatus, Verdict, Version, judge,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

const KEY: AggregateKey = AggregateKey::from_bytes([7; 12]);
const REGION_COUNT: usize = 2;
const CALLER_COUNT: usize = 2;
const SEED_COUNT: u64 = 3_000;

/// One rule about epochs. Taking one away puts the naive variant in its place, in this test only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// Positions are compared within an epoch only.
    PositionsNeedTheirEpoch,
    /// A token of an epoch that is not known here waits until it is.
    NewerEpochIsNotJudgedByPosition,
    /// A region that adopts an epoch cuts off what it read past the boundary.
    AdoptionCutsTheTail,
    /// A stream belongs to one epoch, so a region that knows only the old one reads nothing newer.
    StreamBelongsToEpoch,
    /// A position is lost when it is above the start of any later epoch, also of the next one.
    NextBoundaryCounts,
    /// And of the newest one.
    NewestBoundaryCounts,
    /// Each token is judged in its own epoch before they are merged.
    TokensAreJudgedBeforeMerging,
    /// Who is told of a loss gets a fresh token.
    LossBringsFreshToken,
    /// And one that still says what its other tokens said.
    LossKeepsOtherTokens,
    /// A token sent with a write is judged before the append.
    WritesAreJudged,
    /// An entity tag names the epoch of its event.
    EntityTagNamesEpoch,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Write {
        caller: usize,
    },
    /// With an entity tag and no token.
    WriteIfMatch {
        caller: usize,
    },
    Read {
        caller: usize,
        region: usize,
        row: bool,
    },
    Share {
        from: usize,
        to: usize,
    },
    /// A new epoch keeps this many events at most.
    Promote {
        kept: usize,
    },
    /// The region applies one more event of its epoch.
    Step {
        region: usize,
    },
    /// The region moves on to the next epoch.
    Adopt {
        region: usize,
    },
    /// The gateway hears of every epoch there is.
    Learn {
        region: usize,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Promise {
    /// What the caller knows is in every answer, or it was told.
    NothingIsLostInSilence,
    /// It is told once.
    ToldOnce,
    /// A conditional write applies to what its caller saw.
    ConditionHolds,
}

/// An event: who it is, and the epoch it was written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Written {
    id: u64,
    epoch: Epoch,
}

#[derive(Debug)]
struct Region {
    epoch: usize,
    applied: Vec<Written>,
    /// How many epochs its gateway knows.
    known: usize,
}

#[derive(Debug, Default)]
struct Caller {
    /// Sealed tokens, all of which it sends.
    tokens: Vec<String>,
    knows: BTreeSet<u64>,
    /// What it saw last: version and event.
    tag: Option<(u64, Written)>,
    /// How many epochs were known when it was last told of a loss.
    told: Option<usize>,
}

/// What a request's tokens come to.
enum Opened {
    Nothing,
    Counts(Token),
    Lost(Token),
    Newer(Token),
}

fn opened(status: TokenStatus) -> Opened {
    match status {
        TokenStatus::Absent => Opened::Nothing,
        TokenStatus::Valid(token) | TokenStatus::OlderEpoch(token) => Opened::Counts(token),
        TokenStatus::Lost(token) => Opened::Lost(token),
        TokenStatus::NewerEpoch(token) => Opened::Newer(token),
        refused @ (TokenStatus::Malformed
        | TokenStatus::Forged
        | TokenStatus::UnknownKey(_)
        | TokenStatus::UnknownFormat(_)
        | TokenStatus::OtherLog) => panic!("these tokens are well made: {refused:?}"),
    }
}

struct World {
    removed: Option<Rule>,
    ring: KeyRing,
    /// The log of each epoch, oldest first, and where each later one starts.
    logs: Vec<Vec<Written>>,
    starts: Vec<(Epoch, Position)>,
    regions: Vec<Region>,
    callers: Vec<Caller>,
    written: u64,
    answered: u64,
}

fn position(value: usize) -> Position {
    Position::new(value as u64).unwrap()
}

fn epoch(number: usize) -> Epoch {
    Epoch::new(number as u32 + 1).unwrap()
}

impl World {
    fn new(removed: Option<Rule>) -> Self {
        let key = Key::new(KeyId(1), &[1; 32]).unwrap();
        let region = |_| Region { epoch: 0, applied: Vec::new(), known: 1 };
        Self {
            removed,
            ring: KeyRing::new(LogId::new(uuid::Uuid::nil()), vec![key], KeyId(1)).unwrap(),
            logs: vec![Vec::new()],
            starts: Vec::new(),
            regions: (0..REGION_COUNT).map(region).collect(),
            callers: (0..CALLER_COUNT).map(|_| Caller::default()).collect(),
            written: 0,
            answered: 0,
        }
    }

    fn holds(&self, rule: Rule) -> bool {
        self.removed != Some(rule)
    }

    fn act(&mut self, action: Action) -> Result<(), Promise> {
        match action {
            Action::Write { caller } => return self.write(caller),
            Action::WriteIfMatch { caller } => return self.write_if_match(caller),
            Action::Read { caller, region, row } => return self.read(caller, region, row),
            Action::Share { from, to } => {
                let (tokens, knows) =
                    (self.callers[from].tokens.clone(), self.callers[from].knows.clone());
                self.callers[to].tokens.extend(tokens);
                self.callers[to].knows.extend(knows);
                self.callers[to].told = None;
            }
            Action::Promote { kept } => self.promote(kept),
            Action::Step { region } => self.step(region),
            Action::Adopt { region } => self.adopt(region),
            Action::Learn { region } => self.regions[region].known = self.logs.len(),
        }
        Ok(())
    }

    fn promote(&mut self, kept: usize) {
        let mut log = self.logs.last().unwrap().clone();
        log.truncate(kept);
        self.starts.push((epoch(self.logs.len()), position(log.len())));
        self.logs.push(log);
    }

    fn step(&mut self, region: usize) {
        let newest = self.logs.len() - 1;
        let alone = self.holds(Rule::StreamBelongsToEpoch);
        let region = &mut self.regions[region];
        let log = &self.logs[if alone { region.epoch } else { newest }];
        region.applied.extend(log.get(region.applied.len()).copied());
    }

    fn adopt(&mut self, region: usize) {
        let cuts = self.holds(Rule::AdoptionCutsTheTail);
        let region = &mut self.regions[region];
        let Some((_, start)) = self.starts.get(region.epoch) else { return };
        region.epoch += 1;
        if cuts {
            region.applied.truncate(start.get() as usize);
        }
    }

    /// What a gateway that knows the first `known` epochs makes of a caller's tokens.
    fn open(&self, caller: usize, known: usize) -> Opened {
        let texts = &self.callers[caller].tokens;
        let history = self.history(known);
        if self.holds(Rule::TokensAreJudgedBeforeMerging) {
            opened(self.ring.open_all(texts.iter().map(String::as_str), &history))
        } else {
            opened(self.ring.open(&self.ring.seal(&self.plain(texts)), &history))
        }
    }

    /// The largest epoch and the largest positions of all tokens, as if they were of one epoch.
    fn plain(&self, texts: &[String]) -> Token {
        let kept = (1..self.logs.len()).map(|number| (epoch(number), Position::MAX)).collect();
        let all = EpochHistory::new(kept).unwrap();
        match opened(self.ring.open_all(texts.iter().map(String::as_str), &all)) {
            Opened::Counts(token) => {
                let newest = texts.iter().filter_map(|text| self.epoch_of(text)).max().unwrap();
                let bare = Token::new(newest).with_read(token.read_position());
                token.claims().iter().copied().fold(bare, Token::with_claim)
            }
            Opened::Nothing | Opened::Lost(_) | Opened::Newer(_) => Token::new(Epoch::FIRST),
        }
    }

    /// The epoch that a token was sealed in: that of the one history that it is neither old nor new in.
    fn epoch_of(&self, text: &str) -> Option<Epoch> {
        let own = (1..=self.logs.len()).find(|known| {
            matches!(self.ring.open(text, &self.history(*known)), TokenStatus::Valid(_))
        });
        own.map(|known| epoch(known - 1))
    }

    fn history(&self, known: usize) -> EpochHistory {
        let mut starts = self.starts[..known - 1].to_vec();
        let last = starts.len();
        for (at, (_, start)) in starts.iter_mut().enumerate() {
            let next = at + 1 < last && !self.holds(Rule::NextBoundaryCounts);
            let newest = last > 1 && at + 1 == last && !self.holds(Rule::NewestBoundaryCounts);
            if next || newest {
                *start = Position::MAX;
            }
        }
        EpochHistory::new(starts).unwrap()
    }

    fn write(&mut self, caller: usize) -> Result<(), Promise> {
        let newest = Token::new(epoch(self.logs.len() - 1));
        let sent = match self.open(caller, self.logs.len()) {
            Opened::Lost(left) if self.holds(Rule::WritesAreJudged) => {
                return self.tell(caller, self.logs.len(), &left);
            }
            Opened::Counts(token) => token,
            Opened::Lost(_) | Opened::Nothing => newest,
            Opened::Newer(token) => panic!("the primary knows every epoch: {token:?}"),
        };
        let (version, event) = self.append();
        let claim = Claim {
            aggregate: KEY,
            version: Version::new(version).unwrap(),
            position: Position::new(version).unwrap(),
        };
        self.learn(caller, &sent.with_claim(claim), [event], (version, event));
        Ok(())
    }

    fn append(&mut self) -> (u64, Written) {
        self.written += 1;
        let event = Written { id: self.written, epoch: epoch(self.logs.len() - 1) };
        let log = self.logs.last_mut().unwrap();
        log.push(event);
        (log.len() as u64, event)
    }

    fn write_if_match(&mut self, caller: usize) -> Result<(), Promise> {
        let log = self.logs.last().unwrap();
        let (Some((version, seen)), Some(last)) = (self.callers[caller].tag, log.last()) else {
            return Ok(());
        };
        let names_epoch = self.holds(Rule::EntityTagNamesEpoch);
        let matches = version == log.len() as u64 && (!names_epoch || seen.epoch == last.epoch);
        if matches && *last != seen { Err(Promise::ConditionHolds) } else { Ok(()) }
    }

    fn read(&mut self, caller: usize, region: usize, row: bool) -> Result<(), Promise> {
        let scope = if row { Scope::Row(KEY) } else { Scope::Everything };
        let known = self.regions[region].known;
        let token = match self.open(caller, known) {
            Opened::Counts(token) => token,
            Opened::Nothing => Token::new(epoch(known - 1)),
            Opened::Lost(left) => return self.tell(caller, known, &left),
            Opened::Newer(_) if self.holds(Rule::NewerEpochIsNotJudgedByPosition) => return Ok(()),
            Opened::Newer(token) => {
                let here = Token::new(epoch(known - 1)).with_read(token.read_position());
                token.claims().iter().copied().fold(here, Token::with_claim)
            }
        };
        let demand = Demand::of(&token, scope);
        let applied = self.regions[region].applied.clone();
        let counts_in = if self.holds(Rule::PositionsNeedTheirEpoch) {
            epoch(self.regions[region].epoch)
        } else {
            demand.at().epoch
        };
        let evidence = Evidence {
            watermark: Some(LogPosition::new(counts_in, position(applied.len()))),
            row_version: Version::new(applied.len() as u64).filter(|v| row && v.get() > 0),
            parked: Vec::new(),
        };
        if judge(&demand, scope, &evidence) != Verdict::Current {
            return Ok(());
        }
        self.answered += 1;
        let shown: BTreeSet<u64> = applied.iter().map(|event| event.id).collect();
        if !self.callers[caller].knows.is_subset(&shown) {
            return Err(Promise::NothingIsLostInSilence);
        }
        // The answer's token counts in the epoch of the checkpoint that it was read at.
        let read = Token::new(epoch(self.regions[region].epoch)).with_read(position(applied.len()));
        if let Some(last) = applied.last().copied() {
            let tag = (applied.len() as u64, last);
            self.callers[caller].tokens.push(self.ring.seal(&read));
            self.callers[caller].knows.extend(shown);
            self.callers[caller].tag = Some(tag);
        }
        Ok(())
    }

    /// The caller is told that something it knows is lost, and what it goes on with.
    fn tell(&mut self, caller: usize, known: usize, left: &Token) -> Result<(), Promise> {
        let kept: BTreeSet<u64> = self.logs[known - 1].iter().map(|event| event.id).collect();
        let forgets = self.holds(Rule::LossBringsFreshToken);
        let boundary =
            Token::new(left.epoch()).with_read(self.history(known).current_starts_after());
        let left = if self.holds(Rule::LossKeepsOtherTokens) { left } else { &boundary };
        let caller = &mut self.callers[caller];
        if caller.told == Some(known) && caller.knows.is_subset(&kept) {
            return Err(Promise::ToldOnce);
        }
        caller.told = Some(known);
        caller.knows.retain(|id| kept.contains(id));
        if forgets {
            caller.tokens = vec![self.ring.seal(left)];
        }
        Ok(())
    }

    fn learn(
        &mut self,
        caller: usize,
        token: &Token,
        events: impl IntoIterator<Item = Written>,
        tag: (u64, Written),
    ) {
        let caller = &mut self.callers[caller];
        caller.tokens = vec![self.ring.seal(token)];
        caller.knows.extend(events.into_iter().map(|event| event.id));
        caller.tag = Some(tag);
    }
}

fn course(seed: u64) -> Vec<Action> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut action = || {
        let caller = rng.random_range(0..CALLER_COUNT);
        let region = rng.random_range(0..REGION_COUNT);
        match rng.random_range(0..20) {
            0..4 => Action::Write { caller },
            4 => Action::WriteIfMatch { caller },
            5..10 => Action::Read { caller, region, row: rng.random_bool(0.5) },
            10 => Action::Share { from: caller, to: rng.random_range(0..CALLER_COUNT) },
            11 => Action::Promote { kept: rng.random_range(0..3) },
            12..16 => Action::Step { region },
            16..18 => Action::Adopt { region },
            _ => Action::Learn { region },
        }
    };
    (0..30).map(|_| action()).collect()
}

/// The number of answers that were given.
fn run(removed: Option<Rule>, actions: &[Action]) -> Result<u64, (usize, Promise)> {
    let mut world = World::new(removed);
    for (number, action) in actions.iter().enumerate() {
        world.act(*action).map_err(|promise| (number, promise))?;
    }
    Ok(world.answered)
}

fn shrink(removed: Option<Rule>, mut actions: Vec<Action>) -> Vec<Action> {
    let fails = |actions: &[Action]| run(removed, actions).err();
    let mut at = actions.len();
    while at > 0 {
        at -= 1;
        let mut shorter = actions.clone();
        shorter.remove(at);
        if fails(&shorter).is_some() {
            actions = shorter;
        }
    }
    actions
}

fn needed(rule: Rule, promise: Promise) {
    for seed in 0..SEED_COUNT {
        let actions = course(seed);
        let found = run(Some(rule), &actions).err();
        if found.is_some_and(|(_, broken)| broken == promise) {
            println!(
                "without {rule:?} seed {seed} breaks {promise:?}: {:?}",
                shrink(Some(rule), actions)
            );
            return;
        }
    }
    panic!("without {rule:?} no seed below {SEED_COUNT} breaks {promise:?}");
}

/// The course ends with an answer that lacks something, and without the rule nobody says so.
fn needed_by(rule: Rule, actions: &[Action]) {
    assert!(run(None, actions).is_ok());
    let last = actions.len() - 1;
    assert_eq!(run(Some(rule), actions), Err((last, Promise::NothingIsLostInSilence)));
}

#[test]
fn nothing_is_lost_in_silence_and_every_loss_is_told_once() {
    let replayed = std::env::var("EPOCHS_SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    let seeds = replayed.map_or(0..SEED_COUNT, |seed| seed..seed + 1);
    let mut answered = 0;
    for seed in seeds {
        let actions = course(seed);
        match run(None, &actions) {
            Ok(answers) => answered += answers,
            Err((_, promise)) => {
                panic!("EPOCHS_SEED={seed} breaks {promise:?} by {:#?}", shrink(None, actions))
            }
        }
    }
    assert!(replayed.is_some() || SEED_COUNT < answered, "only {answered} reads were answered");
}

#[test]
fn a_position_of_another_epoch_proves_nothing() {
    needed(Rule::PositionsNeedTheirEpoch, Promise::NothingIsLostInSilence);
}

#[test]
fn a_token_of_an_unknown_epoch_is_not_judged_by_its_position() {
    needed(Rule::NewerEpochIsNotJudgedByPosition, Promise::NothingIsLostInSilence);
}

#[test]
fn a_region_that_adopts_an_epoch_cuts_off_its_tail() {
    needed(Rule::AdoptionCutsTheTail, Promise::NothingIsLostInSilence);
}

#[test]
fn a_region_of_the_old_epoch_reads_nothing_of_the_new_one() {
    needed(Rule::StreamBelongsToEpoch, Promise::NothingIsLostInSilence);
}

/// The position is below the start of the newest epoch, but another event has it since the next one.
#[test]
fn what_the_next_epoch_did_not_keep_is_lost() {
    let (lost, other, region) = (0, 1, 0);
    let actions = [
        Action::Write { caller: lost },
        Action::Promote { kept: 0 },
        Action::Write { caller: other },
        Action::Promote { kept: 1 },
        Action::Adopt { region },
        Action::Adopt { region },
        Action::Step { region },
        Action::Learn { region },
        Action::Read { caller: lost, region, row: false },
    ];
    needed_by(Rule::NextBoundaryCounts, &actions);
}

#[test]
fn what_the_newest_epoch_did_not_keep_is_lost() {
    needed(Rule::NewestBoundaryCounts, Promise::NothingIsLostInSilence);
}

/// A lost position that is merged into the newer epoch waits there for another event.
#[test]
fn tokens_of_two_epochs_are_judged_before_they_are_merged() {
    let (lost, other, region) = (0, 1, 0);
    needed_by(
        Rule::TokensAreJudgedBeforeMerging,
        &[
            Action::Write { caller: lost },
            Action::Write { caller: lost },
            Action::Promote { kept: 0 },
            Action::Write { caller: other },
            Action::Share { from: other, to: lost },
            Action::Write { caller: other },
            Action::Adopt { region },
            Action::Step { region },
            Action::Step { region },
            Action::Learn { region },
            Action::Read { caller: lost, region, row: false },
        ],
    );
}

/// Telling of a loss does not forget what the caller's other tokens say.
#[test]
fn a_loss_does_not_wash_away_the_tokens_that_were_not_lost() {
    let (lost, other, region) = (0, 1, 0);
    needed_by(
        Rule::LossKeepsOtherTokens,
        &[
            Action::Write { caller: lost },
            Action::Promote { kept: 0 },
            Action::Write { caller: other },
            Action::Share { from: other, to: lost },
            Action::Adopt { region },
            Action::Learn { region },
            Action::Read { caller: lost, region, row: false },
            Action::Read { caller: lost, region, row: false },
        ],
    );
}

#[test]
fn who_is_told_of_a_loss_gets_a_token_that_forgets_it() {
    needed(Rule::LossBringsFreshToken, Promise::ToldOnce);
}

#[test]
fn a_write_does_not_wash_a_lost_token_clean() {
    needed(Rule::WritesAreJudged, Promise::NothingIsLostInSilence);
}

#[test]
fn an_entity_tag_of_a_lost_event_matches_nothing() {
    needed(Rule::EntityTagNamesEpoch, Promise::ConditionHolds);
}
