//! `lora extract`: what full fine-tuning changed, as an adapter.

use crate::load::{check_model_folder, check_new_folder};
use crate::out;
use crate::progress::CountBar;
use anyhow::Result;
use lora_export::extract;
use std::path::PathBuf;

/// The flags of `lora extract`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the base model
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Folder of the model that was fine-tuned from it
    #[arg(long, value_name = "DIR")]
    pub(crate) tuned: PathBuf,
    /// Rank of the adapter
    #[arg(long, value_name = "R", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    rank: u16,
    /// Folder to write, new or empty
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
}

/// Runs the verb.
///
/// # Errors
/// Models that do not belong together, and an output that is taken.
pub(crate) fn run(args: &Args) -> Result<()> {
    check_model_folder(&args.model)?;
    check_model_folder(&args.tuned)?;
    check_new_folder(&args.output)?;
    let shown = args.output.display();
    let mut bar = CountBar::new("comparing");
    let report = extract(&args.model, &args.tuned, args.rank.into(), &args.output, &mut |done, of| bar.set(done, of));
    bar.finish();
    let report = report?;
    out::line(format!("{shown}: rank {} for {} linear layers", args.rank, report.modules))?;
    if !report.saved.is_empty() {
        out::line(format!(
            "{} modules that differ are saved in full: {}",
            report.saved.len(),
            report.saved.join(", ")
        ))?;
    }
    let (worst, module) = &report.worst;
    out::line(format!("off the difference by {:.2e} of it; at most {worst:.2e}, in {module}", report.error))
}
