//! The world: a log, its regions and their callers, moved by one action at a time.

use consistency::{Claim, Epoch, Token};

use super::{
    action::Action,
    gateway::{Gateway, with_claim},
    log::{AGGREGATE_COUNT, Change, Log, key, learn, position, version},
    oracle::{Answer, Caller, Promise, Violation, Walk},
    projector::Projector,
    rules::{Rule, Rules},
};

pub const CALLER_COUNT: usize = 3;
pub const REGION_COUNT: usize = 3;

/// One region; the first is the primary.
#[derive(Debug)]
pub struct Region {
    pub projector: Projector,
    pub gateway: Gateway,
}

#[derive(Debug)]
pub struct World {
    pub rules: Rules,
    pub log: Log,
    pub regions: Vec<Region>,
    pub callers: Vec<Caller>,
    pub tally: Tally,
}

/// How reads ended, so that a run can tell whether it tried anything.
#[derive(Debug, Default, Clone, Copy)]
pub struct Tally {
    pub current: u64,
    pub recalled: u64,
    pub folded: u64,
    pub eventual: u64,
    pub parked: u64,
    pub unanswered: u64,
}

impl Tally {
    pub fn add(&mut self, other: &Self) {
        self.current += other.current;
        self.recalled += other.recalled;
        self.folded += other.folded;
        self.eventual += other.eventual;
        self.parked += other.parked;
        self.unanswered += other.unanswered;
    }
}

/// Runs a whole course of actions. The number is that of the action which broke a promise.
pub fn run(rules: Rules, actions: &[Action]) -> Result<World, (usize, Violation)> {
    let mut world = World::new(rules);
    for (number, action) in actions.iter().enumerate() {
        world.act(*action).map_err(|violation| (number, violation))?;
    }
    Ok(world)
}

impl World {
    pub fn new(rules: Rules) -> Self {
        let region = |_| Region { projector: Projector::new(), gateway: Gateway::new() };
        Self {
            rules,
            log: Log::default(),
            regions: (0..REGION_COUNT).map(region).collect(),
            callers: (0..CALLER_COUNT).map(|_| Caller::new()).collect(),
            tally: Tally::default(),
        }
    }

    /// One that makes no sense now does nothing.
    pub fn act(&mut self, action: Action) -> Result<(), Violation> {
        match action {
            Action::Write { caller, aggregate, change, poison, late } => {
                self.write(caller, aggregate, change, poison, late);
            }
            Action::Repeat { caller, write } => self.repeat(caller, write),
            Action::Conflict { caller, aggregate } => self.conflict(caller, aggregate),
            Action::Acknowledge { caller, index } => self.acknowledge(caller, index),
            Action::Share { from, to } => self.share(from, to),
            Action::Read(read) => return self.read(read),
            Action::Turn { caller, region, list } => return self.turn(caller, region, list),
            Action::Arrive { region, lost } => {
                self.regions[region].projector.arrive(&self.log, lost);
            }
            Action::FetchHoles { region } => self.regions[region].projector.holes.clear(),
            Action::Plan { region, worker, event_count, store } => {
                let projector = &mut self.regions[region].projector;
                projector.plan(self.rules, &self.log, worker, event_count, store);
            }
            Action::Commit { region, worker, outcome } => {
                let projector = &mut self.regions[region].projector;
                return projector.commit(self.rules, &self.log, worker, outcome);
            }
            Action::TakeOver { region, worker } => self.regions[region].projector.take_over(worker),
            Action::FailOver { region, copies_back } => {
                self.regions[region].projector.fail_over(copies_back);
            }
            Action::Cure { region } => self.regions[region].projector.cured = true,
            Action::Retry { region, aggregate } => {
                return self.regions[region].projector.retry(self.rules, &self.log, aggregate);
            }
            Action::Discard { region, aggregate } => {
                return self.regions[region].projector.discard(self.rules, &self.log, aggregate);
            }
            Action::Hear { region, index, again } => self.hear(region, index, again),
            Action::LoseHint { region, index } => self.lose_hint(region, index),
            Action::Poll { region } => {
                let Region { projector, gateway } = &mut self.regions[region];
                gateway.poll(self.rules, &projector.database);
            }
            Action::RestartGateway { region } => self.regions[region].gateway = Gateway::new(),
            Action::InsertLate { region, index } => self.insert_late(region, index),
        }
        Ok(())
    }

    fn write(&mut self, caller: usize, aggregate: usize, change: Change, poison: bool, late: bool) {
        let knows = self.callers[caller].knows;
        let event = self.log.append(aggregate, change, poison, &knows);
        let claim = Claim {
            aggregate: key(aggregate),
            version: version(event.version),
            position: position(event.position),
        };
        let written = event.version;
        let answered = self.answer_to_write(caller, claim);
        let caller = &mut self.callers[caller];
        caller.on_the_way.push((answered, aggregate, written));
        caller.writes.push(claim);
        if !late {
            let (token, aggregate, written) = caller.on_the_way.pop().expect("it was just pushed");
            caller.token = token;
            caller.acknowledge(aggregate, written);
        }
    }

    fn answer_to_write(&self, caller: usize, claim: Claim) -> Token {
        let sent = if self.rules.hold(Rule::AnswerMergesWhatWasSent) {
            self.callers[caller].token.clone()
        } else {
            Token::new(Epoch::FIRST)
        };
        with_claim(self.rules, sent, claim)
    }

    fn repeat(&mut self, caller: usize, write: usize) {
        if let Some(claim) = self.callers[caller].writes.get(write).copied() {
            self.callers[caller].token = self.answer_to_write(caller, claim);
        }
    }

    /// A write that expected another version is told the one there is.
    fn conflict(&mut self, caller: usize, aggregate: usize) {
        let Some(last) = self.log.last_position_of(aggregate) else { return };
        let current = self.log.version_of(aggregate);
        let caller = &mut self.callers[caller];
        caller.knows[aggregate] = caller.knows[aggregate].max(current);
        if self.rules.hold(Rule::ErrorCarriesWhatItShows) {
            caller.token = caller.token.clone().with_read(position(last));
        }
    }

    /// The answer to a write arrives after answers to later requests.
    fn acknowledge(&mut self, caller: usize, index: usize) {
        let caller = &mut self.callers[caller];
        if caller.on_the_way.len() <= index {
            return;
        }
        let (token, aggregate, written) = caller.on_the_way.remove(index);
        caller.token = if self.rules.hold(Rule::ParallelAnswersAreMerged) {
            caller.token.clone().merge(token)
        } else {
            token
        };
        caller.acknowledge(aggregate, written);
    }

    fn share(&mut self, from: usize, to: usize) {
        let Caller { token, knows, wrote, .. } = &self.callers[from];
        let (token, knows, wrote) = (token.clone(), *knows, *wrote);
        let to = &mut self.callers[to];
        to.token = to.token.clone().merge(token);
        learn(&mut to.knows, &knows);
        learn(&mut to.wrote, &wrote);
    }

    fn hear(&mut self, region: usize, index: usize, again: bool) {
        let Region { projector, gateway } = &mut self.regions[region];
        let Some(hint) = projector.hints.get(index).cloned() else { return };
        gateway.hear(self.rules, &hint);
        if !again {
            projector.hints.remove(index);
        }
    }

    fn lose_hint(&mut self, region: usize, index: usize) {
        let hints = &mut self.regions[region].projector.hints;
        if index < hints.len() {
            hints.remove(index);
        }
    }

    fn insert_late(&mut self, region: usize, index: usize) {
        let gateway = &mut self.regions[region].gateway;
        if index < gateway.late.len() {
            let entry = gateway.late.remove(index);
            gateway.keep(entry);
        }
    }

    /// The caller learns what an answer shows, and keeps its token.
    pub fn take_answer(&mut self, caller: usize, answer: &Answer) {
        let caller = &mut self.callers[caller];
        for (aggregate, shown) in answer.shown.iter().enumerate() {
            if let Some(shown) = *shown {
                learn(&mut caller.knows, &self.log.revealed(aggregate, shown));
            }
        }
        caller.token = caller.token.clone().with_read(position(answer.covers));
    }

    /// A page of a walk has been read from a snapshot: `members` of the list, each with its sort key.
    pub fn turn_page(
        &self,
        walk: &mut Walk,
        answer: &Answer,
        mut members: Vec<(u64, usize)>,
    ) -> Result<bool, Violation> {
        members.sort_unstable();
        for (aggregate, shown) in answer.shown.iter().enumerate() {
            let shown = shown.unwrap_or(0);
            if answer.stale.is_none() && shown < walk.knows[aggregate] {
                let text =
                    format!("a later page shows {aggregate} at {shown}: {walk:?} {answer:?}");
                return Err(Violation::new(Promise::G2, text));
            }
            walk.knows[aggregate] = walk.knows[aggregate].max(shown);
        }
        walk.always.retain(|aggregate| members.iter().any(|(_, member)| member == aggregate));
        let next = members.iter().find(|member| walk.after.is_none_or(|after| after < **member));
        if let Some(next) = next {
            walk.after = Some(*next);
            walk.seen.push(next.1);
            return Ok(false);
        }
        match walk.always.iter().find(|aggregate| !walk.seen.contains(aggregate)) {
            Some(missed) => {
                Err(Violation::new(Promise::Pages, format!("{missed} is on no page: {walk:?}")))
            }
            None => Ok(true),
        }
    }

    pub fn members(&self, region: usize, list: u8) -> Vec<(u64, usize)> {
        let documents = self.regions[region].projector.database.documents;
        let members =
            (0..AGGREGATE_COUNT).filter(|aggregate| documents[*aggregate].list == Some(list));
        let sort_key = |aggregate: usize| {
            let document = documents[aggregate];
            let never_changes = self.rules.hold(Rule::SortKeyNeverChanges);
            // Newest first is what one would do without the rule.
            if never_changes { document.created } else { u64::MAX - document.position }
        };
        members.map(|aggregate| (sort_key(aggregate), aggregate)).collect()
    }
}

impl Caller {
    fn acknowledge(&mut self, aggregate: usize, written: u64) {
        self.knows[aggregate] = self.knows[aggregate].max(written);
        self.wrote[aggregate] = self.wrote[aggregate].max(written);
    }
}
