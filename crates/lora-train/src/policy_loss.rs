//! What is minimised when a model answers prompts itself and its answers are rewarded: group relative policy optimisation
//! (Shao et al., "DeepSeekMath", 2024, section 4.1), with the averages that came after it.
//!
//! This is arithmetic in double precision on a few numbers of each answer, as in [`crate::objective`].

use crate::config::choice;

/// What is added to a standard deviation before rewards are divided by it, as TRL does.
const LEAST_SPREAD: f64 = 1e-4;

choice! {
    /// How the losses of tokens become one.
    PolicyAverage {
        /// Over all tokens of a step (Yu et al., "DAPO", 2025, equation 12).
        Dapo = "dapo",
        /// Over the tokens of each answer, then over the answers (DeepSeekMath, equation 3).
        Grpo = "grpo",
        /// Over the answers, as if each had the most tokens (Liu et al., "Understanding R1-Zero-Like Training", 2025,
        /// section 3.2).
        DrGrpo = "dr_grpo",
    }
}

choice! {
    /// What rewards, less the mean of their group, are divided by.
    ScaleRewards {
        /// The standard deviation of the group.
        Group = "group",
        /// That of all answers of a step.
        Batch = "batch",
        /// Nothing.
        None = "none",
    }
}

/// How much better each answer was than the others to its prompt. `rewards` lie group by group; standard deviations are those
/// of a sample (n - 1).
pub fn advantages(rewards: &[f64], group: usize, scale: ScaleRewards) -> Vec<f64> {
    let of_all = spread(rewards);
    let of_group = |rewards: &[f64]| -> Vec<f64> {
        let mean = mean(rewards);
        let by = match scale {
            ScaleRewards::Group => spread(rewards) + LEAST_SPREAD,
            ScaleRewards::Batch => of_all + LEAST_SPREAD,
            ScaleRewards::None => 1.0,
        };
        rewards.iter().map(|reward| (reward - mean) / by).collect()
    };
    rewards.chunks(group.max(1)).flat_map(of_group).collect()
}

/// The mean; 0 of none.
pub(crate) fn mean(numbers: &[f64]) -> f64 {
    numbers.iter().sum::<f64>() / numbers.len().max(1) as f64
}

/// The standard deviation of a sample; 0 of fewer than two.
pub(crate) fn spread(numbers: &[f64]) -> f64 {
    if numbers.len() < 2 {
        return 0.0;
    }
    let mean = mean(numbers);
    (numbers.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / (numbers.len() - 1) as f64).sqrt()
}

/// An answer that was rewarded. All slices have a number for each of its tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rewarded<'a> {
    /// Its log-probabilities as the model stands.
    pub logps: &'a [f64],
    /// Those under the model that wrote it; where there are none, the model is that one still.
    pub old: Option<&'a [f64]>,
    /// Those under the reference, where the divergence from it counts.
    pub reference: Option<&'a [f64]>,
    /// How much better it was than the others to its prompt.
    pub advantage: f64,
    /// Whether it counts in the loss.
    pub counts: bool,
}

/// The answers of a step, to weigh each token by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepSize {
    /// Answers.
    pub answers: usize,
    /// Their tokens, without those of answers that do not count.
    pub tokens: usize,
}

/// The loss of rewarded answers. A token with probability ratio ρ to the model that wrote it, and advantage A, has the loss
/// `-min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A) + β (exp(d) - d - 1)`, `d` being the log-probability under the reference less
/// the present one (Schulman, "Approximating KL Divergence", 2020, the third estimator).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PolicyLoss {
    /// How the losses of tokens become one.
    pub average: PolicyAverage,
    /// How far a probability may fall before it counts no more.
    pub epsilon_low: f64,
    /// How far it may rise.
    pub epsilon_high: f64,
    /// Weight of the divergence from the reference.
    pub beta: f64,
    /// The most tokens of an answer.
    pub max_completion_length: usize,
}

/// What the loss says of some answers of a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PolicyJudgement {
    /// Their part of the loss of the step.
    pub loss: f64,
    /// Its derivative by the log-probability of each token, answer after answer.
    pub slopes: Vec<f64>,
    /// The divergence from the reference, summed over the tokens that count.
    pub divergence: f64,
    /// Tokens whose ratio is out of bounds, so that they have no gradient.
    pub clipped: usize,
}

impl PolicyJudgement {
    /// Adds what was said of other answers of the step, but for their slopes.
    pub(crate) fn join(&mut self, other: &Self) {
        self.loss += other.loss;
        self.divergence += other.divergence;
        self.clipped += other.clipped;
    }
}

impl PolicyLoss {
    /// Judges some of the answers of a step.
    pub fn judge(&self, answers: &[Rewarded<'_>], of: StepSize) -> PolicyJudgement {
        let mut judged = PolicyJudgement::default();
        for answer in answers {
            let weight = if answer.counts { self.weight(answer.logps.len(), of) } else { 0.0 };
            for (i, logp) in answer.logps.iter().enumerate() {
                let at = |list: Option<&[f64]>| list.and_then(|list| list.get(i)).copied();
                let ratio = at(answer.old).map_or(1.0, |old| (logp - old).exp());
                let bounded = ratio.clamp(1.0 - self.epsilon_low, 1.0 + self.epsilon_high);
                let (free, held) = (ratio * answer.advantage, bounded * answer.advantage);
                let (mut loss, mut slope) = (-free.min(held), if free <= held { -free } else { 0.0 });
                if let Some(reference) = at(answer.reference) {
                    let d = reference - logp;
                    let divergence = d.exp_m1() - d;
                    loss += self.beta * divergence;
                    slope -= self.beta * d.exp_m1();
                    judged.divergence += if answer.counts { divergence } else { 0.0 };
                }
                judged.loss += weight * loss;
                judged.slopes.push(weight * slope);
                judged.clipped += usize::from(answer.counts && free > held);
            }
        }
        judged
    }

    /// What a token of an answer of so many tokens weighs.
    fn weight(&self, tokens: usize, of: StepSize) -> f64 {
        let all = match self.average {
            PolicyAverage::Dapo => of.tokens,
            PolicyAverage::Grpo => of.answers * tokens,
            PolicyAverage::DrGrpo => of.answers * self.max_completion_length,
        };
        1.0 / all.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Of a function with curvature of order 1, a step of 1e-5 is off by 1e-10, and rounding by 1e-11.
    const DIFFERENCE_TOLERANCE: f64 = 1e-7;
    /// Sums of a few numbers in float64 on both sides.
    const F64_TOLERANCE: f64 = 1e-12;
    const STEP: f64 = 1e-5;
    /// So near to a bound a step may cross it.
    const NEAR_A_CORNER: f64 = 1e-3;

    fn loss(average: PolicyAverage, beta: f64) -> PolicyLoss {
        PolicyLoss { average, epsilon_low: 0.2, epsilon_high: 0.3, beta, max_completion_length: 7 }
    }

    #[test]
    fn advantages_have_no_mean_and_the_spread_that_was_asked_for() {
        let rewards = [1.0, 0.0, 0.0, 3.0, 5.0, 5.0, 5.0, 5.0];
        let group = advantages(&rewards, 4, ScaleRewards::Group);
        let sd = (6.0f64 / 3.0).sqrt();
        assert!((group[3] - 2.0 / (sd + LEAST_SPREAD)).abs() < F64_TOLERANCE, "{group:?}");
        assert_eq!(group[4..], [0.0; 4], "a group without a difference teaches nothing");
        assert_eq!(advantages(&rewards, 4, ScaleRewards::None)[..4], [0.0, -1.0, -1.0, 2.0]);
        let batch = advantages(&rewards, 4, ScaleRewards::Batch);
        assert!((batch[3] - 2.0 / (spread(&rewards) + LEAST_SPREAD)).abs() < F64_TOLERANCE);
        assert!(group.chunks(4).all(|g| mean(g).abs() < F64_TOLERANCE));
    }

    #[test]
    fn tokens_weigh_what_their_average_says() {
        let long = Rewarded { logps: &[-1.0; 4], old: None, reference: None, advantage: 1.0, counts: true };
        let short = Rewarded { logps: &[-1.0; 2], advantage: -2.0, ..long };
        let of = StepSize { answers: 2, tokens: 6 };
        let slopes = |average| loss(average, 0.0).judge(&[long, short], of).slopes;
        assert_eq!(slopes(PolicyAverage::Dapo), [[-1.0 / 6.0; 4].as_slice(), &[2.0 / 6.0; 2]].concat());
        assert_eq!(slopes(PolicyAverage::Grpo), [[-1.0 / 8.0; 4].as_slice(), &[2.0 / 4.0; 2]].concat());
        assert_eq!(slopes(PolicyAverage::DrGrpo), [[-1.0 / 14.0; 4].as_slice(), &[2.0 / 14.0; 2]].concat());
        let left_out = loss(PolicyAverage::Grpo, 0.1).judge(&[Rewarded { counts: false, ..long }], of);
        assert_eq!((left_out.loss, left_out.slopes), (0.0, vec![-0.0; 4]));
    }

    #[test]
    fn a_ratio_out_of_bounds_has_no_gradient_where_that_would_go_further() {
        let of = StepSize { answers: 1, tokens: 1 };
        let slope = |ratio: f64, advantage| {
            let logp = ratio.ln() - 1.0;
            let answer = Rewarded { logps: &[logp], old: Some(&[-1.0]), reference: None, advantage, counts: true };
            let judged = loss(PolicyAverage::Dapo, 0.0).judge(&[answer], of);
            assert_eq!(judged.clipped == 1, judged.slopes[0] == 0.0);
            judged.slopes[0]
        };
        // Up to 1.3 for what is good, down to 0.8 for what is bad; back is always possible.
        assert!(slope(1.29, 1.0) < 0.0 && slope(1.31, 1.0) == 0.0 && slope(0.5, 1.0) < 0.0);
        assert!(slope(0.81, -1.0) > 0.0 && slope(0.79, -1.0) == 0.0 && slope(2.0, -1.0) > 0.0);
    }

    proptest! {
        #[test]
        fn slopes_are_the_derivatives_of_the_loss(
            list in proptest::collection::vec((-3.0..-0.05f64, -3.0..-0.05f64, -3.0..-0.05f64), 1..6),
            advantage in -2.0..2.0f64,
            beta in 0.0..0.5f64,
        ) {
            let (logps, old): (Vec<f64>, Vec<f64>) = list.iter().map(|(a, b, _)| (*a, *b)).unzip();
            let reference: Vec<f64> = list.iter().map(|(_, _, c)| *c).collect();
            let of = StepSize { answers: 3, tokens: 11 };
            for average in PolicyAverage::ALL {
                let judged = |logps: &[f64]| {
                    let answer = Rewarded { logps, old: Some(&old), reference: Some(&reference), advantage, counts: true };
                    loss(*average, beta).judge(&[answer], of)
                };
                let slopes = judged(&logps).slopes;
                for t in 0..logps.len() {
                    // The loss has a corner where the ratio leaves its bounds.
                    let ratio = (logps[t] - old[t]).exp();
                    prop_assume!((ratio - 0.8).abs() > NEAR_A_CORNER && (ratio - 1.3).abs() > NEAR_A_CORNER);
                    let at = |step: f64| {
                        let mut moved = logps.clone();
                        moved[t] += step;
                        judged(&moved).loss
                    };
                    let difference = (at(STEP) - at(-STEP)) / (2.0 * STEP);
                    prop_assert!((slopes[t] - difference).abs() < DIFFERENCE_TOLERANCE, "{} {difference}", slopes[t]);
                }
            }
        }
    }
}
