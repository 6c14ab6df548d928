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
        /// As `cosine`, several times from the top (`num_cycles`).
        CosineWithRestarts = "cosine_with_restarts",
        /// As `cosine`, down to a least rate (`min_lr` or `min_lr_rate`).
        CosineWithMinLr = "cosine_with_min_lr",
        /// Rises in the warm-up and falls along a power of what is left (`power`) to `lr_end`.
        Polynomial = "polynomial",
        /// Rises in the warm-up and falls with one over the root of the steps (`timescale`).
        InverseSqrt = "inverse_sqrt",
        /// Rises in the warm-up, stays, and falls along half a cosine wave in the last steps (`num_decay_steps`).
        WarmupStableDecay = "warmup_stable_decay",
    }
}

impl ScheduleKind {
    /// The keys of `lr_scheduler_kwargs` that say something to it.
    pub fn options(self) -> &'static [&'static str] {
        match self {
            Self::Constant | Self::Linear | Self::Cosine | Self::ConstantWithWarmup => &[],
            Self::CosineWithRestarts => &["num_cycles"],
            Self::CosineWithMinLr => &["min_lr", "min_lr_rate"],
            Self::Polynomial => &["power", "lr_end"],
            Self::InverseSqrt => &["timescale"],
            Self::WarmupStableDecay => &["num_decay_steps", "min_lr_ratio"],
        }
    }
}

/// What some schedules are told besides; each has transformers' name for it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScheduleOptions {
    /// Times that a cosine begins anew.
    pub num_cycles: f64,
    /// The power of a polynomial.
    pub power: f64,
    /// The least learning rate, as a part of the highest.
    pub least: f64,
    /// Steps after which one over the root has halved four times; the warm-up's where it has one, else 10,000.
    pub timescale: f64,
    /// The last steps, in which the rate falls.
    pub num_decay_steps: f64,
}

impl ScheduleOptions {
    /// Those of a configuration. The decay of `warmup_stable_decay` has a tenth of the steps, rounded up, where nothing is
    /// said; transformers has no default for it.
    fn of(config: &TrainConfig, warmup_steps: u64, total_steps: u64) -> Self {
        let option = |key: &str| {
            let value = config.lr_scheduler_kwargs.get(key)?;
            value.as_float().or_else(|| value.as_integer().map(|i| i as f64))
        };
        let absolute = |key: &str| option(key).map(|lr| lr / config.learning_rate);
        let least = match config.lr_scheduler_type {
            ScheduleKind::Polynomial => Some(absolute("lr_end").unwrap_or(1e-7 / config.learning_rate)),
            _ => option("min_lr_rate").or(option("min_lr_ratio")).or_else(|| absolute("min_lr")),
        };
        let warmup = if warmup_steps > 0 { warmup_steps as f64 } else { 10_000.0 };
        Self {
            num_cycles: option("num_cycles").unwrap_or(1.0),
            power: option("power").unwrap_or(1.0),
            least: least.unwrap_or(0.0),
            timescale: option("timescale").filter(|t| *t > 0.0).unwrap_or(warmup),
            num_decay_steps: option("num_decay_steps").unwrap_or((total_steps as f64 / 10.0).ceil()),
        }
    }
}

/// A schedule of the learning rate. The values are those of `get_scheduler` of transformers.
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
    /// What some kinds are told besides.
    pub options: ScheduleOptions,
}

impl Schedule {
    /// The schedule of a configuration for a run of so many optimizer steps.
    pub fn new(config: &TrainConfig, total_steps: u64) -> Self {
        let warmup_steps = config.warmup(total_steps);
        Self {
            kind: config.lr_scheduler_type,
            base_lr: config.learning_rate,
            warmup_steps,
            total_steps,
            options: ScheduleOptions::of(config, warmup_steps, total_steps),
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
        let (o, done) = (&self.options, (step - self.warmup_steps) as f64);
        let progress = done / after_warmup;
        let wave = |progress: f64| (0.5 * (1.0 + (PI * progress).cos())).max(0.0);
        match self.kind {
            ScheduleKind::Constant | ScheduleKind::ConstantWithWarmup => 1.0,
            ScheduleKind::Linear => self.total_steps.saturating_sub(step) as f64 / after_warmup,
            ScheduleKind::Cosine => wave(progress),
            ScheduleKind::CosineWithMinLr => wave(progress) * (1.0 - o.least) + o.least,
            ScheduleKind::CosineWithRestarts if progress >= 1.0 => 0.0,
            ScheduleKind::CosineWithRestarts => wave((o.num_cycles * progress).fract()),
            ScheduleKind::Polynomial => (1.0 - o.least) * (1.0 - progress).max(0.0).powf(o.power) + o.least,
            ScheduleKind::InverseSqrt => {
                // By transformers' shift, the rate is the highest where the warm-up ends.
                let shift = o.timescale - self.warmup_steps as f64;
                (((step as f64 + shift) / o.timescale).sqrt()).recip()
            }
            ScheduleKind::WarmupStableDecay => {
                let decay = done - (after_warmup - o.num_decay_steps).max(0.0);
                let falling = (decay / o.num_decay_steps.min(after_warmup).max(1.0)).clamp(0.0, 1.0);
                wave(falling) * (1.0 - o.least) + o.least
            }
        }
    }
}

#[cfg(test)]
mod tests;
