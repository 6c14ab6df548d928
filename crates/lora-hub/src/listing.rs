//! The files of a commit, as the hub lists them and as the cache remembers them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{HubError, Result};
use crate::repo::is_commit;

/// No path of a repository is longer.
const MAX_NAME: usize = 1024;

/// A file of a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RemoteFile {
    pub(crate) path: String,
    /// Not told by every hub before the file itself is asked for.
    pub(crate) known: Option<Known>,
}

/// What is known of a file's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) size: u64,
    pub(crate) digest: Digest,
}

/// All files of a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listing {
    pub(crate) commit: String,
    pub(crate) files: Vec<RemoteFile>,
}

#[derive(Deserialize)]
struct Answer {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

/// The form in which `huggingface_hub` keeps listings.
#[derive(Serialize, Deserialize)]
struct Kept {
    format_version: u32,
    files: BTreeMap<String, KeptFile>,
}

#[derive(Serialize, Deserialize)]
struct KeptFile {
    size: u64,
    blob_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    lfs_sha256: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lfs_size: Option<u64>,
}

const KEPT_VERSION: u32 = 1;

impl Listing {
    /// Takes the hub's answer apart.
    ///
    /// # Errors
    /// In words, where it is no answer; [`HubError::FileName`] where a name must not become a path.
    pub(crate) fn parse(what: &str, host: &str, answer: &[u8]) -> Result<Self> {
        let fault = |problem: String| HubError::Answer { what: what.into(), host: host.into(), problem };
        let answer: Answer =
            serde_json::from_slice(answer).map_err(|e| fault(format!("the answer is no list of files ({e})")))?;
        if !is_commit(&answer.sha) {
            return Err(fault(format!("the answer names {:?} as its commit", answer.sha)));
        }
        let mut files = Vec::with_capacity(answer.siblings.len());
        for Sibling { rfilename, size, blob_id, lfs } in answer.siblings {
            check_name(&rfilename).map_err(|problem| HubError::FileName {
                what: what.into(),
                name: rfilename.clone(),
                problem,
            })?;
            let known = match (lfs, size, blob_id) {
                (Some(lfs), ..) => Digest::parse(&lfs.sha256).map(|digest| Known { size: lfs.size, digest }),
                (None, Some(size), Some(id)) => Digest::parse(&id).map(|digest| Known { size, digest }),
                _ => None,
            };
            files.push(RemoteFile { path: rfilename, known });
        }
        Ok(Self { commit: answer.sha, files })
    }

    /// A listing that was kept; none where it is not one.
    pub(crate) fn read_kept(commit: &str, text: &[u8]) -> Option<Self> {
        let kept: Kept = serde_json::from_slice(text).ok()?;
        if kept.format_version != KEPT_VERSION {
            return None;
        }
        let mut files = Vec::with_capacity(kept.files.len());
        for (path, file) in kept.files {
            check_name(&path).ok()?;
            let known = match (&file.lfs_sha256, file.lfs_size) {
                (Some(sha), size) => Known { size: size.unwrap_or(file.size), digest: Digest::parse(sha)? },
                _ => Known { size: file.size, digest: Digest::parse(&file.blob_id)? },
            };
            files.push(RemoteFile { path, known: Some(known) });
        }
        Some(Self { commit: commit.to_owned(), files })
    }

    /// The text that is kept; none where something is not known.
    pub(crate) fn to_kept(&self) -> Option<Vec<u8>> {
        let mut files = BTreeMap::new();
        for file in &self.files {
            let Known { size, digest } = file.known.clone()?;
            let kept = match digest {
                Digest::Sha256(sha) => {
                    KeptFile { size, blob_id: String::new(), lfs_sha256: Some(sha), lfs_size: Some(size) }
                }
                Digest::Git(blob_id) => KeptFile { size, blob_id, lfs_sha256: None, lfs_size: None },
            };
            files.insert(file.path.clone(), kept);
        }
        serde_json::to_vec_pretty(&Kept { format_version: KEPT_VERSION, files }).ok()
    }
}

/// What is wrong with a name that should become a path below a folder.
fn check_name(name: &str) -> std::result::Result<(), &'static str> {
    if name.is_empty() || name.len() > MAX_NAME {
        return Err("is empty or too long");
    }
    if name.chars().any(char::is_control) {
        return Err("has a control character");
    }
    if name.starts_with('/') || name.contains('\\') || name.as_bytes().get(1) == Some(&b':') {
        return Err("is no path within the repository");
    }
    if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err("leads out of the repository");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789012345678901234567890123456789";
    const BLOB: &str = "ce013625030ba8dba906f756967f9e9ca394464a";
    const SHA: &str = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";

    fn parse(siblings: &str) -> Result<Listing> {
        let text = format!("{{\"sha\": \"{COMMIT}\", \"private\": false, \"siblings\": {siblings}}}");
        Listing::parse("dataset a/b", "hub", text.as_bytes())
    }

    #[test]
    fn answers_are_taken_apart_and_kept() {
        let listing = parse(&format!(
            "[{{\"rfilename\": \"a.json\", \"size\": 6, \"blobId\": \"{BLOB}\"}}, {{\"rfilename\": \"d/b.bin\", \"size\": 130, \
             \"blobId\": \"{BLOB}\", \"lfs\": {{\"sha256\": \"{SHA}\", \"size\": 7, \"pointerSize\": 130}}}}]"
        ))
        .unwrap();
        let known: Vec<_> = listing.files.iter().map(|f| f.known.clone().unwrap()).collect();
        assert_eq!((known[0].size, known[0].digest.name()), (6, BLOB));
        assert_eq!((known[1].size, known[1].digest.name()), (7, SHA));
        assert_eq!(Listing::read_kept(COMMIT, &listing.to_kept().unwrap()), Some(listing));
        // A hub that tells names only.
        let bare = parse("[{\"rfilename\": \"a.json\"}]").unwrap();
        assert_eq!((bare.files[0].known.as_ref(), bare.to_kept()), (None, None));
    }

    #[test]
    fn a_digest_that_is_none_is_not_taken_for_one() {
        let listing = parse("[{\"rfilename\": \"a\", \"size\": 1, \"blobId\": \"../../x\"}]").unwrap();
        assert_eq!(listing.files[0].known, None);
        assert!(Listing::parse("x", "hub", b"{\"sha\": \"../x\"}").is_err());
        assert!(Listing::parse("x", "hub", b"<html>").unwrap_err().to_string().contains("no list of files"));
    }

    #[test]
    fn names_that_would_leave_the_folder_are_refused() {
        for bad in ["../a", "a/../../b", "/etc/passwd", "a//b", "./a", "a\\u0000b", "a\\\\b", "C:/x", "", "a/.."] {
            let refused = parse(&format!("[{{\"rfilename\": \"fine.json\"}}, {{\"rfilename\": \"{bad}\"}}]"));
            assert!(matches!(refused, Err(HubError::FileName { .. })), "{bad}: {refused:?}");
        }
        assert!(parse("[{\"rfilename\": \"a..b/c...d\"}]").is_ok());
    }
}
