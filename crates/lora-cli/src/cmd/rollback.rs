//! `lora rollback`: an earlier version counts again.

use crate::out;
use anyhow::Result;
use lora_train::{Versions, version_name};
use std::path::PathBuf;

/// The flags of `lora rollback`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the watch (output_dir)
    #[arg(value_name = "OUT")]
    dir: PathBuf,
    /// The version; the one that the present one was trained from when absent
    #[arg(long, value_name = "N")]
    to: Option<u64>,
}

/// Runs the verb.
///
/// # Errors
/// No such version.
pub(crate) fn run(args: &Args) -> Result<()> {
    let (before, now) = Versions::new(&args.dir).rollback(args.to)?;
    let before = before.map_or("none".to_string(), version_name);
    out::line(format!("{}/current is version {} now; it was {before}", args.dir.display(), version_name(now)))
}
