//! An old set among a new one: what a pass has of each, for every kind of row.
#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use lora_train::{Event, NoEvents, Override, RunConfig, RunPlan, Trainer};
use std::path::Path;

fn config(dir: &Path, more: &[&str]) -> RunConfig {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama");
    for (name, count) in [("new", 18), ("old", 7)] {
        let (mut texts, mut pairs, mut rated) = (String::new(), String::new(), String::new());
        for i in 0..count {
            let prompt = format!("Is {name} {i}?");
            texts += &format!("{{\"prompt\": \"{prompt}\", \"completion\": \" yes{}\"}}\n", " it is".repeat(i % 4));
            pairs += &format!("{{\"prompt\": \"{prompt}\", \"chosen\": \" yes\", \"rejected\": \" no\"}}\n");
            rated += &format!("{{\"prompt\": \"{prompt}\", \"completion\": \" yes\", \"label\": {}}}\n", i % 2 == 0);
        }
        for (kind, text) in [("texts", texts), ("pairs", pairs), ("rated", rated)] {
            std::fs::write(dir.join(format!("{name}-{kind}.jsonl")), text).unwrap();
        }
    }
    let mut set: Vec<String> = [
        "model.device=cpu",
        "data.eval_split=2",
        "data.max_length=64",
        "data.replay_share=0.2",
        "train.per_device_train_batch_size=5",
        "lora.r=4",
    ]
    .map(String::from)
    .into();
    set.push(format!("output_dir={}", dir.join("run").display()));
    set.push(format!("model.path={}", base.display()));
    set.extend(more.iter().map(|s| (*s).to_string()));
    let overrides: Vec<Override> = set.iter().map(|s| s.parse().unwrap()).collect();
    RunConfig::load(None, &overrides).unwrap()
}

fn of(dir: &Path, kind: &str, more: &[&str]) -> RunPlan {
    let path = |name: &str| dir.join(format!("{name}-{kind}.jsonl")).display().to_string();
    let sets = [format!("data.train={}", path("new")), format!("data.replay={}", path("old"))];
    let all: Vec<&str> = sets.iter().map(String::as_str).chain(more.iter().copied()).collect();
    RunPlan::resolve(config(dir, &all), &mut NoEvents).unwrap()
}

#[test]
fn whatever_a_row_is_new_ones_come_first_and_the_share_is_one_of_rows() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, more) in [
        ("texts", &[][..]),
        ("texts", &["data.packing=true"]),
        ("texts", &["data.group_by_length=true"]),
        ("texts", &["data.mixing=interleave_once"]),
        ("pairs", &["objective.name=dpo"]),
        ("rated", &["objective.name=kto"]),
    ] {
        let plan = of(dir.path(), kind, more);
        let replay = plan.replay.unwrap();
        assert_eq!(plan.rows.len(), replay.new + replay.old, "{more:?}");
        if !plan.config.data.packing {
            // Two of eighteen are held out, of the new ones only; a quarter of sixteen makes a fifth of twenty.
            assert_eq!((replay.new, replay.old, replay.drawn), (16, 7, 4), "{more:?}");
            assert_eq!((plan.rows_per_pass(), plan.steps_per_epoch), (20, 4), "{more:?}");
        }
        assert!(replay.new > replay.drawn && replay.drawn > 0, "{more:?}");
        for row in 0..plan.rows.len() {
            let wanted = if row < replay.new { "new" } else { "old" };
            for example in plan.rows.members(row) {
                let origin = plan.train.origin(example).unwrap().to_string();
                assert!(origin.contains(&format!("{wanted}-{kind}")), "{more:?}: row {row} is of {origin}");
            }
        }
        assert_eq!(plan.train_report.replay, Some(replay));
        // Every step of two passes has its rows.
        let (steps, mut trainer) = (2 * plan.steps_per_epoch, Trainer::new(plan, &mut NoEvents).unwrap());
        (0..steps).for_each(|_| drop(trainer.step().unwrap()));
        assert_eq!(trainer.state().cursor_epoch, 2, "{more:?}");
    }
}

#[test]
fn a_share_of_less_than_a_row_is_said_and_an_old_set_of_nothing_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut notes = Vec::new();
    let mut sink = |event: Event| {
        if let Event::Note(note) = event {
            notes.push(note);
        }
    };
    let path = |name: &str| dir.path().join(name).display().to_string();
    let sets = [format!("data.train={}", path("new-texts.jsonl")), format!("data.replay={}", path("old-texts.jsonl"))];
    let little = config(dir.path(), &[&sets[0], &sets[1], "data.replay_share=0.01"]);
    let plan = RunPlan::resolve(little, &mut sink).unwrap();
    assert_eq!((plan.replay.unwrap().drawn, plan.rows_per_pass()), (0, 16));
    assert!(notes.iter().any(|note| note.contains("data.replay_share = 0.01")), "{notes:?}");

    std::fs::write(dir.path().join("blank.jsonl"), "{\"prompt\": \"x\", \"completion\": \"\"}\n").unwrap();
    for (new, old, key) in [("new-texts", "blank", "data.replay"), ("blank", "new-texts", "data.train")] {
        let sets = [format!("data.train={}.jsonl", path(new)), format!("data.replay={}.jsonl", path(old))];
        let nothing = config(dir.path(), &[&sets[0], &sets[1], "data.max_affected_share=1.0"]);
        let error = RunPlan::resolve(nothing, &mut NoEvents).unwrap_err();
        assert!(error.is_usage() && error.to_string().starts_with(&format!("{key}: ")), "{error}");
    }
}
