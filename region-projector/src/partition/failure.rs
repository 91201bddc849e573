//! Whether an error of the database is worth another try.

use sqlx::Error;

/// What to do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The same again may well succeed. The label is out of a closed set.
    Transient(&'static str),
    /// The database refuses what is written, and always will. The label is out of a closed set.
    Permanent(&'static str),
}

/// Whether less of the same may succeed where all at once did not: when a statement was ended, most
/// likely since it took too long, or when it met a limit.
pub fn may_be_too_much(reason: &str) -> bool {
    !matches!(reason, "connection" | "serialization")
}

/// Judges by the class of the SQLSTATE. What is not known is tried again: waiting visibly is better
/// than parking what is sound.
pub fn classify(error: &Error) -> Failure {
    // Nothing was sent: what is to be written cannot be.
    if matches!(error, Error::Encode(_)) {
        return Failure::Permanent("refused");
    }
    let Some(error) = error.as_database_error() else { return Failure::Transient("connection") };
    let code = error.code().unwrap_or_default();
    match code.get(..2) {
        Some("22") => Failure::Permanent("data"),
        Some("23") => Failure::Permanent("constraint"),
        Some("54") => Failure::Permanent("limit"),
        Some("08") => Failure::Transient("connection"),
        Some("40") => Failure::Transient("serialization"),
        Some("53") => Failure::Transient("resources"),
        Some("57") => Failure::Transient("intervention"),
        Some(_) | None => Failure::Transient("other"),
    }
}
