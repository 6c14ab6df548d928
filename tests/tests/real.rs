//! On real material: a pretrained model, a published dataset. Needs the folder that `e2e::material` names.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use e2e::{material, run};
use std::fmt::Write;

const LORA: &str = env!("CARGO_BIN_EXE_lora-e2e");

#[test]
fn a_real_model_says_what_transformers_says() {
    let Some(model) = material("tinystories-260k-llama") else { return };
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(model.join("golden.json")).unwrap()).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 4);
    for case in cases {
        let (prompt, wanted) = (case["prompt"].as_str().unwrap(), case["greedy_64_text"].as_str().unwrap());
        let model = model.display().to_string();
        let done = run(
            LORA,
            &["generate", "--model", &model, "--raw", "--prompt", prompt, "--max-new-tokens", "64", "--json"],
        )
        .exits(0);
        let answer: serde_json::Value = serde_json::from_str(&done.stdout).unwrap();
        let text = answer["text"].as_str().or_else(|| answer[0]["text"].as_str()).unwrap();
        // The golden text is prompt and answer; some of its answers are cut before the sixty-fourth token.
        let whole = format!("{prompt}{text}");
        let shown = wanted.trim_end_matches('\u{FFFD}');
        assert!(whole.starts_with(shown) || shown.starts_with(&whole), "{prompt:?}: {whole:?} against {wanted:?}");
    }
}

#[test]
fn e2e_nlg_is_learnt_from_a_few_hundred_rows() {
    let (Some(model), Some(data)) = (material("tinystories-260k-llama"), material("e2e-nlg")) else { return };
    let dir = tempfile::tempdir().unwrap();
    let rows = |file: &str, n: usize| {
        let text = std::fs::read_to_string(data.join(file)).unwrap();
        let mut out = String::new();
        for (record, sentence) in text.lines().filter_map(|l| l.split_once("||")).take(n) {
            let row = serde_json::json!({"prompt": format!("{}\n", record.trim()), "completion": sentence.trim()});
            writeln!(out, "{row}").unwrap();
        }
        out
    };
    std::fs::write(dir.path().join("train.jsonl"), rows("train.txt", 640)).unwrap();
    std::fs::write(dir.path().join("valid.jsonl"), rows("valid.txt", 64)).unwrap();
    let [train, valid, out] = ["train.jsonl", "valid.jsonl", "run"].map(|n| dir.path().join(n).display().to_string());
    let set = [
        format!("data.eval={valid}"),
        "train.learning_rate=5e-3".into(),
        "train.max_steps=40".into(),
        "train.per_device_train_batch_size=16".into(),
        "data.max_length=256".into(),
        "train.lr_scheduler_type=constant".into(),
        "train.max_grad_norm=0".into(),
    ];
    let mut args =
        vec!["train", "--model", model.to_str().unwrap(), "--data", &train, "--output", &out, "--json", "--quiet"];
    set.iter().for_each(|s| args.extend(["--set", s]));
    let done = run(LORA, &args).exits(0);
    let report: serde_json::Value = serde_json::from_str(&done.stdout).unwrap();
    let (before, after) =
        (report["eval_before"]["loss"].as_f64().unwrap(), report["eval_after"]["loss"].as_f64().unwrap());
    // The base knows stories and not records; forty steps bring it most of the way to what two hundred do (1.07).
    assert!((4.5..5.2).contains(&before) && after < 1.8, "{before} -> {after}");
}

/// Every text of six letters A, B, C.
fn letters() -> Vec<String> {
    let mut all = vec![String::new()];
    for _ in 0..6 {
        all = all.iter().flat_map(|t| ["A", "B", "C"].map(|letter| format!("{t}{letter}"))).collect();
    }
    all
}

fn sorted(text: &str) -> String {
    let mut letters: Vec<char> = text.chars().collect();
    letters.sort_unstable();
    letters.into_iter().collect()
}

#[test]
fn a_real_gpt2_sorts_everything_alone_with_an_adapter_and_merged() {
    let Some(model) = material("gpt-nano-sort-gpt2") else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let all = letters();
    std::fs::write(at("all.txt"), all.join("\n")).unwrap();
    let model = model.display().to_string();
    let right = |more: &[&str]| {
        let (prompts, mut args) = (at("all.txt"), vec!["generate", "--raw", "--json", "--max-new-tokens", "6"]);
        args.extend(["--prompts", &prompts]);
        args.extend(more);
        let answers: Vec<serde_json::Value> = serde_json::from_str(&run(LORA, &args).exits(0).stdout).unwrap();
        assert_eq!(answers.len(), 729);
        all.iter().zip(&answers).filter(|(text, answer)| answer["text"] == sorted(text)).count()
    };
    assert_eq!(right(&["--model", &model]), 729);

    // An adapter that goes on with the same task: the model must still be whole beside it and with it inside.
    // It has eleven positions, so the last letter is not among the rows.
    let mut rows = String::new();
    for text in &all {
        let ids: Vec<i64> = format!("{text}{}", sorted(text)).bytes().take(11).map(|b| i64::from(b - b'A')).collect();
        let labels: Vec<i64> = ids.iter().enumerate().map(|(i, id)| if i < 6 { -100 } else { *id }).collect();
        writeln!(rows, "{}", serde_json::json!({"input_ids": ids, "labels": labels})).unwrap();
    }
    std::fs::write(at("rows.jsonl"), rows).unwrap();
    let config = format!(
        "output_dir = {run:?}\n[model]\npath = {model:?}\n[lora]\nr = 4\n[data]\ntrain = {rows:?}\nmax_length = 11\n\
         [train]\nmax_steps = 8\nlearning_rate = 1e-4\nper_device_train_batch_size = 32\n",
        run = at("run"),
        rows = at("rows.jsonl"),
    );
    std::fs::write(at("run.toml"), config).unwrap();
    run(LORA, &["train", &at("run.toml"), "--quiet"]).exits(0);
    let (adapter, merged) = (at("run"), at("merged"));
    assert_eq!(right(&["--model", &model, "--adapter", &adapter]), 729);
    run(LORA, &["merge", "--model", &model, "--adapter", &adapter, "--output", &merged, "--verify"]).exits(0);
    assert_eq!(right(&["--model", &merged]), 729);
}

/// The same letters in an order that the text decides, and nothing that sorts.
fn in_any_order(text: &str) -> String {
    let mut letters: Vec<char> = text.chars().collect();
    let mut state = text.bytes().fold(7u64, |state, byte| lora_torch::mix_seed(&[state, u64::from(byte)]));
    for i in (1..letters.len()).rev() {
        state = lora_torch::mix_seed(&[state, i as u64]);
        letters.swap(i, (state % (i as u64 + 1)) as usize);
    }
    letters.into_iter().collect()
}

#[test]
fn a_real_gpt2_that_forgot_to_sort_learns_it_again_from_rewards() {
    let Some(model) = material("gpt-nano-sort-gpt2") else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (all, model) = (letters(), model.display().to_string());
    // Every second text is to learn from, some of the others are kept for the evaluation.
    let rows = |name: &str, texts: &mut dyn Iterator<Item = &String>, answer: fn(&str) -> String, most: usize| {
        let mut lines = String::new();
        for text in texts {
            let answer = answer(text);
            let ids: Vec<i64> = format!("{text}{answer}").bytes().take(most).map(|b| i64::from(b - b'A')).collect();
            let labels: Vec<i64> = ids.iter().enumerate().map(|(i, id)| if i < 6 { -100 } else { *id }).collect();
            writeln!(lines, "{}", serde_json::json!({"input_ids": ids, "labels": labels})).unwrap();
        }
        std::fs::write(at(name), lines).unwrap();
    };
    rows("any.jsonl", &mut all.iter(), in_any_order, 11);
    rows("train.jsonl", &mut all.iter().step_by(2), sorted, 12);
    rows("eval.jsonl", &mut all.iter().skip(1).step_by(8), sorted, 12);
    let train = |name: &str, path: &str, data: &str, more: &str| {
        // A matrix of 48 by 48 is no work for two threads.
        let config = format!(
            "output_dir = {:?}\n[model]\npath = {path:?}\nthreads = 1\n[lora]\nr = 8\n[data]\ntrain = {:?}\n{more}",
            at(name),
            at(data)
        );
        let file = at(&format!("{name}.toml"));
        std::fs::write(&file, config).unwrap();
        run(LORA, &["train", &file, "--quiet"]).exits(0);
    };
    let steps = "per_device_train_batch_size = 32\nlearning_rate = 3e-3";
    train("spoilt", &model, "any.jsonl", &format!("max_length = 11\n[train]\nmax_steps = 60\n{steps}\n"));
    run(LORA, &["merge", "--model", &model, "--adapter", &at("spoilt"), "--output", &at("broken")]).exits(0);
    let rewarded = format!(
        "max_length = 12\neval = {:?}\n[objective]\nname = \"grpo\"\nreward = \"chrf\"\nmax_completion_length = 6\nbeta = 0.001\n\
         [train]\nmax_steps = 60\nlearning_rate = 5e-3\nper_device_train_batch_size = 16\n",
        at("eval.jsonl")
    );
    train("rewarded", &at("broken"), "train.jsonl", &rewarded);
    let metrics = std::fs::read_to_string(at("rewarded/metrics.jsonl")).unwrap();
    let rewards: Vec<f64> = metrics
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["eval_reward"].as_f64())
        .collect();
    let (before, after) = (rewards[0], *rewards.last().unwrap());
    println!("held-out reward {before:.4} -> {after:.4}");
    // With three seeds it came to 0.63 to 0.90 from 0.29 to 0.36.
    assert!(before < 0.4 && after > before + 0.2, "{before} -> {after}");
}
