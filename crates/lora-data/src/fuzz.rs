//! What hostile input is thrown at: one function for each way into this crate. libFuzzer (`fuzz/`) and the test that
//! replays the corpus share them. Each takes any bytes and must come back: with a value or an error that says something.

use std::io::Write;

use serde_json::{Map, json};

use crate::document::Document;
use crate::error::Result;
use crate::source::{BadRecords, Documents, ReadOptions, Source};
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// A way in, and its name, which is also that of its corpus.
pub type Target = (&'static str, fn(&[u8]));

/// Every way in.
pub const TARGETS: [Target; 9] = [
    ("jsonl", jsonl),
    ("json", json),
    ("csv", csv),
    ("text", text),
    ("parquet", parquet),
    ("arrow", arrow),
    ("dataset_info", dataset_info),
    ("template", template),
    ("tokenizer", tokenizer),
];

/// A record may be this long, so that the limit is met too.
const LIMIT: usize = 4096;

/// JSON Lines, every format.
pub fn jsonl(bytes: &[u8]) {
    records(bytes, "data.jsonl");
}

/// A JSON array.
pub fn json(bytes: &[u8]) {
    records(bytes, "data.json");
}

/// CSV.
pub fn csv(bytes: &[u8]) {
    records(bytes, "data.csv");
}

/// Plain text.
pub fn text(bytes: &[u8]) {
    records(bytes, "data.txt");
}

/// Parquet.
pub fn parquet(bytes: &[u8]) {
    records(bytes, "data.parquet");
}

/// Arrow, in both of its forms.
pub fn arrow(bytes: &[u8]) {
    records(bytes, "data.arrow");
}

/// A `dataset_info.json`, each of its datasets.
pub fn dataset_info(bytes: &[u8]) {
    let Some((folder, path)) = on_disk(bytes, "dataset_info.json") else { return };
    let names = settled(crate::dataset_info::dataset_names(&path));
    for name in names.into_iter().flatten().take(8) {
        let source = Source { path: folder.path().join(format!("dataset_info.json#{name}")), ..Source::default() };
        settled(crate::dataset_info::resolve(&source));
    }
}

/// A chat template, rendered for a conversation.
pub fn template(bytes: &[u8]) {
    let source = String::from_utf8_lossy(bytes);
    let Some(template) = settled(ChatTemplate::new(&source, "fuzzed", Default::default())) else { return };
    let messages = [json!({"role": "user", "content": "hi"}), json!({"role": "assistant", "content": "yes"})];
    if let Some(rendered) = settled(template.render_spans(&messages, None, false, &Map::new())) {
        for span in rendered.spans {
            assert!(rendered.text.get(span.clone()).is_some(), "span {span:?} is outside of the text");
        }
    }
}

/// A `tokenizer.json`, with which a text is encoded.
pub fn tokenizer(bytes: &[u8]) {
    let Some((folder, _)) = on_disk(bytes, "tokenizer.json") else { return };
    let Some(tokenizer) = settled(Tokenizer::load(folder.path())) else { return };
    if let Some(ids) = settled(tokenizer.encode("Hello, wörld 12\n", false)) {
        settled(tokenizer.decode(&ids, false));
    }
}

/// Reads the bytes as a file of the name's kind, with both policies, and checks what must hold for any file.
fn records(bytes: &[u8], name: &str) {
    let Some((_folder, path)) = on_disk(bytes, name) else { return };
    let source = Source { path, ..Source::default() };
    let refuse = ReadOptions { bad_records: BadRecords::Refuse, max_record_bytes: LIMIT };
    let strict = settled(all(&source, refuse));
    let skip = ReadOptions { bad_records: BadRecords::Skip { max_share: 1.0 }, ..refuse };
    let lenient = settled(all(&source, skip));
    if let Some(strict) = strict {
        assert_eq!(Some(strict), lenient, "a file without a fault is read alike under both policies");
    }
}

fn all(source: &Source, options: ReadOptions) -> Result<Vec<Document>> {
    Documents::open(source, options)?.collect()
}

/// The value, or none for an error, which must say where.
fn settled<T>(result: Result<T>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            assert!(!error.to_string().is_empty());
            None
        }
    }
}

fn on_disk(bytes: &[u8], name: &str) -> Option<(tempfile::TempDir, std::path::PathBuf)> {
    let folder = tempfile::tempdir().ok()?;
    let path = folder.path().join(name);
    std::fs::File::create(&path).and_then(|mut file| file.write_all(bytes)).ok()?;
    Some((folder, path))
}
