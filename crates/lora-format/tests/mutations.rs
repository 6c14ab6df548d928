//! Files that were damaged at random: every reader comes back with a value or with an error that names the file. A panic,
//! or memory for what a header merely claims, would end the process of the test.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use lora_format::{AdapterConfig, Checkpoint, TensorFile, read_adapter, read_hf_config};
use std::fs;
use std::path::{Path, PathBuf};

/// Mutations of every file; `LORA_FUZZ_RUNS` sets another number.
const RUNS: u32 = 300;

/// The xorshift generator of Marsaglia (2003), 64 bits.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound.max(1) as u64) as usize
    }
}

/// What means something in JSON, in numbers, and in the length before a safetensors header.
const TOKENS: [&[u8]; 18] = [
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b",",
    b":",
    b"\\u0000",
    b"null",
    b"1e999",
    b"-1",
    b"99999999999999999999",
    b"1099511627776",
    b"../",
    b"NaN",
    b"\xff",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"true",
];

/// Some changes to the first bytes, where headers are, or anywhere.
fn mutate(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=random.below(3) {
        let reach = if random.below(2) == 0 { bytes.len().min(2000) } else { bytes.len() };
        let at = random.below(reach + 1);
        match random.below(5) {
            0 if at < bytes.len() => bytes[at] = random.below(256) as u8,
            1 => bytes.truncate(at),
            2 => {
                let end = (at + random.below(24)).min(bytes.len());
                bytes.drain(at..end);
            }
            3 => {
                let token = TOKENS[random.below(TOKENS.len())];
                let end = (at + token.len()).min(bytes.len());
                bytes.splice(at..end, token.iter().copied());
            }
            _ => {
                let token = TOKENS[random.below(TOKENS.len())];
                bytes.splice(at..at, token.iter().copied());
            }
        }
    }
    bytes
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

/// Copies the folder, damages one file of it again and again, and reads; an error names what it is about.
fn damaged<T>(folder: &str, file: &str, read: impl Fn(&Path) -> lora_format::Result<T>) {
    let runs = std::env::var("LORA_FUZZ_RUNS").map_or(RUNS, |text| text.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(folder)).unwrap().flatten().filter(|e| e.path().is_file()) {
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let (path, whole) = (dir.path().join(file), fs::read(fixture(folder).join(file)).unwrap());
    let (mut random, mut refused) = (Random(0x00C0_FFEE + whole.len() as u64), 0);
    for _ in 0..runs {
        fs::write(&path, mutate(&whole, &mut random)).unwrap();
        if let Err(error) = read(dir.path()) {
            let text = error.to_string();
            refused += 1;
            assert!(text.contains(&dir.path().display().to_string()), "{folder}/{file}: {text}");
            assert!(text.len() < 20_000, "{folder}/{file}: {} bytes of text", text.len());
        }
    }
    assert!(refused * 3 > runs, "{folder}/{file}: only {refused} of {runs} were refused");
}

#[test]
fn weights() {
    damaged("llama", "model.safetensors", |dir| {
        let file = TensorFile::open(&dir.join("model.safetensors"))?;
        file.names().try_for_each(|name| file.read(name).map(drop))
    });
}

#[test]
fn an_index_of_shards() {
    damaged("qwen3", "model.safetensors.index.json", Checkpoint::open);
}

#[test]
fn the_config_of_a_base() {
    damaged("gemma2", "config.json", read_hf_config);
    damaged("llama_longrope", "config.json", read_hf_config);
}

#[test]
fn the_config_of_an_adapter() {
    damaged("llama/adapters/patterns", "adapter_config.json", |dir| {
        AdapterConfig::read(&dir.join("adapter_config.json"))
    });
    damaged("llama/adapters/adalora_pruned", "adapter_config.json", |dir| {
        AdapterConfig::read(&dir.join("adapter_config.json"))
    });
}

#[test]
fn the_weights_of_an_adapter() {
    damaged("llama/adapters/dora", "adapter_model.safetensors", read_adapter);
    damaged("llama/adapters/vera", "adapter_model.safetensors", read_adapter);
}
