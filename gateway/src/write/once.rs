//! Writes that are done once however often they are sent: `Idempotency-Key`.

use event_store::{AnswerFormat, EventStore, Idempotency, Repeat};
use sha2::{Digest as _, Sha256};

use super::{said, written};
use crate::{
    answer::Answer,
    error::Error,
    gateway::Gateway,
    request::{Call, IDEMPOTENCY_KEY, IDEMPOTENCY_REPLAYED},
};

/// The rules of [`written`].
const ANSWER_FORMAT: AnswerFormat = AnswerFormat::FIRST;
/// Longest `Idempotency-Key`.
pub const KEY_BYTES_MAX: usize = 255;

/// The key of a request that has one, scoped by caller, method and path: the same key of another caller
/// or on another path is another key. The body makes the request the same or another one. What the
/// request expects of the aggregate does not: who retries may have read the aggregate in between.
pub fn key(call: &Call) -> Result<Option<Idempotency>, Error> {
    let mut given = call.headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(key) = given.next() else { return Ok(None) };
    let key = key.as_bytes();
    let bounded = (1..=KEY_BYTES_MAX).contains(&key.len());
    if !bounded || !key.iter().all(u8::is_ascii_graphic) || given.next().is_some() {
        let said =
            format!("Idempotency-Key is one of 1 to {KEY_BYTES_MAX} visible ASCII characters");
        return Err(Error::BadRequest(said));
    }
    let caller = call.caller.name().unwrap_or_default().as_bytes();
    Ok(Some(Idempotency {
        scope: hash(&[caller, call.method.as_str().as_bytes(), call.path.as_bytes()]),
        key: hash(&[key]),
        request: hash(&[&call.body]),
        answer_format: ANSWER_FORMAT,
    }))
}

/// What the events of a request under a key say of it: one hash over scope and key.
pub fn mark(key: &Idempotency) -> [u8; 32] {
    hash(&[&key.scope, &key.key])
}

/// Each part's length goes before it, so that no two lists of parts read alike.
fn hash(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// The answer to a request whose key was used before; `None` when it was not, or there is no key.
pub async fn answered(
    gateway: &Gateway,
    store: &EventStore,
    call: &Call,
    key: Option<&Idempotency>,
) -> Result<Option<Answer>, Error> {
    let Some(key) = key else { return Ok(None) };
    let repeat = match tokio::time::timeout_at(call.deadline, store.find_repeat(key)).await {
        Ok(Ok(repeat)) => repeat,
        Ok(Err(error)) => return Err(Error::unreachable("its log cannot be read", error)),
        Err(_) => {
            return Err(Error::PrimaryUnreachable { detail: "its log is slow", source: None });
        }
    };
    repeat.map(|repeat| repeated(gateway, call, repeat)).transpose()
}

/// The first answer once more, or the refusal of another request.
pub fn repeated(gateway: &Gateway, call: &Call, repeat: Repeat) -> Result<Answer, Error> {
    let first = match repeat {
        Repeat::Replayed(first) => first,
        Repeat::Mismatched => {
            gateway.instruments.appended("mismatched");
            return Err(Error::IdempotencyMismatch);
        }
    };
    gateway.instruments.appended("repeated");
    gateway.currency.saw_head(first.appended.last_position());
    if first.answer_format != ANSWER_FORMAT {
        // One that knows them is being deployed beside us.
        let detail = "its answer was made by rules that this release does not know";
        return Err(Error::PrimaryUnreachable { detail, source: None });
    }
    let answer = written(&first.aggregate, &first.appended);
    let said = said(gateway, call, first.appended.last_position());
    Ok(answer.saying(said).with_header(IDEMPOTENCY_REPLAYED, "true"))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use consistency::{Epoch, Token};
    use http::HeaderName;
    use tokio::time::Instant;

    use super::*;
    use crate::hop;

    fn call(path: &str, headers: &[(HeaderName, &str)], trusted: bool) -> Call {
        let mut request = http::Request::post(format!("http://host{path}"));
        for (name, value) in headers {
            request = request.header(name, *value);
        }
        let (parts, ()) = request.body(()).unwrap().into_parts();
        let now = Instant::now();
        Call::new(parts, (Token::new(Epoch::FIRST), false), trusted, (now, now))
    }

    fn keyed(value: &str) -> (HeaderName, &str) {
        (IDEMPOTENCY_KEY, value)
    }

    #[test]
    fn a_key_is_visible_ascii_of_bounded_length_and_there_is_one() {
        let of = |headers: &[(HeaderName, &str)]| key(&call("/v1/x", headers, false));
        assert!(of(&[]).unwrap().is_none());
        let longest = "k".repeat(255);
        for good in ["k", "\"8e03978e-40d5\"", "~!", &longest] {
            assert!(of(&[keyed(good)]).unwrap().is_some(), "{good}");
        }
        let too_long = "k".repeat(256);
        for bad in ["", "a b", "k\u{e9}", "a\tb", &too_long] {
            assert!(of(&[keyed(bad)]).is_err(), "{bad}");
        }
        assert!(of(&[keyed("a"), keyed("a")]).is_err());
    }

    #[test]
    fn a_key_is_scoped_by_caller_method_and_path_and_a_stranger_cannot_name_another_caller() {
        let of = |call: Call| key(&call).unwrap().unwrap();
        let from = |caller, trusted| {
            of(call("/v1/a", &[keyed("k"), (hop::CALLER, caller)], trusted)).scope
        };
        let plain = of(call("/v1/a", &[keyed("k")], false));
        assert_eq!(of(call("/v1/a", &[keyed("k")], true)), plain, "through a region as directly");
        assert_eq!(from("ada", false), plain.scope);
        assert_ne!(from("ada", true), plain.scope);
        assert_ne!(from("ada", true), from("bob", true));
        assert_ne!(of(call("/v1/b", &[keyed("k")], false)).scope, plain.scope);
        let put = Call { method: http::Method::PUT, ..call("/v1/a", &[keyed("k")], false) };
        assert_ne!(of(put).scope, plain.scope);
        let other_body = Call { body: Bytes::from("{}"), ..call("/v1/a", &[keyed("k")], false) };
        let other_body = of(other_body);
        assert_eq!((other_body.scope, other_body.key), (plain.scope, plain.key));
        assert_ne!(other_body.request, plain.request);
        let other = of(call("/v1/a", &[keyed("l")], false));
        assert_eq!(other.scope, plain.scope);
        assert_ne!(other.key, plain.key);
        assert_ne!(mark(&other), mark(&plain));
    }
}
