//! Bad input through the binary: exit code 2, one message with file, field, value and remedy, and nothing written.
#![allow(clippy::unwrap_used)] // a helper that fails is a failed test

mod common;

use common::{Place, fixture};

/// A run that must be refused: no output folder appears.
#[track_caller]
fn refused(place: &Place, line: &str, words: &[&str]) {
    let done = place.lora(line).exits(2).says(words);
    assert!(done.stderr.starts_with("error: ") || done.stderr.contains("\nerror: "), "{done:#?}");
    assert_eq!(done.stdout, "");
    assert!(!place.path("run").exists(), "the output folder was made");
}

#[test]
fn a_missing_model_folder() {
    let place = Place::new();
    refused(
        &place,
        "train --model nowhere --data train.jsonl --output run",
        &["model nowhere", "no such folder", "config.json"],
    );
    for line in [
        "generate --model nowhere --prompt x",
        "chat --model nowhere",
        "eval --model nowhere --data train.jsonl",
        "merge --model nowhere --adapter a --output run",
        "bench step --model nowhere --batch 1 --seq 4",
        "data preview train.jsonl --model nowhere",
    ] {
        refused(&place, line, &["nowhere", "no such folder"]);
    }
    refused(&place, "inspect nowhere", &["nowhere", "no such file or folder"]);
    let adapter = fixture("llama/adapters/lora");
    refused(
        &place,
        &format!("generate --model {} --prompt x", adapter.display()),
        &["folder of an adapter", "--adapter"],
    );
}

#[test]
fn a_wrong_key_with_the_right_one_named() {
    let place = Place::new();
    let model = fixture("llama");
    place.config("c.toml", &model, "train.jsonl", "", "learning_rat = 1e-3");
    refused(&place, "train c.toml", &["c.toml:", "learning_rat", "did you mean", "learning_rate"]);
    place.config("c.toml", &model, "train.jsonl", "", "");
    refused(&place, "train c.toml --set train.max_step=3", &["--set", "max_step", "max_steps"]);
    refused(&place, "train c.toml --set train.learning_rate=-1", &["--set", "train.learning_rate", "-1"]);
    refused(&place, "plan c.toml --set lora.rr=3", &["lora", "rr"]);
    // Every fault at once.
    refused(&place, "train c.toml --set lora.r=0 --set train.max_steps=0", &["2 faults", "lora.r", "train.max_steps"]);
}

#[test]
fn a_misspelt_target() {
    let place = Place::new();
    place.config("c.toml", &fixture("llama"), "train.jsonl", "target_modules = [\"q_prj\"]", "");
    refused(&place, "train c.toml", &["target_modules", "q_prj", "q_proj"]);
}

#[test]
fn a_config_that_does_not_fit_the_weights() {
    let place = Place::new();
    let model = place.copy_of("llama");
    let path = model.join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"intermediate_size\": 80", "\"intermediate_size\": 96")).unwrap();
    refused(
        &place,
        "train --model model --data train.jsonl --output run",
        &["model", "mlp.up_proj.weight", "[80, 32]", "[96, 32]"],
    );
    refused(&place, "generate --model model --prompt x", &["mlp.up_proj.weight", "[80, 32]", "[96, 32]"]);
}

#[test]
fn a_pickle_instead_of_safetensors() {
    let place = Place::new();
    let model = place.copy_of("llama");
    std::fs::remove_file(model.join("model.safetensors")).unwrap();
    std::fs::write(model.join("pytorch_model.bin"), b"PK\x03\x04").unwrap();
    refused(
        &place,
        "train --model model --data train.jsonl --output run",
        &["pytorch_model.bin", "pickle", "safetensors"],
    );
    refused(&place, "inspect model", &["pytorch_model.bin", "pickle"]);
    std::fs::write(place.path("w.safetensors"), b"\x80\x02}q\x00.").unwrap();
    refused(&place, "inspect w.safetensors", &["w.safetensors"]);
}

#[test]
fn a_broken_line_of_data() {
    let place = Place::new();
    let model = fixture("llama");
    place.write(
        "broken.jsonl",
        "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"a\" \"completion\": \"b\"}\n",
    );
    let line = format!("train --model {} --data broken.jsonl --output run", model.display());
    refused(&place, &line, &["broken.jsonl:2", "JSON"]);
    place.write("broken.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"a\"}\n");
    refused(&place, &line, &["broken.jsonl:2", "completion"]);
    refused(&place, &line.replace("broken.jsonl", "absent.jsonl"), &["absent.jsonl"]);
    let eval = format!("eval --model {} --data broken.jsonl", model.display());
    refused(&place, &eval, &["broken.jsonl:2", "completion"]);
    refused(&place, &format!("{eval} --format alpacca"), &["alpacca", "alpaca"]);
}

#[test]
fn data_without_a_trained_token() {
    let place = Place::new();
    place.write("empty.jsonl", "{\"prompt\": \"a\", \"completion\": \"\"}\n");
    let line = format!("train --model {} --data empty.jsonl --output run", fixture("llama").display());
    refused(&place, &line, &["no record has a token to train", "empty.jsonl:1"]);
}

#[test]
fn an_adapter_of_another_model() {
    let place = Place::new();
    let (model, adapter) = (fixture("llama"), fixture("llama_longrope/adapters/lora"));
    let other = place.copy_of("llama");
    let config = std::fs::read_to_string(other.join("config.json")).unwrap();
    std::fs::write(other.join("config.json"), config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1"))
        .unwrap();
    let own = fixture("llama/adapters/lora");
    refused(
        &place,
        &format!("generate --model model --adapter {} --prompt x", own.display()),
        &["adapters/lora", "model.layers.1"],
    );
    let two = format!(
        "generate --model {0} --adapter {1} --weight 1 --weight 2 --prompt x",
        model.display(),
        adapter.display()
    );
    refused(&place, &two, &["--weight", "2 times", "1 adapter"]);
    refused(&place, &format!("generate --model {} --adapter nowhere --prompt x", model.display()), &["nowhere"]);
}

#[test]
fn numbers_of_a_family_that_make_no_sense() {
    for (family, key, value) in [
        ("gemma2", "query_pre_attn_scalar", "0"),
        ("gemma2", "attn_logit_softcapping", "-1.0"),
        ("gemma2", "final_logit_softcapping", "0.0"),
        ("granite", "logits_scaling", "0"),
        ("mixtral", "num_experts_per_tok", "9"),
    ] {
        let place = Place::new();
        let config = place.copy_of(family).join("config.json");
        let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
        json[key] = serde_json::from_str(value).unwrap();
        std::fs::write(&config, json.to_string()).unwrap();
        refused(&place, "generate --model model --prompt x", &["config.json", key]);
    }
}

#[test]
fn devices_and_files_of_tokens() {
    let place = Place::new();
    let model = fixture("llama");
    refused(&place, &format!("generate --model {} --prompt x --device gpu", model.display()), &["gpu", "cuda:N"]);
    let weights = model.join("model.safetensors");
    let line = format!("logits --model {} --input {} --output out.safetensors", model.display(), weights.display());
    refused(&place, &line, &["model.safetensors", "input_ids"]);
    assert!(!place.path("out.safetensors").exists());
    refused(&place, &format!("generate --model {} --prompts absent.txt", model.display()), &["absent.txt"]);
    refused(&place, &format!("generate --model {} --prompt x --top-p 0", model.display()), &["top_p"]);
    refused(&place, "train --rezume", &["--rezume", "--resume"]);
}
