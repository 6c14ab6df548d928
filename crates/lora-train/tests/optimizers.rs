//! Optimizers against bitsandbytes, against their formulas in float64, and in runs that are stopped and go on.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use lora_format::TensorFile;
use lora_model::Parameter;
use lora_torch::{
    AdamWScalars, Blockwise, LionScalars, MOMENT_BLOCK, adamw_8bit_step, dynamic_table, lion_step,
    unsigned_dynamic_table,
};
use lora_train::config::Optim;
use lora_train::{FlatParams, NoEvents, Override, RunConfig, RunPlan, StepOutcome, Trainer};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::{Device, IndexOp, Kind, Tensor};

/// A few roundings of fp32, in numbers of about one.
const F32_TOLERANCE: f64 = 16.0 * f32::EPSILON as f64;
/// Two ways of rounding a moment may fall on both sides of a midpoint between two codes: at most a rounding in a hundredth, the
/// width of a step of the table, so one number of some ten thousand.
const MOST_OTHER_CODES: usize = 2;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

fn reference() -> TensorFile {
    TensorFile::open(&fixtures().join("optimizers/bitsandbytes.safetensors")).unwrap()
}

/// Zeros behind, to whole blocks.
fn padded(t: &Tensor) -> Tensor {
    let n = t.size()[0];
    t.constant_pad_nd([0, (MOMENT_BLOCK - n % MOMENT_BLOCK) % MOMENT_BLOCK])
}

fn far(a: &Tensor, b: &Tensor) -> f64 {
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

fn numbers(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.to_kind(Kind::Double)).unwrap()
}

#[test]
fn tables_are_those_of_bitsandbytes() {
    let file = reference();
    assert!(dynamic_table().unwrap().equal(&file.read("table.signed").unwrap()));
    assert!(unsigned_dynamic_table().unwrap().equal(&file.read("table.unsigned").unwrap()));
}

/// Each of its twelve steps, from where it starts.
#[test]
fn steps_in_8_bits_are_those_of_bitsandbytes() {
    let file = reference();
    let mut other_codes = 0;
    for step in 1..=12i64 {
        let read = |name: &str| file.read(&format!("adamw.{step}.{name}")).unwrap();
        let after = |name: &str| file.read(&format!("adamw.{}.{name}", step + 1)).unwrap();
        let (param, n) = (padded(&read("param")), read("param").size()[0]);
        let state = |signed: bool| Blockwise::zeros(param.size()[0], signed, Device::Cpu).unwrap();
        let (mut m, mut v) = (state(true), state(false));
        if step > 1 {
            // Zeros behind the last number, which have no code in bitsandbytes.
            let codes = |own: &Blockwise, name: &str| Tensor::cat(&[read(name), own.codes.i(n..)], 0);
            (m.codes, m.absmax) = (codes(&m, "state1"), read("absmax1"));
            (v.codes, v.absmax) = (codes(&v, "state2"), read("absmax2"));
        }
        let h = AdamWScalars { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step };
        adamw_8bit_step(&param, &padded(&read("grad")), &m, &v, &h).unwrap();
        assert!(
            far(&param.i(..n), &after("param")) < F32_TOLERANCE,
            "step {step}: {}",
            far(&param.i(..n), &after("param"))
        );
        assert_eq!(far(&param.i(n..), &param.i(n..).zeros_like()), 0.0, "what fills the last block stays zero");
        for (own, codes, absmax) in [(&m, "state1", "absmax1"), (&v, "state2", "absmax2")] {
            assert!(far(&own.absmax, &after(absmax)) < F32_TOLERANCE, "step {step}: {absmax}");
            let apart = own.codes.i(..n).to_kind(Kind::Int64) - after(codes).to_kind(Kind::Int64);
            assert!(apart.abs().max().int64_value(&[]) <= 1, "step {step}: {codes}");
            other_codes += apart.count_nonzero(0i64).int64_value(&[]) as usize;
        }
    }
    assert!(other_codes <= MOST_OTHER_CODES, "{other_codes} codes differ");
}

#[test]
fn lion_is_that_of_bitsandbytes() {
    let file = reference();
    let (param, grads) = (file.read("lion.start").unwrap().copy(), file.read("lion.grads").unwrap());
    let moment = param.zeros_like();
    let h = LionScalars { lr: 1e-2, beta1: 0.9, beta2: 0.99, weight_decay: 0.1 };
    for step in 0..grads.size()[0] {
        lion_step(&param, &grads.i(step), &moment, &h).unwrap();
    }
    assert!(far(&param, &file.read("lion.end").unwrap()) < F32_TOLERANCE);
    assert!(far(&moment, &file.read("lion.exp_avg").unwrap()) < F32_TOLERANCE);
}

/// AdamW in 8 bits from libtorch's own operations: parameter, moments as they are before they are packed, codes.
fn plain(param: &Tensor, grad: &Tensor, m: &Blockwise, v: &Blockwise, h: &AdamWScalars) -> (Tensor, [Tensor; 2]) {
    let g = grad.to_kind(Kind::Double);
    let m = m.dense().unwrap().to_kind(Kind::Double) * h.beta1 + &g * (1.0 - h.beta1);
    let v = v.dense().unwrap().to_kind(Kind::Double) * h.beta2 + &g * &g * (1.0 - h.beta2);
    let (c1, c2) = (1.0 - h.beta1.powi(h.step as i32), 1.0 - h.beta2.powi(h.step as i32));
    let p = param.to_kind(Kind::Double) * (1.0 - h.lr * h.weight_decay) - (&m / c1) / ((&v / c2).sqrt() + h.eps) * h.lr;
    (p, [m, v])
}

/// The widest step of either table, in parts of the largest magnitude: a number lies at most half of it from its code.
const WIDEST: f64 = 0.9 / 64.0;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn steps_in_8_bits_follow_the_formula(blocks in 1i64..5, seed in 0i64..1000, spread in 0f64..12.0) {
        let n = blocks * MOMENT_BLOCK;
        let noise = |salt: i64| {
            let at = Tensor::arange(n, (Kind::Double, Device::Cpu)) * 12.9898 + (seed * 31 + salt) as f64 * 78.233;
            (at.sin() * 43758.5453).frac()
        };
        // Magnitudes far apart, so that some second moments are far below their block's largest.
        let gradient = |salt: i64| (noise(salt) * (noise(salt + 1) * -spread).exp()).to_kind(Kind::Float);
        let param = noise(5).to_kind(Kind::Float);
        let (m, v) = (Blockwise::zeros(n, true, Device::Cpu).unwrap(), Blockwise::zeros(n, false, Device::Cpu).unwrap());
        for step in 1..=4 {
            let h = AdamWScalars { lr: 1e-2, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, step };
            let g = gradient(10 * step);
            let (wanted, moments) = plain(&param, &g, &m, &v, &h);
            adamw_8bit_step(&param, &g, &m, &v, &h).unwrap();
            // A step is no longer than a few learning rates, so roundings are those of numbers of about one.
            prop_assert!(far(&param, &wanted) < F32_TOLERANCE * wanted.abs().max().double_value(&[]).max(1.0));
            for (own, wanted) in [&m, &v].into_iter().zip(&moments) {
                let most = wanted.view([blocks, MOMENT_BLOCK]).abs().amax([1i64].as_slice(), true);
                let apart = (own.dense().unwrap().to_kind(Kind::Double) - wanted).view([blocks, MOMENT_BLOCK]).abs() / &most;
                prop_assert!(apart.max().double_value(&[]) <= WIDEST / 2.0 + F32_TOLERANCE);
            }
            // A second moment is never lost beside a gradient that was there.
            let lost = v.dense().unwrap().eq(0.0).logical_and(&moments[1].gt(0.0)).any().int64_value(&[]);
            prop_assert_eq!(lost, 0);
        }
    }

    #[test]
    fn lion_follows_algorithm_2(n in 1i64..40, seed in 0i64..1000) {
        let noise = |salt: i64| (Tensor::arange(n, (Kind::Double, Device::Cpu)) * 1.7 + (seed * 7 + salt) as f64).sin();
        for kind in [Kind::Float, Kind::Double] {
            let (param, moment) = (noise(1).to_kind(kind), Tensor::zeros([n], (kind, Device::Cpu)));
            let mut twin: Vec<(f64, f64)> = numbers(&param).into_iter().map(|p| (p, 0.0)).collect();
            let h = LionScalars { lr: 1e-2, beta1: 0.9, beta2: 0.99, weight_decay: 0.1 };
            for step in 0..10 {
                // A gradient of zero beside a moment of zero moves nothing but the decay.
                let g = (noise(step) * noise(step + 1).gt(0.2)).to_kind(kind);
                lion_step(&param, &g, &moment, &h).unwrap();
                for ((p, m), g) in twin.iter_mut().zip(numbers(&g)) {
                    let way = h.beta1 * *m + (1.0 - h.beta1) * g;
                    *p = (1.0 - h.lr * h.weight_decay) * *p - h.lr * if way == 0.0 { 0.0 } else { way.signum() };
                    *m = h.beta2 * *m + (1.0 - h.beta2) * g;
                }
            }
            for ((p, m), (q, w)) in numbers(&param).into_iter().zip(numbers(&moment)).zip(twin) {
                prop_assert!((p - q).abs() < F32_TOLERANCE && (m - w).abs() < F32_TOLERANCE, "{} {} {} {}", p, q, m, w);
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let f = |n: i64, kind| Tensor::zeros([n], (kind, Device::Cpu));
    assert!(Blockwise::zeros(300, true, Device::Cpu).unwrap_err().to_string().contains("256"));
    let (m, v) =
        (Blockwise::zeros(256, true, Device::Cpu).unwrap(), Blockwise::zeros(256, false, Device::Cpu).unwrap());
    let h = AdamWScalars { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, step: 1 };
    let step = |p: &Tensor, g: &Tensor, h: &AdamWScalars| adamw_8bit_step(p, g, &m, &v, h);
    let good = f(256, Kind::Float);
    step(&good, &good, &h).unwrap();
    assert!(step(&f(256, Kind::Double), &good, &h).unwrap_err().to_string().contains("param"));
    assert!(step(&good, &f(255, Kind::Float), &h).unwrap_err().to_string().contains("grad"));
    assert!(step(&good, &good, &AdamWScalars { step: 0, ..h }).unwrap_err().to_string().contains("step"));
    let h = LionScalars { lr: 1e-2, beta1: 0.9, beta2: 0.99, weight_decay: 0.0 };
    assert!(lion_step(&good, &good, &f(256, Kind::Double), &h).unwrap_err().to_string().contains("exp_avg"));
}

fn parameter(name: &str, shape: &[i64]) -> Parameter {
    Parameter { name: name.into(), tensor: Tensor::ones(shape, (Kind::Float, Device::Cpu)).set_requires_grad(true) }
}

/// With gradients of zero nothing moves but what decays.
#[test]
fn biases_and_norms_do_not_decay_and_all_else_does() {
    for optim in Optim::ALL {
        let list = [
            ("layers.0.q_proj.lora_A.weight", vec![4, 8]),
            ("layers.0.q_proj.lora_B.weight", vec![70, 64]),
            ("layers.0.q_proj.bias", vec![8]),
            ("layers.0.input_layernorm.weight", vec![5000]),
            ("layers.0.q_proj.lora_magnitude_vector", vec![8]),
            ("layers.0.q_proj.vera_lambda_b", vec![8]),
            ("layers.0.q_proj.lora_B.bias", vec![8]),
        ];
        let tensors: Vec<Parameter> = list.iter().map(|(name, shape)| parameter(name, shape)).collect();
        let seen: Vec<Tensor> = tensors.iter().map(|p| p.tensor.shallow_clone()).collect();
        let params = FlatParams::new(tensors, None, *optim).unwrap();
        assert_eq!(params.len(), 4 * 8 + 70 * 64 + 8 + 5000 + 3 * 8, "{optim:?}");
        params
            .update(&AdamWScalars { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.5, step: 1 })
            .unwrap();
        for ((name, shape), t) in list.iter().zip(&seen) {
            let decays = shape.len() > 1 || name.contains("magnitude") || name.contains("lambda");
            let wanted = if decays { 1.0 - 0.1 * 0.5 } else { 1.0 };
            assert!(far(t, &(t.ones_like() * wanted)) < F32_TOLERANCE, "{optim:?} {name}");
        }
    }
}

#[test]
fn a_state_comes_back_as_it_was_and_that_of_another_optimizer_does_not() {
    let made = |optim| {
        let list = vec![parameter("a", &[70, 64]), parameter("b", &[3, 5]), parameter("c", &[4100])];
        let leaves: Vec<Tensor> = list.iter().map(|p| p.tensor.shallow_clone()).collect();
        (FlatParams::new(list, None, optim).unwrap(), leaves)
    };
    let step = |(params, leaves): &(FlatParams, Vec<Tensor>), step: i64| {
        params.zero_grad().unwrap();
        for leaf in leaves {
            let way = (Tensor::arange(leaf.numel() as i64, (Kind::Float, Device::Cpu)) + step as f64).sin();
            (leaf.view(-1) * way).sum(Kind::Float).backward();
        }
        let h = AdamWScalars { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step };
        params.update(&h).unwrap();
    };
    let saved = |params: &FlatParams| -> BTreeMap<String, Tensor> {
        params.state().unwrap().into_iter().map(|(name, t)| (name, t.detach().copy())).collect()
    };
    for optim in Optim::ALL {
        let (whole, again) = (made(*optim), made(*optim));
        (1..=3).for_each(|s| step(&whole, s));
        let state = saved(&whole.0);
        let bytes: usize = state.values().map(|t| t.numel() * lora_torch::kind_bytes(t.kind())).sum();
        // Zeros that fill blocks are in memory only.
        assert!(whole.0.state_bytes() as usize - bytes < 2 * 256 * 6 + 64, "{optim:?}");
        again.0.load_state(state).unwrap();
        [&whole, &again].iter().for_each(|p| (4..=6).for_each(|s| step(p, s)));
        for ((name, a), b) in saved(&whole.0).into_iter().zip(saved(&again.0).into_values()) {
            assert!(a.equal(&b), "{optim:?} {name}");
        }
        for other in Optim::ALL.iter().filter(|other| *other != optim) {
            assert!(made(*other).0.load_state(saved(&whole.0)).is_err(), "{optim:?} as {other:?}");
        }
    }
}

fn plan(dir: &Path, optim: &str) -> RunPlan {
    let row = |i: usize| format!("{{\"prompt\": \"Is it {i}?\", \"completion\": \" yes it is {}\"}}\n", i % 3);
    std::fs::write(dir.join("train.jsonl"), (0..16).map(row).collect::<String>()).unwrap();
    let set = [
        format!("output_dir={}", dir.join("run").display()),
        format!("model.path={}", fixtures().join("llama").display()),
        "model.device=cpu".into(),
        format!("data.train={}", dir.join("train.jsonl").display()),
        // The head has more numbers than fit into a block, so its moments are packed.
        "lora.modules_to_save=lm_head".into(),
        "lora.lora_dropout=0.1".into(),
        format!("train.optim={optim}"),
        "train.max_steps=12".into(),
        "train.learning_rate=3e-3".into(),
        "train.weight_decay=0.1".into(),
        "train.per_device_train_batch_size=4".into(),
    ];
    let overrides: Vec<Override> = set.iter().map(|s| s.parse().unwrap()).collect();
    RunPlan::resolve(RunConfig::load(None, &overrides).unwrap(), &mut NoEvents).unwrap()
}

fn step(trainer: &mut Trainer) -> f64 {
    match trainer.step().unwrap() {
        StepOutcome::Updated(r) => r.loss,
        skipped => panic!("{skipped:?}"),
    }
}

#[test]
fn runs_learn_go_on_with_the_same_bits_and_are_refused_another_optimizer() {
    for optim in ["adamw", "lion", "adamw_8bit"] {
        let dir = tempfile::tempdir().unwrap();
        let planned = plan(dir.path(), optim);
        let moments = planned.moment_bytes() as u64;
        let mut whole = Trainer::new(planned, &mut NoEvents).unwrap();
        let parameters = whole.params().len() as u64 * 4;
        // Vectors apart, and zeros that fill blocks, it is what the plan said.
        let kept = whole.params().state_bytes() - parameters;
        assert!(kept.abs_diff(moments) <= moments / 100 + 4 * 256, "{optim}: {kept} and {moments}");
        let losses: Vec<f64> = (0..12).map(|_| step(&mut whole)).collect();
        assert!(losses[11] < 0.7 * losses[0], "{optim}: {losses:?}");

        let mut first = Trainer::new(plan(dir.path(), optim), &mut NoEvents).unwrap();
        for _ in 0..5 {
            step(&mut first);
        }
        first.save().unwrap();
        let mut second = Trainer::new(plan(dir.path(), optim), &mut NoEvents).unwrap();
        second.resume(&[], &mut NoEvents).unwrap();
        assert_eq!((5..12).map(|_| step(&mut second)).collect::<Vec<_>>(), losses[5..], "{optim}");
        for ((name, a), (_, b)) in whole.params().state().unwrap().iter().zip(second.params().state().unwrap()) {
            assert!(a.equal(&b), "{optim}: {name}");
        }
        let other = if optim == "lion" { "adamw_8bit" } else { "lion" };
        let mut refused = Trainer::new(plan(dir.path(), other), &mut NoEvents).unwrap();
        let error = refused.resume(&["train.optim".into()], &mut NoEvents).unwrap_err().to_string();
        assert!(error.contains("train.optim was") && error.contains(other), "{error}");
    }
}
