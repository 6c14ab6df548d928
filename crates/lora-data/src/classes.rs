//! Texts with labels, for classifiers: which labels there are, what each record says, how a text or a pair of texts
//! becomes tokens.

use std::collections::{BTreeSet, HashSet};
use std::fmt;

use rayon::prelude::*;
use serde::Serialize;
use serde_json::Value;

use crate::dataset::DataOptions;
use crate::document::{Body, Document, Origin};
use crate::error::{DataError, Result};
use crate::example::Example;
use crate::fingerprint::{Fingerprint, fingerprint_of};
use crate::format::Format;
use crate::report::{DataReport, DropReason, SourceReport};
use crate::source::{Documents, Source};
use crate::tokenizer::Tokenizer;
use crate::truncation::Truncation;

/// More classes than anything is told apart by; a larger number is a mistake, such as a rating in cents.
const MAX_CLASSES: usize = 1 << 16;

/// Texts tokenised between two reports of progress.
const CHUNK: usize = 1024;

/// What the labels of a dataset are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LabelKind {
    /// One of several, by name or by number from 0.
    Single,
    /// Any of several: a list of names, or a list of a 0 or 1 for each.
    Multi,
    /// A number, or a list of numbers.
    Number,
}

/// The labels of a dataset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LabelSet {
    /// Their names, by id.
    pub names: Vec<String>,
    /// What they are.
    pub kind: LabelKind,
}

/// What is known of the labels before the data is read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KnownLabels {
    /// Their names, by id.
    pub names: Option<Vec<String>>,
    /// What they are.
    pub kind: Option<LabelKind>,
}

/// The label of a text.
#[derive(Debug, Clone, PartialEq)]
pub enum ClassTarget {
    /// The id of its label.
    Id(u32),
    /// For each label, whether it applies (0 or 1), or what it is.
    Values(Vec<f32>),
}

/// A text, or a pair of texts, with its label.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelledText {
    /// The tokens, special ones included; none of them is trained.
    pub tokens: Example,
    /// For each token, 0 in the first text and 1 in the second.
    pub token_types: Vec<u8>,
    /// What is to be predicted.
    pub target: ClassTarget,
}

impl LabelledText {
    /// The same for two texts with the same tokens and the same label.
    fn fingerprint(&self) -> Fingerprint {
        let mut words = Vec::new();
        self.tokens.to_words(&mut words);
        words.extend_from_slice(&self.token_types);
        match &self.target {
            ClassTarget::Id(id) => words.extend(id.to_le_bytes()),
            ClassTarget::Values(values) => words.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        }
        fingerprint_of(&words)
    }
}

/// Labelled texts and what became of the records.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelledSet {
    /// The texts, in the order of the files.
    pub texts: Vec<LabelledText>,
    /// The labels there are.
    pub labels: LabelSet,
    /// What became of every record.
    pub report: DataReport,
}

impl LabelledSet {
    /// How many texts have each label; empty where labels are numbers.
    pub fn counts(&self) -> Vec<usize> {
        count_labels(self.texts.iter().map(|text| &text.target), &self.labels)
    }
}

/// How many of some texts have each label; empty where labels are numbers.
pub fn count_labels<'a>(targets: impl Iterator<Item = &'a ClassTarget>, labels: &LabelSet) -> Vec<usize> {
    if labels.kind == LabelKind::Number {
        return Vec::new();
    }
    let mut counts = vec![0; labels.names.len()];
    for target in targets {
        match target {
            ClassTarget::Id(id) => counts.iter_mut().skip(*id as usize).take(1).for_each(|n| *n += 1),
            ClassTarget::Values(values) => {
                counts.iter_mut().zip(values).for_each(|(n, value)| *n += usize::from(*value > 0.5));
            }
        }
    }
    counts
}

/// Reads the sources as labelled texts. Labels that are not known are taken from the data: names in their order by
/// letters, or as many as the highest number says.
///
/// # Errors
/// As [`build_dataset`](crate::build_dataset); and for a label that is none of those known, or of another kind than the
/// others, with its file and line.
pub fn build_labelled(
    sources: &[Source],
    tokenizer: &Tokenizer,
    options: &DataOptions,
    known: &KnownLabels,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<LabelledSet> {
    if sources.is_empty() {
        return Err(DataError::NoSource);
    }
    let mut report = DataReport::default();
    let mut documents = Vec::new();
    for source in sources {
        let source = Source { format: Some(labelled_format(source)?), ..source.clone() };
        let mut records = Documents::open(&source, options.reading)?;
        for document in records.by_ref() {
            documents.push(document?);
        }
        records.check_bad()?;
        report.sources.push(SourceReport::of(&records));
    }
    let labels = labels_of(&documents, known)?;
    let of = documents.len();
    progress(0, of);
    let mut texts = Vec::with_capacity(of);
    let mut seen = HashSet::new();
    for chunk in documents.chunks(CHUNK) {
        // Looked at in order, so that of several faults the same one is always named.
        let all: Vec<Result<_>> = chunk.par_iter().map(|document| one(document, tokenizer, &labels, options)).collect();
        for (document, one) in chunk.iter().zip(all) {
            let Some((text, cut)) = one? else { continue };
            let origin = &document.origin;
            report.read += 1;
            let dropped = if text.tokens.input_ids.is_empty() {
                Some(DropReason::Empty)
            } else {
                Some(DropReason::TooLong).filter(|_| cut && options.truncation == Truncation::Drop)
            };
            if dropped.is_some() || cut {
                report.add_affected(dropped, origin);
            }
            if dropped.is_some() {
                continue;
            }
            let is_new = seen.insert(text.fingerprint());
            if !is_new {
                report.duplicates += 1;
                report.duplicate_tokens += text.tokens.input_ids.len();
            }
            if is_new || !options.dedup {
                report.add_kept(&text.tokens, tokenizer);
                texts.push(text);
            }
        }
        progress(report.read, of);
    }
    if texts.is_empty() {
        return Err(report.nothing_trained());
    }
    report.check_affected(options.max_affected_share)?;
    Ok(LabelledSet { texts, labels, report })
}

/// The text of a record, and whether it was too long; none for a record of another kind.
fn one(
    document: &Document,
    tokenizer: &Tokenizer,
    labels: &LabelSet,
    options: &DataOptions,
) -> Result<Option<(LabelledText, bool)>> {
    let Body::Labelled { text, text_pair, label } = &document.body else { return Ok(None) };
    let origin = &document.origin;
    let target = labels.target(label, origin)?;
    let (encoded, cut) = encode(tokenizer, text, text_pair.as_deref(), options).map_err(|e| e.at(origin))?;
    if cut && options.truncation == Truncation::Refuse {
        let (tokens, max_length) = (encoded.ids.len(), options.max_length);
        return Err(DataError::TooLong { origin: origin.clone(), tokens, max_length });
    }
    let trained = vec![false; encoded.ids.len()];
    let tokens = Example { input_ids: encoded.ids, trained, origin: origin.clone() };
    Ok(Some((LabelledText { tokens, token_types: encoded.types, target }, cut)))
}

/// A source that says nothing is one of labelled texts here.
fn labelled_format(source: &Source) -> Result<Format> {
    match source.format {
        None | Some(Format::Classification) => Ok(Format::Classification),
        Some(format) => Err(DataError::NotLabelled { path: source.path.clone(), format }),
    }
}

/// Tokens of a text or a pair, with the type of each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedText {
    /// The tokens, special ones included.
    pub ids: Vec<u32>,
    /// For each, 0 in the first text and 1 in the second.
    pub types: Vec<u8>,
}

/// The tokens of a text or a pair, cut to `options.max_length` where that is asked for, and whether they were too many.
/// What is cut is cut from the longer of the two texts, and never the special tokens.
///
/// # Errors
/// When the tokenizer cannot encode the text.
pub fn encode(
    tokenizer: &Tokenizer,
    text: &str,
    text_pair: Option<&str>,
    options: &DataOptions,
) -> Result<(EncodedText, bool)> {
    let whole = tokenizer.encode_pair(text, text_pair, None, false)?;
    let too_long = whole.ids.len() > options.max_length;
    let from_left = match options.truncation {
        Truncation::Left => true,
        Truncation::Right => false,
        Truncation::Refuse | Truncation::Drop => return Ok((whole, too_long)),
        policy => return Err(DataError::LabelledTruncation { policy }),
    };
    if !too_long {
        return Ok((whole, false));
    }
    Ok((tokenizer.encode_pair(text, text_pair, Some(options.max_length), from_left)?, true))
}

/// What the labels are, from what is known and what the data says.
fn labels_of(documents: &[Document], known: &KnownLabels) -> Result<LabelSet> {
    let labels = || {
        documents.iter().filter_map(|d| match &d.body {
            Body::Labelled { label, .. } => Some((label, &d.origin)),
            _ => None,
        })
    };
    let kind = known.kind.unwrap_or_else(|| match &known.names {
        Some(names) if names.len() == 1 => LabelKind::Number,
        _ if labels().all(|(label, _)| label.is_array()) => {
            let wholes = |v: &Value| v.as_str().is_some() || v.as_f64().is_some_and(|x| x == 0.0 || x == 1.0);
            let flags = |label: &Value| label.as_array().is_some_and(|list| list.iter().all(wholes));
            if labels().all(|(label, _)| flags(label)) { LabelKind::Multi } else { LabelKind::Number }
        }
        None if labels().any(|(label, _)| label.is_f64()) => LabelKind::Number,
        _ => LabelKind::Single,
    });
    if let Some(names) = &known.names {
        return Ok(LabelSet { names: names.clone(), kind });
    }
    let mut names: BTreeSet<&str> = BTreeSet::new();
    let mut numbered = 0;
    for (label, origin) in labels() {
        let wrong = |wanted| DataError::Label { origin: origin.clone(), found: shown(label), wanted };
        match (kind, label) {
            (LabelKind::Number, Value::Array(list)) => numbered = numbered.max(list.len()),
            (LabelKind::Number, _) => numbered = numbered.max(1),
            (LabelKind::Multi, Value::Array(list)) => {
                names.extend(list.iter().filter_map(Value::as_str));
                if list.iter().any(|v| !v.is_string()) {
                    numbered = numbered.max(list.len());
                }
            }
            (LabelKind::Single, Value::String(name)) => {
                names.insert(name);
            }
            (LabelKind::Single, Value::Bool(_)) => numbered = numbered.max(2),
            (LabelKind::Single, Value::Number(n)) => {
                let id = n.as_u64().and_then(|id| usize::try_from(id).ok()).filter(|id| *id < MAX_CLASSES);
                let id = id.ok_or_else(|| wrong(format!("a whole number from 0 to {}", MAX_CLASSES - 1)))?;
                numbered = numbered.max(id + 1);
            }
            _ => return Err(wrong("of the same kind in every record".into())),
        }
    }
    let as_numbers: Option<Vec<usize>> = names.iter().map(|name| name.parse().ok()).collect();
    let names: Vec<String> = match (names.is_empty(), as_numbers) {
        // Numbers as a table without types has them.
        (false, Some(ids)) if kind == LabelKind::Single && numbered == 0 && ids.iter().all(|id| *id < MAX_CLASSES) => {
            (0..=ids.into_iter().max().unwrap_or(0)).map(|i| format!("LABEL_{i}")).collect()
        }
        (false, _) if numbered > 0 => {
            let (label, origin) =
                labels().find(|(label, _)| !label.is_string()).unwrap_or((&Value::Null, &documents[0].origin));
            let wanted = "a name, as in other records, or a number in all of them".into();
            return Err(DataError::Label { origin: origin.clone(), found: shown(label), wanted });
        }
        (false, _) => names.into_iter().map(str::to_owned).collect(),
        (true, _) => (0..numbered.max(1)).map(|i| format!("LABEL_{i}")).collect(),
    };
    if kind == LabelKind::Single && names.len() < 2 {
        return Err(DataError::OneLabel { label: names.first().cloned().unwrap_or_default() });
    }
    Ok(LabelSet { names, kind })
}

impl LabelSet {
    /// What a record says, as ids or numbers.
    fn target(&self, label: &Value, origin: &Origin) -> Result<ClassTarget> {
        let wrong = |wanted: String| DataError::Label { origin: origin.clone(), found: shown(label), wanted };
        let number = |v: &Value| match v {
            Value::Bool(b) => Some(f64::from(u8::from(*b))),
            Value::String(s) => s.trim().parse().ok(),
            v => v.as_f64(),
        };
        match self.kind {
            LabelKind::Single => {
                let named = label.as_str().and_then(|name| self.names.iter().position(|n| n == name));
                let id = named.or_else(|| {
                    let id = number(label).filter(|x| x.fract() == 0.0 && *x >= 0.0)?;
                    Some(id as usize).filter(|id| *id < self.names.len())
                });
                let id = id.ok_or_else(|| wrong(self.to_string()))?;
                Ok(ClassTarget::Id(u32::try_from(id).unwrap_or(u32::MAX)))
            }
            LabelKind::Multi => {
                let Some(list) = label.as_array() else { return Err(wrong(format!("a list of {self}"))) };
                if !list.is_empty() && list.iter().all(|v| !v.is_string()) {
                    let flags: Option<Vec<f32>> =
                        list.iter().map(|v| number(v).filter(|x| *x == 0.0 || *x == 1.0).map(|x| x as f32)).collect();
                    return match flags.filter(|flags| flags.len() == self.names.len()) {
                        Some(flags) => Ok(ClassTarget::Values(flags)),
                        None => {
                            Err(wrong(format!("a 0 or 1 for each of {} labels, or a list of names", self.names.len())))
                        }
                    };
                }
                let mut flags = vec![0.0; self.names.len()];
                for name in list {
                    let at = self.names.iter().position(|n| name.as_str() == Some(n));
                    flags[at.ok_or_else(|| wrong(format!("a list of {self}")))?] = 1.0;
                }
                Ok(ClassTarget::Values(flags))
            }
            LabelKind::Number => {
                let list = label.as_array().map_or(std::slice::from_ref(label), Vec::as_slice);
                let values: Option<Vec<f32>> =
                    list.iter().map(|v| number(v).map(|x| x as f32).filter(|x| x.is_finite())).collect();
                match values.filter(|values| values.len() == self.names.len()) {
                    Some(values) => Ok(ClassTarget::Values(values)),
                    None if self.names.len() == 1 => Err(wrong("a number".into())),
                    None => Err(wrong(format!("a list of {} numbers", self.names.len()))),
                }
            }
        }
    }
}

impl fmt::Display for LabelSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 12;
        let names: Vec<String> = self.names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect();
        let more = if self.names.len() > SHOWN { ", ..." } else { "" };
        write!(f, "one of {}{more}, or an id from 0 to {}", names.join(", "), self.names.len().saturating_sub(1))
    }
}

fn shown(label: &Value) -> String {
    let text = label.to_string();
    if text.chars().count() > 80 { format!("{}...", text.chars().take(80).collect::<String>()) } else { text }
}
