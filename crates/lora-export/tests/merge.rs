//! Merging against PEFT's own merged weights, and into other dtypes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{adapter, fixtures, linear, merged, saved, temp, write_base};
use lora_export::{Error, MergeOptions, merge, verify};
use lora_format::{AdapterModule, Checkpoint, LoraTensors, TensorFile, sha256_file};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// The reference sums in float32 as we do, in another order. A sum of r + 1 <= 9 terms is off by at most 9 half-units
/// of 2^-24 of the sum of their sizes, 5.4e-7 of it; twice that for the two of us, against the tensor's largest element.
const GOLDEN_TOLERANCE: f64 = 1e-6;

fn quiet(base: &Path, adapters: &[PathBuf], out: &Path) -> lora_export::Result<lora_export::MergeReport> {
    merge(base, adapters, out, &MergeOptions::default(), &mut |_, _| {})
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// One unit in the last place of a bfloat16, relative.
const BF16_UNIT: f64 = 1.0 / 128.0;
/// Sums of order one in fp32, for entries near zero.
const F32_SUM_TOLERANCE: f64 = 1e-5;

/// The tokens whose rows of the head are its own in `qwen2/adapters/tokens_apart`.
const HEAD_ROWS: [i64; 2] = [85, 7];

/// A table with some rows of another.
fn with_rows(table: &Tensor, other: &Tensor, ids: [i64; 2]) -> Tensor {
    let index = Tensor::from_slice(&ids);
    table.index_copy(0, &index, &other.index_select(0, &index))
}

#[test]
fn every_fixture_merges_as_peft_merges_it() {
    let mut compared = 0;
    let families = [fixtures(), fixtures().join("classification")].map(|dir| fs::read_dir(dir).unwrap());
    for family in families.into_iter().flatten() {
        let base = family.unwrap().path();
        if !base.join("adapters").is_dir() {
            continue;
        }
        for variant in fs::read_dir(base.join("adapters")).unwrap() {
            let adapter = variant.unwrap().path();
            let label = adapter.display().to_string();
            let dir = temp();
            let out = dir.path().join("merged");
            if label.ends_with("llama/adapters/lora_bias") {
                let error = quiet(&base, std::slice::from_ref(&adapter), &out).unwrap_err();
                assert!(matches!(error, Error::NoBias { .. }), "{error}");
                continue;
            }
            let report = quiet(&base, std::slice::from_ref(&adapter), &out).expect(&label);
            let (before, after) = (Checkpoint::open(&base).unwrap(), Checkpoint::open(&out).unwrap());
            let reference = TensorFile::open(&adapter.join("reference.safetensors")).unwrap();
            let names = |f: &TensorFile| f.path().file_name().map(ToOwned::to_owned);
            assert!(before.shards().iter().map(names).eq(after.shards().iter().map(names)), "{label}");

            let golden: Vec<&str> = reference.names().filter_map(|n| n.strip_prefix("merged.")).collect();
            // PEFT writes the rows of a tied head that has its own into the one weight, and those of the table, too, so that its
            // merged model is no longer the adapted one. Here the two become two.
            let apart = label.ends_with("qwen2/adapters/tokens_apart");
            if apart {
                let name = "model.embed_tokens.weight";
                let (was, both) = (before.read(name).unwrap(), reference.read(&format!("merged.{name}")).unwrap());
                let head = with_rows(&was, &both, HEAD_ROWS);
                assert!(after.read("lm_head.weight").unwrap().equal(&head) && !head.equal(&was), "{label}");
            }
            // An adapter that is still the part of the base that it began as adds up to the base again.
            let unconverted = label.ends_with("/pissa") || label.ends_with("/olora");
            assert_eq!(golden.is_empty(), unconverted, "{label}");
            for name in report.changed.iter().filter(|_| unconverted) {
                let (was, is) = (before.read(name).unwrap(), after.read(name).unwrap());
                let error = (&is - &was).abs().max().double_value(&[]) / was.abs().max().double_value(&[]);
                assert!(error <= GOLDEN_TOLERANCE, "{label} {name}: {error:e}");
            }
            for name in &golden {
                let mut want = reference.read(&format!("merged.{name}")).unwrap();
                if apart && *name == "model.embed_tokens.weight" {
                    want = with_rows(&want, &before.read(name).unwrap(), HEAD_ROWS);
                }
                let got = after.read(name).unwrap_or_else(|e| panic!("{label}: {e}"));
                let error = (&got - &want).abs().max().double_value(&[]) / want.abs().max().double_value(&[]);
                assert!(error <= GOLDEN_TOLERANCE, "{label} {name}: {error:e}");
                let moved = (before.read(name).unwrap() - &got).abs().max().double_value(&[]);
                assert!(moved > 100.0 * GOLDEN_TOLERANCE, "{label} {name}: the merge must be visible, {moved:e}");
                compared += 1;
            }
            let changed: BTreeSet<&str> = report.changed.iter().map(String::as_str).collect();
            for name in before.names().filter(|n| !changed.contains(n)) {
                assert!(before.read(name).unwrap().equal(&after.read(name).unwrap()), "{label} {name}");
            }
            for name in golden {
                assert!(changed.contains(name), "{label} {name}");
            }
            let agreement = verify(&base, std::slice::from_ref(&adapter), &out).expect(&label);
            assert_eq!((agreement.tensors, agreement.changed), (report.tensors, report.changed.len()));
            // Rows of tokens are taken as they are.
            let exact = label.ends_with("/tokens_alone");
            assert_eq!(agreement.max_ratio > 0.0, !exact, "{label}: {agreement:?}");
        }
    }
    assert!(compared > 120, "{compared}");
}

#[test]
fn a_head_saved_in_full_replaces_the_base_and_companions_come_along() {
    let base = fixtures().join("llama");
    let adapter = base.join("adapters/head_saved");
    let dir = temp();
    let out = dir.path().join("merged");
    let mut heard = Vec::new();
    let progress = &mut |done, of| heard.push((done, of));
    let report = merge(&base, std::slice::from_ref(&adapter), &out, &MergeOptions::default(), progress).unwrap();
    let head = Checkpoint::open(&out).unwrap().read("lm_head.weight").unwrap();
    let saved = TensorFile::open(&adapter.join("adapter_model.safetensors")).unwrap();
    assert!(head.equal(&saved.read("base_model.model.lm_head.weight").unwrap()));
    assert!(!report.untied);

    for name in
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    {
        assert_eq!(fs::read(out.join(name)).unwrap(), fs::read(base.join(name)).unwrap(), "{name}");
    }
    assert!(!out.join("adapters").exists() && !out.join("reference.safetensors").exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left behind");
    let (first, last) = (heard[0], *heard.last().unwrap());
    assert_eq!((first, last), ((0, report.bytes), (report.bytes, report.bytes)));
    assert!(heard.is_sorted() && heard.len() == report.tensors + 1);

    let record = json_file(&out.join("provenance.json"));
    let weights = &record["adapters"][0]["files"][1];
    assert_eq!(weights["sha256"], sha256_file(&adapter.join("adapter_model.safetensors")).unwrap());
    assert_eq!(record["base"]["files"][0]["sha256"], sha256_file(&base.join("model.safetensors")).unwrap());
    assert_eq!(record["adapters"][0]["base_model_name_or_path"], "llama");
}

#[test]
fn a_sharded_model_keeps_its_shards_and_index() {
    let base = fixtures().join("qwen3");
    let (_dir, out, _) = merged(&base, &base.join("adapters/lora"));
    let index = "model.safetensors.index.json";
    let (before, after) = (json_file(&base.join(index)), json_file(&out.join(index)));
    assert_eq!(before["weight_map"], after["weight_map"]);
    assert_eq!(before["metadata"]["total_size"], after["metadata"]["total_size"]);
}

#[test]
fn other_dtypes_are_one_rounding_away_and_the_config_says_so() {
    let base = fixtures().join("llama");
    let adapter = base.join("adapters/all_linear");
    let (_dir, exact, _) = merged(&base, &adapter);
    let exact = Checkpoint::open(&exact).unwrap();
    for kind in [Kind::BFloat16, Kind::Half, Kind::Double] {
        let dir = temp();
        let out = dir.path().join("merged");
        let options = MergeOptions { dtype: Some(kind) };
        merge(&base, std::slice::from_ref(&adapter), &out, &options, &mut |_, _| {}).unwrap();
        let after = Checkpoint::open(&out).unwrap();
        for name in exact.names() {
            assert!(after.read(name).unwrap().equal(&exact.read(name).unwrap().to_kind(kind)), "{name}");
        }
        assert_eq!(json_file(&out.join("config.json"))["dtype"], lora_torch::kind_name(kind));
        verify(&base, std::slice::from_ref(&adapter), &out).unwrap();
    }
}

#[test]
fn a_bf16_base_is_summed_in_float32_and_rounded_once() {
    let w = Tensor::randn([8, 4], (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16);
    let (_keep, base) = write_base(&json!({"torch_dtype": "bfloat16"}), &[("m.q_proj.weight", &w)]);
    let (first, second) = (linear(1, 8, 4), linear(2, 8, 4));
    let mut wanted = w.to_kind(Kind::Float);
    for content in [&first, &second] {
        let AdapterModule::Linear(LoraTensors { a, b, .. }) = content else { unreachable!() };
        wanted += b.matmul(a) * 2.0;
    }
    let ((_k1, one), (_k2, two)) = (adapter([("m.q_proj", first)]), adapter([("m.q_proj", second)]));
    let dir = temp();
    let out = dir.path().join("merged");
    quiet(&base, &[one.clone(), two.clone()], &out).unwrap();
    let after = Checkpoint::open(&out).unwrap().read("m.q_proj.weight").unwrap();
    assert_eq!(after.kind(), Kind::BFloat16);
    assert!(after.equal(&wanted.to_kind(Kind::BFloat16)));
    verify(&base, &[one, two], &out).unwrap();
}

#[test]
fn tensors_of_every_rank_survive_a_change_of_dtype() {
    let of = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
    let (weight, vector, scalar, cube, none) = (of(&[2, 2]), of(&[7]), of(&[]), of(&[3, 2, 2]), of(&[0, 4]));
    let ids = Tensor::from_slice(&[1i64, 1 << 60]);
    let tensors =
        [("m.q_proj.weight", &weight), ("v", &vector), ("s", &scalar), ("c", &cube), ("n", &none), ("ids", &ids)];
    let (_keep, base) = write_base(&json!({}), &tensors);
    let (_keep, adapter) = adapter([("m.q_proj", linear(1, 2, 2)), ("v", saved(&vector))]);
    let text = quiet(&base, std::slice::from_ref(&adapter), &base.join("x")).unwrap_err().to_string();
    assert!(text.contains("no tensor `v.weight`"), "{text}");

    let (_keep, adapter) = self::adapter([("m.q_proj", linear(1, 2, 2))]);
    let dir = temp();
    let out = dir.path().join("merged");
    let options = MergeOptions { dtype: Some(Kind::BFloat16) };
    merge(&base, std::slice::from_ref(&adapter), &out, &options, &mut |_, _| {}).unwrap();
    let after = Checkpoint::open(&out).unwrap();
    for (name, tensor) in &tensors[1..5] {
        let read = after.read(name).unwrap();
        assert_eq!((read.kind(), read.size()), (Kind::BFloat16, tensor.size()), "{name}");
        assert!(read.equal(&tensor.to_kind(Kind::BFloat16)), "{name}");
    }
    assert!(after.read("ids").unwrap().equal(&ids), "whole numbers keep their dtype");
    verify(&base, &[adapter], &out).unwrap();
}

#[test]
fn a_tensor_of_many_blocks_is_merged_whole() {
    let w = Tensor::randn([3000, 1100], (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16);
    let (_keep, base) = write_base(&json!({}), &[("m.q_proj.weight", &w)]);
    let content = linear(1, 3000, 1100);
    let AdapterModule::Linear(LoraTensors { a, b, .. }) = &content else { unreachable!() };
    let wanted = (w.to_kind(Kind::Double) + b.to_kind(Kind::Double).matmul(&a.to_kind(Kind::Double)) * 2.0)
        .to_kind(Kind::BFloat16);
    let (_keep, adapter) = adapter([("m.q_proj", content)]);
    let (_dir, out, _) = merged(&base, &adapter);
    let got = Checkpoint::open(&out).unwrap().read("m.q_proj.weight").unwrap();
    // Rounding float32 and float64 sums differs only next to a border between two bf16 numbers: one unit, seldom.
    let differing = i64::try_from(got.ne_tensor(&wanted).sum(Kind::Int64)).unwrap();
    assert!(differing < 3000 * 1100 / 1000, "{differing}");
    assert!(got.to_kind(Kind::Float).allclose(&wanted.to_kind(Kind::Float), BF16_UNIT, F32_SUM_TOLERANCE, false));
    verify(&base, &[adapter], &out).unwrap();
}

#[test]
fn layers_stored_transposed_are_told_by_shape_or_family() {
    // As PEFT saves an adapter of GPT-2 whose head is a target, too: fan_in_fan_out is false for all.
    let (square, wide) =
        (Tensor::randn([4, 4], (Kind::Float, Device::Cpu)), Tensor::randn([4, 6], (Kind::Float, Device::Cpu)));
    let head = Tensor::randn([4, 4], (Kind::Float, Device::Cpu));
    let tensors = [("h.0.attn.c_proj.weight", &square), ("h.0.attn.c_attn.weight", &wide), ("lm_head.weight", &head)];
    let (_keep, base) = write_base(&json!({"model_type": "gpt2", "tie_word_embeddings": false}), &tensors);
    let contents = [linear(1, 4, 4), linear(2, 6, 4), linear(3, 4, 4)];
    let delta = |content: &AdapterModule| match content {
        AdapterModule::Linear(LoraTensors { a, b, .. }) => b.matmul(a) * 2.0,
        other => panic!("{other:?}"),
    };
    let wanted = [&square + delta(&contents[0]).tr(), &wide + delta(&contents[1]).tr(), &head + delta(&contents[2])];
    let [c_proj, c_attn, lm_head] = contents;
    let (_keep, adapter) = adapter([("h.0.attn.c_proj", c_proj), ("h.0.attn.c_attn", c_attn), ("lm_head", lm_head)]);
    let (_dir, out, _) = merged(&base, &adapter);
    let after = Checkpoint::open(&out).unwrap();
    for ((name, _), wanted) in tensors.iter().zip(&wanted) {
        assert!(after.read(name).unwrap().allclose(wanted, GOLDEN_TOLERANCE, GOLDEN_TOLERANCE, false), "{name}");
    }
}
