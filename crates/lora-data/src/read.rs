//! Dataset files, read one record at a time: no reader holds more than one record, one page or one batch.

mod array;
mod columnar;
mod csv_file;
mod files;
mod input;
mod ipc_limits;
mod lines;
mod page_limits;
mod tables;
mod text_file;

pub(crate) use files::{DataFile, expand, expand_below, is_dataset_file, is_pattern};

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::document::Origin;
use crate::error::{DataError, Result};
use crate::format::Format;
use crate::source::Source;
use crate::strict_json::kind;
use files::Kind;

/// A record as a file has it, and where it stands. After an error of one record a reader goes on behind it; after an
/// error of the file it ends.
pub(crate) type Records = Box<dyn Iterator<Item = Result<(Value, Origin)>>>;

/// Opens one file.
pub(crate) fn open(file: &DataFile, source: &Source, max_record_bytes: usize) -> Result<Records> {
    let at = At::new(&file.path);
    Ok(match file.kind {
        Kind::Lines => Box::new(lines::Lines::new(input::open(file)?, at, max_record_bytes)),
        Kind::Json => Box::new(array::Array::new(input::open(file)?, at, max_record_bytes)),
        Kind::Csv(delimiter) => Box::new(csv_file::CsvFile::open(input::open(file)?, at, delimiter, max_record_bytes)?),
        Kind::Text => Box::new(text_file::TextFile::new(input::open(file)?, at, source, max_record_bytes)),
        Kind::Parquet => Box::new(tables::open_parquet(input::open_seekable(file)?, at, &Reads(source))?),
        Kind::Arrow => Box::new(tables::open_arrow(input::open_seekable(file)?, at, &Reads(source))?),
    })
}

/// Which columns a source reads: those of its format, or of every format while it is not known.
struct Reads<'a>(&'a Source);

impl Reads<'_> {
    fn column(&self, column: &str) -> bool {
        let field_of = |format: &Format| format.fields().iter().any(|field| self.0.column(field) == column);
        match &self.0.format {
            Some(format) => field_of(format),
            None => Format::ALL.iter().any(field_of),
        }
    }
}

/// The place that a reader has come to.
struct At {
    file: Arc<Path>,
    record: usize,
}

impl At {
    fn new(path: &Path) -> Self {
        Self { file: path.into(), record: 0 }
    }

    /// The next record, which begins on `line`.
    fn next(&mut self, line: usize) -> Origin {
        self.record += 1;
        self.here(line)
    }

    /// The last record that was begun.
    fn here(&self, line: usize) -> Origin {
        Origin { file: self.file.clone(), record: self.record, line }
    }

    /// The record that would come next, though it was not begun.
    fn ahead(&self, line: usize) -> Origin {
        Origin { file: self.file.clone(), record: self.record + 1, line }
    }

    fn io(&self, source: std::io::Error) -> DataError {
        DataError::Io { path: self.file.to_path_buf(), source }
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

/// A record must be an object.
pub(crate) fn object(value: Value, origin: &Origin) -> Result<Map<String, Value>> {
    match value {
        Value::Object(record) => Ok(record),
        other => Err(DataError::NotAnObject { origin: origin.clone(), found: kind(&other) }),
    }
}
