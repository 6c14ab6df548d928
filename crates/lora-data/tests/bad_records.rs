//! Records that cannot be used: refused, or left out and counted.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{chain, tokenizer, write};
use lora_data::{BadRecords, DataOptions, Documents, ReadOptions, build_dataset};

fn skip(max_share: f64) -> ReadOptions {
    ReadOptions { bad_records: BadRecords::Skip { max_share }, max_record_bytes: 4096 }
}

/// One good record, and one of each fault.
const MIXED: &[&str] = &[
    r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
    r#"{"messages": [{"role": "user", "content": "a"}"#,
    r#"{"messages": [{"role": "user", "content": "a", "content": "b"}]}"#,
    "[1]",
    r#"{"msgs": []}"#,
    r#"{"messages": []}"#,
    r#"{"messages": 5}"#,
    r#"{"messages": [{"role": "tool", "content": "a"}]}"#,
    r#"{"messages": [{"role": "user", "content": "a", "train": "yes"}]}"#,
];

#[test]
fn bad_records_are_left_out_and_counted() {
    let mut lines = MIXED.join("\n").into_bytes();
    lines.extend_from_slice(b"\n{\"messages\": \"\xff\"}\n");
    lines.extend_from_slice(format!("{{\"messages\": \"{}\"}}\n{}\n", "x".repeat(5000), MIXED[0]).as_bytes());
    let (_folder, source) = write(lines, "jsonl");

    let refused = Documents::open(&source, ReadOptions::default()).unwrap().collect::<Result<Vec<_>, _>>();
    assert!(refused.unwrap_err().to_string().contains("jsonl:2:"));

    let mut documents = Documents::open(&source, skip(1.0)).unwrap();
    let read: Vec<_> = documents.by_ref().collect::<Result<_, _>>().unwrap();
    assert_eq!(read.iter().map(|document| document.origin.line).collect::<Vec<_>>(), [1, 12]);
    assert_eq!((documents.read(), documents.bad().count), (2, 10));
    assert!(documents.bad().first[0].contains("jsonl:2:"));

    let over = Documents::open(&source, skip(0.5)).unwrap().collect::<Result<Vec<_>, _>>().unwrap_err();
    let message = chain(&over);
    for part in ["10 of 12 records", "max_bad_share", "jsonl:2:", "broken JSON"] {
        assert!(message.contains(part), "{message:?} should say {part:?}");
    }
}

#[test]
fn elements_of_an_array_and_rows_are_left_out_too() {
    let (_folder, source) = write("[{\"text\": \"a\"}, {\"text\": tru}, 5, {\"text\": \"b\"}]", "json");
    let mut documents = Documents::open(&source, skip(0.5)).unwrap();
    assert_eq!(documents.by_ref().filter(Result::is_ok).count(), 2);
    assert_eq!(documents.bad().count, 2);
    let (_folder, source) = write("text\na\nb,c\nd\n", "csv");
    let mut documents = Documents::open(&source, skip(0.5)).unwrap();
    assert_eq!(documents.by_ref().filter(Result::is_ok).count(), 2);
    assert_eq!(documents.bad().count, 1);
}

#[test]
fn a_broken_file_is_refused_under_either_policy() {
    for (bytes, extension) in [("[{\"text\": \"a\"}", "json"), ("x", "parquet"), ("{\"a\": 1}", "jsonl")] {
        let (_folder, source) = write(bytes, extension);
        let read = Documents::open(&source, skip(1.0)).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        assert!(read.is_err(), "{extension}");
    }
}

#[test]
fn what_the_template_refuses_counts_as_bad() {
    let good = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    let raising = "{% for m in messages %}{{ raise_exception('no x') if m.content == 'x' else m.role + m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant{% endif %}";
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.jinja");
    std::fs::write(&path, raising).unwrap();
    let (_folder, source) = write(format!("{good}\n{}\n{good}\n", good.replace("\"a\"", "\"x\"")), "jsonl");
    let options = DataOptions { template: Some(path), ..DataOptions::default() };
    let build = |reading| {
        build_dataset(
            std::slice::from_ref(&source),
            &tokenizer(),
            &DataOptions { reading, ..options.clone() },
            &mut |_, _| {},
        )
    };
    assert!(chain(&build(ReadOptions::default()).unwrap_err()).contains("no x"));
    let set = build(skip(0.4)).unwrap();
    assert_eq!((set.report.kept, set.report.sources[0].records, set.report.sources[0].bad.count), (2, 2, 1));
    assert!(chain(&build(skip(0.1)).unwrap_err()).contains("1 of 3 records"));
}
