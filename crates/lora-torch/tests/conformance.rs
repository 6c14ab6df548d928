//! Every fused operation against its plain twin, forward and gradients, on the CPU always and on CUDA where there is one,
//! and against finite differences in float64.
#![allow(clippy::print_stderr, clippy::assign_op_pattern)] // tensors have no in-place operators; what was not tested is said
//!
//! `LORA_REQUIRE_CUDA=1` turns an absent CUDA device into a failure, so that a machine with a GPU cannot pass by skipping.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use lora_torch::{
    AttentionRule, CudaStatus, Gate, HeadPart, LoraPart, Origin, Projection, Segments, Weight, attention,
    cross_entropy, cuda_status, dropout, gated, lora_linear, lora_linear_of, rms_norm, rotary, token_losses,
};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

/// Rounding of a sum of up to a few hundred terms of order one: a few hundred half-ulps.
const F32_TOLERANCE: f64 = 300.0 * f32::EPSILON as f64;
const F64_TOLERANCE: f64 = 300.0 * f64::EPSILON;
/// bfloat16 keeps 8 bits, and every intermediate of the twin is rounded to them.
const BF16_TOLERANCE: f64 = 1.0 / 32.0;
/// Central differences with step h err by h² f‴/6 + eps/h; h = 1e-5 balances the two near 1e-10, sums of outputs add to it.
const DIFFERENCE_STEP: f64 = 1e-5;
const DIFFERENCE_TOLERANCE: f64 = 1e-6;

type Op = Box<dyn Fn(&[Tensor]) -> Tensor>;

/// A fused operation, the plain expression that it must equal, and the shapes of its differentiable inputs.
struct Case {
    name: &'static str,
    inputs: Vec<Vec<i64>>,
    fused: Op,
    plain: Op,
}

fn linear_case(rows: i64, width: i64, outs: Vec<i64>, r: i64, adapted: bool, bias: bool) -> Case {
    let mut inputs = vec![vec![rows, width]];
    for &o in &outs {
        inputs.push(vec![o, width]);
        inputs.push(vec![o]);
        inputs.push(vec![r, width]);
        inputs.push(vec![o, r]);
    }
    let n = outs.len();
    let fused = move |t: &[Tensor]| {
        let weights: Vec<Weight> = (0..n).map(|i| t[1 + 4 * i].shallow_clone().into()).collect();
        let parts: Vec<_> = (0..n)
            .map(|i| {
                let p = &t[1 + 4 * i..5 + 4 * i];
                let adapter = adapted.then_some(LoraPart { a: &p[2], b: &p[3], scale: 0.75 + i as f64 });
                Projection { weight: &weights[i], bias: bias.then_some(&p[1]), adapter }
            })
            .collect();
        Tensor::cat(&lora_linear(&t[0], &parts, 0.0).unwrap(), -1)
    };
    let plain = move |t: &[Tensor]| {
        let ys: Vec<_> = (0..n)
            .map(|i| {
                let p = &t[1 + 4 * i..5 + 4 * i];
                let mut y = t[0].matmul(&p[0].tr());
                if bias {
                    y = y + &p[1];
                }
                if adapted {
                    y = y + t[0].matmul(&p[2].tr()).matmul(&p[3].tr()) * (0.75 + i as f64);
                }
                y
            })
            .collect();
        Tensor::cat(&ys, -1)
    };
    Case { name: "lora_linear", inputs, fused: Box::new(fused), plain: Box::new(plain) }
}

fn plain_attention(q: &Tensor, k: &Tensor, v: &Tensor, lens: &[i64], rule: AttentionRule) -> Tensor {
    let groups = q.size()[1] / k.size()[1];
    let (k, v) = (k.repeat_interleave_self_int(groups, 1, None), v.repeat_interleave_self_int(groups, 1, None));
    let mut start = 0;
    let outs: Vec<_> = lens
        .iter()
        .map(|&n| {
            let cut = |t: &Tensor| t.narrow(0, start, n).transpose(0, 1);
            let all = Tensor::ones([n, n], (Kind::Bool, q.device()));
            let seen = if rule.causal { all.tril(0).triu(rule.window.map_or(-n, |w| 1 - w)) } else { all };
            let scores = cut(q).matmul(&cut(&k).transpose(1, 2)) * rule.scale;
            let scores = rule.softcap.map_or(scores.shallow_clone(), |c| (&scores / c).tanh() * c);
            let weights = scores.masked_fill(&seen.logical_not(), f64::NEG_INFINITY).softmax(-1, q.kind());
            let out = weights.matmul(&cut(&v)).transpose(0, 1);
            start += n;
            out
        })
        .collect();
    Tensor::cat(&outs, 0)
}

fn attention_case(lens: Vec<i64>, kv: i64, groups: i64, d: i64, window: Option<i64>, softcap: Option<f64>) -> Case {
    let n: i64 = lens.iter().sum();
    let segments = Segments::new(&lens).unwrap();
    let rule = AttentionRule { scale: 1.0 / (d as f64).sqrt(), window, softcap, causal: true };
    case_of_rule(lens, [n, kv, groups, d], segments, rule)
}

/// As in an encoder: every token of a segment sees every other.
fn encoder_attention_case(lens: Vec<i64>, heads: i64, d: i64, softcap: Option<f64>) -> Case {
    let n: i64 = lens.iter().sum();
    let segments = Segments::new(&lens).unwrap();
    let rule = AttentionRule { scale: 1.0 / (d as f64).sqrt(), window: None, softcap, causal: false };
    case_of_rule(lens, [n, heads, 1, d], segments, rule)
}

fn case_of_rule(lens: Vec<i64>, [n, kv, groups, d]: [i64; 4], segments: Segments, rule: AttentionRule) -> Case {
    Case {
        name: "attention",
        inputs: vec![vec![n, kv * groups, d], vec![n, kv, d], vec![n, kv, d]],
        fused: Box::new(move |t| attention(&t[0], &t[1], &t[2], &segments, rule).unwrap()),
        plain: Box::new(move |t| plain_attention(&t[0], &t[1], &t[2], &lens, rule)),
    }
}

fn rotary_case(tokens: i64, heads: i64, d: i64, rotated: i64) -> Case {
    let angles = move |like: &Tensor| {
        let positions = Tensor::arange(tokens, (like.kind(), like.device())).unsqueeze(1);
        positions * Tensor::linspace(1.0, 0.1, rotated / 2, (like.kind(), like.device())).unsqueeze(0)
    };
    Case {
        name: "rotary",
        inputs: vec![vec![tokens, heads, d]],
        fused: Box::new(move |t| rotary(&t[0], &angles(&t[0]).cos(), &angles(&t[0]).sin()).unwrap()),
        plain: Box::new(move |t| {
            let (cos, sin) = (angles(&t[0]).cos().unsqueeze(1), angles(&t[0]).sin().unsqueeze(1));
            let (a, b) = (t[0].narrow(2, 0, rotated / 2), t[0].narrow(2, rotated / 2, rotated / 2));
            Tensor::cat(&[&a * &cos - &b * &sin, &b * &cos + &a * &sin, t[0].narrow(2, rotated, d - rotated)], 2)
        }),
    }
}

/// Values beyond where the gates are flat, among others.
fn gated_case(act: Gate, rows: i64, width: i64) -> Case {
    let name = match act {
        Gate::Silu => "swiglu",
        Gate::Gelu => "geglu by erf",
        Gate::GeluTanh => "geglu by tanh",
    };
    let plain = move |t: &[Tensor]| match act {
        Gate::Silu => (&t[0] * 6.0).silu() * &t[1],
        Gate::Gelu => (&t[0] * 6.0).gelu("none") * &t[1],
        Gate::GeluTanh => (&t[0] * 6.0).gelu("tanh") * &t[1],
    };
    let inputs = vec![vec![rows, width], vec![rows, width]];
    let fused = Box::new(move |t: &[Tensor]| gated(act, &(&t[0] * 6.0), &t[1]).unwrap());
    Case { name, inputs, fused, plain: Box::new(plain) }
}

/// The key is that of the seed, so the same values are dropped in every call; the twin finds out which from ones.
fn dropout_case(rows: i64, width: i64) -> Case {
    let drawn = |x: &Tensor| {
        let _drawing = lora_torch::manual_seed(5);
        dropout(x, 0.3).unwrap()
    };
    Case {
        name: "dropout",
        inputs: vec![vec![rows, width]],
        fused: Box::new(move |t| drawn(&t[0])),
        plain: Box::new(move |t| &t[0] * drawn(&t[0].ones_like()).detach()),
    }
}

/// Weights of every sign, and 0 among them.
fn row_weights(rows: i64, like: &Tensor) -> Tensor {
    (Tensor::arange(rows, (like.kind(), like.device())) - 2.0) * 0.5
}

fn loss_case([rows, d, vocab, chunk]: [i64; 4], adapted: bool, weighted: bool, softcap: Option<f64>) -> Case {
    let targets = move |on: Device| (Tensor::arange(rows, (Kind::Int64, on)) * 7).remainder(vocab);
    let mut inputs = vec![vec![rows, d], vec![vocab, d], vec![vocab]];
    if adapted {
        inputs.extend([vec![3, d], vec![vocab, 3]]);
    }
    Case {
        name: "cross_entropy",
        inputs,
        fused: Box::new(move |t| {
            let adapter = adapted.then(|| LoraPart { a: &t[3], b: &t[4], scale: 1.5 });
            let weight = t[1].shallow_clone().into();
            let head = HeadPart { weight: &weight, bias: Some(&t[2]), adapter, softcap };
            let weights = weighted.then(|| row_weights(rows, &t[0]));
            cross_entropy(&t[0], head, &targets(t[0].device()), weights.as_ref(), chunk).unwrap()
        }),
        plain: Box::new(move |t| {
            let mut logits = t[0].matmul(&t[1].tr()) + &t[2];
            if adapted {
                logits = logits + t[0].matmul(&t[3].tr()).matmul(&t[4].tr()) * 1.5;
            }
            if let Some(c) = softcap {
                logits = (logits / c).tanh() * c;
            }
            let log_p = logits.log_softmax(-1, logits.kind());
            let losses = -log_p.gather(1, &targets(t[0].device()).unsqueeze(1), false).squeeze_dim(1);
            (if weighted { losses * row_weights(rows, &t[0]) } else { losses }).sum(logits.kind())
        }),
    }
}

fn cases() -> Vec<Case> {
    vec![
        linear_case(7, 12, vec![5], 3, true, false),
        linear_case(6, 8, vec![5, 9, 4], 2, true, true),
        linear_case(5, 8, vec![6, 3], 2, false, true),
        Case {
            name: "rms_norm",
            inputs: vec![vec![2, 5, 37], vec![37]],
            fused: Box::new(|t| rms_norm(&t[0], &t[1], 1e-6).unwrap()),
            plain: Box::new(|t| {
                let mean = t[0].square().mean_dim([-1i64].as_slice(), true, t[0].kind());
                &t[0] * (mean + 1e-6).rsqrt() * &t[1]
            }),
        },
        rotary_case(6, 3, 16, 16),
        rotary_case(5, 2, 16, 8),
        gated_case(Gate::Silu, 4, 33),
        gated_case(Gate::Gelu, 4, 33),
        gated_case(Gate::GeluTanh, 4, 33),
        dropout_case(5, 40),
        attention_case(vec![9], 2, 1, 8, None, None),
        attention_case(vec![4, 4, 7, 1], 2, 3, 8, None, None),
        attention_case(vec![11, 3], 1, 2, 16, Some(4), None),
        attention_case(vec![5, 5, 9], 2, 2, 8, Some(6), Some(0.7)),
        loss_case([10, 8, 29, 4], false, false, None),
        loss_case([10, 8, 29, 64], true, false, None),
        loss_case([10, 8, 29, 4], true, false, Some(1.5)),
        loss_case([10, 8, 29, 4], true, true, Some(1.5)),
        loss_case([9, 8, 29, 64], false, true, None),
    ]
}

fn devices() -> Vec<Device> {
    match cuda_status() {
        CudaStatus::Loaded { .. } => vec![Device::Cpu, Device::Cuda(0)],
        status => {
            assert!(std::env::var_os("LORA_REQUIRE_CUDA").is_none(), "LORA_REQUIRE_CUDA is set: {status:?}");
            eprintln!("conformance: CPU only ({status:?})");
            vec![Device::Cpu]
        }
    }
}

fn leaves(case: &Case, kind: Kind, device: Device) -> Vec<Tensor> {
    // Scattered values in (-1.7, 1.7), of variance one, without the generator that tests in other threads draw from.
    let make = |(j, s): (usize, &Vec<i64>)| {
        let at = Tensor::arange(s.iter().product::<i64>(), (Kind::Double, Device::Cpu)) * 12.9898
            + (j as f64 + 1.0) * 78.233;
        let t = ((at.sin() * 43758.5453).frac() * 2.0 - at.cos()).clamp(-1.7, 1.7).view(s.as_slice());
        t.to_kind(kind).to(device).set_requires_grad(true)
    };
    case.inputs.iter().enumerate().map(make).collect()
}

/// The output, and the gradient of a fixed weighted sum of it for each input.
fn run(op: &Op, inputs: &[Tensor]) -> (Tensor, Vec<Option<Tensor>>) {
    let y = op(inputs);
    let weights = Tensor::arange(y.numel() as i64, (Kind::Double, y.device())).sin().to_kind(y.kind()).view_as(&y);
    (&y * weights).sum(y.kind()).backward();
    let grads = inputs.iter().map(|t| Some(t.grad()).filter(Tensor::defined).map(|g| g.copy())).collect();
    (y.detach(), grads)
}

fn error_of(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let scale = b.abs().max().double_value(&[]).max(1.0);
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[]) / scale
}

#[test]
fn every_operation_equals_its_plain_twin() {
    for device in devices() {
        let mut kinds = vec![(Kind::Float, F32_TOLERANCE), (Kind::Double, F64_TOLERANCE)];
        if device != Device::Cpu {
            kinds.push((Kind::BFloat16, BF16_TOLERANCE));
        }
        for (kind, tolerance) in kinds {
            for (i, case) in cases().iter().enumerate() {
                let (y, grads) = run(&case.fused, &leaves(case, kind, device));
                let (y2, grads2) = run(&case.plain, &leaves(case, kind, device));
                let name = format!("{} (case {i}, {kind:?}, {device:?})", case.name);
                assert!(error_of(&y, &y2) < tolerance, "{name}: {}", error_of(&y, &y2));
                for (j, (g, g2)) in grads.iter().zip(&grads2).enumerate() {
                    match (g, g2) {
                        (Some(g), Some(g2)) => {
                            assert!(error_of(g, g2) < tolerance, "{name}, gradient {j}: {}", error_of(g, g2));
                        }
                        (None, None) => {}
                        _ => panic!("{name}: gradient {j} is there in one form only"),
                    }
                }
            }
        }
    }
}

#[test]
fn gradients_equal_finite_differences() {
    for case in cases() {
        let inputs = leaves(&case, Kind::Double, Device::Cpu);
        let (_, grads) = run(&case.fused, &inputs);
        for (j, grad) in grads.iter().enumerate() {
            let Some(grad) = grad else { continue };
            for entry in [0, grad.numel() as i64 / 2, grad.numel() as i64 - 1] {
                let value = |sign: f64| {
                    let moved: Vec<_> = inputs.iter().map(|t| t.detach().copy()).collect();
                    let _ = moved[j].view(-1).narrow(0, entry, 1).g_add_scalar_(sign * DIFFERENCE_STEP);
                    let y = (case.fused)(&moved);
                    let weights = Tensor::arange(y.numel() as i64, (Kind::Double, Device::Cpu)).sin().view_as(&y);
                    (y * weights).sum(Kind::Double).double_value(&[])
                };
                let numeric = (value(1.0) - value(-1.0)) / (2.0 * DIFFERENCE_STEP);
                let exact = grad.view(-1).double_value(&[entry]);
                let error = (numeric - exact).abs() / exact.abs().max(1.0);
                assert!(
                    error < DIFFERENCE_TOLERANCE,
                    "{} input {j} entry {entry}: {exact} against {numeric}",
                    case.name
                );
            }
        }
    }
}

#[test]
fn frozen_weights_get_no_gradient_and_nothing_their_size_is_kept() {
    let f = (Kind::Float, Device::Cpu);
    let (x, w) = (Tensor::randn([4, 8], f), Tensor::randn([6, 8], f));
    let a = Tensor::randn([2, 8], f).set_requires_grad(true);
    let b = Tensor::randn([6, 2], f).set_requires_grad(true);
    let part = LoraPart { a: &a, b: &b, scale: 2.0 };
    let y = lora_linear(&x, &[Projection { weight: &w.shallow_clone().into(), bias: None, adapter: Some(part) }], 0.0)
        .unwrap();
    y[0].sum(Kind::Float).backward();
    assert!(!w.grad().defined() && !x.grad().defined());
    assert!(a.grad().defined() && b.grad().defined());
}

#[test]
fn dropout_scales_what_it_keeps_and_its_gradient_uses_the_same_mask() {
    let f = (Kind::Double, Device::Cpu);
    let (n, p) = (4000, 0.25);
    let x = Tensor::ones([n, 1], f).set_requires_grad(true);
    let w = Tensor::zeros([1, 1], f);
    let (a, b) = (Tensor::ones([1, 1], f).set_requires_grad(true), Tensor::ones([1, 1], f));
    tch::manual_seed(3);
    let part = LoraPart { a: &a, b: &b, scale: 1.0 };
    let y = lora_linear(&x, &[Projection { weight: &w.into(), bias: None, adapter: Some(part) }], p).unwrap().remove(0);
    let kept = y.gt(0.0).sum(Kind::Int64).int64_value(&[]);
    assert!((kept as f64 / n as f64 - (1.0 - p)).abs() < 0.03, "{kept} of {n} kept");
    assert_eq!(y.max().double_value(&[]), 1.0 / (1.0 - p));
    y.sum(Kind::Double).backward();
    assert!(x.grad().equal(&y.detach()), "with a = b = 1 the gradient of x is the mask itself");
    assert!((a.grad().double_value(&[0, 0]) - y.sum(Kind::Double).double_value(&[])).abs() < F64_TOLERANCE * n as f64);
}

/// What each projection drops, found by projections that give back what their adapters read.
fn masks_of(size: [i64; 2], n: usize, p: f64, seed: u64) -> Vec<Tensor> {
    let f = (Kind::Double, Device::Cpu);
    let (weight, eye) = (Tensor::zeros([size[1], size[1]], f).into(), Tensor::eye(size[1], f));
    let part = LoraPart { a: &eye, b: &eye, scale: 1.0 };
    let one = Projection { weight: &weight, bias: None, adapter: Some(part) };
    let _drawing = lora_torch::manual_seed(seed);
    lora_linear(&Tensor::ones(size, f), &vec![one; n], p).unwrap()
}

#[test]
fn dropped_inputs_and_their_gradients_are_those_of_the_masks_written_out() {
    let (p, size, outs) = (0.4, [6, 8], [5i64, 9, 4]);
    let case = linear_case(size[0], size[1], outs.to_vec(), 2, true, true);
    let inputs = leaves(&case, Kind::Double, Device::Cpu);
    let masks = masks_of(size, outs.len(), p, 11);
    let projected = move |t: &[Tensor]| {
        let weights: Vec<Weight> = (0..3).map(|i| t[1 + 4 * i].shallow_clone().into()).collect();
        let of = |i: usize| {
            let adapter = Some(LoraPart { a: &t[3 + 4 * i], b: &t[4 + 4 * i], scale: 0.5 + i as f64 });
            Projection { weight: &weights[i], bias: Some(&t[2 + 4 * i]), adapter }
        };
        let _drawing = lora_torch::manual_seed(11);
        Tensor::cat(&lora_linear(&t[0], &[of(0), of(1), of(2)], p).unwrap(), -1)
    };
    let written_out = move |t: &[Tensor]| {
        let of = |i: usize| {
            let low = (&t[0] * &masks[i]).matmul(&t[3 + 4 * i].tr()).matmul(&t[4 + 4 * i].tr());
            t[0].matmul(&t[1 + 4 * i].tr()) + &t[2 + 4 * i] + low * (0.5 + i as f64)
        };
        Tensor::cat(&[of(0), of(1), of(2)], -1)
    };
    let (y, g) = run(&(Box::new(projected) as Op), &inputs);
    let (y2, g2) = run(&(Box::new(written_out) as Op), &leaves(&case, Kind::Double, Device::Cpu));
    assert!(error_of(&y, &y2) < F64_TOLERANCE, "{}", error_of(&y, &y2));
    for (a, b) in g.iter().flatten().zip(g2.iter().flatten()) {
        assert!(error_of(a, b) < F64_TOLERANCE, "{}", error_of(a, b));
    }
}

#[test]
fn what_is_dropped_looks_drawn_and_differs_by_adapter_seed_and_place() {
    // So many standard deviations of a mean of independent draws.
    const DEVIATIONS: f64 = 5.0;
    let (p, size) = (0.3, [256, 320]);
    let n = (size[0] * size[1]) as f64;
    let masks = masks_of(size, 2, p, 1);
    assert!(masks[0].equal(&masks_of(size, 1, p, 1)[0]), "the same seed drops the same values");
    let kept = |t: &Tensor| t.gt(0.0).to_kind(Kind::Double) - (1.0 - p);
    let (a, b, c) = (kept(&masks[0]), kept(&masks[1]), kept(&masks_of(size, 1, p, 2)[0]));
    let variance = p * (1.0 - p);
    let is_chance = |what: &str, mean: f64, of: f64, variance: f64| {
        assert!(mean.abs() < DEVIATIONS * (variance / of).sqrt(), "{what}: {mean}");
    };
    let mean = |t: Tensor| t.mean(Kind::Double).double_value(&[]);
    is_chance("all", mean(a.shallow_clone()), n, variance);
    for (what, other) in [("another adapter", &b), ("another seed", &c)] {
        is_chance(what, mean(&a * other), n, variance * variance);
    }
    for step in [1, 2, 64, 320] {
        let flat = a.view(-1);
        let rest = n as i64 - step;
        is_chance(
            "neighbours",
            mean(flat.narrow(0, 0, rest) * flat.narrow(0, step, rest)),
            rest as f64,
            variance * variance,
        );
    }
    for dim in [0i64, 1] {
        let of = size[dim as usize] as f64;
        let most = a.mean_dim([dim].as_slice(), false, Kind::Double).abs().max().double_value(&[]);
        is_chance("a row or column", most, of, variance);
    }
}

/// An input that is made again gives the same bits as one that is kept, and no gradient goes another way.
#[test]
fn an_input_that_is_made_again_changes_no_bit() {
    const EPS: f64 = 1e-5; // of the norms
    let on = (Kind::Float, Device::Cpu);
    let of = |size: &[i64], at: f64| {
        let n: i64 = size.iter().product();
        ((Tensor::arange(n, (Kind::Double, Device::Cpu)) * 0.7 + at).sin().view(size)).to_kind(Kind::Float)
    };
    for p in [0.0, 0.25] {
        for form in 0..5 {
            let results = [false, true].map(|remade| {
                let (x, up) = (of(&[7, 24], 1.0).set_requires_grad(true), of(&[7, 24], 2.0).set_requires_grad(true));
                let (weight, bias) = (of(&[24], 3.0), of(&[24], 4.0));
                let (a, b) = (of(&[2, 24], 5.0).set_requires_grad(true), of(&[9, 2], 6.0).set_requires_grad(true));
                let act = [Gate::Silu, Gate::Gelu, Gate::GeluTanh][form % 3];
                let (input, origin) = match form {
                    3 => (rms_norm(&x, &weight, EPS).unwrap(), Origin::RmsNorm { x: &x, weight: &weight, eps: EPS }),
                    4 => (
                        x.layer_norm([24i64].as_slice(), Some(&weight), Some(&bias), EPS, true),
                        Origin::LayerNorm { x: &x, weight: &weight, bias: Some(&bias), eps: EPS },
                    ),
                    _ => (gated(act, &x, &up).unwrap(), Origin::Gated { act, gate: &x, up: &up }),
                };
                let weight = of(&[9, 24], 7.0).into();
                let part = LoraPart { a: &a, b: &b, scale: 1.5 };
                let projection = Projection { weight: &weight, bias: None, adapter: Some(part) };
                let y = {
                    let _drawing = lora_torch::manual_seed(3);
                    lora_linear_of(&input, remade.then_some(origin), &[projection, projection], p).unwrap()
                };
                drop(input);
                (&y[0] + &y[1] * Tensor::ones([1], on)).square().sum(Kind::Float).backward();
                let up = if form < 3 { up.grad() } else { up.detach() };
                [y[0].detach(), x.grad(), up, a.grad(), b.grad()]
            });
            for (kept, remade) in results[0].iter().zip(&results[1]) {
                assert!(kept.equal(remade), "form {form}, dropout {p}");
                assert!(kept.abs().max().double_value(&[]) > 0.0, "form {form}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn gated_any_shape(rows in 0i64..9, width in 1i64..70, act in prop::sample::select(vec![Gate::Silu, Gate::Gelu, Gate::GeluTanh])) {
        for (kind, tolerance) in [(Kind::Double, F64_TOLERANCE), (Kind::Float, F32_TOLERANCE)] {
            if rows == 0 {
                let none = Tensor::zeros([0, width], (kind, Device::Cpu));
                prop_assert_eq!(gated(act, &none, &none).unwrap().size(), [0, width]);
                continue;
            }
            let case = gated_case(act, rows, width);
            let (y, g) = run(&case.fused, &leaves(&case, kind, Device::Cpu));
            let (y2, g2) = run(&case.plain, &leaves(&case, kind, Device::Cpu));
            prop_assert!(error_of(&y, &y2) < tolerance, "{}", error_of(&y, &y2));
            for (a, b) in g.iter().flatten().zip(g2.iter().flatten()) {
                prop_assert!(error_of(a, b) < tolerance, "{}", error_of(a, b));
            }
        }
    }

    #[test]
    fn linear_any_shape(rows in 1i64..9, width in 1i64..20, outs in prop::collection::vec(1i64..17, 1..4), r in 1i64..5, bias: bool) {
        let case = linear_case(rows, width, outs, r, true, bias);
        let (y, g) = run(&case.fused, &leaves(&case, Kind::Double, Device::Cpu));
        let (y2, g2) = run(&case.plain, &leaves(&case, Kind::Double, Device::Cpu));
        prop_assert!(error_of(&y, &y2) < F64_TOLERANCE, "{}", error_of(&y, &y2));
        for (a, b) in g.iter().flatten().zip(g2.iter().flatten()) {
            prop_assert!(error_of(a, b) < F64_TOLERANCE, "{}", error_of(a, b));
        }
    }

    #[test]
    fn attention_any_segments(lens in prop::collection::vec(1i64..12, 1..5), kv in 1i64..3, groups in 1i64..4, window in prop::option::of(1i64..9), softcap in prop::option::of(0.5f64..5.0)) {
        let case = attention_case(lens, kv, groups, 8, window, softcap);
        let (y, g) = run(&case.fused, &leaves(&case, Kind::Double, Device::Cpu));
        let (y2, g2) = run(&case.plain, &leaves(&case, Kind::Double, Device::Cpu));
        prop_assert!(error_of(&y, &y2) < F64_TOLERANCE, "{}", error_of(&y, &y2));
        for (a, b) in g.iter().flatten().zip(g2.iter().flatten()) {
            prop_assert!(error_of(a, b) < F64_TOLERANCE, "{}", error_of(a, b));
        }
    }

    #[test]
    fn encoder_attention_any_segments(lens in prop::collection::vec(1i64..12, 1..5), heads in 1i64..4, softcap in prop::option::of(0.5f64..5.0)) {
        let case = encoder_attention_case(lens, heads, 8, softcap);
        let (y, g) = run(&case.fused, &leaves(&case, Kind::Double, Device::Cpu));
        let (y2, g2) = run(&case.plain, &leaves(&case, Kind::Double, Device::Cpu));
        prop_assert!(error_of(&y, &y2) < F64_TOLERANCE, "{}", error_of(&y, &y2));
        for (a, b) in g.iter().flatten().zip(g2.iter().flatten()) {
            prop_assert!(error_of(a, b) < F64_TOLERANCE, "{}", error_of(a, b));
        }
    }

    #[test]
    fn the_chunk_size_does_not_change_the_loss(rows in 1i64..30, chunk in 1i64..40) {
        let case = |chunk| loss_case([rows, 6, 19, chunk], true, true, None);
        let (whole, parts) = (case(rows), case(chunk));
        let (y, g) = run(&whole.fused, &leaves(&whole, Kind::Double, Device::Cpu));
        let (y2, g2) = run(&parts.fused, &leaves(&parts, Kind::Double, Device::Cpu));
        prop_assert!(error_of(&y, &y2) < F64_TOLERANCE, "{}", error_of(&y, &y2));
        for (a, b) in g.iter().flatten().zip(g2.iter().flatten()) {
            prop_assert!(error_of(a, b) < F64_TOLERANCE, "{}", error_of(a, b));
        }
    }
}

/// The loss of each row is what the sum takes from it.
#[test]
fn losses_of_tokens_are_those_of_the_sum() {
    for case in [loss_case([10, 8, 29, 4], true, false, Some(1.5)), loss_case([10, 8, 29, 3], false, false, None)] {
        let t = leaves(&case, Kind::Double, Device::Cpu);
        let softcap = (t.len() > 3).then_some(1.5);
        let adapter = (t.len() > 3).then(|| LoraPart { a: &t[3], b: &t[4], scale: 1.5 });
        let weight = t[1].detach().into();
        let head = HeadPart { weight: &weight, bias: Some(&t[2]), adapter, softcap };
        let targets = (Tensor::arange(10, (Kind::Int64, Device::Cpu)) * 7).remainder(29);
        let each = token_losses(&t[0], head, &targets, 3).unwrap();
        assert!(!each.requires_grad() && each.kind() == Kind::Double && each.size() == [10]);
        for row in 0..10 {
            let one = Tensor::zeros([10], (Kind::Double, Device::Cpu));
            let _ = one.get(row).fill_(1.0);
            let of_row = cross_entropy(&t[0], head, &targets, Some(&one), 4).unwrap();
            assert!(error_of(&of_row.detach(), &each.get(row)) < F64_TOLERANCE, "row {row}");
        }
    }
}
