//! Rules on crates, read from `cargo metadata`.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result};
use serde_json::Value;

use super::Finding;

/// The crates of the workspace that each crate may depend on. Dependencies point one way: down this list never.
const DIRECTIONS: [(&str, &[&str]); 12] = [
    ("lora-torch", &[]),
    ("lora-core", &["lora-torch"]),
    ("lora-format", &["lora-torch"]),
    ("lora-data", &[]),
    ("lora-report", &[]),
    ("lora-hub", &[]),
    ("lora-model", &["lora-torch", "lora-core", "lora-format"]),
    ("lora-train", &["lora-torch", "lora-core", "lora-format", "lora-data", "lora-model", "lora-report"]),
    ("lora-export", &["lora-torch", "lora-core", "lora-format"]),
    (
        "lora-cli",
        &[
            "lora-torch",
            "lora-core",
            "lora-format",
            "lora-data",
            "lora-hub",
            "lora-model",
            "lora-train",
            "lora-export",
            "lora-report",
        ],
    ),
    ("xtask", &[]),
    (
        "e2e",
        &[
            "lora-torch",
            "lora-core",
            "lora-format",
            "lora-data",
            "lora-hub",
            "lora-model",
            "lora-train",
            "lora-export",
            "lora-report",
            "lora-cli",
        ],
    ),
];

/// Foreign crates that only some of ours may use.
const RESTRICTED: [(&str, &[&str]); 4] = [
    ("torch-sys", &["lora-torch"]),
    ("cc", &["lora-torch"]),
    ("libloading", &["lora-torch"]),
    ("anyhow", &["lora-cli", "xtask", "e2e"]),
];

/// Crates that must run where there is no libtorch.
const NO_TORCH: [&str; 4] = ["lora-data", "lora-report", "lora-hub", "xtask"];

/// The packages of the workspace.
fn members(metadata: &Value) -> impl Iterator<Item = &Value> {
    let members = &metadata["workspace_members"];
    let is_member = move |package: &&Value| members.as_array().is_some_and(|all| all.contains(&package["id"]));
    metadata["packages"].as_array().into_iter().flatten().filter(is_member)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// The direction of dependencies; tests may look upwards, but never bring libtorch where there is none.
pub fn directions(metadata: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    for package in members(metadata) {
        let name = text(package, "name");
        let Some((_, allowed)) = DIRECTIONS.iter().find(|(ours, _)| *ours == name) else {
            findings.push(Finding::new(
                name,
                0,
                "the crate has no row in xtask/src/tidy/packages.rs: what may it use?",
            ));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let (other, test_only) = (text(dependency, "name"), dependency["kind"] == "dev");
            let ours = DIRECTIONS.iter().any(|(ours, _)| *ours == other);
            let torch = matches!(other, "tch" | "torch-sys") || (ours && !NO_TORCH.contains(&other));
            let restricted = RESTRICTED.iter().any(|(foreign, users)| *foreign == other && !users.contains(&name));
            if (ours && !test_only && !allowed.contains(&other)) || (torch && NO_TORCH.contains(&name)) || restricted {
                findings.push(Finding::new(name, 0, format!("the crate must not depend on {other}")));
            }
        }
    }
    findings
}

/// Every crate takes the workspace's lints; `xtask` has its own, since it prints.
pub fn lints(metadata: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    for package in members(metadata).filter(|package| text(package, "name") != "xtask") {
        let manifest = fs::read_to_string(text(package, "manifest_path")).unwrap_or_default();
        let parsed: Option<toml::Table> = toml::from_str(&manifest).ok();
        let taken = parsed.and_then(|table| table.get("lints")?.get("workspace")?.as_bool());
        if taken != Some(true) {
            findings.push(Finding::new(text(package, "name"), 0, "Cargo.toml lacks `[lints] workspace = true`"));
        }
    }
    findings
}

/// Foreign crates come from the registry and under a licence that `deny.toml` allows.
pub fn licences(metadata: &Value, deny: &str) -> Result<Vec<Finding>> {
    let deny: toml::Table = toml::from_str(deny).context("deny.toml")?;
    let allow = deny.get("licenses").and_then(|table| table.get("allow")).and_then(|list| list.as_array());
    let allowed: BTreeSet<&str> =
        allow.context("deny.toml has no licenses.allow")?.iter().filter_map(|v| v.as_str()).collect();
    let mut findings = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = format!("{} {}", text(package, "name"), text(package, "version"));
        match package["source"].as_str() {
            None => continue,
            Some(source) if source.starts_with("registry+") => {}
            Some(source) => {
                findings.push(Finding::new(&name, 0, format!("comes from {source}, not from the registry")))
            }
        }
        let licence = text(package, "license");
        if !permits(licence, &allowed) {
            findings.push(Finding::new(&name, 0, format!("its licence {licence:?} is not allowed in deny.toml")));
        }
    }
    Ok(findings)
}

/// Whether an SPDX expression can be met with the allowed licences.
fn permits(expression: &str, allowed: &BTreeSet<&str>) -> bool {
    let words = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<_> = words.split_whitespace().collect();
    let mut at = 0;
    let met = either(&words, &mut at, allowed);
    met && at == words.len()
}

fn either(words: &[&str], at: &mut usize, allowed: &BTreeSet<&str>) -> bool {
    let mut met = both(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        met |= both(words, at, allowed);
    }
    met
}

fn both(words: &[&str], at: &mut usize, allowed: &BTreeSet<&str>) -> bool {
    let mut met = single(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        met &= single(words, at, allowed);
    }
    met
}

fn single(words: &[&str], at: &mut usize, allowed: &BTreeSet<&str>) -> bool {
    let Some(&word) = words.get(*at) else { return false };
    *at += 1;
    if word == "(" {
        let met = either(words, at, allowed);
        *at += 1;
        return met;
    }
    if words.get(*at) == Some(&"WITH") {
        let exception = words.get(*at + 1).copied().unwrap_or_default();
        *at += 2;
        return allowed.contains(format!("{word} WITH {exception}").as_str());
    }
    allowed.contains(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn depends(name: &str, other: &str, kind: Option<&str>) -> Vec<Finding> {
        directions(&json!({
            "workspace_members": ["id"],
            "packages": [{"id": "id", "name": name, "dependencies": [{"name": other, "kind": kind}]}],
        }))
    }

    #[test]
    fn dependencies_point_one_way() {
        assert_eq!(depends("lora-model", "lora-core", None), []);
        assert_eq!(depends("lora-core", "serde", None), []);
        for (name, other) in [
            ("lora-core", "lora-model"),
            ("lora-export", "lora-model"),
            ("lora-torch", "lora-core"),
            ("xtask", "lora-core"),
            ("lora-data", "tch"),
            ("lora-model", "anyhow"),
            ("lora-core", "torch-sys"),
        ] {
            assert_eq!(depends(name, other, None).len(), 1, "{name} -> {other}");
        }
        assert_eq!(depends("lora-export", "lora-model", Some("dev")), []);
        assert_eq!(depends("lora-data", "tch", Some("dev")).len(), 1);
        assert_eq!(depends("lora-data", "lora-train", Some("dev")).len(), 1);
        assert_eq!(depends("lora-new", "serde", None).len(), 1);
    }

    #[test]
    fn licence_expressions() {
        let allowed = BTreeSet::from(["MIT", "Apache-2.0", "Unicode-3.0"]);
        for good in ["MIT", "MIT/GPL-3.0", "GPL-3.0 OR MIT", "(MIT OR Apache-2.0) AND Unicode-3.0"] {
            assert!(permits(good, &allowed), "{good}");
        }
        for bad in [
            "",
            "GPL-3.0",
            "MIT AND GPL-3.0",
            "(GPL-3.0 OR BSL-1.0) AND MIT",
            "Apache-2.0 WITH LLVM-exception",
            "MIT MIT",
        ] {
            assert!(!permits(bad, &allowed), "{bad}");
        }
    }

    #[test]
    fn foreign_sources_and_licences_are_found() {
        let package = |source: &str, licence: &str| json!({"packages": [{"name": "a", "version": "1", "source": source, "license": licence}]});
        let deny = "[licenses]\nallow = [\"MIT\"]";
        assert_eq!(licences(&package("registry+x", "MIT"), deny).unwrap(), []);
        assert_eq!(licences(&package("registry+x", "GPL-3.0"), deny).unwrap().len(), 1);
        assert_eq!(licences(&package("git+x", "MIT"), deny).unwrap().len(), 1);
        assert!(licences(&package("registry+x", "MIT"), "").is_err());
    }
}
