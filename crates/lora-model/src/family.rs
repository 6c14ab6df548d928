//! From a checkpoint's `config.json` to a [`ModelConfig`]: the settings that differ between families.

use crate::config::{Activation, ExpertsConfig, ModelConfig};
use crate::error::{Error, Result};
use crate::layout::{self, Layout};
use lora_format::{HfConfig, LabelSettings, names_classifier};
use std::path::Path;

/// The families that run, as `model_type` spells them, and their modules.
const TABLE: [(&str, &Layout); 15] = [
    ("llama", &layout::LLAMA),
    ("mistral", &layout::LLAMA),
    ("qwen2", &layout::LLAMA),
    ("qwen3", &layout::QWEN3),
    ("qwen3_moe", &layout::QWEN3_MOE),
    ("mixtral", &layout::MIXTRAL),
    ("gemma2", &layout::GEMMA2),
    ("gemma3_text", &layout::GEMMA3),
    ("phi3", &layout::PHI3),
    ("granite", &layout::GRANITE),
    ("olmo2", &layout::OLMO2),
    ("gpt2", &layout::GPT2),
    ("gpt_neox", &layout::GPT_NEOX),
    ("bert", &layout::BERT),
    ("roberta", &layout::ROBERTA),
];

/// The families that run, as `model_type` spells them.
pub fn families() -> Vec<&'static str> {
    TABLE.iter().map(|(name, _)| *name).collect()
}

impl ModelConfig {
    /// Takes what the model needs from a config; `file` is named in errors.
    ///
    /// # Errors
    /// As [`ModelConfig::read`].
    pub fn from_hf(hf: &HfConfig, file: &Path) -> Result<Self> {
        let family = hf.model_type.as_str();
        let Some((_, layout)) = TABLE.iter().find(|(name, _)| *name == family) else {
            let supported = families().join(", ");
            return Err(Error::Family { file: file.into(), model_type: family.into(), supported });
        };
        // Every such number is a divisor, a cap or a factor of all that follows.
        let above_zero = |key: &'static str| -> Result<Option<f64>> {
            match hf.float(file, key)? {
                Some(x) if x <= 0.0 => {
                    let (value, reason) = (x.to_string(), "it must be above 0");
                    Err(Error::Config { file: file.into(), field: key, value, reason })
                }
                given => Ok(given),
            }
        };
        let float = |key: &'static str, default: f64| -> Result<f64> { Ok(above_zero(key)?.unwrap_or(default)) };
        let flag = |key: &str, default: bool| -> Result<bool> { Ok(hf.bool(file, key)?.unwrap_or(default)) };
        let gemma = family.starts_with("gemma");
        let layer_norm = layout.norm == layout::NormKind::Layer;
        let usual = 1.0 / (hf.head_dim as f64).sqrt();
        let scale = match family {
            "granite" => float("attention_multiplier", 1.0)?,
            "gpt2" if !flag("scale_attn_weights", true)? => 1.0,
            _ if gemma => 1.0 / float("query_pre_attn_scalar", 256.0)?.sqrt(),
            _ => usual,
        };
        let by_layer = family == "gpt2" && flag("scale_attn_by_inverse_layer_idx", false)?;
        let scale_of = |i: i64| if by_layer { scale / (i + 1) as f64 } else { scale };
        let cap = |key: &'static str, default: f64| -> Result<Option<f64>> {
            let default = Some(default).filter(|_| family == "gemma2" && !hf.raw.contains_key(key));
            Ok(above_zero(key)?.or(default).filter(|_| gemma))
        };
        let attention_bias = match family {
            "qwen2" | "gpt2" | "bert" | "roberta" => true,
            "gpt_neox" => flag("attention_bias", true)?,
            "mistral" | "mixtral" | "phi3" => false,
            _ => hf.attention_bias,
        };
        if layout.encoder {
            check_encoder(hf, file)?;
        }
        let position_offset = if family == "roberta" { hf.pad_token_id.unwrap_or(1) + 1 } else { 0 };
        if position_offset >= hf.max_position_embeddings {
            let (value, reason) = (hf.max_position_embeddings.to_string(), "it must be more than pad_token_id + 1");
            return Err(Error::Config { file: file.into(), field: "max_position_embeddings", value, reason });
        }
        let model = Self {
            family: family.into(),
            layout,
            vocab_size: hf.vocab_size,
            hidden_size: hf.hidden_size,
            intermediate_size: hf.intermediate_size,
            num_hidden_layers: hf.num_hidden_layers,
            num_attention_heads: hf.num_attention_heads,
            num_key_value_heads: hf.num_key_value_heads,
            head_dim: hf.head_dim,
            norm_eps: hf.rms_norm_eps,
            qkv_bias: attention_bias,
            o_bias: attention_bias && family != "qwen2",
            mlp_bias: layer_norm || (["llama", "granite"].contains(&family) && hf.mlp_bias),
            activation: activation(hf, file)?,
            experts: experts(hf, file)?,
            parallel: family == "gpt_neox" && flag("use_parallel_residual", true)?,
            tie_word_embeddings: hf.tie_word_embeddings,
            windows: windows(hf),
            attention_scales: (0..hf.num_hidden_layers).map(scale_of).collect(),
            attention_softcap: cap("attn_logit_softcapping", 50.0)?,
            logits_softcap: cap("final_logit_softcapping", 30.0)?,
            embedding_scale: match family {
                "granite" => float("embedding_multiplier", 1.0)?,
                _ if gemma => (hf.hidden_size as f64).sqrt(),
                _ => 1.0,
            },
            residual_scale: if family == "granite" { float("residual_multiplier", 1.0)? } else { 1.0 },
            logits_scale: if family == "granite" { 1.0 / float("logits_scaling", 1.0)? } else { 1.0 },
            max_position_embeddings: hf.max_position_embeddings - position_offset,
            position_offset,
            type_vocab_size: hf.int(file, "type_vocab_size", 1)?.unwrap_or(2),
            labels: None,
            rope: hf.rope.clone(),
            rope_local: hf.rope_local.clone(),
            initializer_range: hf.initializer_range,
            bos_token_id: hf.bos_token_id,
            eos_token_ids: hf.eos_token_ids.clone(),
            dtype: hf.dtype.clone(),
        };
        if !layout.encoder && !names_classifier(&hf.architectures) {
            return Ok(model);
        }
        Ok(model.for_classes(LabelSettings::of(file, &hf.raw)?.or_default()))
    }
}

/// Forms of BERT that would be computed wrongly.
fn check_encoder(hf: &HfConfig, file: &Path) -> Result<()> {
    let refuse = |field, value: String, reason| Err(Error::Config { file: file.into(), field, value, reason });
    for (field, reason) in [
        ("is_decoder", "an encoder that was made a decoder is not supported"),
        ("add_cross_attention", "attention to another model's states is not supported"),
    ] {
        if hf.bool(file, field)? == Some(true) {
            return refuse(field, "true".into(), reason);
        }
    }
    match hf.raw.get("position_embedding_type").and_then(|v| v.as_str()) {
        None | Some("absolute") => Ok(()),
        Some(other) => refuse("position_embedding_type", other.into(), "only absolute positions are supported"),
    }
}

fn activation(hf: &HfConfig, file: &Path) -> Result<Activation> {
    match hf.hidden_act.as_str() {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        other => Err(Error::Config {
            file: file.into(),
            field: "hidden_act",
            value: other.into(),
            reason: "supported are silu, gelu, gelu_new and gelu_pytorch_tanh",
        }),
    }
}

/// How many keys each block sees.
fn windows(hf: &HfConfig) -> Vec<Option<i64>> {
    let (family, layers) = (hf.model_type.as_str(), hf.num_hidden_layers);
    let window = hf.sliding_window;
    let slides = |i: i64| match &hf.layer_types {
        Some(types) => types.get(i as usize).is_some_and(|t| t == "sliding_attention"),
        None => match family {
            "mistral" | "mixtral" | "phi3" => true,
            "qwen2" | "qwen3" | "qwen3_moe" => hf.use_sliding_window && i >= hf.max_window_layers,
            _ => false,
        },
    };
    (0..layers).map(|i| window.filter(|_| slides(i))).collect()
}

fn experts(hf: &HfConfig, file: &Path) -> Result<Option<ExpertsConfig>> {
    let int = |key: &str, default: i64| -> Result<i64> { Ok(hf.int(file, key, 1)?.unwrap_or(default)) };
    let all = || vec![true; usize::try_from(hf.num_hidden_layers).unwrap_or(0)];
    let config = match hf.model_type.as_str() {
        "mixtral" => ExpertsConfig {
            count: int("num_local_experts", 8)?,
            per_token: int("num_experts_per_tok", 2)?,
            intermediate_size: hf.intermediate_size,
            normalised: true,
            sparse: all(),
        },
        "qwen3_moe" => {
            let (step, dense) = (int("decoder_sparse_step", 1)?, hf.ints(file, "mlp_only_layers")?.unwrap_or_default());
            let sparse = |i: i64| !dense.contains(&i) && (i + 1) % step == 0;
            ExpertsConfig {
                count: int("num_experts", int("num_local_experts", 128)?)?,
                per_token: int("num_experts_per_tok", 8)?,
                intermediate_size: int("moe_intermediate_size", 768)?,
                normalised: hf.bool(file, "norm_topk_prob")?.unwrap_or(false),
                sparse: (0..hf.num_hidden_layers).map(sparse).collect(),
            }
        }
        _ => return Ok(None),
    };
    if config.per_token > config.count {
        return Err(Error::Config {
            file: file.into(),
            field: "num_experts_per_tok",
            value: config.per_token.to_string(),
            reason: "it must be at most the number of experts",
        });
    }
    Ok(Some(config))
}
