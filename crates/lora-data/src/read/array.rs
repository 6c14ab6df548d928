//! A JSON file: an array of records, taken apart without reading the whole of it.

use std::io::BufRead;

use serde_json::Value;

use super::lines::Lines;
use super::{At, json_error};
use crate::document::Origin;
use crate::error::{DataError, Result};
use crate::strict_json::{kind, read_value};

/// Reads the records of one array. A file that begins with an object is read as lines, as others do.
pub(super) struct Array<R> {
    state: State<R>,
    limit: usize,
}

enum State<R> {
    /// Nothing was read yet.
    Start(R, At),
    Inside(Scanner<R>, At),
    Lines(Box<Lines<R>>),
    Done,
}

/// A record that was found: its bytes, or that they are too many.
enum Element {
    Whole { line: usize, bytes: Vec<u8> },
    TooLong { line: usize },
}

impl<R: BufRead> Array<R> {
    pub(super) fn new(reader: R, at: At, limit: usize) -> Self {
        Self { state: State::Start(reader, at), limit }
    }

    /// Looks at how the file begins.
    fn start(&mut self, reader: R, at: At) -> Result<()> {
        let mut scanner = Scanner { reader, line: 1 };
        match scanner.pass_bom().and_then(|()| scanner.next_byte()).map_err(|e| at.io(e))? {
            None => {}
            Some(b'[') => {
                scanner.step();
                match scanner.next_byte().map_err(|e| at.io(e))? {
                    Some(b']') => {
                        scanner.step();
                        ends(&mut scanner, &at)?;
                    }
                    _ => self.state = State::Inside(scanner, at),
                }
            }
            Some(b'{') => {
                let before = scanner.line - 1;
                let mut lines = Lines::new(scanner.reader, at, self.limit);
                lines.from_json = true;
                lines.skip_numbers(before);
                self.state = State::Lines(Box::new(lines));
            }
            Some(_) => {
                let origin = at.ahead(scanner.line);
                let value = match scanner.element(self.limit).map_err(|e| at.io(e))? {
                    Element::TooLong { .. } => {
                        return Err(DataError::LineTooLong { origin, limit: self.limit });
                    }
                    Element::Whole { bytes, .. } => parse(&bytes, &origin)?,
                };
                return Err(DataError::NotAnObject { origin, found: kind(&value) });
            }
        }
        Ok(())
    }

    /// One record, and whether another may follow.
    fn record(scanner: &mut Scanner<R>, at: &mut At, limit: usize) -> (Result<(Value, Origin)>, bool) {
        match scanner.next_byte() {
            Err(error) => return (Err(at.io(error)), false),
            Ok(None) => return (Err(DataError::ArrayCutOff { origin: at.ahead(scanner.line) }), false),
            Ok(Some(_)) => {}
        }
        let element = match scanner.element(limit) {
            Err(error) => return (Err(at.io(error)), false),
            Ok(element) => element,
        };
        let found = match element {
            Element::TooLong { line } => Err(DataError::LineTooLong { origin: at.next(line), limit }),
            Element::Whole { line, bytes } => {
                let origin = at.next(line);
                parse(&bytes, &origin).map(|value| (value, origin))
            }
        };
        let problem = match scanner.next_byte() {
            Err(error) => at.io(error),
            Ok(Some(b',')) => {
                scanner.step();
                return (found, true);
            }
            Ok(Some(b']')) => {
                scanner.step();
                match ends(scanner, at) {
                    Ok(()) => return (found, false),
                    Err(error) => error,
                }
            }
            Ok(Some(other)) => {
                let (wanted, found) = ("`,` or `]`", char::from(other));
                DataError::ArraySyntax { origin: at.here(scanner.line), wanted, found }
            }
            Ok(None) => DataError::ArrayCutOff { origin: at.ahead(scanner.line) },
        };
        // The first fault is the one to look at.
        (found.and(Err(problem)), false)
    }
}

fn parse(bytes: &[u8], origin: &Origin) -> Result<Value> {
    let (value, length) = read_value(bytes).map_err(|error| json_error(error, origin.clone()))?;
    match bytes.get(length..).unwrap_or_default().first() {
        None => Ok(value),
        Some(&byte) => {
            let (wanted, found) = ("`,` or `]`", char::from(byte));
            Err(DataError::ArraySyntax { origin: origin.clone(), wanted, found })
        }
    }
}

/// Nothing but white space may follow the array.
fn ends<R: BufRead>(scanner: &mut Scanner<R>, at: &At) -> Result<()> {
    match scanner.next_byte().map_err(|e| at.io(e))? {
        None => Ok(()),
        Some(byte) => {
            let (wanted, found) = ("the end of the file", char::from(byte));
            Err(DataError::ArraySyntax { origin: at.here(scanner.line), wanted, found })
        }
    }
}

impl<R: BufRead> Iterator for Array<R> {
    type Item = Result<(Value, Origin)>;

    fn next(&mut self) -> Option<Self::Item> {
        if matches!(self.state, State::Start(..))
            && let State::Start(reader, at) = std::mem::replace(&mut self.state, State::Done)
            && let Err(error) = self.start(reader, at)
        {
            return Some(Err(error));
        }
        match &mut self.state {
            State::Start(..) | State::Done => None,
            State::Lines(lines) => lines.next(),
            State::Inside(scanner, at) => {
                let (found, more) = Self::record(scanner, at, self.limit);
                if !more {
                    self.state = State::Done;
                }
                Some(found)
            }
        }
    }
}

/// Goes over JSON text byte by byte and counts lines.
struct Scanner<R> {
    reader: R,
    line: usize,
}

impl<R: BufRead> Scanner<R> {
    fn pass_bom(&mut self) -> std::io::Result<()> {
        if self.reader.fill_buf()?.starts_with(b"\xEF\xBB\xBF") {
            self.reader.consume(3);
        }
        Ok(())
    }

    /// Passes over the byte that was looked at, which is no line's end.
    fn step(&mut self) {
        self.reader.consume(1);
    }

    /// Passes over white space and looks at what follows.
    fn next_byte(&mut self) -> std::io::Result<Option<u8>> {
        loop {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                return Ok(None);
            }
            let space = buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            self.line += newlines(&buffer[..space]);
            let next = buffer.get(space).copied();
            self.reader.consume(space);
            if next.is_some() {
                return Ok(next);
            }
        }
    }

    /// The bytes up to the end of the value that begins here; no more than `limit` of them are held. Brackets are
    /// counted outside of strings, whatever their kind: what is wrong inside, the parser says.
    fn element(&mut self, limit: usize) -> std::io::Result<Element> {
        let line = self.line;
        let mut bytes = Vec::new();
        let mut too_long = false;
        let (mut depth, mut in_string, mut escaped, mut nested) = (0_usize, false, false, false);
        loop {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                break;
            }
            let (mut used, mut ended) = (0, false);
            for &byte in buffer {
                if in_string {
                    in_string = byte != b'"' || escaped;
                    escaped = byte == b'\\' && !escaped;
                } else {
                    match byte {
                        b'"' => in_string = true,
                        b'[' | b'{' => (depth, nested) = (depth + 1, true),
                        b']' | b'}' if depth > 0 => depth -= 1,
                        b',' | b']' | b'}' if depth == 0 => ended = true,
                        _ if byte.is_ascii_whitespace() && depth == 0 => ended = true,
                        _ => {}
                    }
                    if ended {
                        break;
                    }
                }
                used += 1;
                if nested && depth == 0 && !in_string {
                    ended = true;
                    break;
                }
            }
            too_long |= bytes.len() + used > limit;
            if too_long {
                bytes = Vec::new();
            } else {
                bytes.extend_from_slice(&buffer[..used]);
            }
            self.line += newlines(&buffer[..used]);
            self.reader.consume(used);
            if ended {
                break;
            }
        }
        Ok(if too_long { Element::TooLong { line } } else { Element::Whole { line, bytes } })
    }
}

fn newlines(bytes: &[u8]) -> usize {
    bytes.iter().filter(|&&byte| byte == b'\n').count()
}
