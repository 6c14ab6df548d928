//! Dataset files: JSON Lines and JSON arrays, read strictly, every fault with its file and line.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::document::{Document, Origin};
use crate::error::{DataError, Result};
use crate::format::Format;
use crate::record::Layout;
use crate::strict_json::{kind, read_value, read_whole};

/// A line longer than this is refused before it is held in memory as a whole.
const MAX_LINE_BYTES: usize = 256 << 20;

/// A dataset file and how to read it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Source {
    /// A `.json` file (an array of records) or a `.jsonl` / `.ndjson` file (a record per line).
    pub path: PathBuf,
    /// How records are laid out; told from the fields of the first record when absent.
    pub format: Option<Format>,
    /// For a field of the format, the name it has in this file.
    pub columns: BTreeMap<String, String>,
    /// At most so many records are read, from the start of the file.
    pub max_samples: Option<usize>,
}

/// What one file holds.
pub(crate) struct SourceData {
    pub(crate) documents: Vec<Document>,
    pub(crate) format: Format,
    /// Columns that no field of the format reads, and in how many records they stand.
    pub(crate) ignored_columns: BTreeMap<String, usize>,
}

/// Reads every record of a dataset file.
///
/// # Errors
/// Names file, line and field of whatever cannot be read: an unknown extension, broken JSON, a key that
/// appears twice, a missing or mistyped field, an empty file, a format that cannot be told.
pub fn read_documents(source: &Source) -> Result<Vec<Document>> {
    read_source(source).map(|data| data.documents)
}

pub(crate) fn read_source(source: &Source) -> Result<SourceData> {
    Layout::check_columns(source)?;
    let mut reader = RecordReader { source, file: source.path.as_path().into(), layout: None, data: Vec::new() };
    match extension(&source.path)?.as_str() {
        "json" => reader.read_json()?,
        _ => reader.read_lines()?,
    }
    let Some(layout) = reader.layout else { return Err(DataError::EmptyFile { path: source.path.clone() }) };
    Ok(SourceData { documents: reader.data, format: layout.format, ignored_columns: layout.ignored_columns })
}

fn extension(path: &Path) -> Result<String> {
    let found = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    match found.as_str() {
        "json" | "jsonl" | "ndjson" => Ok(found),
        "pkl" | "pickle" | "pt" | "pth" | "bin" => Err(DataError::Pickle { path: path.to_owned() }),
        _ => Err(DataError::Extension { path: path.to_owned(), found }),
    }
}

struct RecordReader<'a> {
    source: &'a Source,
    file: Arc<Path>,
    layout: Option<Layout>,
    data: Vec<Document>,
}

impl RecordReader<'_> {
    fn is_full(&self) -> bool {
        self.source.max_samples.is_some_and(|limit| self.data.len() >= limit)
    }

    fn origin(&self, line: usize) -> Origin {
        Origin { file: self.file.clone(), record: self.data.len() + 1, line }
    }

    fn io(&self, source: std::io::Error) -> DataError {
        DataError::Io { path: self.source.path.clone(), source }
    }

    fn push(&mut self, value: Value, origin: Origin) -> Result<()> {
        let record = match value {
            Value::Object(record) => record,
            other => return Err(DataError::NotAnObject { origin, found: kind(&other) }),
        };
        let layout = match &mut self.layout {
            Some(layout) => layout,
            None => self.layout.insert(Layout::detect(self.source, &record, &origin)?),
        };
        self.data.push(layout.document(record, origin)?);
        Ok(())
    }

    /// A record per line; blank lines are passed over.
    fn read_lines(&mut self) -> Result<()> {
        let file = File::open(&self.source.path).map_err(|e| self.io(e))?;
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let mut line = Vec::new();
        let mut number = 0;
        while !self.is_full() {
            line.clear();
            let limit = MAX_LINE_BYTES as u64 + 1;
            if reader.by_ref().take(limit).read_until(b'\n', &mut line).map_err(|e| self.io(e))? == 0 {
                break;
            }
            number += 1;
            let origin = self.origin(number);
            if line.len() > MAX_LINE_BYTES {
                return Err(DataError::LineTooLong { origin, limit: MAX_LINE_BYTES });
            }
            let bytes = if number == 1 { without_bom(&line) } else { &line };
            // Without its end, so that a record that is cut off is reported on its own line.
            let text = utf8(bytes, &origin)?.trim_end_matches(['\n', '\r']);
            if text.trim_ascii().is_empty() {
                continue;
            }
            let value = read_whole(text).map_err(|e| json_error(e, origin.clone()))?;
            self.push(value, origin)?;
        }
        Ok(())
    }

    /// One array of records. A file that begins with an object is read as lines, as others do.
    fn read_json(&mut self) -> Result<()> {
        let bytes = std::fs::read(&self.source.path).map_err(|e| self.io(e))?;
        let bytes = without_bom(&bytes);
        let mut at = Position { bytes, offset: 0, line: 1 };
        match at.next_char() {
            None => return Ok(()),
            Some(b'[') => at.advance(1),
            Some(b'{') => {
                let origin = self.origin(at.line);
                let (_, length) = read_value(at.rest()).map_err(|e| json_error(e, origin))?;
                let spans_lines = at.rest()[..length].contains(&b'\n');
                return if spans_lines {
                    Err(DataError::NotAnArray { path: self.source.path.clone() })
                } else {
                    self.read_lines()
                };
            }
            Some(_) => {
                let origin = self.origin(at.line);
                let (value, _) = read_value(at.rest()).map_err(|e| json_error(e, origin.clone()))?;
                return Err(DataError::NotAnObject { origin, found: kind(&value) });
            }
        }
        if at.next_char() == Some(b']') {
            return Ok(());
        }
        while !self.is_full() {
            let origin = match at.next_char() {
                None => return Err(DataError::ArrayCutOff { origin: self.origin(at.line) }),
                Some(_) => self.origin(at.line),
            };
            let (value, length) = read_value(at.rest()).map_err(|e| json_error(e, origin.clone()))?;
            self.push(value, origin)?;
            at.advance(length);
            match at.next_char() {
                Some(b',') => at.advance(1),
                Some(b']') => break,
                Some(found) => {
                    let origin = Origin { record: self.data.len(), ..self.origin(at.line) };
                    return Err(DataError::ArraySyntax { origin, wanted: "`,` or `]`", found: char::from(found) });
                }
                None => return Err(DataError::ArrayCutOff { origin: self.origin(at.line) }),
            }
        }
        Ok(())
    }
}

/// A place in an array file, with its line.
struct Position<'a> {
    bytes: &'a [u8],
    offset: usize,
    line: usize,
}

impl<'a> Position<'a> {
    fn rest(&self) -> &'a [u8] {
        &self.bytes[self.offset..]
    }

    fn advance(&mut self, length: usize) {
        let passed = &self.bytes[self.offset..self.offset + length];
        self.line += passed.iter().filter(|&&b| b == b'\n').count();
        self.offset += length;
    }

    /// Passes over white space and looks at what follows.
    fn next_char(&mut self) -> Option<u8> {
        let space = self.rest().iter().take_while(|b| b.is_ascii_whitespace()).count();
        self.advance(space);
        self.rest().first().copied()
    }
}

fn without_bom(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes)
}

fn utf8<'a>(bytes: &'a [u8], origin: &Origin) -> Result<&'a str> {
    std::str::from_utf8(bytes).map_err(|source| DataError::Utf8 {
        origin: origin.clone(),
        column: source.valid_up_to() + 1,
        source,
    })
}

/// Moves serde_json's line number, which counts from the record's start, into the origin.
fn json_error(source: serde_json::Error, mut origin: Origin) -> DataError {
    origin.line += source.line().saturating_sub(1);
    let text = source.to_string();
    let problem = text.rfind(" at line ").map_or(text.as_str(), |end| &text[..end]).to_owned();
    DataError::Json { origin, column: source.column(), problem, source }
}

/// The names of a record's fields, for messages.
pub(crate) fn field_names(record: &Map<String, Value>) -> String {
    match record.is_empty() {
        true => "no field".to_owned(),
        false => record
            .keys()
            .map(|key| format!("`{key}`"))
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect::<Vec<_>>()
            .join(", "),
    }
}
