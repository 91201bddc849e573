//! What regions say to each other in headers. Believed only beside the right credential.

use http::{HeaderMap, HeaderName, HeaderValue};
use process::config::Secret;

use crate::{
    error::Error,
    gateway::{Gateway, Role},
    request::Call,
};

/// Proves that a request comes from a gateway or projector of ours.
pub const CREDENTIAL: HeaderName = HeaderName::from_static("tidemark-credential");
/// The region that forwards a request. A request that has it is not forwarded again.
pub const HOP: HeaderName = HeaderName::from_static("tidemark-hop");
/// The region that is asked because it is taken for the primary.
pub const ASKED: HeaderName = HeaderName::from_static("tidemark-primary");
/// The region that a projector reads the log for.
pub const REGION: HeaderName = HeaderName::from_static("tidemark-region");
/// Milliseconds that are left for the answer.
pub const DEADLINE_MS: HeaderName = HeaderName::from_static("tidemark-deadline-ms");
/// Who asked the region that forwards: its callers' idempotency keys are theirs alone.
pub const CALLER: HeaderName = HeaderName::from_static("tidemark-caller");
/// The log's head at the primary when it answered, as `<epoch>.<position>`.
pub const HEAD: HeaderName = HeaderName::from_static("tidemark-head");

const PREFIX: &str = "tidemark-";

/// Whether the sender proved itself. When not, everything that only regions may say is taken out, so
/// that nothing after this line can believe it. The proof itself goes no further in either case.
pub fn authenticate(headers: &mut HeaderMap, credential: &Secret) -> bool {
    let presented = headers.get(CREDENTIAL).and_then(|value| value.to_str().ok());
    let proven = presented.is_some_and(|presented| credential.matches(presented));
    headers.remove(CREDENTIAL);
    if !proven {
        strip(headers);
    }
    proven
}

/// Whether only regions may say it.
pub fn is_of_regions(name: &HeaderName) -> bool {
    name.as_str().starts_with(PREFIX)
}

fn strip(headers: &mut HeaderMap) {
    let ours: Vec<HeaderName> =
        headers.keys().filter(|name| is_of_regions(name)).cloned().collect();
    for name in ours {
        headers.remove(name);
    }
}

/// Refuses what a region asks of us because it takes us for somebody we are not. A forwarded request is
/// for the primary and goes no further; one from a region of our own name would go in a circle.
pub fn is_for_us(gateway: &Gateway, call: &Call) -> Result<(), Error> {
    if !call.trusted {
        return Ok(());
    }
    let region = gateway.config.region.as_str();
    let says = |name, value: &str| call.headers.get(name).is_some_and(|said| said == value);
    let asked_for_another = call.headers.contains_key(ASKED) && !says(ASKED, region);
    let is_region = matches!(gateway.role, Role::Region(_));
    let lost = call.hop && (is_region || says(HOP, region));
    if lost || asked_for_another { Err(Error::NotPrimary) } else { Ok(()) }
}

/// The credential as a header that is never shown in logs.
pub fn credential(secret: &Secret) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(secret.expose()).ok()?;
    value.set_sensitive(true);
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_regions_may_say_is_taken_from_strangers() {
        let secret = Secret::new("hush");
        for (presented, believed) in [(Some("hush"), true), (Some("husk"), false), (None, false)] {
            let mut headers = HeaderMap::new();
            headers.insert(HOP, HeaderValue::from_static("eu-west"));
            headers.insert(DEADLINE_MS, HeaderValue::from_static("99999"));
            headers.insert("accept", HeaderValue::from_static("*/*"));
            if let Some(presented) = presented {
                headers.insert(CREDENTIAL, HeaderValue::from_static(presented));
            }
            assert_eq!(authenticate(&mut headers, &secret), believed);
            assert_eq!(headers.contains_key(HOP), believed);
            assert!(!headers.contains_key(CREDENTIAL));
            assert_eq!(headers.contains_key(DEADLINE_MS), believed);
            assert!(headers.contains_key("accept"));
        }
    }
}
