//! What llama.cpp has to know of a model, and what it has fixed for a family.

use super::arch::{Arch, refuse};
use crate::error::Result;
use lora_format::{GgufValue, HfConfig};
use std::f64::consts::PI;
use std::path::Path;

/// The metadata of a model.
pub(super) struct Metadata {
    pub(super) list: Vec<(String, GgufValue)>,
    /// What llama.cpp does otherwise, though not so that the file would be useless.
    pub(super) notes: Vec<String>,
    pub(super) experts: i64,
}

/// What llama.cpp has to know of the model.
///
/// # Errors
/// [`crate::Error::Gguf`] for a setting that llama.cpp would compute otherwise.
pub(super) fn metadata(arch: &Arch, c: &HfConfig, file: &Path) -> Result<Metadata> {
    let family = Family { arch: arch.name, c, file };
    family.check_fixed()?;
    let mut list = Vec::new();
    let mut notes = Vec::new();
    let mut put = |key: &str, value| list.push((format!("{}.{key}", arch.name), value));
    let whole = |n: i64| GgufValue::U32(u32::try_from(n).unwrap_or(u32::MAX));
    let float = |x: f64| GgufValue::F32(x as f32);
    put("block_count", whole(c.num_hidden_layers));
    put("embedding_length", whole(c.hidden_size));
    put("feed_forward_length", whole(c.intermediate_size));
    put("attention.head_count", whole(c.num_attention_heads));
    put("vocab_size", whole(c.vocab_size));
    let mut context = c.max_position_embeddings;
    if let Some(window) = family.lost_window().filter(|window| *window < context) {
        context = window;
        notes.push(format!(
            "llama.cpp has no window for {}: the context is {window} tokens, within which the window changes nothing",
            c.model_type
        ));
    }
    put("context_length", whole(context));
    let layer_norm = ["gpt2", "gptneox"].contains(&arch.name);
    let norm = if layer_norm { "attention.layer_norm_epsilon" } else { "attention.layer_norm_rms_epsilon" };
    put(norm, float(c.rms_norm_eps));
    if arch.name == "gpt2" {
        return Ok(Metadata { list, notes, experts: 0 });
    }
    put("attention.head_count_kv", whole(c.num_key_value_heads));
    put("attention.key_length", whole(c.head_dim));
    put("attention.value_length", whole(c.head_dim));
    put("rope.dimension_count", whole((c.head_dim as f64 * c.rope.partial_rotary_factor) as i64));
    put("rope.freq_base", float(c.rope.rope_theta));
    let mut experts = 0;
    match arch.name {
        "gemma2" => {
            let cap = |key: &str, default: f64| Ok::<_, crate::Error>(float(c.float(file, key)?.unwrap_or(default)));
            put("attn_logit_softcapping", cap("attn_logit_softcapping", 50.0)?);
            put("final_logit_softcapping", cap("final_logit_softcapping", 30.0)?);
        }
        "granite" => {
            for (key, ours) in [
                ("attention.scale", "attention_multiplier"),
                ("embedding_scale", "embedding_multiplier"),
                ("residual_scale", "residual_multiplier"),
                ("logit_scale", "logits_scaling"),
            ] {
                put(key, float(c.float(file, ours)?.unwrap_or(1.0)));
            }
        }
        "gptneox" => {
            put("use_parallel_residual", GgufValue::Bool(c.bool(file, "use_parallel_residual")?.unwrap_or(true)));
            if c.hidden_act == "gelu" {
                notes.push("llama.cpp computes the GELU by its tanh form: logits are off by about 1e-3".into());
            }
        }
        "llama" if c.model_type == "mixtral" => {
            experts = c.int(file, "num_local_experts", 1)?.unwrap_or(8);
            put("expert_used_count", whole(c.int(file, "num_experts_per_tok", 1)?.unwrap_or(2)));
        }
        "qwen3moe" => {
            experts = match c.int(file, "num_experts", 1)? {
                Some(n) => n,
                None => c.int(file, "num_local_experts", 1)?.unwrap_or(128),
            };
            put("expert_used_count", whole(c.int(file, "num_experts_per_tok", 1)?.unwrap_or(8)));
            let width = c.int(file, "moe_intermediate_size", 1)?.unwrap_or(768);
            put("expert_feed_forward_length", whole(width));
        }
        _ => {}
    }
    if experts > 0 {
        put("expert_count", whole(experts));
    }
    if let Some(window) = c.sliding_window.filter(|_| arch.name.starts_with("gemma")) {
        put("attention.sliding_window", whole(window));
    }
    match (c.rope.rope_type.as_str(), c.rope.factor) {
        ("default", _) => {}
        ("llama3", _) if ["llama", "granite"].contains(&arch.name) => {}
        (kind @ ("linear" | "yarn"), Some(factor)) => {
            put("rope.scaling.type", GgufValue::Text(kind.into()));
            put("rope.scaling.factor", float(factor));
            if let Some(original) = c.rope.original_max_position_embeddings.filter(|_| kind == "yarn") {
                put("rope.scaling.original_context_length", whole(original));
            }
        }
        (kind, _) => return Err(refuse(file, format!("rope type {kind:?} has no GGUF form here"))),
    }
    Ok(Metadata { list, notes, experts })
}

struct Family<'a> {
    arch: &'static str,
    c: &'a HfConfig,
    file: &'a Path,
}

impl Family<'_> {
    /// Whether a block sees its window only.
    fn slides(&self, i: i64) -> bool {
        let c = self.c;
        match &c.layer_types {
            Some(types) => types.get(i as usize).is_some_and(|t| t == "sliding_attention"),
            None => match c.model_type.as_str() {
                "mistral" | "mixtral" | "phi3" => true,
                "qwen2" | "qwen3" | "qwen3_moe" => c.use_sliding_window && i >= c.max_window_layers,
                _ => false,
            },
        }
    }

    /// The window of a family that llama.cpp computes without one.
    fn lost_window(&self) -> Option<i64> {
        let slides = (0..self.c.num_hidden_layers).any(|i| self.slides(i));
        self.c.sliding_window.filter(|_| slides && !self.arch.starts_with("gemma"))
    }

    /// Settings that llama.cpp has fixed for a family, which the checkpoint must have, too.
    fn check_fixed(&self) -> Result<()> {
        let (c, file) = (self.c, self.file);
        let differs = |what: &str| {
            let why = format!("{what} is not what llama.cpp has fixed for {}; keep it in safetensors", self.arch);
            Err(refuse(file, why))
        };
        match self.arch {
            "gemma2" | "gemma3" => {
                // Gemma 2 27B alone scales by the width of the model over its heads.
                let scalar = c.float(file, "query_pre_attn_scalar")?.unwrap_or(256.0);
                let fixed = if self.arch == "gemma2" && c.num_hidden_layers == 46 {
                    c.hidden_size / c.num_attention_heads
                } else {
                    c.head_dim
                };
                if scalar != fixed as f64 {
                    return differs(&format!("query_pre_attn_scalar = {scalar}"));
                }
                let every = if self.arch == "gemma2" { 2 } else { 6 };
                let full = |i: i64| c.layer_types.is_none() || !self.slides(i);
                if (0..c.num_hidden_layers).any(|i| full(i) != ((i + 1) % every == 0)) {
                    return differs("layer_types");
                }
                let local = c.rope_local.as_ref().is_some_and(|r| r.rope_theta != 10_000.0 || r.rope_type != "default");
                if local {
                    return differs("the rotary base of the sliding layers");
                }
            }
            "gpt2" => {
                let plain = c.bool(file, "scale_attn_weights")?.unwrap_or(true)
                    && !c.bool(file, "scale_attn_by_inverse_layer_idx")?.unwrap_or(false);
                if !plain {
                    return differs("the scale of the attention");
                }
            }
            "gptneox" if c.bool(file, "attention_bias")? == Some(false) => return differs("attention_bias = false"),
            "olmo2" | "granite" | "gptneox" if c.head_dim * c.num_attention_heads != c.hidden_size => {
                return differs(&format!("head_dim = {}", c.head_dim));
            }
            "granite" if c.float(file, "attention_multiplier")? == Some(0.0) => {
                return differs("attention_multiplier = 0");
            }
            "qwen3moe" => {
                if c.bool(file, "norm_topk_prob")? != Some(true) {
                    return differs("norm_topk_prob = false");
                }
                let dense = c.ints(file, "mlp_only_layers")?.is_some_and(|layers| !layers.is_empty());
                if dense || c.int(file, "decoder_sparse_step", 1)?.unwrap_or(1) != 1 {
                    return differs("a layer without experts (decoder_sparse_step, mlp_only_layers)");
                }
            }
            _ => {}
        }
        if c.rope.partial_rotary_factor != 1.0 && !["phi3", "gptneox", "gpt2"].contains(&self.arch) {
            return differs(&format!("partial_rotary_factor = {}", c.rope.partial_rotary_factor));
        }
        if c.attention_bias && ["olmo2", "qwen3", "qwen3moe"].contains(&self.arch) {
            return differs("attention_bias = true");
        }
        let act = c.hidden_act.as_str();
        let known = match self.arch {
            "gemma2" | "gemma3" => act == "gelu_pytorch_tanh",
            "gpt2" => ["gelu_new", "gelu_pytorch_tanh"].contains(&act),
            "gptneox" => ["gelu", "gelu_new", "gelu_pytorch_tanh"].contains(&act),
            _ => act == "silu",
        };
        if known { Ok(()) } else { differs(&format!("the activation {act}")) }
    }
}

/// Llama 3's stretch of each frequency, which GGUF holds as a tensor.
pub(super) fn rope_factors(c: &HfConfig) -> Option<Vec<f32>> {
    let p = Some(&c.rope).filter(|p| p.rope_type == "llama3")?;
    let (factor, low, high) = (p.factor?, p.low_freq_factor?, p.high_freq_factor?);
    let original = p.original_max_position_embeddings? as f64;
    let stretch = |i: i64| {
        let wavelength = 2.0 * PI * p.rope_theta.powf(2.0 * i as f64 / c.head_dim as f64);
        let smooth = (original / wavelength - low) / (high - low);
        let factor = if wavelength < original / high {
            1.0
        } else if wavelength > original / low {
            factor
        } else {
            1.0 / ((1.0 - smooth) / factor + smooth)
        };
        factor as f32
    };
    Some((0..c.head_dim / 2).map(stretch).collect())
}
