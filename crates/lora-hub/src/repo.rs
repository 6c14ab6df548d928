//! The name of a repository of the hub.

use std::fmt;

use crate::error::{HubError, Result};

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepoKind {
    /// A model, or an adapter.
    Model,
    /// A dataset.
    Dataset,
}

impl RepoKind {
    /// Its name in a sentence.
    pub fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Dataset => "dataset",
        }
    }

    fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

/// A repository at a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repo {
    kind: RepoKind,
    id: String,
    revision: String,
}

/// A branch that every repository has.
const MAIN: &str = "main";

impl Repo {
    /// A repository by `owner/name` (or `name` alone for the oldest) at a branch, a tag or a commit.
    ///
    /// # Errors
    /// [`HubError::Name`] where a part could not be a part of a path.
    pub fn new(kind: RepoKind, id: &str, revision: &str) -> Result<Self> {
        let parts = id.split('/').count();
        let good = parts <= 2 && id.split('/').all(is_name) && revision.split('/').all(is_name);
        if !good {
            return Err(HubError::Name { text: format!("{id}@{revision}") });
        }
        Ok(Self { kind, id: id.to_owned(), revision: revision.to_owned() })
    }

    /// What it holds.
    pub fn kind(&self) -> RepoKind {
        self.kind
    }

    /// `owner/name`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The branch, tag or commit.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// The command that fetches it.
    pub fn command(&self) -> String {
        let revision = if self.revision == MAIN { String::new() } else { format!("@{}", self.revision) };
        format!("lora fetch --{} hf://{}{revision}", self.kind.name(), self.id)
    }

    /// The folder of the repository in a cache.
    pub(crate) fn folder(&self) -> String {
        format!("{}--{}", self.kind.plural(), self.id.replace('/', "--"))
    }

    /// Where the hub describes a revision of it.
    pub(crate) fn api(&self, revision: &str) -> String {
        format!("api/{}/{}/revision/{}", self.kind.plural(), self.id, escaped(revision))
    }

    /// Where the hub gives a file of a commit.
    pub(crate) fn file(&self, commit: &str, path: &str) -> String {
        let kind = if self.kind == RepoKind::Dataset { "datasets/" } else { "" };
        let path: Vec<String> = path.split('/').map(escaped).collect();
        format!("{kind}{}/resolve/{commit}/{}", self.id, path.join("/"))
    }
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind.name(), self.id)?;
        match self.revision.as_str() {
            MAIN => Ok(()),
            commit if is_commit(commit) => write!(f, " at commit {}", &commit[..12]),
            revision => write!(f, " at revision {revision}"),
        }
    }
}

/// Whether a part of a name is one that the hub gives.
fn is_name(part: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !part.is_empty() && part.len() <= 96 && part.chars().all(fits) && !part.starts_with('.') && !part.contains("..")
}

/// Whether a text is the id of a commit.
pub(crate) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// A part of a path as an address writes it.
fn escaped(part: &str) -> String {
    let mut text = String::with_capacity(part.len());
    for byte in part.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => text.push(byte.into()),
            _ => text += &format!("%{byte:02X}"),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_folders_and_addresses() {
        let repo = Repo::new(RepoKind::Dataset, "owner/name", "refs/convert/parquet").unwrap();
        assert_eq!(repo.folder(), "datasets--owner--name");
        assert_eq!(repo.api(repo.revision()), "api/datasets/owner/name/revision/refs%2Fconvert%2Fparquet");
        assert_eq!(repo.file("c0", "a b/ü.json"), "datasets/owner/name/resolve/c0/a%20b/%C3%BC.json");
        let model = Repo::new(RepoKind::Model, "gpt2", "main").unwrap();
        assert_eq!((model.folder().as_str(), model.file("c", "x").as_str()), ("models--gpt2", "gpt2/resolve/c/x"));
        assert_eq!(
            (model.to_string().as_str(), model.command().as_str()),
            ("model gpt2", "lora fetch --model hf://gpt2")
        );
    }

    #[test]
    fn what_could_leave_the_cache_is_no_name() {
        for (id, revision) in [
            ("../b", "main"),
            ("a/..", "main"),
            ("a/b/c", "main"),
            ("", "main"),
            ("a/b", "../x"),
            ("a/b", "/x"),
            ("a\0/b", "main"),
        ] {
            assert!(Repo::new(RepoKind::Model, id, revision).is_err(), "{id}@{revision}");
        }
    }
}
