//! `lora plan`: parameters, memory, steps and time of a run, before any weight is loaded.

use crate::estimate::{ACTIVATIONS_FORMULA, Estimate, Keeps, Memory};
use crate::fetching::{Part, prepare};
use crate::load::check_model_folder;
use crate::machine::memory;
use crate::out;
use crate::summary::PlanSummary;
use crate::train_view::TrainView;
use anyhow::Result;
use lora_torch::free_device_memory;
use lora_train::config::Checkpointing;
use lora_train::{Override, RunConfig, RunPlan, matrix_rate, operations_per_step, share_of_matrix_rate};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use tch::Device;

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
    /// The `train.recompute_layers` of it, where that is a part of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    proposed_recompute_layers: Option<u32>,
    activations_formula: &'static str,
    operations_per_step: f64,
    matmul_rate: f64,
    seconds_per_step: f64,
    seconds: f64,
}

/// What may be kept, from everything to the least, with ever more to compute again.
fn choices(layers: u32, device: Device) -> impl Iterator<Item = Keeps> {
    let some = (1..layers).map(|recompute_layers| Keeps { checkpointing: Checkpointing::Selective, recompute_layers });
    [Checkpointing::None.into(), Checkpointing::Selective.into()]
        .into_iter()
        .chain(some)
        .chain([Checkpointing::Full.into()])
        .chain((device != Device::Cpu).then_some(Checkpointing::Offload.into()))
}

/// The choice that keeps most and fits, where the one that was made does not.
fn proposal(
    mut choices: impl Iterator<Item = Keeps>,
    chosen: Keeps,
    available: u64,
    total: impl Fn(Keeps) -> u64,
) -> Option<Keeps> {
    if total(chosen) <= available {
        return None;
    }
    choices.find(|keeps| total(*keeps) <= available)
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
    let (train, layers) = (&plan.config.train, plan.model.windows.len() as u32);
    let chosen = Keeps { checkpointing: train.gradient_checkpointing, recompute_layers: train.recompute_layers };
    let estimate = Estimate::of(&plan);
    let total = |keeps| estimate.memory(keeps).total;
    let there = Checkpointing::ALL.into_iter().filter(|choice| plan.device != Device::Cpu || !choice.offloads());
    let each: Vec<_> = there.map(|choice| (choice, total(choice.into()))).collect();
    let available = match plan.device {
        Device::Cpu => memory("MemAvailable"),
        device => free_device_memory(device)?,
    };
    let choices = choices(layers, plan.device);
    let proposed = available.and_then(|available| proposal(choices, chosen, available, total));
    let memory_bytes = estimate.memory(chosen);
    let rate = matrix_rate(plan.device, if plan.device == Device::Cpu { 1024 } else { 8192 })?;
    let share = share_of_matrix_rate(plan.device);
    let seconds_per_step = operations / rate / share;
    let plan = Plan {
        summary: PlanSummary::of(&plan),
        memory_bytes,
        total_memory_bytes_with: each.iter().map(|(choice, total)| (choice.name(), *total)).collect(),
        proposed_gradient_checkpointing: proposed.map(|keeps| keeps.checkpointing.name()),
        proposed_recompute_layers: proposed.map(|keeps| keeps.recompute_layers).filter(|layers| *layers > 0),
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
        each.iter().map(|(choice, total)| format!("{} {}", choice.name(), out::bytes(*total))).collect();
    out::line(format!("         in all with train.gradient_checkpointing: {}", totals.join(", ")))?;
    match proposed {
        Some(Keeps { checkpointing, recompute_layers }) => {
            let layers = match recompute_layers {
                0 => String::new(),
                some => format!(" and train.recompute_layers = {some}"),
            };
            out::line(format!(
                "         that is more than is available here; with train.gradient_checkpointing = \"{}\"{layers} it fits",
                checkpointing.name()
            ))?;
        }
        None if chosen == Checkpointing::None.into() => {
            out::line("         selective computes no product twice; full, half of all that the step has without it")?;
        }
        None => {}
    }
    out::line(format!(
        "compute  {:.2e} operations a step; matrix products here run at {:.1e} a second",
        operations, rate
    ))?;
    out::line(format!(
        "time     about {} a step, {} in all, if a step reaches {share} of that rate",
        out::seconds(plan.seconds_per_step),
        out::seconds(plan.seconds)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_and_keeps_most_is_proposed_where_the_choice_does_not_fit() {
        // Three blocks; each that is computed again keeps one less.
        let total = |keeps: Keeps| match keeps.checkpointing {
            Checkpointing::None => 30,
            Checkpointing::Selective => 20 - u64::from(keeps.recompute_layers),
            Checkpointing::Full => 10,
            Checkpointing::Offload => 8,
        };
        let proposed_on = |device, chosen: Checkpointing, available| {
            proposal(choices(3, device), chosen.into(), available, total).map(|k| (k.checkpointing, k.recompute_layers))
        };
        let proposed = |chosen, available| proposed_on(Device::Cpu, chosen, available);
        assert_eq!(proposed_on(Device::Cuda(0), Checkpointing::None, 9), Some((Checkpointing::Offload, 0)));
        assert_eq!(proposed(Checkpointing::None, 30), None);
        assert_eq!(proposed(Checkpointing::None, 29), Some((Checkpointing::Selective, 0)));
        assert_eq!(proposed(Checkpointing::Selective, 19), Some((Checkpointing::Selective, 1)));
        assert_eq!(proposed(Checkpointing::None, 18), Some((Checkpointing::Selective, 2)));
        assert_eq!(proposed(Checkpointing::Selective, 17), Some((Checkpointing::Full, 0)));
        assert_eq!(proposed(Checkpointing::Full, 9), None);
    }
}
