//! Embedding and head that share one weight.

use lora_format::Checkpoint;
use serde_json::{Map, Value};

/// The tensors of embedding and head in the families' checkpoints.
const PAIRS: [(&str, &str); 4] = [
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
    ("gpt_neox.embed_in.weight", "embed_out.weight"),
    ("model.language_model.embed_tokens.weight", "lm_head.weight"),
];
/// The key of `config.json` that ties the two.
pub(crate) const TIE_KEY: &str = "tie_word_embeddings";

/// The names of an embedding and of the head that shares its weight.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TiedPair {
    pub(crate) embedding: &'static str,
    pub(crate) head: &'static str,
}

/// The tied pair of a model, if it ties: the config says so, or says nothing and no head is stored.
///
/// A tied checkpoint may store the head all the same; loaders then overwrite it by the embedding.
pub(crate) fn tied_pair(base: &Checkpoint, config: &Map<String, Value>) -> Option<TiedPair> {
    let (embedding, head) = *PAIRS.iter().find(|(embedding, _)| base.contains(embedding))?;
    let tied = match config.get(TIE_KEY).and_then(Value::as_bool) {
        Some(tied) => tied,
        None => !base.contains(head),
    };
    tied.then_some(TiedPair { embedding, head })
}
