//! AdamW and the norm over flat buffers, against the formulas written out in float64, and gradients kept in one buffer.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use lora_torch::{AdamWScalars, adamw_step, backward, grad_norm, set_grad};
use tch::{Device, Kind, Tensor};

const F32_TOLERANCE: f64 = 16.0 * f32::EPSILON as f64;

#[test]
fn adamw_follows_algorithm_2() {
    let f = (Kind::Float, Device::Cpu);
    let start = [0.5f32, -1.0, 2.0, 0.0, 1e-3];
    let (p, m, v) = (Tensor::from_slice(&start), Tensor::zeros([5], f), Tensor::zeros([5], f));
    let mut twin: Vec<[f64; 3]> = start.iter().map(|&x| [f64::from(x), 0.0, 0.0]).collect();
    for step in 1..=20i64 {
        let g: Vec<f32> = (0..5).map(|i| ((i * 7 + step * 3) as f32).sin()).collect();
        let h = AdamWScalars { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step };
        adamw_step(&p, &Tensor::from_slice(&g), &m, &v, &h).unwrap();
        for (x, &g) in twin.iter_mut().zip(&g) {
            let g = f64::from(g);
            x[0] *= 1.0 - h.lr * h.weight_decay;
            x[1] = h.beta1 * x[1] + (1.0 - h.beta1) * g;
            x[2] = h.beta2 * x[2] + (1.0 - h.beta2) * g * g;
            let (mh, vh) = (x[1] / (1.0 - h.beta1.powi(step as i32)), x[2] / (1.0 - h.beta2.powi(step as i32)));
            x[0] -= h.lr * mh / (vh.sqrt() + h.eps);
        }
    }
    for (i, x) in twin.iter().enumerate() {
        assert!(
            (p.double_value(&[i as i64]) - x[0]).abs() < F32_TOLERANCE,
            "{i}: {} {}",
            p.double_value(&[i as i64]),
            x[0]
        );
    }
    let h = AdamWScalars { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step: 0 };
    assert!(adamw_step(&p, &m, &m, &v, &h).is_err());
}

#[test]
fn the_norm_sees_every_entry_and_a_nan() {
    let g = Tensor::from_slice(&[3.0f32, -4.0, 0.0]);
    assert_eq!(grad_norm(&g).unwrap(), 5.0);
    assert!(grad_norm(&Tensor::from_slice(&[1.0f32, f32::NAN])).unwrap().is_nan());
}

#[test]
fn gradients_accumulate_into_the_buffer_that_was_given() {
    let f = (Kind::Float, Device::Cpu);
    let flat = Tensor::zeros([6], f);
    let p = Tensor::ones([2, 2], f).set_requires_grad(true);
    set_grad(&p, &flat.narrow(0, 1, 4).view([2, 2])).unwrap();
    for _ in 0..2 {
        let y = &p * 3.0;
        backward(&[&y], &[&Tensor::ones([2, 2], f)]).unwrap();
    }
    assert_eq!(Vec::<f32>::try_from(&flat).unwrap(), [0.0, 6.0, 6.0, 6.0, 6.0, 0.0]);
    assert!(set_grad(&p, &flat).is_err());
}
