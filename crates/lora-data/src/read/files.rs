//! From a path to the files that it means: a file, a folder or a pattern.

use std::path::{Path, PathBuf};

use crate::error::{DataError, Result};

/// One dataset file and how its bytes are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DataFile {
    pub(crate) path: PathBuf,
    pub(crate) kind: Kind,
    pub(crate) compression: Compression,
}

/// What the bytes are, by extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Json,
    Lines,
    /// With the byte between fields.
    Csv(u8),
    Parquet,
    Arrow,
    Text,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

/// The files that `path` means, in the order of their names, so that every machine reads them alike. A folder means the
/// dataset files right in it and those of its subfolders; hidden ones and files of other kinds are passed over.
pub(crate) fn expand(path: &Path) -> Result<Vec<DataFile>> {
    let files = if path.is_dir() {
        let mut found = Vec::new();
        walk(path, 0, &mut found)?;
        found
    } else if !path.exists() && is_pattern(path) {
        matching(path)?
    } else {
        return Ok(vec![data_file(path)?]);
    };
    if files.is_empty() {
        return Err(DataError::NoFiles { path: path.to_owned() });
    }
    one_kind(path, &files)?;
    Ok(files)
}

/// The files that `inner` means below `folder`; all of them where it is empty.
pub(crate) fn expand_below(folder: &Path, inner: &Path) -> Result<Vec<DataFile>> {
    if inner.as_os_str().is_empty() {
        return expand(folder);
    }
    let escaped = glob::Pattern::escape(&folder.to_string_lossy());
    if is_pattern(inner) { expand(&Path::new(&escaped).join(inner)) } else { expand(&folder.join(inner)) }
}

/// Folders within folders are followed so far.
const MAX_DEPTH: usize = 8;

fn walk(folder: &Path, depth: usize, found: &mut Vec<DataFile>) -> Result<()> {
    let io = |source| DataError::Io { path: folder.to_owned(), source };
    let mut entries: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        entries.push(entry.map_err(io)?.path());
    }
    entries.sort();
    for path in entries {
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(['.', '_']));
        if hidden || describes(&path) {
            continue;
        }
        if path.is_dir() {
            if depth < MAX_DEPTH {
                walk(&path, depth + 1, found)?;
            }
        } else if let Ok(file) = data_file(&path) {
            found.push(file);
        }
    }
    Ok(())
}

/// Whether a file says something of a dataset and is none.
fn describes(path: &Path) -> bool {
    let known = ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"];
    path.file_name().is_some_and(|name| known.iter().any(|known| name == *known))
}

/// Whether a file is one that a folder is searched for, by its name.
pub(crate) fn is_dataset_file(path: &Path) -> bool {
    !describes(path) && data_file(path).is_ok()
}

pub(crate) fn is_pattern(path: &Path) -> bool {
    path.to_string_lossy().contains(['*', '?', '['])
}

fn matching(pattern: &Path) -> Result<Vec<DataFile>> {
    let text = pattern.to_string_lossy();
    // As a shell has it, `*` means no hidden file.
    let options = glob::MatchOptions { require_literal_leading_dot: true, ..glob::MatchOptions::new() };
    let paths =
        glob::glob_with(&text, options).map_err(|source| DataError::Pattern { path: pattern.to_owned(), source })?;
    let mut found = Vec::new();
    for path in paths {
        let path = path.map_err(|error| DataError::Io { path: error.path().to_owned(), source: error.into() })?;
        if path.is_file() {
            found.push(data_file(&path)?);
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// Files of different kinds in one folder are seldom one dataset: their columns would not agree.
fn one_kind(path: &Path, files: &[DataFile]) -> Result<()> {
    let Some((first, rest)) = files.split_first() else { return Ok(()) };
    match rest.iter().find(|file| file.kind != first.kind) {
        None => Ok(()),
        Some(other) => {
            Err(DataError::MixedFiles { path: path.to_owned(), first: first.path.clone(), other: other.path.clone() })
        }
    }
}

/// How the file is read, told from its extensions alone.
fn data_file(path: &Path) -> Result<DataFile> {
    let lower = |path: &Path| path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    let last = lower(path);
    let (compression, found) = match last.as_str() {
        "gz" | "gzip" => (Compression::Gzip, lower(Path::new(path.file_stem().unwrap_or_default()))),
        "zst" | "zstd" => (Compression::Zstd, lower(Path::new(path.file_stem().unwrap_or_default()))),
        _ => (Compression::None, last),
    };
    let kind = match found.as_str() {
        "json" => Kind::Json,
        "jsonl" | "ndjson" => Kind::Lines,
        "csv" => Kind::Csv(b','),
        "tsv" => Kind::Csv(b'\t'),
        "parquet" | "pq" => Kind::Parquet,
        "arrow" | "feather" | "ipc" => Kind::Arrow,
        "txt" | "text" => Kind::Text,
        "pkl" | "pickle" | "pt" | "pth" | "bin" => return Err(DataError::Pickle { path: path.to_owned() }),
        _ => return Err(DataError::Extension { path: path.to_owned(), found }),
    };
    Ok(DataFile { path: path.to_owned(), kind, compression })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_tell_kind_and_compression() {
        let file = |name: &str| data_file(Path::new(name)).map(|file| (file.kind, file.compression));
        assert_eq!(file("a.JSONL").unwrap(), (Kind::Lines, Compression::None));
        assert_eq!(file("a.b.csv.gz").unwrap(), (Kind::Csv(b','), Compression::Gzip));
        assert_eq!(file("a.txt.zst").unwrap(), (Kind::Text, Compression::Zstd));
        assert!(matches!(file("a.pkl"), Err(DataError::Pickle { .. })));
        assert!(matches!(file("a.gz"), Err(DataError::Extension { .. })));
        assert!(matches!(file("a"), Err(DataError::Extension { .. })));
    }
}
