//! What `gateway token inspect` says of a token.

use std::fmt::Write as _;

use consistency::{EpochHistory, LogId, TokenStatus, Unverified};

use crate::config::GatewayConfig;

/// What is known of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspected {
    /// For people to read.
    pub text: String,
    /// It is a token, and no key speaks against it.
    pub is_sound: bool,
}

/// Looks at a token, and checks its seal with the keys of `config`, if there is one. Its epoch is not
/// judged: which epochs there are is known by the log alone.
pub fn inspect(sealed: &str, config: Option<&GatewayConfig>) -> Inspected {
    let seen = match Unverified::read(sealed) {
        Ok(seen) => seen,
        Err(refused) => {
            return Inspected { text: format!("{}\n", verdict(&refused)), is_sound: false };
        }
    };
    let token = &seen.token;
    let mut text = String::new();
    let mut line = |name: &str, value: &dyn std::fmt::Display| {
        writeln!(text, "{name:<14} {value}").expect("writing to a string cannot fail");
    };
    line("key", &seen.key);
    line("epoch", &token.epoch());
    line("read position", &token.read_position());
    for claim in token.claims() {
        let aggregate = claim.aggregate.as_bytes().iter().fold(String::new(), |mut hex, byte| {
            write!(hex, "{byte:02x}").expect("writing to a string cannot fail");
            hex
        });
        let (version, position) = (claim.version, claim.position);
        line("claim", &format!("aggregate {aggregate}, version {version}, position {position}"));
    }
    line("older claims", &if token.claims_dropped() { "dropped" } else { "none" });
    let (seal, is_sound) = match config {
        None => ("not checked, there are no keys without --config", true),
        Some(config) => checked(sealed, &seen, config),
    };
    line("seal", &seal);
    Inspected { text, is_sound }
}

fn checked(sealed: &str, seen: &Unverified, config: &GatewayConfig) -> (&'static str, bool) {
    if !seen.is_of(LogId::new(config.log.id)) {
        return (verdict(&TokenStatus::OtherLog), false);
    }
    let Ok(ring) = config.key_ring() else { return ("not checked, the keys make no ring", false) };
    let status = ring.open(sealed, &EpochHistory::first());
    let fits = matches!(
        status,
        TokenStatus::Valid(_)
            | TokenStatus::OlderEpoch(_)
            | TokenStatus::NewerEpoch(_)
            | TokenStatus::Lost(_)
    );
    (verdict(&status), fits)
}

const fn verdict(status: &TokenStatus) -> &'static str {
    match status {
        TokenStatus::Valid(_)
        | TokenStatus::OlderEpoch(_)
        | TokenStatus::NewerEpoch(_)
        | TokenStatus::Lost(_) => "fits",
        TokenStatus::Absent | TokenStatus::Malformed => "this is no token",
        TokenStatus::Forged => {
            "does not fit: the contents were changed, or another secret sealed it"
        }
        TokenStatus::UnknownKey(_) => "its key is not among the configured ones",
        TokenStatus::UnknownFormat(_) => "a token of another release, which cannot be read here",
        TokenStatus::OtherLog => "it is of another log",
    }
}
