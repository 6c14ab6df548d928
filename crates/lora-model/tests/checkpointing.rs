//! What is kept for the backward pass changes no bit of losses and gradients, in any family and under dropout.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

mod common;

use common::{fixtures, load, unpadded};
use lora_format::{AdapterConfig, TensorFile};
use lora_model::{Decoder, Recompute, TokenBatch, all_linear, plan_injection};
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

const FAMILIES: [&str; 10] =
    ["llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "granite", "mixtral", "gpt2", "gpt_neox"];

/// A model with adapters, and a batch.
fn model_and_batch(family: &str, config: &AdapterConfig) -> (Decoder, TokenBatch) {
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
    let file = TensorFile::open(&fixtures().join(family).join("reference.safetensors")).unwrap();
    let (batch, _) = unpadded(&model, &file);
    (model, batch)
}

fn gradients(model: &Decoder) -> BTreeMap<String, Tensor> {
    model.parameters().into_iter().map(|p| (p.name, p.tensor.grad())).collect()
}

/// The summed loss, and the gradient of each trained parameter.
fn results(
    family: &str,
    config: &AdapterConfig,
    remake: bool,
    recompute: Recompute,
) -> (f64, BTreeMap<String, Tensor>) {
    let (mut model, batch) = model_and_batch(family, config);
    model.remake = remake;
    let loss = model.loss_and_backward(&batch, 3, 0.5, recompute).unwrap().double_value(&[]);
    (loss, gradients(&model))
}

#[test]
fn every_policy_gives_the_same_bits() {
    for family in FAMILIES {
        for (dropout, use_dora) in [(0.0, false), (0.2, false), (0.2, true)] {
            let config = AdapterConfig { lora_dropout: dropout, use_dora, ..all_linear(2, 4.0) };
            let (loss, gradients) = results(family, &config, false, Recompute::NONE);
            assert!(gradients.values().all(|g| g.abs().max().double_value(&[]) > 0.0), "{family}: a gradient of zeros");
            for (remake, recompute) in [
                (true, Recompute::NONE),
                (false, Recompute::ALL),
                (true, Recompute::ALL),
                // The fixtures have two blocks or more.
                (false, Recompute(1)),
                (true, Recompute(1)),
            ] {
                let name = format!("{family}, dropout {dropout}, DoRA {use_dora}, remade {remake}, {recompute:?}");
                let (own, of) = results(family, &config, remake, recompute);
                assert_eq!(loss.to_bits(), own.to_bits(), "{name}: loss");
                for (parameter, wanted) in &gradients {
                    assert!(of[parameter].equal(wanted), "{name}: gradient of {parameter}");
                }
            }
        }
    }
}

#[test]
fn micro_batches_side_by_side_give_the_bits_of_one_after_the_other() {
    for family in FAMILIES {
        for dropout in [0.0, 0.2] {
            let config = AdapterConfig { lora_dropout: dropout, ..all_linear(2, 4.0) };
            let (model, batch) = model_and_batch(family, &config);
            let seeds = [5, 6, 7];
            let after = |seed| model.loss_and_backward(&batch, seed, 0.5, true).unwrap().double_value(&[]);
            let wanted = (seeds.map(after), gradients(&model));
            let (model, _) = model_and_batch(family, &config);
            let micros = seeds.map(|seed| (&batch, seed));
            let losses = model.loss_and_backward_by_block(&micros, 0.5).unwrap();
            let losses: Vec<u64> = losses.iter().map(|loss| loss.double_value(&[]).to_bits()).collect();
            assert_eq!(losses, wanted.0.map(f64::to_bits), "{family}, dropout {dropout}");
            let found = gradients(&model);
            for (parameter, wanted) in &wanted.1 {
                assert!(wanted.abs().max().double_value(&[]) > 0.0, "{family}: {parameter}");
                assert!(found[parameter].equal(wanted), "{family}, dropout {dropout}: gradient of {parameter}");
            }
        }
    }
}
