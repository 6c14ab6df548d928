//! A Hugging Face checkpoint folder.

use crate::out;
use anyhow::Result;
use lora_data::Tokenizer;
use lora_format::{Checkpoint, is_packed, is_part, packed_weight, read_hf_config, read_json_object};
use lora_model::ModelConfig;
use lora_torch::kind_name;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What is known of a checkpoint.
#[derive(Serialize)]
struct Found {
    kind: &'static str,
    path: PathBuf,
    model_type: String,
    /// Why it cannot be trained here; absent where it can.
    #[serde(skip_serializing_if = "Option::is_none")]
    not_trainable: Option<String>,
    parameters: u64,
    bytes: u64,
    shards: usize,
    /// Elements by dtype, or by the form in which they are packed.
    dtypes: BTreeMap<&'static str, u64>,
    /// Absent where the config is of a family that is laid out otherwise.
    #[serde(flatten)]
    sizes: Option<Sizes>,
    /// What a classifier tells apart; absent for a language model.
    #[serde(skip_serializing_if = "Option::is_none")]
    labels: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem_type: Option<&'static str>,
    tokenizer: String,
    chat_template: bool,
}

/// What the config says of the model.
#[derive(Serialize)]
struct Sizes {
    layers: i64,
    hidden_size: i64,
    vocab_size: i64,
    max_position_embeddings: i64,
    tie_word_embeddings: bool,
}

/// Shows a checkpoint. One of a family that cannot be trained here is shown as far as it is understood.
///
/// # Errors
/// A config that is no JSON object, or weights that are damaged.
pub(super) fn show(path: &Path, as_json: bool) -> Result<()> {
    let raw = read_json_object(&path.join("config.json"))?;
    let model_type = raw.get("model_type").and_then(Value::as_str).unwrap_or("not named").to_string();
    let sizes = read_hf_config(path).ok().map(|c| Sizes {
        layers: c.num_hidden_layers,
        hidden_size: c.hidden_size,
        vocab_size: c.vocab_size,
        max_position_embeddings: c.max_position_embeddings,
        tie_word_embeddings: c.tie_word_embeddings,
    });
    let weights = Checkpoint::open(path)?;
    let mut dtypes = BTreeMap::new();
    for name in weights.names() {
        let (form, shape) = if is_packed(&weights, name) {
            let packed = packed_weight(&weights, name)?;
            (packed.name(), packed.shape.to_vec())
        } else if is_part(name) {
            continue;
        } else {
            let info = weights.info(name)?;
            (kind_name(info.kind), info.shape.clone())
        };
        *dtypes.entry(form).or_insert(0) += shape.iter().product::<i64>().unsigned_abs();
    }
    let tokenizer = Tokenizer::load(path);
    let config = ModelConfig::read(path);
    let labels = config.as_ref().ok().and_then(|c| c.labels.clone());
    let found = Found {
        kind: "checkpoint",
        path: path.to_path_buf(),
        model_type,
        not_trainable: config.err().map(|e| e.to_string()),
        parameters: dtypes.values().sum(),
        bytes: weights.total_bytes(),
        shards: weights.shards().len(),
        dtypes,
        sizes,
        problem_type: labels.as_ref().map(|l| l.problem.name()),
        labels: labels.map(|l| l.names),
        chat_template: tokenizer.as_ref().is_ok_and(|t| t.template().is_some()),
        tokenizer: tokenizer.map_or_else(|e| e.to_string(), |t| format!("{} tokens", t.vocab_size())),
    };
    if as_json {
        return out::json(&found);
    }
    let dtypes: Vec<String> = found.dtypes.iter().map(|(name, n)| format!("{} {name}", out::count(*n))).collect();
    out::line(format!("checkpoint  {}", path.display()))?;
    out::line(format!("family      {}", found.model_type))?;
    out::line(format!("parameters  {}: {}", out::count(found.parameters), dtypes.join(", ")))?;
    out::line(format!(
        "weights     {} in {} file{}",
        out::bytes(found.bytes),
        found.shards,
        if found.shards == 1 { "" } else { "s" }
    ))?;
    if let Some(c) = &found.sizes {
        let tied = if c.tie_word_embeddings { ", head tied to the embedding" } else { "" };
        out::line(format!(
            "layers      {}, hidden {}, positions {}",
            c.layers, c.hidden_size, c.max_position_embeddings
        ))?;
        out::line(format!("vocabulary  {}{tied}", c.vocab_size))?;
    }
    if let (Some(names), Some(problem)) = (&found.labels, found.problem_type) {
        out::line(format!("labels      {} ({problem})", names.join(", ")))?;
    }
    out::line(format!(
        "tokenizer   {}, {} chat template",
        found.tokenizer,
        if found.chat_template { "with" } else { "without" }
    ))?;
    out::line(format!(
        "trainable   {}",
        found.not_trainable.as_ref().map_or_else(|| "yes".into(), |why| format!("no: {why}"))
    ))
}
