//! `lora mix`: several adapters made into one, or one into another rank.

use crate::failure::usage;
use crate::load::{check_mix, check_model_folder, check_new_folder};
use crate::out;
use anyhow::Result;
use lora_export::{Combination, MajoritySign, MixOptions};
use lora_export::{Weighted, mix_adapters};
use serde::Serialize;
use std::path::PathBuf;

/// The flags of `lora mix`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of an adapter; give it several times, with a --weight for each
    #[arg(long, value_name = "DIR", required = true)]
    pub(crate) adapter: Vec<PathBuf>,
    /// What the change of the adapter in the same place is multiplied by; 1 for all when absent
    #[arg(long, value_name = "W", allow_hyphen_values = true)]
    weight: Vec<f64>,
    /// How they are put together: cat is the exact sum, svd the exact sum cut to a rank, the others are PEFT's rules
    #[arg(long = "type", value_name = "TYPE", default_value = "cat", value_parser = combination_names())]
    combination: String,
    /// Folder to write, new or empty
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Rank of the result for svd and the types that end in svd; the largest of the adapters when absent
    #[arg(long, value_name = "R")]
    rank: Option<i64>,
    /// Share of the entries that ties, dare and magnitude_prune keep
    #[arg(long, value_name = "D", default_value_t = 0.5)]
    density: f64,
    /// Which sign prevails in ties: that of the sum, or that of the greater number
    #[arg(long, value_name = "METHOD", default_value = "total", value_parser = ["total", "frequency"])]
    majority_sign_method: String,
    /// Where dare draws from
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Folder of the base model, which is needed for DoRA and for PiSSA and OLoRA that were not converted
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn combination_names() -> Vec<&'static str> {
    Combination::ALL.iter().map(|(name, _)| *name).collect()
}

#[derive(Serialize)]
struct Report<'a> {
    output: String,
    r#type: &'a str,
    rank: i64,
    modules: usize,
    bytes: u64,
    error: f64,
    worst_error: f64,
    worst_module: &'a str,
}

/// Runs the verb.
///
/// # Errors
/// Flags or adapters that do not fit each other.
pub(crate) fn run(args: &Args) -> Result<()> {
    let shown = args.output.display();
    check_new_folder(&args.output)?;
    check_mix(args.adapter.len(), &args.weight)?;
    if !(args.density > 0.0 && args.density <= 1.0) {
        return Err(usage(format!("--density {}: must be above 0 and at most 1", args.density)));
    }
    let found = Combination::ALL.iter().find(|(name, _)| *name == args.combination);
    let Some(&(name, combination)) = found else { return Err(usage(format!("--type {}", args.combination))) };
    if args.rank.is_some() && !combination.cuts() {
        let what = if combination == Combination::Cat { "the sum of the ranks" } else { "that of the adapters" };
        return Err(usage(format!("--rank: the rank of {name} is {what}; use svd to choose another")));
    }
    if let Some(model) = &args.model {
        check_model_folder(model)?;
    }
    let weights = args.weight.iter().copied().chain(std::iter::repeat(1.0));
    let adapters: Vec<Weighted> = args
        .adapter
        .iter()
        .zip(weights)
        .map(|(adapter, weight)| Weighted { adapter: adapter.clone(), weight })
        .collect();
    let majority = match args.majority_sign_method.as_str() {
        "frequency" => MajoritySign::Frequency,
        _ => MajoritySign::Total,
    };
    let options = MixOptions { combination, rank: args.rank, density: args.density, majority, seed: args.seed };
    let report = mix_adapters(&adapters, args.model.as_deref(), &options, &args.output)?;
    if args.json {
        return out::json(&Report {
            output: shown.to_string(),
            r#type: name,
            rank: report.rank,
            modules: report.modules,
            bytes: report.bytes,
            error: report.error,
            worst_error: report.worst.0,
            worst_module: &report.worst.1,
        });
    }
    out::line(format!(
        "{shown}: {name} of {} adapter{}, rank {}, {} modules, {}",
        adapters.len(),
        if adapters.len() == 1 { "" } else { "s" },
        report.rank,
        report.modules,
        out::bytes(report.bytes)
    ))?;
    out::line(format!(
        "off the exact weighted sum by {:.2e} of it; at most {:.2e}, in {}",
        report.error, report.worst.0, report.worst.1
    ))
}
