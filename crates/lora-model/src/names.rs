//! The one table of modules: their paths in a checkpoint, their kinds and shapes, in the order of the forward pass.
//! Loading, target matching, injection, fresh weights and predictions all read it.

use crate::config::ModelConfig;
use crate::layout::{MlpLayout, NormKind, QkvLayout};

/// What a module computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleKind {
    /// `[in] -> [out]`
    Linear,
    /// `[rows] -> [hidden]`: the token table, or learned positions
    Embedding,
    /// A norm over `out`
    Norm,
    /// `[hidden] -> [experts]`: scores experts; PEFT knows no adapter for it
    Router,
}

/// A module of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleSpec {
    /// `model.layers.0.self_attn.q_proj`
    pub path: String,
    /// What it computes.
    pub kind: ModuleKind,
    /// Width of the input; the rows of an embedding; 0 for a norm.
    pub in_features: i64,
    /// Width of the output.
    pub out_features: i64,
    /// Whether it has a bias.
    pub bias: bool,
    /// Stored as `[in, out]` (GPT-2's Conv1D).
    pub transposed: bool,
    /// Whether `all-linear` names it.
    pub in_all_linear: bool,
}

impl ModuleSpec {
    /// Shape of the weight in the checkpoint.
    pub fn weight_shape(&self) -> Vec<i64> {
        match self.kind {
            ModuleKind::Linear if self.transposed => vec![self.in_features, self.out_features],
            ModuleKind::Linear | ModuleKind::Router => vec![self.out_features, self.in_features],
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

impl ModelConfig {
    /// Path of a block's part.
    pub(crate) fn in_block(&self, i: usize, name: &str) -> String {
        format!("{}.{i}.{name}", self.layout.layers)
    }

    /// Path of an expert's part.
    pub(crate) fn in_expert(&self, i: usize, experts: &str, expert: usize, part: &str) -> String {
        self.in_block(i, &format!("{experts}.{expert}.{part}"))
    }
}

/// Every module of a model.
pub fn modules(c: &ModelConfig) -> Vec<ModuleSpec> {
    let (h, layout) = (c.hidden_size, c.layout);
    let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
    let spec = |path: String, kind, in_features, out_features, bias| ModuleSpec {
        path,
        kind,
        in_features,
        out_features,
        bias,
        transposed: false,
        in_all_linear: false,
    };
    let norm = |path, width| spec(path, ModuleKind::Norm, 0, width, layout.norm == NormKind::Layer);
    let linear = |path, i, o, bias| ModuleSpec {
        transposed: layout.transposed,
        in_all_linear: true,
        ..spec(path, ModuleKind::Linear, i, o, bias)
    };
    let mut list = vec![spec(layout.embed_tokens.into(), ModuleKind::Embedding, c.vocab_size, h, false)];
    if let Some(path) = layout.embed_positions {
        let rows = c.max_position_embeddings + c.position_offset;
        list.push(spec(path.into(), ModuleKind::Embedding, rows, h, false));
    }
    list.extend(layout.embed_types.map(|path| spec(path.into(), ModuleKind::Embedding, c.type_vocab_size, h, false)));
    list.extend(layout.embed_norm.map(|path| norm(path.into(), h)));
    for i in 0..c.windows.len() {
        let at = |name: &str| c.in_block(i, name);
        list.extend(layout.before_attention.map(|name| norm(at(name), h)));
        match layout.qkv {
            QkvLayout::Separate([a, b, v]) => {
                list.extend([(a, q), (b, kv), (v, kv)].map(|(name, out)| linear(at(name), h, out, c.qkv_bias)));
            }
            QkvLayout::Concatenated(name) | QkvLayout::PerHead(name) => {
                list.push(linear(at(name), h, q + 2 * kv, c.qkv_bias));
            }
        }
        if let Some(names) = layout.qk_norm {
            let width = |all| if names.whole { all } else { c.head_dim };
            list.extend([(names.q, width(q)), (names.k, width(kv))].map(|(name, width)| norm(at(name), width)));
        }
        list.push(linear(at(layout.o_proj), q, h, c.o_bias));
        list.extend(layout.after_attention.map(|name| norm(at(name), h)));
        list.extend(layout.before_mlp.map(|name| norm(at(name), h)));
        mlp(c, i, &mut list, &linear, &spec);
        list.extend(layout.after_mlp.map(|name| norm(at(name), h)));
    }
    list.extend(layout.final_norm.map(|path| norm(path.into(), h)));
    list.extend(head_modules(c));
    list
}

/// The modules of the head. `all-linear` leaves a head out as PEFT does, but not what BERT's family puts before it.
pub(crate) fn head_modules(c: &ModelConfig) -> Vec<ModuleSpec> {
    let linear = |path: &str, out_features, bias| ModuleSpec {
        path: path.into(),
        kind: ModuleKind::Linear,
        in_features: c.hidden_size,
        out_features,
        bias,
        transposed: false,
        in_all_linear: path.ends_with("pooler.dense"),
    };
    let Some(labels) = &c.labels else { return vec![linear(c.layout.lm_head, c.vocab_size, false)] };
    let names = c.layout.classifier;
    let dense = names.dense.map(|path| linear(path, c.hidden_size, names.bias));
    dense.into_iter().chain([linear(names.out, labels.len() as i64, names.bias)]).collect()
}

/// The modules of a block's MLP.
fn mlp(
    c: &ModelConfig,
    i: usize,
    list: &mut Vec<ModuleSpec>,
    linear: &dyn Fn(String, i64, i64, bool) -> ModuleSpec,
    spec: &dyn Fn(String, ModuleKind, i64, i64, bool) -> ModuleSpec,
) {
    let (h, inner, bias) = (c.hidden_size, c.intermediate_size, c.mlp_bias);
    let at = |name: &str| c.in_block(i, name);
    if let (Some(names), Some(e), true) = (c.layout.experts, &c.experts, c.is_sparse(i)) {
        list.push(spec(at(names.router), ModuleKind::Router, h, e.count, false));
        for expert in 0..e.count as usize {
            let [gate, up, down] = names.parts.map(|part| c.in_expert(i, names.experts, expert, part));
            for (path, from, to) in
                [(gate, h, e.intermediate_size), (up, h, e.intermediate_size), (down, e.intermediate_size, h)]
            {
                list.push(spec(path, ModuleKind::Linear, from, to, false));
            }
        }
        return;
    }
    let linear = |path, from, to, bias| ModuleSpec {
        // PEFT takes the names of a dense MLP for those of experts in such a family.
        in_all_linear: c.experts.is_none(),
        ..linear(path, from, to, bias)
    };
    match c.layout.mlp {
        MlpLayout::Gated([gate, up, down]) => {
            list.extend(
                [(gate, h, inner), (up, h, inner), (down, inner, h)].map(|(n, a, b)| linear(at(n), a, b, bias)),
            );
        }
        MlpLayout::GatedTogether([gate_up, down]) => {
            list.extend([(gate_up, h, 2 * inner), (down, inner, h)].map(|(n, a, b)| linear(at(n), a, b, bias)));
        }
        MlpLayout::Plain([up, down]) => {
            list.extend([(up, h, inner), (down, inner, h)].map(|(n, a, b)| linear(at(n), a, b, bias)));
        }
    }
}

/// The tensors that a checkpoint must hold; a tied head has none of its own.
pub fn checkpoint_tensors(c: &ModelConfig) -> Vec<(String, Vec<i64>)> {
    let own = |m: &ModuleSpec| !(c.tie_word_embeddings && m.path == c.layout.lm_head);
    modules(c).iter().filter(|m| own(m)).flat_map(ModuleSpec::tensors).collect()
}
