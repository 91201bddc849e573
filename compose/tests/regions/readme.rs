//! The README's walk with curl, run as it is written, against three real regions.

use compose::local::{Plan, Stack};
use compose::process::{Program, run};

const README: &str = include_str!("../../../README.md");

/// The shell block of the README's section of this title.
fn shell_block(title: &str) -> &'static str {
    let (_, section) = README.split_once(&format!("## {title}\n")).unwrap();
    let (_, block) = section.split_once("```sh\n").unwrap();
    block.split_once("```").unwrap().0
}

#[tokio::test]
async fn the_walk_with_curl_works_as_written() {
    let stack = Box::pin(Stack::start(Plan::default())).await.unwrap();
    let url = |region: &str| stack.region(region).unwrap().url.clone();
    let folder = tempfile::tempdir().unwrap();
    let program = Program::new("walk", "/bin/bash", folder.path().join("walk.log"))
        .args(["-eu", "-o", "pipefail", "-c", shell_block("A walk with curl")])
        .folder(folder.path())
        .env("US", url("us-east"))
        .env("EU", url("eu-west"))
        .env("ASIA", url("asia-south"));
    let said = run(program).await.unwrap();
    let count = |needle: &str| said.matches(needle).count();
    assert_eq!(count("HTTP/1.1 201"), 1, "the order is placed:\n{said}");
    assert_eq!(count("HTTP/1.1 200"), 2, "the order and the list are read:\n{said}");
    assert_eq!(count("consistency-token: "), 3, "every answer carries a token:\n{said}");
    for kind in ["customer", "product", "order"] {
        assert_eq!(count(&format!(r#""aggregate_type":"{kind}""#)), 1, "a {kind} is made:\n{said}");
    }
    assert_eq!(count(r#"{"items":[{"key":"o-1","#), 1, "the list shows the order:\n{said}");
    let own = said.lines().filter(|line| line.starts_with("consistency-status: "));
    let own: Vec<_> = own.map(|line| line.split([' ', ';', '\r']).nth(1).unwrap()).collect();
    assert_eq!(own.len(), 3, "{said}");
    assert!(own.iter().all(|word| ["local", "waited", "forwarded"].contains(word)), "{own:?}");
}
