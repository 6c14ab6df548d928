//! Where records come from: files, how they are laid out, and a stream of documents that holds one record at a time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::document::{Body, Document, Origin};
use crate::error::{DataError, Result};
use crate::format::Format;
use crate::hub::{self, HubId};
use crate::layout::Layout;
use crate::read::{self, DataFile, Records};
use crate::tags::Tags;

/// What a record of a text file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TextBy {
    /// Each line that is not blank.
    #[default]
    Line,
    /// The lines between blank ones.
    Paragraph,
    /// The whole file.
    Document,
}

/// A dataset and how to read it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Source {
    /// A file, a folder of files, or a pattern as `data/*.jsonl`: JSON, JSON Lines, CSV, Parquet, Arrow or text, each also
    /// with gzip or zstd around it; a `dataset_info.json`, followed by `#` and the name of a dataset; or a dataset of the
    /// hub, as `hf://owner/name`.
    pub path: PathBuf,
    /// How records are laid out; told from the fields of the first record when absent.
    pub format: Option<Format>,
    /// For a field of the format, the name it has in this file.
    pub columns: BTreeMap<String, String>,
    /// Fields that are not read, though the file may have a column of their name.
    pub off: BTreeSet<String>,
    /// What the files call the parts and the roles of a message.
    pub tags: Tags,
    /// What a record of a text file is.
    pub text_by: TextBy,
    /// In a text file, what stands between prompt and completion.
    pub separator: Option<String>,
    /// At most so many records are read, from the start of the files.
    pub max_samples: Option<usize>,
    /// How often the dataset counts in a mix; see [`mix_order`](crate::mix_order). 1 when absent.
    pub weight: Option<f64>,
    /// The folder in which `huggingface_hub` keeps what it fetched, for a path as `hf://owner/name`.
    pub hub_cache: Option<PathBuf>,
    /// The split of such a dataset; `train` when absent.
    pub split: Option<String>,
    /// What a reader of the report should know about how the dataset is read.
    pub notes: Vec<String>,
}

impl Source {
    /// The column that a field is read from; nothing has the name of a field that is off.
    pub(crate) fn column<'s>(&'s self, field: &'s str) -> &'s str {
        match self.columns.get(field) {
            Some(column) => column,
            None if self.off.contains(field) => "",
            None => field,
        }
    }
}

/// What happens to a record that cannot be used: broken JSON, a missing field, roles out of order and so on.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum BadRecords {
    /// Reading stops and names it.
    #[default]
    Refuse,
    /// It is left out and counted; reading stops once the whole is read and more than this share was left out.
    Skip {
        /// From 0 to 1.
        max_share: f64,
    },
}

/// How files are read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReadOptions {
    /// What happens to bad records.
    pub bad_records: BadRecords,
    /// The longest record in bytes; a longer one is bad, and never held in memory.
    pub max_record_bytes: usize,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self { bad_records: BadRecords::Refuse, max_record_bytes: 64 << 20 }
    }
}

/// Records that were left out because they cannot be used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadReport {
    /// How many.
    pub count: usize,
    /// What was wrong with the first of them.
    pub first: Vec<String>,
}

/// A dataset is taken at most so often.
const MAX_WEIGHT: f64 = 1000.0;
/// So many faults are kept in words.
const FIRST_FAULTS: usize = 5;

/// The records of a source, one after the other, in the order of the files' names and of the records in them.
pub struct Documents {
    source: Source,
    options: ReadOptions,
    files: VecDeque<DataFile>,
    current: Option<Records>,
    layout: Option<Layout>,
    /// Records that became documents.
    good: usize,
    bad: BadReport,
    first_bad: Option<Box<DataError>>,
    done: bool,
}

impl std::fmt::Debug for Documents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Documents").field("source", &self.source).field("good", &self.good).finish_non_exhaustive()
    }
}

impl Documents {
    /// Opens a source; its first record is read only when it is asked for.
    ///
    /// # Errors
    /// A `columns` table that names no field, a path that means no file, a kind of file that is not read, an entry of
    /// `dataset_info.json` that asks for something that is not done here.
    pub fn open(source: &Source, options: ReadOptions) -> Result<Self> {
        let source = crate::dataset_info::resolve(source)?;
        Layout::check_columns(&source)?;
        if let Some(weight) = source.weight.filter(|weight| !(*weight > 0.0 && *weight <= MAX_WEIGHT)) {
            return Err(DataError::Weight { path: source.path, weight });
        }
        let files = if HubId::is_hub(&source.path) {
            let split = source.split.as_deref().unwrap_or("train");
            hub::files(&source.path, source.hub_cache.as_deref(), split)?
        } else {
            read::expand(&source.path)?
        };
        Ok(Self {
            source,
            options,
            files: files.into(),
            current: None,
            layout: None,
            good: 0,
            bad: BadReport::default(),
            first_bad: None,
            done: false,
        })
    }

    /// The source as it is read: what `dataset_info.json` says is filled in.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The files that were not begun yet: all of them before the first record was read.
    pub(crate) fn files(&self) -> impl Iterator<Item = &DataFile> {
        self.files.iter()
    }

    /// The format, once the first record was read.
    pub fn format(&self) -> Option<Format> {
        self.layout.as_ref().map(|layout| layout.format).or(self.source.format)
    }

    /// Records that became documents so far.
    pub fn read(&self) -> usize {
        self.good
    }

    /// Columns that no field of the format reads, and in how many records they stood so far.
    pub fn ignored_columns(&self) -> BTreeMap<String, usize> {
        self.layout.as_ref().map(|layout| layout.ignored_columns.clone()).unwrap_or_default()
    }

    /// What was left out so far.
    pub fn bad(&self) -> &BadReport {
        &self.bad
    }

    /// Counts a record that turned out to be bad after it was given out, when its conversation was rendered for instance.
    ///
    /// # Errors
    /// The fault itself, where bad records are refused or the fault is not one record's.
    pub fn reject(&mut self, error: DataError) -> Result<()> {
        self.good = self.good.saturating_sub(1);
        self.count_bad(error)
    }

    fn count_bad(&mut self, error: DataError) -> Result<()> {
        let refused = self.options.bad_records == BadRecords::Refuse || !error.is_bad_record();
        if refused {
            self.done = true;
            return Err(error);
        }
        self.bad.count += 1;
        if self.bad.first.len() < FIRST_FAULTS {
            self.bad.first.push(error.to_string());
        }
        self.first_bad.get_or_insert_with(|| Box::new(error));
        Ok(())
    }

    /// Refuses a source in which too many records were bad; to be asked when all were read.
    ///
    /// # Errors
    /// [`DataError::TooManyBad`], with the first of them as its cause.
    pub fn check_bad(&mut self) -> Result<()> {
        let BadRecords::Skip { max_share } = self.options.bad_records else { return Ok(()) };
        let (bad, records) = (self.bad.count, self.good + self.bad.count);
        match self.first_bad.take() {
            Some(first) if bad as f64 > max_share * records as f64 => {
                Err(DataError::TooManyBad { path: self.source.path.clone(), bad, records, limit: max_share, first })
            }
            first => {
                self.first_bad = first;
                Ok(())
            }
        }
    }

    /// The next record that is good.
    fn next_document(&mut self) -> Result<Option<Document>> {
        while self.source.max_samples.is_none_or(|limit| self.good < limit) {
            let Some(records) = &mut self.current else {
                let Some(file) = self.files.pop_front() else { break };
                self.current = Some(read::open(&file, &self.source, self.options.max_record_bytes)?);
                continue;
            };
            let Some(record) = records.next() else {
                self.current = None;
                continue;
            };
            let document = record.and_then(|(value, origin)| self.document(value, origin));
            match document {
                Ok(document) => {
                    self.good += 1;
                    return Ok(Some(document));
                }
                Err(error) => self.count_bad(error)?,
            }
        }
        self.done = true;
        if self.good == 0 && self.bad.count == 0 {
            return Err(DataError::EmptyFile { path: self.source.path.clone() });
        }
        self.check_bad()?;
        Ok(None)
    }

    fn document(&mut self, value: serde_json::Value, origin: Origin) -> Result<Document> {
        let record = read::object(value, &origin)?;
        let layout = match &mut self.layout {
            Some(layout) => layout,
            None => self.layout.insert(Layout::detect(&self.source, &record, &origin)?),
        };
        layout.document(&self.source, record, origin)
    }
}

impl Iterator for Documents {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let next = self.next_document();
        self.done |= next.is_err();
        next.transpose()
    }
}

/// Reads every record of a dataset into memory; [`Documents`] gives them one at a time.
///
/// # Errors
/// Names file, line and field of whatever cannot be read: an unknown extension, broken JSON, a key that
/// appears twice, a missing or mistyped field, an empty file, a format that cannot be told.
pub fn read_documents(source: &Source) -> Result<Vec<Document>> {
    Documents::open(source, ReadOptions::default())?.collect()
}

/// What preference data is used for where plain examples are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PreferenceUse {
    /// It is refused, because training both sides would train bad answers.
    #[default]
    Refuse,
    /// The better side of a pair, and the answers that are rated good, as plain examples.
    Chosen,
    /// Every side as an example of its own: to look at, and not to train on.
    BothSides,
}

impl PreferenceUse {
    /// The plain documents that a document stands for.
    pub(crate) fn apply(self, document: Document) -> Vec<Document> {
        let Document { origin, body } = document;
        let bodies = match (self, body) {
            (Self::Chosen, Body::Preference { chosen, .. }) => vec![*chosen],
            (Self::BothSides, Body::Preference { chosen, rejected }) => vec![*chosen, *rejected],
            (Self::Chosen, Body::Rated { desirable: false, .. }) => Vec::new(),
            (Self::Chosen | Self::BothSides, Body::Rated { answer, .. }) => vec![*answer],
            (_, body) => vec![body],
        };
        bodies.into_iter().map(|body| Document { origin: origin.clone(), body }).collect()
    }
}
