//! What became of the records of a dataset.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::document::Origin;
use crate::error::{DataError, Result};
use crate::example::{Example, Outcome};
use crate::format::Format;
use crate::replay::Replay;
use crate::source::{BadReport, Documents};
use crate::tokenizer::Tokenizer;

/// So many places are named for each reason.
const FIRST_ORIGINS: usize = 5;

/// Why a row was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// The answer or the text is empty.
    Empty,
    /// No message of the assistant is trained.
    NoAnswer,
    /// Longer than the limit.
    TooLong,
    /// No token of it is trained, perhaps because the answer was cut off.
    NoTrainedToken,
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "empty answer",
            Self::NoAnswer => "no assistant message",
            Self::TooLong => "too long",
            Self::NoTrainedToken => "no trained token",
        })
    }
}

/// Rows left out for one reason.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Dropped {
    /// How many.
    pub count: usize,
    /// Where the first of them stand.
    pub first: Vec<Origin>,
}

impl Dropped {
    fn add(&mut self, origin: &Origin) {
        self.count += 1;
        if self.first.len() < FIRST_ORIGINS {
            self.first.push(origin.clone());
        }
    }
}

/// What one file held.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceReport {
    /// The file.
    pub path: PathBuf,
    /// The format it was read as.
    pub format: Format,
    /// Its records.
    pub records: usize,
    /// Columns that the format does not read, with the number of records that have them.
    pub ignored_columns: BTreeMap<String, usize>,
    /// Records that were left out because they cannot be used.
    pub bad: BadReport,
    /// What is to be known about how the dataset is read.
    pub notes: Vec<String>,
}

impl SourceReport {
    /// What was read of a source up to now.
    pub(crate) fn of(documents: &Documents) -> Self {
        Self {
            path: documents.source().path.clone(),
            format: documents.format().unwrap_or(Format::Text),
            records: documents.read(),
            ignored_columns: documents.ignored_columns(),
            bad: documents.bad().clone(),
            notes: documents.source().notes.clone(),
        }
    }
}

/// Rows of similar length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LengthBucket {
    /// At most so many tokens, and more than the bucket before: a power of two.
    pub up_to: usize,
    /// Rows in the bucket.
    pub examples: usize,
}

/// The chat template that conversations were written with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateReport {
    /// Its name or file.
    pub name: String,
    /// Whether it marks what an assistant generates; else answers are found by rendering prefixes.
    pub marks_generation: bool,
    /// Whether it writes the date, so that another day gives other tokens unless the date is fixed.
    pub writes_date: bool,
}

/// What became of every record.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DataReport {
    /// The chat template, where the tokenizer or the configuration has one.
    pub template: Option<TemplateReport>,
    /// The files.
    pub sources: Vec<SourceReport>,
    /// Records read.
    pub read: usize,
    /// Rows kept.
    pub kept: usize,
    /// Rows that were cut to the length limit or split, and kept.
    pub truncated: usize,
    /// Tokens that were cut off.
    pub cut_tokens: usize,
    /// Those of them that were to be trained.
    pub cut_trained_tokens: usize,
    /// Turns that were left out to make the rest fit.
    pub cut_turns: usize,
    /// Rows more than there were, because long ones were split.
    pub split_rows: usize,
    /// Where the first rows stand that were cut.
    pub first_truncated: Vec<Origin>,
    /// Rows left out, by reason.
    pub dropped: BTreeMap<DropReason, Dropped>,
    /// Tokens of the rows that were left out for their length or because nothing of them is trained.
    pub dropped_tokens: usize,
    /// Those of them that were to be trained.
    pub dropped_trained_tokens: usize,
    /// Records of which a row was cut or left out.
    pub affected: usize,
    /// Rows that are the same as one before; they are kept, unless `dedup` leaves them out.
    pub duplicates: usize,
    /// Tokens of those rows.
    pub duplicate_tokens: usize,
    /// Kept rows by the end token that their last trained text ends with.
    pub end_tokens: BTreeMap<String, usize>,
    /// Kept rows whose last trained token is no end token, because it was cut off or the template writes none.
    pub without_end: usize,
    /// Places where a trained text begins or ends inside a token, because the tokenizer cannot tokenise it apart.
    pub merged_edges: usize,
    /// Records laid out as plain `### Instruction:` text, because the tokenizer has no chat template.
    pub classic_prompts: usize,
    /// Records that became a row for each turn, because the chat template writes earlier turns differently.
    pub split_conversations: usize,
    /// Tokens of the kept rows.
    pub tokens: usize,
    /// Those of them that are trained.
    pub trained_tokens: usize,
    /// Tokens of the longest kept row.
    pub longest: usize,
    /// Kept rows by length.
    pub length_histogram: Vec<LengthBucket>,
    /// Where rows of an old set are trained among them: how many, in rows as they are batched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Replay>,
}

impl DataReport {
    /// Counts what became of one record.
    pub(crate) fn add(&mut self, outcome: &Outcome, origin: &Origin) {
        self.read += 1;
        self.truncated += outcome.truncated;
        if outcome.truncated > 0 && self.first_truncated.len() < FIRST_ORIGINS {
            self.first_truncated.push(origin.clone());
        }
        self.affected += usize::from(outcome.truncated > 0 || !outcome.dropped.is_empty());
        self.cut_tokens += outcome.cut.0;
        self.cut_trained_tokens += outcome.cut.1;
        self.cut_turns += outcome.cut_turns;
        self.split_rows += outcome.split_rows;
        self.dropped_tokens += outcome.left_out.0;
        self.dropped_trained_tokens += outcome.left_out.1;
        self.merged_edges += outcome.merged_edges;
        self.classic_prompts += usize::from(outcome.classic);
        self.split_conversations += usize::from(outcome.row_per_turn);
        for reason in &outcome.dropped {
            self.dropped.entry(*reason).or_default().add(origin);
        }
    }

    /// Counts a record that was left out for a reason, or else cut.
    pub(crate) fn add_affected(&mut self, dropped: Option<DropReason>, origin: &Origin) {
        self.affected += 1;
        match dropped {
            Some(reason) => self.dropped.entry(reason).or_default().add(origin),
            None => {
                self.truncated += 1;
                if self.first_truncated.len() < FIRST_ORIGINS {
                    self.first_truncated.push(origin.clone());
                }
            }
        }
    }

    /// Counts a row that was kept.
    pub(crate) fn add_kept(&mut self, example: &Example, tokenizer: &Tokenizer) {
        let length = example.input_ids.len();
        self.kept += 1;
        self.tokens += length;
        self.trained_tokens += example.trained.iter().filter(|&&trained| trained).count();
        self.longest = self.longest.max(length);
        let last = (0..length).rev().find(|&t| example.trained[t]).map(|t| example.input_ids[t]);
        match last.filter(|&id| tokenizer.is_added(id)) {
            Some(id) => {
                let token = tokenizer.token(id).unwrap_or_else(|| id.to_string());
                *self.end_tokens.entry(token).or_default() += 1;
            }
            None => self.without_end += 1,
        }
        let up_to = length.next_power_of_two();
        match self.length_histogram.binary_search_by_key(&up_to, |bucket| bucket.up_to) {
            Ok(at) => self.length_histogram[at].examples += 1,
            Err(at) => self.length_histogram.insert(at, LengthBucket { up_to, examples: 1 }),
        }
    }

    /// Refuses a set of which a larger share than `limit` was cut or left out.
    pub(crate) fn check_affected(&self, limit: f64) -> Result<()> {
        if self.affected as f64 > limit * self.read as f64 {
            return Err(DataError::TooManyAffected {
                affected: self.affected,
                read: self.read,
                reasons: self.reasons(),
                limit,
                first: self.first_affected(),
            });
        }
        Ok(())
    }

    /// The refusal of a set of which nothing is left.
    pub(crate) fn nothing_trained(&self) -> DataError {
        DataError::NothingTrained { reasons: self.reasons(), first: self.first_affected() }
    }

    /// The reasons for what was cut or left out, in words.
    pub(crate) fn reasons(&self) -> String {
        let mut reasons: Vec<String> =
            self.dropped.iter().map(|(reason, dropped)| format!("{} {reason}", dropped.count)).collect();
        if self.truncated > 0 {
            reasons.push(format!("{} truncated", self.truncated));
        }
        if reasons.is_empty() { "nothing was dropped".to_owned() } else { reasons.join(", ") }
    }

    /// The first record that was cut or left out.
    pub(crate) fn first_affected(&self) -> String {
        let dropped = self.dropped.values().filter_map(|dropped| dropped.first.first());
        dropped.chain(&self.first_truncated).next().map_or_else(|| "none".to_owned(), Origin::to_string)
    }
}
