//! Why the log takes no appends.

/// What contradicts what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalKind {
    /// The stream goes on after the log's end: the log lost its tail.
    StreamAhead,
    /// Stream and log have different events in one place: the log lost its tail and grew on, or somebody
    /// else published.
    StreamDifferent,
    /// An epoch was opened after a place up to which it does not keep what the regions were told.
    EpochTooLate,
    /// The log ends before a place where it was seen to end.
    TailLost,
    /// An operator said so by hand.
    Operator,
}

impl RefusalKind {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::StreamAhead,
        Self::StreamDifferent,
        Self::EpochTooLate,
        Self::TailLost,
        Self::Operator,
    ];

    /// The name, as the database and metrics have it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::StreamAhead => "stream-ahead",
            Self::StreamDifferent => "stream-different",
            Self::EpochTooLate => "epoch-too-late",
            Self::TailLost => "tail-lost",
            Self::Operator => "operator",
        }
    }

    /// What is written by hand has no kind.
    pub(crate) fn from_column(name: Option<&str>) -> Self {
        let known = Self::ALL.into_iter().find(|kind| Some(kind.as_str()) == name);
        known.unwrap_or(Self::Operator)
    }
}

/// What an operator is to look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What contradicts what.
    pub kind: RefusalKind,
    /// The same in words, with places and ids.
    pub because: String,
}
