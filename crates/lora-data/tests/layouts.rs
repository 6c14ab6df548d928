//! Layouts of records beyond plain ones: tool calls, pairs, ratings, and LLaMA-Factory's list of datasets.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{chain, tokenizer, write};
use lora_data::{
    AnswerKind, Body, Conversation, DataOptions, Document, Documents, Format, PreferenceUse, ReadOptions, Source,
    build_dataset, open_answers, read_documents,
};
use serde_json::{Value, json};

fn one(record: &Value) -> Body {
    let (_folder, source) = write(record.to_string(), "jsonl");
    read_documents(&source).unwrap().remove(0).body
}

fn refusal(record: &Value) -> String {
    let (_folder, source) = write(record.to_string(), "jsonl");
    chain(&read_documents(&source).unwrap_err())
}

fn conversation(body: Body) -> Conversation {
    match body {
        Body::Conversation(conversation) => conversation,
        other => panic!("{other:?}"),
    }
}

/// Role, what is said, and whether it is trained.
fn said(body: &Body) -> Vec<(String, String, bool)> {
    let conversation = conversation(body.clone());
    let text = |message: &lora_data::Message| message.fields["content"].as_str().unwrap_or_default().to_owned();
    conversation.messages.iter().map(|m| (m.role().to_owned(), text(m), m.is_trained())).collect()
}

fn turns(of: &[(&str, &str, bool)]) -> Vec<(String, String, bool)> {
    of.iter().map(|(role, text, trained)| ((*role).to_owned(), (*text).to_owned(), *trained)).collect()
}

#[test]
fn sharegpt_calls_become_tool_calls() {
    let body = one(&json!({
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": "<think>hm</think>{\"name\": \"f\", \"arguments\": \"{\\\"x\\\": 1}\"}"},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "b"},
        ],
        "tools": "[{\"name\": \"f\"}]",
    }));
    let conversation = conversation(body);
    let roles: Vec<&str> = conversation.messages.iter().map(lora_data::Message::role).collect();
    assert_eq!(roles, ["system", "user", "assistant", "tool", "assistant"]);
    let call = &conversation.messages[2];
    assert_eq!(
        call.fields["tool_calls"],
        json!([{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}])
    );
    assert_eq!(call.fields["reasoning_content"], "hm");
    assert!(call.is_trained() && conversation.tools.is_some());
    let message =
        refusal(&json!({"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}));
    assert!(message.contains("conversations[1]") && message.contains("an answer"), "{message}");
}

#[test]
fn parts_of_a_content_list_become_fields() {
    let body = one(&json!({"messages": [
        {"role": "user", "content": [{"type": "text", "value": "a"}]},
        {"role": "assistant", "content": [
            {"type": "reasoning", "value": "hm"},
            {"type": "tool_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"},
        ]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": [{"type": "reasoning", "value": "so"}, {"type": "text", "value": "b"}]},
    ]}));
    let messages = conversation(body).messages;
    assert_eq!(messages[0].fields["content"], "a");
    assert_eq!(messages[1].fields["reasoning_content"], "hm");
    assert_eq!(messages[1].fields["tool_calls"][0]["function"]["arguments"]["x"], 1);
    assert_eq!((&messages[3].fields["content"], &messages[3].fields["reasoning_content"]), (&json!("b"), &json!("so")));
    let message = refusal(&json!({"messages": [{"role": "user", "content": [{"type": "tool_call", "value": "f()"}]}]}));
    assert!(message.contains("messages[0].content[0]"), "{message}");
}

#[test]
fn pairs_come_in_every_layout() {
    let good = turns(&[("user", "q", false), ("assistant", "good", true)]);
    let bad = turns(&[("user", "q", false), ("assistant", "bad", true)]);
    let user = json!({"role": "user", "content": "q"});
    let says = |text: &str| json!({"role": "assistant", "content": text});
    for record in [
        json!({"prompt": [user], "chosen": [says("good")], "rejected": [says("bad")]}),
        json!({"prompt": [user], "chosen": "good", "rejected": "bad"}),
        json!({"prompt": "q", "chosen": [says("good")], "rejected": [says("bad")]}),
        json!({"prompt": "q", "chosen": [user, says("good")], "rejected": [user, says("bad")]}),
        json!({"chosen": [user, says("good")], "rejected": [user, says("bad")]}),
        json!({"chosen_messages": [user, says("good")], "rejected_messages": [user, says("bad")]}),
        json!({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"},
               "rejected": {"from": "gpt", "value": "bad"}}),
        json!({"messages": [user], "chosen": says("good"), "rejected": says("bad")}),
    ] {
        let Body::Preference { chosen, rejected } = one(&record) else { panic!("{record}") };
        assert_eq!((said(&chosen), said(&rejected)), (good.clone(), bad.clone()), "{record}");
    }
    let text = |prompt: &str, completion: &str| {
        Box::new(Body::PromptCompletion { prompt: prompt.to_owned(), completion: completion.to_owned() })
    };
    let wanted = Body::Preference { chosen: text("q: ", "good"), rejected: text("q: ", "great") };
    assert_eq!(one(&json!({"prompt": "q: ", "chosen": "good", "rejected": "great"})), wanted);
    assert_eq!(one(&json!({"chosen": "q: good", "rejected": "q: great"})), wanted);
    let record = json!({"instruction": "i", "input": "x", "output": "o", "chosen": "good", "rejected": "bad"});
    let Body::Preference { chosen, .. } = one(&record) else { panic!() };
    assert!(matches!(*chosen, Body::Instruction(ref of) if of.output == "good" && of.input == "x"));

    assert!(refusal(&json!({"chosen": "a", "rejected": "a"})).contains("the same"));
    assert!(refusal(&json!({"chosen": "a", "rejected": 1})).contains("`rejected`"));
    assert!(refusal(&json!({"prompt": 1, "chosen": "a", "rejected": "b"})).contains("`prompt`"));
}

#[test]
fn rated_answers_come_in_every_layout() {
    let user = json!({"role": "user", "content": "q"});
    let says = |text: &str| json!({"role": "assistant", "content": text});
    let record = json!({"messages": [user, says("x"), user, says("y")], "label": false});
    let Body::Rated { answer, desirable: false } = one(&record) else { panic!() };
    let trained: Vec<bool> = said(&answer).iter().map(|(_, _, trained)| *trained).collect();
    assert_eq!(trained, [false, false, false, true]);
    let record = json!({"prompt": "q", "completion": "a", "label": true});
    assert!(matches!(one(&record), Body::Rated { desirable: true, .. }));
    let record = json!({"instruction": "q", "output": "a", "kto_tag": true, "history": [["b", "c"]]});
    let Body::Rated { answer, .. } = one(&record) else { panic!() };
    assert_eq!(said(&answer).iter().filter(|(_, _, trained)| *trained).count(), 1);
    assert!(refusal(&json!({"messages": [user], "label": true})).contains("at its end"));
}

const PAIR: &str = r#"{"prompt": [{"role": "user", "content": "q"}], "chosen": "good", "rejected": "bad"}"#;
const RATED: &str =
    r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": LABEL}"#;

#[test]
fn plain_training_refuses_pairs_unless_asked() {
    let (_folder, source) = write(PAIR, "jsonl");
    let rated = format!("{}\n{}\n", RATED.replace("LABEL", "true"), RATED.replace("LABEL", "false"));
    let (_folder2, kto) = write(rated, "jsonl");
    let build = |source: &Source, preference| {
        let options = DataOptions { preference, ..DataOptions::default() };
        build_dataset(std::slice::from_ref(source), &tokenizer(), &options, &mut |_, _| {})
    };
    for (source, format) in [(&source, "preference"), (&kto, "kto")] {
        let message = chain(&build(source, PreferenceUse::Refuse).unwrap_err());
        assert!(message.contains(format) && message.contains("data.preference"), "{message}");
    }
    let kept = |source: &Source, preference| build(source, preference).unwrap().examples.len();
    assert_eq!([kept(&source, PreferenceUse::Chosen), kept(&source, PreferenceUse::BothSides)], [1, 2]);
    assert_eq!([kept(&kto, PreferenceUse::Chosen), kept(&kto, PreferenceUse::BothSides)], [1, 2]);
}

#[test]
fn pairs_and_ratings_are_typed_examples() {
    let (_folder, source) = write(PAIR, "jsonl");
    let tokenizer = tokenizer();
    let options = DataOptions::default();
    let open = |sources: &[Source], options: &DataOptions, kind| {
        open_answers(sources, &tokenizer, options, kind, None, &mut |_, _| {})
    };
    let set = open(std::slice::from_ref(&source), &options, AnswerKind::Pairs).unwrap();
    let (rows, report) = (set.rows, set.report);
    let trained = |example: &lora_data::Example| {
        let ids: Vec<u32> =
            example.input_ids.iter().zip(&example.trained).filter(|(_, t)| **t).map(|(id, _)| *id).collect();
        tokenizer.decode(&ids, false).unwrap()
    };
    assert_eq!(
        (trained(&rows.example(0).unwrap()), trained(&rows.example(1).unwrap())),
        ("good<|im_end|>".into(), "bad<|im_end|>".into())
    );
    assert_eq!((report.read, report.kept, report.sources[0].records), (2, 2, 1));
    let twice = [source.clone(), source.clone()];
    for (dedup, kept) in [(false, 2), (true, 1)] {
        let options = DataOptions { dedup, ..DataOptions::default() };
        let set = open(&twice, &options, AnswerKind::Pairs).unwrap();
        assert_eq!((set.rows.len(), set.report.kept, set.report.duplicates), (2 * kept, 2 * kept, 1));
        assert_eq!(set.source_ends, [1, kept]);
    }
    assert!(chain(&open(&[source], &options, AnswerKind::Rated).unwrap_err()).contains("`label`"));

    let same = r#"{"prompt": "q", "chosen": "a", "rejected": "a"}"#;
    let (_folder, same) = write(format!("{same}\n"), "jsonl");
    let error = open(&[same], &options, AnswerKind::Pairs).unwrap_err();
    assert!(chain(&error).contains("neither is better") && error.is_bad_record(), "{}", chain(&error));

    let rated = format!("{}\n{}\n", RATED.replace("LABEL", "true"), RATED.replace("LABEL", "false"));
    let (_folder, kto) = write(rated, "jsonl");
    assert_eq!(open(&[kto], &options, AnswerKind::Rated).unwrap().good, [true, false]);
}

#[test]
fn duplicates_are_left_out_when_asked() {
    let line = RATED.replace(", \"label\": LABEL", "");
    let (_folder, source) = write(format!("{line}\n{line}\n"), "jsonl");
    let build = |dedup| {
        let options = DataOptions { dedup, ..DataOptions::default() };
        let sources = [source.clone(), source.clone()];
        let set = build_dataset(&sources, &tokenizer(), &options, &mut |_, _| {}).unwrap();
        (set.examples.len(), set.report.duplicates, set.source_ends)
    };
    assert_eq!(build(false), (4, 3, vec![2, 4]));
    assert_eq!(build(true), (1, 3, vec![1, 1]));
}

/// Writes an entry beside its data and reads it.
fn listed(entry: Value, data: &Value) -> Result<(Vec<Document>, Documents), String> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("d.json"), data.to_string()).unwrap();
    std::fs::write(folder.path().join("dataset_info.json"), json!({"other": {}, "d": entry}).to_string()).unwrap();
    let source = Source { path: folder.path().join("dataset_info.json#d"), ..Source::default() };
    let mut documents = Documents::open(&source, ReadOptions::default()).map_err(|error| chain(&error))?;
    let read = documents.by_ref().collect::<Result<Vec<_>, _>>().map_err(|error| chain(&error))?;
    Ok((read, documents))
}

#[test]
fn dataset_info_copies_the_null_trap() {
    let data = json!([{"q": "a", "input": "x", "a": "b"}]);
    let entry = json!({"file_name": "d.json", "columns": {"prompt": "q", "response": "a"}});
    let (read, documents) = listed(entry, &data).unwrap();
    let Body::Instruction(instruction) = &read[0].body else { panic!() };
    assert_eq!((instruction.instruction.as_str(), instruction.input.as_str()), ("a", ""));
    assert_eq!(documents.ignored_columns().keys().collect::<Vec<_>>(), ["input"]);
    let note = documents.source().notes.join("\n");
    assert!(note.contains("`query`") && note.contains("column input off"), "{note}");

    let usual = json!([{"instruction": "a", "input": "x", "output": "b", "history": [["c", "d"]], "system": "s"}]);
    let (read, documents) = listed(json!({"file_name": "d.json"}), &usual).unwrap();
    let Body::Instruction(instruction) = &read[0].body else { panic!() };
    // Without `columns`, history and system have no usual column.
    assert_eq!((instruction.input.as_str(), instruction.history.len(), &instruction.system), ("x", 0, &None));
    assert!(documents.source().notes.is_empty());
}

#[test]
fn dataset_info_tags_and_formats() {
    let entry = json!({"file_name": "d.json", "formatting": "sharegpt", "columns": {"messages": "m", "kto_tag": "good"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}});
    let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    let (read, documents) = listed(entry.clone(), &json!([{"m": messages, "good": true}])).unwrap();
    assert!(matches!(read[0].body, Body::Rated { desirable: true, .. }));
    assert_eq!(documents.format(), Some(Format::Kto));
    assert!(documents.source().notes.iter().any(|note| note.contains("system_tag")));
    let system = json!([{"m": [{"role": "system", "content": "s"}], "good": true}]);
    assert!(listed(entry, &system).unwrap_err().contains("the role `system`"));

    let text = json!([{"t": "a"}]);
    let (read, _) = listed(json!({"file_name": "d.json", "columns": {"prompt": "t"}}), &text).unwrap();
    assert_eq!(read[0].body, Body::Text("a".to_owned()));
    let ranking =
        json!({"file_name": "d.json", "ranking": true, "columns": {"prompt": "q", "chosen": "c", "rejected": "r"}});
    let (read, _) = listed(ranking, &json!([{"q": "a", "c": "b", "r": "d"}])).unwrap();
    assert!(matches!(read[0].body, Body::Preference { .. }));
}

#[test]
fn dataset_info_faults_are_named() {
    let none = json!([]);
    for (entry, wanted) in [
        (json!({"hf_hub_url": "a/b"}), ["dataset a/b of the hub", "hf download"]),
        (json!({"hf_hub_url": "a/b", "subset": "s"}), ["subset", "hf://a/b/PATH"]),
        (json!({"hf_hub_url": "../b"}), ["hf://../b", "not the name"]),
        (json!({"script_url": "x"}), ["script_url", "not run"]),
        (json!({"file_name": "../x.json"}), ["file_name", "inside"]),
        (json!({"file_name": "/etc/passwd"}), ["file_name", "inside"]),
        (json!({}), ["file_name", "missing"]),
        (json!({"file_name": "d.json", "columns": {"images": "i"}}), ["columns.images", "text"]),
        (json!({"file_name": "d.json", "columns": {"promt": "i"}}), ["columns.promt", "prompt, query"]),
        (json!({"file_name": "d.json", "formatting": "alpacca"}), ["formatting", "alpacca"]),
        (json!({"file_name": "d.json", "num_samples": 0}), ["num_samples", "above 0"]),
        (json!({"file_name": "d.json", "formatting": "sharegpt", "tags": {"role": "r"}}), ["tags.role", "role_tag"]),
        (
            json!({"file_name": "d.json", "formatting": "sharegpt", "tags": {"role_tag": "r"}}),
            ["content_tag", "missing"],
        ),
        (json!(5), ["`d`", "an object"]),
    ] {
        let message = listed(entry.clone(), &none).err().unwrap();
        for part in wanted {
            assert!(message.contains(part), "{entry}: {message:?} should say {part:?}");
        }
    }
    let (folder, _) = write("", "x");
    let path = folder.path().join("dataset_info.json");
    std::fs::write(&path, r#"{"alpaca_en": {}, "alpaca_zh": {}}"#).unwrap();
    let open = |path: String| {
        let source = Source { path: path.into(), ..Source::default() };
        chain(&Documents::open(&source, ReadOptions::default()).unwrap_err())
    };
    assert!(open(format!("{}#alpaca_em", path.display())).contains("did you mean `alpaca_en`"));
    assert!(open(path.display().to_string()).contains("several datasets"));
}
