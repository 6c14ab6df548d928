//! Published datasets go through with as many records as their sources have. Needs the folder that `LORA_MATERIAL`
//! names, else `../shared/data` beside the workspace.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stderr)]

mod common;

use std::path::{Path, PathBuf};

use common::chain;
use lora_data::{
    AnswerKind, DataOptions, Documents, Format, PreferenceUse, ReadOptions, Source, TextBy, Tokenizer, build_dataset,
    open_answers,
};
use serde_json::Value;

fn material(name: &str) -> Option<PathBuf> {
    let root = std::env::var_os("LORA_MATERIAL")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data"), PathBuf::from);
    let folder = root.join(name);
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!("\n=== NOT TESTED: no folder {} (set LORA_MATERIAL) ===\n", folder.display());
    None
}

fn source(path: impl AsRef<Path>) -> Source {
    Source { path: path.as_ref().to_owned(), ..Source::default() }
}

fn columns(mut source: Source, of: &[(&str, &str)]) -> Source {
    source.columns = of.iter().map(|(field, column)| ((*field).to_owned(), (*column).to_owned())).collect();
    source
}

/// Format and number of the records, every one of them good.
fn read(source: &Source) -> (Format, usize) {
    let mut documents =
        Documents::open(source, ReadOptions::default()).unwrap_or_else(|error| panic!("{}", chain(&error)));
    for document in documents.by_ref() {
        document.unwrap_or_else(|error| panic!("{}", chain(&error)));
    }
    (documents.format().unwrap(), documents.read())
}

/// How many records a file has, told without our readers.
fn counted(path: &Path) -> usize {
    let text = std::fs::read_to_string(path).unwrap();
    match path.extension().unwrap().to_str().unwrap() {
        "json" => serde_json::from_str::<Vec<Value>>(&text).unwrap().len(),
        _ => text.lines().filter(|line| !line.trim().is_empty()).count(),
    }
}

#[test]
fn llama_factorys_sets_through_its_own_list() {
    let Some(folder) = material("llamafactory-demo") else { return };
    for (name, file, format, records) in [
        ("identity", "identity.json", Format::Alpaca, 91),
        ("alpaca_en_demo", "alpaca_en_demo.json", Format::Alpaca, 999),
        ("alpaca_zh_demo", "alpaca_zh_demo.json", Format::Alpaca, 1000),
        ("glaive_toolcall_en_demo", "glaive_toolcall_en_demo.json", Format::Sharegpt, 300),
        ("glaive_toolcall_zh_demo", "glaive_toolcall_zh_demo.json", Format::Sharegpt, 300),
        ("dpo_en_demo", "dpo_en_demo.json", Format::Preference, 300),
        ("dpo_zh_demo", "dpo_zh_demo.json", Format::Preference, 300),
        ("kto_en_demo", "kto_en_demo.json", Format::Kto, 300),
        ("wiki_demo", "wiki_demo.txt", Format::Text, 30),
        ("c4_demo", "c4_demo.jsonl", Format::Text, 300),
    ] {
        let listed = source(folder.join(format!("dataset_info.json#{name}")));
        assert_eq!(read(&listed), (format, records), "{name}");
        assert_eq!(counted(&folder.join(file)), records, "{name}");
    }
    for (file, format, records) in [
        ("v1_sft_demo.jsonl", Format::Messages, 500),
        ("v1_dpo_demo.jsonl", Format::Preference, 10),
        ("reason_tool_use_demo_50.jsonl", Format::Messages, 50),
    ] {
        assert_eq!(read(&source(folder.join(file))), (format, records), "{file}");
    }
    // Every other entry is either elsewhere or more than text, and says so by name.
    let names = lora_data::dataset_names(&folder.join("dataset_info.json")).unwrap();
    assert_eq!(names.len(), 104);
    let refused = names.iter().filter_map(|name| {
        let listed = source(folder.join(format!("dataset_info.json#{name}")));
        Documents::open(&listed, ReadOptions::default()).err().map(|error| (name, chain(&error)))
    });
    for (name, message) in refused {
        let named = message.contains(name.as_str()) && message.contains("key `");
        // Those of the hub are refused where they are not in a cache, and those of other files that are not shipped.
        let elsewhere = message.contains("of the hub") || message.contains("cannot be read");
        assert!(named || elsewhere, "{name}: {message}");
    }
}

#[test]
fn published_sets_have_the_counts_of_their_sources() {
    let folders = ["e2e-nlg", "gsm8k", "instruction-rasbt", "tinyshakespeare"].map(material);
    let [Some(e2e), Some(gsm8k), Some(rasbt), Some(shakespeare)] = folders else { return };
    for (file, records) in [("train.txt", 42_061), ("valid.txt", 4_672), ("test.txt", 4_693)] {
        let mut source = source(e2e.join(file));
        source.separator = Some("||".to_owned());
        assert_eq!(read(&source), (Format::PromptCompletion, records), "{file}");
        assert_eq!(counted(&e2e.join(file)), records);
    }
    // Counted by Python's csv module.
    for (file, records) in [
        ("original/devset.csv", 4_672),
        ("original/testset_w_refs.csv", 4_693),
        ("cleaned/devel-fixed.no-ol.csv", 4_299),
        ("cleaned/test-fixed.csv", 4_693),
    ] {
        let source = columns(source(e2e.join(file)), &[("prompt", "mr"), ("completion", "ref")]);
        assert_eq!(read(&source), (Format::PromptCompletion, records), "{file}");
    }
    for (file, records) in [("train.jsonl", 7_473), ("test.jsonl", 1_319), ("test_socratic.jsonl", 1_319)] {
        let source = columns(source(gsm8k.join(file)), &[("prompt", "question"), ("completion", "answer")]);
        assert_eq!(read(&source), (Format::PromptCompletion, records), "{file}");
    }
    assert_eq!(read(&source(rasbt.join("instruction-data.json"))), (Format::Alpaca, 1_100));
    assert_eq!(read(&source(rasbt.join("instruction-data-with-preference.json"))), (Format::Preference, 1_100));

    let mut plays = source(shakespeare.join("input.txt"));
    assert_eq!(read(&plays), (Format::Text, counted(&plays.path)));
    plays.text_by = TextBy::Paragraph;
    assert_eq!(read(&plays), (Format::Text, 7_222));
    plays.text_by = TextBy::Document;
    assert_eq!(read(&plays), (Format::Text, 1));
}

/// With a real tokenizer and a real template every record becomes rows of tokens.
#[test]
fn chats_calls_pairs_and_ratings_become_rows() {
    let (Some(folder), Some(tokenizer), Some(templates)) =
        (material("llamafactory-demo"), material("tok-qwen2"), material("chat-templates"))
    else {
        return;
    };
    let tokenizer = Tokenizer::load(&tokenizer).unwrap();
    let options = DataOptions {
        max_length: 1 << 16,
        template: Some(templates.join("trl/qwen2_5.jinja")),
        preference: PreferenceUse::BothSides,
        max_affected_share: 0.02,
        ..DataOptions::default()
    };
    let at = |name: &str| match name.contains('.') {
        true => source(folder.join(name)),
        false => source(folder.join(format!("dataset_info.json#{name}"))),
    };
    for (name, rows) in [
        ("identity", 91),
        ("alpaca_en_demo", 999),
        ("glaive_toolcall_en_demo", 300),
        ("glaive_toolcall_zh_demo", 300),
        ("dpo_en_demo", 600),
        ("kto_en_demo", 300),
        ("reason_tool_use_demo_50.jsonl", 50),
        ("v1_sft_demo.jsonl", 500),
        ("v1_dpo_demo.jsonl", 20),
        ("c4_demo", 300),
    ] {
        let set = build_dataset(&[at(name)], &tokenizer, &options, &mut |_, _| {});
        let report = set.unwrap_or_else(|error| panic!("{name}: {}", chain(&error))).report;
        assert_eq!(report.read, rows, "{name}");
        assert!(report.kept * 100 >= rows * 98, "{name}: {report:?}");
    }
    let open =
        |sources: &[Source], kind| open_answers(sources, &tokenizer, &options, kind, None, &mut |_, _| {}).unwrap();
    assert_eq!(open(&[at("dpo_en_demo"), at("dpo_zh_demo")], AnswerKind::Pairs).rows.len(), 1200);
    let rated = open(&[at("kto_en_demo")], AnswerKind::Rated).good;
    let good = rated.iter().filter(|good| **good).count();
    assert!(rated.len() == 300 && (1..300).contains(&good), "{good}");
}
