//! The issuer's keys: a JSON Web Key Set (RFC 7517), read from a file or a URL, and read again.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioTimer},
};
use jsonwebtoken::{
    Algorithm, DecodingKey,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, PublicKeyUse},
};
use process::{
    admin::{Condition, Readiness},
    client::{self, Connector, Protocols},
    tls::TlsError,
};
use tokio::{sync::Mutex, time::Instant};
use tokio_util::sync::CancellationToken;

use super::JwtConfig;

/// A set larger than this is not read.
const SET_BYTES_MAX: usize = 256 * 1024;
/// Keys of a set beyond this are passed over.
const KEYS_MAX: usize = 64;
const AUTH: &str = "auth";

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The file cannot be read.
    #[error("{path} cannot be read: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The set is too large.
    #[error("the set has more than {SET_BYTES_MAX} bytes")]
    TooLarge,
    /// It is not a set of keys.
    #[error("it is no JSON Web Key Set: {0}")]
    Malformed(#[from] serde_json::Error),
    /// None of its keys verifies anything.
    #[error("it has no public key for signatures that is known here")]
    Empty,
    /// The URL is none.
    #[error("the keys' URL cannot be asked")]
    Url(#[from] http::Error),
    /// TLS cannot be set up.
    #[error("tls cannot be set up")]
    Tls(#[from] TlsError),
    /// The server cannot be asked.
    #[error("the keys' server does not answer")]
    Unreachable(#[from] hyper_util::client::legacy::Error),
    /// It answered something else.
    #[error("the keys' server answers {0}")]
    Status(StatusCode),
    /// The answer broke off.
    #[error("the answer of the keys' server broke off")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It took too long.
    #[error("the keys' server does not answer in time")]
    Deadline,
}

/// What a search for a key came to.
pub enum Lookup {
    /// Here it is.
    Found(DecodingKey),
    /// There are keys, and it is not among them.
    Absent,
    /// There are no keys that may be believed.
    NoKeys,
}

/// The keys as they were last read.
#[derive(Debug)]
pub struct Keys {
    source: Source,
    held: RwLock<Option<Arc<Held>>>,
    /// When they were last asked for, with or without success. Who holds it is asking.
    asked: Mutex<Option<Instant>>,
    interval: Duration,
    interval_min: Duration,
    timeout: Duration,
    age_max: Duration,
}

#[derive(Debug)]
enum Source {
    File(PathBuf),
    Url(Box<(Client<Connector, Empty<Bytes>>, Uri)>),
}

#[derive(Debug)]
struct Held {
    set: KeySet,
    at: Instant,
}

impl Keys {
    /// As configured. A file is read at once.
    pub fn open(config: &JwtConfig) -> Result<Self, KeysError> {
        let (source, held) = match (&config.keys_file, &config.keys_url) {
            (Some(path), _) => {
                let held = Held { set: read_file(path)?, at: Instant::now() };
                (Source::File(path.clone()), Some(Arc::new(held)))
            }
            (None, Some(url)) => (remote(config, url)?, None),
            (None, None) => return Err(KeysError::Empty),
        };
        Ok(Self {
            source,
            held: RwLock::new(held),
            asked: Mutex::new(None),
            interval: config.keys_interval.get(),
            interval_min: config.keys_interval_min.get(),
            timeout: config.keys_timeout.get(),
            age_max: config.keys_age_max.get(),
        })
    }

    /// The key of a token. One that is not known may be new, so the set is read again, though not more
    /// often than bounded: everybody can name a key that does not exist.
    pub async fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Lookup {
        match self.look(id, algorithm) {
            found @ Lookup::Found(_) => found,
            Lookup::Absent | Lookup::NoKeys => {
                self.ask_again().await;
                self.look(id, algorithm)
            }
        }
    }

    fn look(&self, id: Option<&str>, algorithm: Algorithm) -> Lookup {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner).clone();
        match held.filter(|held| held.at.elapsed() <= self.age_max) {
            None => Lookup::NoKeys,
            Some(held) => held.set.find(id, algorithm).map_or(Lookup::Absent, Lookup::Found),
        }
    }

    /// One asks, and those who come meanwhile wait for what it learns.
    async fn ask_again(&self) {
        let mut asked = self.asked.lock().await;
        if asked.is_some_and(|at| at.elapsed() < self.interval_min) {
            return;
        }
        if let Err(error) = self.read().await {
            tracing::warn!(error = chain(&error), "keys of callers' tokens not read");
        }
        *asked = Some(Instant::now());
    }

    /// Says in `readiness` that there are none yet, when there are none.
    pub fn expect(&self, readiness: &Readiness) {
        if self.held.read().unwrap_or_else(PoisonError::into_inner).is_none() {
            let said = "keys of callers' tokens not read yet".to_owned();
            readiness.set(AUTH, Condition::NotReady(said));
        }
    }

    /// Reads them again and again until `stop`, sooner while there are none.
    pub async fn keep_fresh(&self, readiness: &Readiness, stop: CancellationToken) {
        loop {
            let read = {
                let mut asked = self.asked.lock().await;
                let read = self.read().await;
                *asked = Some(Instant::now());
                read
            };
            let pause = if read.is_ok() { self.interval } else { self.interval_min };
            readiness.set(AUTH, self.condition(read));
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    fn condition(&self, read: Result<(), KeysError>) -> Condition {
        let Err(error) = read else { return Condition::Ready };
        let said = format!("keys of callers' tokens not read: {}", chain(&error));
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        match &*held {
            Some(held) if held.at.elapsed() <= self.age_max => Condition::Degraded(said),
            Some(_) | None => Condition::NotReady(said),
        }
    }

    async fn read(&self) -> Result<(), KeysError> {
        let set = match &self.source {
            Source::File(path) => read_file(path)?,
            Source::Url(remote) => {
                let fetching = fetch(&remote.0, &remote.1);
                let fetched = tokio::time::timeout(self.timeout, fetching).await;
                fetched.map_err(|_| KeysError::Deadline)??
            }
        };
        let held = Some(Arc::new(Held { set, at: Instant::now() }));
        *self.held.write().unwrap_or_else(PoisonError::into_inner) = held;
        Ok(())
    }
}

/// A set in a file.
pub fn read_file(path: &Path) -> Result<KeySet, KeysError> {
    let bytes =
        std::fs::read(path).map_err(|source| KeysError::File { path: path.to_owned(), source })?;
    KeySet::parse(&bytes)
}

fn remote(config: &JwtConfig, url: &str) -> Result<Source, KeysError> {
    let url: Uri = url.parse().map_err(http::Error::from)?;
    let roots = config.keys_url_ca.as_deref();
    let connector = client::connector(&url, roots, config.keys_timeout.get(), Protocols::Any)?;
    let client =
        Client::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).build(connector);
    Ok(Source::Url(Box::new((client, url))))
}

async fn fetch(client: &Client<Connector, Empty<Bytes>>, url: &Uri) -> Result<KeySet, KeysError> {
    let request = Request::get(url.clone()).body(Empty::new())?;
    let response = client.request(request).await?;
    if response.status() != StatusCode::OK {
        return Err(KeysError::Status(response.status()));
    }
    let body = Limited::new(response.into_body(), SET_BYTES_MAX).collect().await;
    KeySet::parse(&body.map_err(KeysError::Body)?.to_bytes())
}

/// Keys by their ids.
#[derive(Debug, Default)]
pub struct KeySet {
    named: HashMap<String, VerifyingKey>,
    unnamed: Vec<VerifyingKey>,
}

#[derive(Debug)]
struct VerifyingKey {
    key: DecodingKey,
    algorithms: Vec<Algorithm>,
}

impl KeySet {
    fn parse(bytes: &[u8]) -> Result<Self, KeysError> {
        #[derive(serde::Deserialize)]
        struct Raw {
            keys: Vec<serde_json::Value>,
        }
        if SET_BYTES_MAX < bytes.len() {
            return Err(KeysError::TooLarge);
        }
        let raw: Raw = serde_json::from_slice(bytes)?;
        let mut set = Self::default();
        // A key of a kind that is not known is passed over, as the standard has it.
        for jwk in raw.keys.into_iter().take(KEYS_MAX) {
            let Ok(jwk) = serde_json::from_value::<Jwk>(jwk) else { continue };
            let Some(key) = verifying(&jwk) else { continue };
            match jwk.common.key_id {
                Some(id) => drop(set.named.insert(id, key)),
                None => set.unnamed.push(key),
            }
        }
        let is_empty = set.named.is_empty() && set.unnamed.is_empty();
        if is_empty { Err(KeysError::Empty) } else { Ok(set) }
    }

    /// A token that names no key is taken when there is one key only that it can mean.
    fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Option<DecodingKey> {
        let fits = |key: &&VerifyingKey| key.algorithms.contains(&algorithm);
        let found = match id {
            Some(id) => self.named.get(id).filter(fits)?,
            None => {
                let mut all = self.named.values().chain(&self.unnamed).filter(fits);
                all.next().filter(|_| all.next().is_none())?
            }
        };
        Some(found.key.clone())
    }
}

/// A public key, and what it may verify: what it says itself, or else all that its kind can.
fn verifying(jwk: &Jwk) -> Option<VerifyingKey> {
    if !matches!(jwk.common.public_key_use, None | Some(PublicKeyUse::Signature)) {
        return None;
    }
    let kind = kind_algorithms(&jwk.algorithm);
    let said = jwk.common.key_algorithm.map(|said| said.to_string().parse::<Algorithm>().ok());
    let algorithms: Vec<Algorithm> = match said {
        None => kind.to_vec(),
        Some(said) => kind.iter().copied().filter(|known| Some(*known) == said).collect(),
    };
    let key = DecodingKey::from_jwk(jwk).ok()?;
    (!algorithms.is_empty()).then_some(VerifyingKey { key, algorithms })
}

/// What a kind of key can verify. Nothing is verified by a secret: it has no business among public keys.
fn kind_algorithms(key: &AlgorithmParameters) -> &'static [Algorithm] {
    if let AlgorithmParameters::RSA(_) = key {
        return &[
            Algorithm::RS256,
            Algorithm::RS384,
            Algorithm::RS512,
            Algorithm::PS256,
            Algorithm::PS384,
            Algorithm::PS512,
        ];
    }
    let curve = if let AlgorithmParameters::EllipticCurve(key) = key {
        key.curve.clone()
    } else if let AlgorithmParameters::OctetKeyPair(key) = key {
        key.curve.clone()
    } else {
        return &[];
    };
    let curves: [(EllipticCurve, &[Algorithm]); 3] = [
        (EllipticCurve::P256, &[Algorithm::ES256]),
        (EllipticCurve::P384, &[Algorithm::ES384]),
        (EllipticCurve::Ed25519, &[Algorithm::EdDSA]),
    ];
    curves.iter().find(|(known, _)| *known == curve).map_or(&[], |(_, algorithms)| algorithms)
}

fn chain(error: &dyn std::error::Error) -> String {
    let chain = std::iter::successors(Some(error), |error| error.source());
    chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
