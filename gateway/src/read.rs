//! A read, on one page: decode, decide, act, check again, answer.

mod evidence;
mod fold;
mod remembered;
mod on_demand;
mod served;
mod target;

use std::{sync::Arc, time::Duration};

use consistency::{Chain, Decision, Demand, Evidence, LogPosition, Scope, Verdict, decide, judge};
use process::trace::SpanKind;
use projection::ProjectionDefinition;
use tokio::time::Instant;

use crate::{
    answer::{Answer, read_of},
    currency::{Partitions, WaitBounds, Waited},
    epochs,
    error::Error,
    forward::{self, Fallback},
    gateway::{Gateway, Role},
    memory::{Kept, Source},
    problem,
    prospects::{self, Prospects},
    read_models::{Ask, Snapshot},
    request::{Call, PREFERENCE_APPLIED, Wish},
    status::{CACHE_STATUS, CacheStatus, Outcome, Timing},
    trace,
};

use self::target::Target;
pub use self::{
    served::{Item, Page, Sums},
    target::CURSOR_CHARS_MAX,
};

/// Answers a read of a view.
pub async fn view(gateway: &Gateway, call: &Call, view: &str, key: &str) -> Result<Answer, Error> {
    let target = Target::of(gateway, call, view, key)?;
    let wish = call.wish(gateway.policy_of(&target.view))?;
    let demand = target.demand(call)?;
    let mut read = Read {
        gateway,
        call,
        target,
        chain: Chain::new(&wish.policy),
        wish,
        demand,
        outcome: Outcome::Local,
        timing: Timing::default(),
        alone: false,
        cache: CacheStatus::Bypass,
    };
    let answered = read.answer().await;
    // Also a refusal says where its time went.
    let refused = |error| problem::answer(&error, &gateway.config.region, &call.id);
    Ok(Answer { timing: read.timing, ..answered.unwrap_or_else(refused) })
}

/// A read under way.
struct Read<'a> {
    gateway: &'a Gateway,
    call: &'a Call,
    target: Target,
    wish: Wish,
    demand: Demand,
    chain: Chain,
    /// What serving from here will have been.
    outcome: Outcome,
    timing: Timing,
    /// The primary could not be asked.
    alone: bool,
    /// What the rows that are kept in memory were good for.
    cache: CacheStatus,
}

/// What is known of the world: a verdict, and what was seen that it is of. When nothing was seen, it is
/// of what memory knows of the region.
struct Facts {
    verdict: Verdict,
    seen: Option<Seen>,
    /// The watermark that a snapshot was judged by.
    watermark: Option<LogPosition>,
    /// The database did not answer in time.
    is_late: bool,
}

/// What can be served.
enum Seen {
    /// Rows, with the checkpoints of their own snapshot.
    Snapshot(Box<Snapshot>),
    /// A row that was read before, and what was heard since vouches for.
    Kept(Arc<Kept>),
}

impl Facts {
    /// Nothing is known that could be served.
    const fn behind() -> Self {
        Self { verdict: Verdict::Behind, seen: None, watermark: None, is_late: false }
    }
}

impl Read<'_> {
    async fn answer(&mut self) -> Result<Answer, Error> {
        // Boxed: the rest is large, and most requests wait in it.
        if self.target.is_on_demand {
            return Box::pin(self.on_demand()).await;
        }
        let mut answer = match self.remembered() {
            Some(answer) => answer,
            None => Box::pin(self.run()).await?,
        };
        if let Scope::Row(_) = self.target.scope {
            answer.headers.insert(CACHE_STATUS, self.cache.header());
        }
        if let Some(said) = &answer.said {
            self.gateway.instruments.decided(said.outcome);
        }
        if !self.wish.applied.is_empty() {
            answer = answer.with_header(PREFERENCE_APPLIED, &self.wish.applied.to_string());
        }
        Ok(answer)
    }

    /// A row that is kept and may be served at once.
    fn remembered(&mut self) -> Option<Answer> {
        let facts = self.recall()?;
        match (self.decide(&facts), &facts.seen) {
            (Decision::Serve, Some(Seen::Kept(kept))) => Some(self.kept_served(kept)),
            // Nothing else is ever decided of what is current.
            _ => None,
        }
    }

    fn decide(&mut self, facts: &Facts) -> Decision {
        let behind = (facts.verdict == Verdict::Behind).then(|| self.prospects());
        let budget = prospects::budget(self.gateway, self.call, behind, self.alone);
        decide(facts.verdict, self.target.scope, &mut self.chain, &budget)
    }

    /// Who waits, waits in here: every other way to an answer is boxed, so that it takes no room meanwhile.
    async fn run(&mut self) -> Result<Answer, Error> {
        let mut facts = self.first_check().await;
        loop {
            match self.decide(&facts) {
                Decision::Serve => match facts.seen.take() {
                    Some(seen) => return self.served(&seen, facts.verdict),
                    // Memory says so; the rows' own snapshot has the last word.
                    None => facts = self.look().await,
                },
                Decision::ServeStale => {
                    if facts.seen.is_none() {
                        facts = self.look().await;
                    }
                    if let Some(seen) = facts.seen.take() {
                        return self.served(&seen, facts.verdict);
                    }
                }
                Decision::Wait { ms } => facts = self.wait(ms, facts).await?,
                Decision::Forward => match Box::pin(self.forward("forward")).await {
                    Ok(answer) => return Ok(answer),
                    Err(fallback) => facts = fallen_back(fallback, facts),
                },
                Decision::Fold => match Box::pin(self.fold()).await? {
                    Ok(answer) => return Ok(answer),
                    Err(fallback) => facts = fallen_back(fallback, facts),
                },
                Decision::Linearize => match Box::pin(self.linearize()).await? {
                    Ok(answer) => return Ok(answer),
                    Err(fallback) => {
                        // What was seen before is older than what was asked for since.
                        self.outcome = Outcome::Local;
                        facts = fallen_back(fallback, Facts::behind());
                    }
                },
                Decision::Pending => return self.pending(),
                Decision::Refuse(refusal) => return Err(self.prospects().refused(refusal)),
            }
        }
    }

    /// What memory says of the region. The database is asked at once where memory cannot tell: before it
    /// knows the projection, when it may have missed hints, and when only the row can say whether it is
    /// enough.
    async fn first_check(&mut self) -> Facts {
        let standing = self.gateway.currency.standing(&self.target.projection, self.partitions());
        let evidence =
            Evidence { watermark: standing.watermark, row_version: None, parked: Vec::new() };
        let verdict = judge(&self.demand, self.target.scope, &evidence);
        let silence_max = self.gateway.config.read.hints_silence_max.get();
        let currency = &self.gateway.currency;
        let may_be_behind = verdict == Verdict::Behind
            && currency.is_silent(&self.target.projection, silence_max, Instant::now());
        let facts =
            if standing.version.is_none() || self.demand.min_version().is_some() || may_be_behind {
                self.look().await
            } else {
                Facts { verdict, seen: None, watermark: None, is_late: false }
            };
        if facts.verdict == Verdict::Behind {
            currency.asked(&self.target.projection, self.partitions(), self.demand.at());
        }
        facts
    }

    /// Reads the rows and judges them by their own snapshot. One that was being taken already may be
    /// older than what this caller knows: then another is taken for it.
    async fn look(&mut self) -> Facts {
        let began = Instant::now();
        // A database that hangs must leave time to ask somebody else.
        let deadline = self.call.deadline.min(began + self.gateway.config.read.query_timeout.get());
        let mut facts = self.look_once(true, deadline).await;
        let late = |seen: &Seen| matches!(seen, Seen::Snapshot(snapshot) if snapshot.is_late);
        if facts.verdict == Verdict::Behind && facts.seen.as_ref().is_some_and(late) {
            facts = self.look_once(false, deadline).await;
        }
        self.timing.read += began.elapsed();
        facts
    }

    async fn look_once(&mut self, join: bool, deadline: Instant) -> Facts {
        let believed = self.believes_current();
        let (currency, target) = (&self.gateway.currency, &self.target);
        let shelf = self.gateway.memory.shelf(&target.projection);
        let ask = Ask {
            projection: &target.projection,
            view: &target.view,
            question: &target.question,
            version: self.version(),
            join,
        };
        let asked = self.gateway.read_models.ask(ask, || currency.moment(&target.projection));
        match tokio::time::timeout_at(deadline, asked).await {
            // Newer than what the caller was judged by: nobody has said what of it was kept.
            Ok(Ok(snapshot)) if self.is_passed_over(&snapshot) => {
                self.learn_epochs().await;
                Facts::behind()
            }
            Ok(Ok(snapshot)) => {
                if let Some(seen) = evidence::observation(&snapshot, target) {
                    self.gateway.memory.observed(&target.projection, &seen, Source::Read);
                    currency.observed(&target.projection, &seen, Instant::now());
                }
                let evidence = evidence::of(&snapshot, self);
                let verdict = judge(&self.demand, target.scope, &evidence);
                if verdict == Verdict::Behind && believed && !snapshot.is_late {
                    self.gateway.instruments.second_check_failed();
                }
                self.keep(shelf.as_deref(), &snapshot);
                let seen = Some(Seen::Snapshot(Box::new(snapshot)));
                Facts { verdict, seen, watermark: evidence.watermark, is_late: false }
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, view = %target.view, "read models not read");
                Facts { is_late: error.is_timeout(), ..Facts::behind() }
            }
            Err(_) => Facts { is_late: true, ..Facts::behind() },
        }
    }

    fn is_passed_over(&self, snapshot: &Snapshot) -> bool {
        let shown = evidence::shown(snapshot).map(read_of);
        shown.is_some_and(|shown| epochs::is_passed_over(&self.call.token, &shown))
    }

    /// An epoch is in the database before checkpoints count in it.
    async fn learn_epochs(&self) {
        let reading = self.gateway.read_models.epochs();
        match tokio::time::timeout_at(self.call.deadline, reading).await {
            Ok(Ok(Some(history))) => self.gateway.learn_history(history),
            Ok(Ok(None) | Err(_)) | Err(_) => tracing::debug!("epochs not read"),
        }
    }

    /// Blocks until the demand is met here, at most so long.
    async fn wait(&mut self, ms: u32, facts: Facts) -> Result<Facts, Error> {
        let began = Instant::now();
        let mut span = trace::within(self.gateway, self.call, "wait", SpanKind::Internal);
        let until = began + Duration::from_millis(u64::from(ms));
        let mut facts = facts;
        let satisfied = loop {
            let at = self.awaited(&facts);
            let (currency, projection) = (&self.gateway.currency, &self.target.projection);
            let (partitions, caller) = (self.partitions(), self.call.caller.name());
            let query_timeout = self.gateway.config.read.query_timeout.get();
            let bounds = WaitBounds::new(until, self.call.deadline, query_timeout);
            match currency.wait(projection, partitions, at, bounds, caller).await? {
                Waited::TimedOut => {
                    facts = Facts::behind();
                    break false;
                }
                Waited::Satisfied(turn) => {
                    facts = match self.recall() {
                        Some(kept) => kept,
                        None => self.look().await,
                    };
                    // It is the next one's.
                    drop(turn);
                }
            }
            // Memory was ahead of the database and knows better now, or many were released at once and
            // the database was slow; and there is time left.
            let again = facts.verdict == Verdict::Behind && (facts.seen.is_some() || facts.is_late);
            if !again || until <= Instant::now() {
                break facts.verdict != Verdict::Behind;
            }
        };
        span.set("tidemark.satisfied", satisfied);
        self.timing.wait += began.elapsed();
        self.gateway.instruments.waited(began.elapsed(), satisfied);
        if self.outcome == Outcome::Local {
            self.outcome = Outcome::Waited;
        }
        Ok(facts)
    }

    /// What to wait for: the demand, or anything newer than what was looked at and was not enough. As
    /// it was judged then: what was heard since may be what is waited for.
    fn awaited(&self, facts: &Facts) -> LogPosition {
        let judged = facts.watermark;
        let beyond = judged.map(|mark| LogPosition::new(mark.epoch, mark.position.next()));
        beyond.map_or(self.demand.at(), |beyond| beyond.max(self.demand.at()))
    }

    async fn forward(&mut self, policy: &'static str) -> Result<Answer, Fallback> {
        let Role::Region(upstream) = &self.gateway.role else { return Err(Fallback::Failed) };
        let began = Instant::now();
        let answer = forward::read(self.gateway, upstream, self.call, policy).await;
        self.timing.forward += began.elapsed();
        self.alone |= answer.is_err();
        answer
    }

    /// As of the log's head on arrival: here when here is the primary, else there.
    async fn linearize(&mut self) -> Result<Result<Answer, Fallback>, Error> {
        let Role::Primary(store) = &self.gateway.role else {
            return Ok(self.forward("primary").await);
        };
        let head = match tokio::time::timeout_at(self.call.deadline, store.head()).await {
            Ok(Ok(head)) => head.at,
            Ok(Err(error)) => {
                tracing::debug!(%error, "head of the log not read");
                return Ok(Err(Fallback::Failed));
            }
            Err(_) => return Ok(Err(Fallback::Failed)),
        };
        self.demand = self.demand.clone().with_position(head);
        self.outcome = Outcome::Primary;
        self.cache = CacheStatus::Bypass;
        let mut facts = self.look().await;
        if facts.verdict == Verdict::Behind && self.target.scope == Scope::Everything {
            facts = self.wait(self.call.left_ms(), facts).await?;
        }
        match (facts.verdict, facts.seen) {
            (Verdict::Current | Verdict::CurrentButParked, Some(seen)) => {
                self.served(&seen, facts.verdict).map(Ok)
            }
            (Verdict::Parked, _) if self.target.scope == Scope::Everything => {
                Ok(Err(Fallback::Parked))
            }
            // Only a row can be folded.
            (Verdict::Behind, _) if self.target.scope == Scope::Everything => {
                Ok(Err(Fallback::Failed))
            }
            (
                Verdict::Behind | Verdict::Parked | Verdict::Current | Verdict::CurrentButParked,
                _,
            ) => self.fold().await,
        }
    }

    /// Whether memory thinks that this region has what is demanded.
    fn believes_current(&self) -> bool {
        let standing = self.gateway.currency.standing(&self.target.projection, self.partitions());
        standing.watermark.is_some_and(|mark| self.demand.at() <= mark)
    }

    fn prospects(&self) -> Prospects<'_> {
        Prospects {
            gateway: self.gateway,
            projection: &self.target.projection,
            partitions: self.partitions(),
            at: self.demand.at(),
        }
    }

    /// The version whose tables are read, as far as is known.
    fn version(&self) -> Option<u32> {
        if self.target.is_on_demand {
            return Some(self.target.newest_version);
        }
        self.gateway.currency.standing(&self.target.projection, Partitions::All).version
    }

    /// Its rules, when they are in this binary.
    fn definition(&self) -> Option<Arc<ProjectionDefinition>> {
        let version = self.version()?;
        self.gateway.read_models.definition(&self.target.projection, version)
    }

    fn partitions(&self) -> Partitions {
        self.target.partitions(self.definition().as_deref())
    }
}

/// What the world looks like after somebody else could not answer.
fn fallen_back(fallback: Fallback, facts: Facts) -> Facts {
    match fallback {
        Fallback::Parked => Facts { verdict: Verdict::Parked, ..facts },
        // A verdict that may be served was no reason to ask anybody else but for the newest state,
        // and the newest state is not here.
        Fallback::Failed => facts,
    }
}

#[cfg(test)]
mod tests;
