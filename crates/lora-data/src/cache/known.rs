//! Digests of large files that were made before, so that a start need not read the files again.
//!
//! A digest is taken again only for the very file that it was made of: same device and inode, same length, same time of
//! modification, same time of change. No program can set the last one, and the system sets it with every write, however the
//! time of modification is dressed afterwards. Two gaps are left, and closed by remembering only files that had been left
//! alone for a while when they were read: a write within the same tick of the clock, and one through a mapping, which
//! counts when the page is next written out. Where a system has no such times nothing is remembered.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::stamp::Stamp;

/// The suffix of these files.
pub(super) const SUFFIX: &str = "digest";

/// Where digests are remembered, and of what.
pub(super) struct Known<'a> {
    pub(super) dir: &'a Path,
    /// Smaller files are read in less time than is worth a word.
    pub(super) min_bytes: u64,
    /// A file must not have changed for so long.
    pub(super) settled: Duration,
}

impl<'a> Known<'a> {
    pub(super) fn new(dir: &'a Path) -> Self {
        Self { dir, min_bytes: 64 << 20, settled: Duration::from_secs(120) }
    }

    /// The digest of a file's bytes: the one that is known, else the one that `read` makes.
    pub(super) fn digest(
        &self,
        path: &Path,
        read: impl FnOnce(&Path) -> std::io::Result<blake3::Hash>,
    ) -> std::io::Result<blake3::Hash> {
        let (now, stamp) = (SystemTime::now(), Stamp::of(&std::fs::metadata(path)?));
        let Some(note) = stamp.changed().filter(|_| stamp.bytes() >= self.min_bytes).map(|_| self.note(&stamp)) else {
            return read(path);
        };
        if let Some(known) = take(&note) {
            super::shelf::was_used(&note);
            return Ok(known);
        }
        let digest = read(path)?;
        let settled = stamp.changed().and_then(|changed| now.duration_since(changed).ok());
        let same = std::fs::metadata(path).is_ok_and(|metadata| Stamp::of(&metadata) == stamp);
        if same && settled.is_some_and(|age| age >= self.settled) {
            // A digest that cannot be kept is made again.
            let _ = keep(&note, digest);
        }
        Ok(digest)
    }

    fn note(&self, stamp: &Stamp) -> PathBuf {
        let name = blake3::hash(format!("{stamp:?}").as_bytes()).to_hex();
        self.dir.join(format!("{}.{SUFFIX}", &name[..32]))
    }
}

/// A note is a digest and the digest of that, so that half of one is none.
fn text(digest: blake3::Hash) -> String {
    format!("{} {}\n", digest.to_hex(), blake3::hash(digest.as_bytes()).to_hex())
}

fn take(note: &Path) -> Option<blake3::Hash> {
    let found = std::fs::read_to_string(note).ok()?;
    let digest = blake3::Hash::from_hex(found.get(..64)?).ok()?;
    (found == text(digest)).then_some(digest)
}

fn keep(note: &Path, digest: blake3::Hash) -> std::io::Result<()> {
    use std::io::Write;
    let dir = note.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir)?;
    let mut file = tempfile::Builder::new().prefix(super::TEMPORARY).tempfile_in(dir)?;
    file.write_all(text(digest).as_bytes())?;
    file.persist(note)?;
    Ok(())
}

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use super::*;

    /// The digest, and whether the file was read for it.
    fn ask(known: &Known<'_>, path: &Path) -> (blake3::Hash, bool) {
        let mut was_read = false;
        let read = |path: &Path| {
            was_read = true;
            std::fs::read(path).map(|bytes| blake3::hash(&bytes))
        };
        let digest = known.digest(path, read).unwrap();
        (digest, was_read)
    }

    #[test]
    fn a_file_is_read_again_when_it_changed_however_it_looks() {
        let folder = tempfile::tempdir().unwrap();
        let (notes, path) = (folder.path().join("notes"), folder.path().join("data"));
        let known = Known { dir: &notes, min_bytes: 4, settled: Duration::ZERO };
        std::fs::write(&path, "first").unwrap();
        assert_eq!(ask(&known, &path), (blake3::hash(b"first"), true));
        assert_eq!(ask(&known, &path), (blake3::hash(b"first"), false), "it is remembered");
        // The same length, and the old time put back.
        let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        std::fs::write(&path, "other").unwrap();
        std::fs::File::options().append(true).open(&path).unwrap().set_modified(modified).unwrap();
        assert_eq!(ask(&known, &path), (blake3::hash(b"other"), true));
        // Another file under the old name, with the old time.
        let replacement = folder.path().join("replacement");
        std::fs::write(&replacement, "third").unwrap();
        std::fs::File::options().append(true).open(&replacement).unwrap().set_modified(modified).unwrap();
        std::fs::rename(&replacement, &path).unwrap();
        assert_eq!(ask(&known, &path), (blake3::hash(b"third"), true));
    }

    #[test]
    fn only_large_files_that_were_left_alone_are_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let (notes, path) = (folder.path().join("notes"), folder.path().join("data"));
        std::fs::write(&path, "first").unwrap();
        let small = Known { dir: &notes, min_bytes: 6, settled: Duration::ZERO };
        let fresh = Known { dir: &notes, min_bytes: 0, settled: Duration::from_secs(120) };
        for known in [small, fresh] {
            assert!(ask(&known, &path).1 && ask(&known, &path).1);
        }
        assert!(!notes.exists());
    }

    #[test]
    fn half_a_note_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let (notes, path) = (folder.path().join("notes"), folder.path().join("data"));
        let known = Known { dir: &notes, min_bytes: 0, settled: Duration::ZERO };
        std::fs::write(&path, "first").unwrap();
        ask(&known, &path);
        let note = std::fs::read_dir(&notes).unwrap().next().unwrap().unwrap().path();
        let whole = std::fs::read_to_string(&note).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&note, &whole[..length]).unwrap();
            assert!(ask(&known, &path).1, "{length} letters were taken for a note");
        }
        std::fs::write(&note, whole.replace('a', "b")).unwrap();
        assert_eq!(ask(&known, &path), (blake3::hash(b"first"), whole.contains('a')));
    }
}
