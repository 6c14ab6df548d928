//! What can go wrong below the model: shapes, devices, memory, and libtorch itself.

use tch::TchError;

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of libtorch or of the shim.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// libtorch refused an operation.
    #[error("libtorch: {source}")]
    Torch {
        /// What libtorch said.
        #[source]
        source: TchError,
    },
    /// Memory ran out, on the host or on a device.
    #[error(
        "out of memory: {message}; lower train.per_device_train_batch_size or data.max_length, or set train.gradient_checkpointing = true"
    )]
    OutOfMemory {
        /// What the allocator said: the bytes asked for and the device.
        message: String,
    },
    /// A tensor has the wrong shape or dtype for an operation.
    #[error("{op}: {what} must be {expected}, got {got}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The argument.
        what: &'static str,
        /// What it must be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A fused operation of the shim failed.
    #[error("{op}: {message}")]
    Shim {
        /// The operation.
        op: &'static str,
        /// The exception's text, first line.
        message: String,
    },
    /// A device was asked for that is not there.
    #[error("device `{device}` is not available: {reason}; use device = \"cpu\" or \"auto\"")]
    Device {
        /// The device as it was asked for.
        device: String,
        /// Why it is not available.
        reason: String,
    },
}

impl From<TchError> for Error {
    fn from(source: TchError) -> Self {
        match &source {
            TchError::Torch(text) if is_out_of_memory(text) => Error::OutOfMemory { message: first_line(text) },
            _ => Error::Torch { source },
        }
    }
}

impl Error {
    pub(crate) fn from_shim(op: &'static str, text: &str) -> Self {
        if is_out_of_memory(text) {
            Error::OutOfMemory { message: first_line(text) }
        } else {
            Error::Shim { op, message: first_line(text) }
        }
    }

    pub(crate) fn shape(
        op: &'static str,
        what: &'static str,
        expected: impl Into<String>,
        got: impl std::fmt::Debug,
    ) -> Self {
        Error::Shape { op, what, expected: expected.into(), got: format!("{got:?}") }
    }
}

fn is_out_of_memory(text: &str) -> bool {
    ["out of memory", "not enough memory", "can't allocate memory", "bad_alloc"].iter().any(|s| text.contains(s))
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or("").trim().to_string()
}
