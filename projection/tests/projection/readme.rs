//! The README's domain is one that is compiled and tested.

#[test]
fn the_readme_shows_the_domain_that_is_tested_here() {
    let readme = include_str!("../../../README.md");
    let shown = format!("```rust\n{}```\n", include_str!("lights.rs"));
    assert!(readme.contains(&shown), "README.md does not show lights.rs as it is");
}
