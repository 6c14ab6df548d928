//! What can go wrong between a checkpoint folder and a running model.

use std::path::PathBuf;

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a model, its weights, its adapters, or its generation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The family of the checkpoint is not one of ours.
    #[error(
        "{file}: model_type = {model_type:?} is not supported; supported are {supported}. A family is added in lora-model's layout.rs and family.rs"
    )]
    Family {
        /// The config file.
        file: PathBuf,
        /// What it says.
        model_type: String,
        /// The families there are.
        supported: String,
    },
    /// A setting of the checkpoint is not one of ours.
    #[error("{file}: {field} = {value}: {reason}")]
    Config {
        /// The config file.
        file: PathBuf,
        /// The key.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is supported.
        reason: &'static str,
    },
    /// The weights are not those that the config describes.
    #[error("{dir}: the weights do not fit config.json:\n  {}", .faults.join("\n  "))]
    Weights {
        /// The checkpoint folder.
        dir: PathBuf,
        /// One line for each tensor that is missing, left over, or of another shape.
        faults: Vec<String>,
    },
    /// A target names no module.
    #[error("{field} = {value:?} matches no module of this model{}", suggest(.nearest))]
    Target {
        /// The key of the configuration.
        field: &'static str,
        /// The entry.
        value: String,
        /// Names that are close to it, or all there are.
        nearest: Vec<String>,
    },
    /// A setting of the adapter cannot be applied.
    #[error("{field} = {value}: {reason}")]
    Adapter {
        /// The key of the configuration.
        field: &'static str,
        /// Its value.
        value: String,
        /// Why not, and what to do.
        reason: String,
    },
    /// An adapter has weights for a module that this model lacks.
    #[error("the adapter does not fit this model: module `{module}` {reason}")]
    Module {
        /// The module's path.
        module: String,
        /// What is wrong.
        reason: String,
    },
    /// A classifier was to do what only a language model does.
    #[error(
        "this is a {family} classifier of {labels} labels, which has no language head to {purpose} with; use `lora classify`"
    )]
    Classifier {
        /// `model_type`
        family: String,
        /// How many labels it has.
        labels: usize,
        /// What was asked for.
        purpose: &'static str,
    },
    /// A language model was to classify.
    #[error(
        "this is a {family} language model without a classification head; give an adapter that was trained with lora.task_type = \"SEQ_CLS\""
    )]
    NoClasses {
        /// `model_type`
        family: String,
    },
    /// The checkpoint has no weights for the head, and nothing else has.
    #[error(
        "{dir}: the checkpoint has no weights for {}, which would begin at random and not be saved; {remedy}", .modules.join(", ")
    )]
    NoHead {
        /// The checkpoint folder.
        dir: PathBuf,
        /// The modules.
        modules: Vec<String>,
        /// What to do.
        remedy: &'static str,
    },
    /// A part of a model was to do what only the whole can.
    #[error("only blocks {} to {} of this model are here, and {purpose} takes the whole of it", .blocks.start, .blocks.end.saturating_sub(1))]
    PartOfModel {
        /// The blocks that are here.
        blocks: std::ops::Range<usize>,
        /// What was asked for.
        purpose: &'static str,
    },
    /// A prompt or a batch is out of bounds.
    #[error("{what} must be {expected}, got {got}")]
    Input {
        /// The argument.
        what: &'static str,
        /// What it must be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// An operation failed below.
    #[error(transparent)]
    Torch(#[from] lora_torch::Error),
    /// The mathematics of an adapter failed.
    #[error(transparent)]
    Core(#[from] lora_core::Error),
    /// A file could not be read or written.
    #[error(transparent)]
    Format(#[from] lora_format::Error),
}

impl From<tch::TchError> for Error {
    fn from(e: tch::TchError) -> Self {
        Error::Torch(e.into())
    }
}

fn suggest(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!("; nearest are {}", names.join(", ")) }
}
