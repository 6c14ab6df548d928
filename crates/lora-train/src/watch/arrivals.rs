//! Files that arrive in a folder: which of them are whole, and their copies.

use crate::error::{Error, Result};
use crate::versions::TakenFile;
use crate::watch::state::State;
use lora_format::{copy_atomic, sha256_file, sync_dir};
use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The folder of the copies, in the output folder.
const TAKEN_DIR: &str = "taken";
/// A copy that is being made.
const INCOMING: &str = ".tmp-incoming";
/// How names end of files that are being written.
const UNFINISHED: [&str; 4] = [".part", ".tmp", ".partial", ".crdownload"];

/// Size and time of the last change: a file whose two looks agree in both is whole.
type Stamp = (u64, Option<SystemTime>);

/// What came of taking a file.
#[derive(Debug, PartialEq)]
pub(super) enum Taken {
    /// It is new, and copied.
    File(TakenFile),
    /// Its content was taken before, it has changed meanwhile, or it is gone.
    Nothing,
    /// It cannot be read, for this reason.
    Unreadable(String),
}

/// The folder, and what was seen of it.
pub(super) struct Arrivals {
    dir: PathBuf,
    /// As they were at the last look.
    seen: BTreeMap<PathBuf, Stamp>,
    /// As they were at the look before, too.
    whole: Vec<PathBuf>,
    /// Those whose content is known, so that it is not read again at each look.
    known: BTreeMap<PathBuf, Stamp>,
}

impl Arrivals {
    /// Of a folder that must be there.
    pub(super) fn of(dir: &Path) -> Result<Self> {
        let folder = Self { dir: dir.to_path_buf(), seen: BTreeMap::new(), whole: Vec::new(), known: BTreeMap::new() };
        folder.list().map(|_| folder)
    }

    /// Looks once; whether there is a file whose content is not known yet.
    pub(super) fn look(&mut self) -> Result<bool> {
        let mut now = self.list()?;
        now.retain(|path, stamp| self.known.get(path) != Some(stamp));
        self.whole =
            now.iter().filter(|(path, stamp)| self.seen.get(*path) == Some(stamp)).map(|(p, _)| p.clone()).collect();
        self.seen = now;
        Ok(!self.seen.is_empty())
    }

    /// The files that two looks found the same, by name.
    pub(super) fn whole(&self) -> Vec<PathBuf> {
        self.whole.clone()
    }

    /// Copies a file into the output folder.
    pub(super) fn take(&mut self, out: &Path, path: &Path, state: &State, now: &[TakenFile]) -> Result<Taken> {
        let Some(stamp) = fs::metadata(path).ok().and_then(|found| stamp(&found)) else { return Ok(Taken::Nothing) };
        let sha256 = match sha256_file(path) {
            Ok(sha256) => sha256,
            Err(_) if !path.exists() => return Ok(Taken::Nothing),
            Err(error) => {
                // Looked at again when it changes, or by the next watch.
                self.known.insert(path.to_path_buf(), stamp);
                return Ok(Taken::Unreadable(error.to_string()));
            }
        };
        if state.has(&sha256) || now.iter().any(|file| file.sha256 == sha256) {
            self.known.insert(path.to_path_buf(), stamp);
            return Ok(Taken::Nothing);
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = TakenFile { name, sha256, bytes: stamp.0 };
        let copy = copy_of(out, &file);
        let (folder, incoming) = (copy.parent().unwrap_or(out).to_path_buf(), out.join(INCOMING));
        copy_atomic(path, &incoming)?;
        if sha256_file(&incoming)? != file.sha256 {
            // It was written to while it was read: a later look will tell.
            fs::remove_file(&incoming).map_err(Error::io("remove", &incoming))?;
            return Ok(Taken::Nothing);
        }
        fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        fs::rename(&incoming, &copy).map_err(Error::io("rename", &incoming))?;
        for changed in [&folder, &out.join(TAKEN_DIR), out] {
            sync_dir(changed)?;
        }
        self.known.insert(path.to_path_buf(), stamp);
        Ok(Taken::File(file))
    }

    /// Every file that may be one to train on, with its stamp.
    fn list(&self) -> Result<BTreeMap<PathBuf, Stamp>> {
        let unreadable = |source| Error::WatchFolder { path: self.dir.clone(), source };
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(&self.dir).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with('.') || UNFINISHED.iter().any(|end| name.ends_with(end)) {
                continue;
            }
            // One that is gone by now was moved away, which is its owner's right.
            if let Some(stamp) = fs::metadata(&path).ok().and_then(|found| stamp(&found)) {
                found.insert(path, stamp);
            }
        }
        Ok(found)
    }
}

/// Of a file that has something in it.
fn stamp(found: &Metadata) -> Option<Stamp> {
    (found.is_file() && found.len() > 0).then(|| (found.len(), found.modified().ok()))
}

/// Where the copy of a file lies. It is trained from there, now and when it is replayed, whatever becomes of the file.
pub(super) fn copy_of(out: &Path, file: &TakenFile) -> PathBuf {
    out.join(TAKEN_DIR).join(&file.sha256).join(&file.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_whole_when_two_looks_find_it_the_same() {
        let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let names = |list: Vec<PathBuf>| -> Vec<String> {
            list.iter().map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect()
        };
        let mut arrivals = Arrivals::of(dir.path()).unwrap();
        assert!(!arrivals.look().unwrap());
        for name in [".hidden", "b.part", "c.tmp", "b.jsonl", "a.jsonl"] {
            put(name, "x");
        }
        put("empty.jsonl", "");
        fs::create_dir(dir.path().join("folder")).unwrap();
        assert!(arrivals.look().unwrap() && arrivals.whole().is_empty(), "one look is not enough");
        put("b.jsonl", "xy");
        arrivals.look().unwrap();
        assert_eq!(names(arrivals.whole()), ["a.jsonl"], "the other one is still growing");
        arrivals.look().unwrap();
        assert_eq!(names(arrivals.whole()), ["a.jsonl", "b.jsonl"]);

        let state = State::default();
        let taken = |taken: Result<Taken>| match taken.unwrap() {
            Taken::File(file) => file,
            other => panic!("{other:?}"),
        };
        let first = taken(arrivals.take(out.path(), &dir.path().join("a.jsonl"), &state, &[]));
        assert_eq!(fs::read_to_string(copy_of(out.path(), &first)).unwrap(), "x");
        // The same content under another name is the same file.
        put("again.jsonl", "x");
        let again = dir.path().join("again.jsonl");
        assert_eq!(arrivals.take(out.path(), &again, &state, std::slice::from_ref(&first)).unwrap(), Taken::Nothing);
        arrivals.look().unwrap();
        arrivals.look().unwrap();
        assert_eq!(names(arrivals.whole()), ["b.jsonl"], "what is known is not looked at again");
        // Other content under the same name is another one.
        put("a.jsonl", "other");
        arrivals.look().unwrap();
        arrivals.look().unwrap();
        let other = taken(arrivals.take(out.path(), &dir.path().join("a.jsonl"), &state, std::slice::from_ref(&first)));
        assert!(other.sha256 != first.sha256 && copy_of(out.path(), &first).is_file());
        fs::remove_file(dir.path().join("b.jsonl")).unwrap();
        assert_eq!(arrivals.take(out.path(), &dir.path().join("b.jsonl"), &state, &[]).unwrap(), Taken::Nothing);
        let missing = Arrivals::of(&dir.path().join("none")).err().unwrap();
        assert!(missing.is_usage() && missing.to_string().contains("none"), "{missing}");
    }
}
