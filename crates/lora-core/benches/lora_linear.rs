//! The LoRA linear layer forward and backward at shapes of published models, against the frozen product alone.
//!
//! Throughput is in tokens. `frozen` is the floor: the two products with the weight that no adapter can do without.

#![allow(clippy::expect_used)] // a benchmark that cannot be set up can only stop

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lora_core::{Init, LinearLayer, LoraSpec};
use std::hint::black_box;
use tch::{Device, Kind, Tensor};

const TOKENS: i64 = 512;
const F: (Kind, Device) = (Kind::Float, Device::Cpu);

fn forward_backward(layer: &LinearLayer, x: &Tensor) -> Tensor {
    let y = layer.forward(x, 0.0).expect("the layer fits its input");
    y.sum(Kind::Float).backward();
    let mut x = x.shallow_clone();
    x.zero_grad();
    y
}

fn lora_linear(c: &mut Criterion) {
    let mut group = c.benchmark_group("lora_linear");
    group.throughput(Throughput::Elements(TOKENS as u64)).sample_size(10);
    // SmolLM-135M's MLP, Qwen2-0.5B's, and a square of the LoRA paper's example size.
    for (input, output) in [(576, 1536), (896, 4864), (1024, 1024)] {
        let x = Tensor::randn([TOKENS, input], F).set_requires_grad(true);
        let weight = Tensor::randn([output, input], F);
        for r in [0i64, 8, 64] {
            let mut layer = LinearLayer::frozen(weight.shallow_clone(), None).expect("a matrix");
            if r > 0 {
                let spec = LoraSpec::new(r, 2.0 * r as f64, false).expect("a rank");
                layer = layer.with_adapter(spec, Init::Kaiming, 1).expect("a rank below the width");
            }
            let name = if r == 0 { "frozen".to_string() } else { format!("r{r}") };
            group.bench_function(BenchmarkId::new(name, format!("{input}x{output}/float32/cpu")), |b| {
                b.iter(|| black_box(forward_backward(&layer, &x)));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, lora_linear);
criterion_main!(benches);
