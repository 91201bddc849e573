//! What can be wrong with an event, a state or a row.

use consistency::{Name, Version};

/// Why a fold or an upcaster cannot accept an event. The text is for operators.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct FoldError(String);

impl FoldError {
    /// Wraps a reason.
    pub fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

/// An event that cannot be applied, however often it is tried. Its aggregate is to be parked.
#[derive(Debug, thiserror::Error)]
pub enum ProjectionError {
    /// This binary does not know the type. One that does may be deployed later.
    #[error("event type {0} is not known")]
    UnknownEventType(Name),
    /// This binary knows the type, but only older schemas of it.
    #[error(
        "schema version {found} of event type {event_type} is not known, {known} is the newest"
    )]
    UnknownSchemaVersion {
        /// The event's type.
        event_type: Name,
        /// The event's schema version.
        found: u16,
        /// The newest that is known here.
        known: u16,
    },
    /// The data are not what the type says.
    #[error("event data do not decode")]
    Decode(#[source] serde_json::Error),
    /// An upcaster refused the data.
    #[error("event data cannot be brought from schema version {from}")]
    Upcast {
        /// The version that they had.
        from: u16,
        /// Why not.
        source: FoldError,
    },
    /// The event does not fit the state.
    #[error("event does not fold")]
    Fold(#[source] FoldError),
    /// The domain's code panicked on it.
    #[error("fold or rows panicked: {0}")]
    Panic(String),
    /// A state does not decode or encode, or is too large.
    #[error("state is unusable: {0}")]
    State(String),
    /// A row breaks the rules of its view.
    #[error("row of view {view} is unusable: {reason}")]
    Row {
        /// The view's name as the rows named it.
        view: String,
        /// What is wrong.
        reason: String,
    },
}

impl ProjectionError {
    /// A label out of a closed set, for metrics and for the reason of a parked aggregate.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::UnknownEventType(_) => "unknown-event-type",
            Self::UnknownSchemaVersion { .. } => "unknown-schema-version",
            Self::Decode(_) => "decode",
            Self::Upcast { .. } => "upcast",
            Self::Fold(_) => "fold",
            Self::Panic(_) => "panic",
            Self::State(_) => "state",
            Self::Row { .. } => "row",
        }
    }

    /// Whether a binary that knows more event types or schemas may well apply the event.
    pub fn newer_binary_may_know(&self) -> bool {
        match self {
            Self::UnknownEventType(_) | Self::UnknownSchemaVersion { .. } => true,
            Self::Decode(_)
            | Self::Upcast { .. }
            | Self::Fold(_)
            | Self::Panic(_)
            | Self::State(_)
            | Self::Row { .. } => false,
        }
    }
}

/// A column holds what its statement can never return: the schema is not the one expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("column {column} holds {value}, which it never may")]
pub struct ColumnError {
    /// The column's name.
    pub column: &'static str,
    /// What it holds.
    pub value: String,
}

impl ColumnError {
    pub(crate) fn version(version: i64) -> Result<Version, Self> {
        Version::from_i64(version)
            .ok_or_else(|| Self { column: "version", value: version.to_string() })
    }
}
