//! One decoder, described by configuration: what differs between families is a field here and not another model.

use crate::error::{Error, Result};
use lora_format::{HfConfig, RopeParameters, read_hf_config};
use std::path::Path;

/// The families that run, as `model_type` spells them.
pub const FAMILIES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// A decoder of pre-normalised blocks: grouped-query attention with rotary positions, and a gated MLP.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `model_type` of the checkpoint.
    pub family: String,
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
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on o.
    pub o_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// RMSNorm over each head of q and k before the rotation (Qwen3).
    pub qk_norm: bool,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// For each block: how many keys a query sees, itself included; `None` is all before it.
    pub windows: Vec<Option<i64>>,
    /// Positions that the model was made for.
    pub max_position_embeddings: i64,
    /// Rotary positions.
    pub rope: RopeParameters,
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
    /// [`Error::Family`] or [`Error::Config`] for what is not supported, [`Error::Format`] for a file that cannot be read.
    pub fn read(dir: &Path) -> Result<Self> {
        Self::from_hf(&read_hf_config(dir)?, &dir.join("config.json"))
    }

    /// Takes what the model needs from a config; `file` is named in errors.
    ///
    /// # Errors
    /// As [`ModelConfig::read`].
    pub fn from_hf(hf: &HfConfig, file: &Path) -> Result<Self> {
        let family = hf.model_type.as_str();
        if !FAMILIES.contains(&family) {
            return Err(Error::Family { file: file.into(), model_type: family.into(), supported: FAMILIES.join(", ") });
        }
        if hf.hidden_act != "silu" {
            let (field, value) = ("hidden_act", hf.hidden_act.clone());
            return Err(Error::Config { file: file.into(), field, value, reason: "only \"silu\" is supported" });
        }
        let qwen = family.starts_with("qwen");
        let layers = usize::try_from(hf.num_hidden_layers).unwrap_or(0);
        let windows = match (&hf.layer_types, hf.sliding_window) {
            (_, None) => vec![None; layers],
            (Some(types), window) => types.iter().map(|t| window.filter(|_| t == "sliding_attention")).collect(),
            (None, window) if family == "mistral" => vec![window; layers],
            (None, window) if qwen && hf.use_sliding_window => {
                (0..hf.num_hidden_layers).map(|i| window.filter(|_| i >= hf.max_window_layers)).collect()
            }
            (None, _) => vec![None; layers],
        };
        Ok(Self {
            family: family.into(),
            vocab_size: hf.vocab_size,
            hidden_size: hf.hidden_size,
            intermediate_size: hf.intermediate_size,
            num_hidden_layers: hf.num_hidden_layers,
            num_attention_heads: hf.num_attention_heads,
            num_key_value_heads: hf.num_key_value_heads,
            head_dim: hf.head_dim,
            rms_norm_eps: hf.rms_norm_eps,
            qkv_bias: family == "qwen2" || (family != "mistral" && hf.attention_bias),
            o_bias: (family == "llama" || family == "qwen3") && hf.attention_bias,
            mlp_bias: family == "llama" && hf.mlp_bias,
            qk_norm: family == "qwen3",
            tie_word_embeddings: hf.tie_word_embeddings,
            windows,
            max_position_embeddings: hf.max_position_embeddings,
            rope: hf.rope.clone(),
            initializer_range: hf.initializer_range,
            bos_token_id: hf.bos_token_id,
            eos_token_ids: hf.eos_token_ids.clone(),
            dtype: hf.dtype.clone(),
        })
    }
}
