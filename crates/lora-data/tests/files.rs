//! Every kind of file, alone, compressed, in folders and by pattern.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
#[path = "common/tables.rs"]
mod tables;

use std::io::Write;
use std::path::Path;

use common::chain;
use lora_data::{Body, Documents, ReadOptions, Source, TextBy, read_documents};
use tables::{arrow_file, arrow_stream, batch, codecs, gzip, parquet, put, with_label, zstd};

fn source(path: impl AsRef<Path>) -> Source {
    Source { path: path.as_ref().to_owned(), ..Source::default() }
}

fn bodies(source: &Source) -> Vec<Body> {
    read_documents(source).unwrap().into_iter().map(|document| document.body).collect()
}

fn refusal(source: &Source) -> String {
    chain(&read_documents(source).unwrap_err())
}

fn pair(prompt: &str, completion: &str) -> Body {
    Body::PromptCompletion { prompt: prompt.to_owned(), completion: completion.to_owned() }
}

#[test]
fn the_same_records_come_from_every_kind_of_file() {
    let folder = tempfile::tempdir().unwrap();
    let wanted = [pair("a,\n\"é\"", "1"), pair("b", "2")];
    let table = batch(&[("prompt", vec![Some("a,\n\"é\""), Some("b")]), ("completion", vec![Some("1"), Some("2")])]);
    let jsonl = "{\"prompt\": \"a,\\n\\\"é\\\"\", \"completion\": \"1\"}\n{\"prompt\": \"b\", \"completion\": \"2\"}\n";
    let json = format!("[{}]", jsonl.trim().replace('\n', ","));
    let csv = "prompt,completion\r\n\"a,\n\"\"é\"\"\",1\r\nb,2\r\n";
    let mut files: Vec<(String, Vec<u8>)> = vec![
        ("a.jsonl".into(), jsonl.into()),
        ("a.ndjson".into(), jsonl.into()),
        ("a.json".into(), json.into()),
        ("a.csv".into(), csv.into()),
        ("a.tsv".into(), csv.replace(",1", "\t1").replace(",2", "\t2").replace("prompt,", "prompt\t").into()),
        ("a.arrow".into(), arrow_stream(&table)),
        ("a.feather".into(), arrow_file(&table)),
    ];
    for (index, codec) in codecs().into_iter().enumerate() {
        files.push((format!("{index}.parquet"), parquet(&table, codec)));
    }
    for (name, bytes) in files.clone() {
        files.push((format!("{name}.gz"), gzip(&bytes)));
        files.push((format!("{name}.zst"), zstd(&bytes)));
    }
    for (name, bytes) in files {
        put(folder.path(), &name, &bytes);
        assert_eq!(bodies(&source(folder.path().join(&name))), wanted, "{name}");
    }
}

#[test]
fn text_files_are_cut_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    put(folder.path(), "a.txt", "one\r\ntwo\n\n\n three || 3\n".as_bytes());
    let text = |texts: &[&str]| texts.iter().map(|text| Body::Text((*text).to_owned())).collect::<Vec<_>>();
    let mut source = source(folder.path().join("a.txt"));
    assert_eq!(bodies(&source), text(&["one", "two", " three || 3"]));
    let lines: Vec<usize> = read_documents(&source).unwrap().iter().map(|document| document.origin.line).collect();
    assert_eq!(lines, [1, 2, 5]);
    source.text_by = TextBy::Paragraph;
    assert_eq!(bodies(&source), text(&["one\ntwo", " three || 3"]));
    source.text_by = TextBy::Document;
    assert_eq!(bodies(&source), text(&["one\ntwo\n\n\n three || 3"]));
    source.separator = Some("||".to_owned());
    assert_eq!(bodies(&source), [pair("one\ntwo\n\n\n three ", " 3")]);
    source.text_by = TextBy::Line;
    assert!(refusal(&source).contains("a.txt:1: the line has no `||`"));
}

#[test]
fn folders_and_patterns_are_read_in_the_order_of_names() {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in [("b.jsonl", "2"), ("a.jsonl", "1"), ("c.jsonl.gz", "3")] {
        let line = format!("{{\"text\": \"{text}\"}}\n");
        put(folder.path(), name, &if name.ends_with("gz") { gzip(line.as_bytes()) } else { line.into() });
    }
    std::fs::create_dir(folder.path().join("b")).unwrap();
    put(folder.path(), "b/x.jsonl", b"{\"text\": \"4\"}\n");
    put(folder.path(), "README.md", b"not data");
    put(folder.path(), ".hidden.jsonl", b"not json");
    let texts = |path: &Path| {
        let bodies = bodies(&source(path));
        bodies
            .iter()
            .map(|body| match body {
                Body::Text(text) => text.clone(),
                _ => panic!(),
            })
            .collect::<String>()
    };
    assert_eq!(texts(folder.path()), "1423");
    assert_eq!(texts(&folder.path().join("?.jsonl*")), "123");
    assert_eq!(texts(&folder.path().join("**/*.jsonl")), "142");
    let mut limited = source(folder.path());
    limited.max_samples = Some(3);
    assert_eq!(read_documents(&limited).unwrap().len(), 3);

    assert!(refusal(&source(folder.path().join("*.csv"))).contains("no dataset file"));
    put(folder.path(), "d.csv", b"text\nx\n");
    assert!(refusal(&source(folder.path())).contains("several kinds"));
}

#[test]
fn damaged_tables_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let table = batch(&[("prompt", vec![Some("a")]), ("completion", vec![Some("b")])]);
    let whole = parquet(&table, codecs()[1]);
    let check = |name: &str, bytes: &[u8], wanted: &[&str]| {
        put(folder.path(), name, bytes);
        let message = refusal(&source(folder.path().join(name)));
        for part in wanted {
            assert!(message.contains(part), "{name}: {message:?} should say {part:?}");
        }
    };
    check("magic.parquet", b"not parquet at all", &["magic.parquet", "not a table"]);
    check("cut.parquet", &whole[..whole.len() - 9], &["cut.parquet", "not a table"]);
    check("empty.parquet", b"", &["empty.parquet", "not a table"]);
    check("cut.arrow", &arrow_file(&table)[..64], &["cut.arrow", "not a table"]);
    check(
        "missing.parquet",
        &parquet(&batch(&[("prompt", vec![Some("a")])]), codecs()[0]),
        &["missing.parquet:1", "`prompt`"],
    );
    let null = batch(&[("prompt", vec![Some("a"), None]), ("completion", vec![Some("b"), Some("c")])]);
    check("null.parquet", &parquet(&null, codecs()[0]), &["null.parquet:2", "`prompt`", "missing"]);
    let labelled = with_label(&batch(&[("prompt", vec![Some("a")])]), vec![true]);
    let mut wrong = source(folder.path().join("wrong.parquet"));
    put(folder.path(), "wrong.parquet", &parquet(&labelled, codecs()[0]));
    wrong.columns = [("prompt", "prompt"), ("completion", "label")].map(|(f, c)| (f.to_owned(), c.to_owned())).into();
    wrong.format = Some(lora_data::Format::PromptCompletion);
    assert!(refusal(&wrong).contains("`label` must be of the same kind"), "{}", refusal(&wrong));
}

/// A page header that asks for two gigabytes. The sizes stand in the header as Thrift numbers; every place that could be
/// one is tried.
#[test]
fn page_bombs_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let text = "x".repeat(200);
    let table = batch(&[("text", vec![Some(text.as_str()); 50])]);
    let whole = parquet(&table, codecs()[0]);
    // PAR1, then the first page header: field 1 (kind), field 2 (size unpacked).
    let at = 4;
    assert_eq!(&whole[at..at + 3], [0x15, 0x04, 0x15], "the writer begins with a dictionary page");
    let end = (at + 3..).find(|&byte| whole[byte] & 0x80 == 0).unwrap();
    let bomb = [&whole[..at + 3], &[0xFE, 0xFF, 0xFF, 0xFF, 0x0F], &whole[end + 1..]].concat();
    put(folder.path(), "bomb.parquet", &bomb);
    let message = refusal(&source(folder.path().join("bomb.parquet")));
    assert!(message.contains("2147483647 bytes") && message.contains("column `id`"), "{message}");
}

#[test]
fn csv_faults_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let long = format!("text\n{}\n", "x".repeat(3000));
    let table: &[(&[u8], &[&str])] = &[
        (b"", &["no record"]),
        (b"text\n", &["no record"]),
        (b"text,text\na,b\n", &["csv:1", "`text` appears twice"]),
        (b"prompt,completion\na,b\nc\n", &["csv:3 (record 2)", "1 fields", "prompt, completion"]),
        (b"prompt,completion\na,\"b\nc,d\n", &["csv:2 (record 1)", "never closed"]),
        (b"text\nok\n\xff\n", &["csv:3 (record 2)", "`text`", "UTF-8"]),
        (b"q,a\n1,2\n", &["cannot be told", "`q`"]),
        (long.as_bytes(), &["csv:2", "more than 2000 bytes"]),
    ];
    for (bytes, wanted) in table {
        put(folder.path(), "a.csv", bytes);
        let options = ReadOptions { max_record_bytes: 2000, ..ReadOptions::default() };
        let documents = Documents::open(&source(folder.path().join("a.csv")), options);
        let error = documents.and_then(Iterator::collect::<Result<Vec<_>, _>>).unwrap_err();
        for part in *wanted {
            assert!(chain(&error).contains(part), "{:?} should say {part:?}", chain(&error));
        }
    }
}

/// A gigabyte without a line's end, as ten kilobytes of gzip: it is passed over without being held.
#[test]
fn a_line_without_end_is_not_held() {
    let folder = tempfile::tempdir().unwrap();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let zeros = vec![b'x'; 1 << 20];
    encoder.write_all(b"{\"text\": \"a\"}\n").unwrap();
    for _ in 0..256 {
        encoder.write_all(&zeros).unwrap();
    }
    encoder.write_all(b"\n{\"text\": \"b\"}\n").unwrap();
    put(folder.path(), "a.jsonl.gz", &encoder.finish().unwrap());
    let message = refusal(&source(folder.path().join("a.jsonl.gz")));
    assert!(message.contains("a.jsonl.gz:2: a record of more than"), "{message}");
}
