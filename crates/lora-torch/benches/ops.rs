//! Every fused operation forward and backward beside its plain twin of libtorch's own operations, one group each, at the shapes of a
//! step of SmolLM-135M over one row of 512 tokens (the gates at Gemma-2-2B's width, too). Throughput is in tokens; of the optimizer, in
//! parameters.

#![allow(clippy::expect_used)] // a benchmark that cannot be set up can only stop

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lora_torch::{
    AdamWScalars, AttentionRule, Gate, HeadPart, Int8, LoraPart, Nf4, Projection, Segments, Weight, adamw_step,
    attention, cross_entropy, dropout, gated, grad_norm, lora_linear, rms_norm, rotary,
};
use std::hint::black_box;
use tch::{Device, Kind, Tensor};

const TOKENS: i64 = 512;
const WIDTH: i64 = 576;
const MLP: i64 = 1536;
const VOCAB: i64 = 49152;
const HEADS: i64 = 9;
const KV: i64 = 3;
const HEAD_DIM: i64 = 64;
const RANK: i64 = 16;
const F: (Kind, Device) = (Kind::Float, Device::Cpu);

type Forward<'a> = &'a dyn Fn() -> Tensor;

fn frozen(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, F)
}

fn trained(shape: &[i64]) -> Tensor {
    frozen(shape).set_requires_grad(true)
}

/// Both ways of one operation, with the gradients of `leaves`.
fn beside(c: &mut Criterion, group: &str, shape: &str, leaves: &[&Tensor], fused: Forward<'_>, plain: Forward<'_>) {
    let slopes = fused().detach().randn_like();
    let mut group = c.benchmark_group(group);
    group.throughput(Throughput::Elements(TOKENS as u64)).sample_size(10);
    for (way, forward) in [("fused", fused), ("plain", plain)] {
        group.bench_function(BenchmarkId::new(way, format!("{shape}/float32/cpu")), |b| {
            b.iter(|| {
                let loss = (forward() * &slopes).sum(Kind::Float);
                black_box(Tensor::run_backward(&[loss], leaves, false, false))
            });
        });
    }
    group.finish();
}

fn norms(c: &mut Criterion) {
    let (x, weight) = (trained(&[TOKENS, WIDTH]), frozen(&[WIDTH]));
    let plain = || {
        let mean = x.square().mean_dim([-1i64].as_slice(), true, Kind::Float);
        &x * (mean + 1e-5).rsqrt() * &weight
    };
    let fused = || rms_norm(&x, &weight, 1e-5).expect("a width that fits");
    beside(c, "rms_norm", &format!("{TOKENS}x{WIDTH}"), &[&x], &fused, &plain);
}

fn positions(c: &mut Criterion) {
    let x = trained(&[TOKENS, HEADS, HEAD_DIM]);
    let half = HEAD_DIM / 2;
    let angles = Tensor::arange(TOKENS, F).unsqueeze(1) * Tensor::linspace(1.0, 0.001, half, F).unsqueeze(0);
    let (cos, sin) = (angles.cos(), angles.sin());
    let (cos_of_heads, sin_of_heads) = (cos.unsqueeze(1), sin.unsqueeze(1));
    let plain = || {
        let (a, b) = (x.narrow(2, 0, half), x.narrow(2, half, half));
        Tensor::cat(&[&a * &cos_of_heads - &b * &sin_of_heads, &b * &cos_of_heads + &a * &sin_of_heads], 2)
    };
    let fused = || rotary(&x, &cos, &sin).expect("tables that fit");
    beside(c, "rotary", &format!("{TOKENS}x{HEADS}x{HEAD_DIM}"), &[&x], &fused, &plain);
}

fn gates(c: &mut Criterion) {
    for width in [MLP, 9216] {
        let (gate, up) = (trained(&[TOKENS, width]), trained(&[TOKENS, width]));
        for (name, act) in [("swiglu", Gate::Silu), ("geglu_erf", Gate::Gelu), ("geglu_tanh", Gate::GeluTanh)] {
            let plain = || match act {
                Gate::Silu => gate.silu() * &up,
                Gate::Gelu => gate.gelu("none") * &up,
                Gate::GeluTanh => gate.gelu("tanh") * &up,
            };
            let fused = || gated(act, &gate, &up).expect("two shapes that are alike");
            beside(c, name, &format!("{TOKENS}x{width}"), &[&gate, &up], &fused, &plain);
        }
    }
}

fn drops(c: &mut Criterion) {
    let x = trained(&[TOKENS, MLP]);
    let fused = || dropout(&x, 0.1).expect("a share below 1");
    beside(c, "dropout", &format!("{TOKENS}x{MLP}"), &[&x], &fused, &|| x.dropout(0.1, true));
}

/// Projections of one input: those of attention, those of the MLP, and the way back from it.
fn linears(c: &mut Criterion) {
    for (width, outs) in
        [(WIDTH, vec![WIDTH, KV * HEAD_DIM, KV * HEAD_DIM]), (WIDTH, vec![MLP, MLP]), (MLP, vec![WIDTH])]
    {
        let x = trained(&[TOKENS, width]);
        let weights: Vec<Weight> = outs.iter().map(|&out| frozen(&[out, width]).into()).collect();
        let pairs: Vec<_> = outs.iter().map(|&out| (trained(&[RANK, width]), trained(&[out, RANK]))).collect();
        let scale = 2.0;
        let fused = || {
            let parts = weights.iter().zip(&pairs).map(|(weight, (a, b))| {
                let adapter = Some(LoraPart { a, b, scale });
                Projection { weight, bias: None, adapter }
            });
            Tensor::cat(&lora_linear(&x, &parts.collect::<Vec<_>>(), 0.0).expect("shapes that fit"), -1)
        };
        let dense: Vec<_> = weights.iter().map(|w| w.dense().expect("a plain weight")).collect();
        let plain = || {
            let ys = dense
                .iter()
                .zip(&pairs)
                .map(|(w, (a, b))| x.linear::<&Tensor>(w, None) + x.matmul(&a.tr()).matmul(&b.tr()) * scale);
            Tensor::cat(&ys.collect::<Vec<_>>(), -1)
        };
        let mut leaves = vec![&x];
        pairs.iter().for_each(|(a, b)| leaves.extend([a, b]));
        let names: Vec<_> = outs.iter().map(i64::to_string).collect();
        beside(c, "lora_linear_r16", &format!("{width}-{}", names.join("-")), &leaves, &fused, &plain);
    }
}

/// The same with a weight that is kept smaller than it is computed in; the twin widens all of it first.
fn kept_smaller(c: &mut Criterion) {
    let x = trained(&[TOKENS, WIDTH]);
    let weight = frozen(&[MLP, WIDTH]);
    let forms: [(&str, Weight); 4] = [
        ("bf16", Weight::Plain(weight.to_kind(Kind::BFloat16))),
        ("int8", Weight::Int8(Int8::pack(&weight).expect("a matrix"))),
        ("nf4", Weight::Nf4(Nf4::pack(&weight, false).expect("a matrix"))),
        ("nf4-double", Weight::Nf4(Nf4::pack(&weight, true).expect("a matrix"))),
    ];
    for (name, kept) in forms {
        let fused = || {
            lora_linear(&x, &[Projection { weight: &kept, bias: None, adapter: None }], 0.0)
                .expect("shapes that fit")
                .remove(0)
        };
        let plain = || x.linear::<&Tensor>(&kept.dense().expect("a form that is read").to_kind(Kind::Float), None);
        beside(c, &format!("linear_{name}"), &format!("{WIDTH}-{MLP}"), &[&x], &fused, &plain);
    }
}

fn attentions(c: &mut Criterion) {
    let [q, k, v] = [HEADS, KV, KV].map(|heads| trained(&[TOKENS, heads, HEAD_DIM]));
    for (name, lens) in [("1", vec![TOKENS]), ("4", vec![200, 150, 100, 62])] {
        let segments = Segments::new(&lens).expect("lengths above 0");
        let rule = AttentionRule { scale: (HEAD_DIM as f64).powf(-0.5), window: None, softcap: None, causal: true };
        let fused = || attention(&q, &k, &v, &segments, rule).expect("shapes that fit");
        // One call of libtorch's own fused attention for each segment.
        let plain = || {
            let mut start = 0;
            let outs = lens.iter().map(|&len| {
                let cut = |t: &Tensor| t.narrow(0, start, len).transpose(0, 1).unsqueeze(0);
                let out = Tensor::scaled_dot_product_attention::<&Tensor>(
                    &cut(&q),
                    &cut(&k),
                    &cut(&v),
                    None,
                    0.0,
                    true,
                    None,
                    true,
                );
                start += len;
                out.squeeze_dim(0).transpose(0, 1)
            });
            Tensor::cat(&outs.collect::<Vec<_>>(), 0)
        };
        let shape = format!("{TOKENS}x{HEADS}-{KV}x{HEAD_DIM}, segments: {name}");
        beside(c, "attention", &shape, &[&q, &k, &v], &fused, &plain);
    }
}

fn losses(c: &mut Criterion) {
    let hidden = trained(&[TOKENS, WIDTH]);
    let weight = frozen(&[VOCAB, WIDTH]);
    let targets = (Tensor::arange(TOKENS, (Kind::Int64, Device::Cpu)) * 97).remainder(VOCAB);
    let kept = Weight::Plain(weight.shallow_clone());
    let fused = || {
        let head = HeadPart { weight: &kept, bias: None, adapter: None, softcap: None };
        cross_entropy(&hidden, head, &targets, None, TOKENS).expect("shapes that fit")
    };
    let plain = || {
        hidden.linear::<&Tensor>(&weight, None).cross_entropy_loss::<&Tensor>(
            &targets,
            None,
            tch::Reduction::Sum,
            -100,
            0.0,
        )
    };
    beside(c, "cross_entropy", &format!("{TOKENS}x{WIDTH}x{VOCAB}"), &[&hidden], &fused, &plain);
}

/// Clipping and AdamW over the adapters of all linear layers of SmolLM-135M.
fn optimizer(c: &mut Criterion) {
    const COUNT: i64 = 4_884_480;
    let [param, grad, first, second] = [(); 4].map(|()| frozen(&[COUNT]).abs());
    let h = AdamWScalars { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step: 10 };
    let mut group = c.benchmark_group("adamw");
    group.throughput(Throughput::Elements(COUNT as u64)).sample_size(10);
    group.bench_function(BenchmarkId::new("fused", format!("{COUNT}/float32/cpu")), |b| {
        b.iter(|| {
            black_box(grad_norm(&grad).expect("a flat buffer"));
            adamw_step(&param, &grad, &first, &second, &h).expect("buffers of one size");
        });
    });
    let [mut param, mut first, mut second] = [param, first, second].map(|t| t.copy());
    group.bench_function(BenchmarkId::new("plain", format!("{COUNT}/float32/cpu")), |b| {
        b.iter(|| {
            black_box(grad.norm().double_value(&[]));
            let _ = param.g_mul_scalar_(1.0 - h.lr * h.weight_decay);
            first = &first * h.beta1 + &grad * (1.0 - h.beta1);
            second = &second * h.beta2 + grad.square() * (1.0 - h.beta2);
            let wide = (&second / (1.0 - h.beta2.powi(10))).sqrt() + h.eps;
            let _ = param.g_sub_(&(&first / wide * (h.lr / (1.0 - h.beta1.powi(10)))));
        });
    });
    group.finish();
}

criterion_group!(benches, norms, positions, gates, drops, linears, kept_smaller, attentions, losses, optimizer);
criterion_main!(benches);
