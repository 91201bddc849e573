//! A read of a service's own data: decide, act, check again, answer. Memory tells whether it is worth
//! asking the service; what the service says that it read tells whether its answer may leave.

use std::time::Duration;

use consistency::{
    Chain, Decision, Demand, Evidence, LogPosition, Refusal, Scope, Verdict, decide, judge,
};
use tokio::time::Instant;

use super::{
    Route,
    answer::{of_service, position},
    backend::{Asked, BackendError, Served},
    forward, headers, unanswered,
};
use crate::{
    answer::Answer,
    body::Body,
    currency::{Partitions, WaitBounds, Waited},
    error::Error,
    forward::Fallback,
    gateway::{Gateway, Role},
    pending, problem,
    prospects::{self, Prospects},
    request::{Call, PREFERENCE_APPLIED, Wish},
    status::{Outcome, Said, Timing},
};

/// Nobody tells when a service's own store moves, so it is asked again: first after this long, then
/// after twice as long each time.
const ASK_AGAIN: Duration = Duration::from_millis(5);
const ASK_AGAIN_MAX: Duration = Duration::from_millis(200);

/// Answers a read.
pub async fn answer(gateway: &Gateway, route: &Route, call: &Call) -> Result<Answer, Error> {
    let wish = call.wish(&route.policy)?;
    let mut read = Read {
        gateway,
        route,
        call,
        chain: Chain::new(&wish.policy),
        wish,
        demand: Demand::of(&call.token, Scope::Everything),
        outcome: Outcome::Local,
        timing: Timing::default(),
        alone: false,
        failure: None,
    };
    let answered = read.answer().await;
    // Also a refusal says where its time went.
    let refused = |error| problem::answer(&error, &gateway.config.region, &call.id);
    Ok(Answer { timing: read.timing, ..answered.unwrap_or_else(refused) })
}

/// A read under way.
struct Read<'a> {
    gateway: &'a Gateway,
    route: &'a Route,
    call: &'a Call,
    wish: Wish,
    demand: Demand,
    chain: Chain,
    /// What serving from here will have been.
    outcome: Outcome,
    timing: Timing,
    /// The primary could not be asked.
    alone: bool,
    /// Why the service did not answer.
    failure: Option<BackendError>,
}

/// What is known: a verdict, and the service's answer that it is of. Without one it is memory's.
struct Facts {
    verdict: Verdict,
    served: Option<Served>,
    /// The service itself was behind, or did not answer: what memory says does not matter now.
    asked: bool,
}

impl Read<'_> {
    async fn answer(&mut self) -> Result<Answer, Error> {
        let facts = self.remembered();
        if facts.verdict == Verdict::Behind {
            let projection = &self.route.projection;
            self.gateway.currency.asked(projection, Partitions::All, self.demand.at());
        }
        let mut answer = self.run(facts).await?;
        if let Some(said) = &answer.said {
            self.gateway.instruments.decided(said.outcome);
        }
        if !self.wish.applied.is_empty() {
            answer = answer.with_header(PREFERENCE_APPLIED, &self.wish.applied.to_string());
        }
        Ok(answer)
    }

    async fn run(&mut self, mut facts: Facts) -> Result<Answer, Error> {
        loop {
            let behind = (facts.verdict == Verdict::Behind).then(|| self.prospects());
            let budget = prospects::budget(self.gateway, self.call, behind, self.alone);
            match decide(facts.verdict, Scope::Everything, &mut self.chain, &budget) {
                Decision::Serve => match facts.served.take() {
                    Some(served) => return self.passed_on(served, facts.verdict),
                    None => facts = self.ask().await,
                },
                Decision::ServeStale => {
                    if facts.served.is_none() {
                        facts = self.ask().await;
                    }
                    if let Some(served) = facts.served.take() {
                        return self.passed_on(served, facts.verdict);
                    }
                }
                Decision::Wait { ms } => facts = self.wait(ms, facts.asked).await?,
                Decision::Forward => match self.forward("forward").await {
                    Ok(answer) => return Ok(answer),
                    Err(_) => facts = Facts { served: None, ..facts },
                },
                // Only rows of our own are folded.
                Decision::Fold => {}
                Decision::Linearize => match self.linearize().await? {
                    Some(answer) => return Ok(answer),
                    None => facts = Facts { verdict: Verdict::Behind, served: None, asked: false },
                },
                Decision::Pending => return Ok(self.pending()),
                Decision::Refuse(refusal) => return Err(self.refused(refusal)),
            }
        }
    }

    /// What memory says.
    fn remembered(&self) -> Facts {
        let watermark = self.standing();
        let verdict = self.judged(watermark);
        Facts { verdict, served: None, asked: false }
    }

    fn standing(&self) -> Option<LogPosition> {
        self.gateway.currency.standing(&self.route.projection, Partitions::All).watermark
    }

    fn judged(&self, watermark: Option<LogPosition>) -> Verdict {
        let evidence = Evidence { watermark, row_version: None, parked: Vec::new() };
        judge(&self.demand, Scope::Everything, &evidence)
    }

    /// Asks the service, and judges its answer by what it says it read. One that does not say is
    /// judged by memory, and labelled.
    async fn ask(&mut self) -> Facts {
        let began = Instant::now();
        let remembered = self.remembered().verdict;
        let (call, path_and_query) = (self.call, self.call.path_and_query());
        let asked = || Asked {
            method: &call.method,
            path_and_query: &path_and_query,
            headers: headers::outgoing(self.gateway, call),
            body: Body::from(call.body.clone()),
            deadline: call.deadline,
        };
        let again = || call.method.is_safe().then(asked);
        let served = self.route.backend.ask(asked(), again).await;
        self.timing.read += began.elapsed();
        match served {
            Ok(served) => {
                let read = position(&served.headers);
                let verdict = read.map_or(remembered, |at| self.judged(Some(at)));
                if verdict == Verdict::Behind && remembered == Verdict::Current {
                    self.gateway.instruments.second_check_failed();
                }
                self.failure = None;
                Facts { verdict, served: Some(served), asked: read.is_some() }
            }
            Err(error) => {
                tracing::debug!(%error, request_id = &*self.call.id, "the service did not answer");
                self.failure = Some(error);
                Facts { verdict: Verdict::Behind, served: None, asked: true }
            }
        }
    }

    /// Blocks until the region has caught up as far as memory can tell, then asks the service until
    /// it has caught up too.
    async fn wait(&mut self, ms: u32, asked: bool) -> Result<Facts, Error> {
        let began = Instant::now();
        let until = began + Duration::from_millis(u64::from(ms));
        let facts = self.waited(until, asked).await?;
        self.timing.wait += began.elapsed();
        self.gateway.instruments.waited(began.elapsed(), facts.verdict != Verdict::Behind);
        if self.outcome == Outcome::Local {
            self.outcome = Outcome::Waited;
        }
        Ok(facts)
    }

    async fn waited(&mut self, until: Instant, mut asked: bool) -> Result<Facts, Error> {
        let mut pause = ASK_AGAIN;
        loop {
            let mut turn = None;
            if asked {
                let again = Instant::now() + pause;
                tokio::time::sleep_until(again.min(until)).await;
                pause = (pause * 2).min(ASK_AGAIN_MAX);
            } else {
                let (currency, at) = (&self.gateway.currency, self.demand.at());
                let (projection, caller) = (&self.route.projection, self.call.caller.name());
                // The service has the whole time that is left: there is no sooner end to the line.
                let bounds = WaitBounds::new(until, self.call.deadline, Duration::ZERO);
                match currency.wait(projection, Partitions::All, at, bounds, caller).await? {
                    Waited::Satisfied(mine) => turn = mine,
                    Waited::TimedOut => {
                        return Ok(Facts { verdict: Verdict::Behind, served: None, asked: false });
                    }
                }
            }
            let facts = self.ask().await;
            // It is the next one's.
            drop(turn);
            if facts.verdict != Verdict::Behind || until <= Instant::now() {
                return Ok(facts);
            }
            asked = true;
        }
    }

    async fn forward(&mut self, policy: &'static str) -> Result<Answer, Fallback> {
        let Role::Region(upstream) = &self.gateway.role else { return Err(Fallback::Failed) };
        let began = Instant::now();
        let answer = forward::read(self.gateway, upstream, self.route, self.call, policy).await;
        self.timing.forward += began.elapsed();
        self.alone |= answer.is_err();
        answer
    }

    /// As of the log's head on arrival: here when here is the primary, else there.
    async fn linearize(&mut self) -> Result<Option<Answer>, Error> {
        let Role::Primary(store) = &self.gateway.role else {
            return Ok(self.forward("primary").await.ok());
        };
        let Ok(Ok(head)) = tokio::time::timeout_at(self.call.deadline, store.head()).await else {
            return Ok(None);
        };
        self.demand = self.demand.clone().with_position(head.at);
        self.outcome = Outcome::Primary;
        let facts = self.wait(self.call.left_ms(), false).await?;
        let current = facts.verdict != Verdict::Behind;
        let served = facts.served.filter(|_| current);
        served.map(|served| self.passed_on(served, facts.verdict)).transpose()
    }

    /// The service's answer, labelled by what it says of itself.
    fn passed_on(&self, served: Served, verdict: Verdict) -> Result<Answer, Error> {
        let at = position(&served.headers);
        let parked = self.gateway.seen.progress(self.route.projection.as_str()).parked_count;
        let (outcome, reason) = match (verdict, at) {
            (Verdict::Behind, _) => (Outcome::Stale, Some("behind")),
            (Verdict::Parked | Verdict::CurrentButParked, _) => (Outcome::Stale, Some("parked")),
            (Verdict::Current, None) => (Outcome::Unverified, None),
            // Its rows may come from the projection, which passes over what is parked.
            (Verdict::Current, Some(_)) if 0 < parked => (Outcome::Unverified, Some("parked")),
            (Verdict::Current, Some(_)) => (self.outcome, None),
        };
        let answer = of_service(self.gateway, self.route, served)?;
        Ok(answer.saying(self.said(outcome, at, reason)))
    }

    fn said(
        &self,
        outcome: Outcome,
        at: Option<LogPosition>,
        reason: Option<&'static str>,
    ) -> Said {
        let ms = u64::try_from(self.call.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        Said { outcome, ms, region: self.gateway.config.region.clone(), at, reason }
    }

    /// 202: the caller asked to be told instead of kept waiting. Shows nothing.
    fn pending(&self) -> Answer {
        let lag = self.prospects().lag();
        let answer = pending::answer(self.gateway, self.call, &lag, None);
        answer.saying(self.said(Outcome::Pending, lag.applied, None))
    }

    fn prospects(&self) -> Prospects<'_> {
        Prospects {
            gateway: self.gateway,
            projection: &self.route.projection,
            partitions: Partitions::All,
            at: self.demand.at(),
        }
    }

    fn refused(&mut self, refusal: Refusal) -> Error {
        match self.failure.take() {
            Some(error) => unanswered(error),
            None => self.prospects().refused(refusal),
        }
    }
}
