//! What is kept for the backward pass changes no bit of losses and gradients, in any family and under dropout.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

mod common;

use common::{fixtures, load, unpadded};
use lora_format::{AdapterConfig, TensorFile};
use lora_model::{all_linear, plan_injection};
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

const FAMILIES: [&str; 10] =
    ["llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "granite", "mixtral", "gpt2", "gpt_neox"];

/// The summed loss, and the gradient of each trained parameter.
fn results(family: &str, config: &AdapterConfig, remake: bool, full: bool) -> (f64, BTreeMap<String, Tensor>) {
    let mut model = load(&fixtures().join(family));
    model.inject(&plan_injection(&model.config, config).unwrap(), 7).unwrap();
    for p in model.parameters() {
        // A B that is not zero, so that every gradient has something to say.
        if p.name.contains("lora_B") {
            let n = p.tensor.numel() as i64;
            let values = (Tensor::arange(n, (Kind::Float, p.tensor.device())) * 0.37).sin() * 0.05;
            tch::no_grad(|| p.tensor.shallow_clone().copy_(&values.view_as(&p.tensor)));
        }
    }
    model.remake = remake;
    let file = TensorFile::open(&fixtures().join(family).join("reference.safetensors")).unwrap();
    let (batch, _) = unpadded(&model, &file);
    let loss = model.loss_and_backward(&batch, 3, 0.5, full).unwrap().double_value(&[]);
    (loss, model.parameters().into_iter().map(|p| (p.name, p.tensor.grad())).collect())
}

#[test]
fn every_policy_gives_the_same_bits() {
    for family in FAMILIES {
        for (dropout, use_dora) in [(0.0, false), (0.2, false), (0.2, true)] {
            let config = AdapterConfig { lora_dropout: dropout, use_dora, ..all_linear(2, 4.0) };
            let (loss, gradients) = results(family, &config, false, false);
            assert!(gradients.values().all(|g| g.abs().max().double_value(&[]) > 0.0), "{family}: a gradient of zeros");
            for (remake, full) in [(true, false), (false, true), (true, true)] {
                let name = format!("{family}, dropout {dropout}, DoRA {use_dora}, remade {remake}, full {full}");
                let (own, of) = results(family, &config, remake, full);
                assert_eq!(loss.to_bits(), own.to_bits(), "{name}: loss");
                for (parameter, wanted) in &gradients {
                    assert!(of[parameter].equal(wanted), "{name}: gradient of {parameter}");
                }
            }
        }
    }
}
