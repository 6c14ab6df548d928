//! What must hold for every adapter, in float64.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use lora_core::{
    Combination, EmbeddingLayer, Init, LinearLayer, Lora, LoraSpec, MajoritySign, MixOptions, MixPart, ParameterCount,
    Principal, delta, error_of_mix, init_embedding, init_linear, merge_embedding, merge_into, mix, residual, row_norms,
    unmerge_from,
};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

/// Sums of up to 64 products of order one in float64.
const F64_TOLERANCE: f64 = 64.0 * 64.0 * f64::EPSILON;
/// Norms of fp32 matrices of up to 24 columns and their parts, which may cancel to a tenth of themselves.
const F32_SQUARES_TOLERANCE: f64 = 1e-4;
/// A row so short that dividing by its norm says nothing.
const SMALL_NORM: f64 = 1e-3;
const F: (Kind, Device) = (Kind::Double, Device::Cpu);

/// Values of order one that depend on `salt` only, not on a generator shared with other threads.
fn values(rows: i64, columns: i64, salt: f64) -> Tensor {
    ((Tensor::arange(rows * columns, F) * 12.9898 + salt * 78.233).sin() * 43758.5453).frac().view([rows, columns])
        * 1.7
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn adapter_forward_equals_merged_forward(rows in 1i64..6, i in 1i64..24, o in 1i64..24, r in 1i64..6, alpha in -8.0f64..8.0, rs: bool) {
        let r = r.min(i).min(o);
        let spec = LoraSpec::new(r, alpha, rs).unwrap();
        let mut layer = LinearLayer::frozen(values(o, i, 1.0), Some(values(1, o, 2.0).view([o]))).unwrap();
        let before = layer.forward(&values(rows, i, 5.0), 0.0).unwrap();
        layer.set_adapter(Lora::from_parts(values(r, i, 3.0), values(o, r, 4.0), spec.scale()).unwrap()).unwrap();
        let x = values(rows, i, 5.0);
        let y = layer.forward(&x, 0.0).unwrap();
        let merged = LinearLayer::frozen(layer.merged_weight().unwrap(), layer.bias.as_ref().map(Tensor::shallow_clone)).unwrap();
        prop_assert!(distance(&y, &merged.forward(&x, 0.0).unwrap()) < F64_TOLERANCE * 10.0);
        // The base output must not be scaled with the update.
        let update = x.matmul(&values(r, i, 3.0).tr()).matmul(&values(o, r, 4.0).tr()) * spec.scale();
        prop_assert!(distance(&(y - before), &update) < F64_TOLERANCE * 10.0);
    }

    #[test]
    fn unmerge_takes_back_what_merge_added(i in 1i64..32, o in 1i64..32, r in 1i64..5, scale in -4.0f64..4.0) {
        let (w, a, b) = (values(o, i, 1.0), values(r, i, 2.0), values(o, r, 3.0));
        let merged = merge_into(&w, &a, &b, scale).unwrap();
        prop_assert!(distance(&(&merged - &w), &delta(&a, &b, scale, Kind::Double).unwrap()) < F64_TOLERANCE);
        prop_assert!(distance(&unmerge_from(&merged, &a, &b, scale).unwrap(), &w) < F64_TOLERANCE);
    }

    #[test]
    fn embedding_forward_equals_merged_rows(vocab in 1i64..30, hidden in 1i64..16, r in 1i64..5, scale in -4.0f64..4.0) {
        let mut layer = EmbeddingLayer::frozen(values(vocab, hidden, 1.0));
        let (a, b) = (values(r, vocab, 2.0), values(hidden, r, 3.0));
        let merged = merge_embedding(&layer.weight, &a, &b, scale).unwrap();
        layer.set_adapter(Lora::from_parts(a, b, scale).unwrap()).unwrap();
        let ids = Tensor::arange(2 * vocab, (Kind::Int64, Device::Cpu)).remainder(vocab);
        prop_assert!(distance(&layer.forward(&ids).unwrap(), &merged.index_select(0, &ids)) < F64_TOLERANCE);
    }

    #[test]
    fn counts_are_those_of_the_tensors(i in 1i64..64, o in 1i64..64, r in 1i64..9) {
        let r = r.min(i).min(o);
        let lora = init_linear(i, o, LoraSpec::new(r, 1.0, false).unwrap(), Init::Kaiming, 1, Device::Cpu).unwrap();
        let count = ParameterCount::of_linear(i, o, r);
        prop_assert_eq!(count.trained, (lora.a.numel() + lora.b.numel()) as i64);
        prop_assert_eq!(count.full, i * o);
    }

    #[test]
    fn a_fresh_adapter_changes_nothing(i in 1i64..40, o in 1i64..40, seed: u64, gaussian: bool) {
        let init = if gaussian { Init::Gaussian } else { Init::Kaiming };
        let base = values(o, i, 1.0).to_kind(Kind::Float);
        let spec = LoraSpec::new(1, 3.0, false).unwrap();
        let layer = LinearLayer::frozen(base.shallow_clone(), None).unwrap().with_adapter(spec, init, seed).unwrap();
        prop_assert!(layer.merged_weight().unwrap().equal(&base));
    }
}

#[test]
fn scales_are_those_of_the_papers() {
    assert_eq!(LoraSpec::new(8, 16.0, false).unwrap().scale(), 2.0);
    assert_eq!(LoraSpec::new(16, 16.0, true).unwrap().scale(), 4.0);
    for (r, alpha) in [(0, 1.0), (-1, 1.0), (4, f64::NAN), (4, f64::INFINITY)] {
        assert!(LoraSpec::new(r, alpha, false).is_err(), "{r} {alpha}");
    }
}

#[test]
fn initial_values_have_the_distributions_of_peft() {
    let (i, r) = (400, 50);
    let spec = LoraSpec::new(r, 1.0, false).unwrap();
    let kaiming = init_linear(i, 64, spec, Init::Kaiming, 7, Device::Cpu).unwrap();
    let bound = 1.0 / (i as f64).sqrt();
    let top = kaiming.a.abs().max().double_value(&[]);
    assert!(top <= bound && top > 0.99 * bound, "{top} against {bound}");
    // 20,000 draws: the standard deviation of a uniform is bound / sqrt 3, known to within 1 %.
    let std = kaiming.a.std(true).double_value(&[]);
    assert!((std / (bound / 3f64.sqrt()) - 1.0).abs() < 0.02, "{std}");
    assert_eq!(kaiming.b.abs().max().double_value(&[]), 0.0);

    let gaussian = init_linear(i, 64, spec, Init::Gaussian, 7, Device::Cpu).unwrap();
    assert!((gaussian.a.std(true).double_value(&[]) * r as f64 - 1.0).abs() < 0.02);
    let embedding = init_embedding(300, 400, spec, 7, Device::Cpu).unwrap();
    assert!((embedding.b.std(true).double_value(&[]) - 1.0).abs() < 0.02);
    assert_eq!(embedding.a.abs().max().double_value(&[]), 0.0);
}

#[test]
fn merging_refuses_what_is_not_finite_and_what_does_not_fit() {
    let (w, a, b) = (values(4, 6, 1.0), values(2, 6, 2.0), values(4, 2, 3.0));
    assert!(merge_into(&w, &a, &b, f64::INFINITY).unwrap_err().to_string().contains("not finite"));
    assert!(merge_into(&w, &b, &a, 1.0).is_err());
    assert!(Lora::from_parts(values(2, 6, 1.0), values(4, 3, 1.0), 1.0).is_err());
    assert!(LinearLayer::frozen(values(4, 6, 1.0), Some(values(1, 5, 1.0).view([5]))).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn dora_forward_equals_its_merged_weight(rows in 1i64..6, i in 1i64..24, o in 1i64..24, r in 1i64..6, scale in -4.0f64..4.0) {
        let r = r.min(i).min(o);
        let mut layer = LinearLayer::frozen(values(o, i, 1.0), Some(values(1, o, 2.0).view([o]))).unwrap();
        let lora = Lora::from_parts(values(r, i, 3.0), values(o, r, 4.0), scale).unwrap();
        let norms = row_norms(&layer.weight, &lora).unwrap();
        let sum = layer.weight.dense().unwrap() + delta(&lora.a, &lora.b, scale, Kind::Double).unwrap();
        let plain = sum.square().sum_dim_intlist([1i64].as_slice(), false, Kind::Double).sqrt();
        // The norm comes from ‖w‖² + 2 w·d + ‖d‖², each off by some units of its own size; a small norm is what is left.
        let size = layer.weight.dense().unwrap().abs().max().double_value(&[]) + delta(&lora.a, &lora.b, scale, Kind::Double).unwrap().abs().max().double_value(&[]);
        prop_assert!(distance(&norms.square(), &plain.square()) < F64_TOLERANCE * (1.0 + size * size * i as f64));
        prop_assume!(plain.min().double_value(&[]) > 0.1 * size);
        let lora = lora.with_vectors(None, Some(values(1, o, 6.0).view([o]).abs() + 0.1)).unwrap();
        layer.set_adapter(lora).unwrap();
        let x = values(rows, i, 5.0);
        let merged = LinearLayer::frozen(layer.merged_weight().unwrap(), layer.merged_bias().unwrap()).unwrap();
        let (y, wanted) = (layer.forward(&x, 0.0).unwrap(), merged.forward(&x, 0.0).unwrap());
        prop_assert!(distance(&y, &wanted) < F64_TOLERANCE * 1000.0 * (1.0 + wanted.abs().max().double_value(&[])));
    }

    #[test]
    fn a_magnitude_of_the_norms_changes_nothing(i in 1i64..24, o in 1i64..24) {
        let mut layer = LinearLayer::frozen(values(o, i, 1.0), None).unwrap();
        let lora = Lora::from_parts(values(1, i, 3.0), values(o, 1, 4.0) * 0.0, 2.0).unwrap();
        let m = row_norms(&layer.weight, &lora).unwrap();
        prop_assume!(m.min().double_value(&[]) > SMALL_NORM);
        layer.set_adapter(lora.with_vectors(None, Some(m)).unwrap()).unwrap();
        prop_assert!(distance(&layer.merged_weight().unwrap(), &values(o, i, 1.0)) < F64_TOLERANCE);
    }

    #[test]
    fn a_start_out_of_the_base_leaves_the_layer_as_it_was(i in 2i64..24, o in 2i64..24, r in 1i64..5, which in 0usize..3) {
        let r = r.min(i).min(o);
        let weight = values(o, i, 1.0).to_kind(Kind::Float);
        let spec = LoraSpec::new(r, 3.0, false).unwrap();
        let principal = [Principal::Pissa, Principal::PissaFast(4), Principal::Olora][which];
        let start = principal.start(&weight, spec, 7).unwrap();
        let under = residual(&weight, &start).unwrap();
        let whole = merge_into(&under, &start.a, &start.b, start.scale).unwrap();
        // fp32: the part is of the size of the weight, and sums have up to 24 terms.
        prop_assert!(distance(&whole, &weight) < 100.0 * f64::from(f32::EPSILON), "{principal:?}");
        if which == 0 {
            // What is left has lost its largest singular values, whose squares sum to the difference of the norms'.
            let squares = |t: &Tensor| t.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]);
            let taken = delta(&start.a, &start.b, start.scale, Kind::Double).unwrap();
            prop_assert!((squares(&weight) - squares(&under) - squares(&taken)).abs() < F32_SQUARES_TOLERANCE * squares(&weight));
        }
        let mut trained = Lora::from_parts(&start.a + 0.25, &start.b - 0.5, start.scale).unwrap();
        trained.initial = Some((start.a.shallow_clone(), start.b.shallow_clone()));
        let (a, b) = trained.converted().unwrap();
        let plain = merge_into(&weight, &a, &b, start.scale).unwrap();
        let direct = merge_into(&under, &trained.a, &trained.b, start.scale).unwrap();
        prop_assert!(distance(&plain, &direct) < 1000.0 * f64::from(f32::EPSILON), "{principal:?}");
    }

    #[test]
    fn cat_is_the_exact_sum_and_svd_of_enough_rank_too(i in 2i64..24, o in 2i64..24, ra in 1i64..4, rb in 1i64..4, wa in -2.0f64..2.0, wb in -2.0f64..2.0) {
        let parts = [(values(ra, i, 1.0), values(o, ra, 2.0), 0.5, wa), (values(rb, i, 3.0), values(o, rb, 4.0), 2.0, wb)];
        let parts = parts.each_ref().map(|(a, b, scale, weight)| MixPart { a, b, scale: *scale, weight: *weight });
        let exact = delta(parts[0].a, parts[0].b, 0.5 * wa, Kind::Double).unwrap() + delta(parts[1].a, parts[1].b, 2.0 * wb, Kind::Double).unwrap();
        for (combination, rank) in [(Combination::Cat, None), (Combination::Svd, Some(ra + rb))] {
            let options = MixOptions { combination, rank, density: 1.0, majority: MajoritySign::Total, seed: 0 };
            let (a, b) = mix(&parts, &options, 0).unwrap();
            prop_assert_eq!(a.size()[0], ra + rb);
            // The factors of an SVD are given in fp32.
            let reach = 100.0 * f64::from(f32::EPSILON) * (1.0 + exact.abs().max().double_value(&[]));
            prop_assert!(distance(&delta(&a, &b, 1.0, Kind::Double).unwrap(), &exact) < reach, "{:?}", combination);
            prop_assert!(error_of_mix(&a, &b, &parts).unwrap().0 < F32_SQUARES_TOLERANCE);
        }
    }

    /// What counts for nothing changes nothing. The rules that let a sign prevail are left out: they ask every adapter,
    /// whatever its weight, as PEFT's do.
    #[test]
    fn an_adapter_of_weight_one_beside_one_of_weight_none_is_itself(i in 4i64..24, o in 4i64..24, r in 1i64..4, scale in 0.1f64..4.0) {
        let (a, b) = (values(r, i, 1.0), values(o, r, 2.0));
        let (a2, b2) = (values(r, i, 3.0), values(o, r, 4.0));
        let parts = [(&a, &b, scale, 1.0), (&a2, &b2, 0.5, 0.0)];
        let parts = parts.map(|(a, b, scale, weight)| MixPart { a, b, scale, weight });
        let first = delta(&a, &b, scale, Kind::Double).unwrap();
        let reach = 100.0 * f64::from(f32::EPSILON) * (1.0 + first.abs().max().double_value(&[]));
        for (combination, rank) in [
            (Combination::Cat, None),
            (Combination::Svd, Some(r)),
            (Combination::Linear, None),
            (Combination::MagnitudePrune, None),
            (Combination::DareLinear, None),
            (Combination::DareLinearSvd, Some(r)),
        ] {
            let options = MixOptions { combination, rank, density: 1.0, majority: MajoritySign::Total, seed: 0 };
            let (a, b) = mix(&parts, &options, 0).unwrap();
            let mixed = delta(&a, &b, 1.0, Kind::Double).unwrap();
            prop_assert!(distance(&mixed, &first) < reach, "{combination:?}: {}", distance(&mixed, &first));
        }
    }
}
