//! N1, N2: losses, gradients and parameters that are not finite.

use crate::lab::{Lab, copy, names};
use crate::report::Row;
use e2e::fixtures;
use lora_format::{TensorFile, write_tensors};
use std::path::Path;

/// A token whose embedding is not a number: whoever reads it has a loss that is none.
const POISON: i64 = 7;
const STEPS: usize = 10;

/// The fixtures' model with a poisoned token.
fn poisoned(dir: &Path) {
    copy(&fixtures().join("llama"), dir);
    let file = TensorFile::open(&dir.join("model.safetensors")).unwrap();
    let tensors: Vec<_> = file.names().map(|name| (name.to_string(), file.read(name).unwrap())).collect();
    let table = tensors.iter().find(|(name, _)| name == "model.embed_tokens.weight").unwrap();
    let _row = table.1.get(POISON).fill_(f64::NAN);
    write_tensors(&dir.join("model.safetensors"), &tensors, file.metadata()).unwrap();
}

/// Two rows a step, in their order, of which the second is poisoned in these steps.
fn rows(bad: &[usize]) -> String {
    let ids = |row: usize, poison: bool| {
        (0..6).map(|t| if poison && t == 2 { POISON } else { 10 + ((row * 7 + t * 3) % 90) as i64 }).collect::<Vec<_>>()
    };
    let line = |row: usize| {
        let ids = ids(row, row % 2 == 1 && bad.contains(&(row / 2 + 1)));
        format!("{}\n", serde_json::json!({"input_ids": ids, "labels": ids}))
    };
    (0..2 * STEPS).map(line).collect()
}

fn lab(bad: &[usize], save_steps: usize, train: &str) -> (Lab, tempfile::TempDir) {
    let model = tempfile::tempdir().unwrap();
    poisoned(model.path());
    let train = format!("max_steps = {STEPS}\nsave_steps = {save_steps}\nsave_total_limit = 100\n{train}");
    (Lab::bare(model.path(), &rows(bad), "shuffle = false", &train), model)
}

fn is_finite(adapter: &Path) -> bool {
    let file = TensorFile::open(adapter).unwrap();
    file.names().all(|name| file.read(name).unwrap().isfinite().all().int64_value(&[]) == 1)
}

#[test]
fn n01_losses_that_are_no_numbers() {
    let row = Row::new("N1");
    let rate = "learning_rate = 1e-2";
    // The first step, one in the middle, the last.
    let bad = [1, 7, STEPS];
    let (lab, _model) = lab(&bad, 1, rate);
    let done = lab.train("run", &["--json"]).exits(0);
    let report: serde_json::Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!((&report["skipped_steps"], &report["status"]), (&3.into(), &"finished".into()));
    for step in bad {
        // The rows are told by file and line.
        let told = format!("step {step} was left out: loss = NaN");
        assert!(done.stderr.contains(&told) && done.stderr.contains(&format!("train.jsonl:{}", 2 * step)), "{done:#?}");
        if step > 1 {
            let state = |step: usize| {
                std::fs::read(lab.checkpoint("run", step as u64).join("trainer_state.safetensors")).unwrap()
            };
            assert!(state(step) == state(step - 1), "step {step} changed something");
        }
    }
    assert!(is_finite(&lab.path("run/adapter_model.safetensors")));
    let lines = crate::lab::metrics(&lab.path("run"));
    let steps = lines.iter().filter(|line| line.get("loss").is_some());
    let logged: Vec<u64> = steps.map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(logged, [2, 3, 4, 5, 6, 8, 9]);
    row_of_three(rate);
    parameters_that_are_not_finite();
    row.held("3 of 3 steps (first, seventh, last) left out, counted, their rows named; three in a row stopped, also over a resume; no such adapter saved");
}

/// Three in a row: the run ends, and what was good stays; going on does not begin the count anew.
fn row_of_three(rate: &str) {
    let (lab, _model) = lab(&[5, 6, 7], 1, rate);
    let words = ["step 7: loss = NaN", "for the third time in a row", "step-6", "lora.init_adapter"];
    lab.train("run", &[]).exits(1).says(&words);
    assert_eq!(lab.checkpoints("run"), (1..=6).collect::<Vec<_>>());
    lab.all_whole("run", "three in a row");
    assert!(!lab.path("run/adapter_model.safetensors").exists());
    lab.train("run", &["--resume"]).exits(1).says(&words);
    // What the message says: another run begins from the last good state.
    let init = format!("lora.init_adapter={}", lab.checkpoint("run", 6).display());
    lab.train("other", &["--set", &init, "--set", "train.max_steps=2"]).exits(0);
}

/// A learning rate beyond float32: the first update makes parameters infinite, and they are never saved.
fn parameters_that_are_not_finite() {
    let (lab, _model) = lab(&[], 1, "learning_rate = 1e39\nmax_grad_norm = 0");
    let done = lab.train("run", &[]).exits(1);
    assert!(done.stderr.contains("a trained parameter is not finite, and nothing was saved"), "{done:#?}");
    assert!(lab.checkpoints("run").is_empty() && !lab.path("run/adapter_model.safetensors").exists());
    assert!(names(&lab.path("run/checkpoints")).is_empty(), "something half written");
}

#[test]
fn n02_a_learning_rate_that_explodes() {
    let row = Row::new("N2");
    // The first update is finite, and the product of two of its numbers in the second step is not.
    let train = "learning_rate = 1e20\nmax_grad_norm = 0\nmax_steps = 60\nsave_steps = 1\nsave_total_limit = 100";
    let lab = Lab::bare(&fixtures().join("llama"), &e2e::small_dataset(), "", train);
    let done = lab.train("run", &["--set", "lora.target_modules=all-linear"]).exits(1);
    let done = done.says(&[
        "for the third time in a row",
        "learning_rate = ",
        "Lower train.learning_rate",
        "lora.init_adapter",
    ]);
    lab.all_whole("run", "an explosion");
    let saved = lab.checkpoints("run");
    for step in &saved {
        assert!(is_finite(&lab.checkpoint("run", *step).join("adapter_model.safetensors")), "step {step}: {done:#?}");
    }
    assert!(!saved.is_empty() && !lab.path("run/adapter_model.safetensors").exists());
    row.held(&format!(
        "ended at step {} with one message; {} checkpoints, each finite",
        saved.last().unwrap() + 1,
        saved.len()
    ));
}
