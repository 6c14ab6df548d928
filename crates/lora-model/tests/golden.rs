//! Logits, losses, greedy tokens, gradients and ten training steps against what transformers and PEFT computed
//! (`tests/fixtures`, made by `tests/reference/make_fixtures.py`).
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

mod common;

use common::{distance, fixtures, load, unpadded};
use lora_format::{TensorFile, read_adapter};
use lora_model::{Decoder, GenerateOptions, Mode, Sampling, TokenBatch};
use lora_torch::{AdamWScalars, adamw_step};
use tch::{Kind, Tensor};

// The reach that the fixtures' README names: fp32 on both sides, sums in another order.
const LOGITS_TOLERANCE: f64 = 1e-5;
/// Starts that are a part of the weight are rounded twice more: when the part is taken off, and when it is added again.
const DECOMPOSED: [&str; 3] = ["pissa", "olora", "loftq"];
const GRADIENT_TOLERANCE: f64 = 1e-4;
const TRAINING_TOLERANCE: f64 = 1e-4;

const FAMILIES: [&str; 18] = [
    "llama",
    "llama_tied_rope3",
    "llama_linear",
    "llama_dynamic",
    "llama_yarn",
    "llama_longrope",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3",
    "phi3",
    "granite",
    "olmo2",
    "mixtral",
    "gpt2",
    "gpt_neox",
];
const ADAPTERS: [&str; 16] = [
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
];

fn inputs_of(family: &str) -> TensorFile {
    TensorFile::open(&fixtures().join(family).join("reference.safetensors")).unwrap()
}

fn check_logits(model: &Decoder, batch: &TokenBatch, places: &Tensor, reference: &TensorFile, name: &str) {
    let logits = tch::no_grad(|| model.logits(&model.hidden(batch, Mode::Eval, None).unwrap()).unwrap());
    let wanted = reference.read("logits").unwrap().flatten(0, 1).index_select(0, places);
    let (d, decomposed) = (distance(&logits, &wanted), DECOMPOSED.iter().any(|method| name.contains(method)));
    let most = if decomposed { 2.0 * LOGITS_TOLERANCE } else { LOGITS_TOLERANCE };
    assert!(d < most, "{name}: logits differ by {d}");
    let loss = model.loss(batch, Mode::Eval).unwrap().double_value(&[]) / batch.trained() as f64;
    let wanted = reference.read("loss").unwrap().double_value(&[0]);
    assert!((loss - wanted).abs() < LOGITS_TOLERANCE * wanted, "{name}: loss {loss} against {wanted}");
}

#[test]
fn base_models_give_the_logits_losses_and_greedy_tokens_of_transformers() {
    for family in FAMILIES {
        let model = load(&fixtures().join(family));
        let reference = inputs_of(family);
        let (batch, places) = unpadded(&model, &reference);
        check_logits(&model, &batch, &places, &reference, family);

        let greedy = Vec::<Vec<i64>>::try_from(&reference.read("greedy").unwrap()).unwrap().remove(0);
        let options =
            GenerateOptions { max_new_tokens: greedy.len() - 8, stop_ids: vec![2], sampling: Sampling::default() };
        let new = model.generate(&greedy[..8], &options, |_| true).unwrap();
        assert_eq!(new, greedy[8..8 + new.len()], "{family}");
        assert!(new.len() == greedy.len() - 8 || new.last() == Some(&2), "{family} stopped early: {new:?}");

        // Several texts at once are those that are written one by one, whichever of them ends first.
        let group = model.generate_group(&greedy[..8], &options, &[1, 2, 3]).unwrap();
        assert!(group.iter().all(|text| *text == new), "{family}: {group:?}");
        let sampling = Sampling { temperature: 1.0, top_p: 0.9, seed: 0 };
        let options = GenerateOptions { max_new_tokens: 12, stop_ids: (0..60).collect(), sampling };
        let group = model.generate_group(&greedy[..8], &options, &[5, 6, 7, 8]).unwrap();
        let alone = [5, 6, 7, 8].map(|seed| {
            let options = GenerateOptions { sampling: Sampling { seed, ..sampling }, ..options.clone() };
            model.generate(&greedy[..8], &options, |_| true).unwrap()
        });
        assert_eq!(group, alone, "{family}");
        assert!(group.iter().any(|text| text.len() != group[0].len() || *text != group[0]), "{family}: {group:?}");
    }
}

fn adapter_cases() -> Vec<(String, String)> {
    let llama = ADAPTERS.map(|a| ("llama".to_string(), a.to_string()));
    let others = FAMILIES.iter().filter(|f| **f != "llama").map(|f| (f.to_string(), "lora".to_string()));
    let more = [
        ("gpt2", "dora"),
        ("gpt2", "bias_all"),
        ("gpt2", "vera"),
        ("qwen2", "dora"),
        ("qwen2", "lora_bias"),
        ("qwen2", "bias_all"),
        ("qwen2", "bias_lora_only"),
        // Rows of tokens: with a head of its own, with one that is tied, and untied by other tokens.
        ("llama", "tokens"),
        ("llama", "tokens_apart"),
        ("llama", "tokens_alone"),
        ("qwen2", "tokens"),
        ("qwen2", "tokens_apart"),
        ("qwen2", "tokens_alone"),
        // Stacked experts, in both layouts, and as PEFT makes them of names of single experts.
        ("mixtral", "experts"),
        ("mixtral", "experts_down"),
        ("mixtral", "experts_legacy"),
        ("mixtral", "experts_before_0_19"),
        ("qwen3_moe", "experts"),
        ("qwen3_moe", "experts_down"),
        ("qwen3_moe", "experts_legacy"),
        ("qwen3_moe", "experts_before_0_19"),
    ];
    llama.into_iter().chain(others).chain(more.map(|(f, a)| (f.to_string(), a.to_string()))).collect()
}

/// `model.layers.0.self_attn.q_proj.lora_A.weight` as PEFT names its gradient.
fn reference_name(name: &str, reference: &TensorFile) -> Option<String> {
    if let Some(module) = name.strip_suffix(".bias").filter(|m| !m.ends_with(".lora_B")) {
        let names = ["base_layer.bias", "bias"].map(|end| format!("grad.base_model.model.{module}.{end}"));
        return names.into_iter().find(|n| reference.contains(n));
    }
    for part in ["lora_A", "lora_B"] {
        if let Some(module) = name.strip_suffix(&format!(".{part}.weight")) {
            return Some(format!("grad.base_model.model.{module}.{part}.default.weight"));
        }
    }
    if let Some(module) = name.strip_suffix(".lora_B.bias") {
        return Some(format!("grad.base_model.model.{module}.lora_B.default.bias"));
    }
    if let Some(module) = name.strip_suffix(".lora_magnitude_vector") {
        return Some(format!("grad.base_model.model.{module}.lora_magnitude_vector.default.weight"));
    }
    for part in ["lora_embedding_A", "lora_embedding_B", "vera_lambda_b", "vera_lambda_d"] {
        if let Some(module) = name.strip_suffix(&format!(".{part}")) {
            return Some(format!("grad.base_model.model.{module}.{part}.default"));
        }
    }
    if let Some(module) = name.strip_suffix(".token_adapter.trainable_tokens_delta") {
        let names = [".token_adapter", ""];
        let names = names.map(|a| format!("grad.base_model.model.{module}{a}.trainable_tokens_delta.default"));
        return names.into_iter().find(|n| reference.contains(n));
    }
    let module = name.strip_suffix(".weight")?;
    Some(format!("grad.base_model.model.{module}.modules_to_save.default.weight"))
}

#[test]
fn adapters_give_the_logits_losses_and_every_gradient_of_peft() {
    for (family, variant) in adapter_cases() {
        for checkpointing in [false, true] {
            let name = format!("{family}/{variant}, checkpointing {checkpointing}");
            let dir = fixtures().join(&family).join("adapters").join(&variant);
            let mut model = load(&fixtures().join(&family));
            model.load_adapter(&read_adapter(&dir).unwrap()).unwrap();
            let (batch, places) = unpadded(&model, &inputs_of(&family));
            let reference = TensorFile::open(&dir.join("reference.safetensors")).unwrap();
            check_logits(&model, &batch, &places, &reference, &name);

            let _loss = model.loss_and_backward(&batch, 0, 1.0 / batch.trained() as f64, checkpointing).unwrap();
            let mut wanted: Vec<String> =
                reference.names().filter(|n| n.starts_with("grad.")).map(String::from).collect();
            let parameters = model.parameters();
            assert!(!parameters.is_empty());
            for p in &parameters {
                let key = reference_name(&p.name, &reference).unwrap();
                let d = distance(&p.tensor.grad(), &reference.read(&key).unwrap());
                assert!(d < GRADIENT_TOLERANCE, "{name}: gradient of {} differs by {d}", p.name);
                wanted.retain(|w| *w != key);
            }
            assert!(wanted.is_empty(), "{name}: no gradient for {wanted:?}");
        }
    }
}

#[test]
fn ten_steps_of_adamw_follow_peft() {
    for (family, variant) in adapter_cases() {
        let name = format!("{family}/{variant}");
        let dir = fixtures().join(&family).join("adapters").join(&variant);
        let mut model = load(&fixtures().join(&family));
        model.load_adapter(&read_adapter(&dir).unwrap()).unwrap();
        let (batch, _) = unpadded(&model, &inputs_of(&family));
        let reference = TensorFile::open(&dir.join("reference.safetensors")).unwrap();
        let losses = Vec::<f64>::try_from(&reference.read("train.loss").unwrap()).unwrap();
        let norms = Vec::<f64>::try_from(&reference.read("train.grad_norm").unwrap()).unwrap();
        let parameters: Vec<Tensor> = model.parameters().into_iter().map(|p| p.tensor).collect();
        let moments: Vec<_> = parameters.iter().map(|p| (p.zeros_like(), p.zeros_like())).collect();
        for (i, (wanted_loss, wanted_norm)) in losses.iter().zip(&norms).enumerate() {
            let trained = batch.trained() as f64;
            let loss = model.loss_and_backward(&batch, 0, 1.0 / trained, false).unwrap().double_value(&[]) / trained;
            let norm =
                parameters.iter().map(|p| p.grad().square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt();
            assert!(
                (loss - wanted_loss).abs() < TRAINING_TOLERANCE * wanted_loss,
                "{name} step {i}: {loss} against {wanted_loss}"
            );
            assert!(
                (norm - wanted_norm).abs() < 10.0 * TRAINING_TOLERANCE * wanted_norm,
                "{name} step {i}: norm {norm} against {wanted_norm}"
            );
            let clip = (1.0 / (norm + 1e-6)).min(1.0);
            for (p, (m, v)) in parameters.iter().zip(&moments) {
                let h = AdamWScalars {
                    lr: 1e-2,
                    beta1: 0.9,
                    beta2: 0.999,
                    eps: 1e-8,
                    weight_decay: 0.1,
                    step: i as i64 + 1,
                };
                adamw_step(p, &(p.grad() * clip), m, v, &h).unwrap();
                let _ = p.grad().zero_();
            }
        }
        let after = read_adapter(&dir.join("after_training")).unwrap();
        let mut trained = load(&fixtures().join(&family));
        trained.load_adapter(&after).unwrap();
        for (p, wanted) in parameters.iter().zip(trained.parameters()) {
            // A bias on the keys moves all scores of a query alike, so its gradient is rounding, which Adam scales up.
            if wanted.name.ends_with("k_proj.bias") || wanted.name.ends_with("c_attn.bias") {
                continue;
            }
            let d = distance(&p.detach(), &wanted.tensor.detach());
            assert!(d < 30.0 * TRAINING_TOLERANCE, "{name}: {} differs by {d} after training", wanted.name);
        }
    }
}
