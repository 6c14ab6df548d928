//! What can keep an adapter from being merged.

use std::path::PathBuf;

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of merging or verifying.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file is missing, damaged or cannot be written.
    #[error(transparent)]
    Format(#[from] lora_format::Error),
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// No adapter was given.
    #[error("no adapter is given; name at least one adapter folder")]
    NoAdapter,
    /// The output folder holds something already.
    #[error("{}: the output must be a new or empty folder; choose another or remove it", path.display())]
    OutputTaken {
        /// The output.
        path: PathBuf,
    },
    /// The disk is too full for the result.
    #[error("{}: {needed} bytes are needed but {available} are free; free some or choose another disk", path.display())]
    NoSpace {
        /// The folder that was to be written to.
        path: PathBuf,
        /// Bytes of the result.
        needed: u64,
        /// Bytes free.
        available: u64,
    },
    /// The adapter has a module that the base lacks.
    #[error(
        "{}: the base model {} has no tensor `{tensor}`{}; this adapter belongs to another model",
        adapter.display(),
        base.display(),
        suggest(nearest)
    )]
    NoSuchTensor {
        /// The adapter's folder.
        adapter: PathBuf,
        /// The base's folder.
        base: PathBuf,
        /// The tensor that would be changed.
        tensor: String,
        /// The most similar names in the base.
        nearest: Vec<String>,
    },
    /// The adapter's matrices do not fit the base's.
    #[error(
        "{}: tensor `{tensor}` is {got:?} in the adapter but {wanted:?} in the base; the adapter belongs to another model, or to one with a resized vocabulary",
        adapter.display()
    )]
    Shape {
        /// The adapter's folder.
        adapter: PathBuf,
        /// The base tensor that would be changed.
        tensor: String,
        /// The shape that the adapter implies.
        got: Vec<i64>,
        /// The shape in the base.
        wanted: Vec<i64>,
    },
    /// A trained token is not in the base's vocabulary.
    #[error(
        "{}: trainable_token_indices has token {id}, and `{tensor}` of the base has {rows} rows; resize the base's embedding as it was for training",
        adapter.display()
    )]
    TokenOutside {
        /// The adapter's folder.
        adapter: PathBuf,
        /// The table or head.
        tensor: String,
        /// The token.
        id: i64,
        /// How many there are.
        rows: i64,
    },
    /// A tensor of the base is not a floating-point one.
    #[error("{}: tensor `{tensor}` is {got}, and only floating-point weights can be merged; give the original, unquantised checkpoint", base.display())]
    NotFloat {
        /// The base's folder.
        base: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        got: &'static str,
    },
    /// Two adapters replace the same tensor.
    #[error("{}: tensor `{tensor}` is replaced here and changed by another adapter, too; merge them one after the other", adapter.display())]
    Conflict {
        /// The second adapter's folder.
        adapter: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// An adapter has a bias of B where the base layer has none.
    #[error(
        "{}: `{module}` has a trained bias (lora_bias), and the base's layer has none that it could be merged into; use the adapter unmerged",
        adapter.display()
    )]
    NoBias {
        /// The adapter's folder.
        adapter: PathBuf,
        /// The module's path.
        module: String,
    },
    /// Two checkpoints whose difference is no adapter.
    #[error("{}: {why}", tuned.display())]
    Extract {
        /// The fine-tuned checkpoint's folder.
        tuned: PathBuf,
        /// Why not.
        why: String,
    },
    /// A model or an adapter has no GGUF form.
    #[error("{}: {why}", path.display())]
    Gguf {
        /// The file or folder at fault.
        path: PathBuf,
        /// Why, and what to do.
        why: String,
    },
    /// An adapter's names cannot be put right without a guess.
    #[error("{}: {why}", adapter.display())]
    Repair {
        /// The adapter's folder.
        adapter: PathBuf,
        /// What is not clear, and what to do.
        why: String,
    },
    /// An adapter is not sound under its right names either.
    #[error("{}: with its names put right it still cannot be used: {source}", adapter.display())]
    Unrepaired {
        /// The adapter's folder.
        adapter: PathBuf,
        /// What is wrong.
        #[source]
        source: Box<Error>,
    },
    /// Adapters cannot be mixed in the way that was asked for.
    #[error("{}: `{module}` {why}", adapter.display())]
    Mix {
        /// The adapter's folder.
        adapter: PathBuf,
        /// The module's path.
        module: String,
        /// Why not, and what works.
        why: String,
    },
    /// The merged value of a tensor cannot be computed or stored.
    #[error("tensor `{tensor}`: {source}")]
    Merge {
        /// The tensor.
        tensor: String,
        /// Why.
        #[source]
        source: lora_core::Error,
    },
    /// A value does not fit into the output dtype.
    #[error("tensor `{tensor}`: {count} values do not fit into {dtype}; choose bfloat16 or float32")]
    Overflow {
        /// The tensor.
        tensor: String,
        /// How many.
        count: i64,
        /// The output dtype.
        dtype: &'static str,
    },
    /// The merged model is not what base and adapters make.
    #[error("{}: tensor `{tensor}` {fault}", merged.display())]
    Disagrees {
        /// The merged model's folder.
        merged: PathBuf,
        /// The first tensor that is wrong.
        tensor: String,
        /// How.
        #[source]
        fault: Disagreement,
    },
}

/// How a merged tensor differs from what it should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Disagreement {
    /// It is not there.
    #[error("is missing")]
    Missing,
    /// It should not be there.
    #[error("is in neither base nor adapters")]
    Unexpected,
    /// It has another shape.
    #[error("has shape {got:?} instead of {wanted:?}")]
    Shape {
        /// What it is.
        got: Vec<i64>,
        /// What it should be.
        wanted: Vec<i64>,
    },
    /// No adapter touches it, and yet it changed.
    #[error("is touched by no adapter but differs from the base")]
    Touched,
    /// It is further from the exact value than rounding explains.
    #[error("is off by {error:.3e}, which is {ratio:.3} times what rounding explains")]
    Value {
        /// The largest absolute error.
        error: f64,
        /// The largest error over its bound.
        ratio: f64,
    },
    /// It was untied from the embedding, but the config still ties the two.
    #[error("differs from the embedding, but config.json says tie_word_embeddings = true")]
    StillTied,
}

fn suggest(nearest: &[String]) -> String {
    if nearest.is_empty() { String::new() } else { format!(" (nearest: {})", nearest.join(", ")) }
}

impl Error {
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io { action, path: path.into(), source }
    }

    pub(crate) fn merge(tensor: &str, source: impl Into<lora_core::Error>) -> Self {
        Error::Merge { tensor: tensor.into(), source: source.into() }
    }
}
