//! `lora plan`: parameters, memory, steps and time of a run, before any weight is loaded.

use crate::estimate::{ACTIVATIONS_FORMULA, Memory, memory_of};
use crate::fetching::{Part, prepare};
use crate::load::check_model_folder;
use crate::machine::memory;
use crate::out;
use crate::summary::PlanSummary;
use crate::train_view::TrainView;
use anyhow::Result;
use lora_train::config::Checkpointing;
use lora_train::{Override, RunConfig, RunPlan, matrix_rate, operations_per_step};
use serde::Serialize;
use std::collections::BTreeMap;
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
    /// The total with each choice of `train.gradient_checkpointing`.
    total_memory_bytes_with: BTreeMap<&'static str, u64>,
    /// The choice that is proposed where the run does not fit into what this machine has available.
    #[serde(skip_serializing_if = "Option::is_none")]
    proposed_gradient_checkpointing: Option<&'static str>,
    activations_formula: &'static str,
    operations_per_step: f64,
    matmul_rate: f64,
    seconds_per_step: f64,
    seconds: f64,
}

/// The choice that keeps most and fits, where the one that was made does not.
fn proposal(each: &[(Checkpointing, Memory)], chosen: Checkpointing, available: Option<u64>) -> Option<Checkpointing> {
    let available = available?;
    let fits = |choice: Checkpointing| each.iter().any(|(c, memory)| *c == choice && memory.total <= available);
    let other = each.iter().map(|(choice, _)| *choice).find(|choice| fits(*choice))?;
    (!fits(chosen)).then_some(other)
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
    let each = Checkpointing::ALL.map(|choice| (choice, memory_of(&plan, choice)));
    let chosen = plan.config.train.gradient_checkpointing;
    let proposed = proposal(&each, chosen, memory("MemAvailable").filter(|_| plan.device == Device::Cpu));
    let memory_bytes = memory_of(&plan, chosen);
    let rate = matrix_rate(plan.device, if plan.device == Device::Cpu { 1024 } else { 8192 })?;
    let seconds_per_step = operations / rate / SHARE_OF_RATE;
    let plan = Plan {
        summary: PlanSummary::of(&plan),
        memory_bytes,
        total_memory_bytes_with: each.iter().map(|(choice, memory)| (choice.name(), memory.total)).collect(),
        proposed_gradient_checkpointing: proposed.map(Checkpointing::name),
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
    let totals: Vec<String> =
        each.iter().map(|(choice, memory)| format!("{} {}", choice.name(), out::bytes(memory.total))).collect();
    out::line(format!("         in all with train.gradient_checkpointing: {}", totals.join(", ")))?;
    match proposed {
        Some(choice) => out::line(format!(
            "         that is more than is available here; with train.gradient_checkpointing = \"{}\" it fits",
            choice.name()
        ))?,
        None if chosen == Checkpointing::None => {
            out::line("         selective computes no product twice; full, half of all that the step has without it")?;
        }
        None => {}
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_and_keeps_most_is_proposed_where_the_choice_does_not_fit() {
        let of = |total| Memory { program: 0, weights: 0, trained: 0, activations: 0, logits: 0, total };
        let each = [(Checkpointing::None, of(30)), (Checkpointing::Selective, of(20)), (Checkpointing::Full, of(10))];
        let proposed = |chosen, available| proposal(&each, chosen, available);
        assert_eq!(proposed(Checkpointing::None, Some(30)), None);
        assert_eq!(proposed(Checkpointing::None, Some(29)), Some(Checkpointing::Selective));
        assert_eq!(proposed(Checkpointing::Selective, Some(19)), Some(Checkpointing::Full));
        assert_eq!(proposed(Checkpointing::Full, Some(9)), None);
        assert_eq!(proposed(Checkpointing::None, None), None);
    }
}
