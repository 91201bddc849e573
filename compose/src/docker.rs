//! The same topology for Docker: the configuration files that `compose/compose.yaml` mounts, written from the same
//! source as those of the plain processes.

use std::path::PathBuf;

use serde_json::json;
use uuid::Uuid;

use crate::local::settings::{GatewaySettings, NatsUser, Place, ProjectorSettings, SharedSecrets};
use crate::local::{LOG_DATABASE, PRIMARY, REGION_DATABASE, REGIONS, http_link};
use crate::nats::{Config, Role, Secret, User, event_link};
use crate::{Error, tools};

const NOTE: &str =
    "Written by `make render`. For a topology on one machine: its passwords are public.";
const PASSWORD: &str = "local-only";
const NATS_PORT: u16 = 4222;
const LEAFNODE_PORT: u16 = 7422;
const GATEWAY_PORT: u16 = 8080;

/// Writes the files into the checkout.
pub fn render() -> Result<(), Error> {
    for (path, text) in files() {
        let path = tools::repository().join(path);
        let folder = path.parent().unwrap_or(&path);
        std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(&path, text))
            .map_err(Error::io(format!("write {}", path.display())))?;
    }
    Ok(())
}

/// Every file by its path in the checkout.
fn files() -> Vec<(PathBuf, String)> {
    let names: Vec<&str> = std::iter::once(PRIMARY).chain(REGIONS.map(|(name, _)| name)).collect();
    let mut files = vec![("compose/toxiproxy.json".into(), toxiproxy())];
    for name in names {
        let nats = nats(name);
        let gateway = gateway(name, &nats).to_string();
        let projector = projector(name, &nats).to_string();
        let texts = [
            ("nats", "conf", nats.to_string()),
            ("gateway", "toml", gateway),
            ("region-projector", "toml", projector),
        ];
        for (folder, ending, text) in texts {
            let path = format!("compose/{folder}/{name}.{ending}");
            files.push((path.into(), format!("# {NOTE}\n{text}")));
        }
    }
    files
}

/// The ports of a region's links at the proxy, by the region's place among them.
fn link_port(region: &str, base: u16) -> u16 {
    let index = REGIONS.iter().position(|(name, _)| *name == region).unwrap_or_default();
    base + u16::try_from(index).expect("there are two regions")
}

fn event_port(region: &str) -> u16 {
    link_port(region, 7001)
}

fn http_port(region: &str) -> u16 {
    link_port(region, 8001)
}

fn nats(region: &str) -> Config {
    let role = if region == PRIMARY {
        let regions = REGIONS.map(|(name, _)| name.to_owned()).to_vec();
        Role::Primary { leafnode_port: LEAFNODE_PORT, regions }
    } else {
        let leaf_remote = format!("toxiproxy:{}", event_port(region));
        Role::Region { primary: PRIMARY.into(), leaf_remote }
    };
    Config {
        region: region.into(),
        role,
        bind: "0.0.0.0".into(),
        client_port: NATS_PORT,
        monitor_port: 8222,
        store: "/data".into(),
        secret: Secret::new(PASSWORD),
        operator: false,
        payload_bytes_max: None,
        tls: None,
    }
}

fn secrets() -> SharedSecrets {
    SharedSecrets {
        log_id: Uuid::from_u128(0x0199_7a00_0000_7000_8000_0000_0000_0001),
        token_key: format!("{PASSWORD}-{PASSWORD}-{PASSWORD}-{PASSWORD}"),
        credential: format!("{PASSWORD}-{PASSWORD}"),
    }
}

fn nats_user(nats: &Config, user: &User) -> NatsUser {
    let name = user.to_string();
    let password = nats.secret.password(&name);
    NatsUser::new(format!("nats://nats-{}:{NATS_PORT}", nats.region), (name, password))
}

fn database_url(region: &str, database: &str) -> String {
    format!("postgres://postgres:{PASSWORD}@postgres-{region}:5432/{database}")
}

fn primary_url(region: &str) -> String {
    match region == PRIMARY {
        true => format!("http://gateway-{PRIMARY}:{GATEWAY_PORT}"),
        false => format!("http://toxiproxy:{}", http_port(region)),
    }
}

fn gateway(region: &str, nats: &Config) -> GatewaySettings {
    let place = if region == PRIMARY {
        let relay = nats_user(nats, &User::Relay);
        Place::Primary { log_database_url: database_url(PRIMARY, LOG_DATABASE), relay }
    } else {
        Place::Region { primary: PRIMARY.into(), primary_url: primary_url(region) }
    };
    GatewaySettings {
        region: region.into(),
        place,
        listen: format!("0.0.0.0:{GATEWAY_PORT}"),
        admin: "0.0.0.0:9090".into(),
        database_url: database_url(region, REGION_DATABASE),
        nats: nats_user(nats, &User::Gateway),
        secrets: secrets(),
        extra: String::new(),
    }
}

fn projector(region: &str, nats: &Config) -> ProjectorSettings {
    ProjectorSettings {
        region: region.into(),
        primary: PRIMARY.into(),
        admin: "0.0.0.0:9090".into(),
        database_url: database_url(region, REGION_DATABASE),
        nats: nats_user(nats, &User::Projector),
        primary_url: primary_url(region),
        secrets: secrets(),
    }
}

fn toxiproxy() -> String {
    let proxy = |name: String, port: u16, upstream: String| json!({ "name": name, "listen": format!("0.0.0.0:{port}"), "upstream": upstream, "enabled": true });
    let proxies: Vec<_> = REGIONS
        .iter()
        .flat_map(|(region, _)| {
            let leafnodes = format!("nats-{PRIMARY}:{LEAFNODE_PORT}");
            let gateway = format!("gateway-{PRIMARY}:{GATEWAY_PORT}");
            [
                proxy(event_link(region), event_port(region), leafnodes),
                proxy(http_link(region), http_port(region), gateway),
            ]
        })
        .collect();
    format!("{:#}\n", json!(proxies))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_in_the_checkout_are_what_would_be_written() {
        for (path, text) in files() {
            let found =
                std::fs::read_to_string(tools::repository().join(&path)).unwrap_or_default();
            assert!(found == text, "{} is not current: make render", path.display());
        }
    }
}
