//! One model, described by configuration: what differs between families is a field here and not another model.

use crate::error::{Error, Result};
use crate::layout::{Layout, MlpLayout};
use lora_format::{Labels, RopeParameters, read_hf_config};
use std::path::Path;

/// What an MLP does between its layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`
    Silu,
    /// GELU by the error function (Hendrycks & Gimpel, 2016).
    Gelu,
    /// GELU by the hyperbolic tangent.
    GeluTanh,
}

/// A sparse MLP: each token goes through the experts that its router ranks first.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertsConfig {
    /// Experts of a block.
    pub count: i64,
    /// Experts that a token goes through.
    pub per_token: i64,
    /// Width of an expert.
    pub intermediate_size: i64,
    /// The weights of a token's experts sum to one.
    pub normalised: bool,
    /// For each block: whether its MLP is sparse.
    pub sparse: Vec<bool>,
}

/// A model of blocks of attention and MLP beside a residual stream.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `model_type` of the checkpoint.
    pub family: String,
    /// The modules, and how they are put together.
    pub layout: &'static Layout,
    /// Rows of the embedding.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width of the MLP.
    pub intermediate_size: i64,
    /// Number of blocks.
    pub num_hidden_layers: i64,
    /// Query heads.
    pub num_attention_heads: i64,
    /// Key and value heads.
    pub num_key_value_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Epsilon of every norm.
    pub norm_eps: f64,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on o.
    pub o_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// What the MLP does between its layers.
    pub activation: Activation,
    /// Experts, in families that have them.
    pub experts: Option<ExpertsConfig>,
    /// The MLP reads what the attention reads, and both are added at once (GPT-NeoX).
    pub parallel: bool,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// For each block: how many keys a query sees, itself included; `None` is all before it.
    pub windows: Vec<Option<i64>>,
    /// For each block: the factor on the scores of attention.
    pub attention_scales: Vec<f64>,
    /// Cap of the scores of attention (Gemma 2).
    pub attention_softcap: Option<f64>,
    /// Cap of the logits (Gemma 2).
    pub logits_softcap: Option<f64>,
    /// Factor on the embedding (Gemma, Granite).
    pub embedding_scale: f64,
    /// Factor on what a block adds to the residual stream (Granite).
    pub residual_scale: f64,
    /// Factor on the logits (Granite).
    pub logits_scale: f64,
    /// Positions that the model was made for; with learned positions, all there are.
    pub max_position_embeddings: i64,
    /// The row of the table of positions that the first token of a text takes (RoBERTa begins after its padding).
    pub position_offset: i64,
    /// Rows of the table of token types, in families that have one.
    pub type_vocab_size: i64,
    /// What a classifier tells apart; absent in a language model.
    pub labels: Option<Labels>,
    /// Rotary positions.
    pub rope: RopeParameters,
    /// Rotary positions of blocks with a window, where they have their own (Gemma 3).
    pub rope_local: Option<RopeParameters>,
    /// Standard deviation of freshly made weights.
    pub initializer_range: f64,
    /// Start of text.
    pub bos_token_id: Option<i64>,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<i64>,
    /// dtype of the checkpoint, as it names it.
    pub dtype: Option<String>,
}

impl ModelConfig {
    /// Reads the config of a checkpoint folder.
    ///
    /// # Errors
    /// [`crate::Error::Family`] or [`crate::Error::Config`] for what is not supported, [`crate::Error::Format`] for a file
    /// that cannot be read.
    pub fn read(dir: &Path) -> Result<Self> {
        Self::from_hf(&read_hf_config(dir)?, &dir.join("config.json"))
    }

    /// The same model with a classification head for these labels in place of whatever head it has.
    #[must_use]
    pub fn for_classes(self, labels: Labels) -> Self {
        let (logits_softcap, logits_scale) = (None, 1.0);
        Self { labels: Some(labels), tie_word_embeddings: false, logits_softcap, logits_scale, ..self }
    }

    /// Refuses a classifier where a language model is needed to `purpose`.
    ///
    /// # Errors
    /// [`crate::Error::Classifier`].
    pub fn check_language(&self, purpose: &'static str) -> Result<()> {
        match &self.labels {
            None => Ok(()),
            Some(labels) => Err(Error::Classifier { family: self.family.clone(), labels: labels.len(), purpose }),
        }
    }

    /// Weights that a token is multiplied with in the MLP of block `i`.
    pub fn mlp_weights(&self, i: usize) -> i64 {
        let matrices = if matches!(self.layout.mlp, MlpLayout::Plain(_)) { 2 } else { 3 };
        match &self.experts {
            Some(e) if self.is_sparse(i) => self.hidden_size * (3 * e.intermediate_size * e.per_token + e.count),
            _ => matrices * self.hidden_size * self.intermediate_size,
        }
    }

    /// Values of a token that the MLP of block `i` keeps for its backward pass, besides its input.
    pub fn mlp_kept(&self, i: usize) -> i64 {
        let values = if matches!(self.layout.mlp, MlpLayout::Plain(_)) { 2 } else { 3 };
        match &self.experts {
            Some(e) if self.is_sparse(i) => e.per_token * (3 * e.intermediate_size + 2 * self.hidden_size),
            _ => values * self.intermediate_size,
        }
    }

    /// Of those, what its last layer reads: what gates or the activation give.
    pub fn mlp_given(&self, i: usize) -> i64 {
        match &self.experts {
            Some(e) if self.is_sparse(i) => e.per_token * e.intermediate_size,
            _ => self.intermediate_size,
        }
    }

    /// Whether the MLP of block `i` has experts.
    pub fn is_sparse(&self, i: usize) -> bool {
        self.experts.as_ref().is_some_and(|e| e.sparse.get(i).copied().unwrap_or(false))
    }
}
