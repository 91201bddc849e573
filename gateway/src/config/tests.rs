use process::config::{ConfigError, load_from};

use super::*;

const REGION: &str = r#"
    region = "eu-west"
    listen.address = "127.0.0.1:0"
    admin.address = "127.0.0.1:0"
    log.id = "00000000-0000-0000-0000-000000000001"
    token = { signing_key = 1, keys = [{ id = 1, secret = "0123456789abcdef0123456789abcdef" }] }
    database.url = "postgres://me:hush@127.0.0.1/region"
    nats = { url = "nats://127.0.0.1:4222", user = "gateway", password = "hush" }
    primary_region = { name = "us-east", url = "http://127.0.0.1:8081" }
    regions.credential = "0123456789abcdef"
    auth.mode = "none"
    views.order-detail.policy = "wait;ms=250, forward"
"#;

fn read(text: &str) -> Result<GatewayConfig, ConfigError> {
    load_from(text.parse().unwrap(), "GATEWAY", [])
}

fn mistakes(text: &str) -> String {
    match read(text) {
        Err(ConfigError::Mistakes(mistakes)) => mistakes.join("\n"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_region_needs_little_and_prints_no_secret() {
    let config = read(REGION).unwrap();
    assert_eq!(config.primary_name().as_str(), "us-east");
    let printed = format!("{config:?}");
    assert!(!printed.contains("hush") && !printed.contains("0123456789abcdef"), "{printed}");
}

#[test]
fn a_primary_without_a_log_is_refused() {
    let found = mistakes(&format!("primary = true\n{REGION}"));
    for key in ["log_database:", "relay:", "primary_region:"] {
        assert!(found.contains(key), "{found}");
    }
}

#[test]
fn weak_secrets_and_wrong_policies_are_refused() {
    let weak = REGION.replace("0123456789abcdef0123456789abcdef", "short");
    assert!(mistakes(&weak).contains("token: key 1"));
    let wrong = REGION.replace("wait;ms=250, forward", "hope");
    assert!(mistakes(&wrong).contains("views.order-detail.policy:"));
    let open = REGION.replace("admin.address = \"127.0.0.1:0\"", "admin.address = \"0.0.0.0:1\"");
    assert!(mistakes(&open).contains("admin.credential:"));
}
