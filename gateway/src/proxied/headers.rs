//! What goes on in headers, and what ends here (RFC 9110, section 7.6).

use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderName, HeaderValue, Version, header, uri::Authority};

use crate::{
    config::Scheme,
    gateway::Gateway,
    hop,
    request::{CONSISTENCY_POLICY, Call, REQUEST_ID},
    token_carrier::CONSISTENCY_TOKEN,
};

/// How far a service's answer is, as `<epoch>.<position>`: what it read in the snapshot of its rows.
pub const CONSISTENCY_POSITION: HeaderName = HeaderName::from_static("consistency-position");

/// Whether it is of one connection only, whether or not `Connection` names it. `Expect` was answered here, by
/// reading the body.
fn is_hop_by_hop(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "connection"
            | "keep-alive"
            | "proxy-connection"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
            | "http2-settings"
            | "expect"
    )
}

/// The headers of a request as the next one gets them: those of its caller, without what was said to us
/// or to the connection, and with what we say. `Connection` cannot name what we add.
pub fn outgoing(gateway: &Gateway, call: &Call) -> HeaderMap {
    let ours = [CONSISTENCY_TOKEN, CONSISTENCY_POLICY, header::HOST, REQUEST_ID];
    let mut headers = end_to_end(call.headers.clone(), &ours);
    gateway.carrier.strip_cookie(&mut headers);
    let forwarded = forwarded(call.peer, authority(call).as_deref(), gateway.config.listen.scheme);
    headers.insert(CONSISTENCY_TOKEN, gateway.carrier.header(&call.token));
    add(&mut headers, header::VIA, &via(gateway, call.version));
    add(&mut headers, header::FORWARDED, &forwarded);
    headers.insert(REQUEST_ID, call.id.header());
    headers
}

/// The headers of an answer as the caller gets them. What it says to us is read elsewhere.
pub fn answered(gateway: &Gateway, headers: HeaderMap, version: Version) -> HeaderMap {
    let ours = [CONSISTENCY_TOKEN, CONSISTENCY_POSITION, crate::forward::CONSISTENCY_STATUS];
    let mut headers = end_to_end(headers, &ours);
    add(&mut headers, header::VIA, &via(gateway, version));
    headers
}

/// Whether the request has been here before.
pub fn came_back(gateway: &Gateway, headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::VIA).iter().filter_map(|value| value.to_str().ok());
    let mut received = values.flat_map(|value| value.split(','));
    received.any(|by| by.split_whitespace().nth(1) == Some(gateway.proxy_name.as_str()))
}

/// Without what is said to the connection, by regions, or in `ours`.
fn end_to_end(mut headers: HeaderMap, ours: &[HeaderName]) -> HeaderMap {
    let named = headers.get_all(header::CONNECTION).iter();
    let named = named.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
    let named: Vec<&str> = named.map(str::trim).collect();
    let ends_here = |name: &&HeaderName| {
        is_hop_by_hop(name)
            || ours.contains(name)
            || hop::is_of_regions(name)
            || named.iter().any(|named| named.eq_ignore_ascii_case(name.as_str()))
    };
    let ending: Vec<HeaderName> = headers.keys().filter(ends_here).cloned().collect();
    for name in ending {
        headers.remove(name);
    }
    headers
}

/// What we add to `Via` for a message that came by this protocol.
fn via(gateway: &Gateway, version: Version) -> String {
    [protocol(version), &gateway.proxy_name].join(" ")
}

fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_09 | Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2.0",
        // There is none that we speak and is not listed.
        _ => "1.1",
    }
}

fn authority(call: &Call) -> Option<String> {
    let host = || call.headers.get(header::HOST).and_then(|host| host.to_str().ok());
    call.authority.as_ref().map(Authority::as_str).or_else(host).map(ToOwned::to_owned)
}

/// One element of `Forwarded` (RFC 7239).
fn forwarded(peer: Option<SocketAddr>, host: Option<&str>, scheme: Scheme) -> String {
    let node = match peer.map(|peer| peer.ip()) {
        Some(IpAddr::V4(address)) => address.to_string(),
        Some(IpAddr::V6(address)) => format!("\"[{address}]\""),
        None => "unknown".to_owned(),
    };
    let proto = match scheme {
        Scheme::Http => "http",
        Scheme::Https => "https",
    };
    let quotable = |host: &&str| !host.contains(['"', '\\']);
    let host = host.filter(quotable).map_or_else(String::new, |host| format!(";host=\"{host}\""));
    format!("for={node}{host};proto={proto}")
}

fn add(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.append(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_to_a_connection_ends_with_it_and_so_does_what_it_names() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "keep-alive, X-Secret"),
            ("connection", "close"),
            ("x-secret", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("tidemark-credential", "hush"),
            ("accept", "*/*"),
            ("accept-encoding", "gzip"),
            ("set-cookie", "a=1"),
            ("set-cookie", "b=2"),
        ] {
            headers.append(name, HeaderValue::from_static(value));
        }
        let kept = end_to_end(headers, &[header::ACCEPT_ENCODING]);
        let mut names: Vec<&str> = kept.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["accept", "set-cookie", "set-cookie"]);
    }

    #[test]
    fn forwarded_says_who_asked_for_which_host() {
        let peer = |text: &str| Some(text.parse::<SocketAddr>().unwrap());
        assert_eq!(
            forwarded(peer("10.0.0.7:99"), Some("shop.example:8080"), Scheme::Https),
            "for=10.0.0.7;host=\"shop.example:8080\";proto=https"
        );
        assert_eq!(
            forwarded(peer("[2001:db8::1]:99"), Some("a\"b"), Scheme::Http),
            "for=\"[2001:db8::1]\";proto=http"
        );
    }
}
