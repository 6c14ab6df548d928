use super::*;
use proptest::prelude::*;

/// Of a function with curvature of order 1, a step of 1e-5 is off by 1e-10, and rounding by 1e-11.
const DIFFERENCE_TOLERANCE: f64 = 1e-7;
/// A log-probability that rounds to none.
const CERTAIN: f64 = -1e-14;
/// Sums of a few numbers in float64 on both sides.
const F64_TOLERANCE: f64 = 1e-12;

fn every() -> Vec<(&'static str, Box<dyn Objective>)> {
    let dpo = |loss, beta, label_smoothing, rpo_alpha| Box::new(Dpo { loss, beta, label_smoothing, rpo_alpha });
    let kto = |drift| Box::new(Kto { beta: 0.3, desirable_weight: 1.0, undesirable_weight: 1.33, drift });
    vec![
        ("sigmoid", dpo(DpoLoss::Sigmoid, 0.3, 0.0, 0.0)),
        ("smooth", dpo(DpoLoss::Sigmoid, 0.3, 0.2, 0.0)),
        ("rpo", dpo(DpoLoss::Sigmoid, 0.3, 0.0, 0.7)),
        ("norm", dpo(DpoLoss::SigmoidNorm, 2.0, 0.0, 0.0)),
        ("hinge", dpo(DpoLoss::Hinge, 0.3, 0.0, 0.0)),
        ("ipo", dpo(DpoLoss::Ipo, 0.3, 0.0, 0.0)),
        ("robust", dpo(DpoLoss::Robust, 0.3, 0.2, 0.0)),
        ("apo_zero", dpo(DpoLoss::ApoZero, 0.3, 0.0, 0.0)),
        ("apo_down", dpo(DpoLoss::ApoDown, 0.3, 0.0, 0.0)),
        ("orpo", Box::new(Orpo { beta: 0.4 })),
        ("simpo", Box::new(SimPo { beta: 2.0, gamma: 0.5 })),
        ("kto", kto(true)),
        ("kto_apo", kto(false)),
        ("reward", Box::new(RewardModel { center_rewards_coefficient: 0.01 })),
    ]
}

/// Two pairs of answers of one to six tokens.
fn answers() -> impl Strategy<Value = Vec<(Vec<f64>, f64)>> {
    let answer = (proptest::collection::vec(-4.0..-0.05f64, 1..6), -12.0..-0.1f64);
    proptest::collection::vec(answer, 4)
}

fn judged(objective: &dyn Objective, list: &[(Vec<f64>, f64)]) -> Judgement {
    let answers: Vec<Answer<'_>> = list
        .iter()
        .enumerate()
        .map(|(i, (logps, reference))| Answer { logps, reference: *reference, good: i.is_multiple_of(2) })
        .collect();
    objective.judge(&answers, 0.4)
}

proptest! {
    #[test]
    fn slopes_are_the_derivatives_of_the_loss(list in answers()) {
        const STEP: f64 = 1e-5;
        for (name, objective) in every() {
            let slopes = judged(&*objective, &list).slopes;
            for i in 0..list.len() {
                for (t, slope) in slopes[i].iter().enumerate() {
                    let at = |step: f64| {
                        let mut moved = list.clone();
                        moved[i].0[t] += step;
                        judged(&*objective, &moved).loss
                    };
                    let (low, here, high) = (at(-STEP), at(0.0), at(STEP));
                    // The hinge has a corner, where there is no derivative.
                    if name == "hinge" && (high - 2.0 * here + low).abs() > F64_TOLERANCE {
                        continue;
                    }
                    let wanted = (high - low) / (2.0 * STEP);
                    let reach = DIFFERENCE_TOLERANCE * (1.0 + wanted.abs());
                    prop_assert!((slope - wanted).abs() < reach, "{name}: {slope} against {wanted}");
                }
            }
        }
    }

    /// What is learnt raises the better answers and lowers the worse ones.
    #[test]
    fn the_first_step_goes_the_right_way(list in answers()) {
        let pairs = [DpoLoss::Sigmoid, DpoLoss::SigmoidNorm, DpoLoss::Robust, DpoLoss::ApoZero];
        for loss in pairs {
            let judged = judged(&Dpo { loss, beta: 0.3, label_smoothing: 0.0, rpo_alpha: 0.0 }, &list);
            for (i, slopes) in judged.slopes.iter().enumerate() {
                prop_assert!(slopes.iter().all(|s| (*s < 0.0) == i.is_multiple_of(2)), "{loss:?}: {slopes:?}");
            }
        }
    }

    #[test]
    fn nothing_overflows(scale in 1.0..1e6f64) {
        let list: Vec<_> = [(-1.0, -2.0), (-3.0, -1.0), (-2.0, -9.0), (CERTAIN, -4.0)]
            .iter()
            .map(|(logp, reference)| (vec![logp * scale], reference * scale))
            .collect();
        for (name, objective) in every() {
            let judged = judged(&*objective, &list);
            let finite = judged.loss.is_finite() && judged.slopes.iter().flatten().all(|s| s.is_finite());
            prop_assert!(finite, "{name} at {scale}: {judged:?}");
        }
    }
}

#[test]
fn the_sigmoid_is_exact_on_both_sides() {
    assert_eq!((sigmoid(0.0), sigmoid(800.0), sigmoid(-800.0)), (0.5, 1.0, 0.0));
    assert_eq!(log_sigmoid(-800.0), -800.0);
    assert!((log_sigmoid(40.0) + (-40f64).exp()).abs() < F64_TOLERANCE * (-40f64).exp());
}
