//! Whether files changed while they were read.

use std::fs::Metadata;
use std::path::PathBuf;
#[cfg(unix)]
use std::time::Duration;
use std::time::SystemTime;

use crate::error::{DataError, Result};
use crate::read::DataFile;

/// What the system says of files at one moment.
pub(super) struct Stamps(Vec<(PathBuf, Stamp)>);

/// What the system says of one file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    bytes: u64,
    modified: Option<SystemTime>,
    /// On Unix the file itself and the time of its last change of any kind, which no program can set.
    #[cfg(unix)]
    change: (u64, u64, i64, i64),
}

impl Stamp {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self {
            bytes: metadata.len(),
            modified: metadata.modified().ok(),
            #[cfg(unix)]
            change: {
                use std::os::unix::fs::MetadataExt;
                (metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec())
            },
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// When the file last changed in any way, where the system says so.
    pub(super) fn changed(&self) -> Option<SystemTime> {
        #[cfg(unix)]
        {
            let (_, _, seconds, nanoseconds) = self.change;
            let since = Duration::new(u64::try_from(seconds).ok()?, u32::try_from(nanoseconds).ok()?);
            SystemTime::UNIX_EPOCH.checked_add(since)
        }
        #[cfg(not(unix))]
        None
    }
}

impl Stamps {
    pub(super) fn of<'f>(files: impl Iterator<Item = &'f DataFile>) -> Result<Self> {
        let stamp = |file: &DataFile| match std::fs::metadata(&file.path) {
            Ok(metadata) => Ok((file.path.clone(), Stamp::of(&metadata))),
            Err(source) => Err(DataError::Io { path: file.path.clone(), source }),
        };
        files.map(stamp).collect::<Result<_>>().map(Self)
    }

    /// Bytes of all files.
    pub(super) fn bytes(&self) -> u64 {
        self.0.iter().map(|(_, stamp)| stamp.bytes).sum()
    }

    /// Whether all files are still as they were.
    pub(super) fn hold(&self) -> bool {
        self.0.iter().all(|(path, stamp)| std::fs::metadata(path).is_ok_and(|now| Stamp::of(&now) == *stamp))
    }
}
