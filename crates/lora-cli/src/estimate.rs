//! Memory of a run, from the model's sizes and the lengths of the examples alone.

use lora_model::{MlpLayout, ModelConfig, QkvLayout, loss_chunk_rows};
use lora_torch::{current_rss_bytes, kind_bytes};
use lora_train::config::{Checkpointing, Weights};
use lora_train::{RunPlan, Trained};
use serde::Serialize;
use tch::Device;

/// Bytes that a run will hold, by what they are for. Measured peaks lie beside these in `docs/reliability.md`, row N6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Memory {
    /// The program and libtorch, as they are in memory now, and the data; nothing on a GPU.
    pub(crate) program: u64,
    /// The base's weights as they are kept. A full training has them once more among what is trained.
    pub(crate) weights: u64,
    /// Trained parameters and their gradients, 4 bytes each, and the optimizer's moments: 8 bytes of a number for AdamW, 4 for
    /// Lion, about 2 for AdamW in 8 bits.
    pub(crate) trained: u64,
    /// What the backward pass needs of the largest batch, and what it works with.
    pub(crate) activations: u64,
    /// Logits, a chunk of rows at a time, in float32; their gradient takes their place.
    pub(crate) logits: u64,
    /// All of it.
    pub(crate) total: u64,
}

/// The formula of the activations, for a reader.
pub(crate) const ACTIVATIONS_FORMULA: &str = "tokens x bytes x (7/6 layers x (4 hidden + 2 heads x head_dim + 2 kv_heads x head_dim + 3 intermediate; 2 without a gate, \
     a token's experts where there are any) + 2 (2 hidden + 3 intermediate)); with gradient_checkpointing = selective less \
     2 hidden and 1 intermediate, with full of one layer only, and hidden of each, and with recompute_layers of the others and hidden of these; what norms and gates give is not kept for layers \
     without an adapter";

/// Pages of libtorch's code that a step is the first to touch.
const CODE_OF_A_STEP: u64 = 24 << 20;

/// Values of a token that one block keeps for its backward pass: the two inputs of the norms and what they give (4 hidden),
/// q and the attention's result, k and v, and gate, up and their product.
fn kept_by_block(m: &ModelConfig, i: usize) -> i64 {
    let (q, kv) = (m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim);
    4 * m.hidden_size + 2 * q + 2 * kv + m.mlp_kept(i)
}

/// Values of a token that the backward pass of a block works with: gradients of the MLP and of the residual stream, and
/// what they are made from.
fn worked_with(m: &ModelConfig, i: usize) -> i64 {
    2 * (2 * m.hidden_size + m.mlp_kept(i))
}

/// What is kept of a forward pass: `train.gradient_checkpointing` and `train.recompute_layers`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Keeps {
    pub(crate) checkpointing: Checkpointing,
    pub(crate) recompute_layers: u32,
}

impl From<Checkpointing> for Keeps {
    fn from(checkpointing: Checkpointing) -> Self {
        Self { checkpointing, recompute_layers: 0 }
    }
}

/// Which inputs of a block's layers the way back reads: those of layers that have adapters or are trained themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reads {
    /// What queries, keys and values are made from.
    qkv: bool,
    /// What gates, or the first layer of the MLP, are made from.
    up: bool,
    /// What the last layer of the MLP is given.
    down: bool,
}

impl Reads {
    fn of(plan: &RunPlan) -> Self {
        match &plan.trained {
            Trained::Everything => Self { qkv: true, up: true, down: true },
            Trained::Fresh(injection) => {
                let adapted = injection.adapters.iter().map(|adapter| &adapter.module).chain(&injection.saved);
                let stacked = injection.stacked.iter().map(|planned| planned.stack.path.as_str());
                Self::of_modules(&plan.model, &adapted.map(|m| m.path.as_str()).chain(stacked).collect::<Vec<_>>())
            }
            Trained::Existing(folder) => {
                Self::of_modules(&plan.model, &folder.modules.keys().map(String::as_str).collect::<Vec<_>>())
            }
        }
    }

    /// An adapter of any expert counts for all of them.
    fn of_modules(m: &ModelConfig, paths: &[&str]) -> Self {
        let has = |names: &[&str]| {
            let ends = |path: &str, name: &str| path.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'));
            names.iter().any(|name| paths.iter().any(|path| ends(path, name)))
        };
        let experts = m.layout.experts.is_some_and(|names| paths.iter().any(|path| path.contains(names.experts)));
        let (up, down): (&[&str], &str) = match &m.layout.mlp {
            MlpLayout::Gated([gate, up, down]) => (&[*gate, *up], *down),
            MlpLayout::GatedTogether([up, down]) | MlpLayout::Plain([up, down]) => (&[*up], *down),
        };
        Self {
            qkv: match &m.layout.qkv {
                QkvLayout::Separate(names) => has(names),
                QkvLayout::Concatenated(name) | QkvLayout::PerHead(name) => has(&[name]),
            },
            up: has(up) || experts,
            down: has(&[down]) || experts,
        }
    }
}

/// Of what a block keeps, what norms and gates give, as far as it is made once more or never read.
fn spared_by_block(m: &ModelConfig, i: usize, reads: Reads, remade: bool) -> i64 {
    let norms = [(m.layout.before_attention, reads.qkv), (m.layout.before_mlp, reads.up)];
    let spared = norms.iter().filter(|(norm, read)| norm.is_some() && (remade || !read)).count() as i64;
    let gated = m.is_sparse(i) || !matches!(m.layout.mlp, MlpLayout::Plain(_));
    spared * m.hidden_size + if remade && gated || !reads.down { m.mlp_given(i) } else { 0 }
}

/// Bytes of activations of a batch. Dropout adds nothing: what it drops is found again from a key.
pub(crate) fn activations(m: &ModelConfig, tokens: i64, bytes: i64, keeping: Keeps, reads: Reads) -> i64 {
    let most = |of: &dyn Fn(usize) -> i64| (0..m.windows.len()).map(of).max().unwrap_or(0);
    let kept = |i: usize| kept_by_block(m, i) - spared_by_block(m, i, reads, keeping.checkpointing.remakes());
    let again = keeping.checkpointing.recompute(keeping.recompute_layers).0.min(m.windows.len());
    let behind: i64 = (again..m.windows.len()).map(kept).sum();
    // When a block is computed again, those behind it have given back what they kept.
    let one = if again > 0 { most(&kept) } else { 0 };
    // Of those that wait on the host one is read, one comes, and one is on its way out.
    let inputs = if keeping.checkpointing.offloads() { again.min(3) } else { again };
    let kept = inputs as i64 * m.hidden_size + behind.max(one);
    // A sixth is what the allocator leaves between tensors, as measured.
    tokens * bytes * (kept + kept / 6 + most(&|i| worked_with(m, i)))
}

/// What the memory of a run follows from.
pub(crate) struct Estimate<'a> {
    plan: &'a RunPlan,
    /// Tokens of the largest batch: the longest rows that may come together.
    largest: i64,
    reads: Reads,
    program: u64,
}

impl<'a> Estimate<'a> {
    pub(crate) fn of(plan: &'a RunPlan) -> Self {
        let mut lengths = plan.row_lengths();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        let rows = plan.config.train.per_device_train_batch_size as usize;
        let largest = lengths.iter().take(rows).sum::<usize>() as i64;
        let program = if plan.device == Device::Cpu { current_rss_bytes() + CODE_OF_A_STEP } else { 0 };
        Self { plan, largest, reads: Reads::of(plan), program }
    }

    /// The memory at the largest batch.
    pub(crate) fn memory(&self, keeps: Keeps) -> Memory {
        let Self { plan, largest, reads, program } = *self;
        let (m, bytes) = (&plan.model, kind_bytes(plan.kind) as i64);
        let weights = plan.base_bytes();
        let trained = plan.trained_parameters() * 8 + plan.moment_bytes();
        let train = &plan.config.train;
        // Of other micro-batches that wait at the same block, what each block read.
        let waiting = if train.accumulate_by_block { i64::from(train.gradient_accumulation_steps) - 1 } else { 0 };
        let activations = activations(m, largest, bytes, keeps, reads)
            + waiting * largest * bytes * m.hidden_size * m.windows.len() as i64;
        let rows = loss_chunk_rows(m.vocab_size, plan.config.model.weights == Weights::Converted).min(largest);
        let logits = rows * m.vocab_size * 4;
        let [weights, trained, activations, logits] = [weights, trained, activations, logits].map(i64::unsigned_abs);
        let total = program + weights + trained + activations + logits;
        Memory { program, weights, trained, activations, logits, total }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn activations_follow_the_formula() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama");
        let m = ModelConfig::read(&fixture).unwrap();
        // 2 layers, hidden 32, 4 heads and 2 kv heads of 8, intermediate 80.
        let block = 4 * 32 + 2 * 32 + 2 * 16 + 3 * 80;
        let work = 2 * (2 * 32 + 3 * 80);
        let and_a_sixth = |kept: i64| kept + kept / 6;
        let remade = 2 * 32 + 80;
        let all = Reads { qkv: true, up: true, down: true };
        let of = |choice: Checkpointing, bytes| activations(&m, 10, bytes, choice.into(), all);
        assert_eq!(of(Checkpointing::None, 4), 10 * 4 * (and_a_sixth(2 * block) + work));
        assert_eq!(of(Checkpointing::Selective, 4), 10 * 4 * (and_a_sixth(2 * (block - remade)) + work));
        assert_eq!(of(Checkpointing::Full, 2), 10 * 2 * (and_a_sixth(2 * 32 + block) + work));
        // The first block again: the second has given back what it kept, which is as much as the first then keeps.
        let first = Keeps { checkpointing: Checkpointing::Selective, recompute_layers: 1 };
        assert_eq!(activations(&m, 10, 4, first, all), 10 * 4 * (and_a_sixth(32 + block - remade) + work));
        let every = Keeps { checkpointing: Checkpointing::None, recompute_layers: 9 };
        assert_eq!(activations(&m, 10, 2, every, all), of(Checkpointing::Full, 2));
        // Adapters of queries and values read one norm of two, and nothing of a gate's.
        let reads = Reads::of_modules(&m, &["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]);
        assert_eq!(reads, Reads { qkv: true, up: false, down: false });
        let few = activations(&m, 10, 4, Checkpointing::None.into(), reads);
        assert_eq!(few, 10 * 4 * (and_a_sixth(2 * (block - 32 - 80)) + work));
        let down = Reads::of_modules(&m, &["model.layers.0.mlp.down_proj"]);
        assert_eq!(down, Reads { qkv: false, up: false, down: true });
    }
}
