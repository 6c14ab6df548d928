//! Gated activations forward and backward beside their plain twins, at the widths of published models' MLPs.

#![allow(clippy::expect_used)] // a benchmark that cannot be set up can only stop

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lora_torch::{Gate, gated};
use std::hint::black_box;
use tch::{Device, Kind, Tensor};

const TOKENS: i64 = 512;
const F: (Kind, Device) = (Kind::Float, Device::Cpu);

fn activations(c: &mut Criterion) {
    let mut group = c.benchmark_group("gated");
    group.throughput(Throughput::Elements(TOKENS as u64)).sample_size(10);
    // SmolLM-135M's MLP, and Gemma-2-2B's.
    for width in [1536, 9216] {
        let gate = Tensor::randn([TOKENS, width], F).set_requires_grad(true);
        let up = Tensor::randn([TOKENS, width], F).set_requires_grad(true);
        let slopes = Tensor::randn([TOKENS, width], F);
        let gates = [("swiglu", Gate::Silu), ("geglu_erf", Gate::Gelu), ("geglu_tanh", Gate::GeluTanh)];
        for (name, act) in gates {
            let plain = || match act {
                Gate::Silu => gate.silu() * &up,
                Gate::Gelu => gate.gelu("none") * &up,
                Gate::GeluTanh => gate.gelu("tanh") * &up,
            };
            let fused = || gated(act, &gate, &up).expect("two shapes that are alike");
            let ways: [(&str, &dyn Fn() -> Tensor); 2] = [("fused", &fused), ("plain", &plain)];
            for (way, forward) in ways {
                let id = BenchmarkId::new(format!("{name}/{way}"), format!("{TOKENS}x{width}/float32/cpu"));
                group.bench_function(id, |b| {
                    b.iter(|| {
                        black_box(Tensor::run_backward(
                            &[(forward() * &slopes).sum(Kind::Float)],
                            &[&gate, &up],
                            false,
                            false,
                        ))
                    });
                });
            }
        }
    }
    group.finish();
}

criterion_group!(benches, activations);
criterion_main!(benches);
