//! Several processes at one cache, processes that end before they are done, and a disk that is full.
#![cfg(unix)]
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{chain, tokenizer};
use lora_data::{CacheUse, DataOptions, Source, TokenCache, TokenSet, open_dataset};
use serde_json::json;

/// Set in a child process: the folder in which it is to open the data.
const FOLDER: &str = "LORA_TEST_CACHE_FOLDER";

fn open(folder: &Path) -> Result<TokenSet, lora_data::DataError> {
    let source = Source { path: folder.join("data.jsonl"), ..Source::default() };
    let cache = TokenCache::new(folder.join("cache")).for_every_size();
    open_dataset(&[source], &tokenizer(), &DataOptions::default(), Some(&cache), &mut |_, _| {})
}

fn data(records: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let line = |i: usize| json!({"prompt": format!("what is {i}? "), "completion": "a number ".repeat(20)});
    let lines: String = (0..records).map(|i| format!("{}\n", line(i))).collect();
    std::fs::write(folder.path().join("data.jsonl"), lines).unwrap();
    folder
}

/// This test again as a process of its own, which prints what it found; `shell` may set limits before.
fn child(folder: &Path, shell: &str) -> Child {
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("{shell} exec \"$0\" --exact as_a_process --nocapture"));
    command.arg(std::env::current_exe().unwrap()).env(FOLDER, folder);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn output(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Opens the data, and says its digest or what went wrong. Called as a test it checks that a process of its own says the
/// same as this one.
#[test]
fn as_a_process() {
    match std::env::var_os(FOLDER) {
        Some(folder) => match open(Path::new(&folder)) {
            Ok(set) => println!("\ndigest {}", set.rows.digest()),
            Err(error) => println!("\nfault {}", chain(&error)),
        },
        None => {
            let folder = data(100);
            let said = output(child(folder.path(), ""));
            assert!(said.contains(&digest_line(folder.path())), "{said}");
        }
    }
}

fn digest_line(folder: &Path) -> String {
    format!("digest {}", open(folder).unwrap().rows.digest())
}

fn unfinished(folder: &Path) -> usize {
    let cache = TokenCache::new(folder.join("cache"));
    cache.entries().unwrap().iter().filter(|entry| entry.unfinished).count()
}

#[test]
fn processes_at_once_do_not_disturb_each_other() {
    let folder = data(2000);
    let children: Vec<Child> = (0..4).map(|_| child(folder.path(), "")).collect();
    let said: Vec<String> = children.into_iter().map(output).collect();
    let wanted = digest_line(folder.path());
    assert!(said.iter().all(|said| said.contains(&wanted)), "{said:?}");
    let cache = TokenCache::new(folder.path().join("cache"));
    assert_eq!((cache.entries().unwrap().len(), unfinished(folder.path())), (1, 0));
}

/// Wherever a process is ended, what the next one reads is whole.
#[test]
fn a_process_that_is_ended_leaves_nothing_that_counts() {
    let folder = data(20_000);
    let mut interrupted = 0;
    for wait in [1, 2, 4, 8, 16, 32, 64, 128, 256] {
        let mut running = child(folder.path(), "");
        // Until it has begun to write, then a little longer.
        let before = unfinished(folder.path());
        while unfinished(folder.path()) == before && running.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(wait));
        running.kill().unwrap();
        running.wait().unwrap();
        interrupted += unfinished(folder.path()) - before;
        if unfinished(folder.path()) == before {
            break;
        }
    }
    assert!(interrupted > 0, "no process was ended while it wrote");
    let set = open(folder.path()).unwrap();
    let rows = (0..set.rows.len()).map(|row| set.rows.example(row)).collect::<Result<Vec<_>, _>>().unwrap();
    assert_eq!(rows.len(), 20_000);
    assert!(matches!(open(folder.path()).unwrap().cache, CacheUse::Found(_)));
}

#[test]
fn a_full_disk_is_named() {
    let folder = data(20_000);
    // No file may pass 64 blocks of 512 or 1024 bytes; writing beyond is an error and not a signal.
    let said = output(child(folder.path(), "trap '' XFSZ; ulimit -f 64;"));
    let wanted = ["fault ", "data.cache_dir", "data.cache", "too large"];
    assert!(wanted.iter().all(|part| said.contains(part)), "{said}");
    assert_eq!(unfinished(folder.path()), 0, "what was begun is gone");
    assert!(matches!(open(folder.path()).unwrap().cache, CacheUse::Written(_)), "with room it goes well");
}
