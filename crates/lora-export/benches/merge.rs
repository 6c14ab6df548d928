//! Merging a stack of linear layers into a bf16 checkpoint on disk, in bytes of base weights per second.
#![allow(clippy::unwrap_used, missing_docs)]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lora_export::{MergeOptions, merge};
use lora_format::{AdapterConfig, AdapterModule, LoraTensors, TargetModules, write_adapter, write_tensors};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

const LAYERS: usize = 8;
const WIDTH: i64 = 2048;
const RANK: i64 = 16;

fn bench(c: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    let (base, adapter) = (dir.path().join("base"), dir.path().join("adapter"));
    std::fs::create_dir(&base).unwrap();
    let random = |shape: [i64; 2]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
    let module = |layer: usize| format!("model.layers.{layer}.self_attn.q_proj");
    let weights: Vec<_> = (0..LAYERS)
        .map(|i| (format!("{}.weight", module(i)), random([WIDTH, WIDTH]).to_kind(Kind::BFloat16)))
        .collect();
    write_tensors(&base.join("model.safetensors"), &weights, &BTreeMap::new()).unwrap();
    std::fs::write(base.join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    let modules = (0..LAYERS).map(|i| {
        let (a, b) = (random([RANK, WIDTH]), random([WIDTH, RANK]));
        (module(i), AdapterModule::Linear(LoraTensors::new(a, b)))
    });
    let targets = Some(TargetModules::List(vec!["q_proj".into()]));
    let config = AdapterConfig { r: RANK, target_modules: targets, ..AdapterConfig::default() };
    write_adapter(&adapter, &config, &modules.collect()).unwrap();

    let mut group = c.benchmark_group("merge");
    group.throughput(Throughput::Bytes((LAYERS as i64 * WIDTH * WIDTH * 2) as u64)).sample_size(10);
    group.bench_function(format!("{LAYERS}x{WIDTH}x{WIDTH}/r{RANK}/bf16/cpu"), |b| {
        let out = dir.path().join("merged");
        b.iter(|| {
            merge(&base, std::slice::from_ref(&adapter), &out, &MergeOptions::default(), &mut |_, _| {}).unwrap();
            std::fs::remove_dir_all(&out).unwrap();
        });
    });
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
