//! Why a checkpoint is not what was written.

/// What is wrong with a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// There is a file or a link where the folder should be.
    #[error("it is not a folder")]
    NotAFolder,
    /// The manifest is missing.
    #[error("manifest.json is missing")]
    NoManifest,
    /// The manifest is not what was written.
    #[error("manifest.json is damaged: {reason}")]
    Manifest {
        /// In which way.
        reason: &'static str,
    },
    /// The folder's name and the manifest name different steps.
    #[error("manifest.json is of step {manifest}, and the folder of step {folder}")]
    WrongStep {
        /// The step in the manifest.
        manifest: u64,
        /// The step in the folder's name.
        folder: u64,
    },
    /// A file is missing.
    #[error("{file} is missing")]
    Missing {
        /// The file.
        file: String,
    },
    /// There is a file that was not written.
    #[error("{file} does not belong to it")]
    Extra {
        /// The file.
        file: String,
    },
    /// Something is not a plain file.
    #[error("{file} is not a plain file")]
    NotAFile {
        /// The entry.
        file: String,
    },
    /// A file has another length.
    #[error("{file} has {found} bytes and had {expected}")]
    Size {
        /// The file.
        file: String,
        /// Bytes that were written.
        expected: u64,
        /// Bytes that are there.
        found: u64,
    },
    /// A file has other contents.
    #[error("{file} has other contents than were written (sha256 {found}, was {expected})")]
    Contents {
        /// The file.
        file: String,
        /// The sha256 that was written.
        expected: String,
        /// The sha256 that is there.
        found: String,
    },
}
