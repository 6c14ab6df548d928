//! Mixing against PEFT's `add_weighted_adapter`, and against the exact sums where PEFT is silently wrong.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{fixtures, temp};
use lora_core::{Combination, LoraSpec, MajoritySign, MixOptions, delta};
use lora_export::{Error, MergeOptions, Weighted, merge, mix_adapters};
use lora_format::{AdapterFolder, AdapterModule, Checkpoint, LoraTensors, TensorFile, read_adapter, read_json_object};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// Sums of products over at most 12 ranks in fp32 on both sides, and an SVD of a 32 x 32 matrix, whose fp32 error is a few
/// units of the largest singular value; against the largest entry of a delta.
const MIX_TOLERANCE: f64 = 2e-5;
/// Rounding of A and B to fp32 in a product that is compared in fp64.
const EXACT_TOLERANCE: f64 = 1e-6;

fn options(combination: Combination, rank: Option<i64>) -> MixOptions {
    MixOptions { combination, rank, density: 0.5, majority: MajoritySign::Total, seed: 0 }
}

fn named(name: &str) -> Combination {
    Combination::ALL.iter().find(|(n, _)| *n == name).unwrap().1
}

fn weighted(adapter: &Path, weight: f64) -> Weighted {
    Weighted { adapter: adapter.into(), weight }
}

/// The change that a plain adapter makes to a module.
fn change(folder: &AdapterFolder, module: &str) -> Tensor {
    let AdapterModule::Linear(LoraTensors { a, b, .. }) = &folder.modules[module] else { panic!("{module}") };
    let c = &folder.config;
    let spec = LoraSpec::new(c.rank_of(module).unwrap(), c.alpha_of(module).unwrap(), c.use_rslora).unwrap();
    delta(a, b, spec.scale(), Kind::Double).unwrap()
}

fn distance(got: &Tensor, wanted: &Tensor) -> f64 {
    assert_eq!(got.size(), wanted.size());
    (got - wanted).abs().max().double_value(&[]) / wanted.abs().max().double_value(&[]).max(1e-30)
}

#[test]
fn every_case_of_peft_is_computed_as_peft_computes_it() {
    let folder = fixtures().join("llama/mix");
    let mut cases = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let case = entry.unwrap().path();
        if !case.join("case.json").is_file() {
            continue;
        }
        let label = case.display().to_string();
        let arguments = Value::Object(read_json_object(&case.join("case.json")).unwrap());
        let list = |key: &str| arguments[key].as_array().unwrap().clone();
        let adapters: Vec<Weighted> = list("adapters")
            .iter()
            .zip(list("weights"))
            .map(|(name, weight)| weighted(&folder.join(name.as_str().unwrap()), weight.as_f64().unwrap()))
            .collect();
        let options = MixOptions {
            combination: named(arguments["combination_type"].as_str().unwrap()),
            rank: arguments["svd_rank"].as_i64(),
            density: arguments["density"].as_f64().unwrap_or(1.0),
            majority: match arguments["majority_sign_method"].as_str() {
                Some("frequency") => MajoritySign::Frequency,
                _ => MajoritySign::Total,
            },
            seed: 0,
        };
        let dir = temp();
        let report = mix_adapters(&adapters, None, &options, &dir.path().join("mixed")).expect(&label);
        let mixed = read_adapter(&dir.path().join("mixed")).unwrap();
        assert_eq!((mixed.config.r, mixed.config.lora_alpha), (report.rank, report.rank as f64));
        let reference = TensorFile::open(&case.join("reference.safetensors")).unwrap();
        let deltas: Vec<&str> = reference.names().filter_map(|n| n.strip_prefix("delta.base_model.model.")).collect();
        assert_eq!(deltas.len(), mixed.modules.len(), "{label}");
        for module in deltas {
            let wanted = reference.read(&format!("delta.base_model.model.{module}")).unwrap().to_kind(Kind::Double);
            let d = distance(&change(&mixed, module), &wanted);
            assert!(d < MIX_TOLERANCE, "{label} {module}: {d:e}");
        }
        if options.combination == Combination::Cat {
            assert!(report.error < EXACT_TOLERANCE, "{label}: {}", report.error);
        } else {
            assert!(report.error > 0.01, "{label}: an approximation must say how far off it is: {}", report.error);
        }
        cases += 1;
    }
    assert_eq!(cases, 9);
}

/// Two halves of one adapter are that adapter, whatever its method.
fn halves_make_a_whole(family: &str, variant: &str, combination: Combination, rank: Option<i64>) -> f64 {
    let base = fixtures().join(family);
    let adapter = base.join("adapters").join(variant);
    let dir = temp();
    let mixed = dir.path().join("mixed");
    let halves = [weighted(&adapter, 0.5), weighted(&adapter, 0.5)];
    mix_adapters(&halves, Some(&base), &options(combination, rank), &mixed).unwrap();
    let merged = |adapter: &PathBuf, name: &str| {
        let out = dir.path().join(name);
        merge(&base, std::slice::from_ref(adapter), &out, &MergeOptions::default(), &mut |_, _| {}).unwrap();
        Checkpoint::open(&out).unwrap()
    };
    let (one, other) = (merged(&adapter, "one"), merged(&mixed, "other"));
    let worst = one.names().map(|name| distance(&other.read(name).unwrap(), &one.read(name).unwrap()));
    worst.fold(0.0, f64::max)
}

#[test]
fn two_halves_are_one_whole_for_every_method() {
    for (family, variant, combination, rank) in [
        ("llama", "lora", Combination::Cat, None),
        ("llama", "rslora", Combination::Cat, None),
        ("llama", "rslora", Combination::Svd, None),
        ("llama", "patterns", Combination::Cat, None),
        ("llama", "embedding", Combination::Cat, None),
        ("qwen2", "lora_bias", Combination::Cat, None),
        // What DoRA changes has the rank of the matrix.
        ("llama", "dora", Combination::Svd, Some(32)),
        ("gpt2", "dora", Combination::Svd, Some(32)),
        ("llama", "pissa", Combination::Svd, None),
        ("llama", "loftq", Combination::Svd, None),
    ] {
        let d = halves_make_a_whole(family, variant, combination, rank);
        assert!(d < MIX_TOLERANCE, "{family}/{variant} {combination:?}: {d:e}");
    }
}

#[test]
fn an_adapter_of_weight_one_is_itself_and_of_weight_zero_is_nothing() {
    let folder = fixtures().join("llama/mix");
    let (a, b) = (folder.join("a"), folder.join("b"));
    let original = read_adapter(&a).unwrap();
    for (name, combination) in Combination::ALL {
        let dir = temp();
        let out = dir.path().join("mixed");
        // A density of one prunes nothing; the mean of those that agree counts the one of weight zero, too.
        if name.contains("ties") {
            continue;
        }
        let all = MixOptions { density: 1.0, ..options(combination, None) };
        mix_adapters(&[weighted(&a, 1.0), weighted(&b, 0.0)], None, &all, &out).unwrap();
        let mixed = read_adapter(&out).unwrap();
        for module in original.modules.keys() {
            let d = distance(&change(&mixed, module), &change(&original, module));
            assert!(d < MIX_TOLERANCE, "{name} {module}: {d:e}");
        }
    }
}

#[test]
fn one_adapter_is_resized_to_another_rank() {
    let a = fixtures().join("llama/mix/a");
    let dir = temp();
    let svd = |rank, name: &str| {
        mix_adapters(&[weighted(&a, 1.0)], None, &options(Combination::Svd, Some(rank)), &dir.path().join(name))
            .unwrap()
    };
    let (cut, same, larger) = (svd(2, "cut"), svd(4, "same"), svd(9, "larger"));
    assert_eq!((cut.rank, same.rank, larger.rank), (2, 4, 9));
    assert!(cut.error > 0.05 && same.error < EXACT_TOLERANCE && larger.error < EXACT_TOLERANCE, "{cut:?} {same:?}");
    assert!(cut.bytes < same.bytes && same.bytes < larger.bytes);
}

#[test]
fn what_is_drawn_depends_on_the_seed_only() {
    let folder = fixtures().join("llama/mix");
    let both = [weighted(&folder.join("a"), 0.7), weighted(&folder.join("b"), 0.3)];
    let dir = temp();
    let drawn = |seed: u64, name: &str| {
        let options = MixOptions { seed, ..options(Combination::DareLinear, None) };
        mix_adapters(&both, None, &options, &dir.path().join(name)).unwrap();
        fs::read(dir.path().join(name).join("adapter_model.safetensors")).unwrap()
    };
    let (first, again, other) = (drawn(1, "first"), drawn(1, "again"), drawn(2, "other"));
    assert!(first == again && first != other);
}

#[test]
fn what_cannot_be_mixed_is_refused_with_what_can() {
    let llama = fixtures().join("llama");
    let at = |name: &str| llama.join("adapters").join(name);
    let refusal = |adapters: &[Weighted], base: Option<&Path>, combination| {
        let dir = temp();
        let error = mix_adapters(adapters, base, &options(combination, None), &dir.path().join("mixed")).unwrap_err();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{error}");
        error
    };
    let dora = [weighted(&at("dora"), 1.0), weighted(&at("lora"), 1.0)];
    assert!(refusal(&dora, None, Combination::Svd).to_string().contains("--model"));
    assert!(refusal(&dora, Some(&llama), Combination::Linear).to_string().contains("use svd"));
    let ranks = [weighted(&at("lora"), 1.0), weighted(&at("rslora"), 1.0)];
    assert!(refusal(&ranks, None, Combination::Linear).to_string().contains("has rank 8 here and 4"));
    let saved = [weighted(&at("head_saved"), 0.5), weighted(&at("lora"), 1.0)];
    assert!(refusal(&saved, None, Combination::Cat).to_string().contains("saved in full"));
    assert!(matches!(refusal(&[], None, Combination::Cat), Error::NoAdapter));
    let biases = [weighted(&fixtures().join("qwen2/adapters/bias_all"), 1.0)];
    assert!(refusal(&biases, None, Combination::Cat).to_string().contains("bias"));
}
