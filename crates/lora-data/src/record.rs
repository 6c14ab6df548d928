//! From a JSON record to a document, format by format.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use crate::document::{Body, Conversation, Document, Instruction, Message, Origin};
use crate::error::{DataError, Result};
use crate::format::Format;
use crate::source::{Source, field_names};
use crate::strict_json::{kind, read_whole};

/// How the records of one file are read: its format and the names of its columns.
pub(crate) struct Layout {
    pub(crate) format: Format,
    pub(crate) ignored_columns: BTreeMap<String, usize>,
    columns: BTreeMap<String, String>,
}

impl Layout {
    /// Refuses a field name in `columns` that the format does not have.
    pub(crate) fn check_columns(source: &Source) -> Result<()> {
        let known: BTreeSet<&str> = match source.format {
            Some(format) => format.fields().iter().copied().collect(),
            None => Format::ALL.iter().flat_map(|format| format.fields()).copied().collect(),
        };
        let Some(field) = source.columns.keys().find(|field| !known.contains(field.as_str())) else { return Ok(()) };
        let nearest = known.iter().min_by_key(|name| strsim::damerau_levenshtein(name, field)).copied();
        Err(DataError::UnknownColumn {
            path: source.path.clone(),
            field: field.clone(),
            nearest: nearest.unwrap_or_default().to_owned(),
            owner: source.format.map_or("a format".to_owned(), |format| format!("format {format}")),
            known: known.into_iter().collect::<Vec<_>>().join(", "),
        })
    }

    /// The layout of a file whose first record is `record`.
    pub(crate) fn detect(source: &Source, record: &Map<String, Value>, origin: &Origin) -> Result<Self> {
        let columns = source.columns.clone();
        if let Some(format) = source.format {
            return Ok(Self { format, columns, ignored_columns: BTreeMap::new() });
        }
        let mut present: BTreeSet<&str> = record.keys().map(String::as_str).collect();
        if present.contains("conversations") {
            present.insert("messages");
        }
        present.retain(|field| !columns.contains_key(*field));
        present
            .extend(columns.iter().filter(|(_, column)| record.contains_key(*column)).map(|(field, _)| field.as_str()));
        // Preference data looks like plain data at first sight; training it as such would train bad answers too.
        let is_preference = ["chosen", "rejected"].iter().any(|column| record.contains_key(*column))
            || ["label", "kto_tag"].iter().any(|column| record.get(*column).is_some_and(Value::is_boolean));
        let candidates = if is_preference { Vec::new() } else { Format::candidates(&present) };
        match candidates[..] {
            [format] => Ok(Self { format, columns, ignored_columns: BTreeMap::new() }),
            [] => Err(DataError::FormatUndetected { origin: origin.clone(), present: field_names(record) }),
            ref several => Err(DataError::FormatAmbiguous {
                origin: origin.clone(),
                present: field_names(record),
                candidates: several.iter().map(|format| format.name()).collect::<Vec<_>>().join(", "),
            }),
        }
    }

    /// Reads one record.
    pub(crate) fn document(&mut self, record: Map<String, Value>, origin: Origin) -> Result<Document> {
        let mut fields = Fields { format: self.format, columns: &self.columns, record, origin };
        let body = match self.format {
            Format::Alpaca => Body::Instruction(fields.instruction()?),
            Format::Messages => Body::Conversation(fields.conversation()?),
            Format::PromptCompletion => fields.prompt_completion()?,
            Format::Text => Body::Text(fields.string("text")?),
            Format::Tokenized => fields.tokenized()?,
            Format::Classification => Body::Labelled {
                text: fields.string("text")?,
                text_pair: fields.optional_string("text_pair")?,
                label: fields.required("label")?,
            },
        };
        for column in fields.record.into_iter().map(|(column, _)| column) {
            *self.ignored_columns.entry(column).or_default() += 1;
        }
        Ok(Document { origin: fields.origin, body })
    }
}

/// The fields of one record, taken out as they are read.
struct Fields<'a> {
    format: Format,
    columns: &'a BTreeMap<String, String>,
    record: Map<String, Value>,
    origin: Origin,
}

impl Fields<'_> {
    fn column<'s>(&'s self, field: &'s str) -> &'s str {
        self.columns.get(field).map_or(field, String::as_str)
    }

    /// A field that may be absent; null counts as absent.
    fn optional(&mut self, field: &str) -> Option<Value> {
        let column = self.column(field).to_owned();
        self.record.shift_remove(&column).filter(|value| !value.is_null())
    }

    fn required(&mut self, field: &str) -> Result<Value> {
        let present = field_names(&self.record);
        self.optional(field).ok_or_else(|| DataError::MissingField {
            origin: self.origin.clone(),
            format: self.format,
            field: self.column(field).to_owned(),
            present,
        })
    }

    fn wrong_type(&self, field: impl Into<String>, wanted: &'static str, found: &Value) -> DataError {
        DataError::WrongType { origin: self.origin.clone(), field: field.into(), wanted, found: kind(found).to_owned() }
    }

    fn as_string(&self, field: &str, value: Value) -> Result<String> {
        match value {
            Value::String(text) => Ok(text),
            other => Err(self.wrong_type(self.column(field), "a string", &other)),
        }
    }

    fn string(&mut self, field: &str) -> Result<String> {
        let value = self.required(field)?;
        self.as_string(field, value)
    }

    fn optional_string(&mut self, field: &str) -> Result<Option<String>> {
        let Some(value) = self.optional(field) else { return Ok(None) };
        self.as_string(field, value).map(|text| Some(text).filter(|text| !text.is_empty()))
    }

    fn instruction(&mut self) -> Result<Instruction> {
        Ok(Instruction {
            system: self.optional_string("system")?,
            history: self.history()?,
            instruction: self.string("instruction")?,
            input: self.optional_string("input")?.unwrap_or_default(),
            output: self.string("output")?,
        })
    }

    fn history(&mut self) -> Result<Vec<(String, String)>> {
        const WANTED: &str = "a list of [user, assistant] pairs of strings";
        let column = self.column("history").to_owned();
        let turns = match self.optional("history") {
            None => return Ok(Vec::new()),
            Some(Value::Array(turns)) => turns,
            Some(other) => return Err(self.wrong_type(column, WANTED, &other)),
        };
        let mut history = Vec::new();
        for (index, turn) in turns.into_iter().enumerate() {
            match turn.as_array().map(Vec::as_slice) {
                Some([Value::String(user), Value::String(assistant)]) => {
                    history.push((user.clone(), assistant.clone()));
                }
                _ => return Err(self.wrong_type(format!("{column}[{index}]"), WANTED, &turn)),
            }
        }
        Ok(history)
    }

    fn conversation(&mut self) -> Result<Conversation> {
        // `conversations` is what sharegpt files call the list.
        let alias = !self.columns.contains_key("messages") && !self.record.contains_key("messages");
        let field = if alias && self.record.contains_key("conversations") { "conversations" } else { "messages" };
        let value = self.required(field)?;
        let mut messages = self.messages(field, value)?;
        if let Some(system) = self.optional_string("system")? {
            messages.insert(0, Message::new("system", system));
        }
        Ok(Conversation { messages, tools: self.tools()? })
    }

    fn prompt_completion(&mut self) -> Result<Body> {
        let prompt = self.required("prompt")?;
        let completion = self.required("completion")?;
        match (prompt, completion) {
            (Value::String(prompt), Value::String(completion)) => Ok(Body::PromptCompletion { prompt, completion }),
            (prompt @ Value::Array(_), completion @ Value::Array(_)) => {
                let mut messages = self.messages("prompt", prompt)?;
                for message in &mut messages {
                    message.train = Some(false);
                }
                messages.extend(self.messages("completion", completion)?);
                Ok(Body::Conversation(Conversation { messages, tools: self.tools()? }))
            }
            (Value::String(_) | Value::Array(_), other) => {
                Err(self.wrong_type(self.column("completion"), "of the same kind as the prompt", &other))
            }
            (other, _) => Err(self.wrong_type(self.column("prompt"), "a string or a list of messages", &other)),
        }
    }

    /// Tool descriptions: a list, or the same as JSON text, as table-shaped files have it.
    fn tools(&mut self) -> Result<Option<Value>> {
        const WANTED: &str = "a list of tools, or such a list as JSON text";
        let column = self.column("tools").to_owned();
        let tools = match self.optional("tools") {
            Some(Value::String(text)) if text.trim().is_empty() => None,
            Some(Value::String(text)) => match read_whole(&text) {
                Ok(tools) => Some(tools),
                Err(_) => return Err(self.wrong_type(column, WANTED, &Value::String(text))),
            },
            other => other,
        };
        match tools {
            Some(Value::Array(list)) if list.is_empty() => Ok(None),
            None | Some(Value::Array(_)) => Ok(tools),
            Some(other) => Err(self.wrong_type(column, WANTED, &other)),
        }
    }

    fn messages(&self, field: &str, value: Value) -> Result<Vec<Message>> {
        let column = self.column(field);
        let Value::Array(items) = value else { return Err(self.wrong_type(column, "a list of messages", &value)) };
        if items.is_empty() {
            return Err(DataError::EmptyConversation { origin: self.origin.clone(), field: column.to_owned() });
        }
        items.into_iter().enumerate().map(|(index, item)| self.message(&format!("{column}[{index}]"), item)).collect()
    }

    fn message(&self, place: &str, value: Value) -> Result<Message> {
        let Value::Object(mut fields) = value else { return Err(self.wrong_type(place, "an object", &value)) };
        if !fields.contains_key("role") && fields.contains_key("from") {
            self.rename_sharegpt(place, &mut fields)?;
        }
        let train = self.train_flag(place, &mut fields)?;
        match fields.get("role") {
            Some(Value::String(_)) => {}
            Some(other) => return Err(self.wrong_type(format!("{place}.role"), "a string", other)),
            None => return Err(self.missing(format!("{place}.role"), &fields)),
        }
        match fields.get("content") {
            Some(Value::String(_)) => {}
            Some(Value::Array(parts)) => {
                if let Some(text) = plain_text(parts) {
                    fields.insert("content".to_owned(), Value::String(text));
                }
            }
            Some(Value::Null) | None => {
                let says_something = ["tool_calls", "reasoning_content", "thinking", "reasoning"];
                if !says_something.iter().any(|name| fields.get(*name).is_some_and(|value| !value.is_null())) {
                    return Err(self.missing(format!("{place}.content"), &fields));
                }
            }
            Some(other) => {
                return Err(self.wrong_type(format!("{place}.content"), "a string or a list of parts", other));
            }
        }
        parse_call_arguments(&mut fields);
        let message = Message { fields, train };
        if train == Some(true) && message.role() != "assistant" {
            return Err(DataError::TrainedRole {
                origin: self.origin.clone(),
                field: place.to_owned(),
                role: message.role().to_owned(),
            });
        }
        Ok(message)
    }

    fn missing(&self, field: String, fields: &Map<String, Value>) -> DataError {
        DataError::MissingField {
            origin: self.origin.clone(),
            format: self.format,
            field,
            present: field_names(fields),
        }
    }

    /// `from` and `value` of the sharegpt layout, for the roles that have a plain counterpart.
    fn rename_sharegpt(&self, place: &str, fields: &mut Map<String, Value>) -> Result<()> {
        let role = match fields.shift_remove("from") {
            Some(Value::String(role)) => role,
            other => return Err(self.wrong_type(format!("{place}.from"), "a string", &other.unwrap_or_default())),
        };
        let ours = match role.as_str() {
            "human" | "user" => "user",
            "gpt" | "assistant" | "bot" | "model" => "assistant",
            "system" => "system",
            _ => {
                return Err(DataError::ShareGptRole {
                    origin: self.origin.clone(),
                    field: format!("{place}.from"),
                    role,
                });
            }
        };
        let content = fields.shift_remove("value").unwrap_or_default();
        fields.insert("role".to_owned(), Value::from(ours));
        fields.insert("content".to_owned(), content);
        Ok(())
    }

    /// `train` (boolean) or `weight` / `loss_weight` (0 or 1) of a message.
    fn train_flag(&self, place: &str, fields: &mut Map<String, Value>) -> Result<Option<bool>> {
        let mut train = None;
        for name in ["train", "weight", "loss_weight"] {
            let Some(value) = fields.shift_remove(name).filter(|value| !value.is_null()) else { continue };
            train = match (name, &value) {
                ("train", Value::Bool(flag)) => Some(*flag),
                ("train", other) => return Err(self.wrong_type(format!("{place}.train"), "true or false", other)),
                (_, number) if number.as_f64() == Some(0.0) => Some(false),
                (_, number) if number.as_f64() == Some(1.0) => Some(true),
                (_, other) => return Err(self.wrong_type(format!("{place}.{name}"), "0 or 1", other)),
            };
        }
        Ok(train)
    }

    fn tokenized(&mut self) -> Result<Body> {
        let input_ids = self.required("input_ids")?;
        let input_ids = self.integers("input_ids", &input_ids)?;
        let labels = match self.optional("labels") {
            Some(labels) => Some(self.integers("labels", &labels)?),
            None => None,
        };
        if let Some(labels) = labels.as_ref().filter(|labels| labels.len() != input_ids.len()) {
            return Err(DataError::LabelsLength {
                origin: self.origin.clone(),
                labels: labels.len(),
                input_ids: input_ids.len(),
            });
        }
        Ok(Body::Tokenized { input_ids, labels })
    }

    fn integers(&self, field: &str, value: &Value) -> Result<Vec<i64>> {
        let column = self.column(field);
        let Some(items) = value.as_array() else { return Err(self.wrong_type(column, "a list of integers", value)) };
        let integer = |(index, item): (usize, &Value)| {
            item.as_i64().ok_or_else(|| self.wrong_type(format!("{column}[{index}]"), "an integer", item))
        };
        items.iter().enumerate().map(integer).collect()
    }
}

/// The text of a content list that holds nothing but text parts.
fn plain_text(parts: &[Value]) -> Option<String> {
    parts
        .iter()
        .map(|part| match part.get("type").and_then(Value::as_str) {
            Some("text") => part.get("text").or_else(|| part.get("value")).and_then(Value::as_str),
            _ => None,
        })
        .collect()
}

/// The arguments of a tool call come as JSON text from an API, but templates write them with `tojson`.
fn parse_call_arguments(fields: &mut Map<String, Value>) {
    let calls = fields.get_mut("tool_calls").and_then(Value::as_array_mut);
    for call in calls.into_iter().flatten() {
        let call = if call.get("function").is_some() { &mut call["function"] } else { call };
        if let Some(arguments) = call.get_mut("arguments")
            && let Some(Ok(parsed @ Value::Object(_))) = arguments.as_str().map(read_whole)
        {
            *arguments = parsed;
        }
    }
}
