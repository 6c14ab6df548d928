//! Optimizers, noise on embeddings and a budget of time, through the binary.
#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

mod common;

use common::{Place, fixture};
use serde_json::Value;

fn lines(place: &Place, run: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(place.path(run).join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn losses(place: &Place, run: &str) -> Vec<f64> {
    lines(place, run).iter().filter_map(|line| line.get("loss").and_then(Value::as_f64)).collect()
}

#[test]
fn each_optimizer_learns_takes_its_memory_and_keeps_its_own_checkpoints() {
    let place = Place::new();
    // The head's moments are packed; the adapters' are too small for it.
    let lora = "modules_to_save = [\"lm_head\"]";
    place.config("c.toml", &fixture("llama"), "train.jsonl", lora, "max_steps = 20\nlearning_rate = 3e-3");
    let mut memory = Vec::new();
    for (name, own) in [("adamw_torch_fused", "adamw"), ("adamw_bnb_8bit", "adamw_8bit"), ("lion", "lion")] {
        let set = format!("--set train.optim={name} --set output_dir={own}");
        let plan = place.lora(&format!("plan c.toml --json {set}")).exits(0).json();
        assert_eq!(plan["steps"]["optim"], own);
        memory.push((own, plan["memory_bytes"]["trained"].as_u64().unwrap()));
        place.lora(&format!("train c.toml --quiet {set}")).exits(0);
        let losses = losses(&place, own);
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        assert!(mean(&losses[15..]) < 0.85 * mean(&losses[..5]), "{own}: {losses:?}");
        let found = place.lora(&format!("inspect {own} --json")).exits(0).json();
        assert_eq!((&found["checkpoints"][0]["optim"], &found["ended_by"]), (&own.into(), &"steps".into()));
        assert!(place.lora(&format!("inspect {own}")).exits(0).stdout.contains(&format!("moments of {own}")));
    }
    assert!(memory[0].1 > memory[1].1 && memory[0].1 > memory[2].1, "{memory:?}");
    let other = "train c.toml --resume --set output_dir=lion --set train.optim=adamw_8bit --set train.max_steps=30";
    place.lora(other).exits(2).says(&["train.optim was \"lion\" and is \"adamw_8bit\""]);
    place.lora("train c.toml --set train.optim=sgd").exits(2).says(&["train.optim", "\"adamw_8bit\""]);
}

#[test]
fn noise_changes_the_steps_and_no_evaluation() {
    let place = Place::new();
    place.config("c.toml", &fixture("llama"), "train.jsonl", "", "max_steps = 6\nlearning_rate = 1e-2");
    let run = |alpha: u32, out: &str| {
        let alpha = format!("--set train.neftune_noise_alpha={alpha}");
        place.lora(&format!("train c.toml --quiet --set output_dir={out} --set data.eval_split=4 {alpha}")).exits(0);
        let first = lines(&place, out).into_iter().find(|line| line.get("eval_loss").is_some()).unwrap();
        (losses(&place, out), first["eval_loss"].as_f64().unwrap())
    };
    let (plain, noisy) = (run(0, "plain"), run(5, "noisy"));
    assert_eq!(plain.1, noisy.1, "the evaluation before the first step");
    assert!(plain.0.iter().zip(&noisy.0).all(|(a, b)| a != b), "{plain:?} {noisy:?}");
    assert_eq!(run(5, "again").0, noisy.0);
    place.lora("train c.toml --set train.neftune_noise_alpha=-1").exits(2).says(&["neftune_noise_alpha", "at least 0"]);
}

#[test]
fn a_run_ends_when_its_time_is_over_and_goes_on_to_the_same_bits() {
    let place = Place::new();
    let train = "max_steps = 400\nlearning_rate = 1e-2\ngradient_accumulation_steps = 4\nsave_steps = 0";
    place.config("c.toml", &fixture("llama"), "train.jsonl", "lora_dropout = 0.1", train);
    place.lora("train c.toml --quiet --set output_dir=whole").exits(0);
    let mut done = place.lora("train c.toml --json --set train.max_time=1s").exits(0);
    let report = done.json();
    let mut steps = report["steps"].as_u64().unwrap();
    if steps < 400 {
        assert_eq!((&report["status"], &report["ended_by"]), (&"stopped".into(), &"max_time".into()), "{report}");
        done = done.says(&["train.max_time = \"1s\" is over"]);
        assert!(place.path("run/adapter_model.safetensors").is_file() && !done.stdout.is_empty());
        assert_eq!(lines(&place, "run").last().unwrap()["ended_by"], "max_time");
    }
    while steps < 400 {
        let report = place.lora("train c.toml --resume --json --set train.max_time=20s").exits(0).json();
        assert!(report["steps"].as_u64().unwrap() > steps, "{report}");
        steps = report["steps"].as_u64().unwrap();
    }
    let adapter = |run: &str| std::fs::read(place.path(run).join("adapter_model.safetensors")).unwrap();
    assert!(adapter("whole") == adapter("run"), "the adapters differ");
    assert_eq!(losses(&place, "whole"), losses(&place, "run"));
    assert_eq!(lines(&place, "run").iter().filter(|line| line.get("ended_by").is_some()).count(), 1);
    place.lora("train c.toml --set train.max_time=90").exits(2).says(&["train.max_time", "\"2h30m\""]);
}
