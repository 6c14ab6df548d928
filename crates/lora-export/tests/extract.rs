//! Extracting what a merge put in.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{base_copy, fixtures, temp};
use lora_export::{Error, MergeOptions, extract, merge};
use lora_format::{Checkpoint, TargetModules, read_adapter};
use std::path::{Path, PathBuf};

/// An SVD in fp32 of a difference of two fp32 weights, whose rounding is of the size of the weights.
const EXTRACT_TOLERANCE: f64 = 1e-4;

fn merged(base: &Path, adapter: &PathBuf, out: &Path) {
    merge(base, std::slice::from_ref(adapter), out, &MergeOptions::default(), &mut |_, _| {}).unwrap();
}

#[test]
fn what_was_merged_is_found_again() {
    for (family, variant, rank, saved) in [
        ("llama", "lora", 4, 0),
        ("llama", "patterns", 6, 0),
        ("llama", "dora", 32, 0),
        ("llama", "head_saved/after_training", 4, 1),
        ("gpt2", "lora", 4, 0),
        ("qwen2", "lora", 4, 0),
    ] {
        let name = format!("{family}/{variant}");
        let base = fixtures().join(family);
        let adapter = base.join("adapters").join(variant);
        let dir = temp();
        let [tuned, found, again] = ["tuned", "found", "again"].map(|n| dir.path().join(n));
        merged(&base, &adapter, &tuned);
        let mut heard = Vec::new();
        let report = extract(&base, &tuned, rank, &found, &mut |done, of| heard.push((done, of))).expect(&name);
        assert_eq!(report.saved.len(), saved, "{name}");
        assert!(report.error < EXTRACT_TOLERANCE, "{name}: {}", report.error);
        assert!(heard.last().is_some_and(|(done, of)| done == of));
        merged(&base, &found, &again);
        let (one, two) = (Checkpoint::open(&tuned).unwrap(), Checkpoint::open(&again).unwrap());
        for tensor in one.names() {
            let (a, b) = (one.read(tensor).unwrap(), two.read(tensor).unwrap());
            let d = (&a - &b).abs().max().double_value(&[]) / a.abs().max().double_value(&[]);
            assert!(d < EXTRACT_TOLERANCE, "{name} {tensor}: {d:e}");
        }
    }
}

#[test]
fn a_rank_that_is_too_low_says_how_much_it_loses_and_targets_mean_what_differs() {
    let base = fixtures().join("llama");
    let dir = temp();
    let [tuned, found] = ["tuned", "found"].map(|n| dir.path().join(n));
    merged(&base, &base.join("adapters/layers"), &tuned);
    let report = extract(&base, &tuned, 1, &found, &mut |_, _| {}).unwrap();
    assert!(report.error > 0.1 && report.worst.0 >= report.error, "{report:?}");
    // Only the second layer was trained, so bare names would say too much.
    let Some(TargetModules::List(names)) = read_adapter(&found).unwrap().config.target_modules else { panic!() };
    assert_eq!(names, ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]);
}

#[test]
fn models_that_do_not_belong_together_are_refused() {
    let base = fixtures().join("llama");
    let dir = temp();
    let out = dir.path().join("x");
    let refusal = |tuned: &Path| {
        let error = extract(&base, tuned, 4, &out, &mut |_, _| {}).unwrap_err();
        assert!(matches!(error, Error::Extract { .. }) && !out.exists(), "{error}");
        error.to_string()
    };
    assert!(refusal(&base).contains("nothing to extract"));
    assert!(refusal(&fixtures().join("gpt2")).contains("another model"));
    let (_keep, resized) = base_copy("llama", |tensors| {
        let row = tensors["lm_head.weight"].narrow(0, 0, 1);
        tensors.insert("lm_head.weight".into(), tch::Tensor::cat(&[&tensors["lm_head.weight"], &row], 0));
    });
    assert!(refusal(&resized).contains("[321, 32]"));
}
