//! The learning rate as a pure function of the optimizer step.

use crate::config::{TrainConfig, choice};
use std::f64::consts::PI;

choice! {
    /// How the learning rate goes.
    ScheduleKind {
        /// The same for all steps; there is no warm-up.
        Constant = "constant",
        /// Rises in the warm-up and falls in a line to 0.
        Linear = "linear",
        /// Rises in the warm-up and falls along half a cosine wave to 0.
        Cosine = "cosine",
        /// Rises in the warm-up and stays.
        ConstantWithWarmup = "constant_with_warmup",
    }
}

/// A schedule of the learning rate. The values are those of `get_constant_schedule`, `get_linear_schedule_with_warmup`,
/// `get_cosine_schedule_with_warmup` and `get_constant_schedule_with_warmup` of transformers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// How it goes.
    pub kind: ScheduleKind,
    /// The highest learning rate.
    pub base_lr: f64,
    /// Optimizer steps of warm-up.
    pub warmup_steps: u64,
    /// Optimizer steps of the run.
    pub total_steps: u64,
}

impl Schedule {
    /// The schedule of a configuration for a run of so many optimizer steps.
    pub fn new(config: &TrainConfig, total_steps: u64) -> Self {
        Self {
            kind: config.lr_scheduler_type,
            base_lr: config.learning_rate,
            warmup_steps: config.warmup(total_steps),
            total_steps,
        }
    }

    /// The learning rate of the optimizer step that follows `step` finished ones: the first step of a run uses `lr_at(0)`.
    pub fn lr_at(&self, step: u64) -> f64 {
        self.base_lr * self.factor(step)
    }

    fn factor(&self, step: u64) -> f64 {
        if self.kind == ScheduleKind::Constant {
            return 1.0;
        }
        if step < self.warmup_steps {
            return step as f64 / self.warmup_steps as f64;
        }
        let after_warmup = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        match self.kind {
            ScheduleKind::Constant | ScheduleKind::ConstantWithWarmup => 1.0,
            ScheduleKind::Linear => self.total_steps.saturating_sub(step) as f64 / after_warmup,
            ScheduleKind::Cosine => {
                let progress = (step - self.warmup_steps) as f64 / after_warmup;
                (0.5 * (1.0 + (PI * progress).cos())).max(0.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `[o.param_groups[0]["lr"] ...]` of `transformers.get_scheduler(kind, o, num_warmup_steps=w, num_training_steps=t)`
    /// (5.23.0) on an optimizer with lr=2e-4, read before each `o.step(); s.step()`.
    const GOLDEN: &[(ScheduleKind, u64, u64, &[f64])] = &[
        (
            ScheduleKind::Linear,
            3,
            10,
            &[
                0.0,
                6.666666666666667e-05,
                0.00013333333333333334,
                0.0002,
                0.00017142857142857143,
                0.00014285714285714287,
                0.00011428571428571428,
                8.571428571428571e-05,
                5.714285714285714e-05,
                2.857142857142857e-05,
                0.0,
                0.0,
            ],
        ),
        (ScheduleKind::Linear, 0, 4, &[0.0002, 0.00015000000000000001, 0.0001, 5e-05, 0.0, 0.0]),
        (
            ScheduleKind::Linear,
            10,
            10,
            &[0.0, 2e-05, 4e-05, 6e-05, 8e-05, 0.0001, 0.00012, 0.00014, 0.00016, 0.00018, 0.0, 0.0],
        ),
        (
            ScheduleKind::Cosine,
            3,
            10,
            &[
                0.0,
                6.666666666666667e-05,
                0.00013333333333333334,
                0.0002,
                0.0001900968867902419,
                0.00016234898018587337,
                0.00012225209339563145,
                7.774790660436858e-05,
                3.7651019814126654e-05,
                9.903113209758096e-06,
                0.0,
                9.903113209758086e-06,
            ],
        ),
        (
            ScheduleKind::Cosine,
            0,
            5,
            &[
                0.0002,
                0.00018090169943749476,
                0.00013090169943749476,
                6.909830056250527e-05,
                1.9098300562505266e-05,
                0.0,
                1.9098300562505246e-05,
            ],
        ),
        (ScheduleKind::Cosine, 2, 2, &[0.0, 0.0001, 0.0002, 0.0]),
        (ScheduleKind::Constant, 0, 3, &[0.0002, 0.0002, 0.0002, 0.0002, 0.0002]),
        (
            ScheduleKind::ConstantWithWarmup,
            4,
            6,
            &[0.0, 5e-05, 0.0001, 0.00015000000000000001, 0.0002, 0.0002, 0.0002, 0.0002],
        ),
    ];

    #[test]
    fn equals_transformers() {
        for &(kind, warmup_steps, total_steps, expected) in GOLDEN {
            let schedule = Schedule { kind, base_lr: 2e-4, warmup_steps, total_steps };
            for (step, expected) in expected.iter().enumerate() {
                let lr = schedule.lr_at(step as u64);
                assert!(
                    (lr - expected).abs() <= 4.0 * f64::EPSILON * schedule.base_lr,
                    "{schedule:?} at {step}: {lr} {expected}"
                );
            }
        }
    }

    /// `TrainingArguments(warmup_steps=ratio).get_warmup_steps(total)` of transformers 5.23.0.
    #[test]
    fn a_ratio_is_rounded_up_as_in_transformers() {
        for (ratio, total, expected) in [(0.03, 100, 3), (0.03, 101, 4), (0.1, 7, 1), (0.5, 3, 2), (0.03, 20, 1)] {
            let config = TrainConfig { warmup_ratio: Some(ratio), ..TrainConfig::default() };
            assert_eq!(Schedule::new(&config, total).warmup_steps, expected, "{ratio} of {total}");
        }
        assert_eq!(TrainConfig::default().warmup(1000), 0);
        assert_eq!(TrainConfig { warmup_steps: Some(7), ..TrainConfig::default() }.warmup(1000), 7);
    }

    proptest! {
        #[test]
        fn stays_within_bounds_and_is_continuous_where_the_warm_up_ends(
            kind in proptest::sample::select(ScheduleKind::ALL),
            base_lr in 1e-8f64..10.0,
            warmup_steps in 0u64..500,
            after in 1u64..5000,
        ) {
            let total_steps = warmup_steps + after;
            let schedule = Schedule { kind, base_lr, warmup_steps, total_steps };
            let slope = base_lr * 1.6 / (if warmup_steps == 0 { after } else { after.min(warmup_steps) }) as f64;
            for step in 0..total_steps {
                let (lr, next) = (schedule.lr_at(step), schedule.lr_at(step + 1));
                prop_assert!((0.0..=base_lr).contains(&lr));
                prop_assert!((next - lr).abs() <= slope, "{schedule:?} jumps at {step}: {lr} {next}");
            }
            prop_assert_eq!(schedule.lr_at(warmup_steps), base_lr);
            if matches!(kind, ScheduleKind::Linear | ScheduleKind::Cosine) {
                prop_assert!(schedule.lr_at(total_steps) <= base_lr * 16.0 * f64::EPSILON);
            }
        }
    }
}
