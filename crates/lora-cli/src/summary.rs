//! A run in figures, before it starts.

use crate::out::{bytes, count};
use lora_torch::{device_name, kind_name, num_threads};
use lora_train::{RunPlan, Trained};
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;

/// What will be trained, on what, and how long.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PlanSummary {
    pub(crate) model: ModelFigures,
    pub(crate) trained: TrainedFigures,
    pub(crate) data: DataFigures,
    pub(crate) steps: StepFigures,
    pub(crate) output_dir: PathBuf,
}

/// The base model.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ModelFigures {
    pub(crate) path: PathBuf,
    pub(crate) family: String,
    pub(crate) layers: i64,
    pub(crate) parameters: i64,
    pub(crate) dtype: &'static str,
    pub(crate) device: String,
    pub(crate) threads: usize,
}

/// What has a gradient.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct TrainedFigures {
    pub(crate) what: String,
    pub(crate) parameters: i64,
    pub(crate) share: f64,
}

/// The data.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct DataFigures {
    pub(crate) examples: usize,
    pub(crate) eval_examples: usize,
    pub(crate) tokens: usize,
    pub(crate) trained_tokens: usize,
    pub(crate) longest: usize,
    pub(crate) truncated: usize,
    pub(crate) dropped: usize,
    pub(crate) duplicates: usize,
    pub(crate) rows: usize,
    pub(crate) packing: bool,
}

/// The steps.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct StepFigures {
    pub(crate) total: u64,
    pub(crate) per_epoch: u64,
    pub(crate) rows_per_batch: u32,
    pub(crate) batches_per_step: u32,
    pub(crate) learning_rate: f64,
    pub(crate) schedule: String,
    pub(crate) gradient_checkpointing: bool,
}

impl PlanSummary {
    /// The figures of a plan.
    pub(crate) fn of(plan: &RunPlan) -> Self {
        let (config, model) = (&plan.config, &plan.model);
        let (base, trained) = (plan.base_parameters(), plan.trained_parameters());
        let what = match &plan.trained {
            Trained::Fresh(p) => format!(
                "r = {}, lora_alpha = {}, {} modules",
                config.lora.r,
                config.lora.lora_alpha,
                p.adapters.len() + p.saved.len() + p.stacked.len() + usize::from(p.tokens.is_some())
            ),
            Trained::Existing(folder) => format!("an existing adapter, {} modules", folder.modules.len()),
            Trained::Everything => "every weight".to_string(),
        };
        Self {
            model: ModelFigures {
                path: plan.model_dir.clone(),
                family: model.family.clone(),
                layers: model.num_hidden_layers,
                parameters: base,
                dtype: kind_name(plan.kind),
                device: device_name(plan.device),
                threads: num_threads(),
            },
            trained: TrainedFigures { what, parameters: trained, share: trained as f64 / base as f64 },
            data: DataFigures {
                examples: plan.train.len(),
                eval_examples: plan.eval.len(),
                tokens: plan.train.iter().map(|e| e.input_ids.len()).sum(),
                trained_tokens: plan.train.iter().map(|e| e.trained.iter().filter(|t| **t).count()).sum(),
                longest: plan.train.iter().map(|e| e.input_ids.len()).max().unwrap_or(0),
                truncated: plan.train_report.truncated,
                dropped: plan.train_report.dropped.values().map(|d| d.count).sum(),
                duplicates: plan.train_report.duplicates,
                rows: plan.rows.len(),
                packing: config.data.packing,
            },
            steps: StepFigures {
                total: plan.total_steps,
                per_epoch: plan.steps_per_epoch,
                rows_per_batch: config.train.per_device_train_batch_size,
                batches_per_step: config.train.gradient_accumulation_steps,
                learning_rate: config.train.learning_rate,
                schedule: config.train.lr_scheduler_type.name().to_string(),
                gradient_checkpointing: config.train.gradient_checkpointing,
            },
            output_dir: config.output_dir.clone(),
        }
    }
}

impl fmt::Display for PlanSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = |x: usize| count(x as u64);
        let p = |x: i64| count(x.unsigned_abs());
        let (m, t, d, s) = (&self.model, &self.trained, &self.data, &self.steps);
        writeln!(
            f,
            "model    {}  {}, {} layers, {} parameters",
            m.path.display(),
            m.family,
            m.layers,
            p(m.parameters)
        )?;
        writeln!(f, "         {} on {}, {} threads", m.dtype, m.device, m.threads)?;
        writeln!(f, "trained  {} parameters ({:.3} %): {}", p(t.parameters), 100.0 * t.share, t.what)?;
        writeln!(
            f,
            "data     {} examples, {} tokens ({} trained), longest {}; {} held out",
            n(d.examples),
            n(d.tokens),
            n(d.trained_tokens),
            n(d.longest),
            n(d.eval_examples)
        )?;
        if d.truncated + d.dropped + d.duplicates > 0 {
            writeln!(
                f,
                "         {} truncated, {} dropped, {} duplicates",
                n(d.truncated),
                n(d.dropped),
                n(d.duplicates)
            )?;
        }
        let rows = if d.packing { "packed rows" } else { "rows" };
        writeln!(
            f,
            "steps    {} of {} x {} {rows}; {} a pass over {} {rows}",
            count(s.total),
            s.batches_per_step,
            s.rows_per_batch,
            count(s.per_epoch),
            n(d.rows)
        )?;
        writeln!(f, "         learning rate {:e}, {}", s.learning_rate, s.schedule)?;
        write!(f, "output   {}", self.output_dir.display())
    }
}

/// The size of a file for reading, or a dash.
pub(crate) fn file_size(path: &std::path::Path) -> String {
    std::fs::metadata(path).map_or_else(|_| "-".into(), |m| bytes(m.len()))
}
