//! What can be wrong with a link.

use serde::{Deserialize, Serialize};

/// Something wrong with one direction of a link, in Toxiproxy's words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Toxic {
    /// Its name, unique on its proxy. Empty in an order: named `<type>_<stream>` then.
    #[serde(default)]
    pub name: String,
    /// What it does.
    #[serde(flatten)]
    pub kind: ToxicKind,
    /// The direction it acts on.
    #[serde(default)]
    pub stream: Stream,
}

/// A direction of a link. The client is the side that opened the connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// From the client to the upstream.
    Upstream,
    /// From the upstream to the client.
    #[default]
    Downstream,
}

/// What a toxic does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", content = "attributes", rename_all = "lowercase")]
pub enum ToxicKind {
    /// Delays what is sent, without limiting how much.
    Latency {
        /// The delay in milliseconds.
        latency: u64,
        /// How much more or less than that, at random, in milliseconds.
        #[serde(default)]
        jitter: u64,
    },
    /// Swallows what is sent. The connection is closed when the toxic is taken away, since its stream has a hole.
    Timeout {
        /// Milliseconds after which the connection is closed; 0 for never.
        #[serde(default)]
        timeout: u64,
    },
}

impl Toxic {
    /// Delays one direction by `latency_ms`.
    pub fn latency(name: &str, stream: Stream, latency_ms: u64) -> Self {
        let kind = ToxicKind::Latency { latency: latency_ms, jitter: 0 };
        Toxic { name: name.to_owned(), kind, stream }
    }

    /// Swallows everything in one direction, for as long as it is there.
    pub fn blackhole(name: &str, stream: Stream) -> Self {
        Toxic { name: name.to_owned(), kind: ToxicKind::Timeout { timeout: 0 }, stream }
    }

    /// Gives an unnamed toxic the name Toxiproxy would.
    pub(super) fn named(mut self) -> Self {
        if self.name.is_empty() {
            let kind = match self.kind {
                ToxicKind::Latency { .. } => "latency",
                ToxicKind::Timeout { .. } => "timeout",
            };
            let stream = match self.stream {
                Stream::Upstream => "upstream",
                Stream::Downstream => "downstream",
            };
            self.name = format!("{kind}_{stream}");
        }
        self
    }
}
