//! What a run needs of the machine, and what the machine can do.

use crate::error::Result;
use crate::plan::{RunPlan, Trained};
use lora_torch::Products;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// Operations a second of a square product of this size: fp32 on the CPU, bf16 on a GPU. The best of four, after one that
/// warms up. No random number is drawn.
///
/// # Errors
/// What libtorch reports.
pub fn matrix_rate(device: Device, n: i64) -> Result<f64> {
    let kind = if device == Device::Cpu { Kind::Float } else { Kind::BFloat16 };
    let filled = |value: f64| Tensor::f_full([n, n], value, (kind, device));
    let (x, y) = (filled(0.5)?, filled(-0.25)?);
    let mut best = f64::INFINITY;
    for i in 0..5 {
        lora_torch::synchronize(device)?;
        let start = Instant::now();
        let _product = x.f_matmul(&y)?;
        lora_torch::synchronize(device)?;
        if i > 0 {
            best = best.min(start.elapsed().as_secs_f64());
        }
    }
    Ok(2.0 * (n as f64).powi(3) / best)
}

/// The share of that rate that a step reaches here, by what was measured (`docs/benchmarks/`): with products of this project's own,
/// and otherwise about as much as libtorch's layers do. On a CUDA device it is a guess.
pub fn share_of_matrix_rate(device: Device) -> f64 {
    match (device, Products::widest()) {
        (Device::Cpu, Ok(Products::Avx512)) => 0.85,
        (Device::Cpu, Ok(Products::Avx2)) => 0.65,
        _ => 0.5,
    }
}

/// Floating-point operations of a pass over the data: two products of the size of each weight forward and two backward (four
/// for full training), the head for trained tokens only, causal attention at half the square, and the adapters.
fn operations_per_pass(plan: &RunPlan) -> f64 {
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
    passes * (tokens * block + trained as f64 * h * m.vocab_size as f64)
        + 6.0 * pairs * l * 2.0 * nh * hd
        + 6.0 * adapters * tokens
}

/// Floating-point operations that a mean step needs; what is computed again to save memory is not among them.
pub fn operations_per_step(plan: &RunPlan) -> f64 {
    // Of an old set a pass has a part, whose rows are taken to be as long as the others.
    let part = plan.rows_per_pass() as f64 / plan.rows.len().max(1) as f64;
    operations_per_pass(plan) * part / plan.steps_per_epoch.max(1) as f64
}

/// The same of a mean token.
pub fn operations_per_token(plan: &RunPlan) -> f64 {
    operations_per_pass(plan) / plan.train.tokens().max(1) as f64
}
