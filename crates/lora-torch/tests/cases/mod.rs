//! The fused operations beside the plain expressions that they must equal.
#![allow(clippy::assign_op_pattern)] // tensors have no in-place operators

use lora_torch::{
    AttentionRule, Gate, HeadPart, LoraPart, Projection, Segments, Weight, attention, cross_entropy, dropout, gated,
    lora_linear, rms_norm, rotary,
};
use tch::{Device, Kind, Tensor};

/// Rounding of a sum of up to a few hundred terms of order one: a few hundred half-ulps.
pub(crate) const F32_TOLERANCE: f64 = 300.0 * f32::EPSILON as f64;
pub(crate) const F64_TOLERANCE: f64 = 300.0 * f64::EPSILON;
/// bfloat16 keeps 8 bits, and every intermediate of the twin is rounded to them.
pub(crate) const BF16_TOLERANCE: f64 = 1.0 / 32.0;

pub(crate) type Op = Box<dyn Fn(&[Tensor]) -> Tensor>;

/// A fused operation, the plain expression that it must equal, and the shapes of its differentiable inputs.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) inputs: Vec<Vec<i64>>,
    pub(crate) fused: Op,
    pub(crate) plain: Op,
}

pub(crate) fn linear_case(rows: i64, width: i64, outs: Vec<i64>, r: i64, adapted: bool, bias: bool) -> Case {
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

pub(crate) fn plain_attention(q: &Tensor, k: &Tensor, v: &Tensor, lens: &[i64], rule: AttentionRule) -> Tensor {
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

pub(crate) fn attention_case(
    lens: Vec<i64>,
    kv: i64,
    groups: i64,
    d: i64,
    window: Option<i64>,
    softcap: Option<f64>,
) -> Case {
    let n: i64 = lens.iter().sum();
    let segments = Segments::new(&lens).unwrap();
    let rule = AttentionRule { scale: 1.0 / (d as f64).sqrt(), window, softcap, causal: true };
    case_of_rule(lens, [n, kv, groups, d], segments, rule)
}

pub(crate) fn case_of_rule(
    lens: Vec<i64>,
    [n, kv, groups, d]: [i64; 4],
    segments: Segments,
    rule: AttentionRule,
) -> Case {
    Case {
        name: "attention",
        inputs: vec![vec![n, kv * groups, d], vec![n, kv, d], vec![n, kv, d]],
        fused: Box::new(move |t| attention(&t[0], &t[1], &t[2], &segments, rule).unwrap()),
        plain: Box::new(move |t| plain_attention(&t[0], &t[1], &t[2], &lens, rule)),
    }
}

pub(crate) fn rotary_case(tokens: i64, heads: i64, d: i64, rotated: i64) -> Case {
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
pub(crate) fn gated_case(act: Gate, rows: i64, width: i64) -> Case {
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
pub(crate) fn dropout_case(rows: i64, width: i64) -> Case {
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
pub(crate) fn row_weights(rows: i64, like: &Tensor) -> Tensor {
    (Tensor::arange(rows, (like.kind(), like.device())) - 2.0) * 0.5
}

pub(crate) fn loss_case(
    [rows, d, vocab, chunk]: [i64; 4],
    adapted: bool,
    weighted: bool,
    softcap: Option<f64>,
) -> Case {
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

pub(crate) fn cases() -> Vec<Case> {
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

pub(crate) fn leaves(case: &Case, kind: Kind, device: Device) -> Vec<Tensor> {
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
pub(crate) fn run(op: &Op, inputs: &[Tensor]) -> (Tensor, Vec<Option<Tensor>>) {
    let y = op(inputs);
    let weights = Tensor::arange(y.numel() as i64, (Kind::Double, y.device())).sin().to_kind(y.kind()).view_as(&y);
    (&y * weights).sum(y.kind()).backward();
    let grads = inputs.iter().map(|t| Some(t.grad()).filter(Tensor::defined).map(|g| g.copy())).collect();
    (y.detach(), grads)
}

pub(crate) fn error_of(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let scale = b.abs().max().double_value(&[]).max(1.0);
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[]) / scale
}
