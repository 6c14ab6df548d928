//! The trainer against PEFT: its own way of a step (flat buffers, accumulation, clipping, AdamW) on the fixtures' batch.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use lora_format::TensorFile;
use lora_train::{NoEvents, Override, RunConfig, RunPlan, StepOutcome, Trainer};
use std::path::{Path, PathBuf};

/// The reach that the fixtures' README names for ten-step losses and norms in fp32.
const TRAINING_TOLERANCE: f64 = 1e-4;

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

fn plan(family: &str, adapter: &str, dir: &Path, more: &[(&str, &str)]) -> RunPlan {
    let base = fixtures().join(family);
    write_rows(&TensorFile::open(&base.join("reference.safetensors")).unwrap(), &dir.join("rows.jsonl"));
    let mut set = vec![
        format!("output_dir={}", dir.join("run").display()),
        format!("model.path={}", base.display()),
        "model.device=cpu".into(),
        format!("lora.init_adapter={}", base.join("adapters").join(adapter).display()),
        format!("data.train={}", dir.join("rows.jsonl").display()),
        "data.max_length=64".into(),
        "train.max_steps=10".into(),
        "train.learning_rate=1e-2".into(),
        "train.lr_scheduler_type=constant".into(),
        "train.weight_decay=0.1".into(),
        "train.max_grad_norm=1.0".into(),
        "train.per_device_train_batch_size=2".into(),
    ];
    set.extend(more.iter().map(|(k, v)| format!("{k}={v}")));
    let overrides: Vec<Override> = set.iter().map(|s| s.parse().unwrap()).collect();
    RunPlan::resolve(RunConfig::load(None, &overrides).unwrap(), &mut NoEvents).unwrap()
}

fn run(plan: RunPlan) -> (Vec<(f64, f64)>, Trainer) {
    let mut trainer = Trainer::new(plan, &mut NoEvents).unwrap();
    let steps = (0..trainer.plan().total_steps).map(|_| match trainer.step().unwrap() {
        StepOutcome::Updated(r) => (r.loss, r.grad_norm),
        skipped => panic!("{skipped:?}"),
    });
    (steps.collect(), trainer)
}

#[test]
fn ten_steps_of_the_trainer_follow_peft_and_the_split_into_micro_batches_does_not_matter() {
    // Two micro-batches of one example each, of different lengths, are one batch of both.
    let ways: [&[(&str, &str)]; 6] = [
        &[],
        &[("train.per_device_train_batch_size", "1"), ("train.gradient_accumulation_steps", "2")],
        &[("train.gradient_checkpointing", "true")],
        &[("train.recompute_layers", "1"), ("train.gradient_checkpointing", "selective")],
        &[
            ("train.per_device_train_batch_size", "1"),
            ("train.gradient_accumulation_steps", "2"),
            ("train.gradient_checkpointing", "full"),
            ("train.accumulate_by_block", "true"),
        ],
        &[("data.packing", "true")],
    ];
    for (family, adapter) in [
        ("llama", "all_linear"),
        ("llama", "embedding"),
        ("llama", "head_saved"),
        ("qwen3", "lora"),
        ("mistral", "lora"),
    ] {
        let reference =
            TensorFile::open(&fixtures().join(family).join("adapters").join(adapter).join("reference.safetensors"))
                .unwrap();
        let losses = Vec::<f64>::try_from(&reference.read("train.loss").unwrap()).unwrap();
        let norms = Vec::<f64>::try_from(&reference.read("train.grad_norm").unwrap()).unwrap();
        for more in ways {
            let dir = tempfile::tempdir().unwrap();
            let (steps, _) = run(plan(family, adapter, dir.path(), more));
            for (i, ((loss, norm), (wanted, wanted_norm))) in steps.iter().zip(losses.iter().zip(&norms)).enumerate() {
                let name = format!("{family}/{adapter} {more:?} step {i}");
                assert!((loss - wanted).abs() < TRAINING_TOLERANCE * wanted, "{name}: loss {loss} against {wanted}");
                let reach = 10.0 * TRAINING_TOLERANCE * wanted_norm;
                assert!((norm - wanted_norm).abs() < reach, "{name}: norm {norm} against {wanted_norm}");
            }
        }
    }
}

#[test]
fn a_resumed_run_has_the_bits_of_the_uninterrupted_one() {
    let more = [
        ("lora.lora_dropout", "0.1"),
        ("train.per_device_train_batch_size", "1"),
        ("train.gradient_accumulation_steps", "1"),
        ("train.lr_scheduler_type", "cosine"),
    ];
    let (whole_dir, parts_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (whole_steps, whole) = run(plan("llama", "all_linear", whole_dir.path(), &more));
    for stop_after in [1, 4, 9] {
        let _ = std::fs::remove_dir_all(parts_dir.path().join("run"));
        std::fs::create_dir_all(parts_dir.path().join("run")).unwrap();
        let mut first = Trainer::new(plan("llama", "all_linear", parts_dir.path(), &more), &mut NoEvents).unwrap();
        for _ in 0..stop_after {
            let _ = first.step().unwrap();
        }
        first.save().unwrap();
        let mut second = Trainer::new(plan("llama", "all_linear", parts_dir.path(), &more), &mut NoEvents).unwrap();
        second.resume(&[], &mut NoEvents).unwrap();
        assert_eq!(second.state().step, stop_after);
        for (step, (loss, norm)) in whole_steps.iter().enumerate().skip(stop_after as usize) {
            match second.step().unwrap() {
                StepOutcome::Updated(r) => assert_eq!((r.loss, r.grad_norm), (*loss, *norm), "step {step}"),
                skipped => panic!("{skipped:?}"),
            }
        }
        for ((name, a), (_, b)) in whole.params().state().unwrap().iter().zip(second.params().state().unwrap()) {
            assert!(a.equal(&b), "{name} after a stop at step {stop_after}");
        }
    }
}

#[test]
fn lora_plus_follows_peft() {
    let dir = tempfile::tempdir().unwrap();
    let more =
        [("train.learning_rate", "2e-3"), ("train.loraplus_lr_ratio", "4"), ("train.loraplus_lr_embedding", "5e-4")];
    let file = fixtures().join("llama/adapters/embedding/loraplus.safetensors");
    let reference = TensorFile::open(&file).unwrap();
    let losses = Vec::<f64>::try_from(&reference.read("train.loss").unwrap()).unwrap();
    let (steps, _) = run(plan("llama", "embedding", dir.path(), &more));
    for (i, ((loss, _), wanted)) in steps.iter().zip(&losses).enumerate() {
        assert!((loss - wanted).abs() < TRAINING_TOLERANCE * wanted, "step {i}: loss {loss} against {wanted}");
    }
    let (plain, _) = run(plan("llama", "embedding", tempfile::tempdir().unwrap().path(), &more[..1]));
    assert!((plain[9].0 - losses[9]).abs() > 100.0 * TRAINING_TOLERANCE, "the rates must be visible");
}
