//! How often each caller may ask: a bucket each, in bounded memory.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use http::Request;
use serde::Deserialize;
use tokio::time::Instant;
use tower::{Layer, Service};

use crate::auth::{Admitted, Caller, Entry, Refusal};

/// Locks that callers are spread over.
const SHARD_COUNT: usize = 16;

/// `[rate_limit]`: without it there is none.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct RateLimitConfig {
    /// What a caller may ask for in the long run.
    pub requests_per_second: u32,
    /// What it may ask for at once after a pause.
    pub burst: u32,
    /// Callers that are told apart. Those beyond share a bucket until others have been quiet.
    #[serde(default = "callers_max_default")]
    pub callers_max: usize,
}

const fn callers_max_default() -> usize {
    100_000
}

impl RateLimitConfig {
    /// What is wrong with it.
    pub fn mistakes(&self) -> Vec<String> {
        let bounds = [
            (self.requests_per_second as usize, "requests_per_second"),
            (self.burst as usize, "burst"),
            (self.callers_max, "callers_max"),
        ];
        let zero = bounds.iter().filter(|(bound, _)| *bound == 0);
        zero.map(|(_, key)| format!("rate_limit.{key}: must be above zero")).collect()
    }
}

/// The buckets. One is remembered as the time at which it will be full again (the generic cell rate
/// algorithm), so that a full one is as good as none and need not be kept.
#[derive(Debug)]
pub struct Limiter {
    /// One request's share of the rate.
    share: Duration,
    /// The shares that fit into a bucket.
    room: Duration,
    shard_callers_max: usize,
    shards: Vec<Mutex<Shard>>,
    hasher: RandomState,
}

#[derive(Debug, Default)]
struct Shard {
    full_again: HashMap<u64, Instant>,
    /// The bucket of those who found no room for their own.
    shared: Option<Instant>,
}

/// Whose bucket it is.
#[derive(Debug, Hash)]
enum Owner<'a> {
    Name(&'a str),
    Address(IpAddr),
}

impl Limiter {
    /// As configured.
    pub fn new(config: &RateLimitConfig) -> Self {
        let share = Duration::from_secs(1) / config.requests_per_second.max(1);
        Self {
            share,
            room: share * config.burst.max(1),
            shard_callers_max: config.callers_max.div_ceil(SHARD_COUNT),
            shards: std::iter::repeat_with(Mutex::default).take(SHARD_COUNT).collect(),
            hasher: RandomState::new(),
        }
    }

    /// Takes one request out of its caller's bucket, or says how long it takes until there is one.
    fn take(&self, owner: &Owner<'_>, now: Instant) -> Result<(), Duration> {
        let hash = self.hasher.hash_one(owner);
        let shard = &self.shards[hash as usize % SHARD_COUNT];
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = shard.full_again.contains_key(&hash);
        if !is_known && self.shard_callers_max <= shard.full_again.len() {
            shard.full_again.retain(|_, full_again| now < *full_again);
        }
        let is_own = is_known || shard.full_again.len() < self.shard_callers_max;
        let stood = if is_own { shard.full_again.get(&hash).copied() } else { shard.shared };
        let full_again = stood.unwrap_or(now).max(now) + self.share;
        let missing = full_again.duration_since(now).saturating_sub(self.room);
        if !missing.is_zero() {
            return Err(missing);
        }
        if is_own {
            shard.full_again.insert(hash, full_again);
        } else {
            shard.shared = Some(full_again);
        }
        Ok(())
    }

    /// How many callers are told apart now.
    #[cfg(test)]
    fn caller_count(&self) -> usize {
        let count = |shard: &Mutex<Shard>| {
            shard.lock().unwrap_or_else(PoisonError::into_inner).full_again.len()
        };
        self.shards.iter().map(count).sum()
    }

    /// Judges a request that may go in otherwise. Regions are not counted: they have counted before.
    fn judge(&self, entry: &mut Entry) {
        let owner = match &entry.caller {
            Ok(_) if entry.trusted => return,
            Ok(Caller::Named(name)) => Owner::Name(name),
            // Whoever it is, it comes from somewhere; who was refused already, too.
            Ok(Caller::Unknown) | Err(_) => Owner::Address(network(entry.peer.0.ip())),
        };
        if let Err(missing) = self.take(&owner, Instant::now()) {
            let retry_after_ms = u32::try_from(missing.as_millis()).unwrap_or(u32::MAX).max(1);
            entry.caller = Err(Refusal::TooOften { retry_after_ms });
        }
    }
}

/// One host has a whole network of addresses of version 6.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() >> 64 << 64).into()),
        address @ IpAddr::V4(_) => address,
    }
}

/// Puts a [`Limiter`] behind the doors. A request that comes too often goes on as one that is refused.
#[derive(Debug, Clone)]
pub struct RateLimitLayer(pub Arc<Limiter>);

impl<S> Layer<S> for RateLimitLayer {
    type Service = RateLimit<S>;

    fn layer(&self, inner: S) -> RateLimit<S> {
        RateLimit { limiter: Arc::clone(&self.0), inner }
    }
}

/// What [`RateLimitLayer`] makes.
#[derive(Debug, Clone)]
pub struct RateLimit<S> {
    limiter: Arc<Limiter>,
    inner: S,
}

impl<S: Service<Request<Admitted<B>>>, B> Service<Request<Admitted<B>>> for RateLimit<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Admitted<B>>) -> S::Future {
        self.limiter.judge(&mut request.body_mut().entry);
        self.inner.call(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(callers_max: usize) -> Limiter {
        Limiter::new(&RateLimitConfig { requests_per_second: 10, burst: 3, callers_max })
    }

    fn name(name: &str) -> Owner<'_> {
        Owner::Name(name)
    }

    #[test]
    fn a_caller_has_its_burst_and_then_its_rate() {
        let (limiter, now) = (limiter(100), Instant::now());
        for _ in 0..3 {
            assert_eq!(limiter.take(&name("ada"), now), Ok(()));
        }
        assert_eq!(limiter.take(&name("ada"), now), Err(Duration::from_millis(100)));
        assert_eq!(limiter.take(&name("bob"), now), Ok(()), "another caller has its own");
        let later = now + Duration::from_millis(100);
        assert_eq!(limiter.take(&name("ada"), later), Ok(()));
        assert!(limiter.take(&name("ada"), later).is_err());
        let rested = now + Duration::from_secs(60);
        for _ in 0..3 {
            assert_eq!(limiter.take(&name("ada"), rested), Ok(()));
        }
        assert!(limiter.take(&name("ada"), rested).is_err(), "a long pause fills one bucket only");
    }

    #[test]
    fn a_flood_of_callers_stays_in_bounds_and_leaves_known_ones_alone() {
        let (limiter, now) = (limiter(160), Instant::now());
        assert_eq!(limiter.take(&name("ada"), now), Ok(()));
        let passed = (0..10_000).filter(|i| limiter.take(&name(&i.to_string()), now).is_ok());
        let passed = passed.count();
        assert!(limiter.caller_count() <= 160, "{}", limiter.caller_count());
        // One each for those who found room, and the shared bucket of every shard.
        assert!(passed <= 160 + SHARD_COUNT * 3, "{passed}");
        assert_eq!(limiter.take(&name("ada"), now), Ok(()));
        let rested = now + Duration::from_secs(60);
        assert_eq!(limiter.take(&name("new"), rested), Ok(()), "the quiet make room");
        assert!(limiter.caller_count() <= 160);
    }

    #[test]
    fn an_address_of_version_6_counts_as_its_network() {
        let of = |text: &str| network(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::2"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
    }
}
