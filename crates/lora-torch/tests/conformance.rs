//! Every fused operation against its plain twin, forward and gradients, on the CPU always and on CUDA where there is one,
//! and against finite differences in float64.
#![allow(clippy::print_stderr, clippy::assign_op_pattern)] // tensors have no in-place operators; what was not tested is said
//!
//! `LORA_REQUIRE_CUDA=1` turns an absent CUDA device into a failure, so that a machine with a GPU cannot pass by skipping.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

mod cases;

use cases::*;
use lora_torch::{
    AttentionRule, CudaStatus, Gate, HeadPart, LoraPart, Origin, Projection, Segments, Weight, cross_entropy,
    cuda_status, gated, lora_linear, lora_linear_of, rms_norm, token_losses,
};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

/// Central differences with step h err by h² f‴/6 + eps/h; h = 1e-5 balances the two near 1e-10, sums of outputs add to it.
const DIFFERENCE_STEP: f64 = 1e-5;
const DIFFERENCE_TOLERANCE: f64 = 1e-6;

/// As in an encoder: every token of a segment sees every other.
fn encoder_attention_case(lens: Vec<i64>, heads: i64, d: i64, softcap: Option<f64>) -> Case {
    let n: i64 = lens.iter().sum();
    let segments = Segments::new(&lens).unwrap();
    let rule = AttentionRule { scale: 1.0 / (d as f64).sqrt(), window: None, softcap, causal: false };
    case_of_rule(lens, [n, heads, 1, d], segments, rule)
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
