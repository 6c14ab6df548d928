//! How the records of a source are laid out: told once from the first of them, applied to all.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use crate::document::{Body, Document, Origin};
use crate::error::{DataError, Result};
use crate::fields::{Fields, field_names};
use crate::format::Format;
use crate::source::Source;

/// The format of a source's records, and what of them is not read.
pub(crate) struct Layout {
    pub(crate) format: Format,
    pub(crate) ignored_columns: BTreeMap<String, usize>,
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

    /// The layout of a source whose first record is `record`.
    pub(crate) fn detect(source: &Source, record: &Map<String, Value>, origin: &Origin) -> Result<Self> {
        let layout = |format| Ok(Self { format, ignored_columns: BTreeMap::new() });
        if let Some(format) = source.format {
            return layout(format);
        }
        let mut present: BTreeSet<&str> = record.keys().map(String::as_str).collect();
        present.retain(|field| source.column(field) == *field);
        let mapped = source.columns.iter().filter(|(_, column)| record.contains_key(*column));
        present.extend(mapped.map(|(field, _)| field.as_str()));
        if present.contains("chosen_messages") && present.contains("rejected_messages") {
            present.extend(["chosen", "rejected"]);
        }
        // Preference data looks like plain data at first sight; training it as such would train bad answers too.
        let label = ["label", "kto_tag"].iter().find_map(|field| record.get(source.column(field)));
        let has_label = label.is_some_and(|label| label.is_boolean() || source.columns.contains_key("label"));
        let candidates = match (present.contains("chosen"), present.contains("rejected"), has_label) {
            (true, true, _) => vec![Format::Preference],
            (false, false, true) if Format::fits_rated(&present) => vec![Format::Kto],
            (false, false, false) => Format::candidates(&present),
            _ => Vec::new(),
        };
        match candidates[..] {
            [format] => layout(format),
            [] => Err(DataError::FormatUndetected { origin: origin.clone(), present: field_names(record) }),
            ref several => Err(DataError::FormatAmbiguous {
                origin: origin.clone(),
                present: field_names(record),
                candidates: several.iter().map(|format| format.name()).collect::<Vec<_>>().join(", "),
            }),
        }
    }

    /// Reads one record.
    pub(crate) fn document(&mut self, source: &Source, record: Map<String, Value>, origin: Origin) -> Result<Document> {
        let mut fields = Fields { format: self.format, source, record, origin };
        let body = match self.format {
            Format::Alpaca => Body::Instruction(fields.instruction()?),
            Format::Sharegpt => Body::Conversation(fields.sharegpt()?),
            Format::Messages => Body::Conversation(fields.conversation()?),
            Format::PromptCompletion => fields.prompt_completion()?,
            Format::Preference => fields.preference()?,
            Format::Kto => fields.rated()?,
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
