//! One whole optimizer step (forward, backward, clip, AdamW) of a small Llama: adapters, adapters with recomputed
//! activations, and full training beside them. Throughput is in tokens.

#![allow(clippy::expect_used)] // a benchmark that cannot be set up can only stop

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lora_model::{Decoder, ModelConfig, TokenBatch, all_linear, plan_injection};
use lora_torch::AdamWScalars;
use lora_train::FlatParams;
use lora_train::config::Optim;
use std::hint::black_box;
use tch::Device;

const ROWS: i64 = 4;
const SEQ: i64 = 128;

fn config() -> ModelConfig {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let text = r#"{"model_type": "llama", "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": true}"#;
    std::fs::write(dir.path().join("config.json"), text).expect("a file in it");
    ModelConfig::read(dir.path()).expect("a config")
}

fn step(c: &mut Criterion) {
    let mut group = c.benchmark_group("step");
    group.throughput(Throughput::Elements((ROWS * SEQ) as u64)).sample_size(10);
    let ids: Vec<i64> = (0..ROWS * SEQ).map(|i| 10 + (i * 7919) % 8000).collect();
    let rows: Vec<i64> = (0..ROWS).flat_map(|b| (0..SEQ - 1).map(move |t| b * SEQ + t)).collect();
    let targets: Vec<i64> = rows.iter().map(|&r| ids[r as usize + 1]).collect();
    for (name, lora, checkpointing) in
        [("lora", true, false), ("lora_checkpointing", true, true), ("full", false, false)]
    {
        let mut model = Decoder::fresh(config(), 1, Device::Cpu).expect("a model");
        if lora {
            let plan = plan_injection(&model.config, &all_linear(16, 32.0)).expect("targets");
            model.inject(&plan, 1).expect("adapters");
        } else {
            model.train_everything().expect("weights");
        }
        let params = FlatParams::new(model.parameters(), None, Optim::AdamW).expect("parameters");
        let batch =
            TokenBatch::new(&model.config, &ids, &[SEQ; ROWS as usize], &rows, &targets, Device::Cpu).expect("a batch");
        let mut number = 0;
        group.bench_function(BenchmarkId::new(name, "llama_8x256/float32/cpu"), |b| {
            b.iter(|| {
                number += 1;
                params.zero_grad().expect("a buffer");
                let loss = model.loss_and_backward(&batch, 1, 1.0 / rows.len() as f64, checkpointing).expect("a loss");
                params.clip_grad_norm(1.0).expect("a norm");
                let h = AdamWScalars { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, step: number };
                params.update(&h).expect("a step");
                black_box(loss)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, step);
criterion_main!(benches);
