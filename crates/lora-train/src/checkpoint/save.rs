//! Writing a checkpoint, and reading one back to see that it is what was written.

use super::manifest::{FORMAT_VERSION, FileEntry, MANIFEST_FILE, Manifest, RunIdentity, TrainState, digest_file};
use super::{CHECKPOINTS_DIR, Damage, TEMPORARY_PREFIX, list, remove, rename, step_of, sweep, sync};
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Refuses when the file system of a run's folder has no room for `bytes` and a fifth more.
///
/// # Errors
/// [`Error::NoSpace`] with both numbers.
pub fn check_free_space(run_dir: &Path, bytes: u64) -> Result<()> {
    let needed = bytes.saturating_add(bytes / 5);
    let free = fs4::available_space(run_dir).map_err(Error::io("ask for the free space of", run_dir))?;
    if free < needed {
        return Err(Error::NoSpace { path: run_dir.to_path_buf(), needed, free });
    }
    Ok(())
}

/// Saves a checkpoint of `state.step` and returns its folder. `write` puts the files into the folder that it is given;
/// `bytes` is about what they take. The newest `keep` checkpoints stay (at least 2). The caller holds the
/// [`RunLock`](crate::RunLock) of the folder.
///
/// A checkpoint of the same step with the same files is left as it is; one that is damaged makes way.
///
/// # Errors
/// Whatever fails on the way, `write` included. No older checkpoint is touched then, and none of the new one is left, unless
/// it failed after the new one was complete.
pub fn save_checkpoint(
    run_dir: &Path,
    run: &RunIdentity,
    state: &TrainState,
    bytes: u64,
    keep: usize,
    write: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let checkpoints = run_dir.join(CHECKPOINTS_DIR);
    if !checkpoints.is_dir() {
        fs::create_dir_all(&checkpoints).map_err(Error::io("create", &checkpoints))?;
        sync(run_dir)?;
    }
    sweep(&checkpoints)?;
    check_free_space(run_dir, bytes)?;

    let step = state.step;
    let temporary = tempfile::Builder::new()
        .prefix(&format!("{TEMPORARY_PREFIX}step-{step}-"))
        .tempdir_in(&checkpoints)
        .map_err(Error::io("create a folder in", &checkpoints))?;
    write(temporary.path())?;
    let files = sync_files(temporary.path())?;
    let manifest = Manifest { format_version: FORMAT_VERSION, step, run: run.clone(), state: state.clone(), files };
    write_manifest(temporary.path(), &manifest)?;
    sync(temporary.path())?;

    let target = checkpoints.join(format!("step-{step}"));
    match existing(&target)? {
        Existing::None => {}
        Existing::Whole(found) if found.files == manifest.files => return Ok(target),
        Existing::Whole(_) => return Err(Error::CheckpointExists { path: target }),
        Existing::Damaged(damage) => super::find::quarantine(&checkpoints, &target, &damage).map(drop)?,
    }
    rename(temporary.path(), &target)?;
    // It has its name: from here on it is not temporary.
    let _ = temporary.keep();
    sync(&checkpoints)?;
    verify_checkpoint(&target)?;
    remove_old(&checkpoints, step, keep)?;
    Ok(target)
}

enum Existing {
    None,
    Whole(Box<Manifest>),
    Damaged(Damage),
}

fn existing(target: &Path) -> Result<Existing> {
    if fs::symlink_metadata(target).is_err() {
        return Ok(Existing::None);
    }
    match verify_checkpoint(target) {
        Ok(manifest) => Ok(Existing::Whole(Box::new(manifest))),
        Err(Error::CheckpointDamaged { damage, .. }) => Ok(Existing::Damaged(damage)),
        Err(e) => Err(e),
    }
}

/// Brings every file of a folder to the disk and notes its digest.
fn sync_files(folder: &Path) -> Result<BTreeMap<String, FileEntry>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let entry = entry.map_err(Error::io("list", folder))?;
        let path = entry.path();
        let is_file = entry.file_type().map_err(Error::io("read", &path))?.is_file();
        let name = entry.file_name().into_string().ok().filter(|name| is_file && name != MANIFEST_FILE);
        let name = name.ok_or_else(|| Error::CheckpointEntry { path: path.clone() })?;
        let mut file = File::open(&path).map_err(Error::io("open", &path))?;
        file.sync_all().map_err(Error::io("sync", &path))?;
        files.insert(name, digest_file(&mut file).map_err(Error::io("read", &path))?);
    }
    Ok(files)
}

fn write_manifest(folder: &Path, manifest: &Manifest) -> Result<()> {
    let path = folder.join(MANIFEST_FILE);
    let text = manifest.to_text()?;
    let mut file = File::create(&path).map_err(Error::io("create", &path))?;
    file.write_all(text.as_bytes()).map_err(Error::io("write", &path))?;
    file.sync_all().map_err(Error::io("sync", &path))
}

/// Removes all but the newest `keep` checkpoints, and never that of `step`.
fn remove_old(checkpoints: &Path, step: u64, keep: usize) -> Result<()> {
    for (old, path) in list(checkpoints)?.into_iter().skip(keep.max(2)) {
        if old != step {
            // Renamed first, so that one half removed is never taken for a damaged one.
            let doomed = checkpoints.join(format!("{TEMPORARY_PREFIX}old-step-{old}"));
            rename(&path, &doomed)?;
            remove(&doomed)?;
        }
    }
    Ok(())
}

/// Reads every byte of a checkpoint and compares it with the manifest: no file may be missing, added or changed.
///
/// # Errors
/// [`Error::CheckpointDamaged`] with what is wrong, [`Error::CheckpointTooNew`] for a newer format, and [`Error::Io`] when
/// something cannot be read at all.
pub fn verify_checkpoint(dir: &Path) -> Result<Manifest> {
    let damaged = |damage| Err(Error::CheckpointDamaged { path: dir.to_path_buf(), damage });
    if !fs::symlink_metadata(dir).map_err(Error::io("open", dir))?.is_dir() {
        return damaged(Damage::NotAFolder);
    }
    let manifest = Manifest::read(dir)?;
    let folder = dir.file_name().and_then(|name| step_of(name.to_str()?));
    if let Some(folder) = folder.filter(|folder| *folder != manifest.step) {
        return damaged(Damage::WrongStep { manifest: manifest.step, folder });
    }
    let mut missing: Vec<&String> = manifest.files.keys().collect();
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let entry = entry.map_err(Error::io("list", dir))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = entry.path();
        if !entry.file_type().map_err(Error::io("read", &path))?.is_file() {
            return damaged(Damage::NotAFile { file: name });
        }
        if name == MANIFEST_FILE {
            continue;
        }
        let Some(written) = manifest.files.get(&name) else { return damaged(Damage::Extra { file: name }) };
        missing.retain(|file| **file != name);
        let mut file = File::open(&path).map_err(Error::io("open", &path))?;
        let length = file.metadata().map_err(Error::io("read", &path))?.len();
        if length != written.bytes {
            return damaged(Damage::Size { file: name, expected: written.bytes, found: length });
        }
        let found = digest_file(&mut file).map_err(Error::io("read", &path))?;
        if found != *written {
            let (expected, found) = (written.sha256.clone(), found.sha256);
            return damaged(Damage::Contents { file: name, expected, found });
        }
    }
    match missing.first() {
        Some(file) => damaged(Damage::Missing { file: file.to_string() }),
        None => Ok(manifest),
    }
}
