//! Classifiers against what transformers and PEFT computed (`tests/fixtures/classification`, made by
//! `tests/reference/make_classifiers.py`): logits of texts of different lengths and of pairs, losses of every kind of
//! problem, every gradient with and without recomputation, ten training steps.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

mod common;

use common::{distance, fixtures, load};
use lora_format::{AdapterConfig, Labels, ProblemType, TargetModules, TensorFile, read_adapter};
use lora_model::{ClassTargets, Decoder, Keeping, Mode, ModelConfig, Storage, TokenBatch, absent_head, plan_injection};
use lora_torch::{AdamWScalars, adamw_step};
use std::path::PathBuf;
use tch::{Device, Kind, Tensor, no_grad};

const KEEPING: Keeping = Keeping { kind: Kind::Float, device: Device::Cpu, storage: Storage::Converted };

// The reach that the fixtures' README names: fp32 on both sides, sums in another order.
const LOGITS_TOLERANCE: f64 = 1e-5;
const GRADIENT_TOLERANCE: f64 = 1e-4;
const TRAINING_TOLERANCE: f64 = 1e-4;
/// A thousand times what rounding makes of logits.
const VISIBLE: f64 = 1e-2;

/// Checkpoints with their adapters.
const CASES: [(&str, &[&str]); 6] = [
    ("bert", &["lora", "all_linear", "rslora", "dora", "pissa", "embedding", "bias_all", "pooler_saved"]),
    ("bert_regression", &["lora"]),
    ("roberta", &["lora", "all_linear", "dora"]),
    ("roberta_multi", &["lora"]),
    ("llama", &["lora", "all_linear"]),
    ("qwen2_tied", &["lora"]),
];

fn folder(name: &str) -> PathBuf {
    fixtures().join("classification").join(name)
}

/// The texts of a fixture without their padding.
fn texts(model: &Decoder, name: &str) -> (TokenBatch, TensorFile) {
    let file = TensorFile::open(&folder(name).join("reference.safetensors")).unwrap();
    let read = |name: &str| Vec::<Vec<i64>>::try_from(&file.read(name).unwrap()).unwrap();
    let (ids, mask) = (read("input_ids"), read("attention_mask"));
    let types = if file.contains("token_type_ids") { read("token_type_ids") } else { vec![] };
    let lens: Vec<i64> = mask.iter().map(|row| row.iter().sum()).collect();
    let cut = |rows: &[Vec<i64>]| -> Vec<i64> {
        rows.iter().zip(&lens).flat_map(|(row, &n)| row[..n as usize].to_vec()).collect()
    };
    let labels = file.read("labels").unwrap();
    let values = Vec::<f32>::try_from(&labels.to_kind(Kind::Float).reshape([-1])).unwrap();
    let ids_of = Vec::<i64>::try_from(&labels.to_kind(Kind::Int64).reshape([-1])).unwrap();
    let targets = match model.config.labels.as_ref().unwrap().problem {
        ProblemType::SingleLabel => ClassTargets::Ids(&ids_of),
        _ => ClassTargets::Values(&values),
    };
    let batch = TokenBatch::for_classes(&model.config, &cut(&ids), &cut(&types), &lens, targets, Device::Cpu).unwrap();
    (batch, file)
}

fn check(model: &Decoder, batch: &TokenBatch, reference: &TensorFile, name: &str) {
    let logits = no_grad(|| model.class_logits(batch, Mode::Eval)).unwrap();
    let d = distance(&logits, &reference.read("logits").unwrap());
    assert!(d < LOGITS_TOLERANCE, "{name}: logits differ by {d}");
    let loss = model.loss(batch, Mode::Eval).unwrap().double_value(&[]) / batch.trained() as f64;
    let wanted = reference.read("loss").unwrap().double_value(&[0]);
    assert!((loss - wanted).abs() < LOGITS_TOLERANCE * wanted, "{name}: loss {loss} against {wanted}");
}

fn cases() -> impl Iterator<Item = (&'static str, &'static str)> {
    CASES.into_iter().flat_map(|(name, adapters)| adapters.iter().map(move |adapter| (name, *adapter)))
}

fn adapted(name: &str, adapter: &str) -> (Decoder, TokenBatch, TensorFile) {
    let mut model = load(&folder(name));
    let dir = folder(name).join("adapters").join(adapter);
    model.load_adapter(&read_adapter(&dir).unwrap()).unwrap();
    let (batch, _) = texts(&model, name);
    (model, batch, TensorFile::open(&dir.join("reference.safetensors")).unwrap())
}

#[test]
fn base_models_give_the_logits_and_losses_of_transformers() {
    for (name, _) in CASES {
        let model = load(&folder(name));
        let (batch, reference) = texts(&model, name);
        check(&model, &batch, &reference, name);
    }
}

/// PEFT's names of the gradient of a parameter.
fn reference_names(name: &str) -> Vec<String> {
    let name = name.strip_suffix(".weight").map_or(name.to_string(), |n| format!("{n}.default.weight"));
    let mut names = vec![name.clone(), name.replace(".default.weight", ".weight"), format!("{name}.default")];
    names.push(name.replace(".lora_magnitude_vector", ".lora_magnitude_vector.default.weight"));
    let plain = name.replace(".default.weight", ".weight");
    if let Some((module, part)) = plain.rsplit_once('.') {
        names.push(format!("{module}.base_layer.{part}"));
        // A module, or the one that it lies in, is saved in full.
        names.push(format!("{module}.modules_to_save.default.{part}"));
        if let Some((outer, inner)) = module.rsplit_once('.') {
            names.push(format!("{outer}.modules_to_save.default.{inner}.{part}"));
        }
    }
    names.into_iter().map(|n| format!("grad.base_model.model.{n}")).collect()
}

#[test]
fn adapters_give_the_logits_losses_and_every_gradient_of_peft() {
    for (name, adapter) in cases() {
        for checkpointing in [false, true] {
            let (model, batch, reference) = adapted(name, adapter);
            let case = format!("{name}/{adapter}, checkpointing {checkpointing}");
            check(&model, &batch, &reference, &case);
            let _loss = model.loss_and_backward(&batch, 0, 1.0 / batch.trained() as f64, checkpointing).unwrap();
            let mut wanted: Vec<String> =
                reference.names().filter(|n| n.starts_with("grad.")).map(String::from).collect();
            for p in model.parameters() {
                let key = reference_names(&p.name).into_iter().find(|n| reference.contains(n));
                let key = key.unwrap_or_else(|| panic!("{case}: PEFT has no gradient for {}", p.name));
                let theirs = reference.read(&key).unwrap();
                wanted.retain(|w| *w != key);
                // A bias on the keys moves all scores of a query alike, so its gradient is rounding.
                if p.name.ends_with("key.bias") {
                    continue;
                }
                let d = distance(&p.tensor.grad(), &theirs);
                assert!(d < GRADIENT_TOLERANCE, "{case}: gradient of {} differs by {d}", p.name);
            }
            assert!(wanted.is_empty(), "{case}: no gradient for {wanted:?}");
        }
    }
}

#[test]
fn ten_steps_of_adamw_follow_peft() {
    for (name, adapter) in cases() {
        let (model, batch, reference) = adapted(name, adapter);
        let losses = Vec::<f64>::try_from(&reference.read("train.loss").unwrap()).unwrap();
        let norms = Vec::<f64>::try_from(&reference.read("train.grad_norm").unwrap()).unwrap();
        let parameters: Vec<Tensor> = model.parameters().into_iter().map(|p| p.tensor).collect();
        let moments: Vec<_> = parameters.iter().map(|p| (p.zeros_like(), p.zeros_like())).collect();
        let trained = batch.trained() as f64;
        for (i, (wanted_loss, wanted_norm)) in losses.iter().zip(&norms).enumerate() {
            let loss = model.loss_and_backward(&batch, 0, 1.0 / trained, false).unwrap().double_value(&[]) / trained;
            let norm =
                parameters.iter().map(|p| p.grad().square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt();
            // Relative to the first loss: a later one may be next to nothing.
            assert!(
                (loss - wanted_loss).abs() < TRAINING_TOLERANCE * losses[0],
                "{name}/{adapter} step {i}: {loss} against {wanted_loss}"
            );
            assert!(
                (norm - wanted_norm).abs() < 10.0 * TRAINING_TOLERANCE * norms[0],
                "{name}/{adapter} step {i}: norm {norm} against {wanted_norm}"
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
    }
}

#[test]
fn a_text_has_the_same_logits_alone_and_beside_others() {
    for name in ["bert", "roberta", "llama"] {
        let model = load(&folder(name));
        let labels = |ids: &[i64], lens: &[i64]| {
            let batch = TokenBatch::for_classes(&model.config, ids, &[], lens, ClassTargets::Unknown, Device::Cpu);
            no_grad(|| model.class_logits(&batch.unwrap(), Mode::Eval)).unwrap()
        };
        let (one, other) = ([5i64, 9, 30, 7, 12], [17i64, 6, 200]);
        let both: Vec<i64> = one.iter().chain(&other).copied().collect();
        let together = labels(&both, &[5, 3]);
        for (i, alone) in [labels(&one, &[5]), labels(&other, &[3])].iter().enumerate() {
            let d = distance(&together.narrow(0, i as i64, 1), alone);
            assert!(d < LOGITS_TOLERANCE, "{name}: text {i} differs by {d}");
        }
        assert!(distance(&labels(&one, &[5]), &labels(&[12, 7, 30, 9, 5], &[5])) > VISIBLE, "{name} sees no order");
    }
}

fn seq_cls(targets: Option<TargetModules>) -> AdapterConfig {
    AdapterConfig { task_type: Some("SEQ_CLS".into()), target_modules: targets, ..AdapterConfig::default() }
}

#[test]
fn a_plan_saves_the_head_in_full_and_targets_what_peft_targets() {
    let config = ModelConfig::read(&folder("roberta")).unwrap();
    let default = Some(TargetModules::Pattern("peft-default".into()));
    let plan = plan_injection(&config, &seq_cls(default)).unwrap();
    assert_eq!(plan.config.modules_to_save.as_deref().unwrap(), ["classifier", "score"]);
    assert_eq!(
        plan.saved.iter().map(|m| m.path.as_str()).collect::<Vec<_>>(),
        ["classifier.dense", "classifier.out_proj"]
    );
    assert!(plan.adapters.iter().all(|a| a.module.path.ends_with("query") || a.module.path.ends_with("value")));
    for name in ["bert", "roberta", "llama"] {
        let config = ModelConfig::read(&folder(name)).unwrap();
        let plan = plan_injection(&config, &seq_cls(None)).unwrap();
        let ours: std::collections::BTreeSet<String> = plan.adapters.iter().map(|a| a.module.path.clone()).collect();
        let theirs = read_adapter(&folder(name).join("adapters/all_linear")).unwrap();
        let low_rank = |m: &lora_format::AdapterModule| !matches!(m, lora_format::AdapterModule::Saved { .. });
        let theirs = theirs.modules.into_iter().filter(|(_, m)| low_rank(m)).map(|(path, _)| path).collect();
        assert_eq!(ours, theirs, "{name}");
    }
}

#[test]
fn a_task_that_is_not_the_models_is_refused_with_the_remedy() {
    let classifier = ModelConfig::read(&folder("bert")).unwrap();
    let causal = AdapterConfig { task_type: Some("CAUSAL_LM".into()), ..AdapterConfig::default() };
    let message = plan_injection(&classifier, &causal).unwrap_err().to_string();
    assert!(message.contains("SEQ_CLS") && message.contains("task_type"), "{message}");
    let language = ModelConfig::read(&fixtures().join("llama")).unwrap();
    let message = plan_injection(&language, &seq_cls(None)).unwrap_err().to_string();
    assert!(message.contains("no classification head"), "{message}");
    let message = load(&folder("bert")).logits(&Tensor::zeros([1, 32], (Kind::Float, Device::Cpu))).unwrap_err();
    assert!(message.to_string().contains("lora classify"), "{message}");
}

#[test]
fn a_head_that_the_checkpoint_lacks_begins_as_transformers_begins_it_and_from_its_seed() {
    let labels =
        Labels { names: vec!["a".into(), "b".into(), "c".into(), "d".into()], problem: ProblemType::SingleLabel };
    let dir = fixtures().join("llama");
    let config = ModelConfig::read(&dir).unwrap().for_classes(labels);
    let absent = absent_head(&dir, &config).unwrap();
    assert_eq!(absent.iter().map(|m| m.path.as_str()).collect::<Vec<_>>(), ["score"]);
    let head = |seed| {
        let model = Decoder::load_as(&dir, config.clone(), seed, KEEPING, &mut |_, _| {}).unwrap();
        let lora_model::Head::Classes(head) = model.head else { panic!("no classifier") };
        head.out.weight.dense().unwrap()
    };
    let (one, again, other) = (head(1), head(1), head(2));
    assert!(one.equal(&again) && !one.equal(&other));
    assert_eq!(one.size(), [4, 32]);
    let std = one.std(false).double_value(&[]);
    assert!((0.6..1.4).contains(&(std / config.initializer_range)), "{std}");
}

#[test]
fn batches_that_cannot_be_meant_are_refused() {
    let config = ModelConfig::read(&folder("bert")).unwrap();
    let on = Device::Cpu;
    let batch = |types: &[i64], targets| TokenBatch::for_classes(&config, &[5, 6, 7], types, &[3], targets, on);
    assert!(batch(&[0, 0, 1], ClassTargets::Ids(&[2])).is_ok());
    for (types, targets, word) in [
        (&[0i64, 0, 2][..], ClassTargets::Unknown, "token type"),
        (&[0, 0], ClassTargets::Unknown, "token types"),
        (&[], ClassTargets::Ids(&[3]), "label"),
        (&[], ClassTargets::Ids(&[1, 2]), "targets"),
        (&[], ClassTargets::Values(&[1.0, 0.0, 0.0]), "targets"),
    ] {
        let message = batch(types, targets).unwrap_err().to_string();
        assert!(message.contains(word), "{word}: {message}");
    }
    let language = ModelConfig::read(&fixtures().join("llama")).unwrap();
    let wrong = TokenBatch::for_classes(&language, &[5], &[], &[1], ClassTargets::Unknown, on);
    assert!(wrong.unwrap_err().to_string().contains("SEQ_CLS"));
}

#[test]
fn checkpoints_in_older_forms_load_as_they_are() {
    let from = lora_format::Checkpoint::open(&folder("bert")).unwrap();
    let write = |rename: &dyn Fn(&str) -> Option<String>, more: &str| {
        let dir = tempfile::tempdir().unwrap();
        let mut tensors: Vec<(String, Tensor)> =
            from.names().filter_map(|n| Some((rename(n)?, from.read(n).unwrap()))).collect();
        tensors.push((more.to_string(), Tensor::zeros([1, 64], (Kind::Int64, Device::Cpu))));
        let (file, none) = (dir.path().join("model.safetensors"), std::collections::BTreeMap::new());
        lora_format::write_tensors(&file, &tensors, &none).unwrap();
        std::fs::copy(folder("bert").join("config.json"), dir.path().join("config.json")).unwrap();
        dir
    };
    let model = load(&folder("bert"));
    let (batch, reference) = texts(&model, "bert");

    // Norms as TensorFlow names them, and what is left of pretraining.
    let old = |n: &str| n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
    let dir = write(&|n| Some(old(n)), "cls.seq_relationship.weight");
    check(&load(dir.path()), &batch, &reference, "old norms");

    // Saved without a head, and so without the name of the family: the head alone is missing.
    let bare = |n: &str| n.strip_prefix("bert.").map(str::to_string);
    let dir = write(&bare, "embeddings.position_ids");
    let config = ModelConfig::read(dir.path()).unwrap();
    let absent: Vec<String> = absent_head(dir.path(), &config).unwrap().into_iter().map(|m| m.path).collect();
    assert_eq!(absent, ["classifier"]);
    let message = Decoder::load(dir.path(), Kind::Float, Device::Cpu, &mut |_, _| {}).unwrap_err().to_string();
    assert!(message.contains("classifier"), "{message}");
    let found = Decoder::load_as(dir.path(), config, 1, KEEPING, &mut |_, _| {}).unwrap();
    let hidden = |m: &Decoder| no_grad(|| m.hidden(&batch, Mode::Eval, None)).unwrap();
    assert!(hidden(&found).equal(&hidden(&model)));
}

/// Rows of a classifier's token table are trained, and nothing else of the table is.
#[test]
fn rows_of_a_classifiers_table_are_trained() {
    for name in ["bert", "roberta_multi", "llama", "qwen2_tied"] {
        let mut model = load(&folder(name));
        let (batch, _) = texts(&model, name);
        let before = no_grad(|| model.class_logits(&batch, Mode::Eval)).unwrap();
        let used = batch.input_ids.int64_value(&[0]);
        let config = AdapterConfig {
            r: 4,
            lora_alpha: 8.0,
            target_modules: Some(TargetModules::List(vec![])),
            trainable_token_indices: Some(lora_format::TokenIndices::Embedding(vec![used])),
            task_type: Some("SEQ_CLS".into()),
            ..AdapterConfig::default()
        };
        model.inject(&plan_injection(&model.config, &config).unwrap(), 0).unwrap();
        let same = no_grad(|| model.class_logits(&batch, Mode::Eval)).unwrap();
        assert_eq!(distance(&same, &before), 0.0, "{name}: the rows begin as the base's");
        let _ = model.loss_and_backward(&batch, 0, 1.0, false).unwrap();
        let rows: Vec<_> = model.parameters().into_iter().filter(|p| p.name.contains("trainable_tokens")).collect();
        assert_eq!(rows.len(), 1, "{name}: a classifier has one table");
        assert!(rows[0].tensor.grad().abs().max().double_value(&[]) > 0.0, "{name}: no gradient reaches the row");
    }
}
