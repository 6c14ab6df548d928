//! JSON Lines: a record per line.

use std::io::{BufRead, Read};

use serde_json::Value;

use super::{At, json_error, utf8, without_bom};
use crate::document::Origin;
use crate::error::{DataError, Result};
use crate::strict_json::read_whole;

/// Reads a record from each line; blank lines are passed over.
pub(super) struct Lines<R> {
    lines: LineReader<R>,
    at: At,
    /// Set for a `.json` file that begins with an object: a line that is cut off then means one object over many lines.
    pub(super) from_json: bool,
    done: bool,
}

impl<R: BufRead> Lines<R> {
    pub(super) fn new(reader: R, at: At, limit: usize) -> Self {
        Self { lines: LineReader::new(reader, limit), at, from_json: false, done: false }
    }

    /// Lines of the file that were passed over before.
    pub(super) fn skip_numbers(&mut self, before: usize) {
        self.lines.number += before;
    }

    fn record(&mut self) -> Result<Option<(Value, Origin)>> {
        loop {
            let line = match self.lines.next_line() {
                Ok(None) => return Ok(None),
                Ok(Some(line)) => line,
                Err(error) => {
                    self.done = true;
                    return Err(self.at.io(error));
                }
            };
            let (number, bytes) = match line {
                Line::Whole { number, bytes } => (number, bytes),
                Line::TooLong { number } => {
                    let limit = self.lines.limit();
                    return Err(DataError::LineTooLong { origin: self.at.next(number), limit });
                }
            };
            if bytes.trim_ascii().is_empty() {
                continue;
            }
            let origin = self.at.next(number);
            let text = utf8(bytes, &origin)?;
            return match read_whole(text) {
                Ok(value) => Ok(Some((value, origin))),
                Err(error) if self.from_json && error.is_eof() => {
                    self.done = true;
                    Err(DataError::NotAnArray { path: self.at.file.to_path_buf() })
                }
                Err(error) => Err(json_error(error, origin)),
            };
        }
    }
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = Result<(Value, Origin)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        self.record().transpose()
    }
}

/// One line without its end.
pub(super) enum Line<'a> {
    Whole {
        number: usize,
        bytes: &'a [u8],
    },
    /// Longer than the limit; it was passed over without being held.
    TooLong {
        number: usize,
    },
}

/// Reads lines, none of which is held beyond a limit.
pub(super) struct LineReader<R> {
    reader: R,
    limit: usize,
    pub(super) number: usize,
    line: Vec<u8>,
}

impl<R: BufRead> LineReader<R> {
    pub(super) fn new(reader: R, limit: usize) -> Self {
        Self { reader, limit, number: 0, line: Vec::new() }
    }

    /// The limit in bytes.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    pub(super) fn next_line(&mut self) -> std::io::Result<Option<Line<'_>>> {
        self.line.clear();
        // The end of the line counts too: `\r\n` at most.
        let most = self.limit as u64 + 2;
        if self.reader.by_ref().take(most).read_until(b'\n', &mut self.line)? == 0 {
            return Ok(None);
        }
        self.number += 1;
        let number = self.number;
        let ended = self.line.ends_with(b"\n");
        let mut bytes = self.line.as_slice();
        if ended {
            bytes = &bytes[..bytes.len() - 1];
            bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
        }
        if bytes.len() > self.limit {
            if !ended {
                pass_line(&mut self.reader)?;
            }
            return Ok(Some(Line::TooLong { number }));
        }
        let bytes = if number == 1 { without_bom(bytes) } else { bytes };
        Ok(Some(Line::Whole { number, bytes }))
    }
}

/// Passes over the rest of a line.
fn pass_line(reader: &mut impl BufRead) -> std::io::Result<()> {
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(());
        }
        let end = buffer.iter().position(|&byte| byte == b'\n');
        let length = end.map_or(buffer.len(), |end| end + 1);
        reader.consume(length);
        if end.is_some() {
            return Ok(());
        }
    }
}
