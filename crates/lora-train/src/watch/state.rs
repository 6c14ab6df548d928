//! What a watch remembers: which files were taken, and the round that is under way.

use crate::error::Result;
use crate::versions::{TakenFile, Versions, read_json, write_json};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The file of it, in the output folder.
pub(super) const STATE_FILE: &str = "watch.json";

/// The memory of a watch. Every change of it is one write, whole or not at all.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    /// The round under way.
    pub(super) round: Option<Round>,
    /// Every file that was taken, those of the round among them.
    files: Vec<Remembered>,
    #[serde(skip)]
    path: PathBuf,
    /// Contents that were taken, by their digests.
    #[serde(skip)]
    taken: BTreeSet<String>,
}

/// A round that is not over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Round {
    /// The number of the version that may come of it.
    pub(super) version: u64,
    /// The version that it goes on from.
    pub(super) parent: Option<u64>,
    pub(super) files: Vec<TakenFile>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Remembered {
    #[serde(flatten)]
    file: TakenFile,
    taken_at: u64,
    /// The version that it was trained for; none where it was refused.
    version: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    refused: Option<String>,
}

impl State {
    /// What was remembered in an output folder. Files of versions count as taken even where the state is lost.
    pub(super) fn read(out: &Path, versions: &Versions) -> Result<Self> {
        let path = out.join(STATE_FILE);
        let mut state: Self = if path.exists() { read_json(&path)? } else { Self::default() };
        state.path = path;
        let of_versions = versions.list()?.into_iter().flat_map(|version| version.files);
        let digests = state.files.iter().map(|known| known.file.sha256.clone());
        state.taken = digests.chain(of_versions.map(|file| file.sha256)).collect();
        Ok(state)
    }

    /// Whether this content was taken before.
    pub(super) fn has(&self, sha256: &str) -> bool {
        self.taken.contains(sha256)
    }

    /// Begins a round: from this write on its files are taken.
    pub(super) fn begin(&mut self, versions: &Versions, parent: Option<u64>, files: Vec<TakenFile>) -> Result<()> {
        let last = versions.list()?.iter().map(|version| version.version).max();
        let ours = self.files.iter().filter_map(|known| known.version).max();
        let version = last.max(ours).unwrap_or(0) + 1;
        self.files.retain(|known| !files.contains(&known.file));
        let remembered = files.iter().map(|file| Remembered {
            file: file.clone(),
            taken_at: now(),
            version: Some(version),
            refused: None,
        });
        self.files.extend(remembered);
        self.taken.extend(files.iter().map(|file| file.sha256.clone()));
        self.round = Some(Round { version, parent, files });
        self.write()
    }

    /// The round is over, whatever came of it.
    pub(super) fn end(&mut self) -> Result<()> {
        self.round = None;
        self.write()
    }

    /// Files that cannot be used are not looked at again; a round of them is over.
    pub(super) fn refuse(&mut self, files: &[TakenFile], reason: &str) -> Result<()> {
        self.files.retain(|known| !files.contains(&known.file));
        let refused = |file: &TakenFile| Remembered {
            file: file.clone(),
            taken_at: now(),
            version: None,
            refused: Some(reason.to_string()),
        };
        self.files.extend(files.iter().map(refused));
        self.taken.extend(files.iter().map(|file| file.sha256.clone()));
        self.round = self.round.take().filter(|round| round.files != files);
        self.write()
    }

    fn write(&self) -> Result<()> {
        write_json(&self.path, self)
    }
}

/// Seconds since 1970-01-01 UTC.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str) -> TakenFile {
        TakenFile { name: name.into(), sha256: format!("{name}-digest"), bytes: 1 }
    }

    #[test]
    fn what_was_taken_is_remembered_with_its_round_and_read_back() {
        let out = tempfile::tempdir().unwrap();
        let versions = Versions::new(out.path());
        let mut state = State::read(out.path(), &versions).unwrap();
        assert_eq!(state.round, None);
        state.refuse(&[file("bad")], "line 3").unwrap();
        state.begin(&versions, None, vec![file("a"), file("b")]).unwrap();
        let mut again = State::read(out.path(), &versions).unwrap();
        assert_eq!(again, state);
        assert!(["a", "b", "bad"].iter().all(|name| again.has(&file(name).sha256)) && !again.has("c-digest"));
        assert_eq!(again.round.as_ref().unwrap().version, 1);
        // Begun anew from another version, it has another number and its files are there once.
        again.begin(&versions, Some(7), vec![file("a"), file("b")]).unwrap();
        assert_eq!(again.round, Some(Round { version: 2, parent: Some(7), files: vec![file("a"), file("b")] }));
        assert_eq!(again.files.len(), 3);
        again.end().unwrap();
        let last = State::read(out.path(), &versions).unwrap();
        assert!(last.round.is_none() && last.has("a-digest"));
        std::fs::write(out.path().join(STATE_FILE), "{\"round\": 3").unwrap();
        let torn = State::read(out.path(), &versions).unwrap_err().to_string();
        assert!(torn.contains(STATE_FILE), "{torn}");
    }
}
