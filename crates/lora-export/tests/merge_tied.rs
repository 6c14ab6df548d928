//! Merging into models whose embedding and head share a weight.
#![allow(clippy::unwrap_used)]

mod common;

use common::{adapter, base_copy, linear, merged, saved, tensor_names, write_base};
use lora_export::verify;
use lora_format::{AdapterModule, Checkpoint, LoraTensors};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The reference sums in float32 as we do, in another order. A sum of r + 1 <= 9 terms is off by at most 9 half-units
/// of 2^-24 of the sum of their sizes, 5.4e-7 of it; twice that for the two of us, against the tensor's largest element.
const GOLDEN_TOLERANCE: f64 = 1e-6;

fn tied_base() -> (tempfile::TempDir, PathBuf) {
    base_copy("qwen2", |_| {})
}

const EMBEDDING: &str = "model.embed_tokens";

fn embedding_delta(seed: i64) -> AdapterModule {
    tch::manual_seed(seed);
    let (a, b) =
        (Tensor::randn([2, 320], (Kind::Float, Device::Cpu)), Tensor::randn([32, 2], (Kind::Float, Device::Cpu)));
    AdapterModule::Embedding(LoraTensors::new(a, b))
}

#[test]
fn a_tied_weight_changed_in_one_role_only_is_split() {
    let (_keep, base) = tied_base();
    let original = Checkpoint::open(&base).unwrap().read("model.embed_tokens.weight").unwrap();
    assert!(!Checkpoint::open(&base).unwrap().contains("lm_head.weight"));
    let trained = Tensor::randn([320, 32], (Kind::Float, Device::Cpu));
    let cases = [
        (EMBEDDING, embedding_delta(1), true),
        ("lm_head", linear(2, 320, 32), false),
        (EMBEDDING, saved(&trained), true),
        ("lm_head", saved(&trained), false),
    ];
    for (module, content, is_embedding) in cases {
        let (_keep, adapter) = adapter([(module, content)]);
        let (_dir, out, report) = merged(&base, &adapter);
        assert!(report.untied, "{module}");
        assert_eq!(json_file(&out.join("config.json"))["tie_word_embeddings"], false);
        let after = Checkpoint::open(&out).unwrap();
        let (embedding, head) =
            (after.read("model.embed_tokens.weight").unwrap(), after.read("lm_head.weight").unwrap());
        let (kept, moved) = if is_embedding { (head, embedding) } else { (embedding, head) };
        assert!(kept.equal(&original), "{module}");
        assert!((moved - &original).abs().max().double_value(&[]) > 0.1, "{module}");
        assert_eq!(report.tensors, tensor_names(&base).len() + 1);
        verify(&base, &[adapter], &out).unwrap();
    }
}

#[test]
fn a_tied_weight_changed_alike_in_both_roles_stays_tied() {
    let (_keep, base) = tied_base();
    let trained = Tensor::randn([320, 32], (Kind::Float, Device::Cpu));
    let (_keep, alike) = adapter([(EMBEDDING, saved(&trained)), ("lm_head", saved(&trained))]);
    let (_dir, out, report) = merged(&base, &alike);
    assert!(!report.untied);
    assert_eq!(json_file(&out.join("config.json"))["tie_word_embeddings"], true);
    assert_eq!(tensor_names(&out), tensor_names(&base));
    assert!(Checkpoint::open(&out).unwrap().read("model.embed_tokens.weight").unwrap().equal(&trained));
    verify(&base, &[alike], &out).unwrap();

    let (_keep, apart) = adapter([(EMBEDDING, saved(&trained)), ("lm_head", saved(&(&trained + 1.0)))]);
    let (_dir, out, report) = merged(&base, &apart);
    assert!(report.untied);
    let after = Checkpoint::open(&out).unwrap();
    assert!(after.read("model.embed_tokens.weight").unwrap().equal(&trained));
    assert!(after.read("lm_head.weight").unwrap().equal(&(&trained + 1.0)));
    verify(&base, &[apart], &out).unwrap();
}

#[test]
fn a_tied_head_that_is_stored_all_the_same_begins_from_the_embedding() {
    let embed = Tensor::randn([6, 4], (Kind::Float, Device::Cpu));
    let stale = Tensor::zeros([6, 4], (Kind::Float, Device::Cpu));
    let (_keep, base) = write_base(
        &json!({"model_type": "llama", "tie_word_embeddings": true}),
        &[("model.embed_tokens.weight", &embed), ("lm_head.weight", &stale)],
    );
    let content = linear(3, 6, 4);
    let AdapterModule::Linear(LoraTensors { a, b, .. }) = &content else { unreachable!() };
    let wanted = &embed + b.matmul(a) * 2.0;
    let (_keep, adapter) = adapter([("lm_head", content)]);
    let (_dir, out, report) = merged(&base, &adapter);
    assert!(report.untied && report.tensors == 2);
    let after = Checkpoint::open(&out).unwrap();
    assert!(after.read("model.embed_tokens.weight").unwrap().equal(&embed));
    assert!(after.read("lm_head.weight").unwrap().allclose(&wanted, GOLDEN_TOLERANCE, GOLDEN_TOLERANCE, false));
}

#[test]
fn an_untied_model_without_the_key_is_left_alone() {
    let embed = Tensor::randn([6, 4], (Kind::Float, Device::Cpu));
    let tensors = [("model.embed_tokens.weight", &embed), ("lm_head.weight", &embed)];
    let (_keep, base) = write_base(&json!({"model_type": "llama"}), &tensors);
    let (_keep, adapter) = adapter([("lm_head", linear(3, 6, 4))]);
    let (_dir, out, report) = merged(&base, &adapter);
    assert!(!report.untied);
    assert_eq!(report.changed, ["lm_head.weight"]);
    assert!(Checkpoint::open(&out).unwrap().read("model.embed_tokens.weight").unwrap().equal(&embed));
}
