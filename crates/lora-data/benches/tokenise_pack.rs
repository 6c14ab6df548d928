//! Speed of every stage of the data: reading records, rendering conversations, tokenising, packing, and rows that were kept.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fmt::Write;
use std::path::Path;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lora_data::{
    Body, DataOptions, Documents, ReadOptions, Source, TokenCache, Tokenizer, build_dataset, open_dataset, pack,
};
use serde_json::{Map, Value};

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/llama");

/// Words of plausible lengths from a fixed generator.
fn words(count: usize, state: &mut u64) -> String {
    let mut text = String::new();
    for _ in 0..count {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let length = 2 + (*state >> 33) as usize % 8;
        text.extend((0..length).map(|i| char::from(b'a' + (*state >> (8 + 5 * i)) as u8 % 26)));
        text.push(' ');
    }
    text
}

fn corpus(records: usize) -> String {
    let mut state = 1;
    let mut lines = String::new();
    for _ in 0..records {
        let (question, answer) = (words(30, &mut state), words(60, &mut state));
        writeln!(
            lines,
            r#"{{"messages": [{{"role": "user", "content": "{question}"}}, {{"role": "assistant", "content": "{answer}"}}]}}"#
        )
        .unwrap();
    }
    lines
}

/// Records of conversations in a file.
fn on_disk(records: usize) -> (tempfile::TempDir, Source, u64) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("corpus.jsonl");
    let lines = corpus(records);
    std::fs::write(&path, &lines).unwrap();
    (folder, Source { path, ..Source::default() }, lines.len() as u64)
}

fn read(criterion: &mut Criterion) {
    let (_folder, source, bytes) = on_disk(2000);
    let mut group = criterion.benchmark_group("read");
    group.sample_size(10).throughput(Throughput::Bytes(bytes));
    group.bench_function("jsonl/2000", |bencher| {
        bencher
            .iter(|| Documents::open(&source, ReadOptions::default()).unwrap().inspect(|d| assert!(d.is_ok())).count());
    });
    group.finish();
}

fn render(criterion: &mut Criterion) {
    let tokenizer = Tokenizer::load(Path::new(FIXTURE)).unwrap();
    let (_folder, source, bytes) = on_disk(200);
    let messages = |body: Body| match body {
        Body::Conversation(talk) => talk.messages.into_iter().map(|message| Value::Object(message.fields)).collect(),
        other => panic!("not a conversation: {other:?}"),
    };
    let documents = Documents::open(&source, ReadOptions::default()).unwrap();
    let talks: Vec<Vec<Value>> = documents.map(|document| messages(document.unwrap().body)).collect();
    let template = tokenizer.template().unwrap();
    let mut group = criterion.benchmark_group("render");
    group.sample_size(10).throughput(Throughput::Bytes(bytes));
    group.bench_function("messages/200", |bencher| {
        bencher.iter(|| {
            talks.iter().map(|talk| template.render(talk, None, false, &Map::new()).unwrap().len()).sum::<usize>()
        });
    });
    group.finish();
}

/// A set of which the tokens were kept: to the digest of its rows.
fn kept(criterion: &mut Criterion) {
    let tokenizer = Tokenizer::load(Path::new(FIXTURE)).unwrap();
    let (folder, source, bytes) = on_disk(2000);
    let cache = TokenCache::new(folder.path().join("cache")).for_every_size();
    let open = || {
        let options = DataOptions::default();
        open_dataset(std::slice::from_ref(&source), &tokenizer, &options, Some(&cache), &mut |_, _| {}).unwrap()
    };
    let rows = open().rows.digest();
    let mut group = criterion.benchmark_group("kept");
    group.sample_size(10).throughput(Throughput::Bytes(bytes));
    group.bench_function("messages/2000", |bencher| bencher.iter(|| assert_eq!(open().rows.digest(), rows)));
    group.finish();
}

fn tokenise(criterion: &mut Criterion) {
    let tokenizer = Tokenizer::load(Path::new(FIXTURE)).unwrap();
    let (_folder, source, bytes) = on_disk(2000);
    let mut group = criterion.benchmark_group("tokenise");
    group.sample_size(10).throughput(Throughput::Bytes(bytes));
    group.bench_function("messages/2000", |bencher| {
        bencher.iter(|| {
            build_dataset(std::slice::from_ref(&source), &tokenizer, &DataOptions::default(), &mut |_, _| {}).unwrap()
        });
    });
    group.finish();
}

fn packing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pack");
    group.sample_size(10);
    for count in [10_000_usize, 100_000, 1_000_000] {
        let mut state = 7_u64;
        let lengths: Vec<usize> = (0..count)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                1 + (state >> 40) as usize % 2048
            })
            .collect();
        group.throughput(Throughput::Elements(count as u64));
        group.bench_with_input(BenchmarkId::from_parameter(count), &lengths, |bencher, lengths| {
            bencher.iter(|| pack(lengths, 4096));
        });
    }
    group.finish();
}

criterion_group!(benches, read, render, tokenise, packing, kept);
criterion_main!(benches);
