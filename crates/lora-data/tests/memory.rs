//! Reading takes memory for a record or a batch, not for the file. One test, so that the process has nothing else to hold.
#![cfg(target_os = "linux")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
#[path = "common/tables.rs"]
mod tables;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use lora_data::{Documents, ReadOptions, Source, TextBy};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;

/// Records of a kilobyte; the whole has 128 MB.
const RECORDS: usize = 128 << 10;
/// Buffers of one megabyte, a batch or a page of a table, and what the allocator keeps. A reader that held the file, or
/// its records, would pass it several times.
const MOST_MEGABYTES: usize = 48;

/// The most memory that the process had, in megabytes.
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() >> 10
}

fn write(path: &Path, head: &str, between: &str, tail: &str, record: &str) {
    let mut file = BufWriter::new(File::create(path).unwrap());
    file.write_all(head.as_bytes()).unwrap();
    for index in 0..RECORDS {
        let between = if index == 0 { "" } else { between };
        write!(file, "{between}{record}").unwrap();
    }
    file.write_all(tail.as_bytes()).unwrap();
    file.flush().unwrap();
}

fn write_parquet(path: &Path, text: &str) {
    let batch = tables::batch(&[("text", vec![Some(text); 1024])]);
    // Without a dictionary, so that every row is there.
    let properties =
        WriterProperties::builder().set_dictionary_enabled(false).set_max_row_group_row_count(Some(8192)).build();
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), Some(properties)).unwrap();
    for _ in 0..RECORDS / 1024 {
        writer.write(&batch).unwrap();
    }
    writer.close().unwrap();
}

#[test]
fn a_file_is_never_held() {
    let folder = tempfile::tempdir().unwrap();
    let text = "x".repeat(1000);
    let at = |name: &str| folder.path().join(name);
    let object = format!("{{\"text\": \"{text}\"}}");
    write(&at("a.jsonl"), "", "\n", "\n", &object);
    write(&at("a.json"), "[", ",\n", "]\n", &object);
    write(&at("a.csv"), "text\n", "\n", "\n", &text);
    write(&at("a.txt"), "", "\n\n", "\n", &text);
    write_parquet(&at("a.parquet"), &text);
    let before = peak();
    for name in ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet"] {
        let source = Source { path: at(name), text_by: TextBy::Paragraph, ..Source::default() };
        let mut documents = Documents::open(&source, ReadOptions::default()).unwrap();
        assert!(documents.by_ref().all(|document| document.is_ok()));
        assert_eq!(documents.read(), RECORDS, "{name}");
        let grown = peak() - before;
        assert!(grown < MOST_MEGABYTES, "{name}: {grown} MB more");
    }
}
