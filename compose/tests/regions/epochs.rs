//! The runbook for a log that lost its tail, followed on real regions with the real programs.

use std::path::PathBuf;
use std::time::Duration;

use compose::demo::caller::Caller;
use compose::local::Stack;
use compose::nats::event_link;
use compose::process::{Program, run};
use serde_json::Value;

use crate::stack::{EUROPE, add_item, assert_local, caller, place, settled, start};
use crate::topology::eventually;

const RUNBOOK: &str = include_str!("../../../docs/operating.md");
const PRIMARY: &str = "us-east";
const ASIA: &str = "asia-south";
const PATIENCE: Duration = Duration::from_secs(60);

/// A command line of the runbook, with what stands for something else there put in its place.
fn as_written(line: &str, replaced: &[(&str, &str)]) -> Vec<String> {
    assert!(RUNBOOK.contains(&format!("    {line}\n")), "the runbook does not say {line}");
    let put = |word: &str| {
        let found = replaced.iter().find(|(written, _)| *written == word);
        found.map_or(word, |(_, real)| real).to_owned()
    };
    line.split(' ').map(put).collect()
}

/// Beside this test, or above it.
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    own.ancestors().nth(2).unwrap().join(name)
}

/// The projections that a region's projector keeps.
async fn projections_of(stack: &Stack, config: &str) -> Vec<String> {
    let words = ["region-projector", "--config", config, "versions", "--json"];
    let listed = runs(stack, program("region-projector"), &words.map(str::to_owned)).await;
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let versions = listed["versions"].as_array().unwrap().iter();
    versions.map(|version| version["projection"].as_str().unwrap().to_owned()).collect()
}

pub async fn runs(stack: &Stack, program: PathBuf, words: &[String]) -> String {
    let log = stack.addresses().folder.join("operator.log");
    run(Program::new(&words[0], program, log).args(&words[1..])).await.unwrap()
}

async fn admin(url: &str, path: &str) -> String {
    let Ok(answer) = reqwest::get(format!("{url}{path}")).await else { return String::new() };
    answer.text().await.unwrap_or_default()
}

/// Whether every checkpoint of a region's projector counts in the second epoch.
async fn has_adopted(stack: &Stack, region: &str) -> bool {
    let url = stack.region(region).unwrap().projector.admin_url();
    let status: Value = serde_json::from_str(&admin(&url, "/status").await).unwrap_or_default();
    let projections = status["projections"].as_array().cloned().unwrap_or_default();
    let partitions: Vec<Value> = projections
        .iter()
        .flat_map(|projection| projection["partitions"].as_array().cloned().unwrap_or_default())
        .collect();
    !partitions.is_empty() && partitions.iter().all(|partition| partition["epoch"] == 2)
}

async fn knows_the_epoch(caller: &mut Caller) -> bool {
    caller.get("/v1/currency", "").await.is_ok_and(|answer| answer.body["epoch"] == 2)
}

async fn tells(stack: &Stack, region: &str, what: &str) {
    let region = stack.region(region).unwrap();
    let (gateway, projector) = (region.gateway.admin_url(), region.projector.admin_url());
    eventually(what, async || {
        let said = admin(&gateway, "/readyz").await + &admin(&projector, "/readyz").await;
        said.contains(what)
    })
    .await;
}

/// A write that Asia has and Europe has not, and the log without it. Returns the order's path and the last position
/// that is kept.
async fn lose_a_write(stack: &mut Stack, europe: &mut Caller, asia: &mut Caller) -> (String, u64) {
    let path = place(europe, "o-lost").await;
    asia.adopt(europe);
    assert_local(&settled(europe, &path, PATIENCE).await, 1);
    assert_local(&settled(asia, &path, PATIENCE).await, 1);
    let backup = stack.region_mut(PRIMARY).unwrap().postgres.copy_data().await.unwrap();

    stack.proxies.set_enabled(&event_link(EUROPE), false).await.unwrap();
    eventually("the primary takes writes again after the backup", async || {
        let mut probe = caller(stack, PRIMARY);
        probe.get("/v1/aggregates/order/o-lost", "").await.is_ok_and(|it| it.status == 200)
    })
    .await;
    let kept = add_item(europe, "o-lost").await;
    let kept = kept.body["position"].as_u64().unwrap() - 1;
    asia.adopt(europe);
    assert_local(&settled(asia, &path, PATIENCE).await, 2);

    // The runbook, step 1 and what it is for.
    let primary = stack.region_mut(PRIMARY).unwrap();
    primary.projector.stop().await.unwrap();
    primary.postgres.restore(&backup).await.unwrap();
    (path, kept)
}

/// The runbook, step 4: everything that a region keeps is built anew.
async fn rebuild_all(stack: &Stack, region: &str) {
    let config = stack.addresses().folder.join(region).join("region-projector.toml");
    let config = config.to_str().unwrap();
    let own = |line: &str, projection: &str| {
        as_written(line, &[("projector.toml", config), ("orders", projection)])
    };
    let projections = projections_of(stack, config).await;
    assert!(projections.contains(&"orders".to_owned()), "{projections:?}");
    for projection in &projections {
        for line in [
            "region-projector --config projector.toml rebuild orders",
            "region-projector --config projector.toml switch orders",
        ] {
            runs(stack, program("region-projector"), &own(line, projection)).await;
        }
    }
    let prune = "region-projector --config projector.toml prune --yes";
    runs(stack, program("region-projector"), &own(prune, "")).await;
    let projector = stack.region(region).unwrap().projector.admin_url();
    eventually("the region's projector is well", async || {
        reqwest::get(format!("{projector}/readyz")).await.is_ok_and(|it| it.status() == 200)
    })
    .await;
}

/// Europe has applied nothing of what is lost; Asia has.
#[tokio::test]
async fn a_primary_restored_from_a_backup_goes_on_by_the_runbook() {
    let mut stack = start().await;
    let (mut europe, mut asia) = (caller(&stack, EUROPE), caller(&stack, ASIA));
    let (path, kept) = lose_a_write(&mut stack, &mut europe, &mut asia).await;
    tells(&stack, PRIMARY, "appends are refused").await;
    // The first may meet a connection that ended with the database's restart.
    let mut reader = europe.stranger();
    eventually("reads go on", async || {
        let read = reader.get("/v1/aggregates/order/o-lost", "").await;
        read.is_ok_and(|read| (read.status.as_u16(), read.version()) == (200, Some(1)))
    })
    .await;
    let metrics = admin(&stack.region(PRIMARY).unwrap().gateway.admin_url(), "/metrics").await;
    let is_said = |line: &str| line.starts_with("tidemark_log_refused") && line.ends_with(" 1");
    assert!(metrics.lines().any(is_said), "{metrics}");

    // Steps 2 and 3.
    let config = stack.addresses().folder.join(PRIMARY).join("gateway.toml");
    let config = config.to_str().unwrap();
    let list = "gateway --config gateway.toml epoch list";
    let listed =
        runs(&stack, program("gateway"), &as_written(list, &[("gateway.toml", config)])).await;
    assert!(listed.contains(&format!("epoch open --after {kept}\n")), "{listed}");
    let open = "gateway --config gateway.toml epoch open --after 1042";
    let kept = kept.to_string();
    let open = as_written(open, &[("gateway.toml", config), ("1042", &kept)]);
    let opened = runs(&stack, program("gateway"), &open).await;
    assert!(opened.contains("epoch 2 is open"), "{opened}");

    // Europe follows without a restart, and so do its callers.
    let mut fresh = europe.stranger();
    eventually("writes go on", async || {
        let item = serde_json::json!({"order_id": "o-lost", "product_id": "product-of-o-lost", "quantity": 1});
        fresh.command("AddItem", &item).await.is_ok_and(|answer| answer.status == 200)
    })
    .await;
    eventually("europe adopts the epoch", async || has_adopted(&stack, EUROPE).await).await;
    stack.proxies.set_enabled(&event_link(EUROPE), true).await.unwrap();
    assert_local(&settled(&mut fresh, &path, PATIENCE).await, 2);
    for region in [EUROPE, ASIA, PRIMARY] {
        let mut holder = caller(&stack, region);
        eventually("the gateway knows the epoch", async || knows_the_epoch(&mut holder).await)
            .await;
        holder.adopt(&europe);
        let told = holder.get(&path, "eventual").await.unwrap();
        assert_eq!(
            (told.status.as_u16(), told.problem()),
            (409, "write-lost"),
            "{region}: {told:?}"
        );
        let after = holder.get(&path, "").await.unwrap();
        assert_eq!((after.status.as_u16(), after.version()), (200, Some(2)), "{region}: {after:?}");
    }

    // Step 4: the primary's goes on by itself, and Asia's says what it needs.
    stack.region_mut(PRIMARY).unwrap().projector.start_again().unwrap();
    let mut at_primary = caller(&stack, PRIMARY);
    at_primary.adopt(&fresh);
    assert_local(&settled(&mut at_primary, &path, PATIENCE).await, 2);
    tells(&stack, ASIA, "Rebuild the projection, and switch to what is built").await;
    let forwarded = asia.stranger().get(&path, "wait;ms=50, forward").await.unwrap();
    assert_eq!((forwarded.word(), forwarded.version()), ("forwarded", Some(2)), "{forwarded:?}");
    rebuild_all(&stack, ASIA).await;
    let mut again = caller(&stack, ASIA);
    again.adopt(&fresh);
    assert_local(&settled(&mut again, &path, PATIENCE).await, 2);
    stack.stop().await.unwrap();
}
