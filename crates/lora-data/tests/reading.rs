//! Files of every shape: what is read, and what is refused with file, line and field.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{chain, write};
use lora_data::{Body, Document, Format, Instruction, Source, read_documents};
use proptest::prelude::*;

fn read(content: impl AsRef<[u8]>, extension: &str) -> Vec<Document> {
    let (_folder, source) = write(content, extension);
    read_documents(&source).unwrap()
}

fn refusal(content: impl AsRef<[u8]>, extension: &str) -> String {
    let (_folder, source) = write(content, extension);
    chain(&read_documents(&source).unwrap_err())
}

#[test]
fn reads_lines_and_arrays_alike() {
    let lines = "\u{FEFF}{\"text\": \"a\"}\r\n\r\n{\"text\": \"b\\nc\", \"id\": 1}";
    let array = "\u{FEFF}[\n {\"text\": \"a\"},\n\n {\"text\": \"b\\nc\", \"id\": 1}\n]\n";
    let texts = |documents: &[Document]| documents.iter().map(|d| d.body.clone()).collect::<Vec<_>>();
    let wanted = vec![Body::Text("a".to_owned()), Body::Text("b\nc".to_owned())];
    for (content, extension, lines) in [(lines, "jsonl", [1, 3]), (lines, "json", [1, 3]), (array, "json", [2, 4])] {
        let documents = read(content, extension);
        assert_eq!(texts(&documents), wanted);
        assert_eq!([documents[0].origin.line, documents[1].origin.line], lines);
        assert_eq!(documents[1].origin.record, 2);
    }
}

#[test]
fn reads_every_format() {
    let alpaca = r#"{"instruction": "Add", "input": null, "output": "3", "history": [["1", "2"]], "system": "s"}"#;
    let wanted = Instruction {
        system: Some("s".to_owned()),
        history: vec![("1".to_owned(), "2".to_owned())],
        instruction: "Add".to_owned(),
        input: String::new(),
        output: "3".to_owned(),
    };
    assert_eq!(read(alpaca, "jsonl")[0].body, Body::Instruction(wanted));

    let tokenized = r#"{"input_ids": [5, 6], "labels": [-100, 6]}"#;
    let wanted = Body::Tokenized { input_ids: vec![5, 6], labels: Some(vec![-100, 6]) };
    assert_eq!(read(tokenized, "ndjson")[0].body, wanted);

    let messages =
        r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": null, "weight": 0,
         "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
        {"role": "tool", "content": "1"}, {"role": "assistant", "content": "c"}], "tools": "[{\"name\": \"f\"}]"}"#
            .replace('\n', " ");
    let documents = read(messages, "jsonl");
    let Body::Conversation(conversation) = &documents[0].body else { panic!() };
    assert_eq!(conversation.messages[0].fields["content"], "ab");
    assert_eq!(conversation.messages[1].train, Some(false));
    assert_eq!(conversation.messages[1].fields["tool_calls"][0]["function"]["arguments"]["x"], 1);
    assert!(conversation.messages[3].is_trained());
    assert_eq!(conversation.tools.as_ref().unwrap()[0]["name"], "f");

    let sharegpt = r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#;
    let Body::Conversation(conversation) = &read(sharegpt, "jsonl")[0].body else { panic!() };
    assert_eq!(conversation.messages.iter().map(|m| m.role().to_owned()).collect::<Vec<_>>(), ["user", "assistant"]);

    let lists = r#"{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "completion": [{"role": "assistant", "content": "c"}]}"#
        .replace('\n', " ");
    let Body::Conversation(conversation) = &read(lists, "jsonl")[0].body else { panic!() };
    assert_eq!(conversation.messages.iter().map(|m| m.is_trained()).collect::<Vec<_>>(), [false, false, true]);
}

#[test]
fn columns_and_max_samples_apply() {
    let (_folder, mut source) =
        write("{\"q\": \"a\", \"a\": \"b\"}\n{\"q\": \"c\", \"a\": \"d\"}\nnot json\n", "jsonl");
    source.columns = [("prompt", "q"), ("completion", "a")].map(|(f, c)| (f.to_owned(), c.to_owned())).into();
    source.max_samples = Some(2);
    let documents = read_documents(&source).unwrap();
    assert_eq!(documents.len(), 2);
    let wanted = Body::PromptCompletion { prompt: "c".to_owned(), completion: "d".to_owned() };
    assert_eq!(documents[1].body, wanted);

    source.columns.insert("promt".to_owned(), "q".to_owned());
    let message = read_documents(&source).unwrap_err().to_string();
    assert!(message.contains("`promt`") && message.contains("`prompt`"), "{message}");
    source.format = Some(Format::Text);
    let message = read_documents(&source).unwrap_err().to_string();
    assert!(message.contains("format text has text"), "{message}");
}

/// Content, extension, and what the message must say.
#[test]
fn faults_are_named() {
    let good = "{\"text\": \"a\"}\n";
    let deep = format!("{{\"text\": {}1{}}}", "[".repeat(1000), "]".repeat(1000));
    let table: Vec<(Vec<u8>, &str, &[&str])> = vec![
        (b"".to_vec(), "jsonl", &["data.jsonl", "no record"]),
        (b"\n \n".to_vec(), "jsonl", &["no record"]),
        (b"[]".to_vec(), "json", &["no record"]),
        (b"{\n\"text\": \"a\"\n}".to_vec(), "json", &["array of records"]),
        (b"x".to_vec(), "pkl", &["pickle", ".jsonl"]),
        (b"x".to_vec(), "xlsx", &["`xlsx`", ".jsonl"]),
        (format!("{good}{{\"text\": \"b").into_bytes(), "jsonl", &["data.jsonl:2:", "EOF"]),
        (
            format!("{good}{{\"text\": \"a\", \"text\": \"b\"}}").into_bytes(),
            "jsonl",
            &["jsonl:2:", "`text` appears twice"],
        ),
        (format!("{good}{{\"text\": \"a\"}} x").into_bytes(), "jsonl", &["jsonl:2:", "trailing"]),
        (format!("{good}{{\"text\": \"a\0\"}}").into_bytes(), "jsonl", &["jsonl:2:", "control character"]),
        (format!("{good}[1]").into_bytes(), "jsonl", &["jsonl:2:", "object", "a list"]),
        (
            format!("{good}{{\"txt\": \"a\"}}").into_bytes(),
            "jsonl",
            &["jsonl:2:", "`text` of format text is missing", "`txt`"],
        ),
        (format!("{good}{{\"text\": null}}").into_bytes(), "jsonl", &["jsonl:2:", "missing"]),
        (
            format!("{good}{{\"text\": 5}}").into_bytes(),
            "jsonl",
            &["jsonl:2:", "`text` must be a string, found a number"],
        ),
        (format!("{good}{deep}").into_bytes(), "jsonl", &["jsonl:2:", "recursion"]),
        ([good.as_bytes(), b"{\"text\": \"\xff\"}"].concat(), "jsonl", &["jsonl:2:", "UTF-8"]),
        (b"[{\"text\": \"a\"},\n{\"text\": 1}]".to_vec(), "json", &["json:2", "`text`"]),
        (b"[{\"text\": \"a\"},\n{\"text\"".to_vec(), "json", &["json:2", "EOF"]),
        (b"[{\"text\": \"a\"}\n".to_vec(), "json", &["json:2", "cut off"]),
        (b"[{\"text\": \"a\"}\n{}]".to_vec(), "json", &["json:2", "`{`"]),
        (b"[{\"text\": \"a\"},\n\n{\"text\":\n \"a\xff\"}]".to_vec(), "json", &["json:4", "unicode"]),
        (b"5".to_vec(), "json", &["json:1", "a number"]),
        (b"{\"a\": 1}".to_vec(), "jsonl", &["cannot be told", "`a`", "format"]),
        (b"{\"text\": \"a\", \"input_ids\": [1]}".to_vec(), "jsonl", &["several formats", "text, tokenized"]),
        (b"{\"messages\": [], \"label\": true}".to_vec(), "jsonl", &["`messages` has no message"]),
        (b"{\"text\": \"a\", \"chosen\": \"b\"}".to_vec(), "jsonl", &["cannot be told"]),
        (b"{\"messages\": []}".to_vec(), "jsonl", &["`messages` has no message"]),
        (b"{\"messages\": [{\"role\": \"user\"}]}".to_vec(), "jsonl", &["messages[0].content", "missing"]),
        (b"{\"messages\": [{\"content\": \"a\"}]}".to_vec(), "jsonl", &["messages[0].role"]),
        (
            b"{\"messages\": [{\"role\": \"user\", \"content\": 1}]}".to_vec(),
            "jsonl",
            &["messages[0].content", "a number"],
        ),
        (b"{\"messages\": [{\"role\": \"user\", \"content\": \"a\", \"weight\": 0.5}]}".to_vec(), "jsonl", &["0 or 1"]),
        (
            b"{\"messages\": [{\"from\": \"function_call\", \"value\": \"a\"}]}".to_vec(),
            "jsonl",
            &["messages[0].value", "not JSON"],
        ),
        (
            b"{\"messages\": [{\"from\": \"narrator\", \"value\": \"a\"}]}".to_vec(),
            "jsonl",
            &["`narrator`", "human", "tags"],
        ),
        (
            b"{\"conversations\": [{\"from\": \"gpt\", \"value\": \"a\"}]}".to_vec(),
            "jsonl",
            &["conversations[0]", "at its beginning"],
        ),
        (
            b"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"tool\", \"content\": \"b\"}]}"
                .to_vec(),
            "jsonl",
            &["messages[1]", "`tool`", "call"],
        ),
        (b"[{\"text\": \"a\"}] x".to_vec(), "json", &["json:1", "end of the file", "`x`"]),
        (b"\xff\xfea\0".to_vec(), "jsonl", &["jsonl:1:", "UTF-8"]),
        (
            b"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"tools\": \"{\"}".to_vec(),
            "jsonl",
            &["`tools`"],
        ),
        (b"{\"prompt\": \"a\", \"completion\": [1]}".to_vec(), "jsonl", &["`completion`", "same kind"]),
        (b"{\"input_ids\": [1, 2.5]}".to_vec(), "jsonl", &["input_ids[1]", "an integer"]),
        (b"{\"input_ids\": [1], \"labels\": []}".to_vec(), "jsonl", &["`labels` has 0"]),
        (b"{\"instruction\": \"a\", \"output\": \"b\", \"history\": [[\"a\"]]}".to_vec(), "jsonl", &["history[0]"]),
    ];
    for (content, extension, wanted) in table {
        let message = refusal(&content, extension);
        for part in wanted {
            assert!(message.contains(part), "{message:?} should say {part:?}");
        }
    }
    let missing = Source { path: "/no/such/file.jsonl".into(), ..Source::default() };
    assert!(chain(&read_documents(&missing).unwrap_err()).contains("/no/such/file.jsonl"));
}

const SEED: &[&str] = &[
    r#"{"instruction": "Add 1 and 2.", "input": "é🦀", "output": "3", "history": [["a", "b"]]}"#,
    r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "weight": 1}], "tools": []}"#,
    r#"{"prompt": "p", "completion": "c"}"#,
    r#"{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}"#,
    r#"{"text": "t", "n": -1.5e300, "b": [true, false, null]}"#,
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    /// Whatever happens to a file, reading it ends with documents or an error.
    #[test]
    fn mutated_files_never_panic(
        kind in 0..SEED.len(),
        is_array: bool,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4_u8), 0..6),
    ) {
        let mut bytes = if is_array {
            format!("[{0},\n{0}]", SEED[kind]).into_bytes()
        } else {
            format!("{0}\n{0}\n", SEED[kind]).into_bytes()
        };
        for (place, byte, edit) in edits {
            let at = place.index(bytes.len().max(1)).min(bytes.len().saturating_sub(1));
            match edit {
                0 if !bytes.is_empty() => bytes[at] = byte,
                1 if !bytes.is_empty() => { bytes.remove(at); }
                2 => bytes.insert(at, byte),
                _ => bytes.truncate(at),
            }
        }
        let (_folder, source) = write(&bytes, if is_array { "json" } else { "jsonl" });
        match read_documents(&source) {
            Ok(documents) => prop_assert!(!documents.is_empty()),
            Err(error) => prop_assert!(error.to_string().contains("data.json")),
        }
    }
}
