//! How tokens come in and go out: the header, and for browsers its cookie twin.

use consistency::{EpochHistory, KeyRing, Token, TokenStatus};
use http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::config::Scheme;

/// The header, on requests and answers.
pub const CONSISTENCY_TOKEN: HeaderName = HeaderName::from_static("consistency-token");

/// More tokens on one request are taken for an attack.
const TOKENS_MAX: usize = 16;

/// Opens and seals.
#[derive(Debug)]
pub struct TokenCarrier {
    ring: KeyRing,
    cookie: Option<Cookie>,
}

#[derive(Debug, Clone, Copy)]
struct Cookie {
    name: &'static str,
    attributes: &'static str,
}

/// What a request carried.
#[derive(Debug)]
pub struct Presented {
    /// What it came to.
    pub status: TokenStatus,
    /// All of it came by cookie, which a browser cannot mend.
    pub by_cookie_only: bool,
    /// The answer sets the cookie.
    pub wants_cookie: bool,
}

impl TokenCarrier {
    /// With `cookie`, requests may carry the token in a cookie, and the answers to them set it.
    pub fn new(ring: KeyRing, cookie: bool, scheme: Scheme) -> Self {
        let cookie = cookie.then_some(match scheme {
            Scheme::Https => Cookie {
                name: "__Host-tidemark",
                attributes: "; Path=/; Secure; HttpOnly; SameSite=Lax",
            },
            Scheme::Http => {
                Cookie { name: "tidemark", attributes: "; Path=/; HttpOnly; SameSite=Lax" }
            }
        });
        Self { ring, cookie }
    }

    /// Opens all that the request carries, and merges it.
    pub fn open(&self, headers: &HeaderMap, history: &EpochHistory) -> Presented {
        let by_header = header_tokens(headers);
        let by_cookie = self.cookie.map_or_else(Vec::new, |cookie| cookie_tokens(headers, cookie));
        let by_cookie_only = by_header.is_empty() && !by_cookie.is_empty();
        let wants_cookie = self.cookie.is_some() && by_header.is_empty();
        let count = by_header.len() + by_cookie.len();
        let status = if TOKENS_MAX < count {
            TokenStatus::Malformed
        } else {
            self.ring.open_all(by_header.into_iter().chain(by_cookie), history)
        };
        Presented { status, by_cookie_only, wants_cookie }
    }

    /// Opens what another gateway answered; `None` when it is nothing that adds to a token.
    pub fn open_answer(&self, headers: &HeaderMap, history: &EpochHistory) -> Option<Token> {
        match self.ring.open_all(header_tokens(headers), history) {
            TokenStatus::Valid(token)
            | TokenStatus::OlderEpoch(token)
            | TokenStatus::NewerEpoch(token) => Some(token),
            TokenStatus::Absent
            | TokenStatus::Lost(_)
            | TokenStatus::Malformed
            | TokenStatus::Forged
            | TokenStatus::UnknownKey(_)
            | TokenStatus::UnknownFormat(_)
            | TokenStatus::OtherLog => None,
        }
    }

    /// Opens one sealed token, as a cursor carries it.
    pub fn open_one(&self, sealed: &str, history: &EpochHistory) -> TokenStatus {
        self.ring.open(sealed, history)
    }

    /// Seals.
    pub fn seal(&self, token: &Token) -> String {
        self.ring.seal(token)
    }

    /// Seals, for a header.
    pub fn header(&self, token: &Token) -> HeaderValue {
        plain(self.seal(token))
    }

    /// Takes our cookie out of a request that goes on, and leaves those of others.
    pub fn strip_cookie(&self, headers: &mut HeaderMap) {
        let Some(cookie) = self.cookie else { return };
        if cookie_tokens(headers, cookie).is_empty() {
            return;
        }
        let is_ours =
            |pair: &str| pair.trim().split_once('=').is_some_and(|(name, _)| name == cookie.name);
        let values = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
        let pairs = values.flat_map(|value| value.split(';')).filter(|pair| !is_ours(pair));
        let others = pairs.map(str::trim).collect::<Vec<_>>().join("; ");
        headers.remove(header::COOKIE);
        if !others.is_empty() {
            headers.insert(header::COOKIE, plain_text(&others));
        }
    }

    /// Puts the token on an answer.
    pub fn attach(&self, token: &Token, wants_cookie: bool, headers: &mut HeaderMap) {
        let sealed = self.seal(token);
        if let (Some(cookie), true) = (self.cookie, wants_cookie) {
            let text = format!("{}={sealed}{}", cookie.name, cookie.attributes);
            headers.append(header::SET_COOKIE, plain(text));
        }
        headers.insert(CONSISTENCY_TOKEN, plain(sealed));
    }
}

fn plain_text(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("parts of a header's text make a header's text")
}

fn plain(text: String) -> HeaderValue {
    HeaderValue::try_from(text).expect("a sealed token is base64url")
}

/// The header may be repeated and may hold a list. A value that is no text counts as one bad token.
fn header_tokens(headers: &HeaderMap) -> Vec<&str> {
    let values = headers.get_all(CONSISTENCY_TOKEN).iter();
    values
        .flat_map(|value| value.to_str().unwrap_or("?").split(','))
        .map(|token| token.trim().trim_matches('"'))
        .filter(|token| !token.is_empty())
        .collect()
}

fn cookie_tokens(headers: &HeaderMap, cookie: Cookie) -> Vec<&str> {
    let values = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .filter(|(name, _)| *name == cookie.name)
        .map(|(_, token)| token.trim_matches('"'))
        .filter(|token| !token.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use consistency::{Epoch, Key, KeyId, LogId, Position};
    use uuid::Uuid;

    use super::*;

    fn carrier(cookie: bool, scheme: Scheme) -> TokenCarrier {
        let key = Key::new(KeyId(1), &[7; 32]).unwrap();
        let ring = KeyRing::new(LogId::new(Uuid::from_u128(1)), vec![key], KeyId(1)).unwrap();
        TokenCarrier::new(ring, cookie, scheme)
    }

    fn read_to(position: u64) -> Token {
        Token::new(Epoch::FIRST).with_read(Position::new(position).unwrap())
    }

    fn headers(pairs: &[(&'static str, String)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    #[test]
    fn tokens_of_a_list_and_of_repeated_headers_are_merged() {
        let carrier = carrier(true, Scheme::Https);
        let seal = |position| carrier.seal(&read_to(position));
        let sent = headers(&[
            ("consistency-token", format!("{}, {}", seal(3), seal(9))),
            ("consistency-token", format!("\"{}\"", seal(5))),
            ("cookie", format!("a=b; __Host-tidemark={}; c=d", seal(12))),
        ]);
        let presented = carrier.open(&sent, &EpochHistory::first());
        assert_eq!(presented.status, TokenStatus::Valid(read_to(12)));
        assert!(!presented.by_cookie_only && !presented.wants_cookie);
    }

    #[test]
    fn a_cookie_is_read_and_set_only_where_cookies_are_wanted() {
        let without = carrier(false, Scheme::Https);
        let sent = headers(&[("cookie", format!("__Host-tidemark={}", without.seal(&read_to(4))))]);
        assert_eq!(without.open(&sent, &EpochHistory::first()).status, TokenStatus::Absent);
        let with = carrier(true, Scheme::Https);
        let presented = with.open(&sent, &EpochHistory::first());
        assert_eq!(presented.status, TokenStatus::Valid(read_to(4)));
        assert!(presented.by_cookie_only && presented.wants_cookie);
        let mut answer = HeaderMap::new();
        with.attach(&read_to(4), true, &mut answer);
        let cookie = answer[header::SET_COOKIE].to_str().unwrap();
        assert!(cookie.starts_with("__Host-tidemark="), "{cookie}");
        for attribute in ["; Secure", "; HttpOnly", "; SameSite=Lax", "; Path=/"] {
            assert!(cookie.contains(attribute), "{cookie}");
        }
        let mut answer = HeaderMap::new();
        carrier(true, Scheme::Http).attach(&read_to(4), true, &mut answer);
        let cookie = answer[header::SET_COOKIE].to_str().unwrap();
        assert!(cookie.starts_with("tidemark=") && !cookie.contains("Secure"), "{cookie}");
    }

    #[test]
    fn too_many_tokens_and_values_that_are_no_text_are_malformed() {
        let carrier = carrier(false, Scheme::Https);
        let one = carrier.seal(&read_to(1));
        let many = headers(&[("consistency-token", vec![one; 17].join(","))]);
        let refused = carrier.open(&many, &EpochHistory::first());
        assert_eq!(refused.status, TokenStatus::Malformed);
        let mut strange = HeaderMap::new();
        strange.insert(CONSISTENCY_TOKEN, HeaderValue::from_bytes(b"\xff").unwrap());
        let refused = carrier.open(&strange, &EpochHistory::first());
        assert_eq!(refused.status, TokenStatus::Malformed);
    }
}
