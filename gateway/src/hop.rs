//! What regions say to each other in headers. Believed only beside the right credential.

use http::{HeaderMap, HeaderName, HeaderValue};
use process::config::Secret;

/// Proves that a request comes from a gateway or projector of ours.
pub const CREDENTIAL: HeaderName = HeaderName::from_static("tidemark-credential");
/// The region that forwards a request. A request that has it is not forwarded again.
pub const HOP: HeaderName = HeaderName::from_static("tidemark-hop");
/// Milliseconds that are left for the answer.
pub const DEADLINE_MS: HeaderName = HeaderName::from_static("tidemark-deadline-ms");
/// Who asked the region that forwards: its callers' idempotency keys are theirs alone.
pub const CALLER: HeaderName = HeaderName::from_static("tidemark-caller");
/// The log's head at the primary when it answered, as `<epoch>.<position>`.
pub const HEAD: HeaderName = HeaderName::from_static("tidemark-head");

const PREFIX: &str = "tidemark-";

/// Whether the sender proved itself. When not, everything that only regions may say is taken out, so
/// that nothing after this line can believe it.
pub fn authenticate(headers: &mut HeaderMap, credential: &Secret) -> bool {
    let presented = headers.get(CREDENTIAL).and_then(|value| value.to_str().ok());
    let proven = presented.is_some_and(|presented| credential.matches(presented));
    if !proven {
        let ours: Vec<HeaderName> =
            headers.keys().filter(|name| name.as_str().starts_with(PREFIX)).cloned().collect();
        for name in ours {
            headers.remove(name);
        }
    }
    proven
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
            assert_eq!(headers.contains_key(DEADLINE_MS), believed);
            assert!(headers.contains_key("accept"));
        }
    }
}
