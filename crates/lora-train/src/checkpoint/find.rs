//! Finding the checkpoint to go on from.

use super::manifest::Manifest;
use super::save::verify_checkpoint;
use super::{CHECKPOINTS_DIR, Damage, QUARANTINE_PREFIX, REASON_SUFFIX, list, names, rename, sweep, sync};
use crate::error::{Error, Result};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The checkpoint to go on from.
#[derive(Debug)]
pub struct Found {
    /// Its folder.
    pub dir: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
    /// Newer ones that were damaged, where they were moved to, and what is wrong with them.
    pub quarantined: Vec<(PathBuf, String)>,
}

/// Finds the newest checkpoint of a run's folder that is whole, by step and never by time; `None` when there was never one.
/// Every byte of it is checked. Damaged ones are moved to `quarantine-step-N`, with the reason in a file beside. The caller
/// holds the [`RunLock`](crate::RunLock) of the folder.
///
/// # Errors
/// [`Error::NoGoodCheckpoint`] when there are checkpoints, now or in quarantine, and none is whole: a run never starts from
/// the beginning unasked. [`Error::CheckpointTooNew`] when a newer version wrote one; [`Error::Io`] when one cannot be read.
pub fn find_checkpoint(run_dir: &Path) -> Result<Option<Found>> {
    let checkpoints = run_dir.join(CHECKPOINTS_DIR);
    sweep(&checkpoints)?;
    let earlier = quarantined_earlier(&checkpoints)?;
    let mut quarantined = Vec::new();
    for (_, dir) in list(&checkpoints)? {
        match verify_checkpoint(&dir) {
            Ok(manifest) => return Ok(Some(Found { dir, manifest, quarantined })),
            Err(Error::CheckpointDamaged { damage, .. }) => {
                quarantined.push((quarantine(&checkpoints, &dir, &damage)?, damage.to_string()));
            }
            Err(e) => return Err(e),
        }
    }
    quarantined.extend(earlier);
    if quarantined.is_empty() {
        return Ok(None);
    }
    Err(Error::NoGoodCheckpoint { path: checkpoints, reasons: quarantined })
}

/// The newest checkpoint of a run's folder that is whole, told without moving anything; `None` when there is none or the
/// folder cannot be read.
pub fn newest_whole(run_dir: &Path) -> Option<PathBuf> {
    let all = list(&run_dir.join(CHECKPOINTS_DIR)).unwrap_or_default();
    all.into_iter().map(|(_, dir)| dir).find(|dir| verify_checkpoint(dir).is_ok())
}

/// Moves a damaged checkpoint out of the way, with the reason beside it.
pub(super) fn quarantine(checkpoints: &Path, dir: &Path, damage: &Damage) -> Result<PathBuf> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let taken = names(checkpoints)?;
    let free = (1..).map(|i| match i {
        1 => format!("{QUARANTINE_PREFIX}{name}"),
        i => format!("{QUARANTINE_PREFIX}{name}-{i}"),
    });
    let Some(free) = free.into_iter().find(|free| !taken.contains(free)) else { return Ok(dir.to_path_buf()) };
    let target = checkpoints.join(&free);
    rename(dir, &target)?;
    let reason = checkpoints.join(format!("{free}{REASON_SUFFIX}"));
    let written = fs::File::create(&reason).and_then(|mut file| {
        writeln!(file, "{damage}")?;
        file.sync_all()
    });
    written.map_err(Error::io("write", &reason))?;
    sync(checkpoints)?;
    Ok(target)
}

fn quarantined_earlier(checkpoints: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut found: Vec<String> = names(checkpoints)?;
    found.retain(|name| name.starts_with(QUARANTINE_PREFIX) && !name.ends_with(REASON_SUFFIX));
    found.sort();
    let reason = |name: &str| {
        let text = fs::read_to_string(checkpoints.join(format!("{name}{REASON_SUFFIX}")));
        text.map_or_else(|_| "damaged, for a reason that was not noted".to_string(), |text| text.trim().to_string())
    };
    Ok(found.into_iter().map(|name| (checkpoints.join(&name), reason(&name))).collect())
}
