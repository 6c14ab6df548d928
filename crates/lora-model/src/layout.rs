//! What each family calls its modules and how it puts them together: one table for each. A family whose blocks are made
//! of the same parts is added here, in [`crate::family`], and nowhere else.

/// How a norm is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// RMSNorm (Zhang & Sennrich, 2019).
    Rms,
    /// RMSNorm whose weight is stored less one (Gemma).
    RmsPlusOne,
    /// LayerNorm with a bias (Ba et al., 2016).
    Layer,
}

/// Names of the projections of queries, keys and values inside a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkvLayout {
    /// Three layers.
    Separate([&'static str; 3]),
    /// One layer whose output is all queries, then all keys, then all values (Phi-3, GPT-2).
    Concatenated(&'static str),
    /// One layer whose output is query, key and value of each head in turn (GPT-NeoX).
    PerHead(&'static str),
}

/// Names of the norms of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QkNorm {
    /// Of the queries.
    pub q: &'static str,
    /// Of the keys.
    pub k: &'static str,
    /// Over all heads together (OLMo 2), or over each head alone (Qwen3, Gemma 3).
    pub whole: bool,
}

/// Names of the layers of an MLP inside a block, without experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpLayout {
    /// `down(act(gate(x)) · up(x))`
    Gated([&'static str; 3]),
    /// The same, where one layer gives the gate and then the rest (Phi-3).
    GatedTogether([&'static str; 2]),
    /// `down(act(up(x)))`
    Plain([&'static str; 2]),
}

/// Names of the parts of a sparse MLP inside a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertsLayout {
    /// The layer that scores the experts.
    pub router: &'static str,
    /// What stands before the number of an expert.
    pub experts: &'static str,
    /// Gate, up and down of an expert.
    pub parts: [&'static str; 3],
    /// The module in which transformers holds the matrices of all experts, `gate_up_proj` and `down_proj`.
    pub stacked: &'static str,
}

/// Names of the layers of a classification head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClassifierLayout {
    /// A layer with a tangent after it, between the hidden state and the labels.
    pub dense: Option<&'static str>,
    /// The layer that scores the labels.
    pub out: &'static str,
    /// Whether they have biases.
    pub bias: bool,
}

/// The modules of a family.
#[derive(Debug, PartialEq, Eq)]
pub struct Layout {
    /// The token table.
    pub embed_tokens: &'static str,
    /// The table of learned positions; without it positions are rotary.
    pub embed_positions: Option<&'static str>,
    /// The table of the types of tokens: of the first and the second text of a pair (BERT).
    pub embed_types: Option<&'static str>,
    /// The norm of the embeddings.
    pub embed_norm: Option<&'static str>,
    /// An encoder: attention sees the whole text, norms come after the residual stream was added, and the first token
    /// stands for the text.
    pub encoder: bool,
    /// What stands before the number of a block.
    pub layers: &'static str,
    /// The last norm.
    pub final_norm: Option<&'static str>,
    /// The output head of a language model.
    pub lm_head: &'static str,
    /// The head of a classifier.
    pub classifier: ClassifierLayout,
    /// How norms are computed.
    pub norm: NormKind,
    /// The norm of what the attention reads.
    pub before_attention: Option<&'static str>,
    /// The norm of what the attention gives.
    pub after_attention: Option<&'static str>,
    /// The norm of what the MLP reads.
    pub before_mlp: Option<&'static str>,
    /// The norm of what the MLP gives.
    pub after_mlp: Option<&'static str>,
    /// Queries, keys and values.
    pub qkv: QkvLayout,
    /// Norms of queries and keys.
    pub qk_norm: Option<QkNorm>,
    /// The output projection of the attention.
    pub o_proj: &'static str,
    /// The MLP.
    pub mlp: MlpLayout,
    /// The MLP of sparse blocks.
    pub experts: Option<ExpertsLayout>,
    /// Linear layers of blocks are stored as `[in, out]` (GPT-2's Conv1D).
    pub transposed: bool,
    /// What PEFT targets where `target_modules` is absent; `None` where it has no default.
    pub peft_targets: Option<&'static [&'static str]>,
}

/// Llama, Mistral, Qwen2, Granite.
pub(crate) static LLAMA: Layout = LLAMA_LIKE;
const LLAMA_LIKE: Layout = Layout {
    embed_tokens: "model.embed_tokens",
    embed_positions: None,
    embed_types: None,
    embed_norm: None,
    encoder: false,
    layers: "model.layers",
    final_norm: Some("model.norm"),
    lm_head: "lm_head",
    classifier: ClassifierLayout { dense: None, out: "score", bias: false },
    norm: NormKind::Rms,
    before_attention: Some("input_layernorm"),
    after_attention: None,
    before_mlp: Some("post_attention_layernorm"),
    after_mlp: None,
    qkv: QkvLayout::Separate(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    qk_norm: None,
    o_proj: "self_attn.o_proj",
    mlp: MlpLayout::Gated(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
    experts: None,
    transposed: false,
    peft_targets: Some(&["q_proj", "v_proj"]),
};

const HEAD_NORM: Option<QkNorm> = Some(QkNorm { q: "self_attn.q_norm", k: "self_attn.k_norm", whole: false });

/// Granite, which PEFT has no default targets for.
pub(crate) static GRANITE: Layout = Layout { peft_targets: None, ..LLAMA_LIKE };

/// Qwen3.
pub(crate) static QWEN3: Layout = Layout { qk_norm: HEAD_NORM, ..LLAMA_LIKE };

/// Qwen3 with experts.
pub(crate) static QWEN3_MOE: Layout = Layout {
    qk_norm: HEAD_NORM,
    experts: Some(ExpertsLayout {
        router: "mlp.gate",
        experts: "mlp.experts",
        parts: ["gate_proj", "up_proj", "down_proj"],
        stacked: "mlp.experts",
    }),
    peft_targets: None,
    ..LLAMA_LIKE
};

/// Mixtral.
pub(crate) static MIXTRAL: Layout = Layout {
    experts: Some(ExpertsLayout {
        router: "block_sparse_moe.gate",
        experts: "block_sparse_moe.experts",
        parts: ["w1", "w3", "w2"],
        stacked: "mlp.experts",
    }),
    ..LLAMA_LIKE
};

/// Gemma 2.
pub(crate) static GEMMA2: Layout = GEMMA;
const GEMMA: Layout = Layout {
    norm: NormKind::RmsPlusOne,
    after_attention: Some("post_attention_layernorm"),
    before_mlp: Some("pre_feedforward_layernorm"),
    after_mlp: Some("post_feedforward_layernorm"),
    ..LLAMA_LIKE
};

/// Gemma 3, text.
pub(crate) static GEMMA3: Layout = Layout { qk_norm: HEAD_NORM, ..GEMMA };

/// OLMo 2.
pub(crate) static OLMO2: Layout = Layout {
    before_attention: None,
    after_attention: Some("post_attention_layernorm"),
    before_mlp: None,
    after_mlp: Some("post_feedforward_layernorm"),
    qk_norm: Some(QkNorm { q: "self_attn.q_norm", k: "self_attn.k_norm", whole: true }),
    peft_targets: None,
    ..LLAMA_LIKE
};

/// Phi-3.
pub(crate) static PHI3: Layout = Layout {
    qkv: QkvLayout::Concatenated("self_attn.qkv_proj"),
    mlp: MlpLayout::GatedTogether(["mlp.gate_up_proj", "mlp.down_proj"]),
    peft_targets: None,
    ..LLAMA_LIKE
};

/// GPT-2.
pub(crate) static GPT2: Layout = Layout {
    embed_tokens: "transformer.wte",
    embed_positions: Some("transformer.wpe"),
    layers: "transformer.h",
    final_norm: Some("transformer.ln_f"),
    norm: NormKind::Layer,
    before_attention: Some("ln_1"),
    before_mlp: Some("ln_2"),
    qkv: QkvLayout::Concatenated("attn.c_attn"),
    o_proj: "attn.c_proj",
    mlp: MlpLayout::Plain(["mlp.c_fc", "mlp.c_proj"]),
    transposed: true,
    peft_targets: Some(&["c_attn"]),
    ..LLAMA_LIKE
};

/// GPT-NeoX, Pythia.
pub(crate) static GPT_NEOX: Layout = Layout {
    embed_tokens: "gpt_neox.embed_in",
    layers: "gpt_neox.layers",
    final_norm: Some("gpt_neox.final_layer_norm"),
    lm_head: "embed_out",
    norm: NormKind::Layer,
    qkv: QkvLayout::PerHead("attention.query_key_value"),
    o_proj: "attention.dense",
    mlp: MlpLayout::Plain(["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]),
    peft_targets: Some(&["query_key_value"]),
    ..LLAMA_LIKE
};

/// BERT.
pub(crate) static BERT: Layout = BERT_LIKE;
const BERT_LIKE: Layout = Layout {
    embed_tokens: "bert.embeddings.word_embeddings",
    embed_positions: Some("bert.embeddings.position_embeddings"),
    embed_types: Some("bert.embeddings.token_type_embeddings"),
    embed_norm: Some("bert.embeddings.LayerNorm"),
    encoder: true,
    layers: "bert.encoder.layer",
    final_norm: None,
    classifier: ClassifierLayout { dense: Some("bert.pooler.dense"), out: "classifier", bias: true },
    norm: NormKind::Layer,
    before_attention: None,
    after_attention: Some("attention.output.LayerNorm"),
    before_mlp: None,
    after_mlp: Some("output.LayerNorm"),
    qkv: QkvLayout::Separate(["attention.self.query", "attention.self.key", "attention.self.value"]),
    o_proj: "attention.output.dense",
    mlp: MlpLayout::Plain(["intermediate.dense", "output.dense"]),
    peft_targets: Some(&["query", "value"]),
    ..LLAMA_LIKE
};

/// RoBERTa.
pub(crate) static ROBERTA: Layout = Layout {
    embed_tokens: "roberta.embeddings.word_embeddings",
    embed_positions: Some("roberta.embeddings.position_embeddings"),
    embed_types: Some("roberta.embeddings.token_type_embeddings"),
    embed_norm: Some("roberta.embeddings.LayerNorm"),
    layers: "roberta.encoder.layer",
    classifier: ClassifierLayout { dense: Some("classifier.dense"), out: "classifier.out_proj", bias: true },
    ..BERT_LIKE
};
