//! Labelled texts: tokens as transformers makes them, labels of every kind, and what is refused.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use lora_data::{
    ClassTarget, DataOptions, Format, KnownLabels, LabelKind, LabelledSet, Source, Tokenizer, Truncation,
    build_labelled, encode,
};
use std::path::{Path, PathBuf};

fn tokenizer(name: &str) -> (Tokenizer, PathBuf) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/classification").join(name);
    (Tokenizer::load(&dir).unwrap(), dir)
}

#[test]
fn texts_and_pairs_are_encoded_and_cut_as_transformers_does() {
    for name in ["bert", "roberta", "llama"] {
        let (tokenizer, dir) = tokenizer(name);
        let cases: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.join("encoded.json")).unwrap()).unwrap();
        for case in cases.as_array().unwrap() {
            let max_length = case["max_length"].as_u64().map_or(10_000, |n| n as usize);
            let options = DataOptions { max_length, truncation: Truncation::Right, ..DataOptions::default() };
            let (found, cut) =
                encode(&tokenizer, case["text"].as_str().unwrap(), case["text_pair"].as_str(), &options).unwrap();
            let numbers = |key: &str| -> Vec<u32> {
                case[key].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u32).collect()
            };
            assert_eq!(found.ids, numbers("input_ids"), "{name}: {case}");
            let types: Vec<u32> = found.types.iter().map(|&t| t.into()).collect();
            assert_eq!(types, numbers("token_type_ids"), "{name}: {case}");
            assert!(!cut || found.ids.len() == max_length, "{name}: {case}");
        }
    }
}

fn build(lines: &str, known: &KnownLabels) -> Result<LabelledSet, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.jsonl");
    std::fs::write(&path, lines).unwrap();
    let options = DataOptions { max_length: 16, truncation: Truncation::Right, ..DataOptions::default() };
    let sources = [Source { path, ..Source::default() }];
    build_labelled(&sources, &tokenizer("bert").0, &options, known, &mut |_, _| {}).map_err(|e| e.to_string())
}

fn rows(labels: &[&str]) -> String {
    labels.iter().map(|label| format!("{{\"text\": \"the film was dull\", \"label\": {label}}}\n")).collect()
}

#[test]
fn labels_that_are_not_known_are_the_datas() {
    let none = KnownLabels::default();
    for (labels, names, kind) in [
        (&["\"b\"", "\"a\"", "\"b\""][..], &["a", "b"][..], LabelKind::Single),
        (&["1", "0", "2"], &["LABEL_0", "LABEL_1", "LABEL_2"], LabelKind::Single),
        (&["true", "false"], &["LABEL_0", "LABEL_1"], LabelKind::Single),
        (&["\"0\"", "\"1\""], &["LABEL_0", "LABEL_1"], LabelKind::Single),
        (&["1.5", "2"], &["LABEL_0"], LabelKind::Number),
        (&["[\"b\"]", "[\"a\", \"b\"]", "[]"], &["a", "b"], LabelKind::Multi),
        (&["[0, 1, 1]", "[0, 0, 0]"], &["LABEL_0", "LABEL_1", "LABEL_2"], LabelKind::Multi),
        (&["[0.5, 1.0]", "[1, 0]"], &["LABEL_0", "LABEL_1"], LabelKind::Number),
    ] {
        let set = build(&rows(labels), &none).unwrap();
        assert_eq!(
            (set.labels.names.iter().map(String::as_str).collect::<Vec<_>>().as_slice(), set.labels.kind),
            (names, kind),
            "{labels:?}"
        );
        assert_eq!(set.texts.len(), labels.len());
        assert_eq!(set.report.sources[0].format, Format::Classification);
    }
    let set = build(&rows(&["\"b\"", "\"a\"", "\"b\""]), &none).unwrap();
    assert_eq!(set.counts(), [1, 2]);
    assert_eq!(set.texts[0].target, ClassTarget::Id(1));
    let set = build(&rows(&["[\"b\"]", "[\"a\", \"b\"]", "[]"]), &none).unwrap();
    assert_eq!(set.texts[1].target, ClassTarget::Values(vec![1.0, 1.0]));
    assert_eq!(set.counts(), [1, 2]);
}

#[test]
fn known_labels_are_taken_by_name_or_id_and_others_refused_by_their_line() {
    let known = KnownLabels { names: Some(vec!["bad".into(), "good".into()]), kind: Some(LabelKind::Single) };
    let set = build(&rows(&["\"good\"", "0", "\"1\""]), &known).unwrap();
    let ids: Vec<_> = set.texts.iter().map(|t| t.target.clone()).collect();
    assert_eq!(ids, [1, 0, 1].map(ClassTarget::Id));
    for label in ["\"fine\"", "2", "-1", "0.5", "[\"good\"]", "{}"] {
        let message = build(&rows(&["0", label]), &known).unwrap_err();
        assert!(message.contains("d.jsonl:2") && message.contains("`good`"), "{label}: {message}");
    }
    for (labels, word) in
        [(&["\"a\"", "1"][..], "a name"), (&["\"a\""], "nothing to tell apart"), (&["0.5", "\"x\""], "a number")]
    {
        let message = build(&rows(labels), &KnownLabels::default()).unwrap_err();
        assert!(message.contains(word), "{labels:?}: {message}");
    }
    let message = build("{\"text\": \"a\"}\n", &known).unwrap_err();
    assert!(message.contains("`label`") && message.contains("d.jsonl:1"), "{message}");
}

#[test]
fn long_texts_are_cut_counted_and_refused_when_too_many() {
    let long = format!("{{\"text\": \"{}\", \"label\": 0}}\n", "dull ".repeat(40));
    let short: String = rows(&["1"; 30]);
    let set = build(&format!("{short}{long}"), &KnownLabels::default()).unwrap();
    assert_eq!((set.report.truncated, set.report.longest), (1, 16));
    let sep = tokenizer("bert").0.encode("", true).unwrap()[1];
    assert_eq!(set.texts.last().unwrap().tokens.input_ids.last(), Some(&sep), "special tokens are never cut");
    let message = build(&format!("{}{long}", rows(&["1"])), &KnownLabels::default()).unwrap_err();
    assert!(message.contains("1 truncated"), "{message}");
}

#[test]
fn pairs_have_types_and_columns_may_have_other_names() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.jsonl");
    std::fs::write(
        &path,
        "{\"q\": \"dull\", \"s\": \"cold\", \"y\": \"no\"}\n{\"q\": \"dull\", \"s\": null, \"y\": \"yes\"}\n",
    )
    .unwrap();
    let columns = [("text", "q"), ("text_pair", "s"), ("label", "y")];
    let columns = columns.map(|(a, b)| (a.to_string(), b.to_string())).into();
    let source = Source { path, columns, ..Source::default() };
    let set = build_labelled(
        &[source],
        &tokenizer("bert").0,
        &DataOptions::default(),
        &KnownLabels::default(),
        &mut |_, _| {},
    )
    .unwrap();
    assert_eq!(set.texts[0].token_types, [0, 0, 0, 1, 1]);
    assert_eq!(set.texts[1].token_types, [0, 0, 0]);
}

#[test]
fn the_same_text_with_the_same_label_counts_as_twice() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.jsonl");
    std::fs::write(&path, rows(&["0", "1", "0", "1", "0"])).unwrap();
    let source = Source { path, ..Source::default() };
    for (dedup, kept) in [(false, 5), (true, 2)] {
        let options = DataOptions { dedup, ..DataOptions::default() };
        let known = KnownLabels::default();
        let set = build_labelled(std::slice::from_ref(&source), &tokenizer("bert").0, &options, &known, &mut |_, _| {});
        let set = set.unwrap();
        assert_eq!((set.texts.len(), set.report.kept, set.report.duplicates), (kept, kept, 3));
        assert_eq!(set.texts[0].tokens.input_ids.len() * 3, set.report.duplicate_tokens);
    }
}

/// A policy that texts do not have is named as a configuration spells it.
#[test]
fn a_policy_for_turns_is_refused_by_its_name() {
    use Truncation::{LeftTurns, Middle, MiddleTurns, RightTurns, Split};
    for policy in [LeftTurns, Middle, MiddleTurns, RightTurns, Split] {
        let options = DataOptions { truncation: policy, ..DataOptions::default() };
        let error = encode(&tokenizer("llama").0, "a", None, &options).unwrap_err().to_string();
        let name = serde_json::to_string(&policy).unwrap();
        assert!(error.starts_with(&format!("truncation = {name}: ")), "{error}");
    }
}
