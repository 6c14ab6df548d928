//! Adapters under names that other tools gave them: repaired byte for byte, or refused, and nothing in between.
#![allow(clippy::unwrap_used)]

mod common;

use common::{fixtures, temp};
use lora_export::{Error, Repair, repair_adapter};
use lora_format::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, TensorFile, read_adapter, write_tensors};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tch::Tensor;
use tempfile::TempDir;

/// A copy of a fixture's adapter with its tensors under other names, and something done to its configuration.
fn damaged(
    family: &str,
    variant: &str,
    rename: impl Fn(&str) -> String,
    config: impl Fn(&mut Value),
) -> (TempDir, PathBuf) {
    let from = fixtures().join(family).join("adapters").join(variant);
    let (dir, file) = (temp(), TensorFile::open(&from.join(ADAPTER_WEIGHTS)).unwrap());
    let path = dir.path().join("damaged");
    fs::create_dir(&path).unwrap();
    let tensors: Vec<(String, Tensor)> = file.names().map(|n| (rename(n), file.read(n).unwrap())).collect();
    write_tensors(&path.join(ADAPTER_WEIGHTS), &tensors, &BTreeMap::new()).unwrap();
    let mut json: Value = serde_json::from_slice(&fs::read(from.join(ADAPTER_CONFIG)).unwrap()).unwrap();
    config(&mut json);
    fs::write(path.join(ADAPTER_CONFIG), json.to_string()).unwrap();
    (dir, path)
}

fn repaired(path: &Path, model: Option<&str>) -> (TempDir, PathBuf, Repair) {
    let out = temp();
    let to = out.path().join("repaired");
    let model = model.map(|family| fixtures().join(family));
    let repair = repair_adapter(path, model.as_deref(), Some(&to)).unwrap();
    (out, to, repair)
}

/// Whether an adapter holds what a fixture's holds, name for name and byte for byte.
fn same(path: &Path, family: &str, variant: &str) -> bool {
    let wanted = fixtures().join(family).join("adapters").join(variant).join(ADAPTER_WEIGHTS);
    let (got, wanted) = (TensorFile::open(&path.join(ADAPTER_WEIGHTS)).unwrap(), TensorFile::open(&wanted).unwrap());
    read_adapter(path).unwrap();
    got.names().eq(wanted.names()) && wanted.names().all(|n| got.bytes(n).unwrap() == wanted.bytes(n).unwrap())
}

#[test]
fn what_was_done_to_all_names_is_undone() {
    type Way = (&'static str, fn(&str) -> String);
    let ways: [Way; 8] = [
        ("put in front", |n| n.replacen("base_model.model.", "", 1)),
        ("once instead", |n| format!("base_model.model.{n}")),
        ("`default`", |n| n.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")),
        ("`_orig_mod.`", |n| format!("_orig_mod.{n}")),
        ("`module.`", |n| format!("module.{n}")),
        ("`_fsdp_wrapped_module.`", |n| n.replace(".self_attn", "._fsdp_wrapped_module.self_attn")),
        ("lora_A and lora_B", |n| n.replace("lora_A", "lora_down").replace("lora_B", "lora_up")),
        ("behind a matrix", |n| n.strip_suffix(".weight").unwrap().to_string()),
    ];
    for (said, rename) in ways {
        let (_keep, path) = damaged("llama", "lora", rename, |_| {});
        let error = read_adapter(&path).unwrap_err().to_string();
        assert!(error.contains("`lora repair`"), "{said}: {error}");
        let (_keep, to, repair) = repaired(&path, Some("llama"));
        assert!(same(&to, "llama", "lora"), "{said}");
        assert_eq!(repair.renamed.len(), repair.tensors, "{said}");
        for renamed in &repair.renamed {
            assert!(renamed.rules.iter().any(|rule| rule.to_string().contains(said)), "{said}: {renamed:?}");
        }
    }
    // Everything at once, on an adapter with magnitudes.
    let all = |n: &str| {
        let n = n.replace("lora_A.weight", "lora_A.poet.weight").replace("lora_B.weight", "lora_B.poet.weight");
        format!("module._orig_mod.{}", n.replace("lora_magnitude_vector", "lora_magnitude_vector.poet.weight"))
    };
    let (_keep, path) = damaged("llama", "dora", all, |_| {});
    let (_keep, to, _) = repaired(&path, None);
    assert!(same(&to, "llama", "dora"));
}

#[test]
fn the_model_decides_on_paths_and_only_it() {
    for from in ["model.language_model.", "language_model.model.", ""] {
        let rename = |n: &str| n.replacen("base_model.model.model.", &format!("base_model.model.{from}"), 1);
        let (_keep, path) = damaged("llama", "lora", rename, |_| {});
        let (_keep, to, repair) = repaired(&path, Some("llama"));
        assert!(same(&to, "llama", "lora"), "{from}");
        assert!(repair.renamed[0].rules[0].to_string().contains("as in the model"), "{:?}", repair.renamed[0]);
        // Without the model nobody knows that the path is wrong.
        assert!(!repair_adapter(&path, None, None).unwrap().is_needed(), "{from}");
    }
}

#[test]
fn targets_are_named_anew_when_they_miss_a_module() {
    let (_keep, path) = damaged("llama", "lora", str::to_string, |c| c["target_modules"] = json!(["query"]));
    let (_keep, to, repair) = repaired(&path, Some("llama"));
    let names = repair.targets.unwrap();
    assert!(!names.is_empty() && names.iter().all(|name| !name.contains('.')), "{names:?}");
    assert!(same(&to, "llama", "lora"));
    let text = fs::read_to_string(to.join(ADAPTER_CONFIG)).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(config["target_modules"], json!(names));
    // Where one layer has no update, a short name would mean it, too.
    let from = TensorFile::open(&path.join(ADAPTER_WEIGHTS)).unwrap();
    let some: Vec<(String, Tensor)> =
        from.names().filter(|n| n.contains("layers.1")).map(|n| (n.to_string(), from.read(n).unwrap())).collect();
    write_tensors(&path.join(ADAPTER_WEIGHTS), &some, &BTreeMap::new()).unwrap();
    let (_keep, _, repair) = repaired(&path, Some("llama"));
    assert!(repair.targets.unwrap().iter().all(|name| name.starts_with("model.layers.1.")));
}

#[test]
fn alphas_are_left_out_when_the_configuration_says_the_same() {
    let rename = |n: &str| n.replace("lora_A.weight", "lora_down.weight").replace("lora_B.weight", "lora_up.weight");
    let with_alpha = |alpha: f64| {
        let (keep, path) = damaged("llama", "lora", rename, |_| {});
        let file = TensorFile::open(&path.join(ADAPTER_WEIGHTS)).unwrap();
        let mut tensors: Vec<(String, Tensor)> = file.names().map(|n| (n.to_string(), file.read(n).unwrap())).collect();
        let first = tensors[0].0.replace(".lora_down.weight", ".alpha");
        tensors.push((first, Tensor::from(alpha as f32)));
        write_tensors(&path.join(ADAPTER_WEIGHTS), &tensors, &BTreeMap::new()).unwrap();
        (keep, path)
    };
    let right = read_adapter(&fixtures().join("llama/adapters/lora")).unwrap().config.lora_alpha;
    let (_keep, path) = with_alpha(right);
    let (_keep, to, repair) = repaired(&path, None);
    assert_eq!((repair.alphas.len(), same(&to, "llama", "lora")), (1, true));
    let (_keep, path) = with_alpha(right + 1.0);
    let error = repair_adapter(&path, None, None).unwrap_err();
    assert!(matches!(error, Error::Repair { .. }) && error.to_string().contains("lora_alpha"), "{error}");
}

#[test]
fn what_is_not_clear_is_refused_and_nothing_is_written() {
    let refused = |path: &Path, model: Option<&str>| {
        let out = temp();
        let model = model.map(|family| fixtures().join(family));
        let error = repair_adapter(path, model.as_deref(), Some(&out.path().join("x"))).unwrap_err();
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "{error}");
        error.to_string()
    };
    let (_keep, path) = damaged("llama", "lora", |n| format!("thinker.{n}"), |_| {});
    assert!(refused(&path, None).contains("no known history"));
    // Two adapters in one file.
    let two = |n: &str| n.replace("lora_A.", if n.contains("layers.0") { "lora_A.a." } else { "lora_A.b." });
    let (_keep, path) = damaged("llama", "lora", two, |_| {});
    assert!(refused(&path, None).contains("several adapters (a, b)"));
    // Two tensors that would be one.
    let (_keep, path) = damaged("llama", "lora", str::to_string, |_| {});
    let file = TensorFile::open(&path.join(ADAPTER_WEIGHTS)).unwrap();
    let mut tensors: Vec<(String, Tensor)> = file.names().map(|n| (n.to_string(), file.read(n).unwrap())).collect();
    tensors.push((format!("_orig_mod.{}", tensors[0].0), tensors[0].1.shallow_clone()));
    write_tensors(&path.join(ADAPTER_WEIGHTS), &tensors, &BTreeMap::new()).unwrap();
    assert!(refused(&path, None).contains("would both be"));
    // A lost half: the names are right, the adapter is not.
    let (_keep, path) = damaged("llama", "lora", |n| format!("module.{n}"), |_| {});
    let file = TensorFile::open(&path.join(ADAPTER_WEIGHTS)).unwrap();
    let half: Vec<(String, Tensor)> = file.names().skip(1).map(|n| (n.to_string(), file.read(n).unwrap())).collect();
    write_tensors(&path.join(ADAPTER_WEIGHTS), &half, &BTreeMap::new()).unwrap();
    assert!(refused(&path, None).contains("still cannot be used"));
    // Another model.
    let (_keep, path) = damaged("llama", "lora", |n| format!("module.{n}"), |_| {});
    assert!(refused(&path, Some("gpt2")).contains("has no module"));
    // What is right is left alone.
    let out = temp();
    let fine = fixtures().join("llama/adapters/lora");
    let repair = repair_adapter(&fine, None, Some(&out.path().join("x"))).unwrap();
    assert!(!repair.is_needed() && fs::read_dir(out.path()).unwrap().count() == 0);
}
