//! I5, I6: a base whose config and weights disagree, and configs that ask for the impossible.

use crate::lab::{LORA, copy};
use crate::report::Row;
use e2e::{Done, fixtures, run};
use std::path::Path;

/// Trains on a copy of the base with these fields of its config changed.
fn with_config(base: &str, changes: &[(&str, serde_json::Value)]) -> Done {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    copy(&fixtures().join(base), &model);
    let path = model.join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    changes.iter().for_each(|(key, value)| config[*key] = value.clone());
    std::fs::write(&path, config.to_string()).unwrap();
    std::fs::write(dir.path().join("train.jsonl"), e2e::small_dataset()).unwrap();
    let text = |path: &Path| path.display().to_string();
    let output = dir.path().join("run");
    let done = run(
        LORA,
        &[
            "train",
            "--model",
            &text(&model),
            "--data",
            &text(&dir.path().join("train.jsonl")),
            "--output",
            &text(&output),
        ],
    );
    assert!(!output.exists(), "the folder of the run was made");
    done.exits(2)
}

#[test]
fn i05_a_config_against_its_weights() {
    let row = Row::new("I5");
    // A field, another value, and some of the mismatches that must be listed.
    let cases: [(&str, &str, serde_json::Value, &[&str]); 9] = [
        ("llama", "num_hidden_layers", 1.into(), &["model.layers.1.", "is not part of"]),
        ("llama", "num_hidden_layers", 3.into(), &["model.layers.2.self_attn.q_proj.weight", "is missing"]),
        ("llama", "hidden_size", 64.into(), &["embed_tokens.weight", "[320, 32]", "[320, 64]", "and"]),
        ("llama", "head_dim", 16.into(), &["q_proj.weight", "k_proj.weight", "o_proj.weight"]),
        (
            "llama",
            "num_key_value_heads",
            4.into(),
            &["layers.0.self_attn.k_proj.weight", "layers.1.self_attn.v_proj.weight", "[16, 32]", "[32, 32]"],
        ),
        ("llama", "vocab_size", 400.into(), &["embed_tokens.weight", "lm_head.weight", "[400, 32]"]),
        ("llama", "intermediate_size", 96.into(), &["mlp.up_proj.weight", "mlp.down_proj.weight", "[96, 32]"]),
        ("llama_tied_rope3", "tie_word_embeddings", false.into(), &["lm_head.weight", "is missing"]),
        ("qwen2", "model_type", "llama".into(), &["q_proj.bias"]),
    ];
    let count = cases.len();
    for (base, key, value, words) in cases {
        let done = with_config(base, &[(key, value)]);
        done.says(&[&["model"], words].concat());
    }
    row.held(&format!("{count} of {count} refused before a weight is read or a folder made, the tensors listed"));
}

#[test]
fn i06_pretended_giants() {
    let row = Row::new("I6");
    let giant = serde_json::json!(1u64 << 40);
    let keys = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ];
    for key in keys {
        with_config("llama", &[(key, giant.clone())]).says(&["config.json", key]);
    }
    // Each within its bounds, and together beyond any address.
    let large = serde_json::json!(i32::MAX);
    with_config("llama", &[("vocab_size", large.clone()), ("hidden_size", large.clone()), ("head_dim", 8.into())])
        .says(&["config.json"]);
    row.held(&format!("{} of {0} refused from the config alone", keys.len() + 1));
}
