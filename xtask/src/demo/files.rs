//! Everything of the demo that follows from the seeds: all of it but the weights.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::bpe::{BOS, EOS, PAD, Vocabulary};
use super::prose;
use super::record::{self, Example};
use super::rng::Rng;

/// Pieces of prose that the base learns from.
const PIECES: usize = 34_000;
/// Pieces from which the vocabulary is learnt, beside the records of the training set.
const VOCABULARY_PIECES: usize = 8_000;
const VOCABULARY_SIZE: usize = 1280;

const CORPUS_SEED: u64 = 20;
const TRAIN: (&str, u64, usize) = ("train.jsonl", 21, 1600);
const EVAL: (&str, u64, usize) = ("eval.jsonl", 22, 100);
const TEST: (&str, u64, usize) = ("test.jsonl", 23, 60);

/// The pieces of prose.
pub fn corpus() -> Vec<String> {
    let mut rng = Rng::new(CORPUS_SEED);
    (0..PIECES).map(|_| prose::piece(&mut rng)).collect()
}

/// The corpus in the dataset format `text`.
pub fn corpus_file(corpus: &[String]) -> Result<Vec<u8>> {
    lines(corpus.iter().map(|text| json!({"text": text})))
}

/// The files of `demo`, by their path in it.
pub fn files(corpus: &[String]) -> Result<BTreeMap<String, Vec<u8>>> {
    let [train, eval] = [TRAIN, EVAL].map(|(name, seed, count)| {
        let mut examples = record::examples(seed, count, name != TRAIN.0);
        examples.iter_mut().for_each(|example| example.slots.clear());
        (name, examples)
    });
    let test = (TEST.0, record::examples(TEST.1, TEST.2, true));
    let prompts = train.1.iter().map(|example: &Example| example.prompt.as_str());
    let texts = corpus.iter().take(VOCABULARY_PIECES).map(String::as_str).chain(prompts);
    let vocabulary = Vocabulary::learn(texts, VOCABULARY_SIZE);

    let mut files = BTreeMap::new();
    for (name, examples) in [&train, &eval, &test] {
        files.insert((*name).to_owned(), lines(examples.iter())?);
    }
    let id = |token: &str| vocabulary.id(token).context("a special token is missing from the vocabulary");
    let ids = [id(BOS)?, id(EOS)?, id(PAD)?];
    let json_files = [
        ("base/config.json", config(ids)),
        (
            "base/generation_config.json",
            json!({"bos_token_id": ids[0], "eos_token_id": ids[1], "pad_token_id": ids[2]}),
        ),
        ("base/tokenizer_config.json", tokenizer_config()),
    ];
    for (name, value) in json_files {
        files.insert(name.to_owned(), format!("{value:#}\n").into_bytes());
    }
    files.insert("base/tokenizer.json".to_owned(), format!("{}\n", vocabulary.tokenizer_json()).into_bytes());
    Ok(files)
}

fn lines<T: serde::Serialize>(records: impl Iterator<Item = T>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for record in records {
        serde_json::to_writer(&mut bytes, &record)?;
        bytes.push(b'\n');
    }
    Ok(bytes)
}

/// A Llama of 1.2 million parameters.
fn config([bos, eos, pad]: [usize; 3]) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "dtype": "bfloat16",
        "eos_token_id": eos,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.06,
        "intermediate_size": 352,
        "max_position_embeddings": 512,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 5,
        "num_key_value_heads": 4,
        "pad_token_id": pad,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": true,
        "use_cache": true,
        "vocab_size": VOCABULARY_SIZE,
    })
}

fn tokenizer_config() -> Value {
    json!({
        "bos_token": BOS,
        "clean_up_tokenization_spaces": false,
        "eos_token": EOS,
        "model_max_length": 512,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
}
