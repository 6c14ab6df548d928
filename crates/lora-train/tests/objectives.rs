//! Runs whose objective compares answers: on text data, through the trainer, killed and resumed, and with an objective of
//! the caller's own.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use lora_train::objective::{Answer, Judgement, Objective};
use lora_train::{NoEvents, Override, RunConfig, RunPlan, StepOutcome, StepRecord, TrainOptions, Trainer, train};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// fp32 sums in another order.
const LOSS_TOLERANCE: f64 = 1e-5;

fn base() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama")
}

/// Good answers end in `yes`, bad ones in `no`.
fn write_data(dir: &Path) {
    let (mut pairs, mut rated, mut texts) = (String::new(), String::new(), String::new());
    for i in 0..12 {
        let prompt = format!("Is it {i}?");
        pairs += &format!("{{\"prompt\": \"{prompt}\", \"chosen\": \" It is {i}, yes\", \"rejected\": \" no\"}}\n");
        let (answer, label) = if i % 2 == 0 { (" yes, it is", true) } else { (" no, never", false) };
        rated += &format!("{{\"prompt\": \"{prompt}\", \"completion\": \"{answer}\", \"label\": {label}}}\n");
        texts += &format!("{{\"prompt\": \"{prompt}\", \"completion\": \" yes\"}}\n");
    }
    for (name, text) in [("pairs.jsonl", pairs), ("rated.jsonl", rated), ("texts.jsonl", texts)] {
        std::fs::write(dir.join(name), text).unwrap();
    }
}

fn plan(dir: &Path, data: &str, more: &[&str]) -> RunPlan {
    let mut set = vec![
        format!("output_dir={}", dir.join("run").display()),
        format!("model.path={}", base().display()),
        "model.device=cpu".into(),
        format!("data.train={}", dir.join(data).display()),
        "data.max_length=64".into(),
        "data.eval_split=3".into(),
        "lora.r=4".into(),
        "train.max_steps=9".into(),
        "train.learning_rate=1e-2".into(),
        "train.lr_scheduler_type=constant".into(),
        "train.per_device_train_batch_size=2".into(),
        "train.gradient_accumulation_steps=2".into(),
        "train.save_steps=2".into(),
    ];
    set.extend(more.iter().map(|s| (*s).to_string()));
    let overrides: Vec<Override> = set.iter().map(|s| s.parse().unwrap()).collect();
    RunPlan::resolve(RunConfig::load(None, &overrides).unwrap(), &mut NoEvents).unwrap()
}

fn step(trainer: &mut Trainer) -> StepRecord {
    match trainer.step().unwrap() {
        StepOutcome::Updated(record) => record,
        skipped => panic!("{skipped:?}"),
    }
}

fn steps(mut trainer: Trainer) -> (Vec<StepRecord>, Trainer) {
    ((0..trainer.plan().total_steps).map(|_| step(&mut trainer)).collect(), trainer)
}

#[test]
fn every_objective_widens_the_margin_on_data_it_has_not_seen() {
    let dir = tempfile::tempdir().unwrap();
    write_data(dir.path());
    for (data, more) in [
        ("pairs.jsonl", &["objective.name=dpo"][..]),
        ("pairs.jsonl", &["objective.name=dpo", "objective.loss_type=ipo", "objective.beta=0.5"]),
        ("pairs.jsonl", &["objective.name=dpo", "objective.loss_type=hinge", "objective.rpo_alpha=0.2"]),
        ("pairs.jsonl", &["objective.name=orpo"]),
        ("pairs.jsonl", &["objective.name=simpo"]),
        ("rated.jsonl", &["objective.name=kto"]),
        ("rated.jsonl", &["objective.name=kto", "objective.loss_type=apo_zero", "objective.desirable_weight=1.5"]),
        ("pairs.jsonl", &["objective.name=reward", "lora.task_type=SEQ_CLS", "lora.modules_to_save=[\"score\"]"]),
    ] {
        let _ = std::fs::remove_dir_all(dir.path().join("run"));
        let mut trainer = Trainer::new(plan(dir.path(), data, more), &mut NoEvents).unwrap();
        let before = trainer.evaluate(&mut NoEvents).unwrap().unwrap();
        let (records, mut trainer) = steps(trainer);
        let after = trainer.evaluate(&mut NoEvents).unwrap().unwrap();
        let margin = |e: &lora_train::EvalReport| e.rewards.unwrap().margin.unwrap();
        assert!(after.loss < before.loss, "{more:?}: loss {} -> {}", before.loss, after.loss);
        assert!(margin(&after) > margin(&before), "{more:?}: margin {} -> {}", margin(&before), margin(&after));
        assert_eq!(after.examples, 3, "{more:?}");
        let last = records.last().unwrap().rewards.unwrap();
        let (paired, drifts) = (data == "pairs.jsonl", more == ["objective.name=kto"]);
        assert_eq!((last.accuracy.is_some(), last.drift.is_some()), (paired, drifts), "{more:?}: {last:?}");
    }
}

#[test]
fn fresh_adapters_begin_at_the_reference_and_splitting_a_step_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    write_data(dir.path());
    let mut first = Vec::new();
    for more in [
        &["objective.name=dpo"][..],
        &["objective.name=dpo", "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=1"],
        &["objective.name=dpo", "train.gradient_checkpointing=true"],
    ] {
        let _ = std::fs::remove_dir_all(dir.path().join("run"));
        let (records, _) = steps(Trainer::new(plan(dir.path(), "pairs.jsonl", more), &mut NoEvents).unwrap());
        assert!((records[0].loss - 2f64.ln()).abs() < LOSS_TOLERANCE, "{more:?}: {}", records[0].loss);
        first.push(records[4].loss);
    }
    assert!(first.iter().all(|loss| (loss - first[0]).abs() < 10.0 * LOSS_TOLERANCE), "{first:?}");
}

#[test]
fn the_reference_is_the_base_or_the_start_as_was_asked() {
    let dir = tempfile::tempdir().unwrap();
    write_data(dir.path());
    let adapter = format!("lora.init_adapter={}", base().join("adapters/lora").display());
    let loss = |reference: &str| {
        let _ = std::fs::remove_dir_all(dir.path().join("run"));
        let more = ["objective.name=dpo", &adapter, reference];
        step(&mut Trainer::new(plan(dir.path(), "pairs.jsonl", &more), &mut NoEvents).unwrap()).loss
    };
    assert!((loss("objective.reference=start") - 2f64.ln()).abs() < LOSS_TOLERANCE);
    assert!((loss("objective.reference=base") - 2f64.ln()).abs() > 100.0 * LOSS_TOLERANCE);
}

/// The files of a finished run that hold what was learnt.
fn outcome(dir: &Path) -> (Vec<u8>, Vec<String>) {
    let text = std::fs::read_to_string(dir.join("run/metrics.jsonl")).unwrap();
    let timeless = |line: &str| {
        let mut line: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).unwrap();
        ["seconds", "data_seconds", "tokens_per_second", "peak_memory_bytes"]
            .iter()
            .for_each(|key| drop(line.remove(*key)));
        serde_json::Value::Object(line).to_string()
    };
    (std::fs::read(dir.join("run/adapter_model.safetensors")).unwrap(), text.lines().map(timeless).collect())
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one_bit_for_bit() {
    for (data, name) in [("pairs.jsonl", "objective.name=dpo"), ("rated.jsonl", "objective.name=kto")] {
        let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        // Other tests of this process draw at the same time, which must not matter.
        let more = [name, "lora.lora_dropout=0.1", "train.eval_steps=3"];
        for dir in [whole.path(), parts.path()] {
            write_data(dir);
        }
        let go = AtomicBool::new(false);
        train(plan(whole.path(), data, &more), &TrainOptions::default(), &go, &mut NoEvents).unwrap();

        // Stopped in the fifth step, in the middle of a pass; what the reference said is kept and not asked again.
        let stop = AtomicBool::new(false);
        let mut sink = |event: lora_train::Event| {
            if let lora_train::Event::Step(record) = event
                && record.step == 5
            {
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        };
        train(plan(parts.path(), data, &more), &TrainOptions::default(), &stop, &mut sink).unwrap();
        let mut asked = false;
        let mut sink = |event: lora_train::Event| asked |= matches!(event, lora_train::Event::Reference { .. });
        let resume = TrainOptions { resume: true, ..TrainOptions::default() };
        train(plan(parts.path(), data, &more), &resume, &go, &mut sink).unwrap();
        assert!(!asked, "{name}: the reference was asked again");
        let ((adapter, lines), (again, lines_again)) = (outcome(whole.path()), outcome(parts.path()));
        assert!(adapter == again, "{name}: the adapters differ");
        assert_eq!(lines, lines_again, "{name}");
        assert!(lines[2].contains("\"reward_chosen\"") && lines[0].contains("eval_reward_chosen"), "{lines:?}");
    }
}

// ANCHOR: own
/// Likelihood with a floor: tokens that are likelier than `floor` teach no more.
#[derive(Debug)]
struct Floored {
    floor: f64,
}

impl Objective for Floored {
    fn judge(&self, answers: &[Answer<'_>], _drift: f64) -> Judgement {
        let mut judged = Judgement::default();
        for answer in answers {
            let below = |logp: &f64| (self.floor - logp).max(0.0);
            judged.loss += answer.logps.iter().map(below).sum::<f64>();
            judged.slopes.push(answer.logps.iter().map(|logp| if below(logp) > 0.0 { -1.0 } else { 0.0 }).collect());
            judged.rewards.push(answer.mean_logp());
        }
        judged
    }
}

#[test]
fn an_objective_of_ones_own_is_trained() {
    let dir = tempfile::tempdir().unwrap();
    write_data(dir.path());
    let plan = plan(dir.path(), "texts.jsonl", &[]);
    let trainer = Trainer::with_objective(plan, Box::new(Floored { floor: -0.1 }), &mut NoEvents).unwrap();
    let (records, _) = steps(trainer);
    assert!(records[8].loss < records[0].loss, "{} -> {}", records[0].loss, records[8].loss);
}
// ANCHOR_END: own

#[test]
fn an_objective_that_counts_every_token_alike_is_plain_fine_tuning() {
    #[derive(Debug)]
    struct Likelihood;
    impl Objective for Likelihood {
        fn judge(&self, answers: &[Answer<'_>], _drift: f64) -> Judgement {
            let loss = -answers.iter().map(Answer::logp).sum::<f64>();
            Judgement { loss, slopes: answers.iter().map(|a| a.slopes(-1.0)).collect(), rewards: vec![] }
        }
    }
    let dir = tempfile::tempdir().unwrap();
    write_data(dir.path());
    // The mean over answers is that over tokens times the tokens of an answer, which clipping takes out again.
    let more = ["train.max_grad_norm=1e-3"];
    let (plain, _) = steps(Trainer::new(plan(dir.path(), "texts.jsonl", &more), &mut NoEvents).unwrap());
    let own = Trainer::with_objective(plan(dir.path(), "texts.jsonl", &more), Box::new(Likelihood), &mut NoEvents);
    let (own, _) = steps(own.unwrap());
    for (a, b) in plain.iter().zip(&own) {
        // Nine texts: steps of four, four and one.
        let texts = if a.step.is_multiple_of(3) { 1.0 } else { 4.0 };
        let of_texts = a.loss * a.trained_tokens as f64 / texts;
        assert!(
            (of_texts - b.loss).abs() < 10.0 * LOSS_TOLERANCE * b.loss,
            "step {}: {of_texts} and {}",
            a.step,
            b.loss
        );
    }
}
