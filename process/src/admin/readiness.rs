//! Whether this instance should be given work, as a set of named conditions.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use serde::Serialize;

/// How one part of the instance is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", content = "reason", rename_all = "kebab-case")]
pub enum Condition {
    /// Nothing to report.
    Ready,
    /// It works, and the reason is worth knowing.
    Degraded(String),
    /// It cannot work: only ever for this instance's own troubles. What ails the whole region is
    /// `Degraded`, or a balancer would take every instance out at once.
    NotReady(String),
}

/// The conditions of one instance. Cheap to clone, shared by all clones.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    conditions: BTreeMap<&'static str, Condition>,
    lag_ms: Option<u64>,
}

/// What `/readyz` answers.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Whether to send work here.
    pub ready: bool,
    /// Whether something is `Degraded`.
    pub degraded: bool,
    /// How far the read models are behind, when that is known.
    pub lag_ms: Option<u64>,
    /// Every condition that was ever set.
    pub conditions: BTreeMap<&'static str, Condition>,
}

impl Readiness {
    /// Sets one condition, and logs it when it changes.
    pub fn set(&self, name: &'static str, condition: Condition) {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.conditions.get(name) != Some(&condition) {
            match &condition {
                Condition::Ready => tracing::info!(condition = name, "ready"),
                Condition::Degraded(reason) => {
                    tracing::warn!(condition = name, reason, "degraded");
                }
                Condition::NotReady(reason) => {
                    tracing::warn!(condition = name, reason, "not ready");
                }
            }
            shared.conditions.insert(name, condition);
        }
    }

    /// Sets how far the read models are behind.
    pub fn set_lag_ms(&self, lag_ms: Option<u64>) {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).lag_ms = lag_ms;
    }

    /// Whether no condition is `NotReady`.
    pub fn is_ready(&self) -> bool {
        self.report(None).ready
    }

    /// All of it. With `lag_ms_max`, lag above it, or unknown, counts as not ready.
    pub fn report(&self, lag_ms_max: Option<u64>) -> Report {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let holds = |wanted: fn(&Condition) -> bool| shared.conditions.values().any(wanted);
        let late = lag_ms_max.is_some_and(|max| shared.lag_ms.is_none_or(|lag| max < lag));
        Report {
            ready: !holds(|condition| matches!(condition, Condition::NotReady(_))) && !late,
            degraded: holds(|condition| matches!(condition, Condition::Degraded(_))),
            lag_ms: shared.lag_ms,
            conditions: shared.conditions.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lag_takes_an_instance_out_only_for_those_who_ask() {
        let readiness = Readiness::default();
        readiness.set("database", Condition::Ready);
        readiness.set("lag", Condition::Degraded("9 s behind".to_owned()));
        readiness.set_lag_ms(Some(9_000));
        let report = readiness.report(None);
        assert!(report.ready && report.degraded);
        assert!(!readiness.report(Some(5_000)).ready);
        assert!(readiness.report(Some(10_000)).ready);
        readiness.set("database", Condition::NotReady("gone".to_owned()));
        assert!(!readiness.is_ready());
    }

    #[test]
    fn unknown_lag_is_not_small_lag() {
        assert!(!Readiness::default().report(Some(5_000)).ready);
    }
}
