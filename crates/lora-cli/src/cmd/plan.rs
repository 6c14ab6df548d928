//! `lora plan`: parameters, memory, steps and time of a run, before any weight is loaded.

use crate::estimate::{ACTIVATIONS_FORMULA, Memory, memory};
use crate::fetching::{Part, prepare};
use crate::load::check_model_folder;
use crate::out;
use crate::summary::PlanSummary;
use crate::train_view::TrainView;
use anyhow::Result;
use lora_train::{Override, RunConfig, RunPlan, matrix_rate, operations_per_step};
use serde::Serialize;
use std::path::PathBuf;
use tch::Device;

/// A step reaches about this share of the machine's rate of matrix products.
const SHARE_OF_RATE: f64 = 0.6;

/// The flags of `lora plan`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Configuration: TOML, or YAML by extension
    config: PathBuf,
    /// Set any key of the configuration, as train.learning_rate=1e-4
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print the plan as JSON
    #[arg(long)]
    json: bool,
}

/// The whole plan.
#[derive(Debug, Serialize)]
struct Plan {
    #[serde(flatten)]
    summary: PlanSummary,
    memory_bytes: Memory,
    activations_formula: &'static str,
    operations_per_step: f64,
    matmul_rate: f64,
    seconds_per_step: f64,
    seconds: f64,
}

/// Runs the verb.
///
/// # Errors
/// Every fault of the configuration and the data.
pub(crate) fn run(args: &Args) -> Result<()> {
    let overrides = args.set.iter().map(|s| s.parse()).collect::<Result<Vec<Override>, _>>()?;
    let mut config = RunConfig::load(Some(&args.config), &overrides)?;
    check_model_folder(&prepare(&mut config, Part::Whole, false)?)?;
    let plan = RunPlan::resolve(config, &mut TrainView::new(false))?;
    let operations = operations_per_step(&plan);
    // Before the products that the rate is measured with take memory of their own.
    let memory_bytes = memory(&plan);
    let rate = matrix_rate(plan.device, if plan.device == Device::Cpu { 1024 } else { 8192 })?;
    let seconds_per_step = operations / rate / SHARE_OF_RATE;
    let plan = Plan {
        summary: PlanSummary::of(&plan),
        memory_bytes,
        activations_formula: ACTIVATIONS_FORMULA,
        operations_per_step: operations,
        matmul_rate: rate,
        seconds_per_step,
        seconds: seconds_per_step * plan.total_steps as f64,
    };
    if args.json {
        return out::json(&plan);
    }
    let m = plan.memory_bytes;
    out::line(plan.summary.to_string())?;
    out::line(format!("memory   {} in all, about:", out::bytes(m.total)))?;
    out::line(format!(
        "         program {}, weights {}, trained with gradients and moments {}",
        out::bytes(m.program),
        out::bytes(m.weights),
        out::bytes(m.trained)
    ))?;
    out::line(format!(
        "         activations of the largest batch {}, logits {}",
        out::bytes(m.activations),
        out::bytes(m.logits)
    ))?;
    out::line(format!("         activations = {ACTIVATIONS_FORMULA}"))?;
    out::line(format!(
        "compute  {:.2e} operations a step; matrix products here run at {:.1e} a second",
        operations, rate
    ))?;
    out::line(format!(
        "time     about {} a step, {} in all, if a step reaches {SHARE_OF_RATE} of that rate",
        out::seconds(plan.seconds_per_step),
        out::seconds(plan.seconds)
    ))
}
