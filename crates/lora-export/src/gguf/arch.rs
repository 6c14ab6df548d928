//! How llama.cpp names the parts of each family, and how it stores them.

use crate::error::{Error, Result};
use lora_format::HfConfig;
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
    /// Rows of query, key and value of each head in turn become all queries, all keys, all values.
    PerHead {
        /// Heads of the tensor.
        heads: i64,
    },
    /// From `[in, out]` to `[out, in]`.
    Transpose,
}

/// What a tensor of a checkpoint is in GGUF.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    /// Its name.
    pub(crate) name: String,
    /// What is done to it.
    pub(crate) transform: Transform,
    /// Which slice it is of a tensor that holds all experts.
    pub(crate) expert: Option<usize>,
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
const POST_NORM: Names =
    &[("post_attention_layernorm", "post_attention_norm"), ("post_feedforward_layernorm", "post_ffw_norm")];
const ROUTER: Names = &[("post_attention_layernorm", "ffn_norm"), ("mlp.gate", "ffn_gate_inp")];
const MIXTRAL: Names = &[("post_attention_layernorm", "ffn_norm"), ("block_sparse_moe.gate", "ffn_gate_inp")];
/// Parts of an expert.
const EXPERT: Names = &[("gate_proj", "ffn_gate_exps"), ("up_proj", "ffn_up_exps"), ("down_proj", "ffn_down_exps")];
const MIXTRAL_EXPERT: Names = &[("w1", "ffn_gate_exps"), ("w3", "ffn_up_exps"), ("w2", "ffn_down_exps")];
const GPT_NEOX: Names = &[
    ("input_layernorm", "attn_norm"),
    ("attention.query_key_value", "attn_qkv"),
    ("attention.dense", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.dense_h_to_4h", "ffn_up"),
    ("mlp.dense_4h_to_h", "ffn_down"),
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
    /// What stands before the number of an expert, and its parts.
    experts: Option<(&'static str, Names)>,
    /// llama.cpp wants a head of its own even where it is the embedding.
    pub(crate) own_head: Option<&'static str>,
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
    experts: None,
    own_head: None,
};

impl Arch {
    /// The architecture of a `model_type`.
    ///
    /// # Errors
    /// [`Error::Gguf`] naming those that there are.
    pub(crate) fn of(file: &Path, model_type: &str) -> Result<Self> {
        Ok(match model_type {
            "llama" | "mistral" => LLAMA,
            "mixtral" => Arch {
                parts: [ATTENTION, MIXTRAL],
                experts: Some(("block_sparse_moe.experts.", MIXTRAL_EXPERT)),
                ..LLAMA
            },
            "granite" => Arch { name: "granite", ..LLAMA },
            "olmo2" => Arch {
                name: "olmo2",
                pairs: false,
                parts: [ATTENTION, POST_NORM],
                own_head: Some("lm_head.weight"),
                ..LLAMA
            },
            "qwen2" => Arch { name: "qwen2", pairs: false, ..LLAMA },
            "qwen3" => Arch { name: "qwen3", pairs: false, ..LLAMA },
            "qwen3_moe" => Arch {
                name: "qwen3moe",
                pairs: false,
                parts: [ATTENTION, ROUTER],
                experts: Some(("mlp.experts.", EXPERT)),
                ..LLAMA
            },
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
            "gpt_neox" => Arch {
                name: "gptneox",
                pairs: false,
                top: &[
                    ("gpt_neox.embed_in", "token_embd"),
                    ("gpt_neox.final_layer_norm", "output_norm"),
                    ("embed_out", "output"),
                ],
                block: "gpt_neox.layers.",
                parts: [GPT_NEOX, &[]],
                own_head: Some("embed_out.weight"),
                ..LLAMA
            },
            other => {
                let supported = "llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, phi3, gemma2, gemma3_text, granite, olmo2, gpt2, gpt_neox";
                return Err(refuse(
                    file,
                    format!("model_type = {other:?} has no GGUF form here; there are {supported}"),
                ));
            }
        })
    }

    /// What a tensor is in GGUF; `None` for one that GGUF does not hold.
    pub(crate) fn part(&self, c: &HfConfig, tensor: &str) -> Option<Part> {
        let (module, end) = tensor.rsplit_once('.')?;
        let find = |names: Names, wanted: &str| names.iter().find(|(hf, _)| *hf == wanted).map(|(_, gguf)| *gguf);
        let Some(rest) = module.strip_prefix(self.block) else {
            let name = format!("{}.{end}", find(self.top, module)?);
            let plus_one = self.plus_one && module.ends_with("norm");
            let transform = if plus_one { Transform::PlusOne } else { Transform::Keep };
            return Some(Part { name, transform, expert: None });
        };
        let (number, inner) = rest.split_once('.')?;
        if let Some((before, parts)) = self.experts
            && let Some(expert) = inner.strip_prefix(before)
        {
            let (expert, part) = expert.split_once('.')?;
            let name = format!("blk.{number}.{}.{end}", find(parts, part)?);
            return Some(Part { name, transform: Transform::Keep, expert: expert.parse().ok() });
        }
        let found = self.parts.iter().find_map(|names| find(names, inner))?;
        let transform = match inner {
            "self_attn.q_proj" if self.pairs => Transform::Pairs { heads: c.num_attention_heads },
            "self_attn.k_proj" if self.pairs => Transform::Pairs { heads: c.num_key_value_heads },
            "attention.query_key_value" => Transform::PerHead { heads: c.num_attention_heads },
            _ if self.plus_one && module.ends_with("norm") => Transform::PlusOne,
            _ if self.transposed && end == "weight" && !inner.starts_with("ln_") => Transform::Transpose,
            _ => Transform::Keep,
        };
        Some(Part { name: format!("blk.{number}.{found}.{end}"), transform, expert: None })
    }
}

pub(crate) fn refuse(file: &Path, why: String) -> Error {
    Error::Gguf { path: file.into(), why }
}
