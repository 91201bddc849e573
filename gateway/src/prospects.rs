//! What a read may spend, and what it tells when that was not enough: the same for rows of our own and for
//! those of a service.

use consistency::{Budget, LogPosition, Name, Place, Refusal};

use crate::{
    currency::Partitions,
    error::{Error, Lag},
    gateway::{Gateway, Role},
    request::Call,
};

/// A read, as far as waiting and forwarding are concerned.
#[derive(Debug, Clone, Copy)]
pub struct Prospects<'a> {
    /// Where it is read.
    pub gateway: &'a Gateway,
    /// The projection that tells how current it is.
    pub projection: &'a Name,
    /// The partitions that matter to it.
    pub partitions: Partitions,
    /// What it demands.
    pub at: LogPosition,
}

/// What the next decision may spend. `behind`: of a read that is, since whoever is current does not wait;
/// `alone`: the primary could not be asked.
pub fn budget(
    gateway: &Gateway,
    call: &Call,
    behind: Option<Prospects<'_>>,
    alone: bool,
) -> Budget {
    let place = match gateway.place() {
        Place::Region if alone => Place::RegionAlone,
        place @ (Place::Region | Place::RegionAlone | Place::Primary) => place,
    };
    Budget {
        left_ms: call.left_ms(),
        wait_ms_max: gateway.config.read.wait_max.millis(),
        place,
        worth_waiting_ms: behind.and_then(|read| read.worth_waiting_ms()),
    }
}

impl Prospects<'_> {
    fn worth_waiting_ms(&self) -> Option<u32> {
        let Role::Region(upstream) = &self.gateway.role else { return None };
        let trip_ms = upstream.trip_ms()?;
        let currency = &self.gateway.currency;
        Some(currency.worth_waiting_ms(self.projection, self.partitions, self.at, trip_ms))
    }

    /// How far the region is from what is demanded.
    pub fn lag(&self) -> Lag {
        let currency = &self.gateway.currency;
        Lag {
            demand: Some(self.at),
            applied: currency.standing(self.projection, self.partitions).watermark,
            lag_ms: self.gateway.seen.progress(self.projection.as_str()).lag_ms,
            estimate_ms: currency.catch_up_ms(self.projection, self.partitions, self.at),
        }
    }

    /// The end of a chain without an answer.
    pub fn refused(&self, refusal: Refusal) -> Error {
        match refusal {
            Refusal::ReplicationPending => Error::ReplicationPending(self.lag()),
            Refusal::Parked => Error::Parked(self.lag()),
            Refusal::PrimaryUnreachable => Error::PrimaryUnreachable {
                detail: "the read asked for it, and it did not answer",
                source: None,
            },
        }
    }
}
