//! Runs with noise on embeddings: another way than without, the same again, and evaluations as if there were none.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use lora_train::{NoEvents, Override, RunConfig, RunPlan, StepOutcome, Trainer};
use std::path::Path;

fn trainer(dir: &Path, more: &[&str]) -> Trainer {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama");
    let row = |i: usize| format!("{{\"prompt\": \"Is it {i}?\", \"completion\": \" yes it is {}\"}}\n", i % 3);
    std::fs::write(dir.join("train.jsonl"), (0..16).map(row).collect::<String>()).unwrap();
    let mut set = vec![
        format!("output_dir={}", dir.join("run").display()),
        format!("model.path={}", base.display()),
        "model.device=cpu".into(),
        format!("data.train={}", dir.join("train.jsonl").display()),
        "data.eval_split=4".into(),
        "train.max_steps=8".into(),
        "train.learning_rate=1e-2".into(),
        "train.per_device_train_batch_size=2".into(),
        "train.gradient_accumulation_steps=2".into(),
    ];
    set.extend(more.iter().map(|s| (*s).to_string()));
    let overrides: Vec<Override> = set.iter().map(|s| s.parse().unwrap()).collect();
    let plan = RunPlan::resolve(RunConfig::load(None, &overrides).unwrap(), &mut NoEvents).unwrap();
    Trainer::new(plan, &mut NoEvents).unwrap()
}

fn losses(trainer: &mut Trainer, steps: usize) -> Vec<f64> {
    let loss = |outcome| match outcome {
        StepOutcome::Updated(record) => record.loss,
        skipped => panic!("{skipped:?}"),
    };
    (0..steps).map(|_| loss(trainer.step().unwrap())).collect()
}

#[test]
fn noise_is_for_training_only_and_a_resumed_run_sees_the_same() {
    const NOISE: &str = "train.neftune_noise_alpha=5";
    let dir = tempfile::tempdir().unwrap();
    let (mut plain, mut noisy) = (trainer(dir.path(), &[]), trainer(dir.path(), &[NOISE]));
    let before = |t: &mut Trainer| t.evaluate(&mut NoEvents).unwrap().unwrap().loss;
    assert_eq!(before(&mut plain), before(&mut noisy), "evaluations see no noise");
    let (without, with) = (losses(&mut plain, 8), losses(&mut noisy, 8));
    assert!(without.iter().zip(&with).all(|(a, b)| a != b), "{without:?} {with:?}");
    assert!(with[7] < with[0], "{with:?}");

    let mut checkpointed = trainer(dir.path(), &[NOISE, "train.gradient_checkpointing=true"]);
    assert_eq!(losses(&mut checkpointed, 8), with);

    let mut first = trainer(dir.path(), &[NOISE]);
    losses(&mut first, 3);
    first.save().unwrap();
    let mut second = trainer(dir.path(), &[NOISE]);
    second.resume(&[], &mut NoEvents).unwrap();
    assert_eq!(losses(&mut second, 5), with[3..]);
    for ((name, a), (_, b)) in noisy.params().state().unwrap().iter().zip(second.params().state().unwrap()) {
        assert!(a.equal(&b), "{name}");
    }
}
