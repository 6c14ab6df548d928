//! CSV and TSV: a header, and a record per row; every value is text.

use std::io::BufRead;

use csv_core::{ReadRecordResult, Reader, ReaderBuilder};
use serde_json::{Map, Value};

use super::{At, utf8, without_bom};
use crate::document::Origin;
use crate::error::{DataError, Result};

/// More columns than any table has that is meant.
const MAX_COLUMNS: usize = 4096;

/// Reads rows by the names of the header.
pub(super) struct CsvFile<R> {
    reader: R,
    parser: Reader,
    at: At,
    limit: usize,
    columns: Vec<String>,
    done: bool,
    /// The bytes of one row, and where its fields end in them.
    row: Vec<u8>,
    ends: Vec<usize>,
}

/// How a row was read.
enum Row {
    Fields { line: usize, fields: usize },
    TooLong { line: usize },
    End,
}

impl<R: BufRead> CsvFile<R> {
    pub(super) fn open(reader: R, at: At, delimiter: u8, limit: usize) -> Result<Self> {
        let parser = ReaderBuilder::new().delimiter(delimiter).build();
        let (row, ends) = (vec![0; 4096], vec![0; 64]);
        let mut file = Self { reader, parser, at, limit, columns: Vec::new(), done: false, row, ends };
        let (line, fields) = match file.row()? {
            Row::End => return Err(DataError::EmptyFile { path: file.at.file.to_path_buf() }),
            Row::TooLong { line } => {
                return Err(DataError::LineTooLong { origin: file.at.ahead(line), limit });
            }
            Row::Fields { line, fields } => (line, fields),
        };
        let origin = Origin { file: file.at.file.clone(), record: line, line };
        for index in 0..fields {
            let bytes = file.field(index);
            let bytes = if index == 0 { without_bom(bytes) } else { bytes };
            let name = utf8(bytes, &origin)?.trim().to_owned();
            if file.columns.contains(&name) {
                return Err(DataError::ColumnTwice { origin, column: name });
            }
            file.columns.push(name);
        }
        Ok(file)
    }

    fn field(&self, index: usize) -> &[u8] {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.row[start..self.ends[index]]
    }

    /// Reads the next row into `row` and `ends`; no more than the limit is held.
    fn row(&mut self) -> Result<Row> {
        let (mut written, mut fields, mut quotes, mut started) = (0, 0, 0_usize, None);
        let mut too_long = false;
        loop {
            let buffer = self.reader.fill_buf().map_err(|error| {
                self.done = true;
                self.at.io(error)
            })?;
            if started.is_none() {
                // Line ends before a row are passed over, so the row does not begin where the parser stands.
                let space = buffer.iter().take_while(|byte| matches!(byte, b'\n' | b'\r')).count();
                let skipped = buffer[..space].iter().filter(|&&byte| byte == b'\n').count();
                if !buffer.is_empty() && space == buffer.len() {
                    self.parser.set_line(self.parser.line() + skipped as u64);
                    self.reader.consume(space);
                    continue;
                }
                started = Some(self.parser.line() as usize + skipped);
            }
            let line = started.unwrap_or_default();
            let at_end = buffer.is_empty();
            let (result, used, wrote, ended) =
                self.parser.read_record(buffer, &mut self.row[written..], &mut self.ends[fields..]);
            quotes += buffer[..used].iter().filter(|&&byte| byte == b'"').count();
            self.reader.consume(used);
            written += wrote;
            fields += ended;
            match result {
                ReadRecordResult::InputEmpty => {}
                ReadRecordResult::OutputFull if self.row.len() > self.limit => {
                    // The rest of the row is passed over.
                    too_long = true;
                    (written, fields) = (0, 0);
                }
                ReadRecordResult::OutputFull => {
                    let longer = (self.row.len() * 2).min(self.limit + 1);
                    self.row.resize(longer.max(self.row.len() + 1), 0);
                }
                ReadRecordResult::OutputEndsFull if self.ends.len() >= MAX_COLUMNS => {
                    too_long = true;
                    (written, fields) = (0, 0);
                }
                ReadRecordResult::OutputEndsFull => self.ends.resize(self.ends.len() * 2, 0),
                ReadRecordResult::Record if too_long || written > self.limit => return Ok(Row::TooLong { line }),
                ReadRecordResult::Record => {
                    // A quote that is never closed swallows every row after it.
                    let spans_lines = self.row[..written].contains(&b'\n');
                    if at_end && quotes % 2 == 1 && spans_lines {
                        self.done = true;
                        return Err(DataError::CsvQuote { origin: self.at.next(line) });
                    }
                    return Ok(Row::Fields { line, fields });
                }
                ReadRecordResult::End => return Ok(Row::End),
            }
        }
    }

    fn record(&mut self) -> Result<Option<(Value, Origin)>> {
        let (line, fields) = match self.row()? {
            Row::End => return Ok(None),
            Row::TooLong { line } => {
                return Err(DataError::LineTooLong { origin: self.at.next(line), limit: self.limit });
            }
            Row::Fields { line, fields } => (line, fields),
        };
        let origin = self.at.next(line);
        if fields != self.columns.len() {
            return Err(DataError::CsvWidth { origin, found: fields, columns: self.columns.join(", ") });
        }
        let mut record = Map::new();
        for (index, column) in self.columns.iter().enumerate() {
            let text = std::str::from_utf8(self.field(index)).map_err(|source| DataError::FieldUtf8 {
                origin: origin.clone(),
                field: column.clone(),
                source,
            })?;
            record.insert(column.clone(), Value::from(text));
        }
        Ok(Some((Value::Object(record), origin)))
    }
}

impl<R: BufRead> Iterator for CsvFile<R> {
    type Item = Result<(Value, Origin)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        self.record().transpose()
    }
}
