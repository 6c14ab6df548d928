//! `lora inspect`: what a folder or file holds.

mod adapter;
mod checkpoint;
mod run;
mod tensors;

use crate::failure::usage;
use anyhow::Result;
use lora_format::ADAPTER_CONFIG;
use lora_train::METRICS_FILE;
use lora_train::checkpoint::CHECKPOINTS_DIR;
use std::path::PathBuf;

/// The flags of `lora inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// An adapter, a checkpoint, a run's folder, or a safetensors file
    path: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
///
/// # Errors
/// A path that is none of these, or what is wrong with it.
pub(crate) fn run(args: &Args) -> Result<()> {
    let path = args.path.as_path();
    if path.is_file() {
        return tensors::show(path, args.json);
    }
    if path.join(CHECKPOINTS_DIR).is_dir() || path.join(METRICS_FILE).is_file() {
        return run::show(path, args.json);
    }
    if path.join(ADAPTER_CONFIG).is_file() {
        return adapter::show(path, args.json);
    }
    if path.join("config.json").is_file() {
        return checkpoint::show(path, args.json);
    }
    let what = if path.exists() {
        "holds neither adapter_config.json, config.json nor metrics.jsonl"
    } else {
        "there is no such file or folder"
    };
    Err(usage(format!(
        "{}: {what}; give an adapter, a checkpoint, a run's folder or a safetensors file",
        path.display()
    )))
}
