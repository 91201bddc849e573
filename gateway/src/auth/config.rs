//! `[auth]`: who may call.

use std::path::PathBuf;

use http::{HeaderName, Uri};
use ipnet::IpNet;
use jsonwebtoken::Algorithm;
use process::{config::Period, tls};
use serde::{Deserialize, Deserializer};

use super::keys;

/// Who may call.
#[derive(Debug, Clone, Deserialize)]
pub struct AuthConfig {
    /// Must be chosen.
    pub mode: AuthMode,
    /// What goes with `jwt`.
    pub jwt: Option<JwtConfig>,
    /// What goes with `trusted-header`.
    pub trusted_header: Option<TrustedHeaderConfig>,
}

/// How callers prove who they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AuthMode {
    /// By a bearer token that an issuer signed.
    Jwt,
    /// The load balancer in front knows them, and says so in a header.
    TrustedHeader,
    /// They do not.
    None,
}

/// Bearer tokens.
#[derive(Debug, Clone, Deserialize)]
pub struct JwtConfig {
    /// `iss` of every token.
    pub issuer: String,
    /// One of these is in `aud` of every token.
    pub audiences: Vec<String>,
    /// How tokens may be signed: by key pairs only, never by a shared secret.
    #[serde(default = "algorithms_default")]
    pub algorithms: Vec<JwtAlgorithm>,
    /// How far the issuer's clock may be from ours.
    #[serde(default = "leeway_default")]
    pub leeway: Period,
    /// The claim that names the caller.
    #[serde(default = "caller_claim_default")]
    pub caller_claim: String,
    /// The issuer's keys: a JSON Web Key Set in a file.
    pub keys_file: Option<PathBuf>,
    /// The same behind a URL.
    pub keys_url: Option<String>,
    /// Certificates, in PEM, that the one of `keys_url` must follow from; the machine's own unless set.
    pub keys_url_ca: Option<PathBuf>,
    /// How often the keys are read anew.
    #[serde(default = "keys_interval_default")]
    pub keys_interval: Period,
    /// How often they are read at most because a token names a key that is not among them.
    #[serde(default = "keys_interval_min_default")]
    pub keys_interval_min: Period,
    /// Bound on reading them once.
    #[serde(default = "keys_timeout_default")]
    pub keys_timeout: Period,
    /// Keys that could not be read anew for so long are not believed any more.
    #[serde(default = "keys_age_max_default")]
    pub keys_age_max: Period,
}

fn algorithms_default() -> Vec<JwtAlgorithm> {
    vec![JwtAlgorithm::RS256, JwtAlgorithm::ES256, JwtAlgorithm::EdDSA]
}

const fn leeway_default() -> Period {
    Period::from_secs(30)
}

fn caller_claim_default() -> String {
    "sub".to_owned()
}

const fn keys_interval_default() -> Period {
    Period::from_secs(60)
}

const fn keys_interval_min_default() -> Period {
    Period::from_secs(5)
}

const fn keys_timeout_default() -> Period {
    Period::from_secs(2)
}

const fn keys_age_max_default() -> Period {
    Period::from_secs(24 * 60 * 60)
}

/// How a token may be signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum JwtAlgorithm {
    /// RSA, PKCS #1, SHA-256.
    RS256,
    /// RSA, PKCS #1, SHA-384.
    RS384,
    /// RSA, PKCS #1, SHA-512.
    RS512,
    /// RSA, PSS, SHA-256.
    PS256,
    /// RSA, PSS, SHA-384.
    PS384,
    /// RSA, PSS, SHA-512.
    PS512,
    /// ECDSA on P-256.
    ES256,
    /// ECDSA on P-384.
    ES384,
    /// Ed25519.
    EdDSA,
}

impl JwtAlgorithm {
    /// As the library has it.
    pub const fn get(self) -> Algorithm {
        match self {
            Self::RS256 => Algorithm::RS256,
            Self::RS384 => Algorithm::RS384,
            Self::RS512 => Algorithm::RS512,
            Self::PS256 => Algorithm::PS256,
            Self::PS384 => Algorithm::PS384,
            Self::PS512 => Algorithm::PS512,
            Self::ES256 => Algorithm::ES256,
            Self::ES384 => Algorithm::ES384,
            Self::EdDSA => Algorithm::EdDSA,
        }
    }
}

/// The load balancer's word.
#[derive(Debug, Clone, Deserialize)]
pub struct TrustedHeaderConfig {
    /// The header that names the caller.
    #[serde(deserialize_with = "header_name")]
    pub name: HeaderName,
    /// Where the balancer's connections come from, as in `10.1.0.0/16`.
    pub addresses: Vec<IpNet>,
}

fn header_name<'de, D: Deserializer<'de>>(source: D) -> Result<HeaderName, D::Error> {
    let name = String::deserialize(source)?;
    name.parse().map_err(|_| serde::de::Error::custom(format!("{name:?} is no name of a header")))
}

impl AuthConfig {
    /// What is wrong with it.
    pub fn mistakes(&self) -> Vec<String> {
        let jwt = self.jwt.as_ref().map(JwtConfig::mistakes);
        let header = self.trusted_header.as_ref().map(TrustedHeaderConfig::mistakes);
        let lacks = match self.mode {
            AuthMode::Jwt if jwt.is_none() => Some("auth.jwt: must be set when auth.mode is jwt"),
            AuthMode::TrustedHeader if header.is_none() => {
                Some("auth.trusted_header: must be set when auth.mode is trusted-header")
            }
            AuthMode::Jwt | AuthMode::TrustedHeader | AuthMode::None => None,
        };
        let lacks = lacks.map(ToOwned::to_owned).into_iter();
        lacks.chain(jwt.into_iter().chain(header).flatten()).collect()
    }
}

impl JwtConfig {
    fn mistakes(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        let mut demand = |holds: bool, mistake: &str| {
            if !holds {
                mistakes.push(format!("auth.jwt.{mistake}"));
            }
        };
        demand(!self.issuer.is_empty(), "issuer: must not be empty");
        demand(!self.audiences.is_empty(), "audiences: must name at least one");
        demand(!self.algorithms.is_empty(), "algorithms: must name at least one");
        let one = self.keys_file.is_some() != self.keys_url.is_some();
        demand(one, "keys_file: or keys_url must be set, and not both");
        for (period, key) in [
            (self.keys_interval, "keys_interval: must be above zero"),
            (self.keys_interval_min, "keys_interval_min: must be above zero"),
            (self.keys_timeout, "keys_timeout: must be above zero"),
        ] {
            demand(0 < period.millis(), key);
        }
        let kept = self.keys_interval < self.keys_age_max;
        demand(kept, "keys_age_max: must be above keys_interval");
        if let Some(url) = &self.keys_url {
            let url = url.parse::<Uri>().ok();
            let whole = url.is_some_and(|url| {
                matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some()
            });
            demand(whole, "keys_url: must be a URL like https://id.example.com/keys.json");
        }
        if let Some(file) = &self.keys_file
            && let Err(error) = keys::read_file(file)
        {
            mistakes.push(format!("auth.jwt.keys_file: {error}"));
        }
        mistakes.extend(tls::roots_mistakes("auth.jwt.keys_url_ca", self.keys_url_ca.as_deref()));
        mistakes
    }
}

impl TrustedHeaderConfig {
    fn mistakes(&self) -> Vec<String> {
        let nowhere = self.addresses.is_empty();
        let said =
            "auth.trusted_header.addresses: must name where the balancer's connections come from";
        nowhere.then(|| said.to_owned()).into_iter().collect()
    }
}
