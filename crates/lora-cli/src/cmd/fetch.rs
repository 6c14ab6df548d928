//! `lora fetch`: a model or a dataset of the hub into the cache, as it stands there now.

use crate::fetching::newest;
use crate::out;
use anyhow::Result;
use lora_data::HubId;
use lora_hub::RepoKind;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// The flags of `lora fetch`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// hf://OWNER/NAME, with @REVISION and, in a dataset, /PATH behind it where wanted
    #[arg(value_name = "HUB")]
    what: String,
    /// It is a model or an adapter, as it is when nothing is said
    #[arg(long, conflicts_with = "dataset")]
    model: bool,
    /// It is a dataset
    #[arg(long)]
    dataset: bool,
    /// Take the files of one split of the dataset only
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    split: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    folder: PathBuf,
    commit: String,
    files: usize,
    bytes: u64,
}

/// Runs the verb.
///
/// # Errors
/// What is not there and cannot be had.
pub(crate) fn run(args: &Args) -> Result<()> {
    let named = args.what.strip_prefix("hf://").unwrap_or(&args.what);
    let is_dataset = args.dataset || args.split.is_some() || (!args.model && named.starts_with("datasets/"));
    let found = if is_dataset {
        let hub = HubId::parse(Path::new(&format!("hf://{named}")))?;
        newest(RepoKind::Dataset, &hub, args.split.as_deref())?
    } else {
        newest(RepoKind::Model, &HubId::parse_model(&format!("hf://{named}"))?, None)?
    };
    let report = Report { folder: found.folder, commit: found.commit, files: found.files, bytes: found.bytes };
    if args.json {
        return out::json(&report);
    }
    if report.files == 0 {
        out::note(format!("all of it was there, at commit {}", report.commit));
    }
    out::line(report.folder.display().to_string())
}
