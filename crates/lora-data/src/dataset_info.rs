//! LLaMA-Factory's `dataset_info.json`, read as it is.
//!
//! Its trap is copied too: as soon as an entry has `columns`, a column that is not listed there is not read, instead of
//! keeping its usual name; the same holds for `tags`. What is so switched off is noted.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{DataError, Result};
use crate::format::Format;
use crate::source::Source;
use crate::strict_json::{kind, read_whole};
use crate::tags::Tags;

const FILE_NAME: &str = "dataset_info.json";
/// Real ones have some tens of kilobytes.
const MAX_BYTES: u64 = 16 << 20;

/// The columns of an entry without `columns`, with our names for them; those in the second list are off unless listed.
const ALPACA: &[(&str, &str)] = &[("prompt", "instruction"), ("query", "input"), ("response", "output")];
const SHAREGPT: &[(&str, &str)] = &[("messages", "conversations")];
const UNLISTED: &[&str] =
    &["history", "system", "tools", "chosen", "rejected", "kto_tag", "images", "videos", "audios"];

/// A source as it is to be read: where it names an entry of a `dataset_info.json`, what the entry says.
pub(crate) fn resolve(source: &Source) -> Result<Source> {
    let text = source.path.to_string_lossy();
    let (path, name) = match text.rsplit_once('#') {
        Some((path, name)) if path.ends_with(FILE_NAME) => (PathBuf::from(path), Some(name.to_owned())),
        _ if source.path.file_name().is_some_and(|name| name == FILE_NAME) => (source.path.clone(), None),
        _ => return Ok(source.clone()),
    };
    let entries = read(&path)?;
    let name = match name {
        Some(name) => name,
        None if entries.len() == 1 => entries.keys().next().cloned().unwrap_or_default(),
        None => return Err(DataError::NoDatasetName { path }),
    };
    let Some(entry) = entries.get(&name) else { return Err(unknown(path, name, &entries)) };
    Entry { path: &path, name: &name, source }.resolve(entry)
}

/// The names of the datasets that a `dataset_info.json` describes, in its order.
///
/// # Errors
/// When the file cannot be read, or is not an object of objects.
pub fn dataset_names(path: &Path) -> Result<Vec<String>> {
    Ok(read(path)?.keys().cloned().collect())
}

fn read(path: &Path) -> Result<Map<String, Value>> {
    let io = |source| DataError::Io { path: path.to_owned(), source };
    let size = std::fs::metadata(path).map_err(io)?.len();
    let fault = |problem: String| DataError::DatasetInfo {
        path: path.to_owned(),
        name: "(the file)".to_owned(),
        key: "(all)".to_owned(),
        problem,
    };
    if size > MAX_BYTES {
        return Err(fault(format!("takes {size} bytes, more than the {MAX_BYTES} that are accepted")));
    }
    let text = std::fs::read_to_string(path).map_err(io)?;
    match read_whole(text.trim_start_matches('\u{FEFF}')) {
        Ok(Value::Object(entries)) => Ok(entries),
        Ok(other) => Err(fault(format!("must be an object with an entry for each dataset, found {}", kind(&other)))),
        Err(error) => Err(fault(format!("is broken JSON: {error}"))),
    }
}

fn unknown(path: PathBuf, name: String, entries: &Map<String, Value>) -> DataError {
    let nearest = entries.keys().min_by_key(|known| strsim::damerau_levenshtein(known, &name));
    let known = match nearest {
        Some(nearest) => format!("did you mean `{nearest}`? It has {} entries", entries.len()),
        None => "it is empty".to_owned(),
    };
    DataError::UnknownDataset { path, name, known }
}

struct Entry<'a> {
    path: &'a Path,
    name: &'a str,
    source: &'a Source,
}

impl Entry<'_> {
    fn fault(&self, key: &str, problem: impl Into<String>) -> DataError {
        DataError::DatasetInfo {
            path: self.path.to_owned(),
            name: self.name.to_owned(),
            key: key.to_owned(),
            problem: problem.into(),
        }
    }

    fn text<'v>(&self, entry: &'v Map<String, Value>, key: &str) -> Result<Option<&'v str>> {
        match entry.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.fault(key, format!("must be a string, found {}", kind(other)))),
        }
    }

    fn table<'v>(&self, entry: &'v Map<String, Value>, key: &str) -> Result<Option<&'v Map<String, Value>>> {
        match entry.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(table)) => Ok(Some(table)),
            Some(other) => Err(self.fault(key, format!("must be an object, found {}", kind(other)))),
        }
    }

    fn resolve(&self, entry: &Value) -> Result<Source> {
        let Value::Object(entry) = entry else {
            return Err(self.fault("(entry)", format!("must be an object, found {}", kind(entry))));
        };
        let mut source = Source { path: self.file(entry)?, ..self.source.clone() };
        if source.split.is_none() {
            source.split = self.text(entry, "split")?.map(str::to_owned);
        }
        let ranking = match entry.get("ranking") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(ranking)) => *ranking,
            Some(other) => return Err(self.fault("ranking", format!("must be true or false, found {}", kind(other)))),
        };
        if source.max_samples.is_none()
            && let Some(number) = entry.get("num_samples").filter(|value| !value.is_null())
        {
            let count = number.as_u64().and_then(|count| usize::try_from(count).ok()).filter(|&count| count > 0);
            source.max_samples = Some(
                count.ok_or_else(|| self.fault("num_samples", format!("must be a number above 0, found {number}")))?,
            );
            source.notes.push(format!("{}: `num_samples` takes the first records here, not random ones", self.name));
        }
        let formatting = self.text(entry, "formatting")?.unwrap_or("alpaca");
        let defaults = match formatting {
            "alpaca" => ALPACA,
            "sharegpt" | "openai" => SHAREGPT,
            other => {
                return Err(self.fault("formatting", format!("is `{other}`; known are alpaca, sharegpt and openai")));
            }
        };
        let columns = Columns::new(self, entry, defaults)?;
        let format = columns.format(formatting, ranking);
        source.format = source.format.or(Some(format));
        columns.apply(format, &mut source);
        if formatting != "alpaca" {
            self.tags(entry, &mut source)?;
        }
        Ok(source)
    }

    /// Where the records are. A hub goes before a script, a script before a cloud, a cloud before a file.
    fn file(&self, entry: &Map<String, Value>) -> Result<PathBuf> {
        if let Some(id) = self.text(entry, "hf_hub_url")? {
            for key in ["subset", "folder"] {
                if let Some(subset) = self.text(entry, key)? {
                    let problem =
                        format!("is `{subset}`, a part of a hub's dataset; name its files as hf://{id}/PATH instead");
                    return Err(self.fault(key, problem));
                }
            }
            return Ok(PathBuf::from(format!("hf://{id}")));
        }
        for (key, problem) in [
            ("script_url", "names a script, and scripts are not run; convert the data to a file and set `file_name`"),
            ("cloud_file_name", "names a file in a cloud; download it and set `file_name`"),
            ("ms_hub_url", "names another hub, which is not read; download the data and set `file_name`"),
            ("om_hub_url", "names another hub, which is not read; download the data and set `file_name`"),
        ] {
            if self.text(entry, key)?.is_some() {
                return Err(self.fault(key, problem));
            }
        }
        let name = self.text(entry, "file_name")?.ok_or_else(|| self.fault("file_name", "is missing"))?;
        let outside = Path::new(name).components().any(|part| !matches!(part, std::path::Component::Normal(_)));
        if outside {
            return Err(self.fault("file_name", format!("is `{name}`; it must stay inside of the folder of the file")));
        }
        Ok(self.path.parent().unwrap_or(Path::new("")).join(name))
    }

    /// The names of roles. The trap: one that is not listed is not known.
    fn tags(&self, entry: &Map<String, Value>, source: &mut Source) -> Result<()> {
        let Some(table) = self.table(entry, "tags")? else { return Ok(()) };
        if let Some(key) = table.keys().find(|key| !Tags::KEYS.contains(&key.as_str())) {
            return Err(
                self.fault(&format!("tags.{key}"), format!("is not known; known are {}", Tags::KEYS.join(", ")))
            );
        }
        let mut off = Vec::new();
        let mut tags = Tags::default();
        for key in Tags::KEYS {
            let name = self.text(table, key)?;
            tags.set(key, name);
            if name.is_none() {
                off.push(key);
            }
        }
        for (key, is_set) in [("role_tag", tags.role.is_some()), ("content_tag", tags.content.is_some())] {
            if !is_set {
                return Err(self.fault(
                    &format!("tags.{key}"),
                    "is missing; once `tags` is there, what it does not list is off, and no message can be read without it",
                ));
            }
        }
        if !off.is_empty() {
            source.notes.push(format!(
                "{}: `tags` does not list {}, which switches these roles off, as in LLaMA-Factory",
                self.name,
                off.join(", ")
            ));
        }
        source.tags = tags;
        Ok(())
    }
}

/// What an entry says of columns: for each of LLaMA-Factory's keys the file's column, if it is read.
struct Columns<'a> {
    name: &'a str,
    listed: bool,
    of: Vec<(&'a str, Option<String>)>,
    defaults: &'a [(&'a str, &'a str)],
}

impl<'a> Columns<'a> {
    fn new(entry_of: &'a Entry<'_>, entry: &Map<String, Value>, defaults: &'a [(&'a str, &'a str)]) -> Result<Self> {
        let table = entry_of.table(entry, "columns")?;
        let keys = || defaults.iter().map(|(key, _)| *key).chain(UNLISTED.iter().copied());
        let mut of = Vec::new();
        if let Some(table) = table {
            if let Some(key) = table.keys().find(|key| !keys().any(|known| known == key.as_str())) {
                let known = keys().collect::<Vec<_>>().join(", ");
                return Err(entry_of.fault(&format!("columns.{key}"), format!("is not known; known are {known}")));
            }
            for key in keys() {
                of.push((key, entry_of.text(table, key)?.map(str::to_owned)));
            }
        } else {
            of.extend(defaults.iter().map(|(key, column)| (*key, Some((*column).to_owned()))));
        }
        if let Some((key, _)) =
            of.iter().find(|(key, column)| ["images", "videos", "audios"].contains(key) && column.is_some())
        {
            return Err(entry_of.fault(&format!("columns.{key}"), "asks for more than text, which is not trained here"));
        }
        Ok(Self { name: entry_of.name, listed: table.is_some(), of, defaults })
    }

    fn column(&self, key: &str) -> Option<&str> {
        self.of.iter().find(|(known, _)| *known == key).and_then(|(_, column)| column.as_deref())
    }

    /// The format that the columns amount to. Without a response, the prompt is running text (LLaMA-Factory's `pt`).
    fn format(&self, formatting: &str, ranking: bool) -> Format {
        match formatting {
            _ if ranking => Format::Preference,
            _ if self.column("kto_tag").is_some() => Format::Kto,
            "alpaca" if self.column("response").is_none() => Format::Text,
            "alpaca" => Format::Alpaca,
            "sharegpt" => Format::Sharegpt,
            _ => Format::Messages,
        }
    }

    /// Writes the columns into a source, in the names of our fields, and notes what is off.
    fn apply(&self, format: Format, source: &mut Source) {
        let ours = |key: &str| match (key, format) {
            ("prompt", Format::Text) => "text",
            ("prompt", _) => "instruction",
            ("query", _) => "input",
            ("response", _) => "output",
            ("messages", Format::Messages) => "messages",
            ("messages", _) => "conversations",
            ("kto_tag", _) => "label",
            ("history", _) => "history",
            ("system", _) => "system",
            ("tools", _) => "tools",
            ("chosen", _) => "chosen",
            ("rejected", _) => "rejected",
            _ => "",
        };
        let fields = format.fields();
        let mut read = Vec::new();
        for (key, column) in &self.of {
            let field = ours(key);
            if let Some(column) = column.as_ref().filter(|_| fields.contains(&field)) {
                source.columns.entry(field.to_owned()).or_insert_with(|| column.clone());
                read.push(field);
            }
        }
        for field in fields.iter().filter(|field| !read.contains(field) && !source.columns.contains_key(**field)) {
            source.off.insert((*field).to_owned());
        }
        let off: Vec<&str> = self
            .defaults
            .iter()
            .filter(|(key, _)| self.column(key).is_none() && fields.contains(&ours(key)))
            .map(|(_, usual)| *usual)
            .collect();
        if self.listed && !off.is_empty() {
            source.notes.push(format!(
                "{}: `columns` does not list {}, which switches the usual column {} off, as in LLaMA-Factory; list it to read it",
                self.name,
                self.defaults
                    .iter()
                    .filter(|(_, usual)| off.contains(usual))
                    .map(|(key, _)| format!("`{key}`"))
                    .collect::<Vec<_>>()
                    .join(", "),
                off.join(", ")
            ));
        }
    }
}
