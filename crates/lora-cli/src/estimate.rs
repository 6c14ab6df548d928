//! Memory of a run, from the model's sizes and the lengths of the examples alone.

use lora_model::{ModelConfig, loss_chunk_rows};
use lora_torch::{current_rss_bytes, kind_bytes};
use lora_train::config::Weights;
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
     a token's experts where there are any) + 2 (2 hidden + 3 intermediate)), and with lora_dropout the inputs of the adapted \
     modules; with gradient_checkpointing of one layer only, and hidden of each";

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

/// Bytes of activations of a batch. `dropped` are the values of a token in the inputs of one block's adapted modules, where
/// they have dropout.
pub(crate) fn activations(m: &ModelConfig, tokens: i64, bytes: i64, checkpointing: bool, dropped: i64) -> i64 {
    let blocks = || 0..m.windows.len();
    let most = |of: &dyn Fn(usize) -> i64| blocks().map(of).max().unwrap_or(0);
    let kept = |i: usize| kept_by_block(m, i) + dropped;
    let kept: i64 = match checkpointing {
        true => m.num_hidden_layers * m.hidden_size + most(&kept),
        false => blocks().map(kept).sum(),
    };
    // A sixth is what the allocator leaves between tensors, as measured.
    tokens * bytes * (kept + kept / 6 + most(&|i| worked_with(m, i)))
}

/// Widths of the inputs of a block's adapted modules, all together; the masks lie where the random numbers lay that they
/// were made from, so each costs a value and not a bit.
fn dropped(plan: &RunPlan) -> i64 {
    match &plan.trained {
        Trained::Fresh(injection) if plan.config.lora.dropout() > 0.0 => {
            let inputs: i64 = injection.adapters.iter().map(|adapter| adapter.module.in_features).sum();
            inputs / plan.model.num_hidden_layers.max(1)
        }
        _ => 0,
    }
}

/// Tokens of each row of a plan.
fn row_lengths(plan: &RunPlan) -> Vec<usize> {
    plan.row_lengths()
}

/// The memory of a run at its largest batch: the longest rows that may come together.
pub(crate) fn memory(plan: &RunPlan) -> Memory {
    let (m, bytes) = (&plan.model, kind_bytes(plan.kind) as i64);
    let mut lengths = row_lengths(plan);
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    let largest: usize = lengths.iter().take(plan.config.train.per_device_train_batch_size as usize).sum();
    let weights = plan.base_bytes();
    let trained = plan.trained_parameters() * 8 + plan.moment_bytes();
    let activations = activations(m, largest as i64, bytes, plan.config.train.gradient_checkpointing, dropped(plan));
    let rows = loss_chunk_rows(m.vocab_size, plan.config.model.weights == Weights::Converted).min(largest as i64);
    let logits = rows * m.vocab_size * 4;
    let [weights, trained, activations, logits] = [weights, trained, activations, logits].map(i64::unsigned_abs);
    let program = if plan.device == Device::Cpu { current_rss_bytes() + CODE_OF_A_STEP } else { 0 };
    let total = program + weights + trained + activations + logits;
    Memory { program, weights, trained, activations, logits, total }
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
        assert_eq!(activations(&m, 10, 4, false, 0), 10 * 4 * (and_a_sixth(2 * block) + work));
        assert_eq!(activations(&m, 10, 4, false, 7), 10 * 4 * (and_a_sixth(2 * (block + 7)) + work));
        assert_eq!(activations(&m, 10, 2, true, 0), 10 * 2 * (and_a_sixth(2 * 32 + block) + work));
    }
}
