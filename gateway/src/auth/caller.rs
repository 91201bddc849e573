//! The name of who asks.

use std::{fmt::Write as _, sync::Arc};

use http::{HeaderMap, HeaderValue};

use crate::hop;

/// Bytes of a name as those who know callers spell it.
const NAME_BYTES_MAX: usize = 256;

/// Who asks. Idempotency keys, bounds and rates are each caller's own.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Caller {
    /// Nobody asked who it is.
    Unknown,
    /// Known by a name, in visible ASCII.
    Named(Arc<str>),
}

impl Caller {
    /// By the name that a token or a balancer gives it. `None` when it is none.
    pub fn named(name: &str) -> Option<Self> {
        let bounded = (1..=NAME_BYTES_MAX).contains(&name.len());
        bounded.then(|| Self::Named(visible(name).into()))
    }

    /// As a region that forwards says. Only for one that proved itself.
    pub fn passed_on(headers: &HeaderMap) -> Self {
        let name = headers.get(hop::CALLER).and_then(|name| name.to_str().ok());
        name.map_or(Self::Unknown, |name| Self::Named(name.into()))
    }

    /// As it is passed on to the primary.
    pub fn header(&self) -> Option<HeaderValue> {
        HeaderValue::from_str(self.name()?).ok()
    }

    /// Its name, when it has one.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Unknown => None,
            Self::Named(name) => Some(name),
        }
    }
}

/// What is not visible ASCII goes as `%XX`, and so does `%`, so that no two names look alike.
fn visible(name: &str) -> String {
    name.bytes().fold(String::with_capacity(name.len()), |mut text, byte| {
        if byte.is_ascii_graphic() && byte != b'%' {
            text.push(char::from(byte));
        } else {
            write!(text, "%{byte:02X}").expect("writing to a string cannot fail");
        }
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_survives_its_way_to_the_primary_and_no_two_look_alike() {
        let mut seen = std::collections::HashSet::new();
        for name in ["ada", "ada lovelace", "ada%20lovelace", "J\u{fc}rgen", "a\r\nb: c", "%"] {
            let caller = Caller::named(name).unwrap();
            let mut headers = HeaderMap::new();
            headers.insert(hop::CALLER, caller.header().unwrap());
            assert_eq!(Caller::passed_on(&headers), caller, "{name:?}");
            assert!(seen.insert(caller), "{name:?}");
        }
        assert_eq!(Caller::passed_on(&HeaderMap::new()), Caller::Unknown);
    }

    #[test]
    fn a_name_is_bounded() {
        assert!(Caller::named("").is_none());
        assert!(Caller::named(&"n".repeat(256)).is_some());
        assert!(Caller::named(&"n".repeat(257)).is_none());
    }
}
