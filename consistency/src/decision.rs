//! What to do with one read: the whole choice, in one pure function.

use crate::{Policy, Scope, Step, Verdict};

/// A policy, and how far it has been used up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    steps: Vec<Step>,
    used: usize,
}

impl Chain {
    /// The whole of a policy.
    pub fn new(policy: &Policy) -> Self {
        Self { steps: policy.steps().to_vec(), used: 0 }
    }

    /// Whether the chain may yet answer 202.
    pub fn allows_pending(&self) -> bool {
        self.steps.contains(&Step::Pending)
    }
}

/// Where the read is being decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In a region that may ask the primary.
    Region,
    /// In a region that may not: the way there is cut, or its budget is gone.
    RegionAlone,
    /// At the primary.
    Primary,
}

/// What the decision may spend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Until the request's deadline, in milliseconds.
    pub left_ms: u32,
    /// The server's bound on one wait, in milliseconds.
    pub wait_ms_max: u32,
    /// Where the read is.
    pub place: Place,
    /// How long a wait does best to last before a trip to the primary, in milliseconds; zero when the
    /// trip is expected to be quicker. `None`: what a trip costs is not known.
    pub worth_waiting_ms: Option<u32>,
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Answer from here: it is current.
    Serve,
    /// Answer from here and say `stale`.
    ServeStale,
    /// Block until current, then decide again with what is left of the chain.
    Wait {
        /// At most this many milliseconds; above zero.
        ms: u32,
    },
    /// Ask the primary; when that cannot be done, decide again with what is left of the chain.
    Forward,
    /// Fold the row from the log, here at the primary; when that fails, decide again.
    Fold,
    /// Read with the log's head on arrival as the demand: here when here is the primary, else there.
    Linearize,
    /// Answer 202.
    Pending,
    /// The chain ended without an answer.
    Refuse(Refusal),
}

/// Why a chain ended without an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Not caught up in time.
    ReplicationPending,
    /// An event of the aggregate could not be applied.
    Parked,
    /// The chain asked for the primary, and it cannot be asked.
    PrimaryUnreachable,
}

/// Chooses. `chain` is moved past the step chosen, so that deciding again tries the next one.
///
/// A read that is current is served at once, unless the chain's next step is `primary`: its caller
/// asked for the world as it is there. Nothing else looks at the world, so the same facts always
/// give the same choice.
pub fn decide(verdict: Verdict, scope: Scope, chain: &mut Chain, budget: &Budget) -> Decision {
    while let Some(step) = chain.steps.get(chain.used).copied() {
        if let Some(served) = served_at_once(verdict)
            && step != Step::Primary
        {
            return served;
        }
        chain.used += 1;
        let followed = chain.steps.get(chain.used).copied();
        let decision = match step {
            Step::Wait { ms } => wait(verdict, scope, ms, followed, budget),
            Step::Forward => forward(scope, budget),
            Step::Pending => Some(Decision::Pending),
            Step::Primary => linearize(budget),
            Step::Eventual => Some(Decision::ServeStale),
        };
        if let Some(decision) = decision {
            return decision;
        }
    }
    let asked_primary_last = chain.steps.last() == Some(&Step::Primary);
    match verdict {
        _ if asked_primary_last => Decision::Refuse(Refusal::PrimaryUnreachable),
        Verdict::Current => Decision::Serve,
        Verdict::CurrentButParked => Decision::ServeStale,
        Verdict::Parked => Decision::Refuse(Refusal::Parked),
        Verdict::Behind => Decision::Refuse(Refusal::ReplicationPending),
    }
}

fn served_at_once(verdict: Verdict) -> Option<Decision> {
    match verdict {
        Verdict::Current => Some(Decision::Serve),
        Verdict::CurrentButParked => Some(Decision::ServeStale),
        Verdict::Behind | Verdict::Parked => None,
    }
}

/// Waiting helps only who is behind. A wait whose length is ours to choose lasts as long as it is worth
/// before the step that follows it: a trip to the primary, or the log itself, from which the primary
/// folds a row in less than the shortest wait.
fn wait(
    verdict: Verdict,
    scope: Scope,
    asked_ms: Option<u32>,
    followed: Option<Step>,
    budget: &Budget,
) -> Option<Decision> {
    if verdict != Verdict::Behind {
        return None;
    }
    let forwards_next = followed == Some(Step::Forward);
    let chosen_ms = match (asked_ms, budget.place, scope) {
        (Some(ms), Place::Region | Place::RegionAlone | Place::Primary, _) => ms,
        (None, Place::Primary, Scope::Row(_)) if forwards_next => 0,
        (None, Place::Region, _) if forwards_next => {
            budget.worth_waiting_ms.unwrap_or(budget.wait_ms_max)
        }
        (None, Place::Region | Place::RegionAlone | Place::Primary, _) => budget.wait_ms_max,
    };
    let ms = chosen_ms.min(budget.wait_ms_max).min(budget.left_ms);
    (0 < ms).then_some(Decision::Wait { ms })
}

fn forward(scope: Scope, budget: &Budget) -> Option<Decision> {
    match (budget.place, scope) {
        (Place::Region, Scope::Row(_) | Scope::Everything) => {
            (0 < budget.left_ms).then_some(Decision::Forward)
        }
        (Place::RegionAlone, Scope::Row(_) | Scope::Everything) => None,
        (Place::Primary, Scope::Row(_)) => Some(Decision::Fold),
        // There is nothing above the primary, and its own projector is the only one who can help.
        (Place::Primary, Scope::Everything) => {
            let ms = budget.left_ms;
            (0 < ms).then_some(Decision::Wait { ms })
        }
    }
}

fn linearize(budget: &Budget) -> Option<Decision> {
    match budget.place {
        Place::Region | Place::Primary => (0 < budget.left_ms).then_some(Decision::Linearize),
        Place::RegionAlone => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AggregateKey;

    const ROW: Scope = Scope::Row(AggregateKey::from_bytes([1; 12]));

    fn budget(place: Place) -> Budget {
        Budget { left_ms: 1000, wait_ms_max: 500, place, worth_waiting_ms: None }
    }

    /// Every decision that a chain leads to when nothing it tries succeeds.
    fn course(verdict: Verdict, scope: Scope, policy: &str, budget: Budget) -> Vec<Decision> {
        let mut chain = Chain::new(&Policy::parse(policy).unwrap());
        let mut course = Vec::new();
        loop {
            let decision = decide(verdict, scope, &mut chain, &budget);
            course.push(decision);
            let ends = !matches!(
                decision,
                Decision::Wait { .. } | Decision::Forward | Decision::Fold | Decision::Linearize
            );
            if ends {
                return course;
            }
        }
    }

    #[test]
    fn what_is_current_is_served_at_once_unless_the_primary_was_asked_for() {
        for policy in ["wait;ms=5", "forward", "pending", "eventual"] {
            assert_eq!(
                course(Verdict::Current, ROW, policy, budget(Place::Region)),
                [Decision::Serve]
            );
        }
        let linear = course(Verdict::Current, ROW, "primary", budget(Place::Region));
        assert_eq!(linear, [Decision::Linearize, Decision::Refuse(Refusal::PrimaryUnreachable)]);
    }

    #[test]
    fn steps_are_tried_in_order_and_the_end_refuses() {
        let region = budget(Place::Region);
        assert_eq!(
            course(Verdict::Behind, ROW, "wait;ms=250, forward, pending", region),
            [Decision::Wait { ms: 250 }, Decision::Forward, Decision::Pending]
        );
        assert_eq!(
            course(Verdict::Behind, ROW, "wait;ms=250, forward", region),
            [
                Decision::Wait { ms: 250 },
                Decision::Forward,
                Decision::Refuse(Refusal::ReplicationPending)
            ]
        );
        assert_eq!(course(Verdict::Behind, ROW, "eventual", region), [Decision::ServeStale]);
    }

    #[test]
    fn a_wait_is_bounded_by_the_server_and_by_the_deadline() {
        let first = |policy, budget| course(Verdict::Behind, ROW, policy, budget)[0];
        assert_eq!(first("wait;ms=9000", budget(Place::Region)), Decision::Wait { ms: 500 });
        let late = Budget { left_ms: 40, ..budget(Place::Region) };
        assert_eq!(first("wait;ms=9000", late), Decision::Wait { ms: 40 });
        assert_eq!(first("wait;ms=0, pending", late), Decision::Pending);
    }

    #[test]
    fn waiting_does_not_mend_what_is_parked() {
        assert_eq!(
            course(Verdict::Parked, ROW, "wait;ms=250, forward", budget(Place::Region)),
            [Decision::Forward, Decision::Refuse(Refusal::Parked)]
        );
        assert_eq!(
            course(Verdict::CurrentButParked, Scope::Everything, "wait", budget(Place::Region)),
            [Decision::ServeStale]
        );
    }

    #[test]
    fn the_primary_folds_rows_and_waits_out_the_deadline_for_the_rest() {
        let primary = budget(Place::Primary);
        assert_eq!(course(Verdict::Behind, ROW, "forward", primary)[0], Decision::Fold);
        assert_eq!(course(Verdict::Behind, ROW, "wait, forward", primary)[0], Decision::Fold);
        let list = course(Verdict::Behind, Scope::Everything, "forward", primary);
        assert_eq!(list[0], Decision::Wait { ms: 1000 });
    }

    #[test]
    fn a_region_on_its_own_skips_what_needs_the_primary() {
        let alone = budget(Place::RegionAlone);
        assert_eq!(course(Verdict::Behind, ROW, "forward, pending", alone), [Decision::Pending]);
        let refused = Decision::Refuse(Refusal::PrimaryUnreachable);
        assert_eq!(course(Verdict::Behind, ROW, "primary", alone), [refused]);
    }

    #[test]
    fn a_wait_of_our_own_choice_is_not_begun_when_the_primary_answers_sooner() {
        let with = |ms| Budget { worth_waiting_ms: Some(ms), ..budget(Place::Region) };
        let first = |policy, budget| course(Verdict::Behind, ROW, policy, budget)[0];
        assert_eq!(first("wait, forward", with(0)), Decision::Forward);
        assert_eq!(first("wait, forward", with(26)), Decision::Wait { ms: 26 });
        assert_eq!(first("wait, pending", with(0)), Decision::Wait { ms: 500 });
        assert_eq!(first("wait;ms=250, forward", with(0)), Decision::Wait { ms: 250 });
    }
}
