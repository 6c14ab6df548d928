//! `lora repair`: an adapter whose tensors another tool named otherwise, under PEFT's names.

use crate::failure::usage;
use crate::load::{check_model_folder, check_new_folder};
use crate::out;
use anyhow::Result;
use lora_export::{Repair, repair_adapter};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The flags of `lora repair`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the adapter; it stays as it is
    #[arg(value_name = "ADAPTER")]
    pub(crate) adapter: PathBuf,
    /// Folder to write, new or empty
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Folder of the base model, which decides where modules are that classes of one model place differently
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Say what would be done, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Print JSON, with every tensor
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
///
/// # Errors
/// Names that no known history explains, or that could be several.
pub(crate) fn run(args: &Args) -> Result<()> {
    if !args.adapter.is_dir() {
        return Err(usage(format!("{}: is no folder; give the folder of an adapter", args.adapter.display())));
    }
    if let Some(model) = &args.model {
        check_model_folder(model)?;
    }
    let output = args.output.as_deref().filter(|_| !args.dry_run);
    output.map(check_new_folder).transpose()?;
    let repair = repair_adapter(&args.adapter, args.model.as_deref(), output)?;
    let written = output.filter(|_| repair.is_needed());
    if args.json {
        let renamed = |r: &lora_export::Renamed| {
            let rules: Vec<String> = r.rules.iter().map(ToString::to_string).collect();
            json!({"from": r.from, "to": r.to, "rules": rules})
        };
        return out::json(&json!({
            "output": written.map(|path| path.display().to_string()),
            "tensors": repair.tensors,
            "renamed": repair.renamed.iter().map(renamed).collect::<Vec<_>>(),
            "alphas": repair.alphas,
            "target_modules": repair.targets,
        }));
    }
    tell(&repair)?;
    match written {
        Some(path) => out::line(format!("{}: {} tensors, read back", path.display(), repair.tensors)),
        None if repair.is_needed() => out::line("nothing is written (--dry-run)"),
        None => out::line(format!("{}: needs no repair; nothing is written", args.adapter.display())),
    }
}

/// Each rule, how often it was needed, and a tensor to which it was applied.
fn tell(repair: &Repair) -> Result<()> {
    let mut rules: BTreeMap<String, (usize, &str, &str)> = BTreeMap::new();
    for renamed in &repair.renamed {
        for rule in &renamed.rules {
            rules.entry(rule.to_string()).or_insert((0, &renamed.from, &renamed.to)).0 += 1;
        }
    }
    for (rule, (count, from, to)) in &rules {
        out::line(format!("{count} tensors: {rule}"))?;
        out::line(format!("    {from}\n    {to}"))?;
    }
    if !repair.alphas.is_empty() {
        out::line(format!("{} alphas left out: the configuration says the same", repair.alphas.len()))?;
    }
    if let Some(targets) = &repair.targets {
        out::line(format!("target_modules: {}", targets.join(", ")))?;
    }
    Ok(())
}
