//! Fetching a small dataset from a hub on this machine.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test file uses a part; a helper that fails is a failed test

#[path = "../server/mod.rs"]
pub mod server;

use lora_hub::{Event, Fetched, Freshness, HubError, Repo, RepoKind, Settings, fetch};
use server::Content;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longer than the pieces in which it is read and written.
pub const LENGTH: usize = 300_000;

pub fn settings(endpoint: &str, cache: &Path) -> Settings {
    Settings {
        endpoint: endpoint.into(),
        retries: 3,
        backoff: Duration::ZERO,
        read_timeout: Duration::from_secs(20),
        ..Settings::new(cache)
    }
}

pub fn dataset() -> Repo {
    Repo::new(RepoKind::Dataset, "own/set", "main").unwrap()
}

pub fn all(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// Fetches all files of `own/set`, with what was told on the way.
pub fn try_get(settings: &Settings, freshness: Freshness) -> (Result<Fetched, HubError>, Vec<String>) {
    let mut told = Vec::new();
    let found = fetch(&dataset(), &all, freshness, settings, &mut |event: Event<'_>| told.push(format!("{event:?}")));
    (found, told)
}

pub fn get(settings: &Settings) -> Result<Fetched, HubError> {
    try_get(settings, Freshness::Cached).0
}

/// Every file below a folder.
pub fn walk(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().unwrap().is_dir() { found.extend(walk(&entry.path())) } else { found.push(entry.path()) }
    }
    found
}

pub fn large(bytes: &[u8]) -> Vec<Content> {
    vec![Content::new("datasets", "own/set", 'a').large("data/train.jsonl", bytes)]
}
