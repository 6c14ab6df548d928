//! A correct merge is verified with room to spare, and every wrong one is found.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{adapter, base_copy, fixtures, linear, merged, temp, write_base};
use lora_export::{Error, MergeOptions, merge, verify};
use lora_format::{Checkpoint, write_tensors};
use proptest::prelude::*;
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Rewrites a merged model's only weight file.
fn tamper(dir: &Path, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let mut tensors: BTreeMap<String, Tensor> =
        checkpoint.names().map(|n| (n.to_string(), checkpoint.read(n).unwrap())).collect();
    change(&mut tensors);
    let list: Vec<_> = tensors.into_iter().collect();
    write_tensors(&dir.join("model.safetensors"), &list, &BTreeMap::new()).unwrap();
}

const CHANGED: &str = "model.layers.0.self_attn.q_proj.weight";
const UNTOUCHED: &str = "model.layers.0.self_attn.k_proj.weight";

#[test]
fn every_kind_of_mistake_is_found_by_tensor() {
    type Change = fn(&mut BTreeMap<String, Tensor>);
    let cases: [(&str, Change, &str, &str); 7] = [
        ("one value off by 1e-5", |t| add(t, CHANGED, 1e-5), CHANGED, "times what rounding explains"),
        ("a value that is no number", |t| add(t, CHANGED, f64::NAN), CHANGED, "times what rounding explains"),
        ("an untouched value", |t| add(t, UNTOUCHED, 1e-6), UNTOUCHED, "touched by no adapter"),
        ("a missing tensor", |t| drop(t.remove(UNTOUCHED)), UNTOUCHED, "is missing"),
        ("an extra tensor", |t| drop(t.insert("x".into(), t[UNTOUCHED].copy())), "x", "in neither base nor adapters"),
        ("another shape", |t| drop(t.insert(CHANGED.into(), t[CHANGED].narrow(0, 0, 8))), CHANGED, "has shape [8, 32]"),
        ("not merged", |t| drop(t.insert(CHANGED.into(), original())), CHANGED, "times what rounding explains"),
    ];
    let base = fixtures().join("llama");
    let lora = base.join("adapters/lora");
    for (what, change, tensor, wanted) in cases {
        let (_dir, out, _) = merged(&base, &lora);
        verify(&base, std::slice::from_ref(&lora), &out).unwrap();
        tamper(&out, change);
        let error = verify(&base, std::slice::from_ref(&lora), &out).expect_err(what);
        let text = error.to_string();
        assert!(text.contains(wanted), "{what}: {text}");
        assert!(matches!(error, Error::Disagrees { tensor: t, .. } if t == tensor), "{what}: {text}");
    }
}

fn original() -> Tensor {
    Checkpoint::open(&fixtures().join("llama")).unwrap().read(CHANGED).unwrap()
}

fn add(tensors: &mut BTreeMap<String, Tensor>, name: &str, by: f64) {
    let _ = tensors[name].get(3).get(5).g_add_scalar_(by);
}

#[test]
fn the_wrong_adapter_or_scale_is_found() {
    let base = fixtures().join("llama");
    let (_dir, out, _) = merged(&base, &base.join("adapters/lora"));
    assert!(matches!(verify(&base, &[base.join("adapters/rslora")], &out), Err(Error::Disagrees { .. })));
    assert!(matches!(verify(&base, &[base.join("adapters/lora/after_training")], &out), Err(Error::Disagrees { .. })));
}

#[test]
fn a_split_head_that_the_config_still_ties_is_found() {
    let (_keep, base) = base_copy("qwen2", |_| {});
    let (_keep, adapter) = adapter([("lm_head", linear(1, 320, 32))]);
    let (_dir, out, _) = merged(&base, &adapter);
    verify(&base, std::slice::from_ref(&adapter), &out).unwrap();
    fs::copy(base.join("config.json"), out.join("config.json")).unwrap();
    let text = verify(&base, &[adapter], &out).unwrap_err().to_string();
    assert!(text.contains("`lm_head.weight` differs from the embedding"), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_merge_lies_within_its_bound(
        seed in 0i64..1_000_000, rows in 1i64..12, columns in 1i64..12, size in -8i32..8, kinds in (0usize..4, 0usize..5)
    ) {
        let all = [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double];
        let (kind, dtype) = (all[kinds.0], all.get(kinds.1).copied());
        tch::manual_seed(seed);
        let w = (Tensor::randn([rows, columns], (Kind::Double, Device::Cpu)) * 2f64.powi(size)).to_kind(kind);
        let (_keep, base) = write_base(&json!({}), &[("m.q_proj.weight", &w)]);
        let (_k1, one) = adapter([("m.q_proj", linear(seed + 1, rows, columns))]);
        let (_k2, two) = adapter([("m.q_proj", linear(seed + 2, rows, columns))]);
        let adapters: [PathBuf; 2] = [one, two];
        let dir = temp();
        let out = dir.path().join("merged");
        merge(&base, &adapters, &out, &MergeOptions { dtype }, &mut |_, _| {}).unwrap();
        let agreement = verify(&base, &adapters, &out).unwrap();
        prop_assert_eq!((agreement.tensors, agreement.changed), (1, 1));
        prop_assert!(agreement.max_ratio <= 1.0);
    }
}
