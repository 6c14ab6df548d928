//! Model folders: single files, shards, and what is wrong with them.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use lora_format::{Checkpoint, read_hf_config, write_tensors};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

/// A folder with shards of these tensors and this index.
fn sharded(shards: &[(&str, &[&str])], index: &Value) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (file, names) in shards {
        let tensors: Vec<_> =
            names.iter().map(|n| (n.to_string(), Tensor::ones([2], (Kind::Float, Device::Cpu)))).collect();
        write_tensors(&dir.path().join(file), &tensors, &BTreeMap::new()).unwrap();
    }
    fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    dir
}

fn refusal(shards: &[(&str, &[&str])], index: &Value) -> String {
    Checkpoint::open(sharded(shards, index).path()).unwrap_err().to_string()
}

#[test]
fn every_fixture_opens_and_its_config_agrees_with_its_weights() {
    let mut families = 0;
    for entry in fs::read_dir(fixtures()).unwrap() {
        let dir = entry.unwrap().path();
        if !dir.join("config.json").is_file() {
            continue;
        }
        families += 1;
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let bytes: usize = checkpoint.names().map(|n| checkpoint.read(n).unwrap().numel() * 4).sum();
        assert_eq!((bytes as u64, bytes as u64 / 4), (checkpoint.total_bytes(), checkpoint.total_elements()));
        let family = dir.file_name().unwrap().to_str().unwrap().to_string();
        if !["llama", "llama_tied_rope3", "mistral", "qwen2", "qwen3"].contains(&family.as_str()) {
            continue;
        }
        let config = read_hf_config(&dir).unwrap();
        let shape = |name: &str| checkpoint.info(name).unwrap().shape.clone();
        assert_eq!(shape("model.embed_tokens.weight"), [config.vocab_size, config.hidden_size]);
        let heads = |n: i64| vec![n * config.head_dim, config.hidden_size];
        assert_eq!(shape("model.layers.1.self_attn.q_proj.weight"), heads(config.num_attention_heads));
        assert_eq!(shape("model.layers.1.self_attn.k_proj.weight"), heads(config.num_key_value_heads));
        assert_eq!(shape("model.layers.0.mlp.up_proj.weight"), [config.intermediate_size, config.hidden_size]);
        assert!(!checkpoint.contains(&format!("model.layers.{}.input_layernorm.weight", config.num_hidden_layers)));
        assert_eq!((config.eos_token_ids, config.dtype.as_deref()), (vec![2], Some("float32")));
    }
    assert!(families >= 12, "{families}");
}

#[test]
fn shards_are_one_checkpoint() {
    let checkpoint = Checkpoint::open(&fixtures().join("qwen3")).unwrap();
    assert_eq!(checkpoint.shards().len(), 4);
    assert!(checkpoint.index_path().is_some());
    let index: Value = serde_json::from_slice(&fs::read(checkpoint.index_path().unwrap()).unwrap()).unwrap();
    for (name, shard) in index["weight_map"].as_object().unwrap() {
        assert!(checkpoint.shard_of(name).unwrap().path().ends_with(shard.as_str().unwrap()));
    }
    assert_eq!(checkpoint.total_bytes(), index["metadata"]["total_size"].as_u64().unwrap());
}

#[test]
fn faulty_indexes_are_refused() {
    let good = json!({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}});
    let shards: [(&str, &[&str]); 2] = [("1.safetensors", &["a"]), ("2.safetensors", &["b"])];
    assert!(Checkpoint::open(sharded(&shards, &good).path()).is_ok());

    let text = refusal(&shards[..1], &good);
    assert!(text.contains("index.json: shard `2.safetensors`: not in the folder"), "{text}");
    let both: [(&str, &[&str]); 2] = [("1.safetensors", &["a", "b"]), ("2.safetensors", &["b"])];
    let text = refusal(&both, &good);
    assert!(text.contains("shard `2.safetensors`: holds tensor `b`, which `1.safetensors` holds too"), "{text}");
    let empty: [(&str, &[&str]); 2] = [("1.safetensors", &["a"]), ("2.safetensors", &["c"])];
    assert!(refusal(&empty, &good).contains("does not hold tensor `b`"));

    for name in
        ["../1.safetensors", "/etc/passwd", "sub/1.safetensors", "..", "", "1", "C:\\1.safetensors", ".safetensors"]
    {
        let text = refusal(&shards, &json!({"weight_map": {"a": name}}));
        assert!(text.contains(&format!("shard `{name}`: not a plain name")), "{text}");
    }
    assert!(refusal(&shards, &json!({"weight_map": {"a": "pytorch_model-1.bin"}})).contains("pickle"));
    assert!(refusal(&shards, &json!({"weight_map": {"a": 3}})).contains("shard `3`"));
    assert!(refusal(&shards, &json!({"weight_map": []})).contains("`weight_map`"));
    assert!(refusal(&shards, &json!({})).contains("`weight_map` is missing"));
    assert!(refusal(&shards, &json!({"weight_map": {}})).contains("holds no model.safetensors"));

    let dir = sharded(&shards, &good);
    let twice = r#"{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}"#;
    fs::write(dir.path().join("model.safetensors.index.json"), twice).unwrap();
    assert!(Checkpoint::open(dir.path()).unwrap_err().to_string().contains("duplicate key `a`"));
}

#[test]
fn folders_without_usable_weights_say_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Checkpoint::open(dir.path()).unwrap_err().to_string().contains("holds no model.safetensors"));
    fs::write(dir.path().join("pytorch_model.bin"), b"PK\x03\x04").unwrap();
    let text = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(text.contains("pytorch_model.bin: pickle files can run code"), "{text}");
    assert!(Checkpoint::open(&dir.path().join("none")).unwrap_err().to_string().contains("none"));
}
