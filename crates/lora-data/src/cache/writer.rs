//! Writes a file of tokens: rows as they come, the rest at the end, and the name last of all.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::NamedTempFile;

use super::layout::{Entry, Key, Trailer, head};
use super::{Meta, TEMPORARY};
use crate::error::{DataError, Result};
use crate::example::Example;
use crate::fingerprint::Fingerprint;

const BUFFER: usize = 1 << 20;

/// A file that is being written. Dropped before it is finished, it leaves nothing.
pub(super) struct Writer {
    dir: PathBuf,
    tokens: BufWriter<NamedTempFile>,
    /// The index, in a file without a name until all tokens are written: it is as long as the data has rows.
    index: BufWriter<File>,
    files: Vec<String>,
    numbers: HashMap<Arc<Path>, u32>,
    trailer: Trailer,
    words: Vec<u8>,
}

impl Writer {
    pub(super) fn create(dir: &Path, key: Key) -> std::io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let file = tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(dir)?;
        let mut tokens = BufWriter::with_capacity(BUFFER, file);
        tokens.write_all(&head())?;
        Ok(Self {
            dir: dir.to_owned(),
            tokens,
            index: BufWriter::with_capacity(BUFFER, tempfile::tempfile_in(dir)?),
            files: Vec::new(),
            numbers: HashMap::new(),
            trailer: Trailer { tokens: 0, rows: 0, meta: 0, highest: None, key },
            words: Vec::new(),
        })
    }

    /// Adds a row.
    pub(super) fn add(&mut self, example: &Example, fingerprint: &Fingerprint) -> Result<()> {
        self.write(example, fingerprint).map_err(|source| self.fault(source))
    }

    /// A fault of writing, with what can be done about it.
    pub(super) fn fault(&self, source: std::io::Error) -> DataError {
        DataError::CacheWrite { path: self.dir.clone(), source }
    }

    fn write(&mut self, example: &Example, fingerprint: &Fingerprint) -> std::io::Result<()> {
        self.words.clear();
        example.to_words(&mut self.words);
        self.tokens.write_all(&self.words)?;
        self.trailer.tokens += example.input_ids.len() as u64;
        self.trailer.rows += 1;
        self.trailer.highest = self.trailer.highest.max(example.input_ids.iter().copied().max());
        let origin = &example.origin;
        let file = match self.numbers.get(&origin.file) {
            Some(number) => *number,
            None => {
                let name = origin.file.to_str().ok_or(std::io::ErrorKind::InvalidFilename)?;
                let number = self.files.len() as u32;
                self.files.push(name.to_owned());
                self.numbers.insert(origin.file.clone(), number);
                number
            }
        };
        let entry = Entry {
            end: self.trailer.tokens,
            record: origin.record as u64,
            line: origin.line as u64,
            file,
            trained: example.trained.iter().filter(|trained| **trained).count() as u32,
            fingerprint: *fingerprint,
        };
        self.index.write_all(&entry.to_bytes())
    }

    /// The names of the files that rows came from.
    pub(super) fn files(&mut self) -> Vec<String> {
        std::mem::take(&mut self.files)
    }

    /// Writes the rest and makes it last; the file has no name yet.
    pub(super) fn finish(mut self, meta: &Meta) -> std::io::Result<NamedTempFile> {
        let filling = (8 - (4 * self.trailer.tokens % 8) as usize) % 8;
        self.tokens.write_all(&[0; 8][..filling])?;
        let mut hash = blake3::Hasher::new();
        hash.update(&head());
        let mut index = self.index.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        index.seek(SeekFrom::Start(0))?;
        let mut part = vec![0; BUFFER];
        loop {
            let count = index.read(&mut part)?;
            if count == 0 {
                break;
            }
            hash.update(&part[..count]);
            self.tokens.write_all(&part[..count])?;
        }
        let meta = serde_json::to_vec(meta).map_err(std::io::Error::other)?;
        hash.update(&meta);
        self.tokens.write_all(&meta)?;
        let trailer = Trailer { meta: meta.len() as u64, ..self.trailer };
        self.tokens.write_all(&trailer.to_bytes(hash))?;
        let file = self.tokens.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        file.as_file().sync_all()?;
        Ok(file)
    }
}
