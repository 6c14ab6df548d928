use std::collections::BTreeSet;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

use super::*;

/// Of the text that the committed base was trained on.
const CORPUS_SHA256: &str = "0c34fb5c624d516cd46d874add7ac2b0db42c62d396588b0237be7c36c59b777";
const MAX_BYTES: u64 = 4_000_000;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("demo")
}

fn records(files: &BTreeMap<String, Vec<u8>>, name: &str) -> Vec<serde_json::Value> {
    let text = std::str::from_utf8(&files[name]).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn the_committed_files_are_those_of_the_generator() {
    let files = files::files(&files::corpus()).unwrap();
    for (name, bytes) in &files {
        let committed = fs::read(demo().join(name)).unwrap();
        assert!(committed == *bytes, "demo/{name} is not what `cargo xtask demo-base` makes");
    }
}

#[test]
fn the_base_was_trained_on_this_corpus() {
    let file = files::corpus_file(&files::corpus()).unwrap();
    let digest: String = Sha256::digest(&file).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(digest, CORPUS_SHA256, "the prose has changed: run `cargo xtask demo-base` and commit what it makes");
}

#[test]
fn the_sets_are_large_enough_and_apart() {
    let files = files::files(&files::corpus()).unwrap();
    let [train, eval, test] = ["train.jsonl", "eval.jsonl", "test.jsonl"].map(|name| records(&files, name));
    assert!(train.len() >= 1000 && eval.len() >= 100 && test.len() >= 60);
    let prompts = |set: &[serde_json::Value]| -> BTreeSet<String> {
        set.iter().map(|record| record["prompt"].as_str().unwrap().to_owned()).collect()
    };
    let (train, eval, test_prompts) = (prompts(&train), prompts(&eval), prompts(&test));
    assert!(train.is_disjoint(&eval) && train.is_disjoint(&test_prompts) && eval.is_disjoint(&test_prompts));
    for record in &test {
        for slot in record["slots"].as_array().unwrap() {
            assert!(record["completion"].as_str().unwrap().contains(slot.as_str().unwrap()), "{record}");
        }
    }
}

#[test]
fn the_weights_are_those_that_the_config_asks_for() {
    let file = fs::read(demo().join(WEIGHTS)).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(demo().join("base/config.json")).unwrap()).unwrap();
    let size = |key: &str| config[key].as_u64().unwrap() as usize;
    let embedding = tensors.tensor("model.embed_tokens.weight").unwrap();
    assert_eq!(embedding.dtype(), safetensors::Dtype::BF16);
    assert_eq!(embedding.shape(), [size("vocab_size"), size("hidden_size")]);
    let per_layer = 9;
    assert_eq!(tensors.len(), 2 + per_layer * size("num_hidden_layers"));
}

#[test]
fn the_folder_stays_small() {
    let mut open = vec![demo()];
    let mut bytes = 0;
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => open.push(path),
                false => bytes += fs::metadata(path).unwrap().len(),
            }
        }
    }
    assert!((1_000_000..MAX_BYTES).contains(&bytes), "{bytes} bytes");
}
