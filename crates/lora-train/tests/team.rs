//! Several processes that train together: here each is a thread with a membership of its own.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

mod several;

use lora_train::{Error, NoEvents, RunPlan, StepOutcome, Team, TrainOptions, Trainer, train};
use proptest::prelude::*;
use several::{ROWS, plan, stopped_by_rank_1, together, write_rows};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use tch::{Kind, Tensor};

/// Of two sums of the same fp32 gradients in another order, relative to their norm.
const SAME_GRADIENTS: f64 = 1e-6;
/// Of losses in fp32, and of what AdamW makes of such gradients in some steps.
const SAME_LOSSES: f64 = 1e-5;
/// The reach that the fixtures' README names for losses and norms of some steps in fp32.
const TRAINING_TOLERANCE: f64 = 1e-4;

/// What a step came to.
#[derive(Debug)]
struct Seen {
    loss: f64,
    tokens: [u64; 2],
    gradients: Vec<f32>,
    digest: String,
}

fn steps(plan: RunPlan, team: Team) -> Vec<Seen> {
    let mut trainer = Trainer::in_team(plan, team, &mut NoEvents).unwrap();
    let mut step = || {
        let StepOutcome::Updated(record) = trainer.step().unwrap() else { panic!("a step was left out") };
        Seen {
            loss: record.loss,
            tokens: [record.tokens, record.trained_tokens],
            gradients: Vec::try_from(trainer.params().gradients()).unwrap(),
            digest: trainer.params().digest().unwrap(),
        }
    };
    (0..6).map(|_| step()).collect()
}

#[track_caller]
fn same_as_alone(dir: &Path, world: u32, more: &[&str]) {
    let alone = steps(plan(dir, more), Team::default());
    let ranks = together(world, |team| steps(plan(dir, more), team));
    for (at, alone) in alone.iter().enumerate() {
        let lead = &ranks[0][at];
        for rank in &ranks {
            assert_eq!((&rank[at].digest, rank[at].loss), (&lead.digest, lead.loss), "the same bits everywhere");
            assert_eq!(rank[at].gradients, lead.gradients);
        }
        assert_eq!(lead.tokens, alone.tokens, "the same rows, step {at}");
        let off = (lead.loss - alone.loss).abs() / alone.loss.abs().max(1.0);
        assert!(off <= SAME_LOSSES, "step {at} of {world}: {} and not {}", lead.loss, alone.loss);
    }
    let wide = |seen: &Seen| Tensor::from_slice(&seen.gradients).to_kind(Kind::Double);
    let (found, wanted) = (wide(&ranks[0][0]), wide(&alone[0]));
    let off = (&found - &wanted).norm().double_value(&[]) / wanted.norm().double_value(&[]);
    assert!(off <= SAME_GRADIENTS, "{world}: {off}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4, ..ProptestConfig::default() })]

    #[test]
    fn any_number_of_processes_takes_the_same_steps(
        // Ragged rows, and epochs whose last step has fewer micro-batches than there are processes.
        lengths in prop::collection::vec((1usize..12, 1usize..9), 9..20),
        world in 2u32..5,
    ) {
        let dir = tempfile::tempdir().unwrap();
        write_rows(dir.path(), &lengths);
        same_as_alone(dir.path(), world, &[]);
    }
}

#[test]
fn preferences_budgets_and_packed_rows_are_shared_as_well() {
    let dir = tempfile::tempdir().unwrap();
    write_rows(
        dir.path(),
        &[(3, 2), (9, 1), (1, 7), (4, 4), (2, 2), (8, 8), (5, 1), (1, 1), (6, 3), (2, 5), (7, 7), (3, 3)],
    );
    same_as_alone(dir.path(), 2, &["data.packing=true", "data.max_length=48", "train.per_device_train_batch_size=1"]);
    same_as_alone(dir.path(), 2, &["lora.peft_type=ADALORA", "lora.tinit=1", "lora.tfinal=2"]);
    let pair = |i: usize| {
        let (good, bad) = (["yes", "the weight is a"][i % 2], ["the a the", "is"][i % 2]);
        format!("{{\"prompt\": \"is it {i}: \", \"chosen\": \"{good}\", \"rejected\": \"{bad}\"}}\n")
    };
    std::fs::write(dir.path().join("train.jsonl"), (0..11).map(pair).collect::<String>()).unwrap();
    same_as_alone(dir.path(), 2, &["objective.name=dpo"]);
}

/// `tests/reference/make_ddp.py`: the same rows in the same steps, shared by two processes of PyTorch's DDP.
#[test]
fn two_processes_follow_peft_in_two_processes() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    let text = std::fs::read_to_string(fixtures.join("distributed/reference.json")).unwrap();
    let wanted: serde_json::Value = serde_json::from_str(&text).unwrap();
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(fixtures.join("distributed/rows.jsonl"), dir.path().join("train.jsonl")).unwrap();
    let adapter = format!("lora.init_adapter={}", fixtures.join("llama/adapters/all_linear").display());
    let more = [
        adapter.as_str(),
        "data.shuffle=false",
        "train.max_steps=9",
        "train.per_device_train_batch_size=1",
        "train.learning_rate=1e-2",
        "train.lr_scheduler_type=constant",
        "train.weight_decay=0.1",
        "train.max_grad_norm=1.0",
    ];
    for records in together(2, |team| {
        let mut trainer = Trainer::in_team(plan(dir.path(), &more), team, &mut NoEvents).unwrap();
        let mut step = || match trainer.step().unwrap() {
            StepOutcome::Updated(record) => [record.loss, record.grad_norm],
            skipped => panic!("{skipped:?}"),
        };
        (0..9).map(|_| step()).collect::<Vec<_>>()
    }) {
        for (at, [loss, norm]) in records.into_iter().enumerate() {
            let of = |name: &str| wanted[name][at].as_f64().unwrap();
            assert!(
                (loss - of("loss")).abs() <= TRAINING_TOLERANCE * of("loss"),
                "step {at}: {loss} and not {}",
                of("loss")
            );
            let reach = 10.0 * TRAINING_TOLERANCE * of("grad_norm");
            assert!((norm - of("grad_norm")).abs() <= reach, "step {at}: {norm} and not {}", of("grad_norm"));
        }
    }
}

#[test]
fn a_step_that_cannot_be_shared_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    write_rows(dir.path(), &[(2, 2); 8]);
    // The usual step of one micro-batch, which two could share as two of half the rows.
    let usual = ["train.gradient_accumulation_steps=1", "train.per_device_train_batch_size=8"];
    for error in together(2, |team| Trainer::in_team(plan(dir.path(), &usual), team, &mut NoEvents).unwrap_err()) {
        let text = error.to_string();
        assert!(text.contains("as 2 with per_device_train_batch_size = 4, which keeps the 8 rows of a step"), "{text}");
    }
    for error in together(3, |team| {
        Trainer::in_team(plan(dir.path(), &["train.gradient_accumulation_steps=2"]), team, &mut NoEvents).unwrap_err()
    }) {
        assert!(
            matches!(error, Error::TooFewMicroBatches { rows: 2, micro_batches: 2, world: 3 }) && error.is_usage(),
            "{error}"
        );
        assert!(error.to_string().contains("a multiple of 3, or start fewer"), "{error}");
    }
}

#[test]
fn a_rank_of_another_run_is_named_by_all() {
    let dir = tempfile::tempdir().unwrap();
    write_rows(dir.path(), &[(2, 2); 8]);
    for error in together(2, |team| {
        let seed = format!("seed={}", team.rank());
        let options = TrainOptions { team, ..TrainOptions::default() };
        train(plan(dir.path(), &[&seed]), &options, &AtomicBool::new(false), &mut NoEvents).unwrap_err()
    }) {
        assert!(matches!(error, Error::RanksDiffer { rank: 1, .. }) && error.is_usage(), "{error}");
        assert!(error.to_string().contains("seed was 0 and is 1"), "{error}");
    }
    assert!(!dir.path().join("run").exists(), "nothing was begun");
}

#[test]
fn a_rank_whose_parameters_went_astray_is_named_by_all() {
    let dir = tempfile::tempdir().unwrap();
    write_rows(dir.path(), &[(2, 2); 8]);
    for error in together(2, |team| {
        let astray = team.rank() == 1;
        let mut trainer =
            Trainer::in_team(plan(dir.path(), &["train.ddp_check_steps=2"]), team, &mut NoEvents).unwrap();
        if astray {
            let _one = trainer.params().state().unwrap()[0].1.f_add_scalar_(1e-3).unwrap();
        }
        trainer.step().unwrap();
        trainer.step().unwrap_err()
    }) {
        assert!(matches!(error, Error::RanksApart { rank: 1, step: 2 }), "{error}");
    }
}

#[test]
fn what_one_fails_at_the_others_hear() {
    let failures = together(3, |team| {
        assert_eq!(team.agree(Ok(team.rank())).unwrap(), team.rank());
        let path = PathBuf::from("here");
        let own = if team.rank() == 1 { Err(Error::NothingToResume { path }) } else { Ok(()) };
        let error = team.agree(own).unwrap_err();
        // And they can go on to something else.
        team.agree(Ok(())).unwrap();
        error
    });
    assert!(matches!(failures[1], Error::NothingToResume { .. }));
    for other in [&failures[0], &failures[2]] {
        assert!(
            matches!(other, Error::Peer { rank: 1, .. }) && other.to_string().contains("output_dir here"),
            "{other}"
        );
    }
}

#[test]
fn a_request_of_any_rank_ends_all_at_one_step_and_another_number_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    write_rows(dir.path(), &ROWS);
    let folder = |name: &str| format!("output_dir={}", dir.path().join(name).display());
    let whole = {
        let plan = plan(dir.path(), &["train.max_steps=12", &folder("whole")]);
        train(plan, &TrainOptions::default(), &AtomicBool::new(false), &mut NoEvents).unwrap().0
    };
    stopped_by_rank_1(dir.path(), &["train.max_steps=12"]);

    // Four go on, which need the numbers of rank 0 and not its disk; then one.
    let until = |last: &str, team: Team| {
        let max = format!("train.max_steps={last}");
        let changed = vec!["train.max_steps".to_string()];
        let options = TrainOptions { resume: true, changed, team };
        train(plan(dir.path(), &[&max]), &options, &AtomicBool::new(false), &mut NoEvents).unwrap().0
    };
    let four = together(4, |team| until("9", team));
    assert!(four.iter().all(|report| report.steps == 9 && report.tokens == four[0].tokens), "{four:?}");
    let last = until("12", Team::default());
    assert_eq!((last.steps, last.tokens, last.trained_tokens), (12, whole.tokens, whole.trained_tokens));
}
