//! The consistency token: what its holder has written and seen, sealed.
//!
//! Wire form, base64url without padding, big endian:
//! format (1) · key id (2) · log tag (4) · flags (1) · epoch (4) · read position (8) ·
//! up to four claims of aggregate (12), version (8), position (8) · HMAC-SHA-256 cut to 16 bytes,
//! taken over all before it and the log's whole id. The low three bits of the flags count the
//! claims, the fourth says that older claims were dropped.

mod unverified;

use std::fmt;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::{AggregateKey, Epoch, EpochHistory, Judged, Position, Version};

pub use unverified::Unverified;

/// A token remembers this many of its holder's latest writes.
pub const CLAIM_COUNT_MAX: usize = 4;
/// Longest sealed token, in characters.
pub const TOKEN_CHARS_MAX: usize = 198;

const FORMAT: u8 = 1;
const HEAD_BYTES: usize = 20;
const CLAIM_BYTES: usize = 28;
const MAC_BYTES: usize = 16;
const CLAIM_COUNT_BITS: u8 = 0b0111;
const CLAIMS_DROPPED_BIT: u8 = 0b1000;
const KEY_BYTES_MIN: usize = 32;
/// Of a token with all the claims that fit.
const TOKEN_BYTES_MAX: usize = HEAD_BYTES + CLAIM_COUNT_MAX * CLAIM_BYTES + MAC_BYTES;

/// One write of the holder: it made `aggregate` have `version`, at `position`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// What was written.
    pub aggregate: AggregateKey,
    /// The version the write made.
    pub version: Version,
    /// Where the write stands in the log.
    pub position: Position,
}

/// What its holder has written and seen, in one epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    epoch: Epoch,
    read_position: Position,
    /// Newest first, at most [`CLAIM_COUNT_MAX`], one per aggregate.
    claims: Vec<Claim>,
    claims_dropped: bool,
}

impl Token {
    /// Nothing written, nothing seen.
    pub fn new(epoch: Epoch) -> Self {
        Self { epoch, read_position: Position::ZERO, claims: Vec::new(), claims_dropped: false }
    }

    /// The holder also saw the world at `position`.
    pub fn with_read(mut self, position: Position) -> Self {
        self.read_position = self.read_position.max(position);
        self
    }

    /// The holder also wrote `claim`.
    ///
    /// A token with more claims than fit drops the oldest. Dropping one raises the read position to
    /// its position, so that no read gets less than the claim demanded, and leaves a mark, since a
    /// position cannot say which aggregate must not be parked.
    pub fn with_claim(mut self, claim: Claim) -> Self {
        match self.claims.iter_mut().find(|known| known.aggregate == claim.aggregate) {
            Some(known) if known.version < claim.version => *known = claim,
            Some(_) => {}
            None => self.claims.push(claim),
        }
        self.claims.sort_by_key(|known| std::cmp::Reverse(known.position));
        for dropped in self.claims.drain(CLAIM_COUNT_MAX.min(self.claims.len())..) {
            self.read_position = self.read_position.max(dropped.position);
            self.claims_dropped = true;
        }
        self
    }

    /// The holder also wrote something, at or below its read position, that is not known any more.
    pub fn with_claims_forgotten(self) -> Self {
        Self { claims_dropped: true, ..self }
    }

    /// All that either holder knows. Both must have been judged into one epoch first; of two
    /// epochs the newer is kept, and with it only what was said in it.
    pub fn merge(self, other: Self) -> Self {
        match self.epoch.cmp(&other.epoch) {
            std::cmp::Ordering::Less => other,
            std::cmp::Ordering::Greater => self,
            std::cmp::Ordering::Equal => {
                let claims_dropped = self.claims_dropped || other.claims_dropped;
                let merged = other.claims.iter().copied().fold(self, Self::with_claim);
                let claims_dropped = claims_dropped || merged.claims_dropped;
                Self { claims_dropped, ..merged.with_read(other.read_position) }
            }
        }
    }

    /// The epoch that all positions in it count in.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The newest thing the holder has read.
    pub fn read_position(&self) -> Position {
        self.read_position
    }

    /// The holder's latest writes, newest first.
    pub fn claims(&self) -> &[Claim] {
        &self.claims
    }

    /// Whether the holder wrote something that is not among the claims any more.
    pub fn claims_dropped(&self) -> bool {
        self.claims_dropped
    }

    /// The holder's latest write of one aggregate.
    pub fn claim_on(&self, aggregate: &AggregateKey) -> Option<&Claim> {
        self.claims.iter().find(|claim| claim.aggregate == *aggregate)
    }

    /// The newest thing written or read. The log's head is at least here.
    pub fn largest_position(&self) -> Position {
        self.claims
            .first()
            .map_or(self.read_position, |newest| self.read_position.max(newest.position))
    }

    pub(crate) fn carried_to(self, epoch: Epoch) -> Self {
        Self { epoch, ..self }
    }

    /// What the holder of a lost token still knows: all that the current epoch kept may have been
    /// seen, and some of that may have been written.
    fn restarted(&self, history: &EpochHistory) -> Self {
        let claims_dropped = self.claims_dropped || !self.claims.is_empty();
        let kept = Self::new(history.current()).with_read(history.current_starts_after());
        Self { claims_dropped, ..kept }
    }

    fn write(&self, head: [u8; 7]) -> Wire {
        let mut wire = Wire::default();
        wire.push(&head);
        let dropped = if self.claims_dropped { CLAIMS_DROPPED_BIT } else { 0 };
        wire.push(&[self.claims.len() as u8 | dropped]);
        wire.push(&self.epoch.get().to_be_bytes());
        wire.push(&self.read_position.get().to_be_bytes());
        for claim in &self.claims {
            wire.push(claim.aggregate.as_bytes());
            wire.push(&claim.version.get().to_be_bytes());
            wire.push(&claim.position.get().to_be_bytes());
        }
        wire
    }

    /// Reads what [`Token::write`] wrote, the MAC left off. Run only on bytes that a key vouched for.
    fn read(bytes: &[u8]) -> Option<Self> {
        let flags = *bytes.get(7)?;
        let claim_count = usize::from(flags & CLAIM_COUNT_BITS);
        let claims_dropped = flags & CLAIMS_DROPPED_BIT != 0;
        let known_flags = flags & !(CLAIM_COUNT_BITS | CLAIMS_DROPPED_BIT) == 0;
        let epoch = Epoch::new(u32::from_be_bytes(*bytes.get(8..)?.first_chunk()?))?;
        let read_position = Position::new(be_u64(bytes, 12)?)?;
        let body = bytes.get(HEAD_BYTES..)?;
        if !known_flags || CLAIM_COUNT_MAX < claim_count || body.len() != claim_count * CLAIM_BYTES
        {
            return None;
        }
        let mut token = Self { epoch, read_position, claims: Vec::new(), claims_dropped };
        for claim in body.chunks_exact(CLAIM_BYTES) {
            token.claims.push(Claim {
                aggregate: AggregateKey::from_bytes(*claim.first_chunk()?),
                version: Version::new(be_u64(claim, 12)?)?,
                position: Position::new(be_u64(claim, 20)?)?,
            });
        }
        Some(token)
    }
}

/// A token's bytes. Every request opens and seals some, so they stay off the heap.
struct Wire {
    bytes: [u8; TOKEN_BYTES_MAX],
    length: usize,
}

impl Default for Wire {
    fn default() -> Self {
        Self { bytes: [0; TOKEN_BYTES_MAX], length: 0 }
    }
}

impl Wire {
    fn push(&mut self, part: &[u8]) {
        let end = self.length + part.len();
        self.bytes[self.length..end].copy_from_slice(part);
        self.length = end;
    }

    fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

fn be_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// What presenting a token came to. Nothing is ever treated as "no token" but no token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenStatus {
    /// None was sent.
    Absent,
    /// Of the current epoch.
    Valid(Token),
    /// Of an older epoch that kept all it names; already carried into the current one.
    OlderEpoch(Token),
    /// Of an older epoch, and the log lost what it names. Holds what its holder goes on with once it
    /// has been told: the current epoch where it starts, and all that its other tokens say. Sending
    /// the lost one again would tell of the loss again and again.
    Lost(Token),
    /// Of an epoch that this region has not heard of yet.
    NewerEpoch(Token),
    /// Not a token.
    Malformed,
    /// A token whose seal does not fit its contents.
    Forged,
    /// Sealed with a key that is not in this ring.
    UnknownKey(KeyId),
    /// Of a format that this release does not read.
    UnknownFormat(u8),
    /// Of another log.
    OtherLog,
}

/// Number of a key in the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub u16);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Identity of a log, made once when the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogId(Uuid);

impl LogId {
    /// Wraps the id.
    pub const fn new(id: Uuid) -> Self {
        Self(id)
    }

    /// The id as the database holds it.
    pub const fn get(self) -> Uuid {
        self.0
    }

    fn tag(self) -> [u8; 4] {
        let digest = Sha256::digest(self.0.as_bytes());
        [digest[0], digest[1], digest[2], digest[3]]
    }
}

impl fmt::Display for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A sealing key.
#[derive(Clone)]
pub struct Key {
    id: KeyId,
    mac: Hmac<Sha256>,
}

impl Key {
    /// `secret` has at least 32 bytes.
    pub fn new(id: KeyId, secret: &[u8]) -> Result<Self, KeyError> {
        if secret.len() < KEY_BYTES_MIN {
            return Err(KeyError::TooShort { id, length: secret.len() });
        }
        let mac = Hmac::new_from_slice(secret).expect("HMAC takes a secret of any length");
        Ok(Self { id, mac })
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.id)
    }
}

/// Why keys do not make a ring.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// A secret that could be guessed.
    #[error("key {id} has {length} bytes, at least {KEY_BYTES_MIN} are needed")]
    TooShort {
        /// Which key.
        id: KeyId,
        /// Its length in bytes.
        length: usize,
    },
    /// Two keys with one number.
    #[error("key {0} is given twice")]
    Duplicate(KeyId),
    /// The key that shall sign is not there.
    #[error("signing key {0} is not in the ring")]
    NoSigningKey(KeyId),
}

/// The keys of one log: one signs, all verify.
#[derive(Debug, Clone)]
pub struct KeyRing {
    log: LogId,
    tag: [u8; 4],
    keys: Vec<Key>,
    signing: usize,
}

impl KeyRing {
    /// A ring for one log. Keys are rotated by adding everywhere, then signing, then dropping.
    pub fn new(log: LogId, keys: Vec<Key>, signing: KeyId) -> Result<Self, KeyError> {
        for (at, key) in keys.iter().enumerate() {
            if keys[..at].iter().any(|earlier| earlier.id == key.id) {
                return Err(KeyError::Duplicate(key.id));
            }
        }
        let signing =
            keys.iter().position(|key| key.id == signing).ok_or(KeyError::NoSigningKey(signing))?;
        Ok(Self { log, tag: log.tag(), keys, signing })
    }

    /// Seals a token for its holder.
    pub fn seal(&self, token: &Token) -> String {
        let key = &self.keys[self.signing];
        let [id_high, id_low] = key.id.0.to_be_bytes();
        let [a, b, c, d] = self.tag;
        let mut wire = token.write([FORMAT, id_high, id_low, a, b, c, d]);
        let mac = self.mac(key, wire.as_bytes()).finalize().into_bytes();
        wire.push(&mac[..MAC_BYTES]);
        URL_SAFE_NO_PAD.encode(wire.as_bytes())
    }

    /// Opens one token.
    pub fn open(&self, text: &str, history: &EpochHistory) -> TokenStatus {
        match self.unseal(text) {
            Err(refused) => refused,
            Ok(token) => match history.judge(token) {
                Judged::Current(token) => TokenStatus::Valid(token),
                Judged::Carried(token) => TokenStatus::OlderEpoch(token),
                Judged::Lost(token) => TokenStatus::Lost(token.restarted(history)),
                Judged::Newer(token) => TokenStatus::NewerEpoch(token),
            },
        }
    }

    /// Opens all that a request carries and merges them. Each is judged in its own epoch first. One
    /// that cannot be taken decides for all of them, since the others say less than the caller knows.
    pub fn open_all<'a>(
        &self,
        texts: impl IntoIterator<Item = &'a str>,
        history: &EpochHistory,
    ) -> TokenStatus {
        let opened = texts.into_iter().map(|text| self.open(text, history));
        opened.fold(TokenStatus::Absent, merge_status)
    }

    fn unseal(&self, text: &str) -> Result<Token, TokenStatus> {
        let wire = decoded(text)?;
        let bytes = wire.as_bytes();
        let key_id = key_named_in(bytes);
        if bytes[3..7] != self.tag {
            return Err(TokenStatus::OtherLog);
        }
        let key =
            self.keys.iter().find(|key| key.id == key_id).ok_or(TokenStatus::UnknownKey(key_id))?;
        let (body, mac) = bytes.split_at(bytes.len() - MAC_BYTES);
        self.mac(key, body).verify_truncated_left(mac).map_err(|_| TokenStatus::Forged)?;
        Token::read(body).ok_or(TokenStatus::Malformed)
    }

    fn mac(&self, key: &Key, body: &[u8]) -> Hmac<Sha256> {
        key.mac.clone().chain_update(body).chain_update(self.log.0.as_bytes())
    }
}

/// The bytes of a token of this format that are long enough for its head and its seal.
fn decoded(text: &str) -> Result<Wire, TokenStatus> {
    if TOKEN_CHARS_MAX < text.len() {
        return Err(TokenStatus::Malformed);
    }
    let mut wire = Wire::default();
    let length = URL_SAFE_NO_PAD.decode_slice(text, &mut wire.bytes);
    wire.length = length.map_err(|_| TokenStatus::Malformed)?;
    match wire.as_bytes().first() {
        None => return Err(TokenStatus::Malformed),
        Some(&FORMAT) => {}
        Some(&other) => return Err(TokenStatus::UnknownFormat(other)),
    }
    if wire.length < HEAD_BYTES + MAC_BYTES { Err(TokenStatus::Malformed) } else { Ok(wire) }
}

fn key_named_in(bytes: &[u8]) -> KeyId {
    KeyId(u16::from_be_bytes([bytes[1], bytes[2]]))
}

fn merge_status(first: TokenStatus, second: TokenStatus) -> TokenStatus {
    use TokenStatus::*;
    match (first, second) {
        (Absent, other) | (other, Absent) => other,
        (refused @ (Malformed | Forged | UnknownKey(_) | UnknownFormat(_) | OtherLog), _) => {
            refused
        }
        (_, refused @ (Malformed | Forged | UnknownKey(_) | UnknownFormat(_) | OtherLog)) => {
            refused
        }
        // Before the loss can be told, all of them must be understood.
        (NewerEpoch(a), NewerEpoch(b)) => NewerEpoch(a.merge(b)),
        (NewerEpoch(token), Valid(_) | OlderEpoch(_) | Lost(_)) => NewerEpoch(token),
        (Valid(_) | OlderEpoch(_) | Lost(_), NewerEpoch(token)) => NewerEpoch(token),
        (Lost(a), Valid(b) | OlderEpoch(b) | Lost(b)) => Lost(a.merge(b)),
        (Valid(a) | OlderEpoch(a), Lost(b)) => Lost(a.merge(b)),
        (Valid(a), Valid(b)) => Valid(a.merge(b)),
        (Valid(a) | OlderEpoch(a), Valid(b) | OlderEpoch(b)) => OlderEpoch(a.merge(b)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{AggregateId, Name};

    fn position(value: u64) -> Position {
        Position::new(value).unwrap()
    }

    fn claim(id: &str, version: u64, at: u64) -> Claim {
        let aggregate = AggregateId::new(Name::new("order").unwrap(), id).unwrap().key();
        Claim { aggregate, version: Version::new(version).unwrap(), position: position(at) }
    }

    fn ring_of(log: u128, keys: &[u16], signing: u16) -> KeyRing {
        let keys = keys.iter().map(|id| Key::new(KeyId(*id), &[*id as u8; 32]).unwrap()).collect();
        KeyRing::new(LogId::new(Uuid::from_u128(log)), keys, KeyId(signing)).unwrap()
    }

    fn ring() -> KeyRing {
        ring_of(1, &[1, 2], 1)
    }

    fn full_token() -> Token {
        (1..=5).fold(Token::new(Epoch::FIRST).with_read(position(3)), |token, n| {
            token.with_claim(claim(&format!("o-{n}"), n, 10 * n))
        })
    }

    #[test]
    fn the_fullest_token_fits_its_bound_and_survives_the_trip() {
        let sealed = ring().seal(&full_token());
        assert_eq!(sealed.len(), TOKEN_CHARS_MAX);
        assert_eq!(ring().open(&sealed, &EpochHistory::first()), TokenStatus::Valid(full_token()));
    }

    #[test]
    fn a_dropped_claim_raises_the_read_position_and_leaves_a_mark() {
        let token = full_token();
        assert_eq!(token.claims().len(), CLAIM_COUNT_MAX);
        assert_eq!(token.read_position(), position(10));
        assert!(token.claims_dropped());
        assert_eq!(token.largest_position(), position(50));
    }

    #[test]
    fn every_status_is_told_apart() {
        let history = EpochHistory::first();
        let sealed = ring().seal(&full_token());
        assert_eq!(ring().open("%%", &history), TokenStatus::Malformed);
        assert_eq!(ring().open("", &history), TokenStatus::Malformed);
        assert_eq!(ring().open(&"A".repeat(4000), &history), TokenStatus::Malformed);
        assert_eq!(ring_of(2, &[1], 1).open(&sealed, &history), TokenStatus::OtherLog);
        assert_eq!(ring_of(1, &[2], 2).open(&sealed, &history), TokenStatus::UnknownKey(KeyId(1)));
        assert_eq!(ring().open("CQAA", &history), TokenStatus::UnknownFormat(9));
        let newer = Token::new(Epoch::new(2).unwrap());
        assert_eq!(ring().open(&ring().seal(&newer), &history), TokenStatus::NewerEpoch(newer));
        let cut = EpochHistory::new(vec![(Epoch::new(2).unwrap(), position(49))]).unwrap();
        assert!(matches!(ring().open(&sealed, &cut), TokenStatus::Lost(_)));
        let kept = EpochHistory::new(vec![(Epoch::new(2).unwrap(), position(50))]).unwrap();
        assert!(matches!(ring().open(&sealed, &kept), TokenStatus::OlderEpoch(_)));
        assert_eq!(ring().open_all([], &history), TokenStatus::Absent);
    }

    #[test]
    fn a_lost_token_leaves_what_was_kept_and_what_the_others_say() {
        let second = Epoch::new(2).unwrap();
        let history = EpochHistory::new(vec![(second, position(20))]).unwrap();
        let lost = ring().seal(&full_token());
        let other = ring().seal(&Token::new(second).with_claim(claim("o-9", 1, 21)));
        for texts in [[lost.as_str(), other.as_str()], [other.as_str(), lost.as_str()]] {
            let TokenStatus::Lost(left) = ring().open_all(texts, &history) else { panic!("lost") };
            assert_eq!((left.epoch(), left.read_position()), (second, position(20)));
            assert_eq!(left.claims(), [claim("o-9", 1, 21)], "the other token was not lost");
            assert!(left.claims_dropped());
            let again = ring().open(&ring().seal(&left), &history);
            assert_eq!(again, TokenStatus::Valid(left), "a loss is told once");
        }
        let newer = ring().seal(&Token::new(Epoch::new(3).unwrap()));
        let both = ring().open_all([lost.as_str(), newer.as_str()], &history);
        assert!(matches!(both, TokenStatus::NewerEpoch(_)), "not understood yet");
    }

    #[test]
    fn no_single_flipped_bit_passes_the_seal() {
        let sealed = ring().seal(&full_token());
        let bytes = URL_SAFE_NO_PAD.decode(&sealed).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut bent = bytes.clone();
            bent[bit / 8] ^= 1 << (bit % 8);
            let status = ring().open(&URL_SAFE_NO_PAD.encode(bent), &EpochHistory::first());
            assert!(!matches!(status, TokenStatus::Valid(_)), "bit {bit} flipped");
        }
    }

    #[test]
    fn one_bad_token_among_good_ones_is_not_passed_over() {
        let good = ring().seal(&full_token());
        for texts in [[good.as_str(), "%%"], ["%%", good.as_str()]] {
            assert_eq!(ring().open_all(texts, &EpochHistory::first()), TokenStatus::Malformed);
        }
    }

    #[test]
    fn a_weak_or_ambiguous_ring_is_refused() {
        let key = |id| Key::new(KeyId(id), &[7; 32]).unwrap();
        let log = LogId::new(Uuid::nil());
        assert!(matches!(Key::new(KeyId(1), b"short"), Err(KeyError::TooShort { .. })));
        let twice = KeyRing::new(log, vec![key(1), key(1)], KeyId(1));
        assert_eq!(twice.unwrap_err(), KeyError::Duplicate(KeyId(1)));
        let unsigned = KeyRing::new(log, vec![key(1)], KeyId(2));
        assert_eq!(unsigned.unwrap_err(), KeyError::NoSigningKey(KeyId(2)));
    }

    fn any_token() -> impl Strategy<Value = Token> {
        let claims = proptest::collection::vec((0..6u8, 1..50u64), 0..8);
        (0..50u64, claims).prop_map(|(read, claims)| {
            // Position is a function of aggregate and version, as it is in a log.
            claims.into_iter().fold(
                Token::new(Epoch::FIRST).with_read(position(read)),
                |token, (id, n)| {
                    token.with_claim(claim(&format!("a{id}"), n, n * 6 + u64::from(id)))
                },
            )
        })
    }

    proptest! {
        #[test]
        fn sealing_loses_nothing(token in any_token()) {
            let status = ring().open(&ring().seal(&token), &EpochHistory::first());
            prop_assert_eq!(status, TokenStatus::Valid(token));
        }

        #[test]
        fn a_merge_demands_at_least_what_each_part_demanded(a in any_token(), b in any_token()) {
            let merged = a.clone().merge(b.clone());
            for part in [&a, &b] {
                prop_assert!(part.largest_position() <= merged.largest_position());
                prop_assert!(!part.claims_dropped() || merged.claims_dropped());
                for claim in part.claims() {
                    let kept = merged.claim_on(&claim.aggregate).is_some_and(|c| claim.version <= c.version);
                    prop_assert!(kept || claim.position <= merged.read_position() && merged.claims_dropped());
                }
            }
            prop_assert_eq!(merged.clone().merge(a.clone()).largest_position(), merged.largest_position());
        }
    }
}
