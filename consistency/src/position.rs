//! Where an event stands: its position in the log, its version in its aggregate, its epoch.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "u64", into = "u64")]
        pub struct $name(u64);

        impl $name {
            /// Before the first.
            pub const ZERO: Self = Self(0);
            /// The largest: what a signed 64-bit column holds.
            pub const MAX: Self = Self(i64::MAX as u64);

            /// `None` past [`Self::MAX`].
            pub const fn new(value: u64) -> Option<Self> {
                if value <= Self::MAX.0 { Some(Self(value)) } else { None }
            }

            /// From a database column; `None` when negative.
            pub const fn from_i64(value: i64) -> Option<Self> {
                if value < 0 { None } else { Some(Self(value as u64)) }
            }

            /// The plain number.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// For a database column; always fits, see [`Self::MAX`].
            pub const fn as_i64(self) -> i64 {
                self.0 as i64
            }

            /// The one after; stays at [`Self::MAX`].
            pub const fn next(self) -> Self {
                self.plus(1)
            }

            /// `count` further on, no further than [`Self::MAX`].
            pub const fn plus(self, count: u64) -> Self {
                let sum = self.0.saturating_add(count);
                if sum <= Self::MAX.0 { Self(sum) } else { Self::MAX }
            }

            /// The one before; stays at zero.
            pub const fn previous(self) -> Self {
                Self(self.0.saturating_sub(1))
            }

            /// How many lie in `(earlier, self]`; zero when `earlier` is not earlier.
            pub const fn since(self, earlier: Self) -> u64 {
                self.0.saturating_sub(earlier.0)
            }
        }

        impl TryFrom<u64> for $name {
            type Error = &'static str;

            fn try_from(value: u64) -> Result<Self, Self::Error> {
                Self::new(value).ok_or(concat!(stringify!($name), " is past 2^63 - 1"))
            }
        }

        impl From<$name> for u64 {
            fn from(value: $name) -> u64 {
                value.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

counter! {
    /// Place of an event in the global log: 1, 2, 3 ... dense, in commit order. Zero is before the
    /// first event. Within one epoch a position names one event for ever.
    Position
}

counter! {
    /// Count of events of one aggregate, from 1. Zero says that the aggregate has none.
    Version
}

/// Incarnation of the log, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Epoch(u32);

impl Epoch {
    /// The incarnation that every log begins with.
    pub const FIRST: Self = Self(1);

    /// `None` for zero and past `i32::MAX`, which a database column cannot hold.
    pub const fn new(value: u32) -> Option<Self> {
        if value == 0 || value > i32::MAX as u32 { None } else { Some(Self(value)) }
    }

    /// From a database column.
    pub const fn from_i32(value: i32) -> Option<Self> {
        if value <= 0 { None } else { Some(Self(value as u32)) }
    }

    /// The plain number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// For a database column.
    pub const fn as_i32(self) -> i32 {
        self.0 as i32
    }
}

impl TryFrom<u32> for Epoch {
    type Error = &'static str;

    fn try_from(value: u32) -> Result<Self, Self::Error> {
        Self::new(value).ok_or("an epoch is from 1 to 2^31 - 1")
    }
}

impl From<Epoch> for u32 {
    fn from(epoch: Epoch) -> u32 {
        epoch.0
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A position together with the epoch it counts in. Ordered by epoch first: the field order is the
/// law that positions are compared as (epoch, position).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LogPosition {
    /// The incarnation of the log.
    pub epoch: Epoch,
    /// The place in it.
    pub position: Position,
}

impl LogPosition {
    /// Before every event of every epoch.
    pub const ORIGIN: Self = Self { epoch: Epoch::FIRST, position: Position::ZERO };

    /// A position of an epoch.
    pub const fn new(epoch: Epoch, position: Position) -> Self {
        Self { epoch, position }
    }
}

impl fmt::Display for LogPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_of_a_newer_epoch_are_later_whatever_their_number() {
        let old = LogPosition::new(Epoch::FIRST, Position::new(900).unwrap());
        let new = LogPosition::new(Epoch::new(2).unwrap(), Position::new(3).unwrap());
        assert!(old < new);
    }

    #[test]
    fn a_counter_never_leaves_what_a_signed_column_holds() {
        assert_eq!(Position::new(u64::MAX), None);
        assert_eq!(Position::MAX.next(), Position::MAX);
        assert_eq!(Position::ZERO.previous(), Position::ZERO);
        assert_eq!(Position::from_i64(-1), None);
        assert_eq!(Position::MAX.as_i64(), i64::MAX);
        assert!(serde_json::from_str::<Position>("18446744073709551615").is_err());
    }
}
