//! Packed and half-precision weights against the dense ones that they stand for: products, gradients, losses.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use lora_torch::{HeadPart, Int8, LoraPart, Nf4, Projection, Weight, cross_entropy, lora_linear};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

/// Products over tiles sum in another order than over the whole: a few hundred half-ulps of fp32.
const TOLERANCE: f64 = 300.0 * f32::EPSILON as f64;
/// The widest gap between two of the 16 quantiles is 1 - 0.6962; the farthest number lies half of it away.
const NF4_GAP: f64 = (1.0 - 0.696_192_8) / 2.0;
/// Packed scales move by at most half of the widest step of the dynamic table, 0.9 / 64 / 2 of the largest deviation of a
/// scale from the mean, which is at most the largest scale.
const NESTED_GAP: f64 = 0.9 / 64.0 / 2.0;
/// Central differences: see conformance.rs.
const DIFFERENCE_STEP: f64 = 1e-5;
const DIFFERENCE_TOLERANCE: f64 = 1e-6;

/// Scattered values of variance one, the same at every call.
fn values(shape: &[i64], salt: f64) -> Tensor {
    let n: i64 = shape.iter().product();
    let at = Tensor::arange(n, (Kind::Double, Device::Cpu)) * 12.9898 + salt * 78.233;
    ((at.sin() * 43758.5453).frac() * 2.0 - at.cos()).clamp(-1.7, 1.7).view(shape).to_kind(Kind::Float)
}

fn forms(weight: &Tensor) -> Vec<(&'static str, Weight)> {
    vec![
        ("nf4", Weight::Nf4(Nf4::pack(weight, false).unwrap())),
        ("nf4-double", Weight::Nf4(Nf4::pack(weight, true).unwrap())),
        ("int8", Weight::Int8(Int8::pack(weight).unwrap())),
        ("bfloat16", Weight::Plain(weight.to_kind(Kind::BFloat16))),
        ("float16", Weight::Plain(weight.to_kind(Kind::Half))),
    ]
}

fn far(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let scale = b.abs().max().double_value(&[]).max(1.0);
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[]) / scale
}

/// Output and gradients of x, A, B and the bias.
fn linear(weight: &Weight, kind: Kind) -> Vec<Tensor> {
    let size = weight.size();
    let leaf = |shape: &[i64], salt| values(shape, salt).to_kind(kind).set_requires_grad(true);
    let (x, bias) = (leaf(&[7, size[1]], 1.0), leaf(&[size[0]], 2.0));
    let (a, b) = (leaf(&[3, size[1]], 3.0), leaf(&[size[0], 3], 4.0));
    let adapter = Some(LoraPart { a: &a, b: &b, scale: 0.5 });
    let y = lora_linear(&x, &[Projection { weight, bias: Some(&bias), adapter }], 0.0).unwrap().remove(0);
    (&y * values(&y.size(), 5.0).to_kind(kind)).sum(kind).backward();
    let mut all = vec![y.detach()];
    all.extend([&x, &a, &b, &bias].map(|t| t.grad()));
    all
}

#[test]
fn products_with_a_packed_weight_are_those_with_what_it_stands_for() {
    // Wide and high enough for several tiles, and with rows that do not end where a block ends.
    for shape in [[40i64, 64], [33, 50], [700, 2048]] {
        for (name, weight) in forms(&(values(&shape, 0.0) * 0.1)) {
            let dense = Weight::Plain(weight.dense().unwrap().to_kind(Kind::Float));
            for (got, wanted) in linear(&weight, Kind::Float).iter().zip(linear(&dense, Kind::Float)) {
                assert!(far(got, &wanted) < TOLERANCE, "{name} {shape:?}: {}", far(got, &wanted));
            }
            let norms = weight.row_norms().unwrap();
            let wanted = dense.plain().unwrap().norm_scalaropt_dim(2, [1i64].as_slice(), false);
            assert!(far(&norms, &wanted) < TOLERANCE, "{name} {shape:?}: norms");
        }
    }
}

#[test]
fn gradients_through_a_packed_weight_equal_finite_differences() {
    for (name, weight) in forms(&values(&[6, 10], 0.0)) {
        let x = values(&[2, 10], 1.0).to_kind(Kind::Double).set_requires_grad(true);
        let value = |x: &Tensor| {
            let y =
                lora_linear(x, &[Projection { weight: &weight, bias: None, adapter: None }], 0.0).unwrap().remove(0);
            (&y * &y).sum(Kind::Double)
        };
        value(&x).backward();
        for entry in [0i64, 7, 19] {
            let moved = |by: f64| {
                let x = x.detach().copy();
                let _ = x.view(-1).narrow(0, entry, 1).g_add_scalar_(by);
                value(&x).double_value(&[])
            };
            let numeric = (moved(DIFFERENCE_STEP) - moved(-DIFFERENCE_STEP)) / (2.0 * DIFFERENCE_STEP);
            let exact = x.grad().view(-1).double_value(&[entry]);
            assert!(
                (numeric - exact).abs() / exact.abs().max(1.0) < DIFFERENCE_TOLERANCE,
                "{name}: {exact}, {numeric}"
            );
        }
    }
}

#[test]
fn a_loss_over_a_packed_head_is_that_over_what_it_stands_for() {
    let targets = Tensor::arange(9, (Kind::Int64, Device::Cpu)) * 3;
    for (name, weight) in forms(&values(&[31, 24], 0.0)) {
        let dense = Weight::Plain(weight.dense().unwrap().to_kind(Kind::Float));
        let run = |weight: &Weight| {
            let hidden = values(&[9, 24], 1.0).set_requires_grad(true);
            let head = HeadPart { weight, bias: None, adapter: None, softcap: Some(5.0) };
            let loss = cross_entropy(&hidden, head, &targets, None, 4).unwrap();
            loss.backward();
            (loss.detach(), hidden.grad())
        };
        let ((loss, gradient), (wanted, wanted_gradient)) = (run(&weight), run(&dense));
        assert!(far(&loss, &wanted) < TOLERANCE, "{name}: {loss:?} {wanted:?}");
        assert!(far(&gradient, &wanted_gradient) < TOLERANCE, "{name}: gradient");
    }
}

#[test]
fn packed_weights_take_the_bytes_that_they_should() {
    let weight = values(&[256, 512], 0.0);
    let bytes: Vec<usize> = forms(&weight).iter().map(|(_, w)| w.bytes()).collect();
    let n = 256 * 512;
    assert_eq!(bytes[0], n / 2 + n / 64 * 4);
    assert_eq!(bytes[1], n / 2 + n / 64 + n / 64 / 256 * 4 + 256 * 4);
    assert_eq!(bytes[2], n + 256 * 4);
    assert_eq!(bytes[3], 2 * n);
}

#[test]
fn what_is_not_finite_or_no_matrix_is_refused() {
    let broken = values(&[4, 16], 0.0);
    let _ = broken.get(1).get(2).fill_(f64::NAN);
    for fault in [Nf4::pack(&broken, true).map(|_| ()), Int8::pack(&broken).map(|_| ())] {
        assert!(fault.unwrap_err().to_string().contains("finite"));
    }
    assert!(Nf4::pack(&values(&[8], 0.0), false).is_err());
    let nf4 = Nf4::pack(&values(&[4, 16], 0.0), false).unwrap();
    let codes = nf4.codes.shallow_clone();
    assert!(Nf4::from_parts(codes, nf4.scales, 64, [5, 16]).is_err(), "more numbers than codes");
}

#[test]
fn gradients_of_a_trained_weight_come_in_its_own_dtype() {
    let master = values(&[5, 8], 0.0).to_kind(Kind::Double).set_requires_grad(true);
    let weight = Weight::Plain(master.shallow_clone());
    let x = values(&[3, 8], 1.0);
    let y = lora_linear(&x, &[Projection { weight: &weight, bias: None, adapter: None }], 0.0).unwrap().remove(0);
    y.sum(Kind::Float).backward();
    assert_eq!(master.grad().kind(), Kind::Double);
    let wanted = x.sum_dim_intlist([0i64].as_slice(), false, Kind::Float).expand([5, 8], false);
    assert!(far(&master.grad(), &wanted) < TOLERANCE);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn every_number_is_near_its_code(rows in 1i64..20, cols in 1i64..200, salt in 0.0f64..100.0, exponent in -6i32..6) {
        let weight = values(&[rows, cols], salt) * 10f64.powi(exponent);
        let most = weight.abs().max().double_value(&[]);
        for (double, gap) in [(false, NF4_GAP), (true, NF4_GAP + 2.0 * NESTED_GAP)] {
            let packed = Weight::Nf4(Nf4::pack(&weight, double).unwrap());
            prop_assert_eq!(packed.size(), vec![rows, cols]);
            let error = (packed.dense().unwrap() - &weight).abs().max().double_value(&[]);
            prop_assert!(error <= most * gap * (1.0 + TOLERANCE), "{} of {}", error, most);
        }
        let error = (Weight::Int8(Int8::pack(&weight).unwrap()).dense().unwrap() - &weight).abs().max().double_value(&[]);
        prop_assert!(error <= most / 254.0 * (1.0 + TOLERANCE));
    }

    /// What was packed and unpacked packs to the same codes.
    #[test]
    fn packing_again_changes_nothing(rows in 1i64..12, cols in 2i64..150, salt in 0.0f64..100.0) {
        let first = Nf4::pack(&values(&[rows, cols], salt), false).unwrap();
        let codes = first.codes.shallow_clone();
        let second = Nf4::pack(&Weight::Nf4(first).dense().unwrap(), false).unwrap();
        prop_assert!(codes.equal(&second.codes));
    }
}
