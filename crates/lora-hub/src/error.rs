//! What can go wrong, in words that name the repository, the file and what to do.
//!
//! No message holds a whole address: those that a hub redirects to carry signatures.

use std::io;
use std::path::{Path, PathBuf};

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, HubError>;

/// What can go wrong with the hub and its cache.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the fields are what the message says
#[non_exhaustive]
pub enum HubError {
    /// Not the name of a repository.
    #[error("`{text}`: not a name of the hub; write OWNER/NAME, with @REVISION behind it where wanted")]
    Name { text: String },
    /// A setting that cannot be used.
    #[error("{name}: {problem}")]
    Setting { name: &'static str, problem: String },
    /// Not in the cache, and not to be had.
    #[error("{what} is not in the cache ({}), and {reason}", cache.display())]
    NotCached { what: String, cache: PathBuf, reason: String, offline: bool },
    /// Only a part is in the cache, and the rest is not to be had.
    #[error("{what} is not whole in the cache: {missing} is missing in {}, and {reason}", folder.display())]
    Incomplete { what: String, folder: PathBuf, missing: String, reason: String, offline: bool },
    /// The hub has no such repository, revision or file.
    #[error("{host} has no {what}; check owner, name and revision, and HF_TOKEN where it is private")]
    NotFound { what: String, host: String },
    /// The hub does not give it to this user.
    #[error("{host} refuses {what} (status {status}): {remedy}")]
    Denied { what: String, host: String, status: u16, remedy: &'static str },
    /// An answer that is none.
    #[error("{host}: {problem}, when asked for {what}")]
    Answer { what: String, host: String, problem: String },
    /// No answer, however often it was asked.
    #[error("{host} was not reached for {what}: {reason}")]
    Unreachable { what: String, host: String, reason: String },
    /// A name of a file that must not become a path.
    #[error("{what} has a file named {name:?}, which {problem}; nothing was fetched")]
    FileName { what: String, name: String, problem: &'static str },
    /// Nothing that could be used.
    #[error("{what} has no file that can be used here ({has}); {remedy}")]
    NothingWanted { what: String, has: String, remedy: &'static str },
    /// Twice other bytes than the hub announced.
    #[error(
        "{file} of {what}: wanted {wanted}, got {got}, twice; the file was removed. The hub or something on the way to it changes what it sends"
    )]
    Mismatch { what: String, file: String, wanted: String, got: String },
    /// A download that does not come to an end.
    #[error("{file} of {what}: {done} of {size} bytes came, then {reason}; start again, and it goes on from there")]
    Cut { what: String, file: String, done: u64, size: u64, reason: String },
    /// The disk is too small.
    #[error("{}: {needed} bytes are needed for {what}, and {free} are free; make room, or name another folder with HF_HUB_CACHE", folder.display())]
    NoSpace { what: String, folder: PathBuf, needed: u64, free: u64 },
    /// A link in the cache that leads elsewhere.
    #[error("{}: leads out of the cache; remove it, and start again", path.display())]
    Outside { path: PathBuf },
    /// A file of the cache.
    #[error("cannot {action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl HubError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }

    /// Whether the command line or the configuration is at fault, and not the network, the hub or the disk.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Name { .. }
                | Self::Setting { .. }
                | Self::NotCached { offline: true, .. }
                | Self::Incomplete { offline: true, .. }
                | Self::NotFound { .. }
                | Self::Denied { .. }
                | Self::NothingWanted { .. }
        )
    }
}
