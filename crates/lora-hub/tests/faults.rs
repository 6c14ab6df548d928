//! What must survive: cuts, spoilt bytes, changed files, servers that do not keep to the rules, two at a time, no network.
#![allow(clippy::unwrap_used)] // a helper that fails is a failed test

mod common;

use common::server::{Content, Hub, Reply, Request, Server, noise, sha256};
use common::{LENGTH, dataset, get, large, settings, try_get, walk};
use lora_hub::{Freshness, HubError, Settings, fetch};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// No file is unfinished, and what has a name is whole.
fn assert_clean(cache: &Path, bytes: &[u8]) {
    let blobs = walk(&cache.join("datasets--own--set/blobs"));
    assert_eq!(blobs.len(), 1, "{blobs:?}");
    assert!(blobs[0].ends_with(sha256(bytes)) && std::fs::read(&blobs[0]).unwrap() == bytes);
}

#[test]
fn h1_a_connection_that_is_cut_goes_on_where_it_was() {
    for seed in 1..=20 {
        let bytes = noise(seed, LENGTH);
        let cuts = Mutex::new(noise(seed + 100, 64).into_iter().map(|b| usize::from(b) * 701 + 1));
        let hub = Hub::spoilt(large(&bytes), move |_, mut reply| {
            reply.cut = cuts.lock().unwrap().next();
            reply
        });
        let cache = tempfile::tempdir().unwrap();
        let found = get(&settings(&hub.hub.url(), cache.path())).unwrap();
        assert!(std::fs::read(found.folder.join("data/train.jsonl")).unwrap() == bytes);
        assert_clean(cache.path(), &bytes);
        // Nothing was sent twice: each part begins where the one before was cut.
        let asked = hub.store.log();
        let mut from = 0;
        let mut lengths = noise(seed + 100, 64).into_iter().map(|b| usize::from(b) * 701 + 1);
        for request in &asked {
            assert_eq!(request.range().unwrap_or(0), from, "seed {seed}");
            assert_eq!(request.header("if-range"), (from > 0).then_some("\"store-tag\""));
            from += lengths.next().unwrap();
        }
        assert!(asked.len() > 1 && from >= LENGTH, "seed {seed}: {} requests", asked.len());
    }
}

#[test]
fn h2_spoilt_bytes_are_fetched_again_once_and_then_refused() {
    for at in [0, 1, 70_000, LENGTH - 1] {
        for spoilt in [1, usize::MAX] {
            let bytes = noise(at as u64, LENGTH);
            let seen = AtomicUsize::new(0);
            let hub = Hub::spoilt(large(&bytes), move |_, mut reply| {
                if seen.fetch_add(1, Ordering::Relaxed) < spoilt {
                    reply.body[at] ^= 0x10;
                }
                reply
            });
            let cache = tempfile::tempdir().unwrap();
            let found = get(&settings(&hub.hub.url(), cache.path()));
            assert_eq!(hub.store.log().len(), 2);
            if spoilt == 1 {
                found.unwrap();
                assert_clean(cache.path(), &bytes);
                continue;
            }
            let message = found.unwrap_err().to_string();
            for part in
                ["data/train.jsonl", &format!("wanted sha256 {}", sha256(&bytes)), "got sha256 ", "dataset own/set"]
            {
                assert!(message.contains(part), "{message}");
            }
            let left = walk(&cache.path().join("datasets--own--set"));
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

#[test]
fn h2_small_files_are_checked_by_gits_digest() {
    let content = Content::new("datasets", "own/set", 'a').file("train.jsonl", "{\"text\": \"a\"}\n");
    let hub = Server::start(move |request| {
        let mut reply = content.reply(request, "").unwrap();
        if request.path.contains("resolve") {
            reply.body[3] ^= 1;
        }
        reply
    });
    let cache = tempfile::tempdir().unwrap();
    let message = get(&settings(&hub.url(), cache.path())).unwrap_err().to_string();
    assert!(message.contains("train.jsonl") && message.contains("wanted git blob"), "{message}");
}

#[test]
fn h3_a_file_that_changes_meanwhile_is_begun_again() {
    let (old, new) = (noise(1, LENGTH), noise(2, LENGTH));
    // A server that knows If-Range sends the whole; one that does not sends a part of the other version.
    for ignores in [false, true] {
        let (old, first) = (old.clone(), AtomicUsize::new(0));
        let hub = Hub::spoilt(large(&new), move |request, reply| {
            if first.fetch_add(1, Ordering::Relaxed) == 0 {
                let mut reply = Reply::new(200, old.clone()).with("etag", "\"old\"");
                reply.cut = Some(100_000);
                return reply;
            }
            let mut request = request.clone();
            if ignores {
                request.headers.remove("if-range");
                return large(&noise(2, LENGTH))[0].stored(&request);
            }
            reply
        });
        let cache = tempfile::tempdir().unwrap();
        let (found, told) = try_get(&settings(&hub.hub.url(), cache.path()), Freshness::Cached);
        found.unwrap();
        assert_clean(cache.path(), &new);
        // It was never put together from both, to be found out at the end.
        assert!(!told.iter().any(|event| event.contains("announced")), "{told:?}");
        let asked = hub.store.log();
        assert_eq!(asked[1].header("if-range"), Some("\"old\""));
        assert_eq!(asked.len(), if ignores { 3 } else { 2 });
    }
}

/// A store that is cut after a part and then does something of its own.
fn after_a_cut(then: impl Fn(&Request, Reply) -> Reply + Send + Sync + 'static) -> (Hub, Vec<u8>) {
    let bytes = noise(7, LENGTH);
    let first = AtomicUsize::new(0);
    let hub = Hub::spoilt(large(&bytes), move |request, mut reply| {
        if first.fetch_add(1, Ordering::Relaxed) == 0 {
            reply.cut = Some(50_000);
            return reply;
        }
        then(request, reply)
    });
    (hub, bytes)
}

#[test]
fn h4_another_part_than_was_asked_for_is_not_taken() {
    for range in ["bytes 0-249999/300000", "bytes 50001-299999/300000", "bytes 50000-299999/300001", "nonsense"] {
        let (hub, bytes) = after_a_cut(move |request, reply| match request.range() {
            Some(_) => reply.with("content-range", range),
            None => reply,
        });
        let cache = tempfile::tempdir().unwrap();
        get(&settings(&hub.hub.url(), cache.path())).unwrap();
        assert_clean(cache.path(), &bytes);
        assert_eq!(hub.store.log().len(), 3, "{range}");
    }
}

#[test]
fn h4_the_whole_in_answer_to_a_part_is_taken_as_the_whole() {
    let (hub, bytes) = after_a_cut(|request, _| {
        let mut request = request.clone();
        request.headers.remove("range");
        large(&noise(7, LENGTH))[0].stored(&request)
    });
    let cache = tempfile::tempdir().unwrap();
    get(&settings(&hub.hub.url(), cache.path())).unwrap();
    assert_clean(cache.path(), &bytes);
    assert_eq!(hub.store.log().len(), 2);
}

#[test]
fn h4_a_length_that_is_not_told_is_no_excuse() {
    let bytes = noise(8, LENGTH);
    let first = AtomicUsize::new(0);
    let hub = Hub::spoilt(large(&bytes), move |_, mut reply| {
        reply.length = false;
        reply.cut = (first.fetch_add(1, Ordering::Relaxed) == 0).then_some(1234);
        reply
    });
    let cache = tempfile::tempdir().unwrap();
    get(&settings(&hub.hub.url(), cache.path())).unwrap();
    assert_clean(cache.path(), &bytes);
    assert_eq!(hub.store.log()[1].range(), Some(1234));
}

#[test]
fn h4_a_file_of_another_length_ends_in_a_refusal() {
    let bytes = noise(9, LENGTH);
    let hub = Hub::spoilt(large(&bytes), |_, mut reply| {
        reply.body.push(0);
        reply
    });
    let cache = tempfile::tempdir().unwrap();
    let message = get(&settings(&hub.hub.url(), cache.path())).unwrap_err().to_string();
    assert!(message.contains("300001 bytes") && message.contains("300000"), "{message}");
    assert_eq!(hub.store.log().len(), 4);
}

#[test]
fn h4_a_loop_of_redirects_ends() {
    let bytes = noise(10, 1000);
    let hub = Hub::spoilt(large(&bytes), |request, _| Reply::new(302, "").with("location", request.path.clone()));
    let cache = tempfile::tempdir().unwrap();
    let message = get(&settings(&hub.hub.url(), cache.path())).unwrap_err().to_string();
    assert!(message.contains("redirects more than 10 times") && !message.contains("planted-signature"), "{message}");
    assert!(hub.store.log().len() <= 11);
}

#[test]
fn h4_what_drips_is_taken_and_what_stalls_is_not() {
    let bytes = noise(11, 400);
    let drip = |_: &Request, mut reply: Reply| {
        reply.pace = Some((40, Duration::from_millis(5)));
        reply
    };
    let hub = Hub::spoilt(large(&bytes), drip);
    let cache = tempfile::tempdir().unwrap();
    get(&settings(&hub.hub.url(), cache.path())).unwrap();
    assert_clean(cache.path(), &bytes);
    // Nothing at all comes before the time is over.
    let stalls = Hub::spoilt(large(&bytes), |_, mut reply| {
        reply.cut = Some(0);
        reply.length = true;
        std::thread::sleep(Duration::from_millis(400));
        reply
    });
    let cache = tempfile::tempdir().unwrap();
    let mut short = settings(&stalls.hub.url(), cache.path());
    (short.read_timeout, short.retries) = (Duration::from_millis(50), 1);
    let message = get(&short).unwrap_err().to_string();
    assert!(message.contains("0 of 400 bytes came") && message.contains("start again"), "{message}");
    assert_eq!(stalls.store.log().len(), 2);
}

#[test]
fn h5_what_a_killed_process_left_is_gone_on_with_or_dropped() {
    let bytes = noise(12, LENGTH);
    for (left, tag, starts) in [
        (bytes[..99_999].to_vec(), Some("\"store-tag\""), vec![Some(99_999)]),
        // The tag was not written, or is of another version, or there is more than the file has.
        (bytes[..99_999].to_vec(), None, vec![Some(99_999)]),
        (bytes[..99_999].to_vec(), Some("\"other\""), vec![Some(99_999)]),
        (noise(13, LENGTH + 1), None, vec![None]),
        // Bytes of something else are found out at the end.
        (noise(13, 99_999), None, vec![Some(99_999), None]),
        (noise(13, LENGTH), None, vec![None]),
        (bytes.clone(), None, vec![]),
    ] {
        let hub = Hub::new(large(&bytes));
        let cache = tempfile::tempdir().unwrap();
        let blobs = cache.path().join("datasets--own--set/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join(format!("{}.incomplete", sha256(&bytes))), left).unwrap();
        if let Some(tag) = tag {
            std::fs::write(blobs.join(format!("{}.tag.incomplete", sha256(&bytes))), tag).unwrap();
        }
        get(&settings(&hub.hub.url(), cache.path())).unwrap();
        assert_clean(cache.path(), &bytes);
        let asked: Vec<Option<usize>> = hub.store.log().iter().map(Request::range).collect();
        assert_eq!(asked, starts);
    }
}

#[test]
fn h6_two_at_a_time_give_one_file() {
    for seed in 0..20 {
        let bytes = noise(seed, 40_000);
        let hub = Hub::spoilt(large(&bytes), |_, mut reply| {
            reply.pace = Some((20_000, Duration::from_millis(2)));
            reply
        });
        let cache = tempfile::tempdir().unwrap();
        let settings = settings(&hub.hub.url(), cache.path());
        std::thread::scope(|scope| {
            let both = [scope.spawn(|| get(&settings)), scope.spawn(|| get(&settings))];
            for one in both {
                let found = one.join().unwrap().unwrap();
                assert!(std::fs::read(found.folder.join("data/train.jsonl")).unwrap() == bytes);
            }
        });
        assert_clean(cache.path(), &bytes);
        assert_eq!(hub.store.log().len(), 1);
    }
}

#[test]
fn h7_what_is_cached_needs_no_network() {
    let bytes = noise(14, 5000);
    let hub = Hub::new(large(&bytes));
    let cache = tempfile::tempdir().unwrap();
    let online = settings(&hub.hub.url(), cache.path());
    let first = get(&online).unwrap();
    let asked = hub.hub.log().len();
    // Nobody is asked, though somebody could be.
    let again = get(&online).unwrap();
    assert_eq!((again.files, &again.folder, hub.hub.log().len()), (0, &first.folder, asked));
    let offline = Settings { offline: true, ..online.clone() };
    for freshness in [Freshness::Cached, Freshness::Newest] {
        assert_eq!(try_get(&offline, freshness).0.unwrap().folder, first.folder);
    }
    assert_eq!(hub.hub.log().len(), asked);
    // Nobody answers: what is there is used, and it is said.
    drop(hub);
    let (found, told) = try_get(&online, Freshness::Newest);
    assert_eq!(found.unwrap().folder, first.folder);
    assert!(told.iter().any(|event| event.contains("Unasked")), "{told:?}");
    // Without the listing it is taken as it is.
    std::fs::remove_dir_all(cache.path().join("datasets--own--set/trees")).unwrap();
    assert_eq!(get(&offline).unwrap().folder, first.folder);
}

#[test]
fn h7_what_is_not_cached_is_refused_with_the_reason() {
    let cache = tempfile::tempdir().unwrap();
    let gone = Server::start(|_| Reply::new(500, "")).url();
    let offline = Settings { offline: true, ..settings(&gone, cache.path()) };
    let message = get(&offline).unwrap_err().to_string();
    for part in ["dataset own/set is not in the cache", "HF_HUB_OFFLINE", "lora fetch --dataset hf://own/set"] {
        assert!(message.contains(part), "{message}");
    }
    let error = get(&settings(&gone, cache.path())).unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, HubError::NotCached { .. }) && !error.is_usage(), "{error}");
    assert!(
        message.contains("127.0.0.1:") && message.contains("was not reached (") && message.contains("lora fetch"),
        "{message}"
    );
    assert!(walk(cache.path()).is_empty());
    // Half of it.
    let hub = Hub::new(vec![Content::new("datasets", "own/set", 'a').file("a.jsonl", "a").file("b.jsonl", "b")]);
    let online = settings(&hub.hub.url(), cache.path());
    let one = |_: &[&str]| vec!["a.jsonl".to_owned()];
    fetch(&dataset(), &one, Freshness::Cached, &online, &mut |_| {}).unwrap();
    let message = get(&Settings { offline: true, ..online.clone() }).unwrap_err().to_string();
    assert!(message.contains("b.jsonl is missing") && message.contains("HF_HUB_OFFLINE"), "{message}");
    // The other half is fetched without asking which commit it is.
    let listings = hub.hub.asked("/api/").len();
    assert_eq!((get(&online).unwrap().files, hub.hub.asked("/api/").len()), (1, listings));
}

#[test]
fn h8_names_that_lead_out_are_refused_before_anything_is_written() {
    for bad in ["../evil", "a/../../evil", "/etc/evil", "a\0b", "a//b", "a\\..\\b"] {
        let hub = Hub::new(vec![Content::new("datasets", "own/set", 'a').file("fine.jsonl", "x").file(bad, "evil")]);
        let cache = tempfile::tempdir().unwrap();
        let error = get(&settings(&hub.hub.url(), &cache.path().join("hub"))).unwrap_err();
        assert!(matches!(error, HubError::FileName { .. }), "{bad:?}: {error}");
        assert!(walk(cache.path()).is_empty() && hub.hub.asked("resolve").is_empty());
    }
}

#[test]
fn h8_links_that_lead_out_of_the_cache_are_refused() {
    let hub = Hub::new(large(b"some bytes"));
    let (cache, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let settings = settings(&hub.hub.url(), cache.path());
    let snapshot = cache.path().join("datasets--own--set/snapshots").join("a".repeat(40));
    std::fs::create_dir_all(&snapshot).unwrap();
    // A folder that is a link: nothing is written through it.
    std::os::unix::fs::symlink(outside.path(), snapshot.join("data")).unwrap();
    let error = get(&settings).unwrap_err();
    assert!(matches!(error, HubError::Outside { .. }) && error.to_string().contains("data"), "{error}");
    assert!(walk(outside.path()).is_empty());
    // A file that is one: nothing is read through it.
    std::fs::remove_file(snapshot.join("data")).unwrap();
    std::fs::create_dir(snapshot.join("data")).unwrap();
    std::fs::write(outside.path().join("secret"), "some bytes").unwrap();
    std::os::unix::fs::symlink(outside.path().join("secret"), snapshot.join("data/train.jsonl")).unwrap();
    assert!(matches!(get(&settings), Err(HubError::Outside { .. })));
}
