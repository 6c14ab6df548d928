//! Parquet and Arrow files: read batch by batch, given out row by row.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};

use arrow_array::RecordBatch;
use arrow_schema::{ArrowError, Schema};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Map, Value};

use super::columnar::{is_readable, row};
use super::ipc_limits::check_messages;
use super::page_limits::check_pages;
use super::{At, Reads};
use crate::document::Origin;
use crate::error::{DataError, Result};

/// Rows that are decoded together: few, because a row may hold a whole book.
const BATCH_ROWS: usize = 64;

type Batches = Box<dyn Iterator<Item = std::result::Result<RecordBatch, ArrowError>>>;

/// The rows of a table.
pub(super) struct Table {
    batches: Batches,
    batch: Option<RecordBatch>,
    next_row: usize,
    /// For each column whether it is read.
    readable: Vec<bool>,
    at: At,
    done: bool,
}

/// Opens a Parquet file: its footer and the sizes of its pages are checked before a page is unpacked.
pub(super) fn open_parquet(file: File, at: At, reads: &Reads<'_>) -> Result<Table> {
    let path = at.file.to_path_buf();
    let table = |problem: String| DataError::Table { path: path.clone(), problem };
    let opened = guarded(|| {
        let copy = file.try_clone().map_err(|error| error.to_string())?;
        let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| error.to_string())?;
        check_pages(&copy, builder.metadata())?;
        let schema = builder.schema().clone();
        let reader = builder.with_batch_size(BATCH_ROWS).build().map_err(|error| error.to_string())?;
        Ok((schema, Box::new(reader) as Batches))
    });
    let (schema, batches) = opened.map_err(table)?;
    Table::new(batches, &schema, at, reads)
}

/// The longest padding behind the magic at the start.
const MAX_PADDED: usize = 64;
/// What the file form begins and ends with.
const MAGIC: &[u8; 6] = b"ARROW1";

/// Opens an Arrow file: the stream form that `datasets` writes, or the file form (Feather version 2), which is a stream
/// with a table of contents behind it. Both are read as a stream, so that what is checked is what is read.
pub(super) fn open_arrow(file: File, at: At, reads: &Reads<'_>) -> Result<Table> {
    let path = at.file.to_path_buf();
    let table = |problem: String| DataError::Table { path: path.clone(), problem };
    let opened = guarded(|| {
        let mut file = file;
        let text = |error: ArrowError| error.to_string();
        let io = |error: std::io::Error| error.to_string();
        let start = stream_start(&mut file).map_err(io)?;
        if start > 0 && !ends_with_magic(&mut file).map_err(io)? {
            return Err("its end is missing; the file was cut off".to_owned());
        }
        check_messages(&file, start)?;
        file.seek(SeekFrom::Start(start)).map_err(io)?;
        let reader = arrow_ipc::reader::StreamReader::try_new(BufReader::new(file), None).map_err(text)?;
        Ok((reader.schema(), Box::new(reader) as Batches))
    });
    let (schema, batches) = opened.map_err(table)?;
    Table::new(batches, &schema, at, reads)
}

/// Where the stream begins: behind the magic and its padding, to 8 bytes or, as some writers have it, to 64.
fn stream_start(file: &mut File) -> std::io::Result<u64> {
    let mut head = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.by_ref().take(MAX_PADDED as u64).read_to_end(&mut head)?;
    if head.len() < 8 || !head.starts_with(MAGIC) {
        return Ok(0);
    }
    let padding = head[8..].chunks(8).take_while(|chunk| chunk.iter().all(|&byte| byte == 0)).count();
    Ok(8 + 8 * padding as u64)
}

fn ends_with_magic(file: &mut File) -> std::io::Result<bool> {
    let mut end = [0; 6];
    file.seek(SeekFrom::End(-6))?;
    file.read_exact(&mut end)?;
    Ok(&end == MAGIC)
}

/// The libraries panic on some damaged files.
fn guarded<T>(work: impl FnOnce() -> std::result::Result<T, String>) -> std::result::Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err("the file is damaged".to_owned()))
}

impl Table {
    fn new(batches: Batches, schema: &Schema, at: At, reads: &Reads<'_>) -> Result<Self> {
        let mut readable = Vec::with_capacity(schema.fields().len());
        for (index, field) in schema.fields().iter().enumerate() {
            let is_known = is_readable(field.data_type());
            if !is_known && reads.column(field.name()) {
                return Err(DataError::ColumnType {
                    path: at.file.to_path_buf(),
                    column: field.name().clone(),
                    found: field.data_type().to_string(),
                });
            }
            if schema.fields().iter().take(index).any(|other| other.name() == field.name()) {
                let origin = Origin { file: at.file.clone(), record: 1, line: 1 };
                return Err(DataError::ColumnTwice { origin, column: field.name().clone() });
            }
            readable.push(is_known);
        }
        Ok(Self { batches, batch: None, next_row: 0, readable, at, done: false })
    }

    fn record(&mut self) -> Result<Option<(Value, Origin)>> {
        loop {
            if let Some(batch) = &self.batch
                && self.next_row < batch.num_rows()
            {
                let index = self.next_row;
                self.next_row += 1;
                // Tables have no lines: the row's number stands for both.
                let origin = self.at.next(self.at.record + 1);
                let record = guarded(|| row(batch, index, &self.readable));
                let record: Map<String, Value> =
                    record.map_err(|problem| DataError::Row { origin: origin.clone(), problem })?;
                return Ok(Some((Value::Object(record), origin)));
            }
            let next = guarded(|| self.batches.next().transpose().map_err(|error| error.to_string()));
            match next {
                Ok(None) => return Ok(None),
                Ok(Some(batch)) => (self.batch, self.next_row) = (Some(batch), 0),
                Err(problem) => {
                    self.done = true;
                    return Err(DataError::Table { path: self.at.file.to_path_buf(), problem });
                }
            }
        }
    }
}

impl Iterator for Table {
    type Item = Result<(Value, Origin)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        self.record().transpose()
    }
}
