//! How llama.cpp names the parts of each family, and what its metadata says of a model.

use crate::error::{Error, Result};
use lora_format::{GgufValue, HfConfig};
use std::f64::consts::PI;
use std::path::Path;

/// What is done to a tensor on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transform {
    /// Nothing.
    Keep,
    /// Gemma's norms are stored less one.
    PlusOne,
    /// Rows of each head from halves to pairs, as llama.cpp rotates them.
    Pairs {
        /// Heads of the tensor.
        heads: i64,
    },
    /// From `[in, out]` to `[out, in]`.
    Transpose,
}

/// Names of a block's parts in a checkpoint, and in GGUF.
type Names = &'static [(&'static str, &'static str)];

const ATTENTION: Names = &[
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("input_layernorm", "attn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate_up_proj", "ffn_up"),
];
const PRE_NORM: Names = &[("post_attention_layernorm", "ffn_norm")];
const GEMMA: Names = &[
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];
const GPT2: Names = &[
    ("ln_1", "attn_norm"),
    ("attn.c_attn", "attn_qkv"),
    ("attn.c_proj", "attn_output"),
    ("ln_2", "ffn_norm"),
    ("mlp.c_fc", "ffn_up"),
    ("mlp.c_proj", "ffn_down"),
];

/// A family as llama.cpp knows it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arch {
    /// `general.architecture`
    pub(crate) name: &'static str,
    /// Queries and keys are rotated in pairs of neighbours.
    pairs: bool,
    plus_one: bool,
    transposed: bool,
    top: Names,
    block: &'static str,
    parts: [Names; 2],
}

const LLAMA_TOP: Names = &[("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];
const LLAMA: Arch = Arch {
    name: "llama",
    pairs: true,
    plus_one: false,
    transposed: false,
    top: LLAMA_TOP,
    block: "model.layers.",
    parts: [ATTENTION, PRE_NORM],
};

impl Arch {
    /// The architecture of a `model_type`.
    ///
    /// # Errors
    /// [`Error::Gguf`] naming those that there are.
    pub(crate) fn of(file: &Path, model_type: &str) -> Result<Self> {
        Ok(match model_type {
            "llama" | "mistral" => LLAMA,
            "qwen2" => Arch { name: "qwen2", pairs: false, ..LLAMA },
            "qwen3" => Arch { name: "qwen3", pairs: false, ..LLAMA },
            "phi3" => Arch { name: "phi3", pairs: false, ..LLAMA },
            "gemma2" => Arch { name: "gemma2", pairs: false, plus_one: true, parts: [ATTENTION, GEMMA], ..LLAMA },
            "gemma3_text" => Arch { name: "gemma3", pairs: false, plus_one: true, parts: [ATTENTION, GEMMA], ..LLAMA },
            "gpt2" => Arch {
                name: "gpt2",
                pairs: false,
                transposed: true,
                top: &[
                    ("transformer.wte", "token_embd"),
                    ("transformer.wpe", "position_embd"),
                    ("transformer.ln_f", "output_norm"),
                    ("lm_head", "output"),
                ],
                block: "transformer.h.",
                parts: [GPT2, &[]],
                ..LLAMA
            },
            other => {
                let supported = "llama, mistral, qwen2, qwen3, phi3, gemma2, gemma3_text, gpt2";
                return Err(refuse(
                    file,
                    format!("model_type = {other:?} has no GGUF form here; there are {supported}"),
                ));
            }
        })
    }

    /// The GGUF name of a tensor, and what is done to it; `None` for one that GGUF does not hold.
    pub(crate) fn name(&self, c: &HfConfig, tensor: &str) -> Option<(String, Transform)> {
        let (module, part) = tensor.rsplit_once('.')?;
        let (name, in_block) = match module.strip_prefix(self.block) {
            None => (self.top.iter().find(|(hf, _)| *hf == module)?.1.to_string(), None),
            Some(rest) => {
                let (number, inner) = rest.split_once('.')?;
                let found = self.parts.iter().flat_map(|names| names.iter()).find(|(hf, _)| *hf == inner)?;
                (format!("blk.{number}.{}", found.1), Some(inner))
            }
        };
        let transform = match in_block {
            Some("self_attn.q_proj") if self.pairs => Transform::Pairs { heads: c.num_attention_heads },
            Some("self_attn.k_proj") if self.pairs => Transform::Pairs { heads: c.num_key_value_heads },
            _ if self.plus_one && module.ends_with("norm") => Transform::PlusOne,
            Some(inner) if self.transposed && part == "weight" && !inner.starts_with("ln_") => Transform::Transpose,
            _ => Transform::Keep,
        };
        Some((format!("{name}.{part}"), transform))
    }

    /// What llama.cpp has to know of the model.
    ///
    /// # Errors
    /// [`Error::Gguf`] for a setting that llama.cpp would compute otherwise.
    pub(crate) fn metadata(&self, c: &HfConfig, file: &Path) -> Result<Vec<(String, GgufValue)>> {
        let mut list = Vec::new();
        let mut put = |key: &str, value| list.push((format!("{}.{key}", self.name), value));
        let whole = |n: i64| GgufValue::U32(u32::try_from(n).unwrap_or(u32::MAX));
        put("block_count", whole(c.num_hidden_layers));
        put("context_length", whole(c.max_position_embeddings));
        put("embedding_length", whole(c.hidden_size));
        put("feed_forward_length", whole(c.intermediate_size));
        put("attention.head_count", whole(c.num_attention_heads));
        put("vocab_size", whole(c.vocab_size));
        let epsilon = GgufValue::F32(c.rms_norm_eps as f32);
        if self.name == "gpt2" {
            put("attention.layer_norm_epsilon", epsilon);
            self.check_fixed(c, file)?;
            return Ok(list);
        }
        put("attention.layer_norm_rms_epsilon", epsilon);
        put("attention.head_count_kv", whole(c.num_key_value_heads));
        put("attention.key_length", whole(c.head_dim));
        put("attention.value_length", whole(c.head_dim));
        let rotated = (c.head_dim as f64 * c.rope.partial_rotary_factor) as i64;
        put("rope.dimension_count", whole(rotated));
        put("rope.freq_base", GgufValue::F32(c.rope.rope_theta as f32));
        if let Some(window) = c.sliding_window.filter(|_| ["gemma2", "gemma3", "phi3"].contains(&self.name)) {
            put("attention.sliding_window", whole(window));
        }
        for (key, ours, default) in [
            ("attn_logit_softcapping", "attn_logit_softcapping", 50.0),
            ("final_logit_softcapping", "final_logit_softcapping", 30.0),
        ] {
            if self.name == "gemma2" {
                put(key, GgufValue::F32(c.float(file, ours)?.unwrap_or(default) as f32));
            }
        }
        let factor = c.rope.factor.map(|f| GgufValue::F32(f as f32));
        match (c.rope.rope_type.as_str(), factor) {
            ("default" | "llama3", _) => {}
            (kind @ ("linear" | "yarn"), Some(factor)) => {
                put("rope.scaling.type", GgufValue::Text(kind.into()));
                put("rope.scaling.factor", factor);
                if let Some(original) = c.rope.original_max_position_embeddings.filter(|_| kind == "yarn") {
                    put("rope.scaling.original_context_length", whole(original));
                }
            }
            (kind, _) => return Err(refuse(file, format!("rope type {kind:?} has no GGUF form here"))),
        }
        self.check_fixed(c, file)?;
        Ok(list)
    }

    /// Settings that llama.cpp has fixed for a family, which the checkpoint must have, too.
    fn check_fixed(&self, c: &HfConfig, file: &Path) -> Result<()> {
        let differs = |what: &str| {
            Err(refuse(
                file,
                format!("{what} is not what llama.cpp has fixed for {}; keep it in safetensors", self.name),
            ))
        };
        let window = c.sliding_window.is_some();
        let full = |i: usize| c.layer_types.as_ref().is_none_or(|t| t[i] == "full_attention");
        let layers = 0..c.num_hidden_layers as usize;
        match self.name {
            "gemma2" | "gemma3" => {
                // Gemma 2 27B alone scales by the width of the model over its heads.
                let scalar = c.float(file, "query_pre_attn_scalar")?.unwrap_or(256.0);
                let fixed = if self.name == "gemma2" && c.num_hidden_layers == 46 {
                    c.hidden_size / c.num_attention_heads
                } else {
                    c.head_dim
                };
                if scalar != fixed as f64 {
                    return differs(&format!("query_pre_attn_scalar = {scalar}"));
                }
                let every = if self.name == "gemma2" { 2 } else { 6 };
                if layers.clone().any(|i| full(i) != ((i + 1) % every == 0)) {
                    return differs("layer_types");
                }
                let local = c.rope_local.as_ref().is_some_and(|r| r.rope_theta != 10_000.0 || r.rope_type != "default");
                if local {
                    return differs("the rotary base of the sliding layers");
                }
            }
            "llama" if window => return differs("sliding_window"),
            "qwen2" | "qwen3" if layers.clone().any(|i| !full(i)) => return differs("sliding_window"),
            "gpt2" => {
                let plain = c.bool(file, "scale_attn_weights")?.unwrap_or(true)
                    && !c.bool(file, "scale_attn_by_inverse_layer_idx")?.unwrap_or(false);
                if !plain {
                    return differs("the scale of the attention");
                }
            }
            _ => {}
        }
        let act = match self.name {
            "gemma2" | "gemma3" => c.hidden_act == "gelu_pytorch_tanh",
            "gpt2" => ["gelu_new", "gelu_pytorch_tanh"].contains(&c.hidden_act.as_str()),
            _ => c.hidden_act == "silu",
        };
        if act { Ok(()) } else { differs(&format!("the activation {}", c.hidden_act)) }
    }

    /// Llama 3's stretch of each frequency, which GGUF holds as a tensor.
    pub(crate) fn rope_factors(c: &HfConfig) -> Option<Vec<f32>> {
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
}

pub(crate) fn refuse(file: &Path, why: String) -> Error {
    Error::Gguf { path: file.into(), why }
}
