//! Bearer tokens that an issuer signed (RFC 7519, RFC 6750).

use std::collections::HashMap;

use http::{HeaderMap, header};
use jsonwebtoken::{Validation, decode, decode_header, errors::ErrorKind};
use process::admin::Readiness;
use tokio_util::sync::CancellationToken;

use super::{
    Caller, JwtConfig, Refusal,
    keys::{Keys, KeysError, Lookup},
};
use crate::error::Challenge;

/// Longer tokens are not looked at.
const TOKEN_BYTES_MAX: usize = 16 * 1024;

/// Verifies tokens of one issuer.
#[derive(Debug)]
pub struct Verifier {
    keys: Keys,
    /// One for each way of signing that is taken.
    validations: Vec<Validation>,
    caller_claim: String,
}

impl Verifier {
    /// As configured.
    pub fn open(config: &JwtConfig) -> Result<Self, KeysError> {
        let validations = config.algorithms.iter().map(|taken| {
            let mut validation = Validation::new(taken.get());
            validation.leeway = config.leeway.get().as_secs();
            validation.validate_nbf = true;
            validation.set_issuer(&[&config.issuer]);
            validation.set_audience(&config.audiences);
            // A claim that is checked only when it is there need not be there.
            validation.set_required_spec_claims(&["exp", "iss", "aud"]);
            validation
        });
        Ok(Self {
            keys: Keys::open(config)?,
            validations: validations.collect(),
            caller_claim: config.caller_claim.clone(),
        })
    }

    /// Says in `readiness` that there are no keys yet, when there are none.
    pub fn expect_keys(&self, readiness: &Readiness) {
        self.keys.expect(readiness);
    }

    /// Keeps the keys fresh until `stop`.
    pub async fn keep_fresh(&self, readiness: &Readiness, stop: CancellationToken) {
        self.keys.keep_fresh(readiness, stop).await;
    }

    /// Who the bearer of the request's token is.
    pub async fn caller(&self, headers: &HeaderMap) -> Result<Caller, Refusal> {
        let token = bearer(headers)?;
        let head = decode_header(token).map_err(|_| refused("it is no token"))?;
        let validation = self.validations.iter().find(|known| known.algorithms == [head.alg]);
        let validation =
            validation.ok_or_else(|| refused("it is signed in a way that is not taken"))?;
        // Whoever wrote it insists on rules that are not known here.
        if head.crit.is_some() {
            return Err(refused("it is critical about what is not known here"));
        }
        let key = match self.keys.find(head.kid.as_deref(), head.alg).await {
            Lookup::Found(key) => key,
            Lookup::Absent => return Err(refused("its key is not known")),
            Lookup::NoKeys => return Err(Refusal::KeysUnknown),
        };
        let claims = decode::<HashMap<String, serde_json::Value>>(token, &key, validation)
            .map_err(|error| refused(why(error.kind())))?
            .claims;
        let name = claims.get(&self.caller_claim).and_then(|name| name.as_str());
        name.and_then(Caller::named).ok_or_else(|| refused("it does not name its bearer"))
    }
}

/// Two tokens may be of two callers, so there is one.
fn bearer(headers: &HeaderMap) -> Result<&str, Refusal> {
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    let Some(first) = given.next() else {
        return Err(Refusal::Stranger(Challenge::Bearer(None)));
    };
    let token = first.to_str().ok().and_then(|text| text.split_once(' '));
    let token = token.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    let token = token.map(|(_, token)| token.trim()).filter(|_| given.next().is_none());
    token
        .filter(|token| token.len() <= TOKEN_BYTES_MAX)
        .ok_or_else(|| refused("there is not one bearer token"))
}

const fn refused(why: &'static str) -> Refusal {
    Refusal::Stranger(Challenge::Bearer(Some(why)))
}

/// What its bearer can do something about.
#[allow(clippy::wildcard_enum_match_arm, reason = "most kinds are one to its bearer")]
fn why(kind: &ErrorKind) -> &'static str {
    match kind {
        ErrorKind::ExpiredSignature => "it has expired",
        ErrorKind::ImmatureSignature => "it is not valid yet",
        ErrorKind::InvalidIssuer => "it is of another issuer",
        ErrorKind::InvalidAudience => "it is for another audience",
        ErrorKind::MissingRequiredClaim(_) => "it lacks one of exp, iss and aud",
        _ => "its signature does not fit",
    }
}
