//! Several adapters over one base: switched, weighted, given by row, replaced, taken off.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

mod common;

use common::{distance, fixtures};
use lora_core::VeraProjection;
use lora_format::{AdapterFolder, TensorFile, read_adapter};
use lora_model::{AdapterSet, Decoder, Error, Mode, Packing, TokenBatch};
use std::path::PathBuf;
use tch::Tensor;

/// The reach that the fixtures' README names for logits in fp32.
const LOGITS_TOLERANCE: f64 = 1e-5;

fn llama() -> PathBuf {
    fixtures().join("llama")
}

fn adapter(name: &str) -> AdapterFolder {
    read_adapter(&llama().join(name)).unwrap()
}

fn load() -> Decoder {
    common::load(&llama())
}

/// Both rows of the fixtures' batch end to end, and where each token stood in the padded batch.
fn batch(model: &Decoder) -> (TokenBatch, Tensor) {
    common::unpadded(model, &TensorFile::open(&llama().join("reference.safetensors")).unwrap())
}

fn logits(model: &Decoder, batch: &TokenBatch) -> Tensor {
    tch::no_grad(|| model.logits(&model.hidden(batch, Mode::Eval, None).unwrap()).unwrap())
}

fn reference(file: &str, places: &Tensor) -> Tensor {
    let file = TensorFile::open(&llama().join(file).join("reference.safetensors")).unwrap();
    file.read("logits").unwrap().flatten(0, 1).index_select(0, places)
}

const ALL: [&str; 18] = [
    "lora",
    "all_linear",
    "rslora",
    "regex",
    "patterns",
    "layers",
    "embedding",
    "head_saved",
    "dora",
    "lora_bias",
    "pissa",
    "olora",
    "loftq",
    "dora_embedding",
    "vera",
    "vera_key",
    "adalora",
    "adalora_pruned",
];

#[test]
fn adapters_of_every_method_are_switched_and_the_base_comes_back() {
    let mut model = load();
    let (batch, places) = batch(&model);
    let base = logits(&model, &batch);
    let mut set = AdapterSet::default();
    for name in ALL {
        set.load(name, &adapter(&format!("adapters/{name}")), &mut model).unwrap();
    }
    assert_eq!(set.names().count(), ALL.len());
    // Forwards and backwards, so that each follows on two others.
    for name in ALL.iter().chain(ALL.iter().rev()) {
        set.activate(&mut model, &[(name, 1.0)]).unwrap();
        let d = distance(&logits(&model, &batch), &reference(&format!("adapters/{name}"), &places));
        assert!(d < LOGITS_TOLERANCE, "{name}: {d}");
    }
    set.activate(&mut model, &[]).unwrap();
    assert!(logits(&model, &batch).equal(&base), "the base alone must be what it was, to the bit");
}

#[test]
fn weights_give_what_peft_mixes_and_a_weight_of_zero_is_the_base() {
    let mut model = load();
    let (batch, places) = batch(&model);
    let base = logits(&model, &batch);
    let mut set = AdapterSet::default();
    set.load("a", &adapter("mix/a"), &mut model).unwrap();
    set.load("wide", &adapter("mix/wide"), &mut model).unwrap();
    set.activate(&mut model, &[("a", 0.7), ("wide", 0.3)]).unwrap();
    let d = distance(&logits(&model, &batch), &reference("mix/cat", &places));
    assert!(d < LOGITS_TOLERANCE, "{d}");
    set.activate(&mut model, &[("a", 0.0)]).unwrap();
    assert!(distance(&logits(&model, &batch), &base) < LOGITS_TOLERANCE);
    set.load("embedding", &adapter("adapters/embedding"), &mut model).unwrap();
    set.activate(&mut model, &[("embedding", 0.5), ("embedding", 0.5)]).unwrap();
    let d = distance(&logits(&model, &batch), &reference("adapters/embedding", &places));
    assert!(d < LOGITS_TOLERANCE, "two halves of one: {d}");
}

#[test]
fn veras_pair_is_drawn_with_the_bits_of_peft() {
    let file = TensorFile::open(&llama().join("adapters/vera/adapter_model.safetensors")).unwrap();
    // Rank 8 and key 0; down_proj reads 80, and nothing gives more than 32.
    let drawn = VeraProjection::from_key(0, 8, 80, 32).unwrap();
    assert!(drawn.a.equal(&file.read("base_model.vera_A").unwrap()));
    assert!(drawn.b.equal(&file.read("base_model.vera_B").unwrap()));
}

#[test]
fn other_types_are_weighted_as_the_plain_pairs_that_they_come_to() {
    let mut model = load();
    let (batch, places) = batch(&model);
    let base = logits(&model, &batch);
    let mut set = AdapterSet::default();
    for name in ["vera", "vera_key", "adalora_pruned", "lora"] {
        set.load(name, &adapter(&format!("adapters/{name}")), &mut model).unwrap();
    }
    for name in ["vera", "vera_key", "adalora_pruned"] {
        set.activate(&mut model, &[(name, 0.25), (name, 0.75)]).unwrap();
        let d = distance(&logits(&model, &batch), &reference(&format!("adapters/{name}"), &places));
        assert!(d < LOGITS_TOLERANCE, "parts of {name}: {d}");
    }
    // Beside LoRA, in one batch by row and as a sum.
    let mix: &[(&str, f64)] = &[("vera", 0.5), ("lora", -0.5)];
    set.activate(&mut model, mix).unwrap();
    let sum = logits(&model, &batch);
    set.route(&mut model, &batch.segments, &[mix, &[("adalora_pruned", 1.0)]]).unwrap();
    let routed = logits(&model, &batch);
    let first = batch.segments.lens()[0];
    let rest = batch.segments.total() - first;
    assert!(distance(&routed.narrow(0, 0, first), &sum.narrow(0, 0, first)) < LOGITS_TOLERANCE);
    let wanted = reference("adapters/adalora_pruned", &places).narrow(0, first, rest);
    assert!(distance(&routed.narrow(0, first, rest), &wanted) < LOGITS_TOLERANCE);
    assert!(distance(&sum, &base) > 100.0 * LOGITS_TOLERANCE, "the mix must be visible");
    set.activate(&mut model, &[]).unwrap();
    assert!(logits(&model, &batch).equal(&base));
}

#[test]
fn each_row_of_a_batch_has_its_own_adapters() {
    let mut model = load();
    let (batch, _) = batch(&model);
    let first = batch.segments.lens()[0];
    let base = logits(&model, &batch);
    let mut set = AdapterSet::default();
    for (name, from) in
        [("a", "mix/a"), ("wide", "mix/wide"), ("embedding", "adapters/embedding"), ("rslora", "adapters/rslora")]
    {
        set.load(name, &adapter(from), &mut model).unwrap();
    }
    type Mix<'a> = &'a [(&'a str, f64)];
    let rows: [[Mix<'_>; 2]; 4] = [
        [&[("a", 1.0)], &[("wide", 1.0)]],
        [&[("embedding", 1.0)], &[]],
        [&[], &[("a", 0.7), ("wide", -0.3)]],
        [&[("rslora", 2.0)], &[("embedding", 0.5), ("a", 0.5)]],
    ];
    for row in rows {
        set.route(&mut model, &batch.segments, &row).unwrap();
        let mixed = logits(&model, &batch);
        for (i, mix) in row.into_iter().enumerate() {
            let alone = if mix.is_empty() {
                base.shallow_clone()
            } else {
                set.activate(&mut model, mix).unwrap();
                logits(&model, &batch)
            };
            let (start, n) = if i == 0 { (0, first) } else { (first, batch.segments.total() - first) };
            let d = distance(&mixed.narrow(0, start, n), &alone.narrow(0, start, n));
            assert!(d < LOGITS_TOLERANCE, "{row:?} row {i}: {d}");
            if !mix.is_empty() {
                let moved = distance(&alone.narrow(0, start, n), &base.narrow(0, start, n));
                assert!(moved > 100.0 * LOGITS_TOLERANCE, "{mix:?} must be visible: {moved}");
            }
            set.route(&mut model, &batch.segments, &row).unwrap();
        }
    }
}

#[test]
fn an_adapter_is_replaced_and_taken_off() {
    let mut model = load();
    let (batch, places) = batch(&model);
    let base = logits(&model, &batch);
    let mut set = AdapterSet::default();
    set.load("x", &adapter("adapters/head_saved"), &mut model).unwrap();
    set.activate(&mut model, &[("x", 1.0)]).unwrap();
    // Another one under the same name, while the first is active and has replaced the head.
    set.load("x", &adapter("adapters/dora"), &mut model).unwrap();
    set.activate(&mut model, &[("x", 1.0)]).unwrap();
    assert!(distance(&logits(&model, &batch), &reference("adapters/dora", &places)) < LOGITS_TOLERANCE);
    set.unload(&mut model, "x").unwrap();
    assert!(logits(&model, &batch).equal(&base));
    assert!(matches!(set.activate(&mut model, &[("x", 1.0)]), Err(Error::Adapter { .. })));
    assert!(set.unload(&mut model, "x").is_err());
}

#[test]
fn what_cannot_be_weighted_is_refused_and_changes_nothing() {
    let mut model = load();
    let (batch, _) = batch(&model);
    let base = logits(&model, &batch);
    let mut set = AdapterSet::default();
    for name in ["dora", "head_saved", "lora_bias", "lora"] {
        set.load(name, &adapter(&format!("adapters/{name}")), &mut model).unwrap();
    }
    for mix in [&[("dora", 0.5)][..], &[("head_saved", 0.9)], &[("lora", f64::NAN)], &[("none", 1.0)]] {
        let e = set.activate(&mut model, mix).unwrap_err();
        assert!(matches!(e, Error::Adapter { .. }), "{e}");
    }
    let lens = &batch.segments;
    assert!(set.route(&mut model, lens, &[&[("lora", 1.0)]]).is_err());
    assert!(set.route(&mut model, lens, &[&[("lora", 1.0)], &[("lora_bias", 1.0)]]).is_err());
    assert!(logits(&model, &batch).equal(&base));
    let wrong = read_adapter(&llama().join("../mistral/adapters/lora")).unwrap();
    assert!(matches!(set.load("wrong", &wrong, &mut model), Err(Error::Module { .. })));
}

#[test]
fn what_changes_the_unpacked_weight_is_refused_beside_a_packed_one() {
    for name in ["pissa", "loftq"] {
        let (mut model, folder) = (load(), adapter(&format!("adapters/{name}")));
        model.pack(Packing::Nf4 { double: false }, &mut |_, _| {}).unwrap();
        let named = |error: Error| match error {
            Error::Module { module, reason } => {
                assert!(module.ends_with("_proj") && reason.contains("packed"), "{reason}")
            }
            other => panic!("{name}: {other}"),
        };
        named(AdapterSet::default().load(name, &folder, &mut model).unwrap_err());
        named(model.load_adapter(&folder).unwrap_err());
    }
}
