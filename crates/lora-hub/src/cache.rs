//! The cache in `huggingface_hub`'s layout.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::digest::Digest;
use crate::error::{HubError, Result};
use crate::listing::{Listing, RemoteFile};
use crate::repo::{Repo, is_commit};

/// What was cut and not taken up again for so long is removed with the next download of its repository.
const STALE: Duration = Duration::from_secs(7 * 24 * 3600);

/// A repository's part of the cache.
#[derive(Debug)]
pub(crate) struct Store {
    cache: PathBuf,
    name: String,
    folder: PathBuf,
}

/// Who may write a blob.
#[derive(Debug)]
pub(crate) enum Claim {
    /// We, until the file is closed.
    Ours { _lock: File },
    /// The file system knows no locks.
    Unlocked,
}

impl Store {
    pub(crate) fn new(cache: &Path, repo: &Repo) -> Self {
        let name = repo.folder();
        Self { cache: cache.to_owned(), folder: cache.join(&name), name }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The commit that a revision meant when it was last fetched.
    pub(crate) fn commit(&self, revision: &str) -> Option<String> {
        let commit = match fs::read_to_string(self.folder.join("refs").join(revision)) {
            Ok(text) => text.trim().to_owned(),
            Err(_) => revision.to_owned(),
        };
        is_commit(&commit).then_some(commit)
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// What a commit consists of, if we or `huggingface_hub` have kept it. Ours has a name of its own: by theirs it also tells
    /// whether everything was fetched, and we fetch what is needed.
    pub(crate) fn listing(&self, commit: &str) -> Option<Listing> {
        let kept = |name: String| Listing::read_kept(commit, &fs::read(self.folder.join("trees").join(name)).ok()?);
        kept(format!("{commit}.lora.json")).or_else(|| kept(format!("{commit}.json")))
    }

    pub(crate) fn keep_listing(&self, listing: &Listing) -> Result<()> {
        let Some(text) = listing.to_kept() else { return Ok(()) };
        self.write(&self.folder.join("trees").join(format!("{}.lora.json", listing.commit)), &text)
    }

    /// Whether a file of a commit is there, as far as its size tells.
    ///
    /// # Errors
    /// [`HubError::Outside`] where its link leads out of the cache.
    pub(crate) fn has(&self, commit: &str, file: &RemoteFile) -> Result<bool> {
        let path = self.snapshot(commit).join(&file.path);
        let Ok(real) = fs::canonicalize(&path) else { return Ok(false) };
        let below = |root: &Path| fs::canonicalize(root).is_ok_and(|root| real.starts_with(root));
        if !below(&self.cache) && !below(&self.folder) {
            return Err(HubError::Outside { path });
        }
        let there =
            fs::metadata(&real).is_ok_and(|m| m.is_file() && file.known.as_ref().is_none_or(|k| k.size == m.len()));
        Ok(there)
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        self.folder.join("blobs").join(digest.name())
    }

    /// Where a blob is written before it is whole.
    pub(crate) fn partial(&self, digest: &Digest, claim: &Claim) -> PathBuf {
        let own = match claim {
            Claim::Ours { .. } => String::new(),
            // Nobody else may write the same file.
            Claim::Unlocked => format!(".{}", std::process::id()),
        };
        self.folder.join("blobs").join(format!("{}{own}.incomplete", digest.name()))
    }

    /// Makes the folders of blobs and locks.
    pub(crate) fn create(&self) -> Result<()> {
        for folder in [self.folder.join("blobs"), self.locks()] {
            fs::create_dir_all(&folder).map_err(HubError::io("create", &folder))?;
        }
        Ok(())
    }

    fn locks(&self) -> PathBuf {
        self.cache.join(".locks").join(&self.name)
    }

    /// Claims a blob, by the same file as `huggingface_hub`. `wait` is told when someone else has it.
    pub(crate) fn claim(&self, digest: &Digest, wait: &mut dyn FnMut()) -> Result<Claim> {
        let path = self.locks().join(format!("{}.lock", digest.name()));
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(HubError::io("open", &path))?;
        let locked = match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                wait();
                file.lock()
            }
            Err(TryLockError::Error(e)) => Err(e),
            Ok(()) => Ok(()),
        };
        match locked {
            Ok(()) => Ok(Claim::Ours { _lock: file }),
            Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(Claim::Unlocked),
            Err(e) => Err(HubError::io("lock", &path)(e)),
        }
    }

    /// Gives a whole and checked file its name.
    pub(crate) fn keep_blob(&self, partial: &Path, digest: &Digest) -> Result<()> {
        let blob = self.blob(digest);
        fs::rename(partial, &blob).map_err(HubError::io("rename", partial))?;
        sync(&self.folder.join("blobs"))
    }

    /// Puts a blob into the snapshot of a commit: as a link, as a copy where links are not possible.
    pub(crate) fn link(&self, commit: &str, path: &str, digest: &Digest) -> Result<()> {
        let (place, blob) = (self.snapshot(commit).join(path), self.blob(digest));
        let parent = self.real_folder(commit, path)?;
        let mut up = PathBuf::new();
        // From the file's folder up to that of the repository: `snapshots`, the commit, and the folders within.
        (0..2 + path.matches('/').count()).for_each(|_| up.push(".."));
        let target = up.join("blobs").join(digest.name());
        if fs::read_link(&place).is_ok_and(|there| there == target) {
            return Ok(());
        }
        match fs::remove_file(&place) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(HubError::io("replace", &place)(e)),
        }
        match symlink(&target, &place) {
            Ok(()) => {}
            // Another process was faster, with the same link.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(_) => {
                let copy = tempfile::NamedTempFile::new_in(&parent).map_err(HubError::io("write to", &parent))?;
                fs::copy(&blob, copy.path()).map_err(HubError::io("copy", &blob))?;
                copy.persist(&place).map_err(|e| HubError::io("rename to", &place)(e.error))?;
            }
        }
        sync(&parent)
    }

    /// The folder in a snapshot that a file belongs to, made where it is absent. No part of it may be a link.
    fn real_folder(&self, commit: &str, path: &str) -> Result<PathBuf> {
        let mut folder = self.snapshot(commit);
        let inner: Vec<&str> = path.split('/').collect();
        fs::create_dir_all(&folder).map_err(HubError::io("create", &folder))?;
        for part in std::iter::once("").chain(inner[..inner.len() - 1].iter().copied()) {
            if !part.is_empty() {
                folder.push(part);
            }
            match fs::symlink_metadata(&folder) {
                Ok(metadata) if metadata.is_symlink() => return Err(HubError::Outside { path: folder }),
                Ok(_) => {}
                Err(_) => match fs::create_dir(&folder) {
                    Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                        return Err(HubError::io("create", &folder)(e));
                    }
                    _ => {}
                },
            }
        }
        Ok(folder)
    }

    /// Notes the commit that a branch or tag means.
    pub(crate) fn set_ref(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        self.write(&self.folder.join("refs").join(revision), commit.as_bytes())
    }

    /// Writes a small file beside its place, and renames it.
    fn write(&self, path: &Path, content: &[u8]) -> Result<()> {
        let parent = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(parent).map_err(HubError::io("create", parent))?;
        // As any new file: others may share the cache.
        let open = fs::Permissions::from_mode(0o666);
        let mut file =
            tempfile::Builder::new().permissions(open).tempfile_in(parent).map_err(HubError::io("write to", parent))?;
        let written = file.write_all(content).and_then(|()| file.as_file().sync_all());
        written.map_err(HubError::io("write", path))?;
        file.persist(path).map_err(|e| HubError::io("rename to", path)(e.error))?;
        sync(parent)
    }

    /// Removes downloads that were cut long ago and will not be taken up again.
    pub(crate) fn drop_stale(&self) {
        let Ok(entries) = fs::read_dir(self.folder.join("blobs")) else { return };
        for entry in entries.flatten() {
            let stale = || SystemTime::now().duration_since(entry.metadata().ok()?.modified().ok()?).ok();
            if entry.path().extension().is_some_and(|e| e == "incomplete") && stale().is_some_and(|age| age > STALE) {
                // What cannot be removed only takes room.
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// Makes the names in a folder last.
fn sync(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|f| f.sync_all()).map_err(HubError::io("flush", folder))
}
