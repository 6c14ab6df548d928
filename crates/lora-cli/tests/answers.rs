//! Evaluation by what a model writes, through the binary: a model that has learnt its answers writes them.
#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

mod common;

use common::{Place, fixture};
use serde_json::Value;

/// Two answers to each of four prompts; which of them is learnt does not matter, since both are right.
fn place(train: &str) -> Place {
    let place = Place::new();
    let row = |i: usize| {
        let prompt = ["one", "two", "red", "blue"][i % 4];
        let answer: Vec<&str> = ["the", "user", "is", "a", "weight"].into_iter().cycle().skip(i % 4).take(4).collect();
        format!("{{\"prompt\": \"say {prompt}: \", \"completion\": \"{}\"}}\n", answer.join(" "))
    };
    place.write("learnt.jsonl", &(0..8).map(row).collect::<String>());
    let other = "{\"prompt\": \"say one: \", \"completion\": \"sentence matrices\"}\n";
    place.write("asked.jsonl", &((0..4).map(row).collect::<String>() + other));
    let text = format!(
        "output_dir = \"run\"\n[model]\npath = {:?}\ndevice = \"cpu\"\nthreads = 1\n[lora]\nr = 8\n[data]\ntrain = \"learnt.jsonl\"\n\
         eval = \"asked.jsonl\"\nmax_length = 64\n[train]\nper_device_train_batch_size = 4\nlearning_rate = 2e-2\n\
         lr_scheduler_type = \"constant\"\npredict_with_generate = true\ngeneration_max_new_tokens = 24\n{train}\n",
        fixture("llama")
    );
    place.write("c.toml", &text);
    place
}

fn evaluations(place: &Place) -> Vec<Value> {
    let text = std::fs::read_to_string(place.path("run/metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line.get("eval_loss").is_some()).collect()
}

#[test]
fn a_model_that_has_learnt_its_answers_writes_them() {
    let place = place(
        "max_steps = 120\neval_steps = 40\nmetric_for_best_model = \"eval_exact_match\"\nload_best_model_at_end = true",
    );
    let done = place.lora("train c.toml --json").exits(0);
    let (report, evaluations) = (done.json(), evaluations(&place));
    let number = |value: &Value| value.as_f64().unwrap();
    let (first, last) = (&evaluations[0], &evaluations[evaluations.len() - 1]);
    assert!(number(&first["eval_exact_match"]) == 0.0 && number(&first["eval_bleu"]) < 50.0, "{first}");
    assert_eq!(number(&last["eval_exact_match"]), 1.0, "{last}");
    for (key, most) in [("eval_bleu", 100.0), ("eval_chrf", 100.0), ("eval_rouge_l", 1.0)] {
        const F64_TOLERANCE: f64 = 1e-9;
        assert!((number(&last[key]) - most).abs() < F64_TOLERANCE, "{key}: {last}");
    }
    // Token by token: a prompt's other answer is not what the model has learnt.
    assert!(number(&last["eval_accuracy"]) > 0.7 && number(&last["eval_accuracy"]) < 1.0, "{last}");
    assert_eq!(number(&last["eval_perplexity"]), number(&last["eval_loss"]).exp());
    assert_eq!(report["eval_after"]["generated"]["texts"], 4, "equal prompts are one");
    assert!(done.stderr.contains("ROUGE-L"), "{}", done.stderr);

    // The same from the result, by the other verb.
    let model = fixture("llama");
    let eval = format!("eval --model {} --adapter run --data asked.jsonl --threads 1", model.display());
    let found = place.lora(&format!("{eval} --generate --max-new-tokens 24 --json")).exits(0).json();
    let (ours, theirs) = (&found["generated"], &report["eval_after"]["generated"]);
    assert_eq!((&ours["exact_match"], &ours["texts"]), (&theirs["exact_match"], &theirs["texts"]));
    let shown = place.lora(&format!("{eval} --generate --num-samples 2 --max-new-tokens 24")).exits(0).stdout;
    assert!(shown.contains("BLEU 100.00") && shown.contains("to 2 prompts"), "{shown}");
    assert!(place.lora(&format!("{eval} --json")).exits(0).json().get("generated").is_none());
    place.lora(&format!("{eval} --num-samples 2")).exits(2).says(&["--generate"]);
}

#[test]
fn what_cannot_be_answered_is_refused_before_the_model_is_loaded() {
    let place = place("max_steps = 2");
    place
        .lora("train c.toml --set data.train_on_prompt=true")
        .exits(2)
        .says(&["predict_with_generate", "train_on_prompt"]);
    place.write("asked.jsonl", "{\"input_ids\": [5, 6, 7], \"labels\": [5, 6, 7]}\n");
    place.lora("train c.toml").exits(2).says(&["predict_with_generate", "none of the 1", "prompt"]);
    assert!(!place.path("run/metrics.jsonl").exists());
}
