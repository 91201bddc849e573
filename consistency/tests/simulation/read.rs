//! One read, from the caller's token to the answer it gets, by way of every step of its policy.

use consistency::{Budget, Chain, Decision, Demand, Place, Policy, Scope, Step, Verdict, decide};

use super::{
    action::{Read, Wish},
    database::Database,
    gateway::{What, demand_of},
    log::{AGGREGATE_COUNT, at, version},
    oracle::{Answer, Promise, Stale, Violation, Walk},
    rules::Rule,
    world::World,
};

impl Wish {
    fn chain(self) -> Chain {
        let steps = match self {
            Wish::Shipped => return Chain::new(&Policy::shipped()),
            Wish::Pending => vec![Step::Wait { ms: Some(50) }, Step::Pending],
            Wish::Eventual => vec![Step::Eventual],
            Wish::Primary => vec![Step::Primary],
        };
        Chain::new(&Policy::new(steps).expect("one or two steps fit"))
    }
}

/// A read on its way.
struct Asked {
    what: What,
    scope: Scope,
    demand: Demand,
    /// Whether everything that is behind catches up while the read waits.
    patient: bool,
    /// Whether a lagging gateway reads a version that was dropped meanwhile.
    dropped: bool,
    late: bool,
    token: consistency::Token,
}

impl World {
    pub fn read(&mut self, read: Read) -> Result<(), Violation> {
        let token = self.callers[read.caller].token.clone();
        let scope = read.what.scope();
        let mut demand = demand_of(self.rules, &token, scope);
        if read.min_version > 0 && self.rules.hold(Rule::MinVersionIsMetByVersion) {
            demand = demand.with_min_version(version(read.min_version));
        }
        let Read { what, patient, dropped, late, .. } = read;
        let asked = Asked { what, scope, demand, patient, dropped, late, token };
        let place = match (read.region, read.alone) {
            (0, _) => Place::Primary,
            (_, true) => Place::RegionAlone,
            (_, false) => Place::Region,
        };
        let head: Vec<u64> = (0..AGGREGATE_COUNT).map(|a| self.log.version_of(a)).collect();
        let Some(answer) = self.answer(read.region, &asked, &mut read.wish.chain(), place)? else {
            self.tally.unanswered += 1;
            return Ok(());
        };
        match answer.stale {
            None => self.tally.current += 1,
            Some(Stale::Eventual) => self.tally.eventual += 1,
            Some(Stale::Parked) => self.tally.parked += 1,
        }
        self.callers[read.caller].check(&answer)?;
        check_asked(&read, &answer, &head)?;
        self.take_answer(read.caller, &answer);
        Ok(())
    }

    /// The next page of the caller's walk over a list, by its cursor alone.
    pub fn turn(&mut self, caller: usize, region: usize, list: u8) -> Result<(), Violation> {
        let walk = self.callers[caller].walk.take();
        let mut demand = Demand::none();
        if let (Some(walk), true) = (&walk, self.rules.hold(Rule::CursorCarriesPosition)) {
            demand = demand.with_position(walk.cursor);
        }
        let list = walk.as_ref().map_or(list, |walk| walk.list);
        let what = What::List;
        let token = consistency::Token::new(consistency::Epoch::FIRST);
        let scope = what.scope();
        let asked =
            Asked { what, scope, demand, patient: false, dropped: false, late: false, token };
        let place = if region == 0 { Place::Primary } else { Place::RegionAlone };
        let Some(answer) = self.answer(region, &asked, &mut Wish::Pending.chain(), place)? else {
            self.callers[caller].walk = walk;
            return Ok(());
        };
        let members = self.members(region, list);
        let mut walk = walk.unwrap_or_else(|| Walk {
            list,
            after: None,
            cursor: at(0),
            knows: [0; AGGREGATE_COUNT],
            seen: Vec::new(),
            always: members.iter().map(|(_, aggregate)| *aggregate).collect(),
        });
        let ended = self.turn_page(&mut walk, &answer, members)?;
        walk.cursor = walk.cursor.max(at(answer.covers));
        self.callers[caller].walk = (!ended).then_some(walk);
        Ok(())
    }

    fn answer(
        &mut self,
        region: usize,
        asked: &Asked,
        chain: &mut Chain,
        place: Place,
    ) -> Result<Option<Answer>, Violation> {
        let budget = Budget { left_ms: 1000, wait_ms_max: 500, place, worth_waiting_ms: None };
        let mut recalled = self.regions[region].gateway.recall(asked.what, &asked.demand);
        loop {
            let snapshot = self.snapshot(region, asked);
            let verdict = match &recalled {
                Some(_) => Verdict::Current,
                None => self.judge(region, asked, &snapshot),
            };
            let answer = match decide(verdict, asked.scope, chain, &budget) {
                Decision::Serve => Some(match recalled.take() {
                    Some(answer) => {
                        self.tally.recalled += 1;
                        answer
                    }
                    None => self.serve(region, asked, &snapshot),
                }),
                Decision::ServeStale => {
                    let shown =
                        self.regions[region].gateway.show(self.rules, asked.what, &snapshot);
                    Some(Answer { stale: self.label(verdict), ..shown })
                }
                Decision::Wait { .. } => {
                    if asked.patient {
                        self.regions[region].projector.catch_up(self.rules, &self.log)?;
                    }
                    None
                }
                Decision::Forward => self.forward(asked)?,
                Decision::Fold => {
                    let folded = self.fold(asked);
                    self.tally.folded += u64::from(folded.is_some());
                    folded
                }
                Decision::Linearize => self.linearize(asked)?,
                Decision::Pending | Decision::Refuse(_) => return Ok(None),
            };
            if answer.is_some() {
                return Ok(answer);
            }
            recalled = None;
        }
    }

    fn label(&self, verdict: Verdict) -> Option<Stale> {
        match verdict {
            Verdict::Current => None,
            Verdict::Behind | Verdict::Parked => Some(Stale::Eventual),
            Verdict::CurrentButParked => {
                self.rules.hold(Rule::ParkedListIsLabelled).then_some(Stale::Parked)
            }
        }
    }

    fn snapshot(&self, region: usize, asked: &Asked) -> Database {
        let database = &self.regions[region].projector.database;
        if asked.dropped {
            database.dropped(self.rules.hold(Rule::DropTakesCheckpointsAlong))
        } else {
            database.clone()
        }
    }

    fn judge(&self, region: usize, asked: &Asked, snapshot: &Database) -> Verdict {
        let gateway = &self.regions[region].gateway;
        gateway.judge(self.rules, asked.what, &asked.token, &asked.demand, snapshot)
    }

    fn serve(&mut self, region: usize, asked: &Asked, snapshot: &Database) -> Answer {
        let gateway = &mut self.regions[region].gateway;
        let answer = gateway.show(self.rules, asked.what, snapshot);
        if let Some(entry) = gateway.entry(self.rules, asked.what, snapshot, &answer) {
            if asked.late {
                gateway.late.push(entry);
            } else {
                gateway.keep(entry);
            }
        }
        answer
    }

    fn forward(&mut self, asked: &Asked) -> Result<Option<Answer>, Violation> {
        let forwarded = Asked {
            dropped: false,
            token: asked.token.clone(),
            demand: asked.demand.clone(),
            ..*asked
        };
        if asked.scope == Scope::Everything && !self.rules.hold(Rule::ForwardedListIsJudged) {
            let snapshot = self.snapshot(0, &forwarded);
            return Ok(Some(self.serve(0, &forwarded, &snapshot)));
        }
        let chain = &mut Chain::new(&Policy::new(vec![Step::Forward]).expect("one step fits"));
        self.answer(0, &forwarded, chain, Place::Primary)
    }

    /// The row made from the log, at the primary.
    fn fold(&self, asked: &Asked) -> Option<Answer> {
        let What::Row(aggregate) = asked.what else { return None };
        let primary = &self.regions[0].projector;
        if self.log.events_of(aggregate).any(|event| event.poison && !primary.cured) {
            return None;
        }
        let has = self.log.version_of(aggregate);
        if asked.demand.min_version().is_some_and(|asked| version(has) < asked) {
            return None;
        }
        let mut shown = [None; AGGREGATE_COUNT];
        shown[aggregate] = Some(has);
        let last = self.log.last_position_of(aggregate);
        let covers = if self.rules.hold(Rule::FoldTokenIsLogPosition) {
            last.unwrap_or(self.log.head())
        } else {
            primary.database.largest_checkpoint()
        };
        Some(Answer { shown, parked: [None; AGGREGATE_COUNT], covers, reports: last, stale: None })
    }

    fn linearize(&mut self, asked: &Asked) -> Result<Option<Answer>, Violation> {
        let demand = asked.demand.clone().with_position(at(self.log.head()));
        let asked = Asked { dropped: false, demand, token: asked.token.clone(), ..*asked };
        let chain = &mut Chain::new(&Policy::new(vec![Step::Forward]).expect("one step fits"));
        self.answer(0, &asked, chain, Place::Primary)
    }
}

/// What the request itself asked for is in the answer.
fn check_asked(read: &Read, answer: &Answer, head: &[u64]) -> Result<(), Violation> {
    if answer.stale.is_some() {
        return Ok(());
    }
    for (aggregate, shown) in answer.shown.iter().enumerate() {
        let Some(shown) = *shown else { continue };
        if read.wish == Wish::Primary && shown < head[aggregate] {
            let text = format!("{aggregate} at {shown}, log has {head:?}");
            return Err(Violation::new(Promise::Linearizable, text));
        }
        if shown < read.min_version && matches!(read.what, What::Row(_)) {
            let text = format!("{aggregate} at {shown}, asked for {}", read.min_version);
            return Err(Violation::new(Promise::MinVersion, text));
        }
    }
    Ok(())
}
