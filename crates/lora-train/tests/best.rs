//! The best evaluation: its adapter is the result, and a run that gets no better ends, killed and resumed or not.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use lora_train::{EndedBy, Event, NoEvents, Override, RunConfig, RunPlan, RunReport, TrainOptions, Trainer, train};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

fn base() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama")
}

/// What is trained says the opposite of what is held out, so that after a while every step makes the evaluation worse.
fn plan(dir: &Path, more: &[&str]) -> RunPlan {
    let row = |i: usize, word: &str| format!("{{\"prompt\": \"Is it {i}?\", \"completion\": \" {word}\"}}\n");
    std::fs::write(dir.join("train.jsonl"), (0..16).map(|i| row(i, "yes it is")).collect::<String>()).unwrap();
    std::fs::write(dir.join("eval.jsonl"), (0..4).map(|i| row(i, "yes never")).collect::<String>()).unwrap();
    let mut set = vec![
        format!("output_dir={}", dir.join("run").display()),
        format!("model.path={}", base().display()),
        "model.device=cpu".into(),
        format!("data.train={}", dir.join("train.jsonl").display()),
        format!("data.eval={}", dir.join("eval.jsonl").display()),
        "train.max_steps=60".into(),
        "train.learning_rate=2e-2".into(),
        "train.eval_steps=2".into(),
        "train.save_steps=5".into(),
        "train.load_best_model_at_end=true".into(),
        "train.early_stopping_patience=3".into(),
    ];
    set.extend(more.iter().map(|s| (*s).to_string()));
    let overrides: Vec<Override> = set.iter().map(|s| s.parse().unwrap()).collect();
    RunPlan::resolve(RunConfig::load(None, &overrides).unwrap(), &mut NoEvents).unwrap()
}

/// Runs until an evaluation at `stop_at`, or to the end; the losses of all evaluations.
fn run(plan: RunPlan, resume: bool, stop_at: Option<u64>) -> (RunReport, Vec<f64>) {
    let (stop, mut losses) = (AtomicBool::new(false), Vec::new());
    let mut sink = |event: Event| match event {
        Event::Evaluated(record) => losses.push(record.eval_loss),
        Event::Step(record) if Some(record.step) == stop_at => stop.store(true, Ordering::Relaxed),
        _ => {}
    };
    let options = TrainOptions { resume, ..TrainOptions::default() };
    let (report, _) = train(plan, &options, &stop, &mut sink).unwrap();
    (report, losses)
}

fn adapter(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("adapter_model.safetensors")).unwrap()
}

#[test]
fn the_best_adapter_is_the_result_and_a_run_that_gets_no_better_ends() {
    let dir = tempfile::tempdir().unwrap();
    let (report, losses) = run(plan(dir.path(), &[]), false, None);
    let (best, lowest) = losses.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1)).unwrap();
    assert_eq!(report.status, "finished");
    assert!(report.steps < report.total_steps && best > 0, "{losses:?}");
    assert_eq!(losses.len() - 1 - best, 3, "three evaluations were not better: {losses:?}");
    let result = dir.path().join("run");
    assert_eq!(adapter(&result), adapter(&result.join("best")));
    // Loaded again, it is the one of that evaluation.
    let more =
        [format!("lora.init_adapter={}", result.display()), format!("output_dir={}/again", dir.path().display())];
    let again = plan(dir.path(), &more.iter().map(String::as_str).collect::<Vec<_>>());
    let found = Trainer::new(again, &mut NoEvents).unwrap().evaluate(&mut NoEvents).unwrap().unwrap().loss;
    assert_eq!(found, *lowest);

    // Stopped on the way down and again while it waits for a better one, it comes to the same.
    let parts = tempfile::tempdir().unwrap();
    run(plan(parts.path(), &[]), false, Some(best as u64));
    run(plan(parts.path(), &[]), true, Some(report.steps - 1));
    let (resumed, _) = run(plan(parts.path(), &[]), true, None);
    assert_eq!((resumed.status, resumed.steps), (report.status, report.steps));
    assert!(adapter(&result) == adapter(&parts.path().join("run")), "the adapters differ");
    // It is over, and stays so.
    assert_eq!(run(plan(parts.path(), &[]), true, None).0.steps, report.steps);
}

#[test]
fn a_threshold_and_another_figure_decide_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    let (report, losses) = run(plan(dir.path(), &["train.early_stopping_threshold=1000"]), false, None);
    assert_eq!((report.steps, losses.len()), (6, 4), "nothing is better by so much");
    let other = tempfile::tempdir().unwrap();
    // What a configuration cannot ask for, a program can.
    let mut without = plan(other.path(), &[]);
    without.config.train.metric_for_best_model = lora_train::config::BestMetric::MacroF1;
    let error = train(without, &TrainOptions::default(), &AtomicBool::new(false), &mut NoEvents);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("eval_macro_f1") && error.contains("eval_loss"), "{error}");
}

/// The last line of the metrics.
fn last_line(dir: &Path) -> serde_json::Value {
    let text = std::fs::read_to_string(dir.join("run/metrics.jsonl")).unwrap();
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

#[test]
fn a_run_whose_time_is_over_leaves_an_adapter_and_goes_on_to_the_same_bits() {
    let more =
        ["train.early_stopping_patience=100", "train.max_steps=12", "train.eval_steps=5", "lora.lora_dropout=0.1"];
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (report, losses) = run(plan(whole.path(), &more), false, None);
    assert_eq!((report.status, report.ended_by, losses.len()), ("finished", EndedBy::Steps, 4));
    assert_eq!(last_line(whole.path())["ended_by"], "steps");

    let briefly = |resume, text: &str| {
        let mut brief = plan(parts.path(), &more);
        brief.config.train.max_time = Some(text.into());
        let (mut evaluations, mut notes) = (0, Vec::new());
        let mut sink = |event: Event| match event {
            Event::Evaluated(_) => evaluations += 1,
            Event::Note(note) => notes.push(note),
            // The third step takes longer than a second.
            Event::Step(record) if record.step == 3 => std::thread::sleep(std::time::Duration::from_millis(1100)),
            _ => {}
        };
        let changed = vec!["train.max_time".to_string()];
        let options = TrainOptions { resume, changed, ..TrainOptions::default() };
        let (report, _) = train(brief, &options, &AtomicBool::new(false), &mut sink).unwrap();
        (report, evaluations, notes.join("\n"))
    };
    let (report, evaluations, notes) = briefly(false, "1s");
    assert_eq!((report.status, report.ended_by), ("stopped", EndedBy::MaxTime));
    assert!((1..=3).contains(&report.steps), "{}", report.steps);
    assert_eq!(evaluations, 2, "before the first step, and at the end: {notes}");
    assert!(notes.contains("train.max_time = \"1s\" is over"), "{notes}");
    assert_eq!(last_line(parts.path())["ended_by"], "max_time");
    assert!(parts.path().join("run/adapter_model.safetensors").is_file());
    assert!(parts.path().join(format!("run/checkpoints/step-{}", report.steps)).is_dir());

    let (report, _, _) = briefly(true, "1h");
    assert_eq!((report.status, report.ended_by, report.steps), ("finished", EndedBy::Steps, 12));
    assert!(adapter(&whole.path().join("run")) == adapter(&parts.path().join("run")), "the adapters differ");
    let state = |dir: &Path| std::fs::read(dir.join("run/checkpoints/step-12/trainer_state.safetensors")).unwrap();
    assert!(state(whole.path()) == state(parts.path()), "the moments differ");
}
