//! `[objective]`: what is minimised. Names are those of TRL and LLaMA-Factory.

use super::keys::{Kind, Range, choice, section};
use crate::objective::{Dpo, DpoLoss, Kto, Objective, Orpo, RewardModel, SimPo};

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
    /// What is minimised. All but `sft` compare whole answers: data in format `preference`, or `kto`.
    ObjectiveConfig {
        /// `sft`, or of pairs `dpo`, `orpo`, `simpo` and `reward`, or of rated answers `kto`. A reward model wants
        /// `lora.task_type = "SEQ_CLS"`.
        name: ObjectiveName = ObjectiveName::Sft, Kind::Choice(ObjectiveName::NAMES);
        /// Which loss of DPO; of KTO `sigmoid` or `apo_zero`.
        loss_type: DpoLoss = DpoLoss::Sigmoid, Kind::Choice(DpoLoss::NAMES);
        /// DPO and KTO: how closely the answers keep to the reference; ORPO: weight of the odds ratio; SimPO: scale of the
        /// rewards. 2 for SimPO and 0.1 for the others when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        beta: Option<f64> = None, Kind::Number(Range::Positive);
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
        /// DPO and KTO: the model that the answers are kept near to. `base` is the base without any adapter, `start` the model
        /// as the run begins, with `lora.init_adapter` where there is one.
        reference: Reference = Reference::Base, Kind::Choice(Reference::NAMES);
    }
}

impl ObjectiveConfig {
    /// Whether answers are compared or rated, and not their tokens learnt.
    pub fn compares(&self) -> bool {
        self.name != ObjectiveName::Sft
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
            ObjectiveName::Dpo | ObjectiveName::Orpo | ObjectiveName::Kto => 0.1,
        };
        Some(self.beta.unwrap_or(usual))
    }

    /// The objective; `None` for plain fine-tuning.
    pub fn objective(&self) -> Option<Box<dyn Objective>> {
        let beta = self.beta().unwrap_or(0.0);
        Some(match self.name {
            ObjectiveName::Sft => return None,
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
