//! What can go wrong when a run is read or written about.

use std::io;
use std::path::{Path, PathBuf};

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A folder holds no run.
    #[error("{}: not the folder of a run: it has no {file}; name the output_dir of `lora train`", path.display())]
    NoRun {
        /// The folder.
        path: PathBuf,
        /// The file that every run has.
        file: &'static str,
    },
    /// A report was asked for without a run.
    #[error("a report needs at least one run; name the output_dir of `lora train`")]
    NoRuns,
    /// A line of a file is not what a run writes.
    #[error("{}:{line}: {reason}; the file was damaged or is none of a run", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A file is not what a run writes.
    #[error("{}: {reason}; the file was damaged or is none of a run", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// Whether what was named is at fault, and not the machine (exit code 2 and not 1).
    pub fn is_usage(&self) -> bool {
        !matches!(self, Self::Io { action, .. } if *action != "read")
    }

    /// Wraps an error of the system with what was tried on which file.
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}
