//! The one table of modules: their paths in a checkpoint, their kinds and shapes, in the order of the forward pass.
//! Loading, target matching, injection, fresh weights and predictions all read it.

use crate::config::ModelConfig;

/// Path of the embedding.
pub const EMBED_TOKENS: &str = "model.embed_tokens";
/// Path of the output head.
pub const LM_HEAD: &str = "lm_head";
/// Path of the last norm.
pub const FINAL_NORM: &str = "model.norm";

/// What a module computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleKind {
    /// `[in] -> [out]`
    Linear,
    /// `[vocab] -> [hidden]`
    Embedding,
    /// RMSNorm over `out`
    Norm,
}

/// A module of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleSpec {
    /// `model.layers.0.self_attn.q_proj`
    pub path: String,
    /// What it computes.
    pub kind: ModuleKind,
    /// Width of the input; the vocabulary for an embedding; 0 for a norm.
    pub in_features: i64,
    /// Width of the output.
    pub out_features: i64,
    /// Whether it has a bias.
    pub bias: bool,
}

impl ModuleSpec {
    /// Shape of the weight in the checkpoint.
    pub fn weight_shape(&self) -> Vec<i64> {
        match self.kind {
            ModuleKind::Linear => vec![self.out_features, self.in_features],
            ModuleKind::Embedding => vec![self.in_features, self.out_features],
            ModuleKind::Norm => vec![self.out_features],
        }
    }

    /// Names and shapes of its tensors.
    pub fn tensors(&self) -> Vec<(String, Vec<i64>)> {
        let mut list = vec![(format!("{}.weight", self.path), self.weight_shape())];
        if self.bias {
            list.push((format!("{}.bias", self.path), vec![self.out_features]));
        }
        list
    }
}

/// Path of a block's part.
pub(crate) fn in_block(i: usize, name: &str) -> String {
    format!("model.layers.{i}.{name}")
}

/// Every module of a model.
pub fn modules(c: &ModelConfig) -> Vec<ModuleSpec> {
    use ModuleKind::{Embedding, Linear, Norm};
    let (h, inner) = (c.hidden_size, c.intermediate_size);
    let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
    let spec = |path: String, kind, in_features, out_features, bias| ModuleSpec {
        path,
        kind,
        in_features,
        out_features,
        bias,
    };
    let mut list = vec![spec(EMBED_TOKENS.into(), Embedding, c.vocab_size, h, false)];
    for i in 0..c.windows.len() {
        list.push(spec(in_block(i, "input_layernorm"), Norm, 0, h, false));
        list.push(spec(in_block(i, "self_attn.q_proj"), Linear, h, q, c.qkv_bias));
        list.push(spec(in_block(i, "self_attn.k_proj"), Linear, h, kv, c.qkv_bias));
        list.push(spec(in_block(i, "self_attn.v_proj"), Linear, h, kv, c.qkv_bias));
        if c.qk_norm {
            list.push(spec(in_block(i, "self_attn.q_norm"), Norm, 0, c.head_dim, false));
            list.push(spec(in_block(i, "self_attn.k_norm"), Norm, 0, c.head_dim, false));
        }
        list.push(spec(in_block(i, "self_attn.o_proj"), Linear, q, h, c.o_bias));
        list.push(spec(in_block(i, "post_attention_layernorm"), Norm, 0, h, false));
        list.push(spec(in_block(i, "mlp.gate_proj"), Linear, h, inner, c.mlp_bias));
        list.push(spec(in_block(i, "mlp.up_proj"), Linear, h, inner, c.mlp_bias));
        list.push(spec(in_block(i, "mlp.down_proj"), Linear, inner, h, c.mlp_bias));
    }
    list.push(spec(FINAL_NORM.into(), Norm, 0, h, false));
    list.push(spec(LM_HEAD.into(), Linear, h, c.vocab_size, false));
    list
}

/// The tensors that a checkpoint must hold; a tied head has none of its own.
pub fn checkpoint_tensors(c: &ModelConfig) -> Vec<(String, Vec<i64>)> {
    let own = |m: &ModuleSpec| !(c.tie_word_embeddings && m.path == LM_HEAD);
    modules(c).iter().filter(|m| own(m)).flat_map(ModuleSpec::tensors).collect()
}
