//! What chat templates expect of Python: `json.dumps`, and string methods that the engine's own set lacks.

use std::fmt::Write;

use minijinja::value::{Kwargs, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

use crate::template_weight::{MAX_DEPTH, charge_nested};

/// The longest indent or separator.
const MAX_LAYOUT: usize = 64;

fn invalid(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

/// The filter `tojson` as chat templates know it: `json.dumps` without HTML escaping and with non-ASCII text kept.
pub(crate) fn tojson(state: &State<'_, '_>, value: Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent = match kwargs.get::<Option<Value>>("indent")? {
        None => None,
        Some(value) if value.is_none() => None,
        Some(value) => match (value.as_str(), value.as_i64()) {
            (Some(text), _) => Some(text.to_owned()),
            (_, Some(width)) if width <= MAX_LAYOUT as i64 => Some(" ".repeat(usize::try_from(width).unwrap_or(0))),
            _ => return Err(invalid("tojson: indent must be a small number or a string")),
        },
    };
    let (mut item, mut key) = if indent.is_some() { (",", ": ") } else { (", ", ": ") };
    let separators = kwargs.get::<Option<Vec<Value>>>("separators")?;
    match separators.as_deref() {
        None => {}
        Some([a, b]) => match (a.as_str(), b.as_str()) {
            (Some(a), Some(b)) => (item, key) = (a, b),
            _ => return Err(invalid("tojson: separators must be strings")),
        },
        Some(_) => return Err(invalid("tojson: separators must be a pair")),
    }
    if item.len().max(key.len()).max(indent.as_ref().map_or(0, String::len)) > MAX_LAYOUT {
        return Err(invalid("tojson: indent or separator is too long"));
    }
    let mut json = Json {
        state,
        out: String::new(),
        charged: 0,
        indent: indent.as_deref(),
        item,
        key,
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    json.value(&value, 0)?;
    Ok(json.out)
}

/// The filter `string`.
pub(crate) fn string(state: &State<'_, '_>, value: &Value) -> Result<Value, Error> {
    charge_nested(state, value, 0)?;
    minijinja::filters::string(state, value)
}

/// The test `iterable`: whether Python could loop over the value, which it cannot over `None`.
pub(crate) fn is_iterable(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::String | ValueKind::Seq | ValueKind::Iterable | ValueKind::Map | ValueKind::Undefined
    )
}

struct Json<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    out: String,
    /// Bytes of `out` that were paid for in fuel.
    charged: usize,
    indent: Option<&'a str>,
    item: &'a str,
    key: &'a str,
    sort_keys: bool,
    ensure_ascii: bool,
}

impl Json<'_, '_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        // A value may hold another many times over, so pay while writing and not at the end.
        self.state.consume_fuel(1 + (self.out.len() - self.charged) as u64 / 16)?;
        self.charged = self.out.len();
        if depth > MAX_DEPTH {
            return Err(invalid("tojson: nested too deep"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.out.push_str(&value.to_string()),
            ValueKind::Number => {
                let number = f64::try_from(value.clone())?;
                self.out.push_str(&float(number));
            }
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.out.push('[');
                let mut empty = true;
                for item in value.try_iter()? {
                    self.separate(&mut empty, depth + 1);
                    self.value(&item, depth + 1)?;
                }
                self.close(empty, depth, ']');
            }
            ValueKind::Map => {
                self.out.push('{');
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                let mut empty = true;
                for name in keys {
                    self.separate(&mut empty, depth + 1);
                    match name.as_str() {
                        Some(text) => self.string(text),
                        None => {
                            let text = name.to_string();
                            self.string(&text);
                        }
                    }
                    self.out.push_str(self.key);
                    self.value(&value.get_item(&name)?, depth + 1)?;
                }
                self.close(empty, depth, '}');
            }
            other => return Err(invalid(format!("tojson: {other} has no JSON form"))),
        }
        Ok(())
    }

    fn separate(&mut self, empty: &mut bool, depth: usize) {
        if !std::mem::replace(empty, false) {
            self.out.push_str(self.item);
        }
        self.new_line(depth);
    }

    fn close(&mut self, empty: bool, depth: usize, bracket: char) {
        if !empty {
            self.new_line(depth);
        }
        self.out.push(bracket);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// A float as Python writes it: shortest digits, exponent below 1e-4 and from 1e16.
fn float(number: f64) -> String {
    if number.is_nan() {
        return "NaN".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let size = number.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{number:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let text = number.to_string();
    if text.contains('.') { text } else { text + ".0" }
}

/// Methods of Python's strings, lists and dictionaries.
pub(crate) fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    // `join` and `format` write out what they are given, `count` compares it.
    if name == "count" {
        charge_nested(state, value, 0)?;
    }
    args.iter().try_for_each(|arg| charge_nested(state, arg, 0))?;
    let Some(text) = value.as_str() else { return pycompat::unknown_method_callback(state, value, name, args) };
    match name {
        // The engine makes the padded text before it pays for it.
        "format" if text.split(|c: char| !c.is_ascii_digit()).any(|digits| digits.len() > 4) => {
            Err(invalid("format: a width is too large"))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let parts = if name == "partition" { text.split_once(separator) } else { text.rsplit_once(separator) };
            let parts = match (parts, name) {
                (Some((before, after)), _) => [before, separator, after],
                (None, "partition") => [text, "", ""],
                (None, _) => ["", "", text],
            };
            Ok(parts.into_iter().map(Value::from).collect())
        }
        "rsplit" => {
            let (separator, limit): (Option<&str>, Option<i64>) = from_args(args)?;
            let limit = limit.and_then(|limit| usize::try_from(limit).ok());
            let mut parts: Vec<&str> = match (separator, limit) {
                (Some(""), _) => return Err(invalid("rsplit: empty separator")),
                (Some(separator), Some(limit)) => text.rsplitn(limit.saturating_add(1), separator).collect(),
                (Some(separator), None) => text.rsplit(separator).collect(),
                (None, limit) => rsplit_blanks(text, limit.unwrap_or(usize::MAX)),
            };
            parts.reverse();
            Ok(parts.into_iter().map(Value::from).collect())
        }
        "ljust" | "rjust" | "center" | "zfill" => {
            let (width, fill): (usize, Option<&str>) = from_args(args)?;
            let mut fill = fill.unwrap_or(" ").chars();
            let (Some(fill), None) = (fill.next(), fill.next()) else {
                return Err(invalid("the fill character must be one character"));
            };
            padded(text, name, width, fill).map(Value::from)
        }
        "swapcase" => Ok(Value::from(
            text.chars()
                .flat_map(|c| -> Box<dyn Iterator<Item = char>> {
                    if c.is_uppercase() { Box::new(c.to_lowercase()) } else { Box::new(c.to_uppercase()) }
                })
                .collect::<String>(),
        )),
        "casefold" => Ok(Value::from(text.to_lowercase().replace('\u{df}', "ss"))),
        "isdecimal" => Ok(Value::from(!text.is_empty() && text.chars().all(|c| c.is_ascii_digit()))),
        "index" | "rindex" => {
            let (part,): (&str,) = from_args(args)?;
            let at = if name == "index" { text.find(part) } else { text.rfind(part) };
            at.map(|at| Value::from(text[..at].chars().count())).ok_or_else(|| invalid("substring not found"))
        }
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// The widest text that padding makes.
const MAX_WIDTH: usize = 4096;

/// A text of at least `width` characters, as Python pads it.
fn padded(text: &str, how: &str, width: usize, fill: char) -> Result<String, Error> {
    let missing = width.saturating_sub(text.chars().count());
    if missing > MAX_WIDTH {
        return Err(invalid("a width is too large"));
    }
    let run = |n: usize| fill.to_string().repeat(n);
    Ok(match how {
        "ljust" => text.to_owned() + &run(missing),
        "rjust" => run(missing) + text,
        "zfill" => {
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            format!("{sign}{}{digits}", "0".repeat(missing))
        }
        // The odd place goes to the left where the width is odd.
        _ => {
            let left = missing / 2 + (missing & width & 1);
            run(left) + text + &run(missing - left)
        }
    })
}

/// Words from the right, at most `limit` splits; in order from the right.
fn rsplit_blanks(text: &str, limit: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim_end();
    while !rest.is_empty() {
        let start = rest.rfind(char::is_whitespace).filter(|_| parts.len() < limit);
        let Some(at) = start else {
            parts.push(rest);
            break;
        };
        let word = at + rest[at..].chars().next().map_or(0, char::len_utf8);
        parts.push(&rest[word..]);
        rest = rest[..at].trim_end();
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_does() {
        let pairs = [
            (0.5, "0.5"),
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (1e-5, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (0.0001, "0.0001"),
            (1e16, "1e+16"),
            (1e15, "1000000000000000.0"),
            (1.25e100, "1.25e+100"),
        ];
        for (number, text) in pairs {
            assert_eq!(float(number), text);
        }
    }
}
