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
    /// The variables of a launcher do not fit together.
    #[error("{variable} = {value:?}: {reason}")]
    Launcher {
        /// The variable.
        variable: &'static str,
        /// Its value; empty where it is not set.
        value: String,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// The store that processes meet at could not be opened by the process that is to hold it.
    #[error(
        "rank 0 cannot listen at MASTER_PORT = {port}: {message}; another program may have it: set MASTER_PORT to a free port on every rank"
    )]
    StoreTaken {
        /// The port.
        port: u16,
        /// What libtorch said.
        message: String,
    },
    /// The store that processes meet at was not reached.
    #[error(
        "rank {rank} of {world} did not reach rank 0 at {address} within {seconds} s: {reason}; start rank 0, and set MASTER_ADDR and \
         MASTER_PORT to where it is on every rank"
    )]
    StoreNotReached {
        /// This process.
        rank: u32,
        /// Processes in all.
        world: u32,
        /// `MASTER_ADDR:MASTER_PORT`.
        address: String,
        /// How long it tried.
        seconds: u64,
        /// What the system said last.
        reason: String,
    },
    /// Processes that were to come did not.
    #[error(
        "rank {rank} of {world} waited {seconds} s at {address} for {}, which did not come; start {} with the same MASTER_ADDR, \
         MASTER_PORT and WORLD_SIZE, or start all with a smaller WORLD_SIZE",
        ranks(missing),
        if missing.len() == 1 { "it" } else { "them" }
    )]
    Missing {
        /// This process.
        rank: u32,
        /// Processes in all.
        world: u32,
        /// `MASTER_ADDR:MASTER_PORT`.
        address: String,
        /// How long it waited.
        seconds: u64,
        /// Those that are missing.
        missing: Vec<u32>,
    },
    /// A process was to exchange something with one that is not another of them.
    #[error("rank {rank} of {world} has no other rank {peer} to exchange anything with")]
    NoPeer {
        /// The process that is not there.
        peer: u32,
        /// This process.
        rank: u32,
        /// Processes in all.
        world: u32,
    },
    /// An exchange between processes was broken off.
    #[error("rank {rank} of {world}: {}: {message}; start all ranks again", broken_by(lost, address))]
    Lost {
        /// This process.
        rank: u32,
        /// Processes in all.
        world: u32,
        /// `MASTER_ADDR:MASTER_PORT`.
        address: String,
        /// Those that give no sign of life.
        lost: Vec<u32>,
        /// What libtorch said.
        message: String,
    },
}

/// Some ranks in words.
fn ranks(list: &[u32]) -> String {
    let numbers: Vec<String> = list.iter().map(u32::to_string).collect();
    format!("rank{} {}", if list.len() == 1 { "" } else { "s" }, numbers.join(", "))
}

fn broken_by(lost: &[u32], address: &str) -> String {
    match lost {
        [] => format!("the exchange of the ranks at {address} was broken off"),
        lost => format!("{} lost: no sign of life at {address}", ranks(lost)),
    }
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

    /// Whether what was asked for is at fault, and not the run.
    pub fn is_usage(&self) -> bool {
        matches!(self, Error::Device { .. } | Error::Launcher { .. })
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
