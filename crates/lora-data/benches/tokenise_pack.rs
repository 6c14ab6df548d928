//! Speed of tokenising a dataset and of packing rows.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fmt::Write;
use std::path::Path;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lora_data::{DataOptions, Source, Tokenizer, build_dataset, pack};

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

fn tokenise(criterion: &mut Criterion) {
    let tokenizer = Tokenizer::load(Path::new(FIXTURE)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("corpus.jsonl");
    let lines = corpus(2000);
    std::fs::write(&path, &lines).unwrap();
    let source = Source { path, ..Source::default() };
    let mut group = criterion.benchmark_group("tokenise");
    group.sample_size(10).throughput(Throughput::Bytes(lines.len() as u64));
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

criterion_group!(benches, tokenise, packing);
criterion_main!(benches);
