//! Datasets of the Hugging Face hub by id, from its cache on this machine.
//!
//! `hf://owner/name`, with `@revision` and `/path/in/the/repository` behind it where that is wanted. The layout of the
//! cache is that of `huggingface_hub`: `datasets--owner--name/refs/REVISION` names a commit, and its files lie in
//! `snapshots/COMMIT`. Nothing is fetched here: a dataset that is not in the cache is refused at once, with the command
//! that puts it there.

use std::path::{Component, Path, PathBuf};

use crate::error::{DataError, Result};
use crate::read::{DataFile, expand_below};

const SCHEME: &str = "hf://";

/// A dataset of the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    /// `owner/name`, or `name` alone for the oldest datasets.
    pub id: String,
    /// A branch, a tag or a commit.
    pub revision: String,
    /// A file, folder or pattern in the repository; empty for all of it.
    pub path: PathBuf,
}

impl HubId {
    /// Whether a path names a dataset of the hub and not a file.
    pub fn is_hub(path: &Path) -> bool {
        path.to_str().is_some_and(|text| text.starts_with(SCHEME))
    }

    /// Takes `hf://owner/name[@revision][/path]` apart.
    ///
    /// # Errors
    /// [`DataError::HubName`] where owner or name are no names of the hub, or the path leads out of the repository.
    pub fn parse(path: &Path) -> Result<Self> {
        let text = path.to_str().unwrap_or_default();
        let fault = || DataError::HubName { path: path.to_owned() };
        let rest = text.strip_prefix(SCHEME).ok_or_else(fault)?;
        let rest = rest.strip_prefix("datasets/").unwrap_or(rest);
        let mut parts = rest.splitn(3, '/');
        let (owner, name) = (parts.next().unwrap_or_default(), parts.next());
        let inner = PathBuf::from(parts.next().unwrap_or_default());
        let last = name.unwrap_or(owner);
        let (last, revision) = last.split_once('@').unwrap_or((last, "main"));
        let is_name = |name: &str| {
            let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !name.is_empty()
                && name.len() <= 96
                && name.chars().all(fits)
                && !name.starts_with('.')
                && !name.contains("..")
        };
        let revision_fits = is_name(revision);
        let inside = inner.components().all(|part| matches!(part, Component::Normal(_)));
        if !is_name(last) || (name.is_some() && !is_name(owner)) || !revision_fits || !inside {
            return Err(fault());
        }
        let id = if name.is_some() { format!("{owner}/{last}") } else { last.to_owned() };
        Ok(Self { id, revision: revision.to_owned(), path: inner })
    }

    /// The folder of the snapshot in a cache, or none when it is not there.
    pub fn snapshot(&self, cache: &Path) -> Option<PathBuf> {
        let repository = cache.join(format!("datasets--{}", self.id.replace('/', "--")));
        let commit = std::fs::read_to_string(repository.join("refs").join(&self.revision))
            .map_or_else(|_| self.revision.clone(), |commit| commit.trim().to_owned());
        // What a file of the cache says is a name too.
        let is_commit =
            !commit.is_empty() && commit.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
        let folder = repository.join("snapshots").join(&commit);
        (is_commit && folder.is_dir()).then_some(folder)
    }
}

/// The files of one split of a dataset. As in `datasets`, files belong to a split when its name is a part of theirs, or of
/// their folder's; where no file is marked so, all of them are `train`.
pub(crate) fn files(path: &Path, cache: Option<&Path>, split: &str) -> Result<Vec<DataFile>> {
    let hub = HubId::parse(path)?;
    let missing = || DataError::HubMissing {
        id: hub.id.clone(),
        revision: hub.revision.clone(),
        cache: cache.map_or_else(|| "no cache folder".to_owned(), |cache| cache.display().to_string()),
    };
    let folder = cache.and_then(|cache| hub.snapshot(cache)).ok_or_else(missing)?;
    let all = expand_below(&folder, &hub.path)?;
    let of = |file: &DataFile| split_of(file.path.strip_prefix(&folder).unwrap_or(&file.path));
    if hub.path.as_os_str().is_empty() && all.iter().any(|file| of(file).is_some()) {
        let wanted = normal(split);
        let found: Vec<DataFile> =
            all.into_iter().filter(|file| of(file).as_deref() == Some(wanted.as_str())).collect();
        return if found.is_empty() {
            Err(DataError::HubSplit { id: hub.id.clone(), split: split.to_owned() })
        } else {
            Ok(found)
        };
    }
    Ok(all)
}

/// The usual name of a split.
fn normal(split: &str) -> String {
    match split {
        "valid" | "val" | "dev" | "validation" => "validation",
        "eval" | "testing" | "test" => "test",
        "training" | "train" => "train",
        other => other,
    }
    .to_owned()
}

/// The split that a file's name or folder names: `data/train-00000-of-00002.parquet`, `test.jsonl`, `validation/x.csv`, and
/// those with more to their name, as `train_sft-00000-of-00003.parquet`.
fn split_of(path: &Path) -> Option<String> {
    const KNOWN: [&str; 9] = ["train", "training", "test", "testing", "eval", "valid", "validation", "val", "dev"];
    let parts: Vec<String> = path.components().map(|part| part.as_os_str().to_string_lossy().to_lowercase()).collect();
    let name = parts.last()?.split('.').next()?.to_owned();
    // Shards are numbered behind the split's whole name.
    if let Some((split, shard)) = name.split_once("-0")
        && shard.contains("-of-")
    {
        return Some(normal(split));
    }
    let words = |text: &str| text.split(['-', '_', ' ']).map(str::to_owned).collect::<Vec<_>>();
    let folders = parts.iter().rev().skip(1).cloned();
    words(&name).into_iter().chain(folders).find(|word| KNOWN.contains(&word.as_str())).map(|word| normal(&word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_taken_apart() {
        let parse = |text: &str| HubId::parse(Path::new(text));
        let hub = parse("hf://owner/name@v1.0/data/x.jsonl").unwrap();
        assert_eq!(
            (hub.id.as_str(), hub.revision.as_str(), hub.path.as_path()),
            ("owner/name", "v1.0", Path::new("data/x.jsonl"))
        );
        assert_eq!(parse("hf://wiki_qa").unwrap().id, "wiki_qa");
        assert_eq!(parse("hf://datasets/a/b").unwrap().id, "a/b");
        for bad in ["hf://", "hf://a/", "hf:///b", "hf://../b", "hf://a/b/../../x", "hf://a/b@../x", "hf://a b/c"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn splits_are_told_by_name() {
        let of = |text: &str| split_of(Path::new(text));
        assert_eq!(of("data/train-00000-of-00002.parquet").as_deref(), Some("train"));
        assert_eq!(of("data/train_sft-00000-of-00002.parquet").as_deref(), Some("train_sft"));
        assert_eq!(of("valid.jsonl").as_deref(), Some("validation"));
        assert_eq!(of("test/a.csv").as_deref(), Some("test"));
        assert_eq!(of("alpaca_data.json"), None);
    }

    #[test]
    fn the_cache_is_read_and_what_is_missing_is_named() {
        let cache = tempfile::tempdir().unwrap();
        let repository = cache.path().join("datasets--a--b");
        let snapshot = repository.join("snapshots/c0ffee");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(repository.join("refs")).unwrap();
        std::fs::write(repository.join("refs/main"), "c0ffee").unwrap();
        for name in ["train.jsonl", "test.jsonl"] {
            std::fs::write(snapshot.join(name), "{\"text\": \"a\"}\n").unwrap();
        }
        let names = |path: &str, split: &str| {
            files(Path::new(path), Some(cache.path()), split)
                .map(|files| files.iter().map(|f| f.path.file_name().unwrap().to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(names("hf://a/b", "train").unwrap(), ["train.jsonl"]);
        assert_eq!(names("hf://a/b@c0ffee", "test").unwrap(), ["test.jsonl"]);
        assert_eq!(names("hf://a/b/*.jsonl", "train").unwrap(), ["test.jsonl", "train.jsonl"]);
        assert!(matches!(names("hf://a/b", "dev"), Err(DataError::HubSplit { .. })));
        let message = names("hf://a/c", "train").unwrap_err().to_string();
        assert!(message.contains("a/c") && message.contains("hf download"), "{message}");
    }
}
