//! What is minimised when answers are compared or rated: a function of their log-probabilities, and its derivatives.
//!
//! Everything here is arithmetic in double precision on a few numbers of each answer; [`crate::Trainer`] computes those
//! numbers and carries the derivatives back through the model. An objective of your own is a type with [`Objective`].

use crate::config::choice;

/// An answer, as an objective sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer<'a> {
    /// The log-probability of each of its tokens; of a reward model its score alone.
    pub logps: &'a [f64],
    /// The sum of its log-probabilities under the reference; 0 where the objective needs none.
    pub reference: f64,
    /// Whether it is the better one of a pair, or rated good.
    pub good: bool,
}

impl Answer<'_> {
    /// The log-probability of the whole answer.
    pub fn logp(&self) -> f64 {
        self.logps.iter().sum()
    }

    /// The mean over its tokens.
    pub fn mean_logp(&self) -> f64 {
        self.logp() / self.tokens()
    }

    /// How much more probable it is than under the reference, in nats.
    pub fn log_ratio(&self) -> f64 {
        self.logp() - self.reference
    }

    fn tokens(&self) -> f64 {
        self.logps.len().max(1) as f64
    }

    /// A derivative by the sum of the log-probabilities, as one by each of them.
    pub fn slopes(&self, of_sum: f64) -> Vec<f64> {
        vec![of_sum; self.logps.len()]
    }
}

/// What an objective says of the answers of a batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Judgement {
    /// The loss, summed over the pairs, or over the answers where they come alone.
    pub loss: f64,
    /// For each answer the derivative of that sum by each of its log-probabilities.
    pub slopes: Vec<Vec<f64>>,
    /// For each answer the reward that the policy stands for, which is only reported.
    pub rewards: Vec<f64>,
}

/// A function of the log-probabilities of answers that is minimised.
pub trait Objective: std::fmt::Debug + Send {
    /// The loss of the answers of a batch. Pairs lie next to each other, the better answer first. `drift` is how much the
    /// policy has moved from the reference on unrelated answers, in nats and not below 0; 0 unless it is asked for.
    fn judge(&self, answers: &[Answer<'_>], drift: f64) -> Judgement;

    /// Whether the log-probabilities under the reference are needed.
    fn needs_reference(&self) -> bool {
        false
    }

    /// Whether the drift is needed.
    fn needs_drift(&self) -> bool {
        false
    }
}

choice! {
    /// The losses of direct preference optimisation, by TRL's names; KTO has the first and `apo_zero`.
    DpoLoss {
        /// `-log σ(x)` (Rafailov et al. 2023, equation 7), and with label smoothing ε
        /// `-(1 - ε) log σ(x) - ε log σ(-x)` (Mitchell 2023).
        Sigmoid = "sigmoid",
        /// The same where each side's ratio is divided by its number of tokens.
        SigmoidNorm = "sigmoid_norm",
        /// `max(0, 1 - x)` (Zhao et al. 2023).
        Hinge = "hinge",
        /// `(h_w - h_l - 1 / 2β)²` of ratios divided by their numbers of tokens (Azar et al. 2023, equation 17).
        Ipo = "ipo",
        /// `(-(1 - ε) log σ(x) + ε log σ(-x)) / (1 - 2ε)` (Chowdhury et al. 2024).
        Robust = "robust",
        /// `1 - σ(β h_w) + σ(β h_l)` (D'Oosterlinck et al. 2024).
        ApoZero = "apo_zero",
        /// `σ(β h_w) + 1 - σ(β h_w - β h_l)` (the same).
        ApoDown = "apo_down",
    }
}

/// Direct preference optimisation: `h` is [`Answer::log_ratio`], `x = β (h_w - h_l)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dpo {
    /// Which of the losses.
    pub loss: DpoLoss,
    /// How closely the policy keeps to the reference.
    pub beta: f64,
    /// The share of pairs that are held to be the wrong way round.
    pub label_smoothing: f64,
    /// Weight of the mean loss of the better answer's tokens beside it (RPO, Pang et al. 2024, equation 2).
    pub rpo_alpha: f64,
}

impl Objective for Dpo {
    fn judge(&self, answers: &[Answer<'_>], _drift: f64) -> Judgement {
        let (b, e) = (self.beta, self.label_smoothing);
        let mut judged = pairs(answers, |w, l| {
            let (h_w, h_l) = (w.log_ratio(), l.log_ratio());
            let x = b * (h_w - h_l);
            // The loss and its derivatives by h_w and h_l.
            match self.loss {
                DpoLoss::Sigmoid => {
                    let slope = b * (e * sigmoid(x) - (1.0 - e) * sigmoid(-x));
                    (-(1.0 - e) * log_sigmoid(x) - e * log_sigmoid(-x), slope, -slope)
                }
                DpoLoss::Robust => {
                    let scale = 1.0 / (1.0 - 2.0 * e);
                    let slope = -b * scale * ((1.0 - e) * sigmoid(-x) + e * sigmoid(x));
                    (scale * (e * log_sigmoid(-x) - (1.0 - e) * log_sigmoid(x)), slope, -slope)
                }
                DpoLoss::SigmoidNorm => {
                    let x = b * (h_w / w.tokens() - h_l / l.tokens());
                    let slope = -b * sigmoid(-x);
                    (-log_sigmoid(x), slope / w.tokens(), -slope / l.tokens())
                }
                DpoLoss::Hinge => {
                    let slope = if x < 1.0 { -b } else { 0.0 };
                    ((1.0 - x).max(0.0), slope, -slope)
                }
                DpoLoss::Ipo => {
                    let d = h_w / w.tokens() - h_l / l.tokens() - 0.5 / b;
                    (d * d, 2.0 * d / w.tokens(), -2.0 * d / l.tokens())
                }
                DpoLoss::ApoZero => {
                    let (s_w, s_l) = (sigmoid(b * h_w), sigmoid(b * h_l));
                    (1.0 - s_w + s_l, -b * s_w * (1.0 - s_w), b * s_l * (1.0 - s_l))
                }
                DpoLoss::ApoDown => {
                    let (s_w, s) = (sigmoid(b * h_w), sigmoid(x));
                    let slope = b * s * (1.0 - s);
                    (s_w + 1.0 - s, b * s_w * (1.0 - s_w) - slope, slope)
                }
            }
        });
        judged.rewards = answers.iter().map(|a| b * a.log_ratio()).collect();
        if self.rpo_alpha > 0.0 {
            for (answer, slopes) in answers.iter().zip(&mut judged.slopes).step_by(2) {
                judged.loss -= self.rpo_alpha * answer.mean_logp();
                slopes.iter_mut().for_each(|slope| *slope -= self.rpo_alpha / answer.tokens());
            }
        }
        judged
    }

    fn needs_reference(&self) -> bool {
        true
    }
}

/// Odds ratio preference optimisation (Hong et al. 2024, equations 4 to 7): the mean loss of the better answer's tokens,
/// and `-β log σ(log odds_w - log odds_l)` with `odds = p / (1 - p)` of the mean log-probabilities. No reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Orpo {
    /// Weight of the odds ratio, the paper's λ.
    pub beta: f64,
}

impl Objective for Orpo {
    fn judge(&self, answers: &[Answer<'_>], _drift: f64) -> Judgement {
        // 1 - p must not be 0.
        let odds = |m: f64| {
            let rest = -m.min(-1e-12).exp_m1();
            (m - rest.ln(), 1.0 / rest)
        };
        let mut judged = pairs(answers, |w, l| {
            let (m_w, m_l) = (w.mean_logp(), l.mean_logp());
            let ((odds_w, by_w), (odds_l, by_l)) = (odds(m_w), odds(m_l));
            let z = odds_w - odds_l;
            let slope = self.beta * sigmoid(-z);
            (-m_w - self.beta * log_sigmoid(z), (-1.0 - slope * by_w) / w.tokens(), slope * by_l / l.tokens())
        });
        judged.rewards = answers.iter().map(|a| self.beta * a.mean_logp()).collect();
        judged
    }
}

/// Simple preference optimisation (Meng et al. 2024, equation 6): `-log σ(β (m_w - m_l) - γ)` of mean log-probabilities. No
/// reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SimPo {
    /// Scale of the rewards.
    pub beta: f64,
    /// The margin γ between them that is aimed at.
    pub gamma: f64,
}

impl Objective for SimPo {
    fn judge(&self, answers: &[Answer<'_>], _drift: f64) -> Judgement {
        let mut judged = pairs(answers, |w, l| {
            let x = self.beta * (w.mean_logp() - l.mean_logp()) - self.gamma;
            let slope = -self.beta * sigmoid(-x);
            (-log_sigmoid(x), slope / w.tokens(), -slope / l.tokens())
        });
        judged.rewards = answers.iter().map(|a| self.beta * a.mean_logp()).collect();
        judged
    }
}

/// Kahneman-Tversky optimisation (Ethayarajh et al. 2024, equation 8) of answers that are rated one by one:
/// `w_d (1 - σ(β h - β z))` of a good one and `w_u (1 - σ(β z - β h))` of a bad one, with the drift z.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kto {
    /// How closely the policy keeps to the reference.
    pub beta: f64,
    /// Weight of good answers.
    pub desirable_weight: f64,
    /// Weight of bad answers.
    pub undesirable_weight: f64,
    /// Whether z is the drift; 0 otherwise, which is TRL's `apo_zero_unpaired`.
    pub drift: bool,
}

impl Objective for Kto {
    fn judge(&self, answers: &[Answer<'_>], drift: f64) -> Judgement {
        let z = if self.drift { drift } else { 0.0 };
        let mut judged = Judgement::default();
        for answer in answers {
            let h = answer.log_ratio();
            let (weight, side) =
                if answer.good { (self.desirable_weight, 1.0) } else { (self.undesirable_weight, -1.0) };
            let s = sigmoid(side * self.beta * (h - z));
            judged.loss += weight * (1.0 - s);
            judged.slopes.push(answer.slopes(-weight * side * self.beta * s * (1.0 - s)));
            judged.rewards.push(self.beta * h);
        }
        judged
    }

    fn needs_reference(&self) -> bool {
        true
    }

    fn needs_drift(&self) -> bool {
        self.drift
    }
}

/// Reward modelling (Ouyang et al. 2022, equation 1): `-log σ(s_w - s_l)` of scores, and a coefficient times
/// `(s_w + s_l)²`, which keeps them around 0 (Eisenstein et al. 2023, section 2).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RewardModel {
    /// The coefficient.
    pub center_rewards_coefficient: f64,
}

impl Objective for RewardModel {
    fn judge(&self, answers: &[Answer<'_>], _drift: f64) -> Judgement {
        let mut judged = pairs(answers, |w, l| {
            let (x, sum) = (w.logp() - l.logp(), w.logp() + l.logp());
            let (slope, centre) = (-sigmoid(-x), 2.0 * self.center_rewards_coefficient * sum);
            (0.5 * centre * sum - log_sigmoid(x), slope + centre, centre - slope)
        });
        judged.rewards = answers.iter().map(Answer::logp).collect();
        judged
    }
}

/// Judges pair by pair: a loss, and its derivatives by the log-probability of the better and of the worse answer.
fn pairs(answers: &[Answer<'_>], mut judge: impl FnMut(&Answer<'_>, &Answer<'_>) -> (f64, f64, f64)) -> Judgement {
    let mut judged = Judgement::default();
    for pair in answers.chunks_exact(2) {
        let (w, l) = (&pair[0], &pair[1]);
        let (loss, by_w, by_l) = judge(w, l);
        judged.loss += loss;
        judged.slopes.extend([w.slopes(by_w), l.slopes(by_l)]);
    }
    judged
}

fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { 1.0 - sigmoid(-x) }
}

/// Exact far from 0, too.
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests;
