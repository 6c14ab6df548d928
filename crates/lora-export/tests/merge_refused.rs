//! What merging refuses, and that nothing is left of it.
#![allow(clippy::unwrap_used)]

mod common;

use common::{adapter, fixtures, linear, saved, temp, write_base};
use lora_export::{Error, MergeOptions, merge};
use lora_format::{AdapterModule, Checkpoint, LoraTensors};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

fn quiet(base: &Path, adapters: &[PathBuf], out: &Path) -> lora_export::Result<lora_export::MergeReport> {
    merge(base, adapters, out, &MergeOptions::default(), &mut |_, _| {})
}

#[test]
fn a_value_that_does_not_fit_the_dtype_is_refused_and_nothing_is_left() {
    let w = Tensor::full([2, 2], 60_000.0, (Kind::Float, Device::Cpu));
    let (_keep, base) =
        write_base(&json!({}), &[("m.q_proj.weight", &w.to_kind(Kind::Half)), ("m.norm.weight", &(w * 2.0))]);
    let big = |shape: [i64; 2]| Tensor::full(shape, 100.0, (Kind::Float, Device::Cpu));
    let (_k1, over) = adapter([("m.q_proj", AdapterModule::Linear(LoraTensors::new(big([2, 2]), big([2, 2]))))]);
    let (_k2, fits) = adapter([("m.q_proj", linear(1, 2, 2))]);
    let half = MergeOptions { dtype: Some(Kind::Half) };
    for (adapter, options, tensor) in
        [(over, MergeOptions::default(), "m.q_proj.weight"), (fits, half, "m.norm.weight")]
    {
        let dir = temp();
        let error = merge(&base, &[adapter], &dir.path().join("merged"), &options, &mut |_, _| {}).unwrap_err();
        assert!(
            matches!(&error, Error::Overflow { tensor: t, count, dtype: "float16" } if t == tensor && *count == 4),
            "{error}"
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

#[test]
fn what_does_not_fit_the_base_is_refused_before_anything_is_written() {
    let base = fixtures().join("llama");
    let dir = temp();
    let out = dir.path().join("merged");
    let refusal = |adapters: &[PathBuf]| {
        let text = quiet(&base, adapters, &out).unwrap_err().to_string();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{text}");
        text
    };
    assert!(refusal(&[]).contains("no adapter"));
    assert!(refusal(&[dir.path().join("none")]).contains("none/adapter_config.json"));

    let (_k, typo) = adapter([("model.layers.1.self_atn.q_proj", linear(1, 32, 32))]);
    let text = refusal(std::slice::from_ref(&typo));
    assert!(text.contains("no tensor `model.layers.1.self_atn.q_proj.weight`"), "{text}");
    assert!(text.contains("nearest: model.layers.1.self_attn.q_proj.weight"), "{text}");

    let (_k, wide) = adapter([("model.layers.1.self_attn.q_proj", linear(1, 32, 48))]);
    assert!(refusal(&[wide]).contains("is [32, 48] in the adapter but [32, 32] in the base"));
    let (_k, resized) = adapter([("lm_head", saved(&Tensor::zeros([330, 32], (Kind::Float, Device::Cpu))))]);
    assert!(refusal(std::slice::from_ref(&resized)).contains("[330, 32] in the adapter but [320, 32]"));

    let head = || saved(&Tensor::zeros([320, 32], (Kind::Float, Device::Cpu)));
    let ((_k1, saves), (_k2, changes)) = (adapter([("lm_head", head())]), adapter([("lm_head", linear(1, 320, 32))]));
    assert!(refusal(&[saves.clone(), changes.clone()]).contains("`lm_head.weight` is replaced"));
    assert!(refusal(&[changes, saves]).contains("`lm_head.weight` is replaced"));
}

#[test]
fn the_output_must_be_new_or_empty_and_a_failure_leaves_it_so() {
    let base = fixtures().join("llama");
    let lora = [base.join("adapters/lora")];
    let dir = temp();
    let taken = dir.path().join("taken");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("precious"), "x").unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    for out in [&taken, &file, &base] {
        assert!(matches!(quiet(&base, &lora, out), Err(Error::OutputTaken { .. })), "{}", out.display());
    }
    assert_eq!(fs::read_to_string(taken.join("precious")).unwrap(), "x");
    let empty = dir.path().join("deep/empty");
    fs::create_dir_all(&empty).unwrap();
    quiet(&base, &lora, &empty).unwrap();
    assert!(Checkpoint::open(&empty).is_ok());
    quiet(&base, &lora, &dir.path().join("new/parents/merged")).unwrap();
}
