//! What became of the records of a dataset.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::document::Origin;
use crate::example::{Example, Outcome};
use crate::format::Format;

/// So many places are named for each reason.
const FIRST_ORIGINS: usize = 5;

/// Why a row was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
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
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
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
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SourceReport {
    /// The file.
    pub path: PathBuf,
    /// The format it was read as.
    pub format: Format,
    /// Its records.
    pub records: usize,
    /// Columns that the format does not read, with the number of records that have them.
    pub ignored_columns: BTreeMap<String, usize>,
}

/// Rows of similar length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct LengthBucket {
    /// At most so many tokens, and more than the bucket before: a power of two.
    pub up_to: usize,
    /// Rows in the bucket.
    pub examples: usize,
}

/// What became of every record.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct DataReport {
    /// The files.
    pub sources: Vec<SourceReport>,
    /// Records read.
    pub read: usize,
    /// Rows kept.
    pub kept: usize,
    /// Rows that were cut to the length limit and kept.
    pub truncated: usize,
    /// Where the first rows stand that were cut.
    pub first_truncated: Vec<Origin>,
    /// Rows left out, by reason.
    pub dropped: BTreeMap<DropReason, Dropped>,
    /// Records of which a row was cut or left out.
    pub affected: usize,
    /// Rows that are the same as one before; they are kept.
    pub duplicates: usize,
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
        self.classic_prompts += usize::from(outcome.classic);
        self.split_conversations += usize::from(outcome.examples.len() + outcome.dropped.len() > 1);
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
    pub(crate) fn add_kept(&mut self, example: &Example) {
        let length = example.input_ids.len();
        self.kept += 1;
        self.tokens += length;
        self.trained_tokens += example.trained.iter().filter(|&&trained| trained).count();
        self.longest = self.longest.max(length);
        let up_to = length.next_power_of_two();
        match self.length_histogram.binary_search_by_key(&up_to, |bucket| bucket.up_to) {
            Ok(at) => self.length_histogram[at].examples += 1,
            Err(at) => self.length_histogram.insert(at, LengthBucket { up_to, examples: 1 }),
        }
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

impl fmt::Display for DataReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for source in &self.sources {
            writeln!(f, "{}  {} records as {}", source.path.display(), source.records, source.format)?;
            if !source.ignored_columns.is_empty() {
                let columns: Vec<&str> = source.ignored_columns.keys().map(String::as_str).collect();
                writeln!(f, "  columns not read: {}", columns.join(", "))?;
            }
        }
        let share = |part: usize, of: usize| if of == 0 { 0.0 } else { 100.0 * part as f64 / of as f64 };
        writeln!(f, "read            {:>12}", self.read)?;
        writeln!(f, "kept            {:>12}", self.kept)?;
        writeln!(f, "truncated       {:>12}", self.truncated)?;
        for (reason, dropped) in &self.dropped {
            let first = dropped.first.first().map(Origin::to_string).unwrap_or_default();
            writeln!(f, "dropped         {:>12}  {reason}, first {first}", dropped.count)?;
        }
        writeln!(f, "duplicates      {:>12}", self.duplicates)?;
        if self.classic_prompts > 0 {
            writeln!(f, "without template{:>12}  laid out as `### Instruction:` text", self.classic_prompts)?;
        }
        if self.split_conversations > 0 {
            writeln!(f, "split           {:>12}  conversations, a row per assistant turn", self.split_conversations)?;
        }
        writeln!(f, "tokens          {:>12}", self.tokens)?;
        let trained = share(self.trained_tokens, self.tokens);
        writeln!(f, "trained tokens  {:>12}  {trained:.1} %", self.trained_tokens)?;
        writeln!(f, "longest         {:>12}", self.longest)?;
        for bucket in &self.length_histogram {
            let percent = share(bucket.examples, self.kept);
            writeln!(f, "  up to {:>7} {:>12}  {percent:.1} %", bucket.up_to, bucket.examples)?;
        }
        Ok(())
    }
}
