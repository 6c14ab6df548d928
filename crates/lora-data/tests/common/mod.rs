//! What the tests share.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use lora_data::{DataError, DataOptions, Dataset, Source, Tokenizer, build_dataset};
use tempfile::TempDir;

/// A committed checkpoint whose tokenizer is byte-level BPE with ChatML tokens and template.
pub(crate) fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama")
}

pub(crate) fn tokenizer() -> Tokenizer {
    Tokenizer::load(&fixture()).unwrap()
}

/// A copy of the fixture's tokenizer, to be changed.
pub(crate) fn copied_tokenizer(change: impl FnOnce(&Path)) -> (TempDir, Result<Tokenizer, DataError>) {
    let folder = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"] {
        std::fs::copy(fixture().join(name), folder.path().join(name)).unwrap();
    }
    change(folder.path());
    let tokenizer = Tokenizer::load(folder.path());
    (folder, tokenizer)
}

pub(crate) fn write(content: impl AsRef<[u8]>, extension: &str) -> (TempDir, Source) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(format!("data.{extension}"));
    std::fs::write(&path, content).unwrap();
    (folder, Source { path, ..Source::default() })
}

pub(crate) fn build(lines: &str, tokenizer: &Tokenizer, options: &DataOptions) -> Result<Dataset, DataError> {
    let (_folder, source) = write(lines, "jsonl");
    build_dataset(&[source], tokenizer, options, &mut |_, _| {})
}

/// An error with all its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
