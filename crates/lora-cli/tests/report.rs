//! What a run tells of itself, through the binary: the page, samples, TensorBoard events, lines of JSON; and pages on demand.
#![allow(clippy::unwrap_used)] // a helper that fails is a failed test

mod common;

use common::{Place, fixture};
use lora_report::{Sample, read_scalars};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

const TRAIN: &str = "max_steps = 10\nlearning_rate = 1e-2\neval_steps = 5\nsave_steps = 5\nsample_max_new_tokens = 8";

fn text(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()))
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

/// The lines of the metrics, without the one that says why the run ended.
fn metrics(run: &Path) -> Vec<Value> {
    let mut lines = json_lines(&text(run.join("metrics.jsonl")));
    lines.retain(|line| line.get("ended_by").is_none());
    lines
}

fn samples(run: &Path) -> Vec<Sample> {
    text(run.join("samples.jsonl")).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A run over the fixture model with a part of the data held out.
fn place_with_run(train: &str) -> Place {
    let place = Place::new();
    place.config("c.toml", &fixture("llama"), "train.jsonl", "lora_dropout = 0.1", train);
    place.lora("train c.toml --set data.eval_split=8 --quiet").exits(0);
    place
}

/// Every number of the metrics, by tag and step, as an event file holds it.
fn wanted_scalars(run: &Path) -> BTreeMap<(String, u64), f32> {
    let mut wanted = BTreeMap::new();
    for line in metrics(run) {
        let step = line["step"].as_u64().unwrap();
        for (name, value) in line.as_object().unwrap().iter().filter(|(name, _)| *name != "step") {
            let tag = name.strip_prefix("eval_").map_or(format!("train/{name}"), |rest| format!("eval/{rest}"));
            wanted.insert((tag, step), value.as_f64().unwrap() as f32);
        }
    }
    wanted
}

#[track_caller]
fn events_equal_metrics(run: &Path) {
    let events = read_scalars(run).unwrap();
    let found: BTreeMap<(String, u64), f32> =
        events.iter().map(|event| ((event.tag.clone(), event.step), event.value)).collect();
    assert_eq!(found.len(), events.len(), "a step stands there twice");
    assert_eq!(found, wanted_scalars(run));
}

#[test]
fn a_run_leaves_a_page_samples_and_events_with_its_numbers() {
    let place = place_with_run(TRAIN);
    let run = place.path("run");
    let (page, lines) = (text(run.join("report.html")), metrics(&run));
    let last = |name: &str| lines.iter().rev().find_map(|line| line.get(name)?.as_f64()).unwrap();
    for name in ["loss", "eval_loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_bytes"] {
        // The last point of a curve, as the page gives it to the pointer.
        assert!(page.contains(&format!("10,{}\"", last(name))), "{name} {}", last(name));
    }
    for number in [format!("<b>{:.4}</b>", last("eval_loss")), format!("<b>{:.4}</b>", last("loss"))] {
        assert!(page.contains(&number), "{number}");
    }
    assert!(page.contains("state finished") && page.contains("<td>max_steps</td><td class=v>10</td>"));
    assert!(page.contains("<td class=k>records read</td><td class=n>48</td>"), "{page}");
    assert!(page.contains("<td class=k>held-out examples</td><td class=n>8</td>"));

    let about: Value = serde_json::from_str(&text(run.join("run.json"))).unwrap();
    assert_eq!((about["status"].as_str(), about["step"].as_u64()), (Some("finished"), Some(10)));
    assert_eq!((about["trained_parameters"].as_u64(), about["base_parameters"].as_u64()), (Some(4480), Some(42_144)));
    assert!(about["matrix_rate"].as_f64().unwrap() > 0.0);

    let samples = samples(&run);
    assert_eq!(samples.iter().map(|s| s.step).collect::<Vec<_>>(), [0, 0, 0, 10, 10, 10]);
    for (before, after) in samples[..3].iter().zip(&samples[3..]) {
        let letter = before.prompt.split("say ").nth(1).unwrap().chars().next().unwrap();
        assert_eq!(before.wanted.as_deref(), Some(letter.to_string().repeat(3).as_str()), "{before:?}");
        assert_eq!((&before.prompt, &before.wanted), (&after.prompt, &after.wanted));
        assert!(page.contains("before") && page.contains("after step 10"));
    }
    events_equal_metrics(&run);

    // The page of the run is the one that is made on demand.
    let done = place.lora("report run --output again.html").exits(0);
    assert_eq!(done.stdout, "again.html\n");
    assert_eq!(text(place.path("again.html")), page);
}

#[test]
fn samples_are_what_generate_writes_and_change_nothing_of_the_training() {
    let asked = format!("{TRAIN}\nsample_prompts = [\"say a 0: \"]");
    let (with, without) = (place_with_run(&asked), place_with_run(&format!("{TRAIN}\nsample_count = 0")));
    assert!(!without.path("run/samples.jsonl").exists());
    for file in ["adapter_model.safetensors", "checkpoints/step-10/trainer_state.safetensors"] {
        let bytes = |place: &Place| std::fs::read(place.path("run").join(file)).unwrap();
        assert!(bytes(&with) == bytes(&without), "{file} differs");
    }
    let model = fixture("llama").display().to_string();
    let samples = samples(&with.path("run"));
    assert_eq!(samples.len(), 2);
    for (sample, adapter) in samples.iter().zip([&[][..], &["--adapter", "run"]]) {
        let words =
            ["generate", "--model", &model, "--raw", "--prompt", "say a 0: ", "--max-new-tokens", "8", "--json"];
        let said = with.lora_words(&[&words, adapter].concat()).exits(0).json();
        let said = said.get("text").or_else(|| said[0].get("text")).unwrap_or_else(|| panic!("{said}")).clone();
        assert_eq!(said, sample.text.as_str(), "step {}", sample.step);
        assert_eq!(sample.prompt, "say a 0: ");
    }
}

#[test]
fn a_resumed_run_tells_nothing_twice() {
    let place = place_with_run(TRAIN);
    let run = place.path("run");
    // As if it had been killed before its last checkpoint.
    std::fs::remove_dir_all(run.join("checkpoints/step-10")).unwrap();
    place.lora("train --resume --output run --quiet").exits(0);
    let events = |name: &str| name.starts_with("events.out.tfevents.");
    let files = std::fs::read_dir(&run).unwrap().filter(|e| events(&e.as_ref().unwrap().file_name().to_string_lossy()));
    assert_eq!(files.count(), 2, "each part of the run has a file of its own");
    events_equal_metrics(&run);
    assert_eq!(samples(&run).iter().map(|s| s.step).collect::<Vec<_>>(), [0, 0, 0, 10, 10, 10]);
    // What is told of a run may be changed without its becoming another one.
    std::fs::remove_dir_all(run.join("checkpoints/step-10")).unwrap();
    place.lora("train --resume --output run --quiet --set train.sample_count=1").exits(0);
    assert_eq!(samples(&run).iter().map(|s| s.step).collect::<Vec<_>>(), [0, 0, 0, 10]);
    // At its end there is nothing left to do, and nothing is told again.
    place.lora("train --resume --output run --quiet --set train.sample_count=1").exits(0);
    assert_eq!(samples(&run).len(), 4);
    events_equal_metrics(&run);
}

#[test]
fn runs_are_laid_over_each_other_and_their_differences_named() {
    let place = place_with_run(TRAIN);
    place
        .lora("train c.toml --quiet --set data.eval_split=8 --set output_dir=other --set train.learning_rate=3e-3")
        .exits(0);
    place.lora("report run other --output both.html").exits(0);
    let page = text(place.path("both.html"));
    for (run, k) in [("run", 0), ("other", 1)] {
        let lines = metrics(&place.path(run));
        let last = |name: &str| lines.iter().rev().find_map(|line| line.get(name)?.as_f64()).unwrap();
        for name in ["loss", "eval_loss"] {
            assert!(page.contains(&format!("10,{}\"", last(name))), "{name} of {run}");
            assert!(page.contains(&format!("{:.4}</td>", last(name))), "{name} of {run}");
        }
        assert!(page.contains(&format!("data-k={k} data-n=\"{run}\"")));
    }
    let differing = page.split("What differs").nth(1).unwrap().split("</table>").next().unwrap();
    assert!(differing.contains("train.learning_rate") && differing.contains("0.01") && differing.contains("0.003"));
    assert!(!differing.contains("lora.r<") && !differing.contains("output_dir"), "{differing}");
}

#[test]
fn a_run_that_goes_on_has_a_page_and_a_broken_one_is_named() {
    let place = place_with_run(TRAIN);
    let path = place.path("run/metrics.jsonl");
    let whole = text(&path);
    let torn = &whole[..whole.len() - 20];
    std::fs::write(&path, torn).unwrap();
    place.lora("report run").exits(0);
    let page = text(place.path("run/report.html"));

    std::fs::write(&path, format!("{{\"step\":1\n{whole}")).unwrap();
    place.lora("report run").exits(2).says(&["metrics.jsonl:1:"]);
    assert_eq!(text(place.path("run/report.html")), page, "the page that was there is left alone");
    std::fs::write(&path, &whole).unwrap();
    for (line, words) in [
        ("report nowhere", vec!["nowhere", "metrics.jsonl", "output_dir"]),
        ("report run nowhere --output both.html", vec!["nowhere"]),
        ("report run run", vec!["--output"]),
        ("report run --output no/such/page.html", vec!["no/such/page.html", "folder"]),
        ("report c.toml", vec!["c.toml", "metrics.jsonl"]),
    ] {
        place.lora(line).exits(2).says(&words);
    }
    assert!(!place.path("both.html").exists());
    std::fs::remove_file(place.path("run/config.resolved.toml")).unwrap();
    place.lora("report run").exits(2).says(&["config.resolved.toml"]);
}

#[test]
fn hostile_texts_stay_texts() {
    let place = Place::new();
    let evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\\\"'";
    let record = |i: usize| format!("{{\"prompt\": \"{i}{evil}\", \"completion\": \"{evil}\"}}\n");
    let data = "d<img src=x>&'.jsonl";
    place.write(data, &(0..6).map(record).collect::<String>());
    let train = format!("max_steps = 2\nsample_max_new_tokens = 2\nsample_prompts = [\"{evil}\", \"b\"]");
    place.config("c.toml", &fixture("llama"), data, "", &train);
    let long = "--set data.max_length=512 --set data.truncation=right --quiet";
    place.lora(&format!("train c.toml {long} --set output_dir=run<b>&")).exits(0);
    place.lora(&format!("train c.toml {long} --set train.sample_prompts=[] --set output_dir=own")).exits(0);
    place.lora("report run<b>& own --output both.html").exits(0);
    for file in ["run<b>&/report.html", "own/report.html", "both.html"] {
        let page = text(place.path(file));
        for tag in ["<script", "</script"] {
            assert_eq!(page.matches(tag).count(), 1, "{tag} in {file}");
        }
        assert!(!page.contains("<img") && !page.contains("run<b>"), "{file}");
        assert!(page.contains("&lt;img src=x"), "{file} does not show the text");
    }
}

#[test]
fn figures_of_other_objectives_are_on_the_page_by_their_names() {
    let place = Place::new();
    let pair = |i: usize| format!("{{\"prompt\": \"say {i}: \", \"chosen\": \"yes{i}\", \"rejected\": \"no\"}}\n");
    place.write("pairs.jsonl", &(0..12).map(pair).collect::<String>());
    place.config("c.toml", &fixture("llama"), "pairs.jsonl", "", "max_steps = 4\nsample_max_new_tokens = 2");
    place.lora("train c.toml --set objective.name=dpo --set data.eval_split=4 --quiet").exits(0);
    let page = text(place.path("run/report.html"));
    for line in metrics(&place.path("run")) {
        for name in line.as_object().unwrap().keys().filter(|name| *name != "step") {
            assert!(page.contains(name.as_str()), "{name}");
        }
    }
    assert!(page.contains("reward_margin, eval_reward_margin"));
    // The better answer is the wanted one.
    assert!(samples(&place.path("run")).iter().all(|s| s.wanted.as_ref().unwrap().starts_with("yes")));
    events_equal_metrics(&place.path("run"));
}

#[test]
fn a_log_of_json_is_json_on_every_line() {
    let place = Place::new();
    place.config("c.toml", &fixture("llama"), "train.jsonl", "", &format!("{TRAIN}\nlogging_steps = 2"));
    let done = place.lora("train c.toml --set data.eval_split=8 --log-format json").exits(0);
    let lines = json_lines(&done.stderr);
    let of = |event: &str| lines.iter().filter(|line| line["event"] == event).collect::<Vec<_>>();
    assert_eq!(of("plan")[0]["steps"]["total"], 10);
    assert_eq!(of("started")[0]["total_steps"], 10);
    let steps = of("step");
    assert_eq!(steps.iter().map(|s| s["step"].as_u64().unwrap()).collect::<Vec<_>>(), [2, 4, 6, 8, 10]);
    for step in &steps {
        for name in
            ["loss", "learning_rate", "tokens_per_second", "of_matrix_rate", "peak_memory_bytes", "seconds_left"]
        {
            assert!(step[name].as_f64().is_some_and(|x| x >= 0.0), "{name} in {step}");
        }
    }
    assert_eq!(of("evaluated").iter().map(|s| s["step"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 5, 10]);
    assert_eq!(of("saved").len(), 2);
    let quiet = place.lora("train c.toml --set output_dir=quiet --quiet --log-format json").exits(0);
    assert_eq!(quiet.stderr, "");
    // The log and the report are told apart by the stream.
    let both = place.lora("train c.toml --set output_dir=both --log-format json --json").exits(0);
    assert_eq!(both.json()["status"], "finished");
}
