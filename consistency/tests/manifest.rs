//! The manifest is the proof that the rules cannot do IO.

const PURE: [&str; 10] = [
    "base64",
    "hmac",
    "proptest",
    "rand",
    "serde",
    "serde_json",
    "sfv",
    "sha2",
    "thiserror",
    "uuid",
];

#[test]
fn the_rules_depend_on_nothing_that_does_io() {
    let manifest = include_str!("../Cargo.toml");
    let sections = manifest.split("\n[").filter(|section| section.contains("dependencies]"));
    let names = sections.flat_map(|section| section.lines().skip(1));
    let mut count = 0;
    for line in names.filter(|line| !line.trim().is_empty() && !line.starts_with('#')) {
        let name = line.split(['.', ' ', '=']).next().unwrap();
        assert!(PURE.contains(&name), "{name} is not on the list of pure crates");
        count += 1;
    }
    assert!(7 < count, "only {count} dependencies were read");
}
