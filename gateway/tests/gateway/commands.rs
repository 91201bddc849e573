//! What the gateway's command line says without running a gateway.

use std::process::{Command, Output};

use consistency::{Claim, Epoch, Token, Version};
use gateway::GatewayConfig;
use process::config::load_from;

use crate::world::position;

const SOUND: &str = r#"
    region = "eu-west"
    listen.address = "127.0.0.1:0"
    admin.address = "127.0.0.1:0"
    log.id = "00000000-0000-0000-0000-000000000007"
    token = { signing_key = 1, keys = [{ id = 1, secret = "0123456789abcdef0123456789abcdef" }] }
    database.url = "postgres://127.0.0.1/region"
    nats.url = "nats://127.0.0.1:4222"
    primary_region = { name = "us-east", url = "http://127.0.0.1:8081" }
    regions.credential = "0123456789abcdef"
    auth.mode = "none"
"#;

fn written(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

fn run(arguments: &[&str]) -> (Option<i32>, String) {
    let gateway = env!("CARGO_BIN_EXE_gateway");
    let Output { status, stdout, stderr } =
        Command::new(gateway).args(arguments).env_remove("GATEWAY_CONFIG").output().unwrap();
    let said = String::from_utf8([stdout, stderr].concat()).unwrap();
    (status.code(), said)
}

#[test]
fn a_configuration_is_checked_without_starting_and_every_mistake_is_named() {
    let sound = written(SOUND);
    let (code, said) = run(&["check-config", sound.path().to_str().unwrap()]);
    assert_eq!(code, Some(0), "{said}");
    let wrong = SOUND.replace("\"none\"", "\"jwt\"").replace("http://127", "ftp://127");
    let more = r#"
        cors.origins = ["*"]
        rate_limit = { requests_per_second = 0, burst = 1 }
        listen.tls = { certificate = "/nowhere.pem", key = "/nowhere.key" }
    "#;
    let wrong = written(&format!("{wrong}{more}"));
    let (code, said) = run(&["check-config", wrong.path().to_str().unwrap()]);
    assert_eq!(code, Some(64), "{said}");
    for key in [
        "auth.jwt",
        "primary_region.url",
        "cors.origins",
        "rate_limit.requests_per_second",
        "listen.tls",
    ] {
        assert!(said.contains(&format!("- {key}:")), "{key}: {said}");
    }
    let (code, said) = run(&["check-config", "/nowhere.toml"]);
    assert!(code == Some(64) && said.contains("/nowhere.toml"), "{said}");
    let (code, said) = run(&[]);
    assert!(code == Some(64) && said.contains("--config"), "{said}");
}

#[test]
fn a_token_is_looked_at_and_checked_where_there_are_keys() {
    let config: GatewayConfig = load_from(SOUND.parse().unwrap(), "GATEWAY", []).unwrap();
    let aggregate = consistency::AggregateId::new(consistency::Name::new("order").unwrap(), "o-1");
    let claim = Claim {
        aggregate: aggregate.unwrap().key(),
        version: Version::new(3).unwrap(),
        position: position(41),
    };
    let token = Token::new(Epoch::FIRST).with_read(position(40)).with_claim(claim);
    let sealed = config.key_ring().unwrap().seal(&token);
    let (code, said) = run(&["token", "inspect", &sealed]);
    assert_eq!(code, Some(0), "{said}");
    for shown in ["read position  40", "version 3, position 41", "not checked"] {
        assert!(said.contains(shown), "{shown}: {said}");
    }
    let file = written(SOUND);
    let file = file.path().to_str().unwrap();
    let (code, said) = run(&["token", "inspect", &sealed, "--config", file]);
    assert_eq!((code, said.lines().last()), (Some(0), Some("seal           fits")), "{said}");
    let other = written(
        &SOUND.replace("0123456789abcdef0123456789abcdef", "another secret of another key!!!"),
    );
    let (code, said) =
        run(&["token", "inspect", &sealed, "--config", other.path().to_str().unwrap()]);
    assert!(code == Some(1) && said.contains("does not fit"), "{said}");
    let (code, said) = run(&["token", "inspect", "no token!"]);
    assert!(code == Some(1) && said.contains("no token"), "{said}");
}
