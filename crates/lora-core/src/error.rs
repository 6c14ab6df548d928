//! What can go wrong in the mathematics: shapes and values.

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of LoRA mathematics.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Matrices do not fit each other.
    #[error("{what} must be {expected}, got {got}")]
    Shape {
        /// The matrices.
        what: &'static str,
        /// What they must be.
        expected: String,
        /// What they are.
        got: String,
    },
    /// A setting is outside its range.
    #[error("{what} = {value} must be {expected}")]
    Value {
        /// The setting.
        what: &'static str,
        /// Its value.
        value: String,
        /// The range.
        expected: &'static str,
    },
    /// A merge would write NaN or infinity.
    #[error(
        "the merged weight has {count} entries that are not finite; the adapter or the base is damaged, or the dtype too narrow"
    )]
    NotFinite {
        /// How many.
        count: i64,
    },
    /// An operation failed below.
    #[error(transparent)]
    Torch(#[from] lora_torch::Error),
}

impl From<tch::TchError> for Error {
    fn from(e: tch::TchError) -> Self {
        Error::Torch(e.into())
    }
}
