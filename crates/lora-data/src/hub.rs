//! Datasets and models of the Hugging Face hub by id, from its cache on this machine.
//!
//! `hf://owner/name`, with `@revision` and, for a dataset, `/path/in/the/repository` behind it where that is wanted. The layout
//! of the cache is that of `huggingface_hub`: `datasets--owner--name/refs/REVISION` names a commit, and its files lie in
//! `snapshots/COMMIT`. Nothing is fetched here: what is not in the cache is refused at once. Whoever fetches asks
//! [`HubId::select`] which files are needed.

use std::path::{Component, Path, PathBuf};

use crate::error::{DataError, Result};
use crate::read::{DataFile, expand_below, is_dataset_file, is_pattern};
use crate::source::Source;

const SCHEME: &str = "hf://";
const DATASETS: &str = "datasets/";

/// A repository of the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    /// `owner/name`, or `name` alone for the oldest.
    pub id: String,
    /// A branch, a tag or a commit.
    pub revision: String,
    /// A file, folder or pattern in the repository of a dataset; empty for all of it.
    pub path: PathBuf,
}

impl HubId {
    /// Whether a path names something of the hub and not a file.
    pub fn is_hub(path: &Path) -> bool {
        path.to_str().is_some_and(|text| text.starts_with(SCHEME))
    }

    /// Takes `hf://owner/name[@revision][/path]`, a dataset, apart.
    ///
    /// # Errors
    /// [`DataError::HubName`] where owner or name are no names of the hub, or the path leads out of the repository.
    pub fn parse(path: &Path) -> Result<Self> {
        let text = path.to_str().unwrap_or_default();
        let rest = text.strip_prefix(SCHEME);
        let found = rest.and_then(|rest| take_apart(rest.strip_prefix(DATASETS).unwrap_or(rest)));
        found.ok_or_else(|| DataError::HubName { path: path.to_owned(), kind: "dataset" })
    }

    /// Takes `hf://owner/name[@revision]` or `owner/name[@revision]`, a model, apart.
    ///
    /// # Errors
    /// [`DataError::HubName`] where that is no name of a model.
    pub fn parse_model(text: &str) -> Result<Self> {
        let (rest, whole) = text.strip_prefix(SCHEME).map_or((text, false), |rest| (rest, true));
        let named = (whole || rest.contains('/')) && !rest.starts_with(DATASETS);
        let found = take_apart(rest).filter(|hub| named && hub.path.as_os_str().is_empty());
        found.ok_or_else(|| DataError::HubName { path: text.into(), kind: "model" })
    }

    /// The same at a commit, as a path.
    pub fn at(&self, commit: &str) -> PathBuf {
        let path = PathBuf::from(format!("{SCHEME}{}@{commit}", self.id));
        if self.path.as_os_str().is_empty() { path } else { path.join(&self.path) }
    }

    /// The folder of a dataset's snapshot in a cache, or none when it is not there.
    pub fn snapshot(&self, cache: &Path) -> Option<PathBuf> {
        self.snapshot_of("datasets", cache)
    }

    /// The folder of a model's snapshot in a cache, or none when it is not there.
    pub fn model_snapshot(&self, cache: &Path) -> Option<PathBuf> {
        self.snapshot_of("models", cache)
    }

    fn snapshot_of(&self, kind: &str, cache: &Path) -> Option<PathBuf> {
        let repository = cache.join(format!("{kind}--{}", self.id.replace('/', "--")));
        let commit = std::fs::read_to_string(repository.join("refs").join(&self.revision))
            .map_or_else(|_| self.revision.clone(), |commit| commit.trim().to_owned());
        // What a file of the cache says is a name too.
        let is_commit =
            !commit.is_empty() && commit.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
        let folder = repository.join("snapshots").join(&commit);
        (is_commit && folder.is_dir()).then_some(folder)
    }

    /// Of the names of all files of a dataset's repository, those that are read: what `path` means, or the dataset files of a
    /// split, or of all splits where none is named.
    pub fn select(&self, names: &[&str], split: Option<&str>) -> Vec<String> {
        let inner = self.path.to_string_lossy();
        let readable = |name: &&&str| is_dataset_file(Path::new(**name));
        let visible = |name: &&&str| !name.split('/').any(|part| part.starts_with(['.', '_']));
        let owned = |names: Vec<&&str>| names.into_iter().map(|name| (*name).to_owned()).collect();
        if is_pattern(&self.path) {
            let options = glob::MatchOptions {
                require_literal_separator: true,
                require_literal_leading_dot: true,
                ..glob::MatchOptions::new()
            };
            let Ok(pattern) = glob::Pattern::new(&inner) else { return Vec::new() };
            return owned(names.iter().filter(readable).filter(|name| pattern.matches_with(name, options)).collect());
        }
        if !inner.is_empty() {
            let folder = format!("{inner}/");
            let within = |name: &&&str| name.strip_prefix(folder.as_str()).is_some_and(|rest| visible(&&rest));
            return owned(names.iter().filter(readable).filter(|name| **name == inner || within(name)).collect());
        }
        let all: Vec<&&str> = names.iter().filter(readable).filter(visible).collect();
        let of = |name: &str| split_of(Path::new(name));
        match split.map(normal) {
            Some(wanted) if all.iter().any(|name| of(name).is_some()) => {
                owned(all.into_iter().filter(|name| of(name).as_deref() == Some(wanted.as_str())).collect())
            }
            _ => owned(all),
        }
    }
}

/// `owner/name[@revision][/path]`. A revision with slashes is one of the hub's own, as `refs/convert/parquet` and `refs/pr/1`, or
/// is written with `%2F`.
fn take_apart(rest: &str) -> Option<HubId> {
    let mut parts = rest.splitn(3, '/');
    let (owner, name) = (parts.next().unwrap_or_default(), parts.next());
    let mut inner = parts.next().unwrap_or_default();
    let last = name.unwrap_or(owner);
    let (last, revision) = last.split_once('@').unwrap_or((last, "main"));
    let mut revision = revision.replace("%2F", "/");
    if revision == "refs" {
        let mut parts = inner.splitn(3, '/');
        revision = format!("refs/{}/{}", parts.next()?, parts.next()?);
        inner = parts.next().unwrap_or_default();
    }
    let is_name = |name: &str| {
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !name.is_empty() && name.len() <= 96 && name.chars().all(fits) && !name.starts_with('.') && !name.contains("..")
    };
    let inside = Path::new(inner).components().all(|part| matches!(part, Component::Normal(_)));
    let named = is_name(last) && (name.is_none() || is_name(owner)) && revision.split('/').all(is_name);
    let id = if name.is_some() { format!("{owner}/{last}") } else { last.to_owned() };
    (named && inside).then(|| HubId { id, revision, path: inner.into() })
}

/// The dataset of the hub that a source reads, and its split; none where it reads files. An entry of `dataset_info.json` may name
/// one, too.
///
/// # Errors
/// What is wrong with that entry or with the dataset's name.
pub fn hub_dataset(source: &Source) -> Result<Option<(HubId, String)>> {
    let source = crate::dataset_info::resolve(source)?;
    if !HubId::is_hub(&source.path) {
        return Ok(None);
    }
    let split = source.split.unwrap_or_else(|| "train".to_owned());
    Ok(Some((HubId::parse(&source.path)?, split)))
}

/// The files of one split of a dataset. As in `datasets`, files belong to a split when its name is a part of theirs, or of
/// their folder's; where no file is marked so, all of them are `train`.
pub(crate) fn files(path: &Path, cache: Option<&Path>, split: &str) -> Result<Vec<DataFile>> {
    let hub = HubId::parse(path)?;
    let missing = || DataError::HubMissing {
        kind: "dataset",
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
        let convert = parse("hf://a/b@refs/convert/parquet/default/train/*.parquet").unwrap();
        assert_eq!(
            (convert.revision.as_str(), convert.path.as_path()),
            ("refs/convert/parquet", Path::new("default/train/*.parquet"))
        );
        assert_eq!(parse("hf://a/b@x%2Fy/z").unwrap().revision, "x/y");
        assert_eq!(hub.at("c0ffee"), Path::new("hf://owner/name@c0ffee/data/x.jsonl"));
        for bad in [
            "hf://a/b@refs/pr",
            "hf://a/b@x%2F..",
            "hf://",
            "hf://a/",
            "hf:///b",
            "hf://../b",
            "hf://a/b/../../x",
            "hf://a/b@../x",
            "hf://a b/c",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn models_have_no_path() {
        let id = |text: &str| HubId::parse_model(text).map(|hub| format!("{}@{}", hub.id, hub.revision));
        assert_eq!(id("a/b").unwrap(), "a/b@main");
        assert_eq!(id("hf://gpt2@v1").unwrap(), "gpt2@v1");
        for bad in ["gpt2", "a/b/c", "hf://datasets/a", "hf://datasets/a/b", "./b", "/a/b", "../b", "hf://a/b/c"] {
            assert!(id(bad).unwrap_err().to_string().contains("model"), "{bad}");
        }
    }

    #[test]
    fn what_is_read_is_what_is_fetched() {
        let names = [
            ".gitattributes",
            "README.md",
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/test-00000-of-00001.parquet",
            "dataset_infos.json",
            "run.py",
            "weights.bin",
            "_old/train.parquet",
            "other/x.jsonl.gz",
        ];
        let of = |path: &str, split| HubId::parse(Path::new(path)).unwrap().select(&names, split).join(" ");
        let train = "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet";
        let test = "data/test-00000-of-00001.parquet";
        assert_eq!(of("hf://a/b", Some("train")), train);
        assert_eq!(of("hf://a/b", Some("testing")), test);
        assert_eq!(of("hf://a/b", Some("dev")), "");
        assert_eq!(of("hf://a/b", None), format!("{train} {test} other/x.jsonl.gz"));
        assert_eq!(of("hf://a/b/data", Some("train")), format!("{train} {test}"));
        assert_eq!(of("hf://a/b/data/test*", Some("train")), test);
        assert_eq!(of("hf://a/b/*.parquet", None), "");
        assert_eq!(of("hf://a/b/**/*.gz", None), "other/x.jsonl.gz");
        assert_eq!(of("hf://a/b/other/x.jsonl.gz", None), "other/x.jsonl.gz");
        assert_eq!(of("hf://a/b/weights.bin", None), "");
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
