//! Adapters of stacked experts and of tokens, merged on files.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{base_copy, fixtures, merged, temp};
use lora_core::{Combination, MajoritySign, MixOptions};
use lora_export::{Error, MergeOptions, Weighted, merge, mix_adapters, verify};
use lora_format::{Checkpoint, read_adapter, write_adapter};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::Tensor;

/// One sum of at most four products in fp32, in another order, against the largest entry.
const SUM_TOLERANCE: f64 = 1e-6;

fn adapter(family: &str, variant: &str) -> PathBuf {
    fixtures().join(family).join("adapters").join(variant)
}

/// A base whose experts are stacked, as transformers holds them and may save them.
fn stacked_base() -> (tempfile::TempDir, PathBuf) {
    base_copy("mixtral", |tensors: &mut BTreeMap<String, Tensor>| {
        for layer in 0..2 {
            let mut take = |e: usize, part: &str| {
                let name = format!("model.layers.{layer}.block_sparse_moe.experts.{e}.{part}.weight");
                tensors.remove(&name).unwrap()
            };
            let gate_up: Vec<Tensor> = (0..4).map(|e| Tensor::cat(&[take(e, "w1"), take(e, "w3")], 0)).collect();
            let down: Vec<Tensor> = (0..4).map(|e| take(e, "w2")).collect();
            for (name, list) in [("gate_up_proj", gate_up), ("down_proj", down)] {
                tensors.insert(format!("model.layers.{layer}.mlp.experts.{name}"), Tensor::stack(&list, 0));
            }
        }
    })
}

#[test]
fn experts_are_merged_alike_one_by_one_and_stacked() {
    let (_keep, stacked) = stacked_base();
    for variant in ["experts", "experts_before_0_19", "experts_down"] {
        let path = adapter("mixtral", variant);
        let (_single, single, _) = merged(&fixtures().join("mixtral"), &path);
        let (_out, out, report) = merged(&stacked, &path);
        let (single, whole) = (Checkpoint::open(&single).unwrap(), Checkpoint::open(&out).unwrap());
        let base = Checkpoint::open(&stacked).unwrap();
        for layer in 0..2 {
            let name = |p: &str| format!("model.layers.{layer}.mlp.experts.{p}");
            let one = |e: i64, part: &str| {
                single.read(&format!("model.layers.{layer}.block_sparse_moe.experts.{e}.{part}.weight")).unwrap()
            };
            let (gate_up, down) = (whole.read(&name("gate_up_proj")).unwrap(), whole.read(&name("down_proj")).unwrap());
            for e in 0..4 {
                let close = |got: Tensor, wanted: Tensor| {
                    let error = (got - &wanted).abs().max().double_value(&[]) / wanted.abs().max().double_value(&[]);
                    assert!(error <= SUM_TOLERANCE, "{variant} {layer} {e}: {error:e}");
                };
                close(gate_up.get(e), Tensor::cat(&[one(e, "w1"), one(e, "w3")], 0));
                close(down.get(e), one(e, "w2"));
            }
            assert!(!down.equal(&base.read(&name("down_proj")).unwrap()), "{variant}");
        }
        assert!(report.changed.iter().any(|n| n.ends_with("mlp.experts.down_proj")), "{:?}", report.changed);
        let agreement = verify(&stacked, std::slice::from_ref(&path), &out).unwrap();
        assert_eq!(agreement.changed, report.changed.len());
    }
}

#[test]
fn rows_stay_tied_unless_head_and_table_have_tokens_of_their_own() {
    let base = fixtures().join("qwen2");
    for (variant, untied) in [("tokens", false), ("tokens_alone", false), ("tokens_apart", true)] {
        let (_keep, out, report) = merged(&base, &adapter("qwen2", variant));
        assert_eq!(report.untied, untied, "{variant}");
        let (before, after) = (Checkpoint::open(&base).unwrap(), Checkpoint::open(&out).unwrap());
        let name = "model.embed_tokens.weight";
        let same = before.read(name).unwrap().eq_tensor(&after.read(name).unwrap()).all_dim(1, false);
        let changed: Vec<i64> = (0..320).filter(|id| same.int64_value(&[*id]) == 0).collect();
        let wanted: &[i64] = if untied { &[5, 22, 318] } else { &[5, 22, 85, 318] };
        assert_eq!(changed, wanted, "{variant}");
        assert_eq!(after.contains("lm_head.weight"), untied);
    }
}

#[test]
fn what_has_no_meaning_is_refused() {
    let base = fixtures().join("llama");
    let quiet = |base: &Path, adapters: &[PathBuf]| {
        let dir = temp();
        merge(base, adapters, &dir.path().join("merged"), &MergeOptions::default(), &mut |_, _| {})
    };
    // The same row twice, and a row of a table that another adapter changes as a whole.
    for (first, second) in [("tokens", "tokens_apart"), ("tokens", "embedding"), ("embedding", "tokens")] {
        let error = quiet(&base, &[adapter("llama", first), adapter("llama", second)]).unwrap_err();
        assert!(matches!(error, Error::Conflict { .. }), "{first}, {second}: {error}");
    }
    quiet(&base, &[adapter("llama", "tokens"), adapter("llama", "lora")]).unwrap();

    // A token that this base lacks.
    let mut folder = read_adapter(&adapter("llama", "tokens")).unwrap();
    folder.config.trainable_token_indices = Some(lora_format::TokenIndices::Embedding(vec![1, 2, 3, 400]));
    let dir = temp();
    write_adapter(dir.path(), &folder.config, &folder.modules).unwrap();
    let error = quiet(&base, &[dir.path().to_path_buf()]).unwrap_err();
    assert!(matches!(&error, Error::TokenOutside { id: 400, rows: 320, .. }), "{error}");

    // Experts of another model.
    let error = quiet(&fixtures().join("qwen3_moe"), &[adapter("mixtral", "experts_down")]).unwrap_err();
    assert!(matches!(error, Error::NoSuchTensor { .. } | Error::Shape { .. }), "{error}");
    let error = quiet(&base, &[adapter("mixtral", "experts_down")]).unwrap_err();
    assert!(matches!(error, Error::NoSuchTensor { .. }), "{error}");

    // Neither form has a sum that an adapter could hold.
    let options =
        MixOptions { combination: Combination::Cat, rank: None, density: 1.0, majority: MajoritySign::Total, seed: 0 };
    for (family, variant, word) in
        [("mixtral", "experts", "target_parameters"), ("llama", "tokens", "trainable_token_indices")]
    {
        let dir = temp();
        let parts = [1.0, 0.5].map(|weight| Weighted { adapter: adapter(family, variant), weight });
        let error = mix_adapters(&parts, None, &options, &dir.path().join("mixed")).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    }
}
