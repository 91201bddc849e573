//! Callers as the load balancer in front names them.

use http::{HeaderMap, HeaderName};
use ipnet::IpNet;
use process::server::Peer;

use super::{Caller, Refusal, TrustedHeaderConfig};
use crate::error::Challenge;

/// Believes a header of the balancer's addresses only.
#[derive(Debug)]
pub struct Balancer {
    header: HeaderName,
    addresses: Vec<IpNet>,
}

impl Balancer {
    /// As configured.
    pub fn new(config: &TrustedHeaderConfig) -> Self {
        Self { header: config.name.clone(), addresses: config.addresses.clone() }
    }

    /// Who asks. The header is taken out when it is not the balancer's, and of what the balancer sends
    /// there must be one: of two, one may be the caller's own.
    pub fn caller(&self, headers: &mut HeaderMap, peer: Peer) -> Result<Caller, Refusal> {
        let stranger = Refusal::Stranger(Challenge::Balancer);
        if !self.is_balancer(peer.0.ip()) {
            headers.remove(&self.header);
            return Err(stranger);
        }
        let mut given = headers.get_all(&self.header).iter();
        let name = given.next().and_then(|name| std::str::from_utf8(name.as_bytes()).ok());
        let single = given.next().is_none();
        name.filter(|_| single).and_then(Caller::named).ok_or(stranger)
    }

    fn is_balancer(&self, address: std::net::IpAddr) -> bool {
        // A listener for both families sees addresses of version 4 inside those of version 6.
        let address = address.to_canonical();
        self.addresses.iter().any(|net| net.contains(&address))
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn asked(peer: &str, names: &[&'static str]) -> (Result<Caller, Refusal>, bool) {
        let config = TrustedHeaderConfig {
            name: HeaderName::from_static("x-user"),
            addresses: vec!["10.1.0.0/16".parse().unwrap(), "fd00::7/128".parse().unwrap()],
        };
        let mut headers = HeaderMap::new();
        for name in names {
            headers.append("x-user", HeaderValue::from_static(name));
        }
        let peer = Peer(peer.parse().unwrap());
        let caller = Balancer::new(&config).caller(&mut headers, peer);
        (caller, headers.contains_key("x-user"))
    }

    #[test]
    fn the_header_is_believed_from_the_balancer_and_taken_from_all_others() {
        let ada = Caller::named("ada").unwrap();
        for peer in ["10.1.2.3:1", "[::ffff:10.1.2.3]:1", "[fd00::7]:1"] {
            assert_eq!(asked(peer, &["ada"]), (Ok(ada.clone()), true), "{peer}");
        }
        for peer in ["10.2.0.1:1", "127.0.0.1:1", "[fd00::8]:1"] {
            let (caller, left) = asked(peer, &["ada"]);
            assert!(caller.is_err() && !left, "{peer}");
        }
    }

    #[test]
    fn a_balancer_that_names_nobody_or_two_is_refused() {
        assert!(asked("10.1.2.3:1", &[]).0.is_err());
        assert!(asked("10.1.2.3:1", &[""]).0.is_err());
        assert!(asked("10.1.2.3:1", &["ada", "bob"]).0.is_err());
    }
}
