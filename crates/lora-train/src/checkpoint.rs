//! Checkpoints that survive a crash at any moment.
//!
//! A run's folder holds `checkpoints/step-N/` for the newest steps. Each has a `manifest.json` with the size and sha256 of
//! every other file in it. A checkpoint is written to a temporary folder, brought to the disk file by file, the manifest
//! last, and only then gets its name; older ones go only after the new one was read back and found right. So a name
//! `step-N` always stands for a whole checkpoint, and whatever happens to one, another is there.

mod damage;
mod find;
mod manifest;
mod resume;
mod save;

pub use damage::Damage;
pub use find::{Found, find_checkpoint, newest_whole};
pub use manifest::{FORMAT_VERSION, FileEntry, MANIFEST_FILE, Manifest, RunIdentity, TrainState};
pub use resume::{Difference, compare_for_resume};
pub use save::{check_free_space, save_checkpoint, verify_checkpoint};

use crate::error::{Error, Result};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// The folder of the checkpoints in a run's folder.
pub const CHECKPOINTS_DIR: &str = "checkpoints";

/// What is being written or removed. It never counts as a checkpoint and goes at the next chance.
const TEMPORARY_PREFIX: &str = ".tmp-";
const QUARANTINE_PREFIX: &str = "quarantine-";
const REASON_SUFFIX: &str = ".reason.txt";

/// Whether a run's folder holds checkpoints, good or damaged.
///
/// # Errors
/// [`Error::Io`] when the folder cannot be listed.
pub fn has_checkpoints(run_dir: &Path) -> Result<bool> {
    let names = names(&run_dir.join(CHECKPOINTS_DIR))?;
    Ok(names.iter().any(|name| step_of(name).is_some() || name.starts_with(QUARANTINE_PREFIX)))
}

/// The checkpoints by name, newest step first. Neither times nor contents are looked at.
fn list(checkpoints: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found: Vec<_> =
        names(checkpoints)?.into_iter().filter_map(|name| Some((step_of(&name)?, checkpoints.join(name)))).collect();
    found.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
    Ok(found)
}

/// The step in a name `step-N`, if that is how the number would be written.
fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (name == format!("step-{step}")).then_some(step)
}

/// The names in a folder that are UTF-8, as all of ours are; none where there is no folder.
fn names(folder: &Path) -> Result<Vec<String>> {
    match fs::read_dir(folder) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(Error::Io { action: "list", path: folder.to_path_buf(), source }),
        Ok(entries) => {
            let names =
                entries.map(|entry| Ok(entry?.file_name().into_string().ok())).collect::<std::io::Result<Vec<_>>>();
            Ok(names.map_err(Error::io("list", folder))?.into_iter().flatten().collect())
        }
    }
}

/// Removes what a killed run left half written or half removed.
fn sweep(checkpoints: &Path) -> Result<()> {
    for name in names(checkpoints)?.iter().filter(|name| name.starts_with(TEMPORARY_PREFIX)) {
        remove(&checkpoints.join(name))?;
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    let is_folder = fs::symlink_metadata(path).map_err(Error::io("remove", path))?.is_dir();
    if is_folder { fs::remove_dir_all(path) } else { fs::remove_file(path) }.map_err(Error::io("remove", path))
}

/// Brings a file's contents, or a folder's names, to the disk.
fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(Error::io("sync", path))
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(Error::io("rename", from))
}

#[cfg(test)]
mod tests;
