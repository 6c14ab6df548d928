//! Sizes of Parquet pages, checked before any page is unpacked.
//!
//! A page header says how many bytes its page unpacks to, and a reader takes that much memory. A small file can so ask
//! for gigabytes; the headers are therefore walked first. They are Thrift structures in the compact protocol, of which
//! the first three fields are of interest: the page's kind, its size unpacked and its size in the file
//! (`PageHeader` in Apache Parquet's `parquet.thrift`).

use std::fs::File;
use std::io::{BufReader, Read, Seek};

use parquet::basic::Compression;
use parquet::file::metadata::ParquetMetaData;

/// Writers aim at one megabyte.
const MAX_PAGE_BYTES: u64 = 256 << 20;
/// Headers hold statistics, but nothing large.
const MAX_HEADER_BYTES: u64 = 16 << 20;

/// Walks the pages of every column chunk.
pub(super) fn check_pages(file: &File, metadata: &ParquetMetaData) -> Result<(), String> {
    let length = file.metadata().map_err(|error| error.to_string())?.len();
    for (group, row_group) in metadata.row_groups().iter().enumerate() {
        for column in row_group.columns() {
            let name = column.column_path().string();
            let named = |problem: String| format!("column `{name}` of row group {group}: {problem}");
            let starts = [column.dictionary_page_offset(), Some(column.data_page_offset())];
            let start = starts.into_iter().flatten().filter(|&at| at > 0).min().unwrap_or(column.data_page_offset());
            let (Ok(start), Ok(size)) = (u64::try_from(start), u64::try_from(column.compressed_size())) else {
                return Err(named("its place in the file is negative".to_owned()));
            };
            let end = start.checked_add(size).filter(|&end| end <= length);
            let end = end.ok_or_else(|| named("it lies outside of the file, which was cut off".to_owned()))?;
            walk(file, start, end, column.compression()).map_err(named)?;
        }
    }
    Ok(())
}

fn walk(file: &File, start: u64, end: u64, compression: Compression) -> Result<(), String> {
    let io = |error: std::io::Error| error.to_string();
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let mut at = start;
    while at < end {
        let now = reader.stream_position().map_err(io)?;
        reader.seek_relative(at as i64 - now as i64).map_err(io)?;
        let mut thrift = Thrift { reader: reader.by_ref().take((end - at).min(MAX_HEADER_BYTES)), used: 0 };
        let page = thrift.page_header()?;
        let body = at + thrift.used;
        let next = body.checked_add(page.compressed).filter(|&next| next <= end && next > at);
        let next = next.ok_or("a page goes beyond its column")?;
        if page.uncompressed > MAX_PAGE_BYTES {
            return Err(format!(
                "a page unpacks to {} bytes, more than the {MAX_PAGE_BYTES} that are accepted; write the file with smaller pages",
                page.uncompressed
            ));
        }
        if matches!(compression, Compression::GZIP(_)) {
            // This codec does not stop at the size that the header names.
            let packed = reader.by_ref().take(page.compressed);
            let mut unpacked = flate2::read::MultiGzDecoder::new(packed).take(MAX_PAGE_BYTES + 1);
            let size = std::io::copy(&mut unpacked, &mut std::io::sink()).map_err(io)?;
            if size > MAX_PAGE_BYTES {
                return Err(format!("a page unpacks to more than the {MAX_PAGE_BYTES} bytes that are accepted"));
            }
        }
        at = next;
    }
    Ok(())
}

struct Page {
    uncompressed: u64,
    compressed: u64,
}

/// Reads the compact protocol of Thrift.
struct Thrift<R> {
    reader: R,
    used: u64,
}

impl<R: Read> Thrift<R> {
    fn byte(&mut self) -> Result<u8, String> {
        let mut byte = [0];
        self.reader.read_exact(&mut byte).map_err(|_| "a page header is cut off".to_owned())?;
        self.used += 1;
        Ok(byte[0])
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("a page header holds a number that is too long".to_owned())
    }

    fn zigzag(&mut self) -> Result<i64, String> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    fn pass(&mut self, bytes: u64) -> Result<(), String> {
        (0..bytes).try_for_each(|_| self.byte().map(|_| ()))
    }

    /// Whether another field follows, with its number and kind.
    fn field(&mut self, last: &mut i64) -> Result<Option<u8>, String> {
        let byte = self.byte()?;
        if byte == 0 {
            return Ok(None);
        }
        *last = match byte >> 4 {
            0 => self.zigzag()?,
            delta => last.wrapping_add(i64::from(delta)),
        };
        Ok(Some(byte & 0x0F))
    }

    fn page_header(&mut self) -> Result<Page, String> {
        let (mut uncompressed, mut compressed, mut number) = (None, None, 0);
        while let Some(kind) = self.field(&mut number)? {
            match (number, kind) {
                (2, 5) => uncompressed = Some(self.zigzag()?),
                (3, 5) => compressed = Some(self.zigzag()?),
                _ => self.skip(kind, 0)?,
            }
        }
        let size = |value: Option<i64>| value.and_then(|value| u64::try_from(value).ok());
        match (size(uncompressed), size(compressed)) {
            (Some(uncompressed), Some(compressed)) => Ok(Page { uncompressed, compressed }),
            _ => Err("a page header has no sizes".to_owned()),
        }
    }

    fn skip(&mut self, kind: u8, depth: usize) -> Result<(), String> {
        if depth > 16 {
            return Err("a page header is nested too deep".to_owned());
        }
        match kind {
            1 | 2 => Ok(()),
            3 => self.pass(1),
            4..=6 => self.varint().map(|_| ()),
            7 => self.pass(8),
            8 => {
                let length = self.varint()?;
                self.pass(length)
            }
            9 | 10 => {
                let byte = self.byte()?;
                let count = if byte >> 4 == 15 { self.varint()? } else { u64::from(byte >> 4) };
                (0..count).try_for_each(|_| self.item(byte & 0x0F, depth))
            }
            11 => {
                let count = self.varint()?;
                let kinds = if count > 0 { self.byte()? } else { 0 };
                (0..count).try_for_each(|_| {
                    self.item(kinds >> 4, depth)?;
                    self.item(kinds & 0x0F, depth)
                })
            }
            12 => {
                let mut number = 0;
                while let Some(kind) = self.field(&mut number)? {
                    self.skip(kind, depth + 1)?;
                }
                Ok(())
            }
            _ => Err("a page header holds a field of an unknown kind".to_owned()),
        }
    }

    /// Booleans in a list take a byte, unlike in a field; each item so takes at least one, and the header ends them all.
    fn item(&mut self, kind: u8, depth: usize) -> Result<(), String> {
        match kind {
            1 | 2 => self.pass(1),
            other => self.skip(other, depth + 1),
        }
    }
}
