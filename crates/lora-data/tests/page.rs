//! The examples of `docs/reference/data.md` do what the page says.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
#[path = "common/tables.rs"]
mod tables;

use std::collections::BTreeMap;
use std::path::Path;

use common::{chain, tokenizer};
use lora_data::{
    BadRecords, DataOptions, Format, KnownLabels, Mixing, PreferenceUse, ReadOptions, Source, Tags, TextBy,
    build_dataset, build_labelled, mix_order,
};
use serde::Deserialize;

const PAGE: &str = include_str!("../../../docs/reference/data.md");

/// Writes everything that a message may hold.
const TEMPLATE: &str = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n\
    {{ m.reasoning_content or '' }}{{ m.content or '' }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}\
    <|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A fenced block: the words behind the fence, its text, and the prose up to the next block.
struct Block {
    words: Vec<String>,
    text: String,
    after: String,
}

fn blocks() -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut inside = false;
    for line in PAGE.lines() {
        match (line.strip_prefix("```"), inside) {
            (Some(words), false) => {
                let words = words.split_whitespace().map(str::to_owned).collect();
                blocks.push(Block { words, text: String::new(), after: String::new() });
                inside = true;
            }
            (Some(_), true) => inside = false,
            (None, true) => {
                let text = &mut blocks.last_mut().unwrap().text;
                text.push_str(line);
                text.push('\n');
            }
            (None, false) => {
                if let Some(block) = blocks.last_mut() {
                    block.after.push_str(line);
                    block.after.push('\n');
                }
            }
        }
    }
    blocks
}

/// A table of `data.train`, with the keys that the configuration has.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Example {
    path: String,
    format: Option<Format>,
    #[serde(default)]
    columns: BTreeMap<String, String>,
    #[serde(default)]
    tags: BTreeMap<String, String>,
    #[serde(default)]
    text_by: TextBy,
    separator: Option<String>,
    max_samples: Option<usize>,
    #[serde(default)]
    data: Data,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Data {
    bad_records: String,
    max_bad_share: f64,
    dedup: bool,
    preference: String,
}

#[derive(Deserialize)]
struct Mix {
    mixing: String,
    lengths: Vec<usize>,
    order: Vec<usize>,
}

/// Writes records to a file of the name's kind.
fn put(folder: &Path, name: &str, text: &str) {
    std::fs::create_dir_all(folder.join(name).parent().unwrap()).unwrap();
    let rows: Vec<BTreeMap<String, String>> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let table = || {
        let names: Vec<&str> = rows[0].keys().map(String::as_str).collect();
        let columns: Vec<_> =
            names.iter().map(|name| (*name, rows.iter().map(|row| Some(row[*name].as_str())).collect())).collect();
        tables::batch(&columns)
    };
    let bytes = match name.rsplit('.').next().unwrap() {
        "parquet" => tables::parquet(&table(), tables::codecs()[1]),
        "arrow" => tables::arrow_file(&table()),
        "gz" => tables::gzip(text.as_bytes()),
        _ => text.as_bytes().to_vec(),
    };
    tables::put(folder, name, &bytes);
}

#[test]
fn every_example_does_what_the_page_says() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let template = folder.path().join("every_role.jinja");
    std::fs::write(&template, TEMPLATE).unwrap();
    let (mut ran, mut formats) = (0, Vec::new());
    for block in blocks() {
        let words: Vec<&str> = block.words.iter().map(String::as_str).collect();
        match words[..] {
            ["toml"] => {}
            ["toml", "mix"] => {
                let mix: Mix = toml::from_str(&block.text).unwrap();
                assert_eq!(mix.mixing, "interleave_over");
                assert_eq!(mix_order(&mix.lengths, &[None, None], Mixing::InterleaveOver, 0), mix.order);
                continue;
            }
            [_, name] => {
                put(folder.path(), name, &block.text);
                continue;
            }
            _ => panic!("a block without a name: {}", block.text),
        }
        let example: Example = toml::from_str(&block.text).unwrap();
        let says = block.after.lines().find(|line| !line.is_empty()).unwrap_or_else(|| panic!("{}", block.text));
        let mut tags = Tags::default();
        assert!(example.tags.iter().all(|(key, name)| tags.set(key, Some(name))));
        let source = Source {
            path: folder.path().join(&example.path),
            format: example.format,
            columns: example.columns,
            tags,
            text_by: example.text_by,
            separator: example.separator,
            max_samples: example.max_samples,
            ..Source::default()
        };
        let options = DataOptions {
            reading: ReadOptions {
                bad_records: match example.data.bad_records.as_str() {
                    "skip" => BadRecords::Skip { max_share: example.data.max_bad_share },
                    _ => BadRecords::Refuse,
                },
                ..ReadOptions::default()
            },
            dedup: example.data.dedup,
            preference: match example.data.preference.as_str() {
                "chosen" => PreferenceUse::Chosen,
                _ => PreferenceUse::BothSides,
            },
            max_affected_share: 1.0,
            template: Some(template.clone()),
            ..DataOptions::default()
        };
        let labelled = source.format == Some(Format::Classification);
        let built = match labelled {
            true => build_labelled(&[source], &tokenizer, &options, &KnownLabels::default(), &mut |_, _| {})
                .map(|set| set.report),
            false => build_dataset(&[source], &tokenizer, &options, &mut |_, _| {}).map(|set| set.report),
        };
        ran += 1;
        if let Some(wanted) = says.strip_prefix("Is refused: `") {
            let wanted = wanted.trim_end_matches("`.");
            assert!(chain(&built.unwrap_err()).contains(wanted), "{wanted}");
            continue;
        }
        let report = match built {
            Ok(report) => report,
            Err(error) => panic!("{}: {}", example.path, chain(&error)),
        };
        let (count, rest) = says.strip_prefix("Reads ").and_then(|rest| rest.split_once(' ')).unwrap();
        let format = rest.split('`').nth(1).unwrap();
        assert_eq!(report.sources[0].records.to_string(), count, "{}", example.path);
        assert_eq!(report.sources[0].format.name(), format, "{}", example.path);
        if let Some(kept) = rest.split("keeps ").nth(1) {
            assert_eq!(format!("{}.", report.kept), kept, "{}", example.path);
        }
        assert_eq!(rest.contains("is off"), !report.sources[0].notes.is_empty(), "{}", example.path);
        formats.push(format.to_owned());
    }
    assert!(ran >= 20, "{ran} examples");
    for format in Format::ALL {
        assert!(formats.iter().any(|known| known == format.name()), "no example of {format}");
        assert!(PAGE.contains(&format!("[`{format}`](#{format})")), "the table lacks {format}");
    }
}
