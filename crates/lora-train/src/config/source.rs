//! From a file's text to a tree of values, with the line of every key.

use super::faults::{ConfigErrors, Fault, FaultKind, Place, shown};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

/// A configuration is a page of text; anything longer is another file.
const MAX_BYTES: u64 = 1 << 20;

/// Where every key was written.
pub(crate) struct Places {
    file: Option<PathBuf>,
    lines: BTreeMap<String, usize>,
    pub(crate) on_command_line: BTreeSet<String>,
}

impl Places {
    pub(crate) fn program() -> Self {
        Self { file: None, lines: BTreeMap::new(), on_command_line: BTreeSet::new() }
    }

    fn place(&self, key: &str) -> Place {
        if self
            .on_command_line
            .iter()
            .any(|set| set == key || key.strip_prefix(set.as_str()).is_some_and(|r| r.starts_with(['.', '['])))
        {
            return Place::CommandLine;
        }
        match &self.file {
            Some(path) => Place::File { path: path.clone(), line: self.line(key) },
            None => Place::Program,
        }
    }

    /// The line of a key; for one that is missing, that of the table it should be in.
    fn line(&self, key: &str) -> Option<usize> {
        let outer = || self.line(&key[..key.rfind(['.', '['])?]);
        self.lines.get(key).copied().or_else(outer)
    }

    pub(crate) fn fault(&self, key: &str, value: Option<&Value>, kind: FaultKind) -> Fault {
        Fault { place: self.place(key), key: key.to_string(), value: value.map(shown), kind }
    }
}

/// Reads a file: YAML when it ends in `.yaml` or `.yml`, else TOML.
pub(crate) fn read(path: &Path) -> Result<(Table, Places), ConfigErrors> {
    let mut places = Places { file: Some(path.to_path_buf()), ..Places::program() };
    let text = match read_text(path) {
        Ok(text) => text,
        Err(source) => return Err(ConfigErrors(vec![places.fault("", None, FaultKind::Unreadable { source })])),
    };
    let is_yaml = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("yaml") || e.eq_ignore_ascii_case("yml"));
    let tree = if is_yaml { yaml(&text) } else { toml(&text, &mut places.lines) };
    match tree {
        Ok(tree) => Ok((tree, places)),
        Err((line, message)) => {
            let place = Place::File { path: path.to_path_buf(), line };
            Err(ConfigErrors(vec![Fault {
                place,
                key: String::new(),
                value: None,
                kind: FaultKind::Syntax { message },
            }]))
        }
    }
}

fn read_text(path: &Path) -> std::io::Result<String> {
    use std::io::{Error, ErrorKind};
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Error::new(ErrorKind::FileTooLarge, "longer than 1 MiB, so not a configuration"));
    }
    let text = String::from_utf8(bytes).map_err(|_| Error::new(ErrorKind::InvalidData, "not UTF-8 text"))?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_string).unwrap_or(text))
}

type SyntaxFault = (Option<usize>, String);

fn toml(text: &str, lines: &mut BTreeMap<String, usize>) -> Result<Table, SyntaxFault> {
    let line_of = |offset: usize| text.as_bytes().iter().take(offset).filter(|b| **b == b'\n').count() + 1;
    let syntax = |e: toml::de::Error| (e.span().map(|s| line_of(s.start)), e.message().to_string());
    let spanned = DeTable::parse(text).map_err(syntax)?;
    note_lines(spanned.get_ref(), "", &line_of, lines);
    toml::from_str(text).map_err(syntax)
}

fn note_lines(
    table: &DeTable<'_>,
    prefix: &str,
    line_of: &dyn Fn(usize) -> usize,
    lines: &mut BTreeMap<String, usize>,
) {
    for (key, value) in table {
        let path = format!("{prefix}{}", key.get_ref());
        lines.insert(path.clone(), line_of(key.span().start));
        match value.get_ref() {
            DeValue::Table(inner) => note_lines(inner, &format!("{path}."), line_of, lines),
            DeValue::Array(list) => {
                for (i, entry) in list.iter().enumerate() {
                    let entry_path = format!("{path}[{i}]");
                    lines.insert(entry_path.clone(), line_of(entry.span().start));
                    if let DeValue::Table(inner) = entry.get_ref() {
                        note_lines(inner, &format!("{entry_path}."), line_of, lines);
                    }
                }
            }
            _ => {}
        }
    }
}

fn yaml(text: &str) -> Result<Table, SyntaxFault> {
    let value: serde_yaml_ng::Value =
        serde_yaml_ng::from_str(text).map_err(|e| (e.location().map(|l| l.line()), e.to_string()))?;
    match from_yaml(&value) {
        Ok(Some(Value::Table(table))) => Ok(table),
        Ok(None) => Ok(Table::new()),
        Ok(Some(_)) => Err((None, "must be a mapping from keys to values".into())),
        Err(message) => Err((None, message)),
    }
}

/// The same value as TOML would have it; `None` for null, which leaves a key at its default.
fn from_yaml(value: &serde_yaml_ng::Value) -> Result<Option<Value>, String> {
    use serde_yaml_ng::Value as Yaml;
    Ok(Some(match value {
        Yaml::Null => return Ok(None),
        Yaml::Bool(b) => Value::Boolean(*b),
        Yaml::String(s) => Value::String(s.clone()),
        Yaml::Number(n) => match (n.as_i64(), n.as_f64()) {
            (Some(i), _) => Value::Integer(i),
            (None, Some(f)) if n.is_f64() => Value::Float(f),
            _ => return Err(format!("{n} is too large an integer; the largest is {}", i64::MAX)),
        },
        Yaml::Sequence(list) => Value::Array(
            list.iter()
                .map(|v| from_yaml(v)?.ok_or_else(|| "a list holds a null; remove it".to_string()))
                .collect::<Result<_, _>>()?,
        ),
        Yaml::Mapping(map) => {
            let mut table = Table::new();
            for (key, value) in map {
                let Yaml::String(key) = key else {
                    return Err(format!("the key {key:?} is not a text; put it in quotes"));
                };
                if let Some(value) = from_yaml(value)? {
                    table.insert(key.clone(), value);
                }
            }
            Value::Table(table)
        }
        Yaml::Tagged(tagged) => return Err(format!("the tag {} is not supported; remove it", tagged.tag)),
    }))
}
