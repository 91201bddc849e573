//! Who signs callers' tokens.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use serde_json::{Value, json};

pub const ISSUER: &str = "https://id.example.com";
pub const AUDIENCE: &str = "tidemark";

pub struct Issuer {
    id: String,
    key: KeyPair,
}

/// Everything that a token of this caller needs.
pub fn claims(caller: &str) -> Value {
    json!({"iss": ISSUER, "aud": AUDIENCE, "sub": caller, "exp": 9_999_999_999_u64})
}

impl Issuer {
    pub fn new(id: &str) -> Self {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        Self { id: id.to_owned(), key }
    }

    /// The public keys of several, as a JSON Web Key Set.
    pub fn set(issuers: &[&Self]) -> String {
        let keys: Vec<Value> = issuers.iter().map(|issuer| issuer.public()).collect();
        json!({"keys": keys}).to_string()
    }

    fn public(&self) -> Value {
        // The point, uncompressed: a mark, then both coordinates.
        let (x, y) = self.key.public_key_raw()[1..].split_at(32);
        let (x, y) = (URL_SAFE_NO_PAD.encode(x), URL_SAFE_NO_PAD.encode(y));
        json!({"kty": "EC", "crv": "P-256", "use": "sig", "kid": self.id, "x": x, "y": y})
    }

    pub fn token(&self, claims: Value) -> String {
        let key = EncodingKey::from_ec_der(self.key.serialized_der());
        let head = Header { kid: Some(self.id.clone()), ..Header::new(Algorithm::ES256) };
        encode(&head, &without_nulls(claims), &key).unwrap()
    }

    /// What an attacker makes who hopes that the public key is taken for a shared secret.
    pub fn signed_with_its_public_key(&self, claims: Value) -> String {
        let key = EncodingKey::from_secret(self.key.public_key_raw());
        let head = Header { kid: Some(self.id.clone()), ..Header::new(Algorithm::HS256) };
        encode(&head, &claims, &key).unwrap()
    }

    pub fn unsigned(&self, claims: Value) -> String {
        let head = json!({"alg": "none", "kid": self.id}).to_string();
        let [head, claims] = [head, claims.to_string()].map(|part| URL_SAFE_NO_PAD.encode(part));
        format!("{head}.{claims}.")
    }
}

fn without_nulls(mut claims: Value) -> Value {
    claims.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    claims
}
