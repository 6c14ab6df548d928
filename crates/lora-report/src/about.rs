//! `run.json`: what a run says of itself besides its metrics.

use serde::{Deserialize, Serialize};

/// The name of the file in a run's folder.
pub const RUN_FILE: &str = "run.json";

/// Where a run stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It goes on, or was killed: it never said how it ended.
    #[default]
    Running,
    /// It was asked to stop, and can be gone on with.
    Stopped,
    /// It is at its end.
    Finished,
}

impl Status {
    /// The word for a reader.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Finished => "finished",
        }
    }
}

/// A run in figures. Unknown fields are passed over, and missing ones have their defaults: the file of another version is
/// read for what it has.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct About {
    /// Where it stands.
    pub status: Status,
    /// When this was written, in seconds since 1970.
    pub updated_at: u64,
    /// Optimizer steps done.
    pub step: u64,
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
    /// Steps left out because they were not finite.
    pub skipped_steps: u64,
    /// Seconds spent in steps.
    pub seconds: f64,
    /// Tokens computed.
    pub tokens: u64,
    /// Trained tokens.
    pub trained_tokens: u64,
    /// Trained parameters.
    pub trained_parameters: u64,
    /// Parameters of the base model.
    pub base_parameters: u64,
    /// The family of the model.
    pub family: String,
    /// What it was computed on.
    pub device: String,
    /// What the base was computed in.
    pub dtype: String,
    /// Threads of one operation on the CPU.
    pub threads: usize,
    /// The version of libtorch.
    pub libtorch: String,
    /// Operations a second of a large matrix product at the start; none where it was not measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub matrix_rate: Option<f64>,
    /// Operations that a token of training needs, in the mean.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operations_per_token: Option<f64>,
    /// The data.
    pub data: AboutData,
}

/// The data of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AboutData {
    /// Rows of a pass: examples, or packed rows.
    pub rows: u64,
    /// Held-out examples.
    pub eval_examples: u64,
    /// Tokens of the held-out examples.
    pub eval_tokens: u64,
    /// What became of the records, as the data pipeline tells it.
    pub train: serde_json::Value,
    /// The same of evaluation data with files of its own.
    #[serde(skip_serializing_if = "serde_json::Value::is_null")]
    pub eval: serde_json::Value,
}
