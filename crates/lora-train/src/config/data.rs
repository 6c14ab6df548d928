//! `[data]`: what is trained on, and what is evaluated.

use super::keys::{Kind, Range, choice, section};
use std::path::PathBuf;

choice! {
    /// What happens to an example with more tokens than `max_length`.
    Truncation {
        /// The run stops and names the example.
        Refuse = "refuse",
        /// The example is left out.
        Drop = "drop",
        /// Its first tokens are cut off.
        Left = "left",
        /// Its last tokens are cut off.
        Right = "right",
    }
}

/// The formats of a dataset, by name.
const FORMATS: &[&str] = &["alpaca", "messages", "prompt_completion", "text", "tokenized", "classification"];

section! {
    /// One file of examples.
    SourceConfig {
        /// The file: `.json` (a list of records) or `.jsonl` (a record a line).
        path: PathBuf = PathBuf::new(), Kind::Text;
        /// Format of the records; told from the keys of the first record when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        format: Option<String> = None, Kind::Choice(FORMATS);
        /// Table from our field names to the file's, where they differ, as `{ prompt = "question" }`.
        #[serde(with = "super::ordered", skip_serializing_if = "Vec::is_empty")]
        columns: Vec<(String, String)> = Vec::new(), Kind::Map(&Kind::Text);
        /// Takes the first so many records only; all when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        max_samples: Option<u64> = None, Kind::Integer { min: 1, max: i64::MAX };
    }
}

section! {
    /// The data. Examples are laid end to end, so that no padding is ever computed.
    DataConfig {
        /// What is trained on: a path, a list of paths, or a list of tables with `path`, `format`, `columns`, `max_samples`.
        train: Vec<SourceConfig> = Vec::new(), Kind::Tables(SourceConfig::KEYS);
        /// What is evaluated, written as `train` is.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        eval: Vec<SourceConfig> = Vec::new(), Kind::Tables(SourceConfig::KEYS);
        /// Takes this part of `train` for evaluation instead: a fraction below 1, or a number of examples; 0 takes none.
        eval_split: f64 = 0.0, Kind::Split;
        /// Tokens of the longest example, and of a packed row.
        max_length: u32 = 2048, Kind::Integer { min: 2, max: 16_777_216 };
        /// Fills rows up to `max_length` tokens with as many examples as fit. Attention never crosses examples.
        packing: bool = false, Kind::Bool;
        /// What happens to an example of more than `max_length` tokens: `refuse` stops the run, `drop` leaves it out, `left`
        /// and `right` cut that side off. Every cut is counted in the summary.
        truncation: Truncation = Truncation::Right, Kind::Choice(Truncation::NAMES);
        /// Jinja file with a chat template that goes before the tokenizer's own.
        #[serde(skip_serializing_if = "Option::is_none")]
        template: Option<PathBuf> = None, Kind::Text;
        /// Trains on the prompt's tokens too, and not on the answers only.
        train_on_prompt: bool = false, Kind::Bool;
        /// The run stops when a larger share of the examples than this is cut or left out.
        max_affected_share: f64 = 0.05, Kind::Number(Range::ZeroToOne);
        /// Draws a new order of the examples for every epoch.
        shuffle: bool = true, Kind::Bool;
    }
}
