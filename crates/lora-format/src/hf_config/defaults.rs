//! What each family's config says where it says nothing, and how it spells what it says.

use crate::rope::RopeDefaults;

/// What transformers fills in for keys that a config lacks.
pub(super) struct Defaults {
    pub(super) num_key_value_heads: Option<i64>,
    pub(super) head_dim: Option<i64>,
    pub(super) sliding_window: Option<i64>,
    pub(super) max_position_embeddings: Option<i64>,
    pub(super) tie_word_embeddings: bool,
    pub(super) bos_token_id: Option<i64>,
    pub(super) eos_token_id: Option<i64>,
    pub(super) has_window_switch: bool,
    pub(super) norm_eps: f64,
    pub(super) hidden_act: &'static str,
    /// Without `layer_types`: every how manyth layer sees all; the others slide.
    pub(super) full_every: Option<i64>,
    pub(super) rope: RopeDefaults,
}

/// A key as the family spells it: GPT-2 and GPT-NeoX have names of their own.
pub(super) fn spelt<'a>(model_type: &str, key: &'a str) -> &'a str {
    match (model_type, key) {
        ("gpt2", "hidden_size") => "n_embd",
        ("gpt2", "intermediate_size") => "n_inner",
        ("gpt2", "num_hidden_layers") => "n_layer",
        ("gpt2", "num_attention_heads") => "n_head",
        ("gpt2", "max_position_embeddings") => "n_positions",
        ("gpt2", "rms_norm_eps") => "layer_norm_epsilon",
        ("gpt2", "hidden_act") => "activation_function",
        ("gpt_neox" | "bert" | "roberta", "rms_norm_eps") => "layer_norm_eps",
        ("gemma2" | "gemma3_text", "hidden_act") => "hidden_activation",
        (_, key) => key,
    }
}

impl Defaults {
    pub(super) fn of(model_type: &str) -> Self {
        let base = Defaults {
            num_key_value_heads: None,
            head_dim: None,
            sliding_window: None,
            max_position_embeddings: None,
            tie_word_embeddings: true,
            bos_token_id: None,
            eos_token_id: None,
            has_window_switch: false,
            norm_eps: 1e-6,
            hidden_act: "silu",
            full_every: None,
            rope: RopeDefaults { theta: 10_000.0, partial: 1.0, local_theta: None },
        };
        let llama = Defaults {
            max_position_embeddings: Some(2048),
            tie_word_embeddings: false,
            bos_token_id: Some(1),
            eos_token_id: Some(2),
            ..base
        };
        let qwen2 = Defaults {
            num_key_value_heads: Some(32),
            sliding_window: Some(4096),
            max_position_embeddings: Some(32_768),
            tie_word_embeddings: false,
            has_window_switch: true,
            ..base
        };
        match model_type {
            "llama" => llama,
            "mistral" => Defaults {
                num_key_value_heads: Some(8),
                sliding_window: Some(4096),
                max_position_embeddings: Some(131_072),
                ..llama
            },
            "qwen2" => qwen2,
            "qwen3" => Defaults { head_dim: Some(128), ..qwen2 },
            "qwen3_moe" => Defaults { num_key_value_heads: Some(4), ..qwen2 },
            "mixtral" => Defaults {
                num_key_value_heads: Some(8),
                max_position_embeddings: Some(131_072),
                norm_eps: 1e-5,
                rope: RopeDefaults { theta: 1e6, ..llama.rope },
                ..llama
            },
            "granite" => llama,
            "olmo2" => Defaults { norm_eps: 1e-5, bos_token_id: None, eos_token_id: Some(50_279), ..llama },
            "phi3" => {
                Defaults { max_position_embeddings: Some(4096), norm_eps: 1e-5, eos_token_id: Some(32_000), ..llama }
            }
            "gemma2" | "gemma3_text" => Defaults {
                num_key_value_heads: Some(4),
                head_dim: Some(256),
                sliding_window: Some(4096),
                max_position_embeddings: Some(if model_type == "gemma2" { 8192 } else { 131_072 }),
                bos_token_id: Some(2),
                eos_token_id: Some(1),
                hidden_act: "gelu_pytorch_tanh",
                full_every: Some(if model_type == "gemma2" { 2 } else { 6 }),
                rope: match model_type {
                    "gemma2" => base.rope,
                    _ => RopeDefaults { theta: 1e6, partial: 1.0, local_theta: Some(10_000.0) },
                },
                ..base
            },
            "gpt2" => Defaults {
                max_position_embeddings: Some(1024),
                bos_token_id: Some(50_256),
                eos_token_id: Some(50_256),
                norm_eps: 1e-5,
                hidden_act: "gelu_new",
                ..base
            },
            "gpt_neox" => Defaults {
                max_position_embeddings: Some(2048),
                tie_word_embeddings: false,
                bos_token_id: Some(0),
                eos_token_id: Some(2),
                norm_eps: 1e-5,
                hidden_act: "gelu",
                rope: RopeDefaults { partial: 0.25, ..base.rope },
                ..base
            },
            "bert" | "roberta" => {
                Defaults { max_position_embeddings: Some(512), norm_eps: 1e-12, hidden_act: "gelu", ..base }
            }
            _ => base,
        }
    }
}
