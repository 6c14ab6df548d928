//! Tokens kept between runs: one file for each content of data, tokenizer, template and settings.

mod key;
mod known;
mod layout;
mod reader;
mod shelf;
mod stamp;
#[cfg(test)]
mod tests;
mod writer;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::answers::AnswerKind;
use crate::dataset::{Counted, DataOptions, Prepared, check_whole};
use crate::error::{DataError, Result};
use crate::report::DataReport;
use crate::rows::Rows;
use crate::source::Source;
use crate::tokenizer::Tokenizer;
use known::Known;
use stamp::Stamps;
use writer::Writer;

pub(crate) use layout::Key;
pub(crate) use reader::TokenFile;
pub use shelf::CacheEntry;

/// What the name of a file that is not finished begins with.
const TEMPORARY: &str = ".unfinished-";

/// A folder in which tokens are kept between runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenCache {
    /// The folder; it is made when it is needed.
    pub dir: PathBuf,
    /// Data whose files are smaller than this in all is tokenised anew each time and kept in memory.
    pub min_bytes: u64,
}

impl TokenCache {
    /// So much data is tokenised in a few seconds.
    pub const WORTH_KEEPING: u64 = 16 << 20;

    /// A folder for sets of [`TokenCache::WORTH_KEEPING`] and more.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), min_bytes: Self::WORTH_KEEPING }
    }

    /// Keeps sets of any size.
    #[must_use]
    pub fn for_every_size(self) -> Self {
        Self { min_bytes: 0, ..self }
    }
}

/// Where the rows of a set came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheUse {
    /// They were made and are in memory.
    Memory,
    /// They were made, and this file keeps them.
    Written(PathBuf),
    /// This file had them.
    Found(PathBuf),
    /// They were made and are in memory, though a cache was asked for: the reason.
    Impossible(String),
}

/// Rows of tokens and what became of the records.
#[derive(Debug, Clone)]
pub struct TokenSet {
    /// The rows, in the order of the files. Rows of a pair of answers lie next to each other, the better answer first.
    pub rows: Rows,
    /// Of answers that are rated one by one, whether each is a good one; else empty.
    pub good: Vec<bool>,
    /// For each source how many of the rows, or pairs of rows, are of it and of those before it.
    pub source_ends: Vec<usize>,
    /// What became of every record.
    pub report: DataReport,
    /// Where the rows came from.
    pub cache: CacheUse,
}

/// What a file keeps besides the rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Meta {
    /// The names that rows refer to by number.
    files: Vec<String>,
    source_ends: Vec<usize>,
    /// A digit for each answer that is rated: 1 where it is good.
    good: String,
    report: DataReport,
}

/// Rows of the sources: from the cache where it has them, else made now, a part at a time, and kept in the cache, from
/// which they are mapped. Memory holds a part of the records and 16 bytes for each row, however long the data is. Without
/// a cache, or where the data is too small for it, they are made in memory as [`build_dataset`](crate::build_dataset)
/// does. Either way the rows, the report and what is refused are the same.
///
/// # Errors
/// As [`build_dataset`](crate::build_dataset); and [`DataError::CacheWrite`] when the cache cannot be written to the end.
pub fn open_dataset(
    sources: &[Source],
    tokenizer: &Tokenizer,
    options: &DataOptions,
    cache: Option<&TokenCache>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<TokenSet> {
    open(Prepared::new(sources, tokenizer, options, None)?, cache, progress)
}

/// Answers of the sources, to be compared or rated: as [`open_dataset`], with two rows for each pair. In every row only the
/// answer is trained. A pair of which one side is left out, for its length for instance, is left out whole; sides are cut
/// as `options` say.
///
/// # Errors
/// As [`open_dataset`], and [`DataError::NotPreference`] for a source of another format.
pub fn open_answers(
    sources: &[Source],
    tokenizer: &Tokenizer,
    options: &DataOptions,
    kind: AnswerKind,
    cache: Option<&TokenCache>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<TokenSet> {
    open(Prepared::new(sources, tokenizer, options, Some(kind))?, cache, progress)
}

fn open(
    prepared: Prepared<'_>,
    cache: Option<&TokenCache>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<TokenSet> {
    let Some(cache) = cache else { return in_memory(prepared, CacheUse::Memory, progress) };
    let options = prepared.options;
    let stamps = Stamps::of(prepared.files())?;
    if stamps.bytes() < cache.min_bytes {
        return in_memory(prepared, CacheUse::Memory, progress);
    }
    let key = match key::of(&prepared, &Known::new(&cache.dir))? {
        Ok(key) => key,
        Err(reason) => return in_memory(prepared, CacheUse::Impossible(reason), progress),
    };
    let path = cache.path_of(&key);
    if let Some((file, meta)) = TokenFile::open(&path, &key) {
        shelf::was_used(&path);
        return whole(file, meta, CacheUse::Found(path), options);
    }
    let writer = match Writer::create(&cache.dir, key) {
        Ok(writer) => writer,
        Err(error) => {
            let reason = format!("{}: {error}", cache.dir.display());
            return in_memory(prepared, CacheUse::Impossible(reason), progress);
        }
    };
    cache.tidy(&path);
    let (file, meta, kept) = write(prepared, writer, &stamps, &key, &path, progress)?;
    whole(file, meta, if kept { CacheUse::Written(path) } else { CacheUse::Memory }, options)
}

fn in_memory(prepared: Prepared<'_>, cache: CacheUse, progress: &mut dyn FnMut(usize, usize)) -> Result<TokenSet> {
    let (rows, Counted { report, source_ends, good }) = prepared.collect(progress)?;
    Ok(TokenSet { rows: rows.into(), good, source_ends, report, cache })
}

/// Makes the rows and writes them; the last of what it gives is whether the file got its name.
fn write(
    prepared: Prepared<'_>,
    mut writer: Writer,
    stamps: &Stamps,
    key: &Key,
    path: &std::path::Path,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(TokenFile, Meta, bool)> {
    let Counted { report, source_ends, good } =
        prepared.run(progress, &mut |example, print| writer.add(&example, print))?;
    let good = good.into_iter().map(|good| if good { '1' } else { '0' }).collect();
    let fault = |source| DataError::CacheWrite { path: path.to_owned(), source };
    let meta = Meta { files: writer.files(), source_ends, good, report };
    let unnamed = writer.finish(&meta).map_err(fault)?;
    // Mapped before it gets its name, as another process may remove the name at once.
    let (file, meta) = TokenFile::open(unnamed.path(), key)
        .ok_or_else(|| fault(std::io::Error::other("what was read back is not what was written")))?;
    // Data that changed while it was read is not what the key says. The rows are used, and nobody else gets them.
    let kept = stamps.hold();
    if kept {
        unnamed.persist(path).map_err(|error| fault(error.error))?;
        shelf::sync_folder(path);
    }
    Ok((file, meta, kept))
}

fn whole(file: TokenFile, meta: Meta, cache: CacheUse, options: &DataOptions) -> Result<TokenSet> {
    let Meta { source_ends, good, report, .. } = meta;
    let rows = Rows::from(file);
    let first = if rows.is_empty() { None } else { Some(rows.origin(0)?) };
    check_whole(&report, || first, options)?;
    Ok(TokenSet { rows, good: good.chars().map(|digit| digit == '1').collect(), source_ends, report, cache })
}
