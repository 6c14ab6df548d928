//! The versions of an adapter that is trained on and on: `versions/0003`, what was not published in `rejected`, and `current`, a
//! link to the version that counts.
//!
//! A version gets its name when it is whole, and the link is replaced in one step, so that whoever reads `current` finds an
//! adapter that is whole at any moment.

use crate::error::{Error, Result};
use lora_format::{ADAPTER_CONFIG, copy_atomic, create_staging_dir, sync_dir, write_atomic};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// The folder of the versions.
pub const VERSIONS_DIR: &str = "versions";
/// The folder of what was trained and not published.
pub const REJECTED_DIR: &str = "rejected";
/// The link to the version that counts.
pub const CURRENT_LINK: &str = "current";
/// What a version came from, in its folder.
pub const VERSION_FILE: &str = "version.json";
/// Held while the link is looked at and replaced.
const LINK_LOCK: &str = ".link-lock";
/// The link that is about to become the other.
const NEW_LINK: &str = ".tmp-current";

/// A file that was taken up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakenFile {
    /// Its name in the folder that it came from.
    pub name: String,
    /// The sha256 of its content.
    pub sha256: String,
    /// Its size.
    pub bytes: u64,
}

/// What a round of training came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Version {
    /// Its number, from 1; no other round of the folder has it.
    pub version: u64,
    /// The version that it was trained from; none where it began with the base or with `lora.init_adapter`.
    pub parent: Option<u64>,
    /// What it was trained on, besides what was replayed.
    pub files: Vec<TakenFile>,
    /// Optimizer steps.
    pub steps: u64,
    /// The loss of the held-out set before the first step: that of the parent.
    pub eval_loss_before: Option<f64>,
    /// The loss of the same set with the adapter that came of it.
    pub eval_loss: Option<f64>,
    /// Why it was not published; none where it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rejected: Option<String>,
    /// When it was done, in seconds since 1970-01-01 UTC.
    pub finished_at: u64,
}

/// A version as its folder is called.
pub fn version_name(version: u64) -> String {
    format!("{version:04}")
}

/// The versions in a folder.
#[derive(Clone, Debug)]
pub struct Versions {
    dir: PathBuf,
}

impl Versions {
    /// The versions in the output folder of a watch; nothing is read yet.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf() }
    }

    /// The folder of a version that was published.
    pub fn folder(&self, version: u64) -> PathBuf {
        self.dir.join(VERSIONS_DIR).join(version_name(version))
    }

    /// The folder of one that was not.
    pub fn rejected_folder(&self, version: u64) -> PathBuf {
        self.dir.join(REJECTED_DIR).join(version_name(version))
    }

    /// Every round that is done, published or rejected, by number.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::WatchFile`] for a record that cannot be read.
    pub fn list(&self) -> Result<Vec<Version>> {
        let mut all = Vec::new();
        for kind in [VERSIONS_DIR, REJECTED_DIR] {
            for number in numbers(&self.dir.join(kind))? {
                all.push(self.read(kind, number)?);
            }
        }
        all.sort_by_key(|version| version.version);
        Ok(all)
    }

    /// What is known of a version that was published; `None` where there is none of this number.
    ///
    /// # Errors
    /// [`Error::WatchFile`] for a record that cannot be read.
    pub fn version(&self, version: u64) -> Result<Option<Version>> {
        if self.folder(version).is_dir() { self.read(VERSIONS_DIR, version).map(Some) } else { Ok(None) }
    }

    /// The version that counts; none before the first.
    ///
    /// # Errors
    /// [`Error::CurrentLink`] where `current` is something else.
    pub fn current(&self) -> Result<Option<u64>> {
        let path = self.dir.join(CURRENT_LINK);
        let target = match fs::read_link(&path) {
            Ok(target) => target,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(_) => return Err(Error::CurrentLink { path }),
        };
        let name = target.strip_prefix(VERSIONS_DIR).ok().and_then(Path::to_str).and_then(number_of);
        name.map(Some).ok_or(Error::CurrentLink { path })
    }

    /// A version with those that it came from, the newest first, as far as they are still there.
    ///
    /// # Errors
    /// As [`Versions::version`].
    pub fn lineage(&self, version: Option<u64>) -> Result<Vec<Version>> {
        let (mut line, mut next) = (Vec::new(), version);
        while let Some(found) = next.map(|number| self.version(number)).transpose()?.flatten() {
            // A parent is always older; what says otherwise was not written by us and must not go round for ever.
            next = found.parent.filter(|parent| *parent < found.version);
            line.push(found);
        }
        Ok(line)
    }

    /// Makes an earlier version the one that counts, `to` or the parent of the present one. Gives the one before and the one
    /// after. A watch that is at work goes on from there.
    ///
    /// # Errors
    /// [`Error::NoVersion`] where there is no such version.
    pub fn rollback(&self, to: Option<u64>) -> Result<(Option<u64>, u64)> {
        let published = numbers(&self.dir.join(VERSIONS_DIR))?;
        let none = |wanted: String| Error::NoVersion { dir: self.dir.clone(), wanted, published: published.clone() };
        if published.is_empty() {
            return Err(none("to go back to".into()));
        }
        let _held = self.hold_link()?;
        let current = self.current()?;
        let parent = match (to, current) {
            (None, Some(number)) => self.version(number)?.and_then(|version| version.parent),
            _ => None,
        };
        let before = || match current {
            Some(number) => format!("before {}", version_name(number)),
            None => "before none".to_string(),
        };
        let to = to.or(parent).ok_or_else(|| none(before()))?;
        if !self.folder(to).join(ADAPTER_CONFIG).is_file() {
            return Err(none(version_name(to)));
        }
        self.link(to)?;
        Ok((current, to))
    }

    /// Publishes what a round made: a folder of its own, then the link, unless another version than the round's parent counts by
    /// now; whether it was done. A second call after a kill does what is left.
    pub(crate) fn publish(&self, from: &Path, record: &Version) -> Result<bool> {
        let _held = self.hold_link()?;
        let current = self.current()?;
        if current == Some(record.version) {
            return Ok(true);
        }
        if current != record.parent {
            return Ok(false);
        }
        self.keep(from, record)?;
        self.link(record.version)?;
        Ok(true)
    }

    /// Keeps what a round left in its folder, without its checkpoints, under the name of its version.
    pub(crate) fn keep(&self, from: &Path, record: &Version) -> Result<()> {
        let target = match record.rejected {
            None => self.folder(record.version),
            Some(_) => self.rejected_folder(record.version),
        };
        if target.is_dir() {
            return Ok(());
        }
        let parent = target.parent().unwrap_or(&self.dir);
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        let staging = create_staging_dir(&target)?;
        for entry in fs::read_dir(from).map_err(Error::io("list", from))? {
            let path = entry.map_err(Error::io("list", from))?.path();
            let Some(name) = path.file_name().filter(|name| !name.to_string_lossy().starts_with('.')) else { continue };
            if path.is_file() {
                copy_atomic(&path, &staging.path().join(name))?;
            }
        }
        write_json(&staging.path().join(VERSION_FILE), record)?;
        sync_dir(staging.path())?;
        let staging = staging.keep();
        fs::rename(&staging, &target).map_err(Error::io("rename", &staging))?;
        sync_dir(parent)?;
        Ok(sync_dir(&self.dir)?)
    }

    fn read(&self, kind: &str, version: u64) -> Result<Version> {
        read_json(&self.dir.join(kind).join(version_name(version)).join(VERSION_FILE))
    }

    /// Points `current` at a version: a link beside it is renamed over it, so that it is never missing.
    fn link(&self, version: u64) -> Result<()> {
        let (new, link) = (self.dir.join(NEW_LINK), self.dir.join(CURRENT_LINK));
        match fs::remove_file(&new) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                return Err(Error::Io { action: "remove", path: new, source: e });
            }
            _ => {}
        }
        symlink(Path::new(VERSIONS_DIR).join(version_name(version)), &new).map_err(Error::io("create", &new))?;
        fs::rename(&new, &link).map_err(Error::io("rename", &new))?;
        Ok(sync_dir(&self.dir)?)
    }

    /// One at a time looks at the link and replaces it; given back when dropped.
    fn hold_link(&self) -> Result<File> {
        let path = self.dir.join(LINK_LOCK);
        let open = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
        let file = open.map_err(Error::io("open", &path))?;
        file.lock().map_err(Error::io("lock", &path))?;
        Ok(file)
    }
}

/// The numbers of the versions in a folder, in their order; none where there is no folder.
fn numbers(folder: &Path) -> Result<Vec<u64>> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(Error::io("list", folder))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(Error::io("list", folder))?.file_name();
        found.extend(name.to_str().and_then(number_of));
    }
    found.sort_unstable();
    Ok(found)
}

/// The number in a name, if that is how it would be written.
fn number_of(name: &str) -> Option<u64> {
    name.parse().ok().filter(|number| version_name(*number) == name)
}

/// Reads a small file of ours.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let bad = |reason: String| Error::WatchFile { path: path.to_path_buf(), reason };
    let text = fs::read_to_string(path).map_err(|e| bad(e.to_string()))?;
    serde_json::from_str(&text).map_err(|e| bad(e.to_string()))
}

/// Writes one, whole or not at all.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|source| Error::Json { what: "a record", source })?;
    Ok(write_atomic(path, format!("{text}\n").as_bytes())?)
}

#[cfg(test)]
mod tests;
