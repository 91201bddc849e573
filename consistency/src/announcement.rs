//! What a projector tells its region's gateways after a commit, and after reading past events that
//! are not its own.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use crate::{Epoch, IdleProof, LogPosition, Name, Position};

/// One step of one partition's watermark. A hint: it may be lost, late or double, and no answer
/// rests on it alone. A message is a list of them, those of one partition in their order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Announcement {
    /// The region that it speaks for.
    pub region: String,
    /// The epoch that its positions count in.
    pub epoch: Epoch,
    /// The projection.
    pub projection: Name,
    /// The version of the projection.
    pub version: u32,
    /// The partition.
    pub partition: u16,
    /// The watermark before the step.
    pub from: Position,
    /// The watermark after it.
    pub to: Position,
    /// The checkpoint that is stored; below `to` when the rest is an idle proof.
    pub stored: Position,
    /// The log's head as the projector knows it.
    pub head: Position,
    /// Every row key that any event of `(from, to]` touched, before or after it, and every aggregate
    /// that was parked, retried or discarded, as [`crate::AggregateKey::hint`]s. `None` when they are
    /// too many to list: then every key counts as touched.
    pub keys: Option<Vec<u64>>,
}

impl Announcement {
    /// The watermark that the step leads to.
    pub fn reached(&self) -> LogPosition {
        LogPosition::new(self.epoch, self.to)
    }

    /// The step as a proof to be laid on a stored checkpoint.
    pub fn proof(&self) -> IdleProof {
        IdleProof { stored: LogPosition::new(self.epoch, self.stored), proven: self.reached() }
    }

    /// Whether its positions are in the order that they must be in.
    pub fn is_coherent(&self) -> bool {
        self.from <= self.to && self.stored <= self.to && self.to <= self.head
    }
}

/// The header of the message that carries an announcement's seal.
pub const SEAL_HEADER: &str = "Tidemark-Seal";

const SEAL_BYTES: usize = 16;

/// Tells a region's own announcements from all others.
///
/// Rows are never believed on an announcement's word, but an idle proof is: nothing in the database
/// says how far a partition without events has read. So whoever announces shows that it holds the
/// regions' credential, by an HMAC-SHA-256 over the message, cut to 16 bytes.
#[derive(Clone)]
pub struct AnnouncementSeal(Hmac<Sha256>);

impl AnnouncementSeal {
    /// From the regions' credential.
    pub fn new(credential: &[u8]) -> Self {
        let mac = Hmac::new_from_slice(credential).expect("HMAC takes a secret of any length");
        // The credential proves other things too: what it seals here is said first.
        Self(mac.chain_update(b"announcement\0"))
    }

    /// The seal of a message, for [`SEAL_HEADER`].
    pub fn seal(&self, message: &[u8]) -> String {
        let mac = self.0.clone().chain_update(message).finalize().into_bytes();
        URL_SAFE_NO_PAD.encode(&mac[..SEAL_BYTES])
    }

    /// Whether a message was sealed with the same credential.
    pub fn fits(&self, message: &[u8], seal: &str) -> bool {
        let Ok(seal) = URL_SAFE_NO_PAD.decode(seal) else { return false };
        let mac = self.0.clone().chain_update(message);
        seal.len() == SEAL_BYTES && mac.verify_truncated_left(&seal).is_ok()
    }
}

impl std::fmt::Debug for AnnouncementSeal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AnnouncementSeal")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_message_that_was_sealed_with_the_credential_fits() {
        let ours = AnnouncementSeal::new(b"a credential of the regions");
        let seal = ours.seal(b"message");
        assert!(ours.fits(b"message", &seal));
        assert!(!ours.fits(b"messages", &seal));
        assert!(!AnnouncementSeal::new(b"another credential").fits(b"message", &seal));
        for bad in ["", "?", &seal[..8], &format!("{seal}AAAA")] {
            assert!(!ours.fits(b"message", bad), "{bad:?}");
        }
    }
}
