//! Runs whose model answers prompts itself and is rewarded: the reward rises, a resumed run is the uninterrupted one, and the
//! reference is what was asked for.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use lora_train::{
    Completion, NoEvents, Override, RewardFault, RunConfig, RunPlan, StepOutcome, StepRecord, TrainOptions, Trainer,
    train,
};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Log-probabilities in fp32 of a few dozen tokens, over other batches.
const KL_TOLERANCE: f64 = 1e-6;

/// What a model that differs has at least, in nats for a token.
const SOME_KL: f64 = 1e-3;
/// Of 120 answers of 12 tokens the share of vowels is sure to about 0.01, so this is more than chance between two of them.
const RISE: f64 = 0.03;

fn base() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama")
}

fn plan_of(dir: &Path, more: &[&str]) -> lora_train::Result<RunPlan> {
    let rows: String = (0..12)
        .map(|i| format!("{{\"prompt\": \"Is it {i}?\", \"completion\": \" It is the {i} of all, or not the {i}\"}}\n"))
        .collect();
    std::fs::write(dir.join("rows.jsonl"), rows).unwrap();
    let mut set = vec![
        format!("output_dir={}", dir.join("run").display()),
        format!("model.path={}", base().display()),
        "model.device=cpu".into(),
        format!("data.train={}", dir.join("rows.jsonl").display()),
        "data.max_length=64".into(),
        "data.eval_split=4".into(),
        "objective.name=grpo".into(),
        "objective.reward=rouge_l".into(),
        "objective.num_generations=6".into(),
        "objective.max_completion_length=12".into(),
        "lora.r=4".into(),
        "train.learning_rate=2e-2".into(),
        "train.lr_scheduler_type=constant".into(),
        "train.per_device_train_batch_size=2".into(),
        "train.gradient_accumulation_steps=2".into(),
        "train.save_steps=1".into(),
        "train.sample_count=0".into(),
    ];
    if !more.iter().any(|set| set.starts_with("train.num_train_epochs")) {
        set.push("train.max_steps=6".into());
    }
    set.extend(more.iter().map(|s| (*s).to_string()));
    let overrides: Vec<Override> = set.iter().map(|s| s.parse().unwrap()).collect();
    RunPlan::resolve(RunConfig::load(None, &overrides)?, &mut NoEvents)
}

fn plan(dir: &Path, more: &[&str]) -> RunPlan {
    plan_of(dir, more).unwrap()
}

fn step(trainer: &mut Trainer) -> StepRecord {
    match trainer.step().unwrap() {
        StepOutcome::Updated(record) => record,
        skipped => panic!("{skipped:?}"),
    }
}

// ANCHOR: own
/// The share of an answer that is vowels.
fn vowels(answers: &[Completion<'_>]) -> Vec<f64> {
    let share = |text: &str| {
        let vowels = text.chars().filter(|c| "aeiou".contains(*c)).count();
        vowels as f64 / text.chars().count().max(1) as f64
    };
    answers.iter().map(|answer| share(answer.completion)).collect()
}
// ANCHOR_END: own

#[test]
fn what_is_rewarded_becomes_more_likely() {
    for more in [&[][..], &["objective.beta=0.01", "objective.num_iterations=2", "objective.temperature=0.9"]] {
        let dir = tempfile::tempdir().unwrap();
        let mut trainer = Trainer::with_reward(plan(dir.path(), more), Box::new(vowels), &mut NoEvents).unwrap();
        let reward = |trainer: &mut Trainer| {
            let report = trainer.evaluate(&mut NoEvents).unwrap().unwrap();
            let reward = report.rewards.and_then(|rewards| rewards.mean).unwrap();
            assert_eq!(report.loss, -reward);
            reward
        };
        let before = reward(&mut trainer);
        let records: Vec<StepRecord> = (0..60).map(|_| step(&mut trainer)).collect();
        let after = reward(&mut trainer);
        assert!(after > before + RISE, "{before} -> {after}");
        let sampled = |range: std::ops::Range<usize>| {
            records[range].iter().map(|r| r.rewards.and_then(|rewards| rewards.mean).unwrap()).sum::<f64>() / 5.0
        };
        let (first, last) = (sampled(0..5), sampled(55..60));
        assert!(last > first + RISE, "{first} -> {last}");
        // Every token that the model wrote is trained, and no other.
        let first = &records[0];
        let length = first.rewards.and_then(|rewards| rewards.length).unwrap();
        assert_eq!(first.trained_tokens as f64, length * 24.0, "two batches of two prompts with six answers");
        let first = first.rewards.unwrap();
        let last = records[29].rewards.unwrap();
        if more.is_empty() {
            assert_eq!((first.kl, first.clipped), (None, None));
            continue;
        }
        // A fresh adapter begins as the base; the second step on the same answers is off the model that wrote them.
        assert!(first.kl.unwrap().abs() < KL_TOLERANCE && last.kl.unwrap() > SOME_KL, "{first:?} {last:?}");
        let same = |i: usize| records[i].rewards.and_then(|rewards| rewards.mean);
        assert!(same(0) == same(1) && same(1) != same(2));
    }
}

/// The adapter, and the metrics without what depends on the clock.
fn outcome(dir: &Path) -> (Vec<u8>, Vec<String>) {
    let metrics = std::fs::read_to_string(dir.join("run/metrics.jsonl")).unwrap();
    let timeless = |line: &str| {
        let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
        for key in ["seconds", "data_seconds", "tokens_per_second", "peak_memory_bytes"] {
            line.as_object_mut().unwrap().remove(key);
        }
        line.to_string()
    };
    let adapter = std::fs::read(dir.join("run/adapter_model.safetensors")).unwrap();
    (adapter, metrics.lines().map(timeless).collect())
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one_bit_for_bit() {
    let more = ["objective.beta=0.05", "objective.num_iterations=3", "lora.lora_dropout=0.1", "train.eval_steps=2"];
    let whole = tempfile::tempdir().unwrap();
    train(plan(whole.path(), &more), &TrainOptions::default(), &AtomicBool::new(false), &mut NoEvents).unwrap();
    let parts = tempfile::tempdir().unwrap();
    // Every step is a start of its own, so that most begin amid the steps that learn from the same answers.
    for part in 0..7 {
        let stop = AtomicBool::new(false);
        let options = TrainOptions { resume: part > 0, ..TrainOptions::default() };
        let mut end = |event: lora_train::Event| {
            if matches!(event, lora_train::Event::Step(_)) {
                stop.store(true, Ordering::Relaxed);
            }
        };
        train(plan(parts.path(), &more), &options, &stop, &mut end).unwrap();
    }
    let ((adapter, lines), (other_adapter, other_lines)) = (outcome(whole.path()), outcome(parts.path()));
    assert_eq!(lines, other_lines);
    assert!(adapter == other_adapter);
}

#[test]
fn an_epoch_answers_every_prompt_once_however_many_steps_learn_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let epoch = ["train.num_train_epochs=1", "objective.num_iterations=3"];
    let plan = plan(dir.path(), &epoch);
    // Eight prompts, four of them in a step.
    assert_eq!(plan.total_steps, 6);
    let mut trainer = Trainer::with_reward(plan, Box::new(vowels), &mut NoEvents).unwrap();
    let epochs: Vec<f64> = (0..6).map(|_| step(&mut trainer).epoch).collect();
    assert_eq!(epochs, [0.0, 0.0, 0.5, 0.5, 0.5, 1.0]);
}

#[test]
fn the_reference_is_the_base_or_the_start_as_was_asked() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = format!("lora.init_adapter={}", base().join("adapters/lora").display());
    let kl = |reference: &str| {
        let reference = format!("objective.reference={reference}");
        let plan = plan(dir.path(), &[&adapter, &reference, "objective.beta=0.1"]);
        step(&mut Trainer::new(plan, &mut NoEvents).unwrap()).rewards.and_then(|rewards| rewards.kl).unwrap()
    };
    assert!(kl("start").abs() < KL_TOLERANCE && kl("base") > SOME_KL);
    // An adapter with magnitudes of its own cannot be switched off by its pairs alone.
    let dora = format!("lora.init_adapter={}", base().join("adapters/dora").display());
    let error = plan_of(dir.path(), &[&dora, "objective.beta=0.1"]).unwrap_err();
    assert!(error.is_usage() && error.to_string().contains("objective.reference"), "{error}");
    plan(dir.path(), &[&dora]);
}

#[derive(Debug)]
struct Broken(Result<Vec<f64>, &'static str>);

impl lora_train::Reward for Broken {
    fn score(&mut self, _: &[Completion<'_>]) -> Result<Vec<f64>, RewardFault> {
        self.0.clone().map_err(RewardFault::from)
    }
}

#[test]
fn a_reward_that_fails_ends_the_run_with_its_words() {
    let dir = tempfile::tempdir().unwrap();
    for (reward, words) in [
        (Broken(Err("the judge is out")), "the judge is out"),
        (Broken(Ok(vec![1.0])), "1 rewards for 24 answers"),
        (Broken(Ok(vec![f64::NAN; 24])), "a reward of NaN"),
    ] {
        let mut trainer = Trainer::with_reward(plan(dir.path(), &[]), Box::new(reward), &mut NoEvents).unwrap();
        let error = trainer.step().unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn what_cannot_be_answered_is_refused_before_anything_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let says = |more: &[&str], words: &str| {
        let error = plan_of(dir.path(), more).unwrap_err();
        assert!(error.is_usage() && error.to_string().contains(words), "{error}");
    };
    std::fs::write(dir.path().join("text.txt"), "only text, and no prompt\n").unwrap();
    let text = format!("data.train={}", dir.path().join("text.txt").display());
    says(&[&text, "data.eval_split=0"], "no prompt before its answer");
    says(&["objective.reward=command"], "objective.reward_command");
    says(&["objective.reward_command=[\"x\"]"], "objective.reward_command");
    says(&["objective.top_p=0"], "objective.top_p");
    says(&["data.packing=true"], "data.packing");
    says(&["train.predict_with_generate=true"], "train.predict_with_generate");
    says(&["objective.name=dpo"], "only grpo has this key");
    says(&["objective.num_generations=1"], "objective.num_generations");
}
