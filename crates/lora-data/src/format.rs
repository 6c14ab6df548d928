//! The record formats and how one is told from a record's fields.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::DataError;

/// How a record of a dataset is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// `instruction`, `input`, `output`, and optionally `system` and `history`.
    Alpaca,
    /// `conversations`: a list of `from` and `value` whose turns alternate; optionally `system` and `tools`.
    Sharegpt,
    /// `messages` (or `conversations`): a list of role and content; optionally `tools`.
    Messages,
    /// `prompt` and `completion`: two strings, or two lists of messages.
    PromptCompletion,
    /// `chosen` and `rejected`: a better and a worse answer, with a prompt in any of the layouts above or with none.
    Preference,
    /// An answer with its prompt, in any of the layouts above, and `label`: whether it is a good one.
    Kto,
    /// `text`, all of it trained.
    Text,
    /// `input_ids`, and optionally `labels` (-100 is not trained).
    Tokenized,
    /// `text`, optionally `text_pair`, and `label`, for classifiers; never told from the fields.
    Classification,
}

impl Format {
    /// Every format, in the order of their names in messages.
    pub const ALL: [Self; 9] = [
        Self::Alpaca,
        Self::Sharegpt,
        Self::Messages,
        Self::PromptCompletion,
        Self::Preference,
        Self::Kto,
        Self::Text,
        Self::Tokenized,
        Self::Classification,
    ];

    /// The format's name in configuration files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Alpaca => "alpaca",
            Self::Sharegpt => "sharegpt",
            Self::Messages => "messages",
            Self::PromptCompletion => "prompt_completion",
            Self::Preference => "preference",
            Self::Kto => "kto",
            Self::Text => "text",
            Self::Tokenized => "tokenized",
            Self::Classification => "classification",
        }
    }

    /// The fields a record of this format may have.
    pub fn fields(self) -> &'static [&'static str] {
        match self {
            Self::Alpaca => &["instruction", "input", "output", "system", "history"],
            Self::Sharegpt => &["conversations", "tools", "system"],
            Self::Messages => &["messages", "tools", "system"],
            Self::PromptCompletion => &["prompt", "completion", "tools"],
            Self::Preference => &[
                "prompt",
                "chosen",
                "rejected",
                "conversations",
                "messages",
                "instruction",
                "input",
                "system",
                "history",
                "tools",
            ],
            Self::Kto => &[
                "prompt",
                "completion",
                "label",
                "conversations",
                "messages",
                "instruction",
                "input",
                "output",
                "system",
                "history",
                "tools",
            ],
            Self::Text => &["text"],
            Self::Tokenized => &["input_ids", "labels"],
            Self::Classification => &["text", "text_pair", "label"],
        }
    }

    /// The fields that tell this format from the others. A pair or a label goes before all of them.
    fn required(self) -> &'static [&'static str] {
        match self {
            Self::Alpaca => &["instruction", "output"],
            Self::Sharegpt => &["conversations"],
            Self::Messages => &["messages"],
            Self::Preference => &["chosen", "rejected"],
            Self::Kto => &["label"],
            Self::PromptCompletion => &["prompt", "completion"],
            Self::Text => &["text"],
            Self::Tokenized => &["input_ids"],
            Self::Classification => &["text", "label"],
        }
    }

    /// The formats of plain examples whose required fields are all among `present`.
    pub(crate) fn candidates(present: &BTreeSet<&str>) -> Vec<Self> {
        let told = |format: &Self| !matches!(format, Self::Preference | Self::Kto | Self::Classification);
        Self::ALL.into_iter().filter(|format| told(format) && format.fits(present)).collect()
    }

    fn fits(self, present: &BTreeSet<&str>) -> bool {
        self.required().iter().all(|field| present.contains(field))
    }

    /// Whether a record with these fields can hold a rated answer.
    pub(crate) fn fits_rated(present: &BTreeSet<&str>) -> bool {
        [Self::Alpaca, Self::Sharegpt, Self::Messages, Self::PromptCompletion].iter().any(|format| format.fits(present))
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = DataError;

    fn from_str(name: &str) -> Result<Self, DataError> {
        Self::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| DataError::UnknownFormat {
            name: name.to_owned(),
            known: Self::ALL.map(Self::name).join(", "),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_agree_with_serde() {
        for format in Format::ALL {
            assert_eq!(format.to_string().parse::<Format>().unwrap(), format);
            assert_eq!(serde_json::to_value(format).unwrap(), format.name());
        }
        let message = "alpacca".parse::<Format>().unwrap_err().to_string();
        assert!(message.contains("alpacca") && message.contains("prompt_completion"), "{message}");
    }
}
