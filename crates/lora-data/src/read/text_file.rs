//! Plain text: a record for each line, each paragraph or the whole file.

use std::io::BufRead;

use serde_json::{Map, Value};

use super::lines::{Line, LineReader};
use super::{At, utf8};
use crate::document::Origin;
use crate::error::{DataError, Result};
use crate::source::{Source, TextBy};

/// Reads records with one field, `text`, or with `prompt` and `completion` where lines have a separator.
pub(super) struct TextFile<R> {
    lines: LineReader<R>,
    at: At,
    by: TextBy,
    separator: Option<String>,
    done: bool,
}

/// What the next line is.
enum Next {
    Text(usize, String),
    Blank,
    End,
}

impl<R: BufRead> TextFile<R> {
    pub(super) fn new(reader: R, at: At, source: &Source, limit: usize) -> Self {
        let separator = source.separator.clone();
        Self { lines: LineReader::new(reader, limit), at, by: source.text_by, separator, done: false }
    }

    fn line(&mut self) -> Result<Next> {
        match self.lines.next_line() {
            Err(error) => {
                self.done = true;
                Err(self.at.io(error))
            }
            Ok(None) => Ok(Next::End),
            Ok(Some(Line::TooLong { number })) => {
                let limit = self.lines.limit();
                Err(DataError::LineTooLong { origin: self.at.next(number), limit })
            }
            Ok(Some(Line::Whole { number, bytes })) => {
                let text = match utf8(bytes, &self.at.ahead(number)) {
                    Ok(text) => text,
                    Err(error) => {
                        self.at.next(number);
                        return Err(error);
                    }
                };
                Ok(if text.trim().is_empty() { Next::Blank } else { Next::Text(number, text.to_owned()) })
            }
        }
    }

    fn by_line(&mut self) -> Result<Option<(Value, Origin)>> {
        loop {
            return match self.line()? {
                Next::End => Ok(None),
                Next::Blank => continue,
                Next::Text(number, text) => {
                    let origin = self.at.next(number);
                    self.fields(text, &origin).map(|value| Some((value, origin)))
                }
            };
        }
    }

    /// One field, or two where a separator is set.
    fn fields(&self, text: String, origin: &Origin) -> Result<Value> {
        let mut record = Map::new();
        match &self.separator {
            None => {
                record.insert("text".to_owned(), Value::String(text));
            }
            Some(separator) => {
                let Some((prompt, completion)) = text.split_once(separator.as_str()) else {
                    return Err(DataError::NoSeparator { origin: origin.clone(), separator: separator.clone() });
                };
                record.insert("prompt".to_owned(), Value::from(prompt));
                record.insert("completion".to_owned(), Value::from(completion));
            }
        }
        Ok(Value::Object(record))
    }

    /// Lines up to a blank one, or up to the end of the file.
    fn gathered(&mut self) -> Result<Option<(Value, Origin)>> {
        let whole = self.by == TextBy::Document;
        let mut text = String::new();
        let mut first = None;
        let mut blank = 0;
        loop {
            match self.line()? {
                Next::End => break,
                Next::Blank if first.is_some() && !whole => break,
                Next::Blank => blank += usize::from(first.is_some()),
                Next::Text(number, line) => {
                    if first.is_some() {
                        text.extend(std::iter::repeat_n('\n', blank + 1));
                    }
                    blank = 0;
                    first.get_or_insert(number);
                    text.push_str(&line);
                    if text.len() > self.lines.limit() {
                        // Where a record of this kind would go on cannot be told.
                        self.done = true;
                        let limit = self.lines.limit();
                        return Err(DataError::LineTooLong { origin: self.at.next(number), limit });
                    }
                }
            }
        }
        let Some(first) = first else { return Ok(None) };
        let origin = self.at.next(first);
        self.fields(text, &origin).map(|value| Some((value, origin)))
    }
}

impl<R: BufRead> Iterator for TextFile<R> {
    type Item = Result<(Value, Origin)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        match self.by {
            TextBy::Line => self.by_line().transpose(),
            TextBy::Paragraph | TextBy::Document => self.gathered().transpose(),
        }
    }
}
