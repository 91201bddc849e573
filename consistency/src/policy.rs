//! What a caller, or a view's configuration, wants done when a read is not current here.

use std::fmt;

use sfv::{BareItem, List, ListEntry, Parser};

/// A chain has at most this many steps.
pub const POLICY_STEP_COUNT_MAX: usize = 8;

/// One step of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Block until current, for `ms` milliseconds at most; without `ms` the gateway chooses.
    Wait {
        /// Milliseconds.
        ms: Option<u32>,
    },
    /// Ask the primary region.
    Forward,
    /// Answer 202.
    Pending,
    /// Read at the primary, with the log's head on arrival as the demand.
    Primary,
    /// Serve what is here and say `stale` when it is.
    Eventual,
}

/// A chain of steps, tried in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    steps: Vec<Step>,
}

/// Why a `Consistency-Policy` was refused. The text is safe to show to a caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// Not a list of RFC 9651.
    #[error("is not a list of RFC 9651")]
    Syntax,
    /// No step, or too many.
    #[error("must have 1 to {POLICY_STEP_COUNT_MAX} steps")]
    StepCount,
    /// A step that does not exist.
    #[error("knows wait, forward, pending, primary and eventual, not {0}")]
    UnknownStep(String),
    /// A parameter that the step does not take.
    #[error("step {step} does not take {parameter}")]
    UnknownParameter {
        /// The step.
        step: String,
        /// The parameter.
        parameter: String,
    },
    /// `ms` is not a whole number of milliseconds.
    #[error("ms must be a whole number from 0 to 3600000")]
    Milliseconds,
}

const WAIT_MS_WRITTEN_MAX: i64 = 3_600_000;

impl Policy {
    /// Wait, then forward: what is shipped.
    pub fn shipped() -> Self {
        Self { steps: vec![Step::Wait { ms: None }, Step::Forward] }
    }

    /// A chain of given steps.
    pub fn new(steps: Vec<Step>) -> Result<Self, PolicyError> {
        let fits = (1..=POLICY_STEP_COUNT_MAX).contains(&steps.len());
        if fits { Ok(Self { steps }) } else { Err(PolicyError::StepCount) }
    }

    /// Reads a `Consistency-Policy` header, as in `wait;ms=250, forward, pending`.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let list: List = Parser::new(text).parse().map_err(|_| PolicyError::Syntax)?;
        Self::new(list.iter().map(step_of).collect::<Result<_, _>>()?)
    }

    /// The steps in order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The chain that a `Prefer` header makes of this one: `wait=2` bounds the wait and keeps what
    /// comes after it, `respond-async` answers 202 instead of blocking, both wait and then answer 202.
    pub fn preferring(&self, preference: Preference) -> Self {
        let wait = preference.wait_ms.map(|ms| Step::Wait { ms: Some(ms) });
        let rest: Vec<Step> = if preference.respond_async {
            vec![Step::Pending]
        } else {
            self.steps.iter().copied().filter(|step| !matches!(step, Step::Wait { .. })).collect()
        };
        match (wait, preference.respond_async) {
            (None, false) => self.clone(),
            (None, true) => Self { steps: rest },
            (Some(wait), _) => {
                let room = POLICY_STEP_COUNT_MAX - 1;
                Self { steps: std::iter::once(wait).chain(rest.into_iter().take(room)).collect() }
            }
        }
    }

    /// Whether the chain may answer 202.
    pub fn allows_pending(&self) -> bool {
        self.steps.contains(&Step::Pending)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, step) in self.steps.iter().enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            match step {
                Step::Wait { ms: Some(ms) } => write!(f, "{comma}wait;ms={ms}")?,
                Step::Wait { ms: None } => write!(f, "{comma}wait")?,
                Step::Forward => write!(f, "{comma}forward")?,
                Step::Pending => write!(f, "{comma}pending")?,
                Step::Primary => write!(f, "{comma}primary")?,
                Step::Eventual => write!(f, "{comma}eventual")?,
            }
        }
        Ok(())
    }
}

fn step_of(entry: &ListEntry) -> Result<Step, PolicyError> {
    let ListEntry::Item(item) = entry else { return Err(PolicyError::Syntax) };
    let BareItem::Token(name) = &item.bare_item else { return Err(PolicyError::Syntax) };
    let name = name.as_str();
    let step = match name {
        "wait" => Step::Wait { ms: None },
        "forward" => Step::Forward,
        "pending" => Step::Pending,
        "primary" => Step::Primary,
        "eventual" => Step::Eventual,
        _ => return Err(PolicyError::UnknownStep(name.to_owned())),
    };
    item.params.iter().try_fold(step, |step, (parameter, value)| match step {
        Step::Wait { .. } if parameter.as_str() == "ms" => {
            let ms = value
                .as_integer()
                .map(i64::from)
                .filter(|ms| (0..=WAIT_MS_WRITTEN_MAX).contains(ms));
            Ok(Step::Wait { ms: Some(ms.ok_or(PolicyError::Milliseconds)? as u32) })
        }
        Step::Wait { .. } | Step::Forward | Step::Pending | Step::Primary | Step::Eventual => {
            let (step, parameter) = (name.to_owned(), parameter.as_str().to_owned());
            Err(PolicyError::UnknownParameter { step, parameter })
        }
    })
}

/// What a `Prefer` header (RFC 7240) asks for, as far as it concerns us.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Preference {
    /// `wait=SECONDS`, in milliseconds.
    pub wait_ms: Option<u32>,
    /// `respond-async`.
    pub respond_async: bool,
}

impl Preference {
    /// Reads a `Prefer` header. Preferences that are unknown or make no sense are passed over, as
    /// the RFC wants; the first of a kind counts.
    pub fn parse(text: &str) -> Self {
        let mut preference = Self::default();
        for part in text.split(',') {
            let part = part.split(';').next().unwrap_or_default();
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            let value = value.trim().trim_matches('"');
            match name.trim().to_ascii_lowercase().as_str() {
                "wait" if preference.wait_ms.is_none() => {
                    let seconds = value.parse::<u32>().ok();
                    preference.wait_ms = seconds.map(|seconds| seconds.saturating_mul(1000));
                }
                "respond-async" => preference.respond_async = true,
                _ => {}
            }
        }
        preference
    }

    /// Whether nothing was asked for.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Preference {
    /// As `Preference-Applied` echoes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.wait_ms, self.respond_async) {
            (Some(ms), true) => write!(f, "wait={}, respond-async", ms / 1000),
            (Some(ms), false) => write!(f, "wait={}", ms / 1000),
            (None, true) => write!(f, "respond-async"),
            (None, false) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_reads_as_it_is_written() {
        for text in ["wait;ms=250, forward, pending", "wait, forward", "primary", "eventual"] {
            assert_eq!(Policy::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Policy::shipped().to_string(), "wait, forward");
    }

    #[test]
    fn a_chain_that_is_not_understood_is_refused_whole() {
        let refused = |text: &str| Policy::parse(text).unwrap_err();
        assert_eq!(refused(""), PolicyError::StepCount);
        assert_eq!(refused("wait,,forward"), PolicyError::Syntax);
        assert_eq!(refused("\"wait\""), PolicyError::Syntax);
        assert_eq!(refused("hope"), PolicyError::UnknownStep("hope".into()));
        assert_eq!(refused("wait;ms=-1"), PolicyError::Milliseconds);
        assert_eq!(refused("wait;ms=1.5"), PolicyError::Milliseconds);
        assert_eq!(refused("wait;ms=99999999999"), PolicyError::Milliseconds);
        assert!(matches!(refused("forward;ms=1"), PolicyError::UnknownParameter { .. }));
        assert!(matches!(refused("wait;s=1"), PolicyError::UnknownParameter { .. }));
        assert_eq!(refused(&["forward"; 9].join(", ")), PolicyError::StepCount);
    }

    #[test]
    fn prefer_bounds_the_wait_and_asks_for_202() {
        let shipped = Policy::shipped();
        let chain = |header| shipped.preferring(Preference::parse(header)).to_string();
        assert_eq!(chain("wait=2"), "wait;ms=2000, forward");
        assert_eq!(chain("respond-async"), "pending");
        assert_eq!(chain("respond-async, wait=\"2\""), "wait;ms=2000, pending");
        assert_eq!(chain("return=minimal"), "wait, forward");
        assert_eq!(chain("wait=soon"), "wait, forward");
        assert_eq!(
            Preference::parse("Wait=2, RESPOND-ASYNC;x=1").to_string(),
            "wait=2, respond-async"
        );
    }
}
