//! Classifiers through the binary: a random encoder learns to tell texts apart, predicts, is merged, goes on after a stop;
//! and what is refused.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

mod common;

use common::{Place, fixture};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::PathBuf;

const SUBJECTS: [&str; 8] =
    ["the film", "the story", "the music", "the actor", "the plot", "the food", "the room", "the book"];
const GOOD: [&str; 10] =
    ["wonderful", "lovely", "bright", "superb", "charming", "delightful", "brilliant", "excellent", "warm", "perfect"];
const BAD: [&str; 10] =
    ["awful", "dreadful", "boring", "terrible", "clumsy", "dull", "horrible", "tedious", "cold", "broken"];

/// Well above what one label in two is right by chance.
const LEARNED: f64 = 0.85;
const CHANCE: f64 = 0.7;
/// Merging rounds every weight once more; probabilities of float32 logits.
const MERGED: f64 = 1e-4;

fn draw(seed: &mut u64) -> usize {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 33) as usize
}

/// Texts of one to three judgements, some of them denied, that are positive when more of them are good; and of each
/// its label.
fn reviews(count: usize, mut seed: u64) -> Vec<(String, &'static str)> {
    let mut list = Vec::new();
    while list.len() < count {
        let (mut text, mut sum) = (String::new(), 0i32);
        for i in 0..1 + draw(&mut seed) % 3 {
            let (good, denied) = (draw(&mut seed).is_multiple_of(2), draw(&mut seed).is_multiple_of(5));
            let words = if good { GOOD } else { BAD };
            let (subject, word) = (SUBJECTS[draw(&mut seed) % SUBJECTS.len()], words[draw(&mut seed) % words.len()]);
            let not = if denied { "not " } else { "" };
            write!(text, "{}{subject} was {not}{word}", if i > 0 { " and " } else { "" }).unwrap();
            sum += if good == denied { -1 } else { 1 };
        }
        if sum != 0 {
            list.push((text, if sum > 0 { "positive" } else { "negative" }));
        }
    }
    list
}

fn jsonl(reviews: &[(String, &str)]) -> String {
    reviews.iter().map(|(text, label)| format!("{}\n", json!({"text": text, "label": label}))).collect()
}

/// A random encoder whose weights are large enough to be told apart: the fixture's config with a head for two labels.
fn fresh_encoder(place: &Place, name: &str) -> PathBuf {
    let from = fixture("classification/bert");
    let text = std::fs::read_to_string(from.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for key in ["id2label", "label2id"] {
        config.as_object_mut().unwrap().remove(key);
    }
    config["initializer_range"] = json!(0.15);
    config["architectures"] = json!(["BertForSequenceClassification"]);
    place.write(&format!("{name}-config/config.json"), &config.to_string());
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        place.write(&format!("{name}-config/{file}"), &std::fs::read_to_string(from.join(file)).unwrap());
    }
    place.lora(&format!("init-model --config {name}-config/config.json --output {name} --seed 3")).exits(0);
    place.path(name)
}

fn config(place: &Place, file: &str, model: &std::path::Path, output: &str, lora: &str, train: &str) {
    let text = format!(
        "output_dir = \"{output}\"\n[model]\npath = {model:?}\ndevice = \"cpu\"\nthreads = 1\n\
         [data]\ntrain = \"train.jsonl\"\neval = \"held-out.jsonl\"\nmax_length = 128\n\
         [lora]\ntask_type = \"SEQ_CLS\"\n{lora}\n[train]\nper_device_train_batch_size = 16\n{train}\n"
    );
    place.write(file, &text);
}

#[test]
fn an_encoder_learns_predicts_and_is_merged() {
    let place = Place::new();
    let (train, held_out) = (reviews(600, 1), reviews(160, 2));
    place.write("train.jsonl", &jsonl(&train));
    place.write("held-out.jsonl", &jsonl(&held_out));
    let model = fresh_encoder(&place, "base");
    config(
        &place,
        "run.toml",
        &model,
        "run",
        "r = 16\nlora_alpha = 16",
        "num_train_epochs = 12\nlearning_rate = 2e-3\nlr_scheduler_type = \"cosine\"\nsave_steps = 0",
    );
    let plan = place.lora("train run.toml --dry-run --json").exits(0).json();
    let labels: Vec<&str> =
        plan["data"]["labels"].as_array().unwrap().iter().map(|l| l["label"].as_str().unwrap()).collect();
    assert_eq!(labels, ["negative", "positive"], "names come from the data, in order");

    let report = place.lora("train run.toml --json --quiet").exits(0).json();
    let accuracy = |when: &str| report[when]["classes"]["accuracy"].as_f64().unwrap();
    assert!(accuracy("eval_before") < CHANCE, "{report}");
    assert!(accuracy("eval_after") > LEARNED, "{report}");

    // `lora eval` says the same as the run did.
    let eval = place.lora("eval --model base --adapter run --data held-out.jsonl --json --threads 1").exits(0).json();
    assert_eq!(eval["accuracy"], report["eval_after"]["classes"]["accuracy"]);
    assert_eq!(eval["macro_f1"], report["eval_after"]["classes"]["macro_f1"]);
    assert_eq!(eval["labels"][1]["label"], "positive");
    assert_eq!(eval["labels"][0]["support"].as_u64().unwrap() + eval["labels"][1]["support"].as_u64().unwrap(), 160);

    // Prediction, one by one and from a file, agrees with the evaluation.
    let lines: String = held_out.iter().map(|(text, _)| format!("{text}\n")).collect();
    place.write("texts.txt", &lines);
    let all = place.lora("classify --model base --adapter run --texts texts.txt --json --threads 1").exits(0).json();
    let right = all.as_array().unwrap().iter().zip(&held_out).filter(|(found, (_, label))| found["label"] == *label);
    assert_eq!(right.count() as f64 / 160.0, eval["accuracy"].as_f64().unwrap());
    let one = place
        .lora_words(&["classify", "--model", "base", "--adapter", "run", "--text", &held_out[0].0, "--json"])
        .exits(0)
        .json();
    assert_eq!(one["label"], all[0]["label"]);
    let sum: f64 = one["probabilities"].as_object().unwrap().values().map(|p| p.as_f64().unwrap()).sum();
    assert!((sum - 1.0).abs() < MERGED, "{one}");

    // Merged: the same predictions, without the adapter; transformers finds its labels in config.json.
    place.lora("merge --model base --adapter run --output merged --verify").exits(0);
    let merged = place.lora("classify --model merged --texts texts.txt --json --threads 1").exits(0).json();
    for (a, b) in all.as_array().unwrap().iter().zip(merged.as_array().unwrap()) {
        assert_eq!(a["label"], b["label"]);
        let (p, q) = (&a["probabilities"]["positive"], &b["probabilities"]["positive"]);
        assert!((p.as_f64().unwrap() - q.as_f64().unwrap()).abs() < MERGED, "{a} {b}");
    }
    let config: Value =
        serde_json::from_str(&std::fs::read_to_string(place.path("merged/config.json")).unwrap()).unwrap();
    assert_eq!(config["id2label"], json!({"0": "negative", "1": "positive"}));

    let found = place.lora("inspect merged --json").exits(0).json();
    assert_eq!(
        (&found["labels"], &found["problem_type"]),
        (&json!(["negative", "positive"]), &json!("single_label_classification"))
    );
    let run = place.lora("inspect run --json").exits(0).json();
    assert_eq!(run["adapter"]["labels"], json!(["negative", "positive"]));
    assert_eq!(run["adapter"]["task_type"], "SEQ_CLS");
}

#[test]
fn a_resumed_run_has_the_bits_of_an_uninterrupted_one() {
    let place = Place::new();
    place.write("train.jsonl", &jsonl(&reviews(40, 3)));
    place.write("held-out.jsonl", &jsonl(&reviews(16, 4)));
    let model = fresh_encoder(&place, "base");
    let (lora, train) =
        ("r = 4\nlora_dropout = 0.1", "save_steps = 3\nlearning_rate = 1e-3\nlr_scheduler_type = \"constant\"");
    config(&place, "whole.toml", &model, "whole", lora, &format!("max_steps = 6\n{train}"));
    config(&place, "part.toml", &model, "part", lora, &format!("max_steps = 3\n{train}"));
    place.lora("train whole.toml --quiet").exits(0);
    place.lora("train part.toml --quiet").exits(0);
    place.lora("train part.toml --quiet --resume --set train.max_steps=6").exits(0);
    let bytes = |run: &str| std::fs::read(place.path(run).join("adapter_model.safetensors")).unwrap();
    assert!(bytes("whole") == bytes("part"), "the adapters differ");
    assert!(place.path("whole/labels.json").is_file() && place.path("whole/checkpoints/step-6/labels.json").is_file());
    let metrics = std::fs::read_to_string(place.path("whole/metrics.jsonl")).unwrap();
    assert!(metrics.contains("eval_accuracy") && metrics.contains("eval_macro_f1"), "{metrics}");
}

#[test]
fn a_language_model_becomes_a_classifier_with_a_head_of_its_own() {
    let place = Place::new();
    place.write("train.jsonl", &jsonl(&reviews(40, 5)));
    place.write("held-out.jsonl", &jsonl(&reviews(16, 6)));
    for name in ["llama", "llama_tied_rope3", "gpt2"] {
        let model = fixture(name);
        let run = format!("run-{name}");
        config(&place, "run.toml", &model, &run, "r = 4", "max_steps = 4\nlearning_rate = 1e-2");
        place.lora("train run.toml --quiet").exits(0);
        let shown = model.to_str().unwrap();
        place.lora(&format!("merge --model {shown} --adapter {run} --output merged-{name} --verify")).exits(0);
        let predict = |model: &str| {
            let line = format!("classify {model} --texts held-out.jsonl --json");
            place.lora(&line).exits(0).json()
        };
        let (adapted, merged) =
            (predict(&format!("--model {shown} --adapter {run}")), predict(&format!("--model merged-{name}")));
        for (a, b) in adapted.as_array().unwrap().iter().zip(merged.as_array().unwrap()) {
            let p = |v: &Value| v["probabilities"]["negative"].as_f64().unwrap();
            assert!((p(a) - p(b)).abs() < MERGED, "{name}: {a} {b}");
        }
        let text = std::fs::read_to_string(place.path(&format!("merged-{name}/config.json"))).unwrap();
        assert!(text.contains("ForSequenceClassification"), "{text}");
        let export = format!("export gguf --model {shown} --adapter {run} --output x.gguf");
        place.lora(&export).exits(2).says(&["a classifier has no language head"]);
    }
}

#[test]
fn several_labels_and_numbers_are_trained_from_what_the_data_says() {
    let place = Place::new();
    let model = fresh_encoder(&place, "base");
    let multi = "{\"text\": \"the film was dull and cold\", \"label\": [\"dull\", \"cold\"]}\n\
                 {\"text\": \"the film was dull\", \"label\": [\"dull\"]}\n{\"text\": \"the film was perfect\", \"label\": []}\n\
                 {\"text\": \"the film was cold\", \"label\": [\"cold\"]}\n";
    place.write("train.jsonl", multi);
    place.write("held-out.jsonl", multi);
    let train = "max_steps = 60\nlearning_rate = 1e-2";
    // The base's config leaves its labels without names, so the data names them.
    config(&place, "multi.toml", &model, "multi", "r = 8", train);
    let report = place.lora("train multi.toml --quiet --json").exits(0).json();
    assert_eq!(report["eval_after"]["classes"]["accuracy"], json!(1.0), "{report}");
    let found = place
        .lora_words(&[
            "classify",
            "--model",
            "base",
            "--adapter",
            "multi",
            "--text",
            "the film was dull and cold",
            "--json",
        ])
        .exits(0)
        .json();
    assert_eq!(found["label"], json!(["cold", "dull"]));

    let numbers = "{\"text\": \"the film was perfect\", \"label\": 2.5}\n{\"text\": \"the film was dull\", \"label\": -1.0}\n\
                   {\"text\": \"the film was bright\", \"label\": 1.5}\n";
    place.write("train.jsonl", numbers);
    place.write("held-out.jsonl", numbers);
    config(&place, "numbers.toml", &model, "numbers", "r = 8", train);
    let report = place.lora("train numbers.toml --quiet --json").exits(0).json();
    let mse = |when: &str| report[when]["classes"]["mse"].as_f64().unwrap();
    assert!(mse("eval_after") < 0.1 * mse("eval_before"), "{report}");
    let found = place.lora("classify --model base --adapter numbers --texts train.jsonl --json").exits(0).json();
    assert!(found[0]["value"].is_f64() && found[0].get("label").is_none(), "{found}");
    let out = place.lora("eval --model base --adapter numbers --data train.jsonl").exits(0).stdout;
    assert!(out.contains("mse") && out.contains("pearson r"), "{out}");
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_loaded() {
    let place = Place::new();
    let bert = fixture("classification/bert");
    let shown = bert.to_str().unwrap();
    for line in [
        format!("generate --model {shown} --prompt hi"),
        format!("eval --model {shown} --data train.jsonl --format text"),
        format!("classify --model {} --text hi", fixture("llama").display()),
    ] {
        let done = place.lora(&line).exits(2);
        assert!(
            ["lora classify", "SEQ_CLS", "has no labels"].iter().any(|w| done.stderr.contains(w)),
            "{line}: {done:?}"
        );
    }
    place.write("held-out.jsonl", "{\"text\": \"a\", \"label\": \"neutral\"}\n");
    for (data, words) in [
        ("{\"text\": \"a\", \"label\": \"good\"}\n", &["train.jsonl:1", "good", "negative"][..]),
        ("{\"text\": \"a\", \"label\": 3}\n", &["train.jsonl:1", "0 to 2"]),
        ("{\"text\": \"a\"}\n", &["train.jsonl:1", "label"]),
        ("{\"text\": \"a\", \"label\": [1]}\n", &["train.jsonl:1", "label"]),
    ] {
        place.write("train.jsonl", data);
        config(&place, "run.toml", &bert, "run", "", "max_steps = 1");
        place.lora("train run.toml").exits(2).says(words);
    }
    // A model for text is trained on text unless it is said otherwise, and an encoder never.
    place.write("train.jsonl", "{\"text\": \"a\", \"label\": \"negative\"}\n");
    place.lora(&format!("train --model {shown} --data train.jsonl --output out")).exits(2).says(&["SEQ_CLS"]);
    assert!(!place.path("out").exists() && !place.path("run").exists());
}

#[test]
fn the_example_of_the_guide_runs() {
    let place = Place::new();
    let guide = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/guide/classification.md");
    let guide = std::fs::read_to_string(guide).unwrap();
    let block = |kind: &str| {
        let start = guide.find(&format!("```{kind}\n")).unwrap() + kind.len() + 4;
        guide[start..].split("```").next().unwrap().to_string()
    };
    let records = block("json");
    for name in ["train.jsonl", "held-out.jsonl", "many.jsonl"] {
        place.write(name, &records);
    }
    place.write("reviews.toml", &block("toml"));
    fresh_encoder(&place, "models/bert");
    let mut verbs = 0;
    for line in block("sh").lines() {
        // The text stands in quotes; every other word is one.
        let mut parts = line.trim_start_matches("lora ").split('"');
        let (before, text, after) = (parts.next().unwrap(), parts.next(), parts.next().unwrap_or(""));
        let words = before.split_whitespace().chain(text).chain(after.split_whitespace()).collect::<Vec<_>>();
        place.lora_words(&words).exits(0);
        verbs += 1;
    }
    assert_eq!(verbs, 5);
}
