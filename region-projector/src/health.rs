//! What ails the projector, gathered from its many parts into the conditions of `/readyz`.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};

use process::admin::{Condition, Readiness};

/// Something that can be unwell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Not everything is set up yet.
    Start,
    /// The region's database.
    Database,
    /// The region's stream.
    Stream,
    /// The primary's log over HTTP.
    Log,
    /// The unbroken chain of events; an operator is needed.
    Chain,
    /// A projection that stopped since too much would be parked; an operator is needed.
    Breaker,
    /// Aggregates that are parked.
    Parked,
    /// A projection that an operator has paused.
    Paused,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Database => "database",
            Self::Stream => "stream",
            Self::Log => "log",
            Self::Chain => "chain",
            Self::Breaker => "breaker",
            Self::Parked => "parked",
            Self::Paused => "paused",
        }
    }

    fn condition(self, reason: String) -> Condition {
        match self {
            Self::Start | Self::Database | Self::Chain | Self::Breaker => {
                Condition::NotReady(reason)
            }
            Self::Stream | Self::Log | Self::Parked | Self::Paused => Condition::Degraded(reason),
        }
    }
}

/// More troubles of a part than this are counted and not named.
const NAMED_MAX: usize = 8;

/// The troubles of all parts. Cheap to clone, shared by all clones.
#[derive(Debug, Clone, Default)]
pub struct Health {
    readiness: Readiness,
    troubles: Arc<Mutex<BTreeMap<(Part, String), String>>>,
}

impl Health {
    /// What `/readyz` shows.
    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    /// `who` has a trouble with a part, until it says otherwise.
    pub fn unwell(&self, part: Part, who: impl Display, reason: impl Display) {
        self.change(part, |troubles| {
            troubles.insert((part, who.to_string()), reason.to_string());
        });
    }

    /// `who` has no trouble with a part.
    pub fn well(&self, part: Part, who: impl Display) {
        self.change(part, |troubles| {
            troubles.remove(&(part, who.to_string()));
        });
    }

    /// Nothing is said any more of a version and its partitions.
    pub fn forget(&self, version: &str) {
        let is_of = |who: &str| {
            let rest = who.strip_prefix(version);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
        };
        let troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        let of: Vec<_> = troubles.keys().filter(|(_, who)| is_of(who)).cloned().collect();
        drop(troubles);
        for (part, who) in of {
            self.well(part, who);
        }
    }

    fn change(&self, part: Part, change: impl FnOnce(&mut BTreeMap<(Part, String), String>)) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut troubles);
        let of_part = || troubles.iter().filter(|((of, _), _)| *of == part);
        let mut said: Vec<_> = of_part()
            .take(NAMED_MAX)
            .map(|((_, who), reason)| format!("{who}: {reason}"))
            .collect();
        let unsaid = of_part().skip(NAMED_MAX).count();
        if unsaid != 0 {
            said.push(format!("and {unsaid} more"));
        }
        let condition =
            if said.is_empty() { Condition::Ready } else { part.condition(said.join("; ")) };
        // Under the lock, so that the condition is that of the newest change.
        self.readiness.set(part.name(), condition);
    }
}

/// The text of an error with all its causes, for a log line or a condition.
pub fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_well_when_everyone_says_so() {
        let health = Health::default();
        health.unwell(Part::Database, "orders/0", "gone");
        health.unwell(Part::Database, "orders/1", "gone");
        health.well(Part::Database, "orders/0");
        assert!(!health.readiness().is_ready());
        health.well(Part::Database, "orders/1");
        assert!(health.readiness().is_ready());
    }

    #[test]
    fn everyone_with_a_trouble_is_named_up_to_a_bound() {
        let health = Health::default();
        health.unwell(Part::Log, "epochs", "timed out");
        health.unwell(Part::Log, "partition 3", "refused");
        let said = |health: &Health| health.readiness().report(None).conditions["log"].clone();
        let both = "epochs: timed out; partition 3: refused".to_owned();
        assert_eq!(said(&health), Condition::Degraded(both));
        health.well(Part::Log, "epochs");
        assert_eq!(said(&health), Condition::Degraded("partition 3: refused".to_owned()));
        for n in 0..10 {
            health.unwell(Part::Log, format!("partition {n}"), "refused");
        }
        let Condition::Degraded(all) = said(&health) else { panic!("{:?}", said(&health)) };
        assert!(all.ends_with("partition 7: refused; and 2 more"), "{all}");
    }

    #[test]
    fn what_ails_the_region_is_degraded_only() {
        let health = Health::default();
        health.unwell(Part::Log, "orders", "cannot be reached");
        let report = health.readiness().report(None);
        assert!(report.ready && report.degraded);
    }
}
