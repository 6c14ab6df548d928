//! The fields of one record, taken out as they are read, and the layouts that need no more than that.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::document::{Body, Conversation, Instruction, Origin};
use crate::error::{DataError, Result};
use crate::format::Format;
use crate::messages::untrained;
use crate::source::Source;
use crate::strict_json::{kind, read_whole};

/// The fields of one record, taken out as they are read.
pub(crate) struct Fields<'a> {
    pub(crate) format: Format,
    pub(crate) source: &'a Source,
    pub(crate) record: Map<String, Value>,
    pub(crate) origin: Origin,
}

impl Fields<'_> {
    /// The name that a field has in the file.
    pub(crate) fn column<'s>(&'s self, field: &'s str) -> &'s str {
        self.source.column(field)
    }

    /// Whether the record has the field, be it null.
    pub(crate) fn has(&self, field: &str) -> bool {
        self.record.contains_key(self.column(field))
    }

    /// `field`, or `alias` where only that is there and `field` was not mapped.
    pub(crate) fn or_alias<'f>(&self, field: &'f str, alias: &'f str) -> &'f str {
        let use_alias = !self.source.columns.contains_key(field) && !self.has(field) && self.has(alias);
        if use_alias { alias } else { field }
    }

    /// A field that may be absent; null counts as absent.
    pub(crate) fn optional(&mut self, field: &str) -> Option<Value> {
        let column = self.column(field).to_owned();
        self.record.shift_remove(&column).filter(|value| !value.is_null())
    }

    pub(crate) fn required(&mut self, field: &str) -> Result<Value> {
        let present = field_names(&self.record);
        self.optional(field).ok_or_else(|| DataError::MissingField {
            origin: self.origin.clone(),
            format: self.format,
            field: self.column(field).to_owned(),
            present,
        })
    }

    pub(crate) fn wrong_type(&self, field: impl Into<String>, wanted: &'static str, found: &Value) -> DataError {
        DataError::WrongType { origin: self.origin.clone(), field: field.into(), wanted, found: kind(found).to_owned() }
    }

    pub(crate) fn as_string(&self, field: &str, value: Value) -> Result<String> {
        match value {
            Value::String(text) => Ok(text),
            other => Err(self.wrong_type(self.column(field), "a string", &other)),
        }
    }

    pub(crate) fn string(&mut self, field: &str) -> Result<String> {
        let value = self.required(field)?;
        self.as_string(field, value)
    }

    pub(crate) fn optional_string(&mut self, field: &str) -> Result<Option<String>> {
        let Some(value) = self.optional(field) else { return Ok(None) };
        self.as_string(field, value).map(|text| Some(text).filter(|text| !text.is_empty()))
    }

    pub(crate) fn instruction(&mut self) -> Result<Instruction> {
        Ok(Instruction {
            system: self.optional_string("system")?,
            history: self.history()?,
            instruction: self.string("instruction")?,
            input: self.optional_string("input")?.unwrap_or_default(),
            output: self.string("output")?,
        })
    }

    pub(crate) fn history(&mut self) -> Result<Vec<(String, String)>> {
        const WANTED: &str = "a list of [user, assistant] pairs of strings";
        let column = self.column("history").to_owned();
        let turns = match self.optional("history").map(list_of_text) {
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

    pub(crate) fn prompt_completion(&mut self) -> Result<Body> {
        let prompt = self.required("prompt")?;
        let completion = self.required("completion")?;
        match (prompt, completion) {
            (Value::String(prompt), Value::String(completion)) => Ok(Body::PromptCompletion { prompt, completion }),
            (prompt @ Value::Array(_), completion @ Value::Array(_)) => {
                let mut messages = untrained(self.messages("prompt", prompt)?);
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
    pub(crate) fn tools(&mut self) -> Result<Option<Value>> {
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

    pub(crate) fn tokenized(&mut self) -> Result<Body> {
        let input_ids = list_of_text(self.required("input_ids")?);
        let input_ids = self.integers("input_ids", &input_ids)?;
        let labels = match self.optional("labels") {
            Some(labels) => Some(self.integers("labels", &list_of_text(labels))?),
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

/// The names of a record's fields, for messages.
pub(crate) fn field_names(record: &Map<String, Value>) -> String {
    match record.is_empty() {
        true => "no field".to_owned(),
        false => record
            .keys()
            .map(|key| format!("`{key}`"))
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect::<Vec<_>>()
            .join(", "),
    }
}

/// A list that is written as JSON text, as table-shaped files have it; anything else as it is.
pub(crate) fn list_of_text(value: Value) -> Value {
    match &value {
        Value::String(text) if text.trim_start().starts_with('[') => match read_whole(text) {
            Ok(list @ Value::Array(_)) => list,
            _ => value,
        },
        _ => value,
    }
}
