//! A model whose blocks are divided among processes, against the same run in one: here each process is a thread.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

mod several;

use lora_train::{Error, NoEvents, RunPlan, StepOutcome, StepRecord, Team, TrainOptions, Trainer, train};
use proptest::prelude::*;
use several::{ROWS, config, plan, stopped_by_rank_1, together, write_rows};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use tch::Tensor;

/// Of the sum of two squared norms against that of all at once, in fp32.
const SAME_NORM: f64 = 1e-6;
/// Of parameters after steps whose clipping differs by that.
const SAME_PARAMETERS: f64 = 1e-6;

const STAGES: &str = "train.pipeline_stages=2";

/// What the steps of a run came to, and the parameters and gradients after each of them by name.
type Seen = (Vec<StepRecord>, Vec<BTreeMap<String, Tensor>>);

fn steps(plan: RunPlan, team: Team) -> Seen {
    let mut trainer = Trainer::in_team(plan, team, &mut NoEvents).unwrap();
    let mut seen = Seen::default();
    for _ in 0..trainer.plan().total_steps {
        let StepOutcome::Updated(record) = trainer.step().unwrap() else { panic!("a step was left out") };
        seen.0.push(record);
        let copies = trainer.params().state().unwrap().into_iter().map(|(name, t)| (name, t.detach().copy()));
        let grads =
            trainer.model().parameters().into_iter().map(|p| (format!("grad.{}", p.name), p.tensor.grad().copy()));
        seen.1.push(copies.chain(grads).collect());
    }
    seen
}

/// So many stages against one process.
#[track_caller]
fn same_as_one(dir: &Path, number: u32, more: &[&str], clipped: bool) {
    let alone = steps(plan(dir, more), Team::default());
    let key = format!("train.pipeline_stages={number}");
    let staged = [more, &[&key]].concat();
    let stages = together(number, |team| steps(plan(dir, &staged), team));
    for (at, wanted) in alone.0.iter().enumerate() {
        for (records, _) in &stages {
            let found = &records[at];
            assert_eq!(found.loss, stages[0].0[at].loss, "every stage knows the loss");
            assert_eq!((found.tokens, found.trained_tokens), (wanted.tokens, wanted.trained_tokens));
            assert_eq!(found.learning_rate, wanted.learning_rate);
            let off = (found.loss - wanted.loss).abs() / wanted.loss.abs();
            assert!(if clipped { off <= SAME_NORM } else { off == 0.0 }, "step {at}: {} {}", found.loss, wanted.loss);
            let off = (found.grad_norm - wanted.grad_norm).abs() / wanted.grad_norm;
            assert!(off <= SAME_NORM, "step {at}: {} and not {}", found.grad_norm, wanted.grad_norm);
        }
        let mut all = stages.iter().flat_map(|(_, seen)| seen[at].keys()).collect::<Vec<_>>();
        all.sort();
        assert!(all.into_iter().eq(alone.1[at].keys()), "each parameter is of one stage");
        for (name, found) in stages.iter().flat_map(|(_, seen)| &seen[at]) {
            let wanted = &alone.1[at][name];
            match clipped {
                // Without clipping nothing is computed otherwise.
                false => assert!(found.equal(wanted), "step {at}: {name}"),
                true => {
                    let off = (found - wanted).abs().max().double_value(&[]);
                    let size = wanted.abs().max().double_value(&[]);
                    assert!(off <= SAME_PARAMETERS * size.max(f64::MIN_POSITIVE), "step {at}: {name}: {off} of {size}");
                }
            }
        }
    }
}

#[test]
fn two_stages_take_the_steps_of_one_process() {
    let dir = tempfile::tempdir().unwrap();
    write_rows(dir.path(), &ROWS);
    let dropout = "lora.lora_dropout=0.2";
    same_as_one(dir.path(), 2, &[dropout], false);
    same_as_one(dir.path(), 2, &[dropout, "train.gradient_checkpointing=true"], false);
    same_as_one(dir.path(), 2, &["data.packing=true", "data.max_length=48", "train.neftune_noise_alpha=5"], false);
    same_as_one(dir.path(), 2, &["model.quantization=nf4"], false);
    same_as_one(dir.path(), 2, &["train.gradient_accumulation_steps=1", "lora.use_dora=true"], false);
    same_as_one(dir.path(), 2, &[dropout, "train.max_grad_norm=0.05"], true);
}

#[test]
fn more_stages_have_some_in_the_middle() {
    let dir = tempfile::tempdir().unwrap();
    write_rows(dir.path(), &ROWS);
    // Four blocks, a tied table, and moments in 8 bits of the adapter of the table.
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/gemma3");
    let base = format!("model.path={}", base.display());
    let table = "lora.target_modules=[\"embed_tokens\", \"q_proj\", \"down_proj\"]";
    let more = [base.as_str(), "lora.lora_dropout=0.1", "lora.r=16", "train.optim=adamw_8bit", table];
    same_as_one(dir.path(), 3, &more, false);
    // Fewer micro-batches than stages, and ragged ends of epochs.
    same_as_one(dir.path(), 4, &[base.as_str(), "train.gradient_accumulation_steps=2"], false);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4, ..ProptestConfig::default() })]

    #[test]
    fn any_rows_in_any_micro_batches(
        lengths in prop::collection::vec((1usize..12, 1usize..9), 5..20),
        batch in 1usize..4,
        micro in 1usize..6,
    ) {
        let dir = tempfile::tempdir().unwrap();
        write_rows(dir.path(), &lengths);
        let batch = format!("train.per_device_train_batch_size={batch}");
        let micro = format!("train.gradient_accumulation_steps={micro}");
        same_as_one(dir.path(), 2, &[&batch, &micro, "lora.lora_dropout=0.1"], false);
    }
}

#[test]
fn bfloat16_between_stages_is_near_and_not_the_same() {
    let dir = tempfile::tempdir().unwrap();
    write_rows(dir.path(), &ROWS);
    let loss = |more: &[&str]| together(2, |team| steps(plan(dir.path(), more), team)).remove(0).0.remove(0).loss;
    let (exact, rounded) = (loss(&[STAGES]), loss(&[STAGES, "train.pipeline_dtype=bfloat16"]));
    assert_ne!(exact, rounded);
    // How near is derived in lora-model's tests/stages.rs; here the key must reach the wire and nothing more.
    let off = (exact - rounded).abs() / exact;
    const ROUNDING: f64 = 1.0 / 512.0;
    assert!(off < ROUNDING, "{exact} {rounded}");
}

/// A run of two stages, up to its result.
fn run_stages(dir: &Path, resume: bool, changed: &[&str], more: &[&str]) -> Vec<lora_train::RunReport> {
    let staged = [more, &[STAGES]].concat();
    together(2, |team| run(dir, resume, changed, &staged, team, &AtomicBool::new(false)))
}

fn run(
    dir: &Path,
    resume: bool,
    changed: &[&str],
    more: &[&str],
    team: Team,
    stop: &AtomicBool,
) -> lora_train::RunReport {
    let changed = changed.iter().map(|key| (*key).to_string()).collect();
    let options = TrainOptions { resume, changed, team };
    train(plan(dir, more), &options, stop, &mut NoEvents).unwrap().0
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entry = |entry: std::io::Result<std::fs::DirEntry>| {
        let path: PathBuf = entry.unwrap().path();
        path.is_file()
            .then(|| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap()))
    };
    std::fs::read_dir(dir).unwrap().filter_map(entry).collect()
}

#[test]
fn a_run_leaves_what_one_process_leaves_and_goes_on_in_any_way() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_rows(dir, &ROWS);
    let folder = |name: &str| format!("output_dir={}", dir.join(name).display());
    let more = |name: &str| {
        let keys = ["train.save_steps=3", "data.eval_split=2", "train.eval_steps=2", "lora.lora_dropout=0.1"];
        keys.iter().map(|s| (*s).to_string()).chain([folder(name)]).collect::<Vec<_>>()
    };
    let strs = |list: &[String]| -> Vec<&'static str> { list.iter().map(|s| &*s.clone().leak()).collect() };
    let alone = run(dir, false, &[], &strs(&more("alone")), Team::default(), &AtomicBool::new(false));
    let staged = run_stages(dir, false, &[], &strs(&more("staged")));
    for report in &staged {
        assert_eq!((report.steps, report.tokens, report.status), (alone.steps, alone.tokens, alone.status));
        assert_eq!(
            (report.trained_parameters, report.base_parameters),
            (alone.trained_parameters, alone.base_parameters)
        );
    }
    assert_eq!(staged[0].eval_before, alone.eval_before, "the loss of an evaluation has the same bits, too");
    assert_eq!(staged[0].eval_after, alone.eval_after);
    let adapter = |name: &str| {
        let mut all = files(&dir.join(name));
        (all.remove("adapter_model.safetensors").unwrap(), all.remove("adapter_config.json").unwrap())
    };
    assert_eq!(adapter("staged"), adapter("alone"), "one whole adapter, byte by byte");
    let state = |name: &str, step: u64| {
        files(&dir.join(name).join(format!("checkpoints/step-{step}"))).remove("trainer_state.safetensors").unwrap()
    };
    assert_eq!([3, 6].map(|step| state("staged", step)), [3, 6].map(|step| state("alone", step)));

    // On from the middle: in two stages from two, in one process from two, in two stages from one.
    let (stages, length) = (["train.max_steps"].as_slice(), ["train.max_steps=6"]);
    let until = |name: &str, steps: &str| {
        [
            more(name),
            vec![
                format!("train.max_steps={steps}"),
                "train.warmup_steps=0".into(),
                "train.lr_scheduler_type=constant".into(),
            ],
        ]
        .concat()
    };
    run_stages(dir, false, &[], &strs(&until("whole", "6")));
    for (name, first_staged, then_staged) in
        [("two-two", true, true), ("two-one", true, false), ("one-two", false, true)]
    {
        for (resume, steps, is_staged) in
            [(false, "3", first_staged), (true, length[0].rsplit('=').next().unwrap(), then_staged)]
        {
            let keys = strs(&until(name, steps));
            match is_staged {
                true => drop(run_stages(dir, resume, stages, &keys)),
                false => drop(run(dir, resume, stages, &keys, Team::default(), &AtomicBool::new(false))),
            }
        }
        assert_eq!(adapter(name), adapter("whole"), "{name}");
    }
}

#[test]
fn the_best_evaluation_and_a_request_of_any_stage_are_of_all() {
    let dir = tempfile::tempdir().unwrap();
    write_rows(dir.path(), &ROWS);
    let more = [
        "data.eval_split=3",
        "train.eval_steps=1",
        "train.load_best_model_at_end=true",
        "train.early_stopping_patience=2",
        // So that evaluations soon are worse.
        "train.learning_rate=0.5",
        "train.max_steps=30",
    ];
    let alone = run(dir.path(), false, &[], &more, Team::default(), &AtomicBool::new(false));
    let best = files(&dir.path().join("run/best"));
    std::fs::rename(dir.path().join("run"), dir.path().join("alone")).unwrap();
    let staged = run_stages(dir.path(), false, &[], &more);
    assert!(alone.steps < 30 && staged.iter().all(|report| report.steps == alone.steps), "{alone:?}");
    assert_eq!(files(&dir.path().join("run/best")), best);
    std::fs::rename(dir.path().join("run"), dir.path().join("staged")).unwrap();

    stopped_by_rank_1(dir.path(), &["train.max_steps=12", STAGES]);
}

#[test]
fn a_step_that_is_not_finite_is_left_out_by_all_stages() {
    let dir = tempfile::tempdir().unwrap();
    write_rows(dir.path(), &ROWS);
    for ruined in [0, 1] {
        let outcomes = together(2, |team| {
            let own = team.rank() == ruined;
            let mut trainer = Trainer::in_team(plan(dir.path(), &[STAGES]), team, &mut NoEvents).unwrap();
            trainer.step().unwrap();
            let before = trainer.params().digest().unwrap();
            let b = trainer.model().parameters().into_iter().find(|p| p.name.contains("lora_B")).unwrap().tensor;
            let kept = b.detach().copy();
            if own {
                let _ruined = tch::no_grad(|| b.shallow_clone().fill_(f64::NAN));
            }
            let outcome = trainer.step().unwrap();
            tch::no_grad(|| b.shallow_clone().copy_(&kept));
            (outcome, trainer.params().digest().unwrap() == before, trainer.state().skipped_steps)
        });
        for (outcome, same, skipped) in outcomes {
            assert!(matches!(outcome, StepOutcome::Skipped { step: 2, .. }) && same && skipped == 1, "{outcome:?}");
        }
    }
}

#[test]
fn what_one_stage_fails_at_the_other_hears() {
    let dir = tempfile::tempdir().unwrap();
    write_rows(dir.path(), &ROWS);
    for failing in [0, 1] {
        let errors = together(2, |team| {
            let own = team.rank() == failing;
            let mut trainer = Trainer::in_team(plan(dir.path(), &[STAGES]), team, &mut NoEvents).unwrap();
            trainer.step().unwrap();
            let leaf = trainer.model().parameters().into_iter().next().unwrap().tensor;
            if own {
                // Another shape than its layer can compute with.
                tch::no_grad(|| {
                    leaf.shallow_clone().set_data(&Tensor::zeros([3, 1], (tch::Kind::Float, tch::Device::Cpu)))
                });
            }
            trainer.step().unwrap_err()
        });
        for (rank, error) in (0..).zip(errors) {
            match rank == failing {
                true => assert!(matches!(error, Error::Model(_) | Error::Torch(_)), "{error}"),
                false => assert!(matches!(error, Error::Peer { rank, .. } if rank == failing), "{error}"),
            }
        }
    }
}

#[test]
fn what_does_not_go_in_stages_is_refused_before_a_weight_is_read() {
    let dir = tempfile::tempdir().unwrap();
    write_rows(dir.path(), &ROWS);
    let refused = |more: &[&str]| {
        let keys = [more, &[STAGES]].concat();
        let error = config(dir.path(), &keys).and_then(|config| RunPlan::resolve(config, &mut NoEvents)).unwrap_err();
        assert!(error.is_usage(), "{error}");
        error.to_string()
    };
    for (more, named) in [
        (&["train.finetuning_type=full"][..], ["train.finetuning_type", "\"lora\""]),
        (&["objective.name=dpo"], ["objective.name", "\"sft\""]),
        (&["objective.name=grpo", "objective.reward=exact_match"], ["objective.name", "\"sft\""]),
        (&["lora.task_type=SEQ_CLS"], ["lora.task_type", "remove it"]),
        (&["lora.peft_type=VERA"], ["lora.peft_type", "\"LORA\""]),
        (&["lora.modules_to_save=[\"lm_head\"]"], ["lora.modules_to_save", "remove it"]),
        (&["lora.trainable_token_indices=[3]"], ["lora.trainable_token_indices", "remove it"]),
        (&["train.predict_with_generate=true", "data.eval_split=2"], ["train.predict_with_generate", "remove it"]),
        (&["train.sample_prompts=[\"a\"]"], ["train.sample_prompts", "remove it"]),
        (&["train.sample_count=2"], ["train.sample_count", "remove it"]),
        (&["lora.layers_to_transform=[1]"], ["rank 0 would hold blocks 0 to 0", "fewer stages"]),
    ] {
        let text = refused(more);
        assert!(text.contains("train.pipeline_stages = 2") && named.iter().all(|part| text.contains(part)), "{text}");
    }
    let many = config(dir.path(), &["train.pipeline_stages=3"])
        .and_then(|config| RunPlan::resolve(config, &mut NoEvents))
        .unwrap_err();
    assert!(matches!(many, Error::Stages { .. }) && many.to_string().contains("has 2 blocks"), "{many}");
    let idle = config(dir.path(), &["train.pipeline_dtype=bfloat16"]).unwrap_err().to_string();
    assert!(idle.contains("train.pipeline_dtype") && idle.contains("train.pipeline_stages = 1"), "{idle}");

    // As many processes as stages: neither one alone nor more.
    let text = Trainer::new(plan(dir.path(), &[STAGES]), &mut NoEvents).unwrap_err();
    assert!(matches!(text, Error::StagesAndRanks { stages: 2, world: 1 }) && text.is_usage(), "{text}");
    for error in together(3, |team| Trainer::in_team(plan(dir.path(), &[STAGES]), team, &mut NoEvents).unwrap_err()) {
        assert!(matches!(error, Error::StagesAndRanks { stages: 2, world: 3 }), "{error}");
        assert!(error.to_string().contains("lora launch -n 2"), "{error}");
    }
}
