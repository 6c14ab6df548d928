//! `[objective]`: what is minimised. Names are those of TRL and LLaMA-Factory.

use super::keys::{Kind, Range, choice, section};
use crate::objective::{Dpo, DpoLoss, Kto, Objective, Orpo, RewardModel, SimPo};
use crate::policy_loss::{PolicyAverage, PolicyLoss, ScaleRewards};

choice! {
    /// What is minimised.
    ObjectiveName {
        /// The loss of the trained tokens: supervised fine-tuning and continued pre-training.
        Sft = "sft",
        /// Direct preference optimisation of pairs.
        Dpo = "dpo",
        /// Odds ratio preference optimisation of pairs; no reference.
        Orpo = "orpo",
        /// Simple preference optimisation of pairs; no reference.
        SimPo = "simpo",
        /// Kahneman-Tversky optimisation of answers that are rated one by one.
        Kto = "kto",
        /// A reward model from pairs: a classifier with one score.
        Reward = "reward",
        /// Group relative policy optimisation: the model answers prompts itself, and what is better rewarded than the other
        /// answers to the same prompt becomes more likely.
        Grpo = "grpo",
    }
}

choice! {
    /// What rewards an answer that the model writes.
    RewardName {
        /// A program of the user's.
        Command = "command",
        /// 1 for the answer of the example, white space at both ends apart, else 0.
        ExactMatch = "exact_match",
        /// 1 where its last number is that of the example's answer, else 0.
        Number = "number",
        /// F of ROUGE-L against the answer of the example, 0 to 1.
        RougeL = "rouge_l",
        /// chrF against the answer of the example, 0 to 1.
        Chrf = "chrf",
    }
}

choice! {
    /// The model that a policy is kept near to.
    Reference {
        /// The base.
        Base = "base",
        /// The model as the run begins.
        Start = "start",
    }
}

section! {
    /// What is minimised. All but `sft` and `grpo` compare whole answers: data in format `preference`, or `kto`.
    ObjectiveConfig {
        /// `sft`, or of pairs `dpo`, `orpo`, `simpo` and `reward`, or of rated answers `kto`. A reward model wants
        /// `lora.task_type = "SEQ_CLS"`. With `grpo` the model answers the prompts of the examples itself, and is rewarded.
        name: ObjectiveName = ObjectiveName::Sft, Kind::Choice(ObjectiveName::NAMES);
        /// Which loss of DPO; of KTO `sigmoid` or `apo_zero`.
        loss_type: DpoLoss = DpoLoss::Sigmoid, Kind::Choice(DpoLoss::NAMES);
        /// DPO and KTO: how closely the answers keep to the reference; ORPO: weight of the odds ratio; SimPO: scale of the
        /// rewards; GRPO: weight of the divergence from the reference. 2 for SimPO, 0 for GRPO and 0.1 for the others when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        beta: Option<f64> = None, Kind::Number(Range::NotNegative);
        /// DPO with `sigmoid` or `robust`: the share of pairs that are held to be the wrong way round; below a half.
        label_smoothing: f64 = 0.0, Kind::Number(Range::ZeroToBelowOne);
        /// DPO: weight of the mean loss of the better answer's tokens beside it (RPO).
        rpo_alpha: f64 = 0.0, Kind::Number(Range::NotNegative);
        /// SimPO: the margin between the rewards that is aimed at.
        simpo_gamma: f64 = 0.5, Kind::Number(Range::NotNegative);
        /// KTO: weight of good answers.
        desirable_weight: f64 = 1.0, Kind::Number(Range::Positive);
        /// KTO: weight of bad answers.
        undesirable_weight: f64 = 1.0, Kind::Number(Range::Positive);
        /// Reward model: weight of the squared sum of a pair's scores, which keeps them around 0.
        center_rewards_coefficient: f64 = 0.0, Kind::Number(Range::NotNegative);
        /// DPO, KTO and GRPO: the model that the answers are kept near to. `base` is the base without any adapter, `start` the model
        /// as the run begins, with `lora.init_adapter` where there is one.
        reference: Reference = Reference::Base, Kind::Choice(Reference::NAMES);
        /// GRPO: what rewards an answer. `exact_match`, `number` (the last number is right), `rouge_l` and `chrf` compare it
        /// with the answer of the example; `command` is a program of your own.
        #[serde(skip_serializing_if = "Option::is_none")]
        reward: Option<RewardName> = None, Kind::Choice(RewardName::NAMES);
        /// GRPO with `reward = "command"`: the program and its arguments. It reads a line of JSON for each answer, with `prompt`,
        /// `completion`, `answer` (of the example) and `ended`, and writes a line with a number for each.
        reward_command: Vec<String> = Vec::new(), Kind::Texts;
        /// GRPO: seconds without a line after which the program is held to be stuck.
        reward_timeout: f64 = 120.0, Kind::Number(Range::Positive);
        /// GRPO: answers to each prompt. A batch is `per_device_train_batch_size` prompts with as many answers each.
        num_generations: u32 = 8, Kind::Integer { min: 2, max: 4096 };
        /// GRPO: the most tokens of an answer.
        max_completion_length: u32 = 256, Kind::Integer { min: 1, max: 1 << 20 };
        /// GRPO: what logits are divided by, where answers are drawn and where their probabilities are taken.
        temperature: f64 = 1.0, Kind::Number(Range::Positive);
        /// GRPO: only the most likely tokens that together hold this share are drawn from.
        top_p: f64 = 1.0, Kind::Number(Range::ZeroToOne);
        /// GRPO: how the loss of the tokens is averaged: `dapo` over all tokens of a step, `grpo` over those of an answer and
        /// then over the answers, `dr_grpo` over the answers as if each had `max_completion_length` tokens.
        policy_average: PolicyAverage = PolicyAverage::Dapo, Kind::Choice(PolicyAverage::NAMES);
        /// GRPO: what the rewards of a group, less their mean, are divided by: the standard deviation of the `group`, that of the
        /// whole step (`batch`), or `none`.
        scale_rewards: ScaleRewards = ScaleRewards::Group, Kind::Choice(ScaleRewards::NAMES);
        /// GRPO: how many optimizer steps learn from the same answers.
        num_iterations: u32 = 1, Kind::Integer { min: 1, max: 64 };
        /// GRPO: how far a probability may fall, and rise, in these steps before it counts no more.
        epsilon: f64 = 0.2, Kind::Number(Range::ZeroToBelowOne);
        /// GRPO: how far it may rise, where that is another share than `epsilon`.
        #[serde(skip_serializing_if = "Option::is_none")]
        epsilon_high: Option<f64> = None, Kind::Number(Range::NotNegative);
        /// GRPO: leave answers that did not end within `max_completion_length` out of the loss.
        mask_truncated_completions: bool = false, Kind::Bool;
    }
}

impl ObjectiveConfig {
    /// Whether answers that are there are compared or rated, and not their tokens learnt.
    pub fn compares(&self) -> bool {
        !matches!(self.name, ObjectiveName::Sft | ObjectiveName::Grpo)
    }

    /// Whether the model answers prompts itself and is rewarded.
    pub fn samples(&self) -> bool {
        self.name == ObjectiveName::Grpo
    }

    /// What is minimised where the model is rewarded.
    pub fn policy_loss(&self) -> PolicyLoss {
        PolicyLoss {
            average: self.policy_average,
            epsilon_low: self.epsilon,
            epsilon_high: self.epsilon_high.unwrap_or(self.epsilon),
            beta: self.beta().unwrap_or(0.0),
            max_completion_length: self.max_completion_length as usize,
        }
    }

    /// Whether this is all as it is for plain fine-tuning.
    pub(crate) fn is_usual(&self) -> bool {
        *self == Self::default()
    }

    /// `beta`, or what it is by default; none where the objective has none.
    pub fn beta(&self) -> Option<f64> {
        let usual = match self.name {
            ObjectiveName::Sft | ObjectiveName::Reward => return None,
            ObjectiveName::SimPo => 2.0,
            ObjectiveName::Grpo => 0.0,
            ObjectiveName::Dpo | ObjectiveName::Orpo | ObjectiveName::Kto => 0.1,
        };
        Some(self.beta.unwrap_or(usual))
    }

    /// The objective; `None` for plain fine-tuning.
    pub fn objective(&self) -> Option<Box<dyn Objective>> {
        let beta = self.beta().unwrap_or(0.0);
        Some(match self.name {
            ObjectiveName::Sft | ObjectiveName::Grpo => return None,
            ObjectiveName::Dpo => Box::new(Dpo {
                loss: self.loss_type,
                beta,
                label_smoothing: self.label_smoothing,
                rpo_alpha: self.rpo_alpha,
            }),
            ObjectiveName::Orpo => Box::new(Orpo { beta }),
            ObjectiveName::SimPo => Box::new(SimPo { beta, gamma: self.simpo_gamma }),
            ObjectiveName::Kto => Box::new(Kto {
                beta,
                desirable_weight: self.desirable_weight,
                undesirable_weight: self.undesirable_weight,
                drift: self.loss_type != DpoLoss::ApoZero,
            }),
            ObjectiveName::Reward => {
                Box::new(RewardModel { center_rewards_coefficient: self.center_rewards_coefficient })
            }
        })
    }
}
