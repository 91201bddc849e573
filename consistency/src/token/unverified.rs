//! What a sealed token says of itself.

use super::{KeyId, LogId, MAC_BYTES, Token, TokenStatus, decoded, key_named_in};

/// What a sealed token says of itself, which nobody has vouched for: for people who look at one, never
/// for a decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unverified {
    /// The key that it names.
    pub key: KeyId,
    /// What it says.
    pub token: Token,
    log_tag: [u8; 4],
}

impl Unverified {
    /// Reads one. The refusal says whether it is no token or one of another release.
    pub fn read(text: &str) -> Result<Self, TokenStatus> {
        let wire = decoded(text)?;
        let bytes = wire.as_bytes();
        let token = Token::read(&bytes[..bytes.len() - MAC_BYTES]).ok_or(TokenStatus::Malformed)?;
        let key = key_named_in(bytes);
        Ok(Self { key, token, log_tag: [bytes[3], bytes[4], bytes[5], bytes[6]] })
    }

    /// Whether it says to be of this log.
    pub fn is_of(&self, log: LogId) -> bool {
        self.log_tag == log.tag()
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::{Epoch, Key, KeyRing, Position};

    #[test]
    fn a_token_can_be_looked_at_without_its_key_and_a_damaged_one_says_what_it_is() {
        let log = LogId::new(Uuid::from_u128(1));
        let ring =
            KeyRing::new(log, vec![Key::new(KeyId(3), &[7; 32]).unwrap()], KeyId(3)).unwrap();
        let token = Token::new(Epoch::FIRST).with_read(Position::new(42).unwrap());
        let sealed = ring.seal(&token);
        let seen = Unverified::read(&sealed).unwrap();
        assert_eq!((seen.key, &seen.token), (KeyId(3), &token));
        assert!(seen.is_of(log) && !seen.is_of(LogId::new(Uuid::from_u128(2))));
        let other_format = format!("CQ{}", &sealed[2..]);
        assert_eq!(Unverified::read(&other_format), Err(TokenStatus::UnknownFormat(9)));
        for damaged in ["", "%", &sealed[..8], &sealed[..40], &sealed.repeat(9)] {
            assert_eq!(Unverified::read(damaged), Err(TokenStatus::Malformed), "{damaged}");
        }
    }
}
