//! AdaLoRA's training against PEFT's, step by step: losses, norms, importance, budgets, what is pruned and what is saved;
//! a resumed run against the uninterrupted one; VeRA's ten steps by the trainer.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use lora_format::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, TensorFile};
use lora_train::{NoEvents, Override, RunConfig, RunPlan, StepOutcome, Trainer};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::Tensor;

/// The reach that the fixtures' README names for ten-step losses and norms in fp32.
const TRAINING_TOLERANCE: f64 = 1e-4;
/// A score is a product of two smoothed sensitivities, each off by a gradient's 1e-4; relative to the largest.
const SCORE_TOLERANCE: f64 = 1e-3;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

/// The batch of the fixtures as a `tokenized` dataset.
fn write_rows(reference: &TensorFile, path: &Path) {
    let read = |name: &str| Vec::<Vec<i64>>::try_from(&reference.read(name).unwrap()).unwrap();
    let (ids, mask, labels) = (read("input_ids"), read("attention_mask"), read("labels"));
    let mut text = String::new();
    for i in 0..ids.len() {
        let n = mask[i].iter().sum::<i64>() as usize;
        text += &format!("{{\"input_ids\": {:?}, \"labels\": {:?}}}\n", &ids[i][..n], &labels[i][..n]);
    }
    std::fs::write(path, text).unwrap();
}

fn plan(family: &str, adapter: Option<&str>, dir: &Path, more: &[&str]) -> lora_train::Result<RunPlan> {
    let base = fixtures().join(family);
    write_rows(&TensorFile::open(&base.join("reference.safetensors")).unwrap(), &dir.join("rows.jsonl"));
    let mut set = vec![
        format!("output_dir={}", dir.join("run").display()),
        format!("model.path={}", base.display()),
        "model.device=cpu".into(),
        format!("data.train={}", dir.join("rows.jsonl").display()),
        "data.max_length=64".into(),
        "train.max_steps=10".into(),
        "train.learning_rate=1e-2".into(),
        "train.lr_scheduler_type=constant".into(),
        "train.weight_decay=0.1".into(),
        "train.max_grad_norm=1.0".into(),
        "train.per_device_train_batch_size=2".into(),
    ];
    if let Some(adapter) = adapter {
        set.push(format!("lora.init_adapter={}", base.join("adapters").join(adapter).display()));
    }
    set.extend(more.iter().map(|s| s.to_string()));
    let overrides: Vec<Override> = set.iter().map(|s| s.parse().unwrap()).collect();
    RunPlan::resolve(RunConfig::load(None, &overrides)?, &mut NoEvents)
}

fn step(trainer: &mut Trainer) -> lora_train::StepRecord {
    match trainer.step().unwrap() {
        StepOutcome::Updated(record) => record,
        skipped => panic!("{skipped:?}"),
    }
}

fn relative(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    if b.numel() == 0 {
        return 0.0;
    }
    (a - b).abs().max().double_value(&[]) / b.abs().max().double_value(&[]).max(f64::MIN_POSITIVE)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn ten_steps_follow_peft_in_losses_scores_budgets_and_triplets() {
    for family in ["llama", "gpt2"] {
        for more in [
            &[][..],
            &["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=2"],
            &["train.gradient_checkpointing=true"],
        ] {
            let adapter = fixtures().join(family).join("adapters/adalora");
            let reference = TensorFile::open(&adapter.join("reference.safetensors")).unwrap();
            let allocation = TensorFile::open(&adapter.join("allocation.safetensors")).unwrap();
            let numbers = |name: &str| Vec::<f64>::try_from(&reference.read(name).unwrap()).unwrap();
            let (losses, norms) = (numbers("train.loss"), numbers("train.grad_norm"));
            let dir = tempfile::tempdir().unwrap();
            let mut trainer =
                Trainer::new(plan(family, Some("adalora"), dir.path(), more).unwrap(), &mut NoEvents).unwrap();
            let (mut scores_seen, mut patterns_seen) = (0, 0);
            for i in 0..10 {
                // Of the last allocation, PEFT's scores are those before it: it clears them.
                let scores_before = copies(&trainer);
                let record = step(&mut trainer);
                let name = format!("{family} {more:?} step {i}");
                let (loss, norm) = (losses[i], norms[i]);
                assert!(
                    (record.loss - loss).abs() < TRAINING_TOLERANCE * loss,
                    "{name}: loss {} and {loss}",
                    record.loss
                );
                let reach = 10.0 * TRAINING_TOLERANCE * norm;
                assert!((record.grad_norm - norm).abs() < reach, "{name}: norm {} and {norm}", record.grad_norm);
                let budget = allocation.read(&format!("step{i}.budget")).unwrap().int64_value(&[0]);
                assert_eq!(record.rank_budget, Some(budget as u64), "{name}");

                let allocator = trainer.rank_allocator().unwrap();
                let pattern = allocator.rank_pattern().unwrap();
                for (module, kept) in pattern.iter().flatten() {
                    let wanted = allocation.read(&format!("step{i}.rank_pattern.{module}.lora_E")).unwrap();
                    assert_eq!(kept, &Vec::<bool>::try_from(&wanted).unwrap(), "{name} {module}");
                    patterns_seen += 1;
                }
                assert_eq!(pattern.is_none(), i < 3, "{name}");
                let scores = if i == 7 { scores_before } else { copies(&trainer) };
                for key in allocation.names().filter(|n| n.starts_with(&format!("step{i}.exp_avg_"))) {
                    let ours = &scores[key.split_once('.').unwrap().1];
                    let d = relative(ours, &allocation.read(key).unwrap());
                    assert!(d < SCORE_TOLERANCE, "{name}: {key} differs by {d}");
                    scores_seen += 1;
                }
            }
            let modules = if family == "llama" { 4 } else { 2 };
            assert_eq!((scores_seen, patterns_seen), (3 * 2 * 3 * modules, 7 * modules));

            // What is saved is what PEFT saved: the same triplets, and the configuration but for the base's name.
            let out = dir.path().join("saved");
            trainer.write_result(&out).unwrap();
            let theirs = adapter.join("after_training");
            let [a, b] = [&out, &theirs].map(|d| TensorFile::open(&d.join(ADAPTER_WEIGHTS)).unwrap());
            assert!(a.names().eq(b.names()));
            for name in b.names() {
                let d = relative(&a.read(name).unwrap(), &b.read(name).unwrap());
                assert!(d < 30.0 * TRAINING_TOLERANCE, "{family}: {name} differs by {d}");
            }
            let [mut ours, mut peft] = [&out, &theirs].map(|d| json(&d.join(ADAPTER_CONFIG)));
            for config in [&mut ours, &mut peft] {
                config["base_model_name_or_path"] = Value::Null;
            }
            assert_eq!(ours, peft);
        }
    }
}

/// The scores by name.
fn copies(trainer: &Trainer) -> BTreeMap<String, Tensor> {
    trainer.rank_allocator().unwrap().state().unwrap().into_iter().map(|(n, t)| (n, t.copy())).collect()
}

#[test]
fn ten_steps_of_vera_follow_peft() {
    for (family, variant) in [("llama", "vera"), ("llama", "vera_key"), ("gpt2", "vera")] {
        let adapter = fixtures().join(family).join("adapters").join(variant);
        let reference = TensorFile::open(&adapter.join("reference.safetensors")).unwrap();
        let losses = Vec::<f64>::try_from(&reference.read("train.loss").unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut trainer = Trainer::new(plan(family, Some(variant), dir.path(), &[]).unwrap(), &mut NoEvents).unwrap();
        for (i, wanted) in losses.iter().enumerate() {
            let loss = step(&mut trainer).loss;
            assert!((loss - wanted).abs() < TRAINING_TOLERANCE * wanted, "{family}/{variant} {i}: {loss} and {wanted}");
        }
        let out = dir.path().join("saved");
        trainer.write_result(&out).unwrap();
        let theirs = TensorFile::open(&adapter.join("after_training").join(ADAPTER_WEIGHTS)).unwrap();
        let ours = TensorFile::open(&out.join(ADAPTER_WEIGHTS)).unwrap();
        assert!(ours.names().eq(theirs.names()), "{family}/{variant}");
        assert_eq!(ours.contains("base_model.vera_A"), variant == "vera");
        for name in theirs.names() {
            let d = relative(&ours.read(name).unwrap(), &theirs.read(name).unwrap());
            assert!(d < 30.0 * TRAINING_TOLERANCE, "{family}/{variant}: {name} differs by {d}");
        }
    }
}

#[test]
fn a_resumed_run_has_the_bits_of_the_uninterrupted_one() {
    let adalora = [
        "lora.peft_type=ADALORA",
        "lora.target_modules=[\"q_proj\", \"v_proj\"]",
        "lora.init_r=6",
        "lora.target_r=3",
        "lora.tinit=2",
        "lora.tfinal=3",
        "lora.deltaT=2",
        "lora.lora_dropout=0.1",
        "train.per_device_train_batch_size=1",
    ];
    let vera = ["lora.peft_type=VERA", "lora.r=16", "lora.vera_dropout=0.1", "train.per_device_train_batch_size=1"];
    for (more, stops) in [(&adalora[..], &[1, 4, 5, 8, 9][..]), (&vera, &[4])] {
        let whole_dir = tempfile::tempdir().unwrap();
        let mut whole = Trainer::new(plan("llama", None, whole_dir.path(), more).unwrap(), &mut NoEvents).unwrap();
        let records: Vec<_> = (0..10).map(|_| step(&mut whole)).collect();
        whole.write_result(&whole_dir.path().join("saved")).unwrap();
        for &stop in stops {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir_all(dir.path().join("run")).unwrap();
            let new = || Trainer::new(plan("llama", None, dir.path(), more).unwrap(), &mut NoEvents).unwrap();
            let mut first = new();
            for _ in 0..stop {
                let _ = step(&mut first);
            }
            first.save().unwrap();
            let mut second = new();
            second.resume(&[], &mut NoEvents).unwrap();
            for wanted in &records[stop..] {
                let r = step(&mut second);
                assert_eq!(
                    (r.loss, r.grad_norm, r.rank_budget),
                    (wanted.loss, wanted.grad_norm, wanted.rank_budget),
                    "stopped after {stop}, step {}",
                    r.step
                );
            }
            second.write_result(&dir.path().join("saved")).unwrap();
            for file in [ADAPTER_WEIGHTS, ADAPTER_CONFIG] {
                let read = |d: &Path| std::fs::read(d.join("saved").join(file)).unwrap();
                assert!(read(dir.path()) == read(whole_dir.path()), "{file} after a stop at step {stop}");
            }
        }
    }
}

#[test]
fn a_pruned_adapter_goes_on_with_its_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let plan = plan("llama", Some("adalora_pruned"), dir.path(), &["train.max_steps=3"]).unwrap();
    let mut trainer = Trainer::new(plan, &mut NoEvents).unwrap();
    assert!(trainer.rank_allocator().is_none());
    let records: Vec<_> = (0..3).map(|_| step(&mut trainer)).collect();
    assert!(records[2].loss < records[0].loss && records[0].rank_budget.is_none());
    let out = dir.path().join("saved");
    trainer.write_result(&out).unwrap();
    let pattern = |d: &Path| json(&d.join(ADAPTER_CONFIG))["rank_pattern"].clone();
    assert_eq!(pattern(&out), pattern(&fixtures().join("llama/adapters/adalora_pruned")));
}

#[test]
fn settings_that_cannot_be_are_refused_before_anything_is_loaded() {
    let cases: [(&[&str], &str); 12] = [
        (&["lora.init_r=4"], "only AdaLoRA has this key"),
        (&["lora.peft_type=ADALORA", "lora.vera_dropout=0.1"], "only VeRA has this key"),
        (&["lora.peft_type=VERA", "lora.lora_dropout=0.1"], "vera_dropout"),
        (&["lora.peft_type=ADALORA", "lora.r=4"], "init_r"),
        (&["lora.peft_type=ADALORA", "lora.init_r=4", "lora.target_r=4"], "nothing would be pruned"),
        (&["lora.peft_type=ADALORA", "lora.tinit=8", "lora.tfinal=2"], "no step to prune in"),
        (&["lora.peft_type=ADALORA", "lora.use_dora=true"], "cannot be combined"),
        (&["lora.peft_type=VERA", "lora.bias=all"], "trains no biases"),
        (&["lora.peft_type=VERA", "lora.init_lora_weights=pissa"], "init_lora_weights"),
        (&["lora.peft_type=VERA", "lora.target_modules=[\"embed_tokens\", \"q_proj\"]"], "is an embedding"),
        (&["lora.peft_type=ADALORA", "lora.init_r=64"], "init_r"),
        (&["lora.peft_type=IA3"], "\"VERA\""),
    ];
    for (more, wanted) in cases {
        let dir = tempfile::tempdir().unwrap();
        let text = plan("llama", None, dir.path(), more).expect_err(wanted).to_string();
        assert!(text.contains(wanted), "{more:?}: {text}");
    }
    let dir = tempfile::tempdir().unwrap();
    let vera = plan("llama", None, dir.path(), &["lora.peft_type=VERA"]).unwrap();
    assert_eq!((vera.config.lora.r, vera.adapter_config().unwrap().r), (256, 256), "PEFT's default rank");
}
