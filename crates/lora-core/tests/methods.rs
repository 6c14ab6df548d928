//! VeRA and AdaLoRA in float64: gradients against differences, forward against the merged weight, and the allocation.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use lora_core::{
    AdaLora, Adapter, BudgetSchedule, KeptTriplets, LinearLayer, RankAllocator, Triplets, Vera, VeraProjection,
    forward_many, orthogonality,
};
use proptest::prelude::*;
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor, no_grad};

/// Sums of some hundred products of order one in float64.
const F64_TOLERANCE: f64 = 1e-10;
/// Central differences with this step are off by its square, times a third derivative of order one to ten.
const STEP: f64 = 1e-5;
const GRADIENT_TOLERANCE: f64 = 1e-7;
/// The divisor of AdaLoRA's scale is rounded to fp32; what PEFT adds to the rank changes it by five times this.
const SCALE_TOLERANCE: f64 = 1e-6;
const F: (Kind, Device) = (Kind::Double, Device::Cpu);

/// Values of order one that depend on `salt` only.
fn values(rows: i64, columns: i64, salt: f64) -> Tensor {
    ((Tensor::arange(rows * columns, F) * 12.9898 + salt * 78.233).sin() * 43758.5453).frac().view([rows, columns])
        * 1.7
}

fn vector(n: i64, salt: f64) -> Tensor {
    values(1, n, salt).view([n])
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}

/// Compares the gradient of `loss` to each leaf with central differences, number by number.
fn check_gradients(leaves: &[&Tensor], loss: &dyn Fn() -> Tensor) {
    loss().backward();
    for (i, leaf) in leaves.iter().enumerate() {
        let gradient = leaf.grad().flatten(0, -1);
        let flat = leaf.detach().flatten(0, -1);
        for place in 0..flat.numel() as i64 {
            let at = |shift: f64| {
                no_grad(|| {
                    let _moved = flat.get(place).g_add_scalar_(shift);
                    let value = loss().double_value(&[]);
                    let _back = flat.get(place).g_add_scalar_(-shift);
                    value
                })
            };
            let wanted = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            let got = gradient.double_value(&[place]);
            assert!(
                (got - wanted).abs() < GRADIENT_TOLERANCE * (1.0 + wanted.abs()),
                "leaf {i}, {place}: {got} {wanted}"
            );
        }
    }
}

fn layer(out: i64, input: i64, adapter: impl Into<Adapter>) -> LinearLayer {
    let mut layer = LinearLayer::frozen(values(out, input, 1.0), Some(vector(out, 2.0))).unwrap();
    layer.set_adapter(adapter).unwrap();
    layer
}

fn leaf(t: Tensor) -> Tensor {
    t.set_requires_grad(true)
}

fn vera(out: i64, input: i64, r: i64, shared: &VeraProjection, salt: f64) -> Vera {
    Vera::from_parts(leaf(vector(r, salt)), leaf(vector(out, salt + 0.5)), shared, input).unwrap()
}

fn adalora(out: i64, input: i64, r: i64) -> AdaLora {
    AdaLora::from_parts(leaf(values(r, input, 3.0)), leaf(values(out, r, 4.0)), leaf(values(r, 1, 5.0)), 0.7).unwrap()
}

#[test]
fn veras_gradients_are_those_of_differences_alone_and_side_by_side() {
    let shared = VeraProjection::from_parts(values(3, 7, 8.0), values(6, 3, 9.0)).unwrap();
    let x = leaf(values(4, 5, 10.0));
    let layers = [layer(6, 5, vera(6, 5, 3, &shared, 3.0)), layer(2, 5, vera(2, 5, 3, &shared, 4.0))];
    let leaves: Vec<&Tensor> = layers
        .iter()
        .flat_map(|l| l.adapter.as_ref().unwrap().tensors().into_iter().map(|(_, t)| t))
        .chain([&x])
        .collect();
    assert_eq!(leaves.len(), 5);
    check_gradients(&leaves, &|| {
        let [a, b] = forward_many(&x, [&layers[0], &layers[1]], 0.0).unwrap();
        a.sin().sum(Kind::Double) + b.square().sum(Kind::Double)
    });
    assert!(!shared.a.requires_grad() && !shared.b.requires_grad());
}

#[test]
fn adaloras_gradients_are_those_of_differences_with_the_regulariser() {
    let x = leaf(values(4, 5, 10.0));
    let layer = layer(6, 5, adalora(6, 5, 3));
    let Some(Adapter::AdaLora(l)) = &layer.adapter else { panic!() };
    check_gradients(&[&l.a, &l.b, &l.e, &x], &|| layer.forward(&x, 0.0).unwrap().sin().sum(Kind::Double));

    let own = adalora(6, 5, 3);
    let weight = 0.3;
    let value = orthogonality(&[&own], weight).unwrap();
    let plain = || {
        let norm = |p: Tensor| (p - Tensor::eye(3, F)).square().sum(Kind::Double).sqrt();
        (norm(own.a.matmul(&own.a.tr())) + norm(own.b.tr().matmul(&own.b))) * 0.5
    };
    assert!((value - plain().double_value(&[])).abs() < F64_TOLERANCE);
    let (a, b) = (own.a.grad().copy(), own.b.grad().copy());
    assert!(!own.e.grad().defined());
    for t in [&own.a, &own.b] {
        let _cleared = t.grad().zero_();
    }
    (plain() * weight).backward();
    assert!(distance(&a, &own.a.grad()) < F64_TOLERANCE && distance(&b, &own.b.grad()) < F64_TOLERANCE);
    assert_eq!(orthogonality(&[], 1.0).unwrap(), 0.0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn forward_equals_the_merged_weight(rows in 1i64..6, i in 1i64..20, o in 1i64..20, r in 0i64..6, more in 0i64..4, which: bool) {
        let adapter: Adapter = if which {
            let r = r.max(1);
            let shared = VeraProjection::from_parts(values(r, i + more, 8.0), values(o + more, r, 9.0)).unwrap();
            vera(o, i, r, &shared, 3.0).into()
        } else {
            adalora(o, i, r).into()
        };
        let trained: i64 = adapter.tensors().iter().map(|(_, t)| t.numel() as i64).sum();
        prop_assert_eq!(adapter.trained(), trained);
        let layer = layer(o, i, adapter);
        let x = values(rows, i, 5.0);
        let merged = LinearLayer::frozen(layer.merged_weight().unwrap(), layer.merged_bias().unwrap()).unwrap();
        let (y, wanted) = (layer.forward(&x, 0.0).unwrap(), merged.forward(&x, 0.0).unwrap());
        prop_assert!(distance(&y, &wanted) < F64_TOLERANCE * (1.0 + wanted.abs().max().double_value(&[])));
    }

    #[test]
    fn the_budget_never_grows_and_ends_at_the_target(initial in 8i64..200, share in 0.1f64..0.9, tinit in 0i64..20, tfinal in 0i64..20, between in 1i64..60, delta_t in 1i64..7) {
        let target = ((initial as f64 * share) as i64).max(1);
        let schedule = BudgetSchedule { initial, target, tinit, tfinal, delta_t, total_step: tinit + tfinal + between };
        let budgets: Vec<(i64, bool)> = (0..schedule.total_step + 3).map(|step| schedule.at(step)).collect();
        prop_assert!(budgets.windows(2).all(|w| w[0].0 >= w[1].0));
        prop_assert!(budgets[..=tinit as usize].iter().all(|b| *b == (initial, false)));
        prop_assert_eq!(budgets.last().unwrap(), &(target, true));
        prop_assert_eq!(schedule.at(schedule.last()).0, target);
    }
}

#[test]
fn fresh_ones_change_nothing_and_have_the_starts_of_peft() {
    let shared = VeraProjection::from_key(3, 8, 300, 200).unwrap();
    let top = |t: &Tensor| t.abs().max().double_value(&[]);
    // Kaiming with gain sqrt 2: uniform within sqrt(6 / fan in).
    for (t, fan_in) in [(&shared.a, 300.0f64), (&shared.b, 8.0)] {
        let bound = (6.0 / fan_in).sqrt();
        assert!(top(t) <= bound && top(t) > 0.98 * bound, "{} of {bound}", top(t));
    }
    assert!(VeraProjection::from_key(3, 8, 300, 200).unwrap().b.equal(&shared.b));
    assert!(!VeraProjection::from_key(4, 8, 300, 200).unwrap().b.equal(&shared.b));
    let weight = values(12, 20, 1.0).to_kind(Kind::Float);
    let vera = Vera::fresh(&shared, 20, 12, 0.25).unwrap();
    assert!(vera.lambda_d.eq(0.25).all().int64_value(&[]) == 1);
    let adalora = AdaLora::fresh(20, 12, 4, 8.0, 5).unwrap();
    assert!((adalora.scale - 8.0 / 4.00001).abs() < SCALE_TOLERANCE);
    for adapter in [Adapter::from(vera), adalora.into()] {
        let mut layer = LinearLayer::frozen(weight.shallow_clone(), None).unwrap();
        layer.set_adapter(adapter).unwrap();
        assert!(layer.merged_weight().unwrap().equal(&weight));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let shared = VeraProjection::from_parts(values(3, 7, 8.0), values(6, 3, 9.0)).unwrap();
    let refused =
        |d: i64, b: i64, input: i64| Vera::from_parts(vector(d, 1.0), vector(b, 2.0), &shared, input).is_err();
    assert!(refused(4, 6, 7) && refused(3, 7, 7) && refused(3, 6, 8) && !refused(3, 6, 7));
    assert!(VeraProjection::from_parts(values(3, 7, 8.0), values(6, 2, 9.0)).is_err());
    assert!(VeraProjection::from_key(0, 0, 4, 4).is_err());
    assert!(AdaLora::from_parts(values(3, 7, 1.0), values(6, 3, 1.0), values(2, 1, 1.0), 1.0).is_err());
    let mut layer = LinearLayer::frozen(values(4, 4, 1.0), None).unwrap();
    assert!(layer.set_adapter(adalora(6, 4, 2)).is_err());
    let allocator = |target, total_step, beta| {
        let schedule = BudgetSchedule { initial: 0, target: 0, tinit: 2, tfinal: 3, delta_t: 1, total_step };
        RankAllocator::new(triplets(), target, schedule, beta, 0.85).is_err()
    };
    assert!(allocator(4, 10, 0.85) && allocator(2, 5, 0.85) && allocator(2, 10, 1.0) && !allocator(2, 10, 0.85));
}

fn triplets() -> Vec<Triplets> {
    let of = |module: &str, salt: f64| Triplets {
        module: module.into(),
        a: leaf(values(4, 5, salt)),
        b: leaf(values(6, 4, salt + 0.1)),
        e: leaf(values(4, 1, salt + 0.2)),
    };
    vec![of("one", 1.0), of("two", 2.0)]
}

/// Runs an allocation to its end, through a state after one of its steps, and returns what is left and what became of E.
fn allocate(stop: Option<i64>) -> (KeptTriplets, Vec<Tensor>, Vec<(String, Tensor)>) {
    let leaves: Vec<Tensor> = triplets().into_iter().flat_map(|t| [t.a, t.b, t.e]).collect();
    let triplets = || {
        let of = |(l, module): (&[Tensor], &str)| Triplets {
            module: module.into(),
            a: l[0].shallow_clone(),
            b: l[1].shallow_clone(),
            e: l[2].shallow_clone(),
        };
        leaves.chunks(3).zip(["one", "two"]).map(of).collect()
    };
    let schedule = BudgetSchedule { initial: 0, target: 0, tinit: 1, tfinal: 2, delta_t: 2, total_step: 9 };
    let new = || RankAllocator::new(triplets(), 2, schedule, 0.85, 0.85).unwrap();
    let mut allocator = new();
    let (mut prunings, mut before_reset) = (0, Vec::new());
    for step in 0..9 {
        for (i, l) in leaves.iter().enumerate() {
            if l.grad().defined() {
                let _cleared = l.grad().zero_();
            }
            (l * values(l.size()[0], l.size()[1], step as f64 + i as f64)).sin().sum(Kind::Double).backward();
        }
        let done = allocator.step(step).unwrap();
        if done.pruned {
            prunings += 1;
            let pattern = allocator.rank_pattern().unwrap().unwrap();
            let kept = pattern.iter().flat_map(|(_, kept)| kept).filter(|k| **k).count();
            assert_eq!(kept as i64, done.budget, "step {step}");
        }
        if step == 6 {
            before_reset = allocator.state().unwrap().into_iter().map(|(n, t)| (n, t.copy())).collect();
        }
        if stop == Some(step) {
            let mut state: BTreeMap<String, Tensor> =
                allocator.state().unwrap().into_iter().map(|(n, t)| (n, t.copy())).collect();
            allocator = new();
            allocator.take_state(&mut state).unwrap();
            assert!(state.is_empty(), "{:?}", state.keys());
            assert!(new().take_state(&mut state).is_err(), "nothing is no state");
        }
    }
    // At steps 2, 4, 6, and the last one, 7.
    assert_eq!(prunings, 4);
    (allocator.rank_pattern().unwrap().unwrap(), leaves, before_reset)
}

#[test]
fn the_least_important_triplets_go_and_a_state_goes_on_where_it_was() {
    let (pattern, leaves, scores) = allocate(None);
    for ((_, kept), leaves) in pattern.iter().zip(leaves.chunks(3)) {
        let e = Vec::<f64>::try_from(leaves[2].detach().view([-1])).unwrap();
        assert!(e.iter().zip(kept).all(|(e, kept)| *kept || *e == 0.0), "{e:?} {kept:?}");
    }
    assert!(scores.iter().all(|(_, t)| t.abs().max().double_value(&[]) > 0.0));
    for stop in [0, 3, 6] {
        let (again, others, later) = allocate(Some(stop));
        assert_eq!(again, pattern);
        assert!(leaves.iter().zip(&others).all(|(a, b)| a.equal(b)), "stopped after step {stop}");
        assert!(scores.iter().zip(&later).all(|((n, a), (m, b))| n == m && a.equal(b)), "stopped after step {stop}");
    }
}
