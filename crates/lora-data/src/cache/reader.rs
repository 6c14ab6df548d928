//! Reads a file of tokens: mapped, its index checked when it is opened, each row when it is read.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use super::Meta;
use super::layout::{ENTRY, Entry, HEAD, Key, TRAILER, Trailer, head};
use crate::document::Origin;
use crate::error::{DataError, Result};
use crate::example::Example;
use crate::fingerprint::{Fingerprint, fingerprint_of, from_words};

/// A mapped file of tokens.
#[derive(Debug)]
pub(crate) struct TokenFile {
    path: PathBuf,
    map: Mmap,
    trailer: Trailer,
    index_at: usize,
    files: Vec<Arc<Path>>,
}

impl TokenFile {
    /// Maps a file. `None` when there is none, or one that is not whole, or not of this key: it is to be made anew then.
    pub(super) fn open(path: &Path, key: &Key) -> Option<(Self, Meta)> {
        let map = map_file(&File::open(path).ok()?).ok()?;
        let trailer = Trailer::of(&map).filter(|trailer| trailer.key == *key)?;
        let (index_at, meta_at) = (trailer.index_at()?, trailer.meta_at()?);
        let meta_end = map.len().checked_sub(TRAILER)?;
        let mut hash = blake3::Hasher::new();
        hash.update(map.get(..HEAD)?).update_rayon(map.get(index_at..meta_end)?);
        let is_whole = map[..HEAD] == head() && map.get(meta_end..)? == trailer.to_bytes(hash);
        let meta: Meta = serde_json::from_slice(map.get(meta_at..meta_end)?).ok().filter(|_| is_whole)?;
        let files = meta.files.iter().map(|file| Path::new(file).into()).collect();
        Some((Self { path: path.to_owned(), map, trailer, index_at, files }, meta))
    }

    pub(crate) fn len(&self) -> usize {
        self.trailer.rows as usize
    }

    pub(crate) fn highest_token(&self) -> Option<u32> {
        self.trailer.highest
    }

    fn entry(&self, row: usize) -> Option<Entry> {
        let at = row.checked_mul(ENTRY)?.checked_add(self.index_at)?;
        Entry::from_bytes(self.map.get(at..at.checked_add(ENTRY)?)?).filter(|_| row < self.len())
    }

    /// The tokens of a row: from, to.
    fn span(&self, row: usize) -> Option<(u64, u64)> {
        let start = if row == 0 { 0 } else { self.entry(row - 1)?.end };
        let end = self.entry(row)?.end;
        (start <= end && end <= self.trailer.tokens).then_some((start, end))
    }

    /// Tokens of a row.
    pub(crate) fn length(&self, row: usize) -> usize {
        self.span(row).map_or(0, |(start, end)| (end - start) as usize)
    }

    /// Tokens of a row that are trained.
    pub(crate) fn trained(&self, row: usize) -> usize {
        self.entry(row).map_or(0, |entry| entry.trained as usize)
    }

    pub(crate) fn fingerprint(&self, row: usize) -> Fingerprint {
        self.entry(row).map_or([0; 16], |entry| entry.fingerprint)
    }

    pub(crate) fn origin(&self, row: usize) -> Result<Origin> {
        let of = |entry: Entry| {
            let file = self.files.get(entry.file as usize)?.clone();
            Some(Origin { file, record: usize::try_from(entry.record).ok()?, line: usize::try_from(entry.line).ok()? })
        };
        self.entry(row).and_then(of).ok_or_else(|| self.damaged(row))
    }

    /// A row, when it is what was written.
    pub(crate) fn example(&self, row: usize) -> Result<Example> {
        let words = || {
            let (start, end) = self.span(row)?;
            let words = self.map.get(HEAD + 4 * start as usize..HEAD + 4 * end as usize)?;
            (fingerprint_of(words) == self.fingerprint(row)).then_some(words)
        };
        let (input_ids, trained) = from_words(words().ok_or_else(|| self.damaged(row))?);
        Ok(Example { input_ids, trained, origin: self.origin(row)? })
    }

    fn damaged(&self, row: usize) -> DataError {
        DataError::CacheDamaged { path: self.path.clone(), row: row + 1 }
    }
}

#[allow(unsafe_code)]
fn map_file(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the mapping is read-only and private to this process. Files of tokens are never changed once they have their
    // name: others of the same key are renamed over them and old ones are removed, which leaves a mapping what it was.
    unsafe { Mmap::map(file) }
}
