//! Who sees the token, where files come to lie, when the hub is asked again.
#![allow(clippy::unwrap_used)] // a helper that fails is a failed test

mod common;

use common::server::{Content, Hub, Reply, Server, git_blob, noise, sha256};
use common::{LENGTH, get, large, settings, try_get, walk};
use lora_hub::{Freshness, HubError, Settings, Token};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

#[test]
fn the_token_goes_to_the_hub_and_nowhere_else() {
    let planted = "hf_planted0123456789";
    let bytes = noise(15, LENGTH);
    let first = AtomicUsize::new(0);
    let hub = Hub::spoilt(large(&bytes), move |_, mut reply| {
        reply.cut = (first.fetch_add(1, Ordering::Relaxed) == 0).then_some(77);
        reply
    });
    let cache = tempfile::tempdir().unwrap();
    let mut settings = settings(&hub.hub.url(), cache.path());
    settings.token = Some(Token::new(planted).unwrap());
    let (found, told) = try_get(&settings, Freshness::Cached);
    found.unwrap();
    assert!(hub.hub.log().iter().all(|r| r.header("authorization") == Some(&format!("Bearer {planted}"))));
    assert!(hub.store.log().len() > 1 && hub.store.log().iter().all(|r| r.header("authorization").is_none()));
    let mut said = format!("{told:?} {settings:?}");
    for status in [401, 403, 404, 418, 500] {
        let refuses = Server::start(move |_| Reply::new(status, ""));
        let cache = tempfile::tempdir().unwrap();
        let refused = Settings { endpoint: refuses.url(), cache: cache.path().into(), ..settings.clone() };
        let (error, told) = try_get(&refused, Freshness::Cached);
        said += &format!("{} {told:?}", error.unwrap_err());
    }
    assert!(said.contains("status 403") && !said.contains(planted) && !said.contains("planted-signature"), "{said}");
    for file in walk(cache.path()) {
        let text = std::fs::read(&file).unwrap();
        assert!(!text.windows(planted.len()).any(|w| w == planted.as_bytes()), "{}", file.display());
    }
}

#[test]
fn room_is_asked_for_before_anything_is_downloaded() {
    for (size, wanted) in [(1 << 62, 1 << 63), (u64::MAX, u64::MAX)] {
        let file = |name: &str, digit: &str| serde_json::json!({"rfilename": name, "size": 1, "blobId": "0".repeat(40), "lfs": {"sha256": digit.repeat(64), "size": size}});
        let listing =
            serde_json::json!({"sha": "a".repeat(40), "siblings": [file("a.jsonl", "5"), file("b.jsonl", "6")]});
        let hub = Server::start(move |_| Reply::new(200, listing.to_string()));
        let cache = tempfile::tempdir().unwrap();
        let error = get(&settings(&hub.url(), cache.path())).unwrap_err();
        assert!(matches!(error, HubError::NoSpace { needed, .. } if needed == wanted), "{error}");
        assert!(hub.asked("resolve").is_empty());
    }
}

#[test]
fn the_cache_has_the_usual_layout_and_a_branch_moves_only_when_asked() {
    let old = Content::new("datasets", "own/set", 'a').file("data/a.jsonl", "one").large("same.jsonl", "same");
    let new = Content::new("datasets", "own/set", 'b').file("data/a.jsonl", "two").large("same.jsonl", "same");
    let hub = Hub::new(vec![old]);
    let cache = tempfile::tempdir().unwrap();
    let first = get(&settings(&hub.hub.url(), cache.path())).unwrap();
    let folder = cache.path().join("datasets--own--set");
    assert_eq!(std::fs::read_to_string(folder.join("refs/main")).unwrap(), "a".repeat(40));
    assert_eq!(first.folder, folder.join("snapshots").join("a".repeat(40)));
    let link = std::fs::read_link(first.folder.join("data/a.jsonl")).unwrap();
    assert_eq!(link, Path::new("../../../blobs").join(git_blob(b"one")));
    assert_eq!(
        std::fs::read_link(first.folder.join("same.jsonl")).unwrap(),
        Path::new("../../blobs").join(sha256(b"same"))
    );
    // The branch has moved.
    let moved = Hub::new(vec![new]);
    let settings = settings(&moved.hub.url(), cache.path());
    assert_eq!(get(&settings).unwrap().commit, "a".repeat(40));
    let (found, _) = try_get(&settings, Freshness::Newest);
    let found = found.unwrap();
    assert_eq!((found.commit.as_str(), found.files), ("b".repeat(40).as_str(), 2));
    assert_eq!(std::fs::read_to_string(found.folder.join("data/a.jsonl")).unwrap(), "two");
    // What both have was not sent again.
    assert!(moved.store.log().is_empty());
    assert_eq!(get(&settings).unwrap().commit, "b".repeat(40));
}

#[test]
fn a_hub_that_lists_names_only_is_asked_for_the_rest() {
    let content = Content::new("datasets", "own/set", 'a').file("a.jsonl", "small").large("b.jsonl", "large");
    let names = format!(
        "{{\"sha\": \"{}\", \"siblings\": [{{\"rfilename\": \"a.jsonl\"}}, {{\"rfilename\": \"b.jsonl\"}}]}}",
        content.commit
    );
    let stored = content.clone();
    let store = Server::start(move |request| stored.stored(request));
    let url = store.url();
    let hub = Server::start(move |request| match request.path.contains("/api/") {
        true => Reply::new(200, names.clone()),
        false => content.reply(request, &url).unwrap(),
    });
    let cache = tempfile::tempdir().unwrap();
    let found = get(&settings(&hub.url(), cache.path())).unwrap();
    assert_eq!(std::fs::read_to_string(found.folder.join("b.jsonl")).unwrap(), "large");
    assert_eq!(hub.log().iter().filter(|r| r.method == "HEAD").count(), 2);
}

#[test]
fn what_may_pass_is_asked_again_and_what_does_not_is_not() {
    let content = Content::new("datasets", "own/set", 'a').file("a.jsonl", "small");
    let busy = AtomicUsize::new(0);
    let hub = Server::start(move |request| match busy.fetch_add(1, Ordering::Relaxed) {
        0 | 2 => Reply::new(503, "").with("retry-after", "0"),
        3 => Reply::new(429, "").with("retry-after", "0"),
        _ => content.reply(request, "").unwrap(),
    });
    let cache = tempfile::tempdir().unwrap();
    get(&settings(&hub.url(), cache.path())).unwrap();
    assert_eq!(hub.log().len(), 5);
    for (status, part) in [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "check owner, name and revision")] {
        let hub = Server::start(move |_| Reply::new(status, ""));
        let cache = tempfile::tempdir().unwrap();
        let error = get(&settings(&hub.url(), cache.path())).unwrap_err();
        assert!(error.is_usage() && error.to_string().contains(part), "{error}");
        assert_eq!(hub.log().len(), 1);
    }
}
