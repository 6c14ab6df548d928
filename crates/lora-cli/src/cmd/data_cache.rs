//! `lora data cache`: the files in which tokens are kept between runs.

use crate::failure::usage;
use crate::hub::token_folder;
use crate::out;
use anyhow::{Context, Result};
use lora_data::TokenCache;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

/// The flags of `lora data cache`.
#[derive(Debug, clap::Args)]
pub(crate) struct CacheArgs {
    /// The folder, where it is not the usual one
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Remove all of them
    #[arg(long)]
    clear: bool,
    /// Remove those that no run opened for so many days
    #[arg(long, value_name = "DAYS", conflicts_with = "clear")]
    unused: Option<u32>,
}

const DAY: u64 = 86_400;

/// Runs the verb.
///
/// # Errors
/// When no folder is known, or it cannot be read, or a file cannot be removed.
pub(crate) fn run(args: &CacheArgs) -> Result<()> {
    let folder = args.dir.clone().or_else(token_folder);
    let folder = folder.ok_or_else(|| usage("neither XDG_CACHE_HOME nor HOME is set; name the folder by --dir"))?;
    let (cache, now) = (TokenCache::new(&folder), SystemTime::now());
    let days = if args.clear { Some(0) } else { args.unused };
    if let Some(days) = days {
        let limit =
            now.checked_sub(Duration::from_secs(u64::from(days) * DAY)).context("so long ago there was no time")?;
        let bytes = cache.remove_unused_since(limit)?;
        return out::line(format!("{:.1} MiB removed from {}", mib(bytes), folder.display()));
    }
    let entries = cache.entries()?;
    for entry in &entries {
        let age = now.duration_since(entry.used).map_or(0, |age| age.as_secs() / DAY);
        let state = if entry.unfinished { "not finished" } else { "" };
        let line = format!("{:>10.1} MiB  {age:>3} days  {}  {state}", mib(entry.bytes), entry.path.display());
        out::line(line.trim_end())?;
    }
    let bytes = entries.iter().map(|entry| entry.bytes).sum();
    out::line(format!("{} files, {:.1} MiB in {}", entries.len(), mib(bytes), folder.display()))
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
