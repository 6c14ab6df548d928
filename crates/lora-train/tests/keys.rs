//! `docs/reference/keys.md` is what the program knows of its keys.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use std::path::Path;

#[test]
fn the_page_of_keys_is_the_table_that_checks_them() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference/keys.md");
    let wanted = format!("# Every key of a configuration\n\n{}", lora_train::RunConfig::reference());
    if std::env::var_os("WRITE_KEYS").is_some() {
        std::fs::write(&path, &wanted).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap();
    assert!(found == wanted, "write it anew: WRITE_KEYS=1 cargo test --release --workspace --test keys");
}
