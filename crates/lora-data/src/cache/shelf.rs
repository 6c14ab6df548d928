//! The folder of a cache: names, what lies there, and what is put away.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::layout::Key;
use super::{TEMPORARY, TokenCache};
use crate::error::{DataError, Result};

const SUFFIX: &str = "tokens";
/// A file that no run opened for so long is removed when another is written.
const UNUSED: Duration = Duration::from_secs(30 * 86_400);
/// A file that nobody wrote to for so long was left by a process that is no more.
const ABANDONED: Duration = Duration::from_secs(86_400);

/// One file of a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheEntry {
    /// The file.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// When it was last opened by a run.
    pub used: SystemTime,
    /// Whether it was begun and is not finished.
    pub unfinished: bool,
}

impl TokenCache {
    pub(super) fn path_of(&self, key: &Key) -> PathBuf {
        // Half of the digest is enough for a name; the file says all of it.
        let name: String = key[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        self.dir.join(format!("{name}.{SUFFIX}"))
    }

    /// The files of the cache, by name: tokens, notes of the digests of large files, and what is not finished; none where
    /// the folder is not there.
    ///
    /// # Errors
    /// [`DataError::Io`] when the folder cannot be read.
    pub fn entries(&self) -> Result<Vec<CacheEntry>> {
        let listing = match std::fs::read_dir(&self.dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            listing => listing.map_err(|source| DataError::Io { path: self.dir.clone(), source })?,
        };
        let entry = |path: PathBuf| {
            let unfinished = path.file_name()?.to_str()?.starts_with(TEMPORARY);
            let metadata = std::fs::symlink_metadata(&path).ok().filter(std::fs::Metadata::is_file)?;
            let ours =
                unfinished || path.extension().is_some_and(|kind| kind == SUFFIX || kind == super::known::SUFFIX);
            let used = metadata.modified().ok()?;
            ours.then_some(CacheEntry { path, bytes: metadata.len(), used, unfinished })
        };
        let mut entries: Vec<CacheEntry> = listing.flatten().filter_map(|found| entry(found.path())).collect();
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(entries)
    }

    /// Removes what has not been used since a time, and says how many bytes that were. A run that has a file open keeps it
    /// until it ends.
    ///
    /// # Errors
    /// [`DataError::Io`] for what cannot be removed.
    pub fn remove_unused_since(&self, time: SystemTime) -> Result<u64> {
        let mut bytes = 0;
        for entry in self.entries()?.into_iter().filter(|entry| entry.used <= time) {
            match std::fs::remove_file(&entry.path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                removed => removed.map_err(|source| DataError::Io { path: entry.path, source })?,
            }
            bytes += entry.bytes;
        }
        Ok(bytes)
    }

    /// Removes what nobody needs any more, but for the file that is about to be written. What cannot be removed stays.
    pub(super) fn tidy(&self, wanted: &Path) {
        let now = SystemTime::now();
        for entry in self.entries().unwrap_or_default() {
            let limit = if entry.unfinished { ABANDONED } else { UNUSED };
            if entry.path != wanted && now.duration_since(entry.used).is_ok_and(|age| age > limit) {
                let _ = std::fs::remove_file(&entry.path);
            }
        }
    }
}

/// Notes that a file is in use; in a folder that may not be written this is left undone.
pub(super) fn was_used(path: &Path) {
    if let Ok(file) = File::options().append(true).open(path) {
        let _ = file.set_modified(SystemTime::now());
    }
}

/// Makes a new name last; where a folder cannot be opened the name is lost with the power at worst.
pub(super) fn sync_folder(path: &Path) {
    if let Some(folder) = path.parent().and_then(|folder| File::open(folder).ok()) {
        let _ = folder.sync_all();
    }
}
