//! Who is trained, what becomes of long rows, and that every choice is counted.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{build, chain, copied_tokenizer, tokenizer};
use lora_data::{DataOptions, Dataset, DropReason, Example, Tokenizer, Truncation, builtin_templates};
use proptest::prelude::*;
use serde_json::{Value, json};

/// The trained tokens as text, runs of them apart.
fn runs(example: &Example, tokenizer: &Tokenizer) -> Vec<String> {
    let pairs: Vec<(u32, bool)> = example.input_ids.iter().copied().zip(example.trained.iter().copied()).collect();
    let runs = pairs.chunk_by(|a, b| a.1 == b.1).filter(|run| run[0].1);
    runs.map(|run| tokenizer.decode(&run.iter().map(|(id, _)| *id).collect::<Vec<_>>(), false).unwrap()).collect()
}

fn text(example: &Example, tokenizer: &Tokenizer) -> String {
    tokenizer.decode(&example.input_ids, false).unwrap()
}

fn talk(turns: usize) -> Value {
    let mut messages = vec![json!({"role": "system", "content": "sys"})];
    for k in 0..turns {
        messages.push(json!({"role": "user", "content": format!("ask {k}")}));
        messages.push(json!({"role": "assistant", "content": format!("say {k}")}));
    }
    json!({"messages": messages})
}

fn one(record: &Value, tokenizer: &Tokenizer, options: &DataOptions) -> Dataset {
    build(&record.to_string(), tokenizer, options).unwrap()
}

#[test]
fn roles_and_turns_are_chosen() {
    let t = tokenizer();
    let last = DataOptions { train_on_last_turn_only: true, ..DataOptions::default() };
    assert_eq!(runs(&one(&talk(3), &t, &last).examples[0], &t), ["say 2<|im_end|>"]);
    let alpaca = json!({"instruction": "Add", "output": "3", "history": [["x", "y"]]});
    assert_eq!(runs(&one(&alpaca, &t, &last).examples[0], &t), ["3<|im_end|>"]);

    let roles = |roles: &[&str]| DataOptions {
        train_roles: roles.iter().map(|role| (*role).to_owned()).collect(),
        ..DataOptions::default()
    };
    let both = one(&talk(2), &t, &roles(&["assistant", "user"]));
    assert_eq!(
        runs(&both.examples[0], &t),
        ["ask 0<|im_end|>", "say 0<|im_end|>", "ask 1<|im_end|>", "say 1<|im_end|>"]
    );
    assert_eq!(runs(&one(&talk(1), &t, &roles(&["system"])).examples[0], &t), ["sys<|im_end|>"]);
    // What the letters of a message have in common with those before them is still a part of the message.
    let alike = json!({"messages": [{"role": "user", "content": "xxx"}, {"role": "user", "content": " xy"}, {"role": "assistant", "content": "z"}]});
    assert_eq!(runs(&one(&alike, &t, &roles(&["user"])).examples[0], &t), ["xxx<|im_end|>", " xy<|im_end|>"]);

    // A message's own flag goes before its role.
    let mut record = talk(2);
    record["messages"][1]["train"] = json!(true);
    record["messages"][2]["train"] = json!(false);
    assert_eq!(
        runs(&one(&record, &t, &DataOptions::default()).examples[0], &t),
        ["ask 0<|im_end|>", "say 1<|im_end|>"]
    );
    let nobody = build(&talk(1).to_string(), &t, &roles(&["critic"])).unwrap_err();
    assert!(chain(&nobody).contains("no assistant message"), "{}", chain(&nobody));
}

#[test]
fn other_roles_are_trained_beside_generation_blocks() {
    let t = tokenizer();
    let options = DataOptions {
        template: Some("chatml".into()),
        train_roles: vec!["assistant".into(), "user".into()],
        ..DataOptions::default()
    };
    let set = one(&talk(1), &t, &options);
    assert_eq!(runs(&set.examples[0], &t), ["ask 0<|im_end|>", "say 0<|im_end|>"]);
    assert!(set.report.template.as_ref().unwrap().marks_generation);
}

/// A token that reaches over the edge of an answer is divided: `\n` before it and `\n` in it are two tokens when it is
/// generated.
#[test]
fn no_token_reaches_into_an_answer() {
    let t = merging_tokenizer();
    assert_eq!(t.1.encode("\n\n", false).unwrap().len(), 1, "the tokenizer of this test merges line breaks");
    let record = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\nb"}]});
    let set = one(&record, &t.1, &DataOptions::default());
    assert_eq!(runs(&set.examples[0], &t.1), ["\nb<|im_end|>"]);
    assert_eq!(text(&set.examples[0], &t.1), "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n\nb<|im_end|>\n");
    assert_eq!(set.report.merged_edges, 0);
}

/// The fixture's tokenizer with one merge more.
fn merging_tokenizer() -> (tempfile::TempDir, Tokenizer) {
    let (folder, t) = copied_tokenizer(|dir| {
        let path = dir.join("tokenizer.json");
        let mut file: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let free = file["model"]["vocab"].as_object().unwrap().values().filter_map(Value::as_u64).max().unwrap();
        let added = file["added_tokens"].as_array().unwrap().iter().filter_map(|t| t["id"].as_u64()).max().unwrap();
        file["model"]["vocab"]["ĊĊ"] = json!(free.max(added) + 1);
        let merges = file["model"]["merges"].as_array_mut().unwrap();
        let as_pairs = merges.first().is_some_and(Value::is_array);
        merges.insert(0, if as_pairs { json!(["Ċ", "Ċ"]) } else { json!("Ċ Ċ") });
        std::fs::write(&path, file.to_string()).unwrap();
    });
    (folder, t.unwrap())
}

fn limited(truncation: Truncation, max_length: usize) -> DataOptions {
    DataOptions { max_length, truncation, max_affected_share: 1.0, ..DataOptions::default() }
}

#[test]
fn whole_turns_are_left_out() {
    let t = tokenizer();
    let record = talk(6);
    let full = one(&record, &t, &DataOptions::default());
    let length = full.examples[0].input_ids.len();
    let max_length = length / 2;
    let kept = |truncation| -> (Vec<String>, Dataset) {
        let set = one(&record, &t, &limited(truncation, max_length));
        assert!(set.examples.iter().all(|e| e.input_ids.len() <= max_length));
        (runs(&set.examples[0], &t), set)
    };
    let (left, set) = kept(Truncation::LeftTurns);
    assert!(text(&set.examples[0], &t).starts_with("<|im_start|>system\nsys<|im_end|>"), "the system message stays");
    assert_eq!(left.last().unwrap(), "say 5<|im_end|>");
    assert!(!left.contains(&"say 0<|im_end|>".to_owned()) && left.len() >= 2, "{left:?}");
    let report = &set.report;
    assert_eq!((report.truncated, report.cut_turns), (1, 6 - left.len()));
    assert_eq!(report.cut_tokens + set.examples[0].input_ids.len(), length);
    assert_eq!(report.cut_trained_tokens + report.trained_tokens, full.report.trained_tokens);

    let (right, _) = kept(Truncation::RightTurns);
    assert_eq!(right.first().unwrap(), "say 0<|im_end|>");
    assert!(!right.contains(&"say 5<|im_end|>".to_owned()), "{right:?}");
    let (middle, _) = kept(Truncation::MiddleTurns);
    assert!(
        middle.contains(&"say 0<|im_end|>".to_owned()) && middle.contains(&"say 5<|im_end|>".to_owned()),
        "{middle:?}"
    );

    // One turn that is too long alone is not cut in two.
    let long = talk(1);
    let short = one(&json!({"text": "a"}), &t, &DataOptions::default());
    assert_eq!(short.report.kept, 1);
    let lines = format!("{}\n{}\n", long, talk(0).to_string().replace("sys", "x"));
    let error = build(&lines, &t, &limited(Truncation::LeftTurns, 8)).unwrap_err();
    assert!(chain(&error).contains("1 too long"), "{}", chain(&error));

    let alpaca = json!({"instruction": "third", "output": "3", "history": [["first", "1"], ["second", "2"]]});
    let whole = one(&alpaca, &t, &DataOptions::default()).examples[0].input_ids.len();
    let set = one(&alpaca, &t, &limited(Truncation::LeftTurns, whole - 1));
    assert_eq!(runs(&set.examples[0], &t), ["2<|im_end|>", "3<|im_end|>"]);
    let set = one(&alpaca, &t, &limited(Truncation::RightTurns, whole - 1));
    assert_eq!(runs(&set.examples[0], &t), ["1<|im_end|>", "2<|im_end|>"]);
}

#[test]
fn long_rows_are_split_or_lose_their_middle() {
    let t = tokenizer();
    let record = json!({"text": "0123456789012345678901234567890123456789"});
    let full = one(&record, &t, &DataOptions::default());
    let ids = &full.examples[0].input_ids;
    let split = one(&record, &t, &limited(Truncation::Split, 16));
    assert_eq!(split.report.split_rows + 1, split.examples.len());
    assert_eq!((split.report.truncated, split.report.cut_tokens), (1, 0));
    assert_eq!(split.report.trained_tokens, full.report.trained_tokens, "every token is trained once");
    let joined: Vec<u32> =
        split.examples.iter().enumerate().flat_map(|(i, e)| e.input_ids[usize::from(i > 0)..].to_vec()).collect();
    assert_eq!(&joined, ids);
    assert_eq!((split.report.without_end, split.report.end_tokens["<|im_end|>"]), (split.examples.len() - 1, 1));

    let middle = one(&record, &t, &limited(Truncation::Middle, 16));
    let example = &middle.examples[0];
    assert_eq!(example.input_ids, [&ids[..8], &ids[ids.len() - 8..]].concat());
    assert_eq!(example.trained.iter().filter(|t| !**t).count(), 2, "the first token, and the first after the gap");
    assert_eq!(middle.report.cut_tokens, ids.len() - 16);

    let dropped = format!("{}\n{record}\n", json!({"text": "ab"}));
    let set = build(&dropped, &t, &limited(Truncation::Drop, 16)).unwrap();
    assert_eq!(set.report.dropped[&DropReason::TooLong].count, 1);
    assert_eq!((set.report.dropped_tokens, set.report.dropped_trained_tokens), (ids.len(), ids.len() - 1));
}

/// An added token in an answer is not its end.
#[test]
fn an_end_that_is_never_trained_is_refused() {
    let source = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let (_folder, t) = copied_tokenizer(|dir| std::fs::write(dir.join("chat_template.jinja"), source).unwrap());
    let record =
        json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<|im_start|> b"}]});
    let error = build(&record.to_string(), &t.unwrap(), &DataOptions::default()).unwrap_err();
    assert!(error.to_string().contains("never learn to stop"), "{error}");
}

#[test]
fn a_system_prompt_of_an_instruction_must_be_written() {
    let source = "{% for m in messages if m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let (_folder, t) = copied_tokenizer(|dir| std::fs::write(dir.join("chat_template.jinja"), source).unwrap());
    let record = json!({"system": "S", "instruction": "a", "output": "b"});
    let error = build(&record.to_string(), &t.unwrap(), &DataOptions::default()).unwrap_err();
    assert!(error.to_string().contains("role `system`"), "{error}");
}

#[test]
fn built_in_templates_train_the_answers() {
    let (_folder, t) = copied_tokenizer(|dir| std::fs::remove_file(dir.join("chat_template.jinja")).unwrap());
    let t = t.unwrap();
    let missing = build(&talk(1).to_string(), &t, &DataOptions::default()).unwrap_err();
    assert!(chain(&missing).contains("\"chatml\""), "{}", chain(&missing));
    for name in builtin_templates() {
        let options = DataOptions { template: Some(name.into()), max_affected_share: 1.0, ..DataOptions::default() };
        match build(&talk(2).to_string(), &t, &options) {
            Ok(set) => {
                let runs = runs(&set.examples[0], &t);
                let words: Vec<String> = runs.iter().map(|run| run.trim().to_owned()).collect();
                assert!(words.iter().zip(["say 0", "say 1"]).all(|(a, b)| a.starts_with(b)), "{name}: {words:?}");
                assert_eq!(words.len(), 2, "{name}");
            }
            // Their end tokens are plain text to this tokenizer.
            Err(error) => assert!(
                ["gemma", "llama3", "phi3"].contains(&name) && error.to_string().contains("never learn to stop"),
                "{name}: {}",
                chain(&error)
            ),
        }
        let tool = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}, {"role": "tool", "content": "b"}, {"role": "assistant", "content": "c"}]});
        let error = build(&tool.to_string(), &t, &options).unwrap_err();
        assert!(chain(&error).contains("no role tool"), "{name}: {}", chain(&error));
    }
    let options = DataOptions { template: Some("chatlm".into()), ..DataOptions::default() };
    let error = build(&talk(1).to_string(), &t, &options).unwrap_err();
    assert!(error.to_string().contains("chatlm") && error.to_string().contains("chatml, gemma"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the policy and the limit: rows fit, nothing is trained twice, and the counts add up.
    #[test]
    fn counts_add_up(
        turns in prop::collection::vec(1..6_usize, 1..8),
        max_length in 6..60_usize,
        truncation in prop::sample::select(vec![
            Truncation::Drop, Truncation::Left, Truncation::Right, Truncation::Middle, Truncation::LeftTurns,
            Truncation::RightTurns, Truncation::MiddleTurns, Truncation::Split,
        ]),
    ) {
        let t = tokenizer();
        let lines: String = turns.iter().map(|&n| talk(n).to_string() + "\n").collect();
        let full = build(&lines, &t, &DataOptions::default()).unwrap().report;
        let Ok(Dataset { examples, report, .. }) = build(&lines, &t, &limited(truncation, max_length)) else { return Ok(()) };
        prop_assert!(examples.iter().all(|e| e.input_ids.len() <= max_length && e.trained.contains(&true) && !e.trained[0]));
        prop_assert_eq!(
            report.trained_tokens + report.cut_trained_tokens + report.dropped_trained_tokens,
            full.trained_tokens
        );
        prop_assert_eq!(report.tokens + report.cut_tokens + report.dropped_tokens, full.tokens + report.split_rows);
        let dropped: usize = report.dropped.values().map(|d| d.count).sum();
        prop_assert_eq!(report.kept + dropped, turns.len() + report.split_rows);
        prop_assert_eq!(report.end_tokens.values().sum::<usize>() + report.without_end, report.kept);
    }
}
