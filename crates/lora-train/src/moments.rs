//! What an optimizer keeps beside the parameters, and its step.

use crate::config::Optim;
use crate::error::Result;
use crate::plan::{RunPlan, Trained};
use lora_format::{AdapterModule, Method};
use lora_torch::{
    AdamWScalars, Blockwise, LionScalars, MOMENT_BLOCK, adamw_8bit_step, adamw_step, kind_bytes, lion_step,
};
use tch::{Device, Kind, Tensor};

/// Parameters of fewer numbers keep moments in full beside others in 8 bits, as in bitsandbytes.
const FEWEST_PACKED: i64 = 4096;

/// How the moments of a parameter are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Form {
    /// AdamW's two.
    Two,
    /// Lion's one.
    One,
    /// AdamW's two, in 8 bits.
    Packed,
}

impl Form {
    /// That of a parameter of so many numbers.
    pub(crate) fn of(optim: Optim, numbers: i64) -> Self {
        match optim {
            Optim::AdamW => Self::Two,
            Optim::Lion => Self::One,
            Optim::AdamW8 if numbers < FEWEST_PACKED => Self::Two,
            Optim::AdamW8 => Self::Packed,
        }
    }

    /// Numbers of the buffer that a parameter takes: moments in 8 bits have whole blocks.
    pub(crate) fn room(self, numbers: i64) -> i64 {
        match self {
            Self::Packed => (numbers + MOMENT_BLOCK - 1) / MOMENT_BLOCK * MOMENT_BLOCK,
            Self::One | Self::Two => numbers,
        }
    }

    /// Bytes of the moments of so many numbers of four bytes.
    pub(crate) fn bytes(self, numbers: i64) -> i64 {
        let float = kind_bytes(Kind::Float) as i64;
        match self {
            Self::Two => 2 * float * numbers,
            Self::One => float * numbers,
            Self::Packed => 2 * (self.room(numbers) + self.room(numbers) / MOMENT_BLOCK * float),
        }
    }
}

/// The moments of a part of the buffer.
#[derive(Debug)]
pub(crate) enum Moments {
    Two { exp_avg: Tensor, exp_avg_sq: Tensor },
    One { exp_avg: Tensor },
    Packed { exp_avg: Blockwise, exp_avg_sq: Blockwise },
}

impl Moments {
    pub(crate) fn zeros(form: Form, n: i64, options: (Kind, Device)) -> Result<Self> {
        let buffer = || Tensor::f_zeros([n], options).map_err(lora_torch::Error::from);
        Ok(match form {
            Form::Two => Self::Two { exp_avg: buffer()?, exp_avg_sq: buffer()? },
            Form::One => Self::One { exp_avg: buffer()? },
            Form::Packed => Self::Packed {
                exp_avg: Blockwise::zeros(n, true, options.1)?,
                exp_avg_sq: Blockwise::zeros(n, false, options.1)?,
            },
        })
    }

    /// One step over the part.
    pub(crate) fn step(&self, param: &Tensor, grad: &Tensor, h: &AdamWScalars) -> Result<()> {
        let AdamWScalars { lr, beta1, beta2, weight_decay, .. } = *h;
        match self {
            Self::Two { exp_avg, exp_avg_sq } => adamw_step(param, grad, exp_avg, exp_avg_sq, h)?,
            Self::One { exp_avg } => lion_step(param, grad, exp_avg, &LionScalars { lr, beta1, beta2, weight_decay })?,
            Self::Packed { exp_avg, exp_avg_sq } => adamw_8bit_step(param, grad, exp_avg, exp_avg_sq, h)?,
        }
        Ok(())
    }

    /// What a checkpoint holds of it, by the beginning of its name, and how many numbers of the buffer an entry stands for.
    pub(crate) fn tensors(&self) -> Vec<(&'static str, &Tensor, i64)> {
        match self {
            Self::Two { exp_avg, exp_avg_sq } => vec![("exp_avg.", exp_avg, 1), ("exp_avg_sq.", exp_avg_sq, 1)],
            Self::One { exp_avg } => vec![("exp_avg.", exp_avg, 1)],
            Self::Packed { exp_avg, exp_avg_sq } => vec![
                ("exp_avg.", &exp_avg.codes, 1),
                ("exp_avg_absmax.", &exp_avg.absmax, MOMENT_BLOCK),
                ("exp_avg_sq.", &exp_avg_sq.codes, 1),
                ("exp_avg_sq_absmax.", &exp_avg_sq.absmax, MOMENT_BLOCK),
            ],
        }
    }
}

impl RunPlan {
    /// Bytes of the optimizer's moments.
    pub fn moment_bytes(&self) -> i64 {
        let optim = self.config.train.optim;
        let sizes = self.matrix_sizes();
        // What is left are vectors and other small ones.
        let rest = self.trained_parameters() - sizes.iter().sum::<i64>();
        let bytes = |numbers: i64| Form::of(optim, numbers).bytes(numbers);
        Form::of(optim, 0).bytes(rest.max(0)) + sizes.into_iter().map(bytes).sum::<i64>()
    }

    /// About what a checkpoint takes: the parameters and the result in float32, the moments, and an eighth more for what is
    /// not.
    pub(crate) fn checkpoint_bytes(&self) -> u64 {
        (8 * self.trained_parameters() + self.moment_bytes()).unsigned_abs() / 8 * 9
    }

    /// Numbers of each trained matrix.
    fn matrix_sizes(&self) -> Vec<i64> {
        let product = |shape: &[i64]| shape.iter().product::<i64>();
        match &self.trained {
            Trained::Fresh(plan) => {
                // VeRA trains vectors only.
                let paired = !matches!(plan.config.method, Method::Vera(_));
                let adapters = plan.adapters.iter().filter(|_| paired);
                let pairs = adapters.map(|a| (a.spec.r(), a.module.in_features, a.module.out_features));
                let stacked = plan
                    .stacked
                    .iter()
                    .map(|p| (p.stack.experts * p.spec.r(), p.stack.in_features, p.stack.out_features));
                let halves = pairs.chain(stacked).flat_map(|(r, i, o)| [r * i, r * o]);
                let saved = plan.saved.iter().flat_map(|m| m.tensors()).map(|(_, shape)| product(&shape));
                halves.chain(saved).collect()
            }
            Trained::Existing(folder) => {
                let of = |module: &AdapterModule| match module {
                    AdapterModule::Linear(lora) | AdapterModule::Embedding(lora) | AdapterModule::Stacked(lora) => {
                        vec![lora.a.numel() as i64, lora.b.numel() as i64]
                    }
                    AdapterModule::AdaLora(lora) => vec![lora.a.numel() as i64, lora.b.numel() as i64],
                    AdapterModule::Saved { tensors } => tensors.values().map(|t| t.numel() as i64).collect(),
                    AdapterModule::Vera(_) | AdapterModule::Tokens(_) => Vec::new(),
                };
                folder.modules.values().flat_map(of).collect()
            }
            Trained::Everything => {
                let tensors = lora_model::checkpoint_tensors(&self.model);
                tensors.iter().map(|(_, shape)| product(shape)).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_parameters_keep_moments_in_full_and_large_ones_take_whole_blocks() {
        assert_eq!(Form::of(Optim::AdamW8, FEWEST_PACKED - 1), Form::Two);
        let packed = Form::of(Optim::AdamW8, FEWEST_PACKED);
        assert_eq!((packed, packed.room(4097), Form::Two.room(4097)), (Form::Packed, 17 * 256, 4097));
        // Two bytes a number, and a scale of four for each 256 of either moment.
        assert_eq!(packed.bytes(4096), 2 * 4096 + 2 * 16 * 4);
        assert_eq!((Form::of(Optim::Lion, 9).bytes(10), Form::Two.bytes(10)), (40, 80));
    }

    #[test]
    fn bytes_are_those_of_the_tensors() {
        for form in [Form::One, Form::Two, Form::Packed] {
            let moments = Moments::zeros(form, form.room(5000), (Kind::Float, Device::Cpu)).unwrap();
            let bytes = |t: &Tensor| t.numel() * kind_bytes(t.kind());
            let sum: usize = moments.tensors().into_iter().map(|(_, t, _)| bytes(t)).sum();
            assert_eq!(form.bytes(5000), sum as i64, "{form:?}");
        }
    }
}
