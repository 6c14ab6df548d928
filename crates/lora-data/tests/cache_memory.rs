//! Rows that are kept are never held: memory is for a part of the records. One test, so that the process has nothing else to
//! hold.
#![cfg(target_os = "linux")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::{BufWriter, Write};

use common::tokenizer;
use lora_data::{CacheUse, DataOptions, RowPlan, Source, TokenCache, open_dataset};

/// Rows of 4,000 tokens and 16 KiB; 40 million tokens in all.
const RECORDS: usize = 10_000;
const TOKENS: usize = 4_000;
/// What 32 MiB of records are while they are made into rows, and buffers. All rows have 160 MB as they are stored, and 200 as
/// examples.
const MOST_MEGABYTES: usize = 96;

/// Memory that is no file's, in megabytes.
fn own() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() >> 10
}

#[test]
fn rows_are_never_held() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.jsonl");
    let mut file = BufWriter::new(File::create(&path).unwrap());
    let row = (0..TOKENS).map(|t| (t % 300).to_string()).collect::<Vec<_>>().join(",");
    for record in 0..RECORDS {
        writeln!(file, "{{\"input_ids\": [{},{},{row}]}}", record % 300, record / 300).unwrap();
    }
    file.flush().unwrap();
    drop(file);
    let source = Source { path, ..Source::default() };
    let options = DataOptions { max_length: 2 * TOKENS, ..DataOptions::default() };
    let cache = TokenCache::new(folder.path().join("cache"));
    let tokenizer = tokenizer();
    let before = own();
    for found in [false, true] {
        let mut most = own();
        let mut look = |_, _| most = most.max(own());
        let set = open_dataset(std::slice::from_ref(&source), &tokenizer, &options, Some(&cache), &mut look).unwrap();
        assert_eq!(matches!(set.cache, CacheUse::Found(_)), found);
        let plan = RowPlan::packed(&set.rows.lengths(), options.max_length);
        for row in 0..plan.len() {
            let batch = set.rows.batch(plan.members(row)).unwrap();
            assert!(batch.tokens() > TOKENS);
            if row % 1000 == 0 {
                most = most.max(own());
            }
        }
        assert_eq!((set.rows.len(), set.report.duplicates), (RECORDS, 0));
        assert!(most - before < MOST_MEGABYTES, "{} MB more, found {found}", most - before);
    }
}
