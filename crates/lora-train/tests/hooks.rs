//! The library as a program uses it: hooks of the step, of evaluations and of checkpoints, an objective of its own, and several
//! trainers at once.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use lora_train::objective::{Answer, Judgement, Objective};
use lora_train::{
    EndedBy, EvalRecord, Event, EventSink, NoEvents, Override, RunConfig, RunPlan, StepOutcome, StepRecord,
    TrainOptions, Trainer, train, train_with,
};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

fn plan(dir: &Path, more: &[&str]) -> RunPlan {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama");
    let row = |i: usize| format!("{{\"prompt\": \"Is it {i}?\", \"completion\": \" yes it is\"}}\n");
    std::fs::write(dir.join("train.jsonl"), (0..16).map(row).collect::<String>()).unwrap();
    let mut set = vec![
        format!("output_dir={}", dir.join("run").display()),
        format!("model.path={}", base.display()),
        "model.device=cpu".into(),
        format!("data.train={}", dir.join("train.jsonl").display()),
        "data.eval_split=4".into(),
        "lora.lora_dropout=0.1".into(),
        "train.max_steps=40".into(),
        "train.learning_rate=2e-2".into(),
        "train.per_device_train_batch_size=4".into(),
        "train.eval_steps=2".into(),
        "train.save_steps=5".into(),
        "train.sample_count=0".into(),
    ];
    set.extend(more.iter().map(|s| (*s).to_string()));
    let overrides: Vec<Override> = set.iter().map(|s| s.parse().unwrap()).collect();
    RunPlan::resolve(RunConfig::load(None, &overrides).unwrap(), &mut NoEvents).unwrap()
}

// ANCHOR: hooks
/// Ends the run as soon as the held-out loss is low enough, and keeps what was saved on the way.
#[derive(Default)]
struct UntilGoodEnough {
    loss: f64,
    steps: u64,
    saved: Vec<PathBuf>,
}

impl EventSink for UntilGoodEnough {
    fn step(&mut self, trainer: &Trainer, record: &StepRecord) -> ControlFlow<()> {
        assert_eq!(trainer.state().step, record.step);
        self.steps += 1;
        ControlFlow::Continue(())
    }

    fn evaluation(&mut self, _: &Trainer, record: &EvalRecord) -> ControlFlow<()> {
        if record.eval_loss < self.loss { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn checkpoint(&mut self, _: &Trainer, dir: &Path) -> ControlFlow<()> {
        self.saved.push(dir.to_path_buf());
        ControlFlow::Continue(())
    }
}

#[test]
fn a_hook_ends_the_run_when_it_has_seen_enough() {
    let dir = tempfile::tempdir().unwrap();
    let mut hooks = UntilGoodEnough { loss: 2.0, ..Default::default() };
    let stop = AtomicBool::new(false);
    let (report, trainer) = train(plan(dir.path(), &[]), &TrainOptions::default(), &stop, &mut hooks).unwrap();
    assert_eq!(report.ended_by, EndedBy::Hook);
    assert!(report.eval_after.unwrap().loss < 2.0 && report.steps < report.total_steps);
    assert_eq!((report.steps, trainer.state().step), (hooks.steps, hooks.steps));
    assert!(report.output_dir.join("adapter_model.safetensors").is_file() && hooks.saved.last().unwrap().is_dir());
}
// ANCHOR_END: hooks

#[test]
fn a_run_that_a_hook_ended_goes_on_and_is_the_uninterrupted_one() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (go, more) = (AtomicBool::new(false), ["train.max_steps=12"]);
    train(plan(whole.path(), &more), &TrainOptions::default(), &go, &mut NoEvents).unwrap();
    struct At(u64);
    impl EventSink for At {
        fn step(&mut self, _: &Trainer, record: &StepRecord) -> ControlFlow<()> {
            if record.step == self.0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
    }
    let (first, _) = train(plan(parts.path(), &more), &TrainOptions::default(), &go, &mut At(7)).unwrap();
    assert_eq!((first.status, first.ended_by, first.steps), ("stopped", EndedBy::Hook, 7));
    let resume = TrainOptions { resume: true, ..TrainOptions::default() };
    let (last, _) = train(plan(parts.path(), &more), &resume, &go, &mut NoEvents).unwrap();
    assert_eq!((last.status, last.steps), ("finished", 12));
    let adapter = |dir: &Path| std::fs::read(dir.join("run/adapter_model.safetensors")).unwrap();
    assert!(adapter(whole.path()) == adapter(parts.path()), "the adapters differ");
}

#[test]
fn what_no_hook_takes_comes_as_events_in_the_order_of_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let mut told = Vec::new();
    let mut sink = |event: Event| match event {
        Event::Step(record) => told.push(format!("step {}", record.step)),
        Event::Evaluated(record) => told.push(format!("evaluated {}", record.step)),
        Event::Saved(dir) => told.push(format!("saved {}", dir.file_name().unwrap().to_string_lossy())),
        _ => {}
    };
    let more = ["train.max_steps=3", "train.save_steps=2"];
    train(plan(dir.path(), &more), &TrainOptions::default(), &AtomicBool::new(false), &mut sink).unwrap();
    let wanted =
        ["evaluated 0", "step 1", "step 2", "evaluated 2", "saved step-2", "step 3", "evaluated 3", "saved step-3"];
    assert_eq!(told, wanted);
}

#[test]
fn the_loop_takes_an_objective_of_the_callers_own() {
    /// Says no to every answer: the likelihood falls.
    #[derive(Debug)]
    struct Unlearn;
    impl Objective for Unlearn {
        fn judge(&self, answers: &[Answer<'_>], _drift: f64) -> Judgement {
            let loss = answers.iter().map(Answer::logp).sum::<f64>();
            Judgement { loss, slopes: answers.iter().map(|a| a.slopes(1.0)).collect(), rewards: vec![] }
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let stop = AtomicBool::new(false);
    let plan = plan(dir.path(), &["train.max_steps=6"]);
    let (report, _) = train_with(plan, Box::new(Unlearn), &TrainOptions::default(), &stop, &mut NoEvents).unwrap();
    let (before, after) = (report.eval_before.unwrap().loss, report.eval_after.unwrap().loss);
    assert!(after < before && report.status == "finished", "{before} -> {after}");
    assert!(report.output_dir.join("adapter_model.safetensors").is_file());
}

#[test]
fn trainers_of_one_process_do_not_disturb_each_other() {
    let losses = |trainer: &mut Trainer| match trainer.step().unwrap() {
        StepOutcome::Updated(record) => record.loss.to_bits(),
        skipped => panic!("{skipped:?}"),
    };
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let more: [&[&str]; 2] = [&["seed=1"], &["seed=2", "lora.r=4", "train.optim=lion"]];
    let new = |i: usize| Trainer::new(plan(dirs[i].path(), more[i]), &mut NoEvents).unwrap();
    let alone = [0, 1].map(|i| {
        let mut trainer = new(i);
        (0..6).map(|_| losses(&mut trainer)).collect::<Vec<_>>()
    });
    let mut both = [new(0), new(1)];
    let mut turns = [Vec::new(), Vec::new()];
    for _ in 0..6 {
        for (trainer, seen) in both.iter_mut().zip(&mut turns) {
            seen.push(losses(trainer));
        }
    }
    assert!(turns == alone && alone[0] != alone[1], "{turns:?} and {alone:?}");
}
