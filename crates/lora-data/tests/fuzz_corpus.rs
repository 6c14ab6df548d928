//! The corpus of the fuzz targets, replayed and mutated. `cargo xtask fuzz --seconds N` goes on from the same files with
//! libFuzzer.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use lora_data::fuzz::TARGETS;

/// Mutations of every file of cheap targets, and of those whose every run costs something. `LORA_FUZZ_RUNS` sets another
/// number for all.
const MANY: usize = 600;
const FEW: usize = 40;

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(files.len() >= 3, "{}: a corpus has at least three files", folder.display());
    files.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

/// The xorshift generator of Marsaglia (2003), 64 bits.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

/// Bytes that mean something in one of the formats.
const TOKENS: [&[u8]; 22] = [
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b",",
    b":",
    b"\\",
    b"\n",
    b"\r\n",
    b"\0",
    b"\xff",
    b"\xEF\xBB\xBF",
    b"null",
    b"1e999",
    b"-1",
    b"{{",
    b"{%",
    b"%}",
    b"\xff\xff\xff\x7f",
    b"PAR1",
    b"ARROW1",
];

fn mutate(bytes: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        match random.below(7) {
            0 if at < bytes.len() => bytes[at] = random.next() as u8,
            1 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            2 => bytes.truncate(at),
            3 => {
                let end = (at + random.below(16)).min(bytes.len());
                bytes.drain(at..end);
            }
            4 => {
                let end = (at + random.below(64)).min(bytes.len());
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
            5 => {
                let from = random.below(other.len() + 1);
                let to = (from + random.below(64)).min(other.len());
                bytes.splice(at..at, other[from..to].iter().copied());
            }
            _ => {
                let token = TOKENS[random.below(TOKENS.len())];
                bytes.splice(at..at, token.iter().copied());
            }
        }
    }
    bytes
}

fn attack(name: &str, runs: usize) {
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).unwrap();
    let runs = std::env::var("LORA_FUZZ_RUNS").ok().map_or(runs, |runs| runs.parse().unwrap());
    let files = corpus(name);
    for (at, (path, bytes)) in files.iter().enumerate() {
        target(bytes);
        let mut random = Random(0x9E37_79B9_7F4A_7C15 ^ (at as u64 + 1));
        for run in 0..runs {
            let mutant = mutate(bytes, &files[random.below(files.len())].1, &mut random);
            let outcome = std::panic::catch_unwind(|| target(&mutant));
            if outcome.is_err() {
                let kept = std::env::temp_dir().join(format!("lora-fuzz-{name}-{run}"));
                std::fs::write(&kept, &mutant).unwrap();
                panic!("{}: mutation {run} broke the target; it is kept as {}", path.display(), kept.display());
            }
        }
    }
}

#[test]
fn json_lines() {
    attack("jsonl", MANY);
}

#[test]
fn json_arrays() {
    attack("json", MANY);
}

#[test]
fn csv() {
    attack("csv", MANY);
}

#[test]
fn text() {
    attack("text", MANY);
}

#[test]
fn parquet() {
    attack("parquet", MANY);
}

#[test]
fn arrow() {
    attack("arrow", MANY);
}

#[test]
fn dataset_info() {
    attack("dataset_info", MANY);
}

#[test]
fn templates() {
    attack("template", FEW);
}

#[test]
fn tokenizers() {
    attack("tokenizer", FEW);
}

#[test]
fn every_target_has_a_test_and_a_libfuzzer_twin() {
    let own = include_str!("fuzz_corpus.rs");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).unwrap();
    for (name, _) in TARGETS {
        assert!(own.contains(&format!("attack(\"{name}\", ")), "{name}");
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
        let twin = std::fs::read_to_string(folder.join(format!("fuzz_targets/{name}.rs"))).unwrap();
        assert!(twin.contains(&format!("lora_data::fuzz::{name}(")), "{name}");
    }
}
