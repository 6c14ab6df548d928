//! Memory and operations of a run, from the model's sizes and the lengths of the examples alone.

use lora_model::{ModelConfig, loss_chunk_rows};
use lora_torch::kind_bytes;
use lora_train::config::Weights;
use lora_train::{RunPlan, Trained};
use serde::Serialize;

/// Bytes that a run will hold, by what they are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Memory {
    /// The base's weights as they are kept.
    pub(crate) weights: u64,
    /// Trained parameters and their gradients, 4 bytes each, and the optimizer's moments: 8 bytes of a number for AdamW, 4 for
    /// Lion, about 2 for AdamW in 8 bits. A full training's weights are among these and not above.
    pub(crate) trained: u64,
    /// What the backward pass needs of the largest batch.
    pub(crate) activations: u64,
    /// Logits and their gradient, a chunk of rows at a time, in float32.
    pub(crate) logits: u64,
    /// All of it.
    pub(crate) total: u64,
}

/// The formula of the activations, for a reader.
pub(crate) const ACTIVATIONS_FORMULA: &str = "tokens x bytes x layers x (4 hidden + 2 heads x head_dim + 2 kv_heads x head_dim + 3 intermediate; 2 without a gate, \
     a token's experts where there are any); with gradient_checkpointing tokens x bytes x (layers x hidden + one such layer)";

/// Values of a token that one block keeps for its backward pass: the two inputs of the norms and what they give (4 hidden),
/// q and the attention's result, k and v, and gate, up and their product.
fn kept_by_block(m: &ModelConfig, i: usize) -> i64 {
    let (q, kv) = (m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim);
    4 * m.hidden_size + 2 * q + 2 * kv + m.mlp_kept(i)
}

/// Bytes of activations of a batch.
pub(crate) fn activations(m: &ModelConfig, tokens: i64, bytes: i64, checkpointing: bool) -> i64 {
    let blocks = || (0..m.windows.len()).map(|i| kept_by_block(m, i));
    let per_token: i64 = match checkpointing {
        true => m.num_hidden_layers * m.hidden_size + blocks().max().unwrap_or(0),
        false => blocks().sum(),
    };
    tokens * bytes * per_token
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
    let full = matches!(plan.trained, Trained::Everything);
    let weights = if full { 0 } else { plan.base_bytes() };
    let trained = plan.trained_parameters() * 8 + plan.moment_bytes();
    let activations = activations(m, largest as i64, bytes, plan.config.train.gradient_checkpointing);
    let rows = loss_chunk_rows(m.vocab_size, plan.config.model.weights == Weights::Converted).min(largest as i64);
    let logits = 2 * rows * m.vocab_size * 4;
    let [weights, trained, activations, logits] = [weights, trained, activations, logits].map(i64::unsigned_abs);
    Memory { weights, trained, activations, logits, total: weights + trained + activations + logits }
}

/// Floating-point operations of a mean step: two products of the size of each weight forward and two backward (four for full
/// training), the head for trained tokens only, causal attention at half the square, and the adapters.
pub(crate) fn operations_per_step(plan: &RunPlan) -> f64 {
    let m = &plan.model;
    let (h, hd, l) = (m.hidden_size as f64, m.head_dim as f64, m.num_hidden_layers as f64);
    let (nh, kv) = (m.num_attention_heads as f64, m.num_key_value_heads as f64);
    let mlps: i64 = (0..m.windows.len()).map(|i| m.mlp_weights(i)).sum();
    let block = l * (h * nh * hd * 2.0 + 2.0 * h * kv * hd) + mlps as f64;
    let lengths: Vec<f64> = plan.train.lengths().into_iter().map(|n| n as f64).collect();
    let tokens: f64 = lengths.iter().sum();
    let trained: usize = plan.train.trained_tokens();
    let pairs: f64 = lengths.iter().map(|n| n * n / 2.0).sum();
    let (passes, adapters) = match plan.trained {
        Trained::Everything => (6.0, 0.0),
        _ => (4.0, plan.trained_parameters() as f64),
    };
    let epoch = passes * (tokens * block + trained as f64 * h * m.vocab_size as f64)
        + 6.0 * pairs * l * 2.0 * nh * hd
        + 6.0 * adapters * tokens;
    epoch / plan.steps_per_epoch.max(1) as f64
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
        assert_eq!(activations(&m, 10, 4, false), 10 * 4 * 2 * block);
        assert_eq!(activations(&m, 10, 2, true), 10 * 2 * (2 * 32 + block));
    }
}
