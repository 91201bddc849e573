//! Whether an event of an aggregate may be applied to the state that is here.

use crate::Version;

/// What to do with an event, given the version of the state it would be applied to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It is the next one.
    Apply,
    /// It is in the state already.
    Duplicate,
    /// Events between `state` and it are missing. Applying it would hide them.
    Gap,
}

/// An aggregate's events are applied one by one, none left out: `event` must be `state + 1`.
pub fn admit(state: Version, event: Version) -> Admission {
    if event <= state {
        Admission::Duplicate
    } else if event == state.next() {
        Admission::Apply
    } else {
        Admission::Gap
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_next_version_is_applied() {
        let version = |v| Version::new(v).unwrap();
        assert_eq!(admit(Version::ZERO, version(1)), Admission::Apply);
        assert_eq!(admit(version(3), version(3)), Admission::Duplicate);
        assert_eq!(admit(version(3), version(1)), Admission::Duplicate);
        assert_eq!(admit(version(3), version(4)), Admission::Apply);
        assert_eq!(admit(version(3), version(5)), Admission::Gap);
    }
}
