//! Kinds of values that configurations are made of.

use std::{fmt, time::Duration};

use serde::Deserialize;

/// A length of time, written `250ms`, `2s`, `1m` or `1h`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Period(Duration);

impl Period {
    /// So many milliseconds.
    pub const fn from_millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }

    /// So many seconds.
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// As the standard library has it.
    pub const fn get(self) -> Duration {
        self.0
    }

    /// In milliseconds, at most `u32::MAX`.
    pub fn millis(self) -> u32 {
        u32::try_from(self.0.as_millis()).unwrap_or(u32::MAX)
    }
}

impl TryFrom<String> for Period {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let refused = || format!("{text:?} is not a length of time like 250ms, 2s, 1m or 1h");
        let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(refused)?;
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| refused())?;
        let millis_each = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(refused()),
        };
        number.checked_mul(millis_each).map(Self::from_millis).ok_or_else(refused)
    }
}

impl fmt::Debug for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A text that is never printed.
#[derive(Clone, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for the one who has to send it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Compares without telling by its duration how much of `presented` was right.
    pub fn matches(&self, presented: &str) -> bool {
        let (ours, theirs) = (self.0.as_bytes(), presented.as_bytes());
        let differences = ours.iter().zip(theirs).fold(0, |seen, (a, b)| seen | (a ^ b));
        ours.len() == theirs.len() && std::hint::black_box(differences) == 0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A URL that may hold a password, which is left out when it is printed.
#[derive(Clone, Deserialize)]
#[serde(transparent)]
pub struct SecretUrl(String);

impl SecretUrl {
    /// Wraps a URL.
    pub fn new(url: impl Into<String>) -> Self {
        Self(url.into())
    }

    /// The whole of it, for the one who connects.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for SecretUrl {
    /// Everything between the scheme and the host is left out, and so is the query, since both
    /// are places for passwords.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.0.split('?').next().unwrap_or_default();
        let (scheme, rest) = shown.split_once("://").unwrap_or(("", shown));
        match rest.rsplit_once('@') {
            Some((_, host)) => write!(f, "{scheme}://***@{host}"),
            None => f.write_str(shown),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_reads_its_unit_and_refuses_a_bare_number() {
        let period = |text: &str| Period::try_from(text.to_owned());
        assert_eq!(period("250ms"), Ok(Period::from_millis(250)));
        assert_eq!(period("2s"), Ok(Period::from_secs(2)));
        assert_eq!(period("1m"), Ok(Period::from_secs(60)));
        assert_eq!(period("1h"), Ok(Period::from_secs(3600)));
        for bad in ["", "5", "ms", "-1s", "1.5s", "1d", "18446744073709551615h"] {
            assert!(period(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn secrets_do_not_print() {
        assert_eq!(format!("{:?}", Secret::new("hush")), "***");
        let url = SecretUrl::new("postgres://me:p@ss@db:5432/x?password=hush");
        assert_eq!(format!("{url:?}"), "postgres://***@db:5432/x");
        assert_eq!(SecretUrl::new("nats://db:4222").to_string(), "nats://db:4222");
    }

    #[test]
    fn a_secret_matches_itself_only() {
        let secret = Secret::new("hush");
        assert!(secret.matches("hush"));
        for other in ["", "hus", "hush!", "husk"] {
            assert!(!secret.matches(other), "{other}");
        }
    }
}
